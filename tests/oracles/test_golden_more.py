"""Numbers that mergekit's own operators gave on two tiny matrices, for the methods beyond the first ten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spolia

BASE = torch.tensor([[1, -1, 0.5], [0, 2, -0.5]])
DELTAS = {
    "A": torch.tensor([[0.4, -0.2, 0.1], [0.3, -0.6, 0.05]]),
    "B": torch.tensor([[-0.1, -0.3, 0.2], [0.5, 0.4, -0.15]]),
    "C": torch.tensor([[0.2, 0.1, -0.4], [-0.05, 0.3, 0.25]]),
}
KIT = {"clamp": False, "least_product": 1e-6}  # what recipes of mergekit set
NU, MULTI = {"weight": [0.75, 0.25]}, {"weight": [0.5, 0.3, 0.2]}
# call -> (method, experts, with the base?, settings, result row by row)
GOLDEN: dict[str, tuple[str, str, bool, dict[str, Any], list[float]]] = {
    "sce, half": (
        "sce", "ABC", True, {"density": 0.5, "floor": 1e-6}, [1, -1, 0.1, 0.3989, 2.36406, -0.5],
    ),
    "sce": ("sce", "ABC", True, {}, [1.32895, -1.24636, 0.1, 0.39271, 2.36107, -0.37895]),
    "nuslerp": ("nuslerp", "AB", False, NU, [1.28972, -1.24034, 0.63293, 0.35474, 1.67246, -0.50659]),
    "nuslerp, rows": (
        "nuslerp", "AB", False, {**NU, "scope": "row"}, [1.28262, -1.23294, 0.6291, 0.35008, 1.65036, -0.5001],
    ),
    "nuslerp, columns": (
        "nuslerp", "AB", False, {**NU, "scope": "column"}, [1.28487, -1.23027, 0.62566, 0.35318, 1.6577, -0.50055],
    ),
    "nuslerp, base": ("nuslerp", "AB", True, NU, [1.34044, -1.3123, 0.67645, 0.48875, 1.59083, -0.51326]),
    "multislerp": ("multislerp", "ABC", False, MULTI, [1.27141, -1.2067, 0.5468, 0.29387, 1.89639, -0.47886]),
    "multislerp, base": ("multislerp", "ABC", True, MULTI, [1.39782, -1.30493, 0.51214, 0.53474, 1.8383, -0.4211]),
    "karcher": ("karcher", "ABC", False, {}, [1.22548, -1.16843, 0.47983, 0.25169, 2.0614, -0.45804]),
    "karcher, as set there": (
        "karcher", "ABC", False, {"max_iter": 10, "tol": 1e-5}, [1.22548, -1.16843, 0.47983, 0.25169, 2.0614, -0.45804],
    ),
    "model_stock": ("model_stock", "ABC", True, KIT, [0.84132, -0.87305, 0.53174, -0.23803, 1.96826, -0.54761]),
    "model_stock, rows": (
        "model_stock", "ABC", True, {**KIT, "scope": "row"}, [0.89965, -0.91972, 0.52007, -0.31724, 1.9577, -0.56345],
    ),
    "nearswap": ("nearswap", "A", True, {"t": 0.1}, [1.1, -1.1, 0.6, 0.1, 1.9, -0.45]),
    "arcee_fusion": ("arcee_fusion", "A", True, {}, [1, -1, 0.5, 0.3, 1.4, -0.5]),
    "ram": ("ram", "ABC", True, {}, [1.16667, -1.13333, 0.46667, 0.25, 2.03333, -0.45]),
    "ram, epsilon": ("ram", "ABC", True, {"epsilon": 0.15}, [1.3, -1.25, 0.4, 0.4, 2.03333, -0.25]),
    "ramplus_tl, epsilon": (
        "ramplus_tl", "ABC", True, {"epsilon": 0.15, "scope": "tensor"}, [1.3, -1.25, 0.4, 0.4, 2.03333, -0.245],
    ),
    "ramplus, epsilon": ("ramplus", "ABC", True, {"epsilon": 0.15}, [1.3, -1.25, 0.4, 0.4, 2.03333, -0.245]),
    "passthrough": ("passthrough", "A", False, {}, [1.4, -1.2, 0.6, 0.3, 1.4, -0.45]),
}  # fmt: skip


@pytest.mark.parametrize("call", GOLDEN)
def test_golden(call: str) -> None:
    method, experts, with_base, settings, want = GOLDEN[call]
    pool = [{"w": BASE + DELTAS[name]} for name in experts]
    merged = spolia.merge(pool, base={"w": BASE} if with_base else None, method=method, settings=settings)["w"]
    # 2e-5: the numbers are given with five decimals, and both sides round to fp32 on the way
    torch.testing.assert_close(merged, torch.tensor(want).view(2, 3), rtol=0, atol=2e-5)


def test_a_negative_mean_cosine_is_clamped_natively() -> None:
    """mergekit goes away from the experts here (t < 0)."""
    pool = [{"w": BASE + delta} for delta in DELTAS.values()]
    assert torch.equal(spolia.merge(pool, base={"w": BASE}, method="model_stock")["w"], BASE)

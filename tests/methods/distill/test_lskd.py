"""LSKD: scale and shift are not seen, its weights, what stays on raw logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spolia.core.divergence import standardized
from spolia.methods.distill.ctkd import Ctkd, ctkd
from spolia.methods.distill.dkd import Dkd, dkd
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.lskd import Lskd, lskd
from spolia.methods.distill.mlkd import Mlkd, mlkd

TERMS = {"kd": ("kd",), "dkd": ("target", "others"), "ctkd": ("kd",)}


@pytest.mark.parametrize("base", TERMS)
def test_scale_and_shift_are_not_seen(base: str, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 10)
    objective = lskd(Lskd(base=base))
    one, other = objective.parts(s, t, y), objective.parts(3 * s + 5, 0.2 * t - 1, y)
    for name in TERMS[base]:
        # 1e-7 beside the deviation, times the weights
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert (one["ce"] - other["ce"]).abs().max() > 0.1  # the labels see the logits as they are


def test_it_is_the_base_on_z_scores(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 10)
    z, w = standardized(s), standardized(t)
    ours, base = lskd().parts(s, t, y), kd(Kd(alpha=9.0, temperature=2.0)).parts(z, w, y)
    assert torch.equal(ours["kd"], base["kd"])
    assert torch.equal(ours["ce"], kd().parts(s, t, y)["ce"])
    ours = lskd(Lskd(base={"name": "dkd", "beta": 2.0})).parts(s, t, y)
    base = dkd(Dkd(alpha=9.0, beta=18.0, temperature=2.0)).parts(z, w, y)
    assert all(torch.equal(ours[name], base[name]) for name in TERMS["dkd"])
    ours, base = lskd(Lskd(base="ctkd")).parts(s, t, y), ctkd(Ctkd(base=Kd(alpha=9.0))).parts(z, w, y)
    torch.testing.assert_close(ours["kd"], base["kd"])
    given = lskd(Lskd(weight=2.0), kd(Kd(alpha=1.0, temperature=3.0))).parts(s, t, y)
    torch.testing.assert_close(given["kd"], kd(Kd(alpha=2.0, temperature=3.0)).parts(z, w, y)["kd"])


def test_relations_of_mlkd_are_not_standardised(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 6, 4)
    ours = lskd(Lskd(base="mlkd")).parts(s, t, y)
    plain = mlkd(Mlkd(alpha=9.0, temperature=2.0)).parts(s, t, y)
    assert torch.equal(ours["batch"], plain["batch"])
    assert torch.equal(ours["class"], plain["class"])
    scaled = lskd(Lskd(base="mlkd")).parts(3 * s + 5, t, y)
    torch.testing.assert_close(ours["kd"], scaled["kd"], rtol=1e-5, atol=1e-6)  # as above

"""passthrough is a copy, bit for bit, or a multiple."""

from __future__ import annotations

import pytest
import torch

import spolia
from spolia.errors import SpoliaError


def state(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {"w": torch.randn(300, 1000, generator=noise).to(dtype), "s": torch.tensor(-0.0, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_has_the_same_bits(dtype: torch.dtype) -> None:
    given = state(dtype)
    merged = spolia.merge([given], method="passthrough")
    for name, tensor in given.items():
        assert torch.equal(merged[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert merged[name].dtype == dtype and str(merged[name]) == str(tensor)


def test_a_multiple() -> None:
    given = state(torch.float32)
    for scale in (-0.5, (0.1,)):
        merged = spolia.merge([given], method="passthrough", settings={"scale": scale})["w"]
        factor = scale if isinstance(scale, float) else scale[0]
        assert torch.equal(merged, given["w"] * torch.tensor(factor))  # one fp32 product
    assert not spolia.merge([given], method="passthrough", settings={"scale": 0})["w"].any()


def test_another_type_is_the_rounded_copy() -> None:
    given = state(torch.float32)
    assert torch.equal(spolia.merge([given], method="passthrough", dtype="bfloat16")["w"], given["w"].bfloat16())


def test_one_model_only_and_no_base() -> None:
    given = state(torch.float32)
    with pytest.raises(SpoliaError, match="takes 1 experts, not 2"):
        spolia.merge([given, given], method="passthrough")

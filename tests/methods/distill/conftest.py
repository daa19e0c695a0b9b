"""Logits for the tests of losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Drawn = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def drawn() -> Drawn:
    """Student and teacher logits of a shape in fp64, and labels."""

    def make(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        s, t = (scale * torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(2))
        return s, t, torch.randint(shape[-1], shape[:-1], generator=source)

    return make

"""Where networks run: what `device` names, settled and checked before any work, and made to repeat itself there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.runs.studies import StudyRecipe


def placed(recipe: Any) -> tuple[Any, str]:
    """`recipe` with its device settled, and that device; the CPU where a recipe names none."""
    asked = getattr(recipe.problem, "device", None) if isinstance(recipe, StudyRecipe) else None
    if asked is None:
        return recipe, "cpu"
    device = settled(asked)
    return replace(recipe, problem=recipe.problem.model_copy(update={"device": device})), device


def settled(device: str) -> str:
    """`auto` is the first GPU with CUDA, else the CPU. SpoliaError for a device that is not there."""
    if device == "cpu":
        return device
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if device == "auto":
        return "cuda" if there else "cpu"
    there += ["cuda"] * bool(there) + ["mps"] * torch.backends.mps.is_available()
    if device not in there:
        mend = f"write auto, or one of {', '.join(['cpu', *there])}"
        raise SpoliaError(f"this machine has no {device}", where="problem.device", mend=mend)
    return device


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Inside, a GPU takes the operators that give equal bits again; one that has none such warns. The CPU needs no telling."""
    if device == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

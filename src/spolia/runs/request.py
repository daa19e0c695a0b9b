"""What a merge is asked to do, after reading, before planning: one shape for recipes, mergekit files and calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spolia.catalog import Method
from spolia.core.settings import MergeSettings
from spolia.errors import Problem


@dataclass(frozen=True)
class ModelRef:
    """A model on disk: the name the user gave it and the folder or file it stands in."""

    name: str
    path: Path


@dataclass
class MergeRequest:
    """One merge. `settings_for(tensor name)` gives that tensor's settings; per-model fields follow `experts`' order."""

    method: Method
    experts: list[ModelRef]  # in the user's order, the base not among them
    settings_for: Callable[[str], MergeSettings]
    base: ModelRef | None = None
    out_dtype: str | None = None  # "bfloat16" …; None keeps what each tensor is stored in
    donor: ModelRef | None = (
        None  # whose config, tokenizer and generation files go along; None: base, else first expert
    )
    seed: int = 0
    recipe: str = ""  # text kept beside the result
    recipe_name: str = "recipe.yaml"
    warnings: list[Problem] = field(default_factory=list)
    on_size_mismatch: Literal["refuse", "truncate"] = "refuse"
    check_tensors: Callable[[list[str]], list[Problem]] | None = (
        None  # told the output names; e.g. filters that match none
    )

"""What a merge is asked to do, after reading, before planning: one shape for recipes, mergekit files and calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spolia.catalog import Method
from spolia.core.settings import MergeSettings
from spolia.errors import Problem
from spolia.parts.align import Wire
from spolia.parts.preprocessed import Step
from spolia.parts.rows import RowMap


@dataclass(frozen=True)
class ModelRef:
    """A model on disk: the name the user gave it, the folder or file it stands in, and a LoRA adapter on top of it."""

    name: str
    path: Path
    lora: Path | None = None

    @property
    def key(self) -> ModelRef:
        """Equal for every spelling of one model, whatever it is called."""
        return ModelRef("", self.path.resolve(), self.lora.resolve() if self.lora is not None else None)

    def is_same(self, other: ModelRef) -> bool:
        """Whether both mean the same weights."""
        return self.key == other.key


def distinct(refs: Iterable[ModelRef]) -> list[ModelRef]:
    """Each model once, where and as it was first named."""
    found: dict[ModelRef, ModelRef] = {}
    for ref in refs:
        found.setdefault(ref.key, ref)
    return list(found.values())


@dataclass
class TokenPlan:
    """One vocabulary for all models: whose tokenizer goes along, and where the rows of their embeddings come from."""

    owner: ModelRef  # its tokenizer files are copied
    written: dict[str, str] = field(default_factory=dict)  # tokenizer files that are nobody's own, by name
    rows: int | None = None  # rows of every embedding; None: they stay as they are
    lenders: list[ModelRef] = field(default_factory=list)  # the models, as the maps number them
    maps: list[RowMap] = field(default_factory=list)  # one for each lender
    renumbered: dict[int, int] = field(default_factory=dict)  # the donor's id of a token -> its id in the result


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
    preprocess: tuple[Step, ...] = ()  # what is done to the task vectors first
    recipe: str = ""  # text kept beside the result
    recipe_name: str = "recipe.yaml"
    warnings: list[Problem] = field(default_factory=list)
    on_size_mismatch: Literal["refuse", "truncate"] = "refuse"
    check_tensors: Callable[[list[str]], list[Problem]] | None = (
        None  # told the output names; e.g. filters that match none
    )
    # Inputs of every output tensor, models numbered with the base first; None: the tensor of that name in all models.
    wiring: Mapping[str, Wire] | None = None
    reshape: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # what the wiring changes in the donor's config
    notes: list[str] = field(default_factory=list)  # what the plan tells about the wiring
    tokens: TokenPlan | None = None  # None: embeddings are merged where they stand, tokenizer files come from the donor
    chat_template: str | None = None  # takes the place of the donor's

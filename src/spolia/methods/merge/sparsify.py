"""TIES, DARE, DELLA and Breadcrumbs: thin out each task vector, let the experts vote on signs, add what is left.

One family, for experts that disturb each other when merely added:

    kept_k = rescale(sparsify(tau_k)),   D_k = w_k kept_k
    sign   = sign(sum_k D_k)                                         only with `elect`
    mix    = sum_k D_k [sign(D_k) = sign] / sum_k w_k [...]          divided only with `normalize`
    theta  = theta_0 + lambda * mix

| method | keeps of a task vector | paper |
|---|---|---|
| ties | the `density` largest magnitudes | Yadav et al., NeurIPS 2023, arXiv 2306.01708 |
| dare, dare_ties | each element with probability `density` | Yu et al., ICML 2024, arXiv 2311.03099 |
| della, della_linear | likewise, with density -/+ epsilon for a row's smallest/largest | Deep et al. 2024, arXiv 2406.11617 |
| breadcrumbs(_ties) | the `density` largest below the `gamma` largest | Davari & Belilovsky, ECCV 2024, arXiv 2312.06795 |

| paper | here | | paper | here |
|---|---|---|---|---|
| k (TIES), 1 - p (DARE) | `density` | | gamma (TIES) | sign of the summed block |
| lambda | `scale` | | beta, gamma (Breadcrumbs) | `gamma` |
| disjoint mean | `normalize` | | epsilon (DELLA) | `epsilon` |

Three TIES are published: the paper's (trim the whole model, disjoint mean: the default), the sum at lambda = 0.3 used
by AdaMerging (`normalize: false, scale: 0.3`), and a trim per tensor (`scope: tensor`). Elements that equal the
threshold: all are kept (`at_threshold: all`, as in the paper's code), or exactly as many as asked, lowest index first
(`exact`). Departures: the paper's code keeps one element too many (`count: legacy` does) and fails at density 1; DELLA's
window is narrowed where it would leave [0, 1]; a one-element row has the density as its probability. Data touched: none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import WIDE_BLOCK, Block, Stack
from spolia.errors import Problem, SpoliaWarning
from spolia.methods.merge.sparsifiers import Survey, by_rows, half_window, rescaled, survey

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["survey"]
_DENSITY = "share of each task vector that is kept"
_TIES, _DARE, _DELLA, _CRUMBS = "Yadav et al. 2023", "Yu et al. 2024", "Deep et al. 2024", "Davari & Belilovsky 2024"


class Sparsified(MergeSettings):
    """What the family shares. Every per-model field takes one number, or one for each expert."""

    kind: ClassVar[str]
    elect: ClassVar[bool] = True
    vectors: ClassVar[bool] = True

    density: PerModel = setting(0.2, _DENSITY, source=_TIES, unit="0 to 1")
    weight: PerModel = setting(1.0, "factor of each task vector", source=_TIES)
    scale: float = setting(1.0, "lambda, factor of the merged task vector", source=_TIES)
    normalize: bool = setting(True, "divide by the weights that took part", source=_TIES)
    zero_sign: Literal["majority", "+"] = setting(
        "majority", "sign where the votes cancel: that of most elements of the model, or plus", source=_TIES
    )
    rescale: Literal["none", "inverse_p", "l1"] = setting(
        "none", "make up for what was dropped: by the probability, or by the tensor's L1 norm", source=_TIES
    )

    @field_validator("density", "gamma", "epsilon", check_fields=False)
    @classmethod
    def _share(cls, value: PerModel) -> PerModel:
        if not all(0 <= v <= 1 for v in ((value,) if isinstance(value, int | float) else value)):
            raise ValueError("must lie in 0..1")
        return value

    @field_validator("rescale")
    @classmethod
    def _has_probabilities(cls, value: str) -> str:
        if value == "inverse_p" and cls.kind == "magnitude":
            raise ValueError("nothing is dropped at random here, so there is no probability: use `l1` or `none`")
        return value

    @field_validator("zero_sign")
    @classmethod
    def _has_votes(cls, value: str, info: ValidationInfo) -> str:
        if not cls.elect and value != cls.model_fields["zero_sign"].default:
            warn_unless_told(
                info, "zero_sign", f"`{value}` has no effect: this method elects no signs", "leave it away"
            )
        return value

    @property
    def whole_rows(self) -> bool:
        return by_rows(self)


class _Ranked(Sparsified):
    scope: Literal["model", "tensor", "row"] = setting("tensor", "what one threshold is taken over", source=_TIES)
    count: Literal["round", "floor", "legacy"] = setting(
        "round", "how density * size becomes a count; legacy is the published code's floor + 1", source="nearest count"
    )
    at_threshold: Literal["all", "exact"] = setting(
        "all", "elements equal to the threshold: all, or lowest index first", source=_TIES
    )
    gamma: PerModel = setting(0.0, "share of the largest magnitudes dropped first", source=_TIES, unit="0 to 1")

    @property
    def elementwise(self) -> bool:
        return self.scope == "model" and self.at_threshold == "all" and self.rescale != "l1"


class Ties(_Ranked):
    """Settings of `ties`."""

    kind: ClassVar[str] = "magnitude"
    scope: Literal["model", "tensor", "row"] = setting("model", "what one threshold is taken over", source=_TIES)


class Breadcrumbs(_Ranked):
    """Settings of `breadcrumbs`."""

    kind: ClassVar[str] = "magnitude"
    elect: ClassVar[bool] = False
    density: PerModel = setting(0.1, _DENSITY, source=f"{_CRUMBS}: 0.05 to 0.2", unit="0 to 1")
    scale: float = setting(0.2, "lambda, factor of the summed task vectors", source=_CRUMBS)
    normalize: bool = setting(False, "divide by the sum of the weights", source=_CRUMBS)
    scope: Literal["model", "tensor", "row"] = setting(
        "row", "what one threshold is taken over", source=f"{_CRUMBS}, code"
    )
    gamma: PerModel = setting(0.01, "share of the largest magnitudes dropped first", source=f"{_CRUMBS}: 0.001 to 0.01")


class BreadcrumbsTies(Breadcrumbs):
    """Settings of `breadcrumbs_ties`."""

    elect: ClassVar[bool] = True


class Dare(Sparsified):
    """Settings of `dare`."""

    kind: ClassVar[str] = "random"
    elect: ClassVar[bool] = False
    density: PerModel = setting(0.2, _DENSITY + ", 1 - p", source=f"{_DARE}: p from 0.7 to 0.9", unit="0 to 1")
    scale: float = setting(0.3, "lambda, factor of the summed task vectors", source="as task_arithmetic")
    normalize: bool = setting(False, "divide by the sum of the weights", source=_DARE)
    rescale: Literal["none", "inverse_p", "l1"] = setting(
        "inverse_p", "make up for what was dropped: by the probability, or by the tensor's L1 norm", source=_DARE
    )

    @property
    def elementwise(self) -> bool:
        return self.rescale != "l1" and not (self.elect and self.zero_sign == "majority")


class DareTies(Dare):
    """Settings of `dare_ties`."""

    elect: ClassVar[bool] = True
    zero_sign: Literal["majority", "+"] = setting(
        "+", "sign where the votes cancel", source="votes of random subsets rarely cancel"
    )


class Della(Sparsified):
    """Settings of `della`."""

    kind: ClassVar[str] = "magprune"
    density: PerModel = setting(0.3, _DENSITY + ", 1 - p", source=_DELLA, unit="0 to 1")
    scale: float = setting(1.1, "lambda, factor of the merged task vector", source=f"{_DELLA}, code")
    zero_sign: Literal["majority", "+"] = setting(
        "+", "sign where the votes cancel", source="votes of random subsets rarely cancel"
    )
    epsilon: PerModel = setting(0.07, "half the spread of the keep-probability", source=f"{_DELLA}, code: window 0.14")
    rescale: Literal["none", "inverse_p", "l1"] = setting(
        "inverse_p",
        "make up for what was dropped: by each element's probability, or by the tensor's L1 norm",
        source=_DELLA,
    )

    @model_validator(mode="after")
    def _window_fits(self, info: ValidationInfo) -> Della:
        densities, epsilons = (v if isinstance(v, tuple) else (v,) for v in (self.density, self.epsilon))
        alike = len(densities) == len(epsilons)
        for d, epsilon in zip(densities, epsilons, strict=True) if alike else product(densities, epsilons):
            if 0 < d < 1 and (half := half_window(d, epsilon)) < epsilon:
                what = f"density {d:g} and epsilon {epsilon:g} leave 0..1"
                mend = f"the window is narrowed to {d - half:g}..{d + half:g}; choose a smaller epsilon"
                warn_unless_told(info, "epsilon", what, mend)
        return self


class DellaLinear(Della):
    """Settings of `della_linear`."""

    elect: ClassVar[bool] = False
    scale: float = setting(0.3, "lambda, factor of the summed task vectors", source="as task_arithmetic")
    normalize: bool = setting(False, "divide by the sum of the weights", source="as task_arithmetic")


def warn_unless_told(info: ValidationInfo, field: str, what: str, mend: str) -> None:
    """A SpoliaWarning, unless whoever validates has told it in the words of the recipe's reader."""
    if not (info.context or {}).get("told"):
        warnings.warn(str(Problem(f"settings.{field}", what, mend)), SpoliaWarning, stacklevel=2)


def sparsified(stack: Stack, settings: Sparsified, survey: Survey | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each. `survey` holds model-wide thresholds where the scope asks for them."""
    share = torch.tensor(each(settings.weight, len(stack.experts)), dtype=stack.dtype).unsqueeze(1)  # [experts, 1]
    if settings.kind == "random":
        stack.block = WIDE_BLOCK  # many short steps a block: fewer blocks, less waiting of threads for each other
    sweep = rescaled(stack, settings, survey, share)
    tie_sign = survey.majority if survey is not None and settings.zero_sign == "majority" else 1.0
    keep = sweep()
    for block in stack.blocks(by_rows(settings)):
        changes = keep(block, block.deltas())  # [experts, n], times their weights
        if settings.elect:
            mix = _agreed(changes, share, settings.normalize, tie_sign)
        else:
            total = float(share.sum())
            mix = added(changes).div_(total if settings.normalize and abs(total) >= 1e-8 else 1.0)
        assert block.base is not None
        yield block, block.base.add_(mix, alpha=settings.scale)


def separated(stack: Stack, settings: Sparsified, survey: Survey | None = None) -> Iterator[tuple[Block, Tensor]]:
    """What `sparsified` adds, before it is added: the experts' changes, zero where another sign was elected. [experts, n]

    Weights and scale play no part, in the vote neither; TIES vectors of AdaMerging++ are these.
    """
    sweep = rescaled(stack, settings, survey, torch.ones(len(stack.experts), 1, dtype=stack.dtype))
    tie_sign = survey.majority if survey is not None and settings.zero_sign == "majority" else 1.0
    keep = sweep()
    for block in stack.blocks(by_rows(settings)):
        changes = keep(block, block.deltas())
        if settings.elect:
            against = _against(changes, tie_sign)
            _turn(_turn(changes, against).clamp_(min=0), against)
        yield block, changes


def added(changes: Tensor) -> Tensor:
    """The sum over the experts: [experts, n] -> [n]. For so few rows adding one after the other takes half of sum(0)."""
    total = changes[0].clone()
    for change in changes[1:]:
        total += change
    return total


def _against(changes: Tensor, tie_sign: float) -> Tensor:
    """Sign bits of the sum, as whole numbers: what turns an elected minus into a plus. [experts, n] -> [n]"""
    votes = added(changes)
    if (
        tie_sign < 0
    ):  # a cancelled vote is +0, which counts as plus; 0 - votes is +0 too, so this way it counts as minus
        votes = 0 - votes
    bits = votes.view(torch.int32 if votes.dtype == torch.float32 else torch.int64)
    lowest = torch.iinfo(bits.dtype).min
    return (bits & lowest) ^ lowest if tie_sign < 0 else bits.bitwise_and_(lowest)


def _turn(values: Tensor, against: Tensor) -> Tensor:
    """`values`, their sign turned where `against` has it set. In place."""
    values.view(against.dtype).bitwise_xor_(against)
    return values


def _agreed(changes: Tensor, share: Tensor, normalize: bool, tie_sign: float) -> Tensor:
    """Sum (or weighted mean) over the experts whose change has the elected sign. [experts, n] -> [n]

    Comparisons and masks cost several times a multiplication, so sign bits do the selecting.
    """
    against = _against(changes, tie_sign)
    agreeing = _turn(changes, against).clamp_(min=0)
    mix = _turn(added(agreeing), against)
    if normalize:
        agreeing.sign_()
        if not bool((share == 1).all()):
            agreeing.mul_(share)
        weights = added(agreeing)
        if bool((share > 0).all()):
            weights.clamp_(min=torch.finfo(weights.dtype).tiny)  # nobody agreed: mix is 0 there
        else:
            weights.masked_fill_(weights == 0, 1.0)
        mix.div_(weights)
    return mix

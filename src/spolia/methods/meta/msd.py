"""MSD, meta self-distillation: a start from which adapting on any view of a support gives the same answers.

For few-shot learners that latch on background, colour or noise of the few images they see. On top of MAML, ANIL, BOIL or
Unicorn-MAML. Cheng, Wei, He, Zhu, Huang, Yu, Ma, Yuan, Learn To Learn More Precisely, 2024, arXiv 2408.04590.

    theta_v = K steps of the base learner on view v of the support,  v = 1 … V        o_v = f(Q; theta_v) / T
    min over theta of  mean_v CE(o_v, y_Q) + lambda mean_{v,q} (1 - cos(p_v, p)),     p_v = softmax o_v,  p = mean_v p_v

| paper | here |
|---|---|
| V augmented supports | `views`, a function handed in; each image of each view is changed by itself, queries stay |
| L_ck, on class distributions | `compare: prob`, `target: mean`, `divergence: cosine` |
| lambda | `weight`, over the steps as `schedule` says |
| MAML, Unicorn-MAML below | `base`, with its own settings but for those named in `base_settings` |

Data touched: labelled inputs of the training classes; at test the plain support of the episode, or with `ensemble` also
views of it, and under `bn: batch` all its queries at once. No code of the paper is public, and number of views, inner steps
and lambda are not stated: ours. So is that a view is the same in all inner steps, that the mean gets a gradient, and all
that is for regression. cos is taken as 1 - |u - u'|^2 / 2 of unit vectors: exactly 1 for equal answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError, ValidationInfo, field_validator, model_validator

from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError, did_you_mean
from spolia.methods.meta.anil import Anil
from spolia.methods.meta.boil import Boil
from spolia.methods.meta.learner import MetaLearner
from spolia.methods.meta.maml import Maml
from spolia.methods.meta.train import Adapting, Source, meta_gradient, query_loss
from spolia.methods.meta.unicorn import Unicorn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.inner import Task
    from spolia.methods.meta.learner import Views
    from spolia.methods.meta.train import Outer, Watch
    from spolia.parts.episode import Episodes

BASES: dict[str, type[Adapting]] = {"maml": Maml, "anil": Anil, "boil": Boil, "unicorn": Unicorn}
_CHENG, _OURS = "Cheng et al. 2024", "our choice, not stated in the paper"


class Msd(Settings):
    """Settings of `msd`."""

    method: ClassVar[str] = "msd"

    base: Literal["maml", "anil", "boil", "unicorn"] = setting("maml", "learner that it stands on", source=_CHENG)
    base_settings: dict[str, Any] = setting(
        {}, "settings of that learner; those not named have its defaults", source=_OURS, validate_default=True
    )
    views: int = setting(2, "V, views of each support", source=_OURS, ge=1)
    parity: bool = setting(
        True,
        "cost of the base: its tasks of a step are divided by the views, one at least",
        source=f"{_CHENG}, the claim",
    )
    weight: float = setting(1.0, "lambda, weight of the disagreement", source=_OURS, ge=0)
    schedule: Literal["constant", "rise", "fall"] = setting(
        "constant", "of lambda: as it is, linearly from zero, or linearly to zero", source=_OURS
    )
    compare: Literal["prob", "logit", "centred_logit"] = setting(
        "prob", "what is compared: probabilities, outputs, or outputs less their mean over classes", source=_CHENG
    )
    target: Literal["mean", "mean_sg", "pairwise"] = setting(
        "mean", "each view with the mean of all, with that as a constant, or with each other view", source=_CHENG
    )
    divergence: Literal["cosine", "kl", "squared"] = setting(
        "cosine",
        "1 - cosine; KL from the target to the view's probabilities; squared distance over the target's variance",
        source=_CHENG,
    )
    resample_each_step: bool = setting(False, "every inner step sees another view", source=_OURS)
    ensemble: int = setting(
        0, "views adapted to at test beside the support itself, probabilities averaged", source=_OURS, ge=0
    )

    @field_validator("base_settings")
    @classmethod
    def _whole(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """All settings of the base, so that a run's recipe says them."""
        kind = BASES.get(info.data.get("base", ""))
        if kind is None:  # told already
            return value
        for name in value.keys() - kind.model_fields.keys():
            raise ValueError(
                f"base_settings: `{name}` is no setting of {kind.method}; {did_you_mean(name, kind.model_fields)}"
            )
        try:
            return kind(**value).model_dump(mode="json")
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            raise ValueError(f"base_settings: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @model_validator(mode="after")
    def _comparable(self) -> Msd:
        if self.divergence == "kl" and self.compare != "prob":
            raise ValueError("divergence: kl compares probabilities; write `compare: prob`")
        if self.basis().loss == "squared" and self.compare == "prob":
            raise ValueError("compare: numbers are no probabilities; write `compare: logit`, `divergence: squared`")
        return self

    def basis(self) -> Adapting:
        """The learner below, whose settings say how to adapt."""
        return BASES[self.base](**self.base_settings)


def msd(
    network: nn.Module,
    episodes: Source,
    settings: Msd,
    journal: Journal | None = None,
    *,
    views: Views | None = None,
    watch: Watch | None = None,
) -> MetaLearner:
    """A start from which views of one support lead to equal answers. `network`: as the base asks; it stays as it is.

    `views(x, count, draws)` makes [tasks, count, n, ...] of supports x [tasks, n, ...], drawing for each task from its own
    generator; data.augment's `Augment(...).views` is one. None: the support itself, V times. `watch`: see `maml`.
    """
    base = settings.basis()
    if settings.parity:
        base = base.model_copy(update={"tasks": max(1, base.tasks // settings.views)})

    def supports(batch: Episodes, step: int) -> tuple[Tensor, Tensor, bool]:
        each = base.inner_steps if settings.resample_each_step else 1
        x = viewed(views, batch, settings.views * max(1, each), episodes.seed)
        x = x.unflatten(1, (settings.views, each)) if settings.resample_each_step and each else x
        lead = x.shape[1 : 3 if settings.resample_each_step and each else 2]
        y = batch.support_y.view(len(x), *[1] * len(lead), *batch.support_y.shape[1:])
        return x, y.expand(-1, *lead, *batch.support_y.shape[1:]), len(lead) == 2

    def outer(step: int) -> Outer:
        return meta_loss(settings, base, weight_at(settings, step, base.steps))

    def tell(outputs: list[Tensor], step: int) -> dict[str, float]:
        found = [float(disagreement(one / base.temperature, settings)) for one in outputs]
        return {"disagreement": sum(found) / len(found)} if found else {}

    return meta_gradient(
        network,
        episodes,
        settings,
        journal,
        base=base,
        views=views,
        supports=supports,
        outer=outer,
        tell=tell,
        watch=watch,
    )


def meta_loss(settings: Msd, base: Adapting, weight: float) -> Outer:
    """Queries' loss, and `weight` times how far the views' answers are apart. outputs [views, queries, classes]"""
    judged = query_loss(base)

    def outer(outputs: Tensor, task: Task) -> Tensor:
        loss = judged(outputs, task)
        if weight == 0 or len(outputs) == 1:
            return loss
        return loss + weight * disagreement(outputs / base.temperature, settings)

    return outer


def disagreement(outputs: Tensor, settings: Msd) -> Tensor:
    """How far the answers of views [views, queries, classes] are from their target; exactly 0 for equal ones."""
    compared = {
        "prob": lambda o: o.softmax(-1),
        "logit": lambda o: o,
        "centred_logit": lambda o: o - o.mean(-1, keepdim=True),
    }[settings.compare](outputs)
    distance: Callable[[Tensor, Tensor], Tensor] = {"cosine": _cosine, "kl": _kl, "squared": _squared}[
        settings.divergence
    ]
    if settings.target == "pairwise":
        count = len(outputs)
        return distance(compared.unsqueeze(1), compared.unsqueeze(0)).sum((0, 1)).mean() / max(1, count * (count - 1))
    middle = compared.mean(0, keepdim=True)
    return distance(compared, middle.detach() if settings.target == "mean_sg" else middle).mean()


def weight_at(settings: Msd, step: int, steps: int) -> float:
    """lambda at an outer step."""
    share = step / max(1, steps - 1)
    return settings.weight * {"constant": 1.0, "rise": share, "fall": 1 - share}[settings.schedule]


def viewed(views: Views | None, batch: Episodes, count: int, seed: int) -> Tensor:
    """`count` versions of each support: [tasks, count, n, ...]. An episode's own depend on the seed and its number."""
    x = batch.support_x
    if views is None:
        return x.unsqueeze(1).expand(-1, count, *x.shape[1:])
    made = views(x, count, [generator(seed, "views", number) for number in batch.numbers])
    if tuple(made.shape) != (len(x), count, *x.shape[1:]):
        what = f"gives {list(made.shape)}, not {[len(x), count, *x.shape[1:]]}"
        raise SpoliaError(what, where="views", mend="return [tasks, count, n, ...] for supports [tasks, n, ...]")
    return made


# --- x and its target, any leading dimensions, [..., queries, classes] -> [..., queries] ------------------------------


def _cosine(x: Tensor, target: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize
    return (unit(x, dim=-1) - unit(target, dim=-1)).square().sum(-1) / 2


def _kl(x: Tensor, target: Tensor) -> Tensor:
    """KL(x || target): of the mean of all views, the mean over views is the Jensen-Shannon divergence."""
    small = torch.finfo(x.dtype).tiny
    return (x * (x.clamp(min=small).log() - target.clamp(min=small).log())).sum(-1)


def _squared(x: Tensor, target: Tensor) -> Tensor:
    """Over the target's variance among the queries, so that the size of outputs does not matter."""
    spread = (target - target.mean(-2, keepdim=True)).square().sum(-1).mean(-1, keepdim=True).detach()
    return (x - target).square().sum(-1) / spread.clamp(min=torch.finfo(x.dtype).eps)

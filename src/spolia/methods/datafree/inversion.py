"""Inversion: inputs that a classifier recognises, found with nothing but the classifier. By a generator, or pixel by pixel.

For whoever holds models and no data. Pixels: Yin et al., Dreaming to Distill, CVPR 2020, arXiv 1912.08795 (DeepInversion).
Generator: Fang et al., Contrastive Model Inversion, IJCAI 2021, arXiv 2105.08584, as data-free meta-learning uses it.

    min over phi, z of  CE(M(tau(x)), y) + w_bn bn(x) + w_adv adv(x) + w_tv tv(x) + w_l2 l2(x),     x = G(z, y; phi)

| paper | here |
|---|---|
| M, y | an expert; its outputs 0 … ways - 1, `per_class` images of each |
| tau | `augment`, `shift`, `flip`: a crop out of a black border, or a roll; then the expert's own size and normalisation |
| R_feature | bn, `bn_weight`: batch norm inputs' mean and variance against the running ones; see core/priors |
| R_compete, L_adv | adv, `adversarial_weight`: KL between expert and student where both say the same |
| R_tv, R_l2 | tv, l2 of the images in 0 … 1, all of them as one vector |

Data touched: none. Departures: no crops by default, for a black border fits no statistics; where there are some, every image is
moved by itself (`per_sample`), published codes move a batch as one. What is kept is a copy of the images at the lowest loss
(`keep`), where codes that keep a reference keep the last. Pixels are the sigmoid of what is optimised, so they stay in 0 … 1.
Experts of one kind run as one stack where that is quicker (`together`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spolia.core.dist import handed, world
from spolia.core.lazy import torch
from spolia.core.priors import statistics_gap
from spolia.core.seeds import entropy, generator
from spolia.core.settings import Settings, setting
from spolia.methods.datafree.fitting import Fit, device_of, fit
from spolia.parts.white import statistics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.generator import ImageGenerator
    from spolia.parts.white import White, WhitePool

    Student = Callable[[Tensor, Tensor], Tensor]  # images, labels -> logits [n, ways]
    Weights = dict[str, Tensor]

OURS, _FREE, _TGR = "our choice", "Wei et al. 2024, the released code", "Wei et al. 2024 (TGR), the released code"
_PURER = "PURER, the released code"
SOUND = (0.9, 0.5)  # least top-1 and most cross-entropy of images that their expert takes for real


class Inverting(Settings):
    """How images are recovered from one expert."""

    recovery_steps: int = setting(200, "steps of Adam for each expert", source=_TGR, ge=1)
    per_class: int = setting(30, "images of each of an expert's classes, each time", source=_TGR, ge=2)
    ce_weight: float = setting(1.0, "of the cross-entropy", source=_TGR, ge=0)
    bn_weight: float = setting(1.0, "of the batch norm statistics; nothing where an expert has none", source=_TGR, ge=0)
    adversarial_weight: float = setting(
        0.0, "of the disagreement with the learner, once it is trained", source=f"off: {_TGR}", ge=0
    )
    tv_weight: float = setting(
        0.0, "of the total variation", source="off: generators are smooth; 1e-4 for pixels", ge=0
    )
    l2_weight: float = setting(0.0, "of the distance from grey", source="off: as above; 1e-5 for pixels", ge=0)
    kd: Literal["kl", "legacy"] = setting(
        "kl",
        "divergence from an expert's answers: KL, or what published codes compute in its place",
        source="the papers' equations",
    )
    augment: Literal["none", "crop", "roll"] = setting(
        "none",
        "before an expert looks: nothing, cut out of a black border, or rolled round; a border is none of the statistics'",
        source=f"measured; crop: {_FREE}",
    )
    shift: int | None = setting(
        None, "at most, each way; null: an eighth of the side", source=f"4 of 32: {_FREE}", unit="pixels", ge=0
    )
    flip: bool = setting(False, "mirrored half of the time; not for characters", source=f"on: {_FREE}")
    per_sample: bool = setting(True, "each image is moved by itself, not the batch as one", source="Fang et al. 2022")
    keep: Literal["lowest", "last"] = setting("lowest", "the images of which step", source=_TGR)
    generator_lr: float = setting(1e-3, "step size of the generator", source=_FREE, gt=0)
    latent_lr: float = setting(1e-3, "step size of its noise", source=_FREE, ge=0)
    generator_width: int = setting(64, "channels of the generator's last stage", source=_FREE, ge=1)
    latent: int = setting(256, "numbers of noise", source=_FREE, ge=1)
    conditional: bool = setting(True, "the generator is told the class", source="Hu et al. 2023, the released code")
    pixel_lr: float = setting(0.25, "step size without a generator", source=_PURER, gt=0)
    together: Literal["fixed", "loop", "vmap"] = setting(
        "fixed",
        "experts of one kind at once (vmap) or one by one; fixed: vmap on an accelerator, where it is quicker",
        source=OURS,
    )


@dataclass(frozen=True)
class Recovered:
    """Images [ways * per_class, c, h, w] in 0 … 1 that the `expert` of the pool takes for its classes, class by class.

    `labels` [n] are its outputs, `logits` [n, ways] its answers to these very images. `ce`, `bn` and `top1` are of those.
    """

    expert: int
    images: Tensor
    labels: Tensor
    logits: Tensor
    ce: float
    bn: float
    top1: float
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether the expert itself takes them for what they should be."""
        return self.top1 >= SOUND[0] and self.ce <= SOUND[1]


class Recovery(Protocol):
    """Makes images of experts, each time it is asked; what it learns on the way is its state."""

    def recover(self, places: Sequence[int], step: int, student: Student | None = None) -> list[Recovered]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def invert(
    pool: WhitePool,
    places: Sequence[int],
    settings: Inverting,
    *,
    by: Literal["generator", "pixels"] = "generator",
    seed: int = 0,
    step: int = 0,
    student: Student | None = None,
) -> list[Recovered]:
    """Images of the experts at `places`, each begun anew. Equal seeds and steps give equal images."""
    return Fresh(pool, settings, seed, by).recover(places, step, student)


class Fresh:
    """For each expert a generator, or pixels, begun anew. It remembers nothing."""

    def __init__(
        self, pool: WhitePool, settings: Inverting, seed: int = 0, by: Literal["generator", "pixels"] = "generator"
    ):
        self.pool, self.settings, self.seed, self.by = pool, settings, seed, by
        self.generator = generator_of(pool, settings, seed) if by == "generator" else None

    def recover(self, places: Sequence[int], step: int, student: Student | None = None) -> list[Recovered]:
        def start(turn: int) -> Weights:
            if self.generator is None:
                return {}
            draws = torch.Generator().manual_seed(entropy(self.seed, "fresh", step, turn) % 2**63)
            self.generator.draw(draws)
            return {name: p.detach().clone() for name, p in self.generator.named_parameters()}

        found, _ = recovered(self.pool, places, self.settings, start, self.generator, self.seed, step, student)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def generator_of(pool: WhitePool, settings: Inverting, seed: int) -> ImageGenerator:
    """A fresh generator of the pool's images, for the most classes that an expert has."""
    from spolia.parts.generator import ImageGenerator

    draws = torch.Generator().manual_seed(entropy(seed, "generator") % 2**63)
    classes = pool.ways if settings.conditional else 0
    sizes = {"latent": settings.latent, "width": settings.generator_width}
    return ImageGenerator(pool.shape, classes=classes, **sizes, generator=draws)


# --- one visit of several experts ------------------------------------------------------------------------------------


def recovered(
    pool: WhitePool,
    places: Sequence[int],
    settings: Inverting,
    start: Callable[[int], Weights],
    maker: ImageGenerator | None,
    seed: int,
    step: int,
    student: Student | None = None,
) -> tuple[list[Recovered], list[Fit]]:
    """Images of each expert, in the order of `places`, and what fitting them left, group by group.

    Processes share the groups. `start(turn)`: the weights of `maker` that the expert at places[turn] begins with; without
    a maker, pixels.
    """
    every = [pool[place] for place in places]
    loaded = [expert.module() for expert in every]
    rank, ranks = world()

    def visit(turns: list[int]) -> tuple[Fit, dict[int, Recovered]]:
        begun = time.perf_counter()
        experts, modules = [every[turn] for turn in turns], [loaded[turn] for turn in turns]
        draws = [generator(seed, "recover", step, turn) for turn in turns]
        starts = [start(turn) for turn in turns]
        stacked = {name: torch.stack([weights[name] for weights in starts]) for name in starts[0]}
        made = fit(experts, modules, stacked, maker, settings, draws, pool.shape, student)
        seconds = (time.perf_counter() - begun) / len(turns)
        parts = zip(turns, experts, modules, made.images, strict=True)
        return made, {t: _report(places[t], e, m, images, settings.per_class, seconds) for t, e, m, images in parts}

    groups = _groups(every, loaded, settings.together)
    visits = [visit(turns) if number % ranks == rank else None for number, turns in enumerate(groups)]
    if ranks > 1:
        device = device_of(loaded[0])
        visits = [handed(one, number % ranks, device) for number, one in enumerate(visits)]
    found = {turn: images for one in visits if one is not None for turn, images in one[1].items()}
    return [found[turn] for turn in range(len(places))], [one[0] for one in visits if one is not None]


def _groups(experts: Sequence[White], modules: Sequence[nn.Module], together: str) -> list[list[int]]:
    """Turns that are run as one stack, in the order of their first."""
    groups: dict[Any, list[int]] = {}
    for turn, (expert, module) in enumerate(zip(experts, modules, strict=True)):
        alone = together == "loop" or (together == "fixed" and device_of(module).type == "cpu")
        groups.setdefault(turn if alone else expert.kind, []).append(turn)
    return list(groups.values())


def _report(place: int, expert: White, module: nn.Module, images: Tensor, per_class: int, seconds: float) -> Recovered:
    """What the expert says to images that are to be kept, seen as they are."""
    y = torch.arange(expert.ways, device=images.device).repeat_interleave(per_class)
    layers = [layer for _, layer in statistics(module)]
    with torch.no_grad(), statistics_gap(layers) as read:
        logits = expert.logits(module, images)
        gap = float(read())
    ce = float(torch.nn.functional.cross_entropy(logits, y))
    top1 = float((logits.argmax(1) == y).double().mean())
    return Recovered(place, images, y, logits, ce, gap, top1, seconds)

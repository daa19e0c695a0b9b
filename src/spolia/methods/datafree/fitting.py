"""The steps that find images of experts: one objective, run for one expert or for a stack of one kind at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.priors import disagreement, off_grey, statistics_gap, total_variation
from spolia.methods.datafree.looks import moved, moves, noise
from spolia.parts.white import statistics

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from spolia.methods.datafree.inversion import Inverting, Student
    from spolia.parts.generator import ImageGenerator
    from spolia.parts.white import White

    Weights = dict[str, Tensor]

_BETAS = (0.5, 0.999)  # of Adam, in all published codes


@dataclass(frozen=True)
class Fit:
    """Where the steps of experts of one kind have led. Tensors have a leading [experts].

    `ends`: the generator's weights after the last step; `last` and `total`: its gradients at the last step, and of all.
    """

    images: Tensor
    losses: Tensor  # [experts, steps]
    ends: Weights
    last: Weights
    total: Weights


def fit(
    experts: Sequence[White],
    modules: Sequence[nn.Module],
    start: Weights,
    maker: ImageGenerator | None,
    settings: Inverting,
    draws: Sequence[np.random.Generator],
    shape: tuple[int, int, int],
    student: Student | None = None,
) -> Fit:
    """`recovery_steps` steps for experts of one kind at once; with one of them nothing is mapped."""
    device = device_of(modules[0])
    y = torch.arange(experts[0].ways, device=device).repeat_interleave(settings.per_class)
    leaves = {name: w.to(device).requires_grad_() for name, w in start.items()}
    leaves |= noise(draws, len(y), maker is None, settings, shape, device)
    optimizer = torch.optim.Adam(_rates(leaves, settings), betas=_BETAS)
    best = torch.full((len(experts),), torch.inf, device=device)
    images = torch.empty(0)
    losses: list[Tensor] = []
    last: Weights = {}
    total = {name: torch.zeros_like(leaves[name]) for name in start}
    with torch.enable_grad(), _Objective(experts, modules, maker, settings, student) as objective:
        for _ in range(settings.recovery_steps):
            loss, x = objective(leaves, y, moves(draws, len(y), shape, settings, device))
            slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
            last = dict(zip(leaves, slopes, strict=True))
            for name, leaf in leaves.items():
                leaf.grad = last[name]
            with torch.no_grad():
                lower = loss < best
                taken = (lower | (settings.keep == "last")).view(-1, 1, 1, 1, 1)
                images = torch.where(taken, x, images) if len(images) else x.detach().clone()  # never the leaf itself
                best = torch.where(lower, loss, best)
                for name, sum_so_far in total.items():
                    sum_so_far += last[name]
            optimizer.step()
            losses.append(loss.detach())
    ends, slopes = ({name: part[name].detach() for name in start} for part in (leaves, last))
    return Fit(images, torch.stack(losses, 1), ends, slopes, total)


class _Objective:
    """The losses [experts] of what the leaves make, and their images [experts, n, c, h, w]; hooks come off on leaving."""

    def __init__(
        self,
        experts: Sequence[White],
        modules: Sequence[nn.Module],
        maker: ImageGenerator | None,
        settings: Inverting,
        student: Student | None,
    ):
        self.expert, self.module, self.maker = experts[0], modules[0], maker
        self.settings, self.student = settings, student
        self.state: Any = None
        if len(modules) > 1:
            states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]
            self.state = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        layers = [layer for _, layer in statistics(self.module)] if settings.bn_weight else []
        self._gap = statistics_gap(layers) if layers else nullcontext(lambda: 0.0)

    def __enter__(self) -> _Objective:
        self._read = self._gap.__enter__()
        return self

    def __exit__(self, *told: Any) -> None:
        self._gap.__exit__(*told)

    def __call__(self, leaves: Weights, y: Tensor, looks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        from spolia.core.norms import fuse

        if self.maker is not None:
            fuse(self.maker, self.state is None)
        if self.state is not None:
            mapped = torch.func.vmap(self._one, in_dims=(0, None, 0, 0))
            return mapped(leaves, y, looks, self.state)
        loss, x = self._one({n: t[0] for n, t in leaves.items()}, y, (looks[0][0], looks[1][0]), None)
        return loss.unsqueeze(0), x.unsqueeze(0)

    def _one(self, leaves: Weights, y: Tensor, looks: tuple[Tensor, Tensor], state: Any) -> tuple[Tensor, Tensor]:
        from spolia.core.functional import call

        chosen = self.settings
        x = made(self.maker, leaves, y)
        shown = moved(x, *looks, chosen)
        if state is None:
            logits = self.expert.logits(self.module, shown)
        else:
            logits = call(self.module, state, self.expert.logits, shown)
        loss = chosen.ce_weight * torch.nn.functional.cross_entropy(logits, y) + chosen.bn_weight * self._read()
        if self.student is not None and chosen.adversarial_weight:
            loss = loss + chosen.adversarial_weight * disagreement(self.student(shown, y), logits, chosen.kd)
        if chosen.tv_weight:
            loss = loss + chosen.tv_weight * total_variation(x)
        if chosen.l2_weight:
            loss = loss + chosen.l2_weight * off_grey(x)
        return loss, x


def made(maker: ImageGenerator | None, leaves: Weights, y: Tensor) -> Tensor:
    """Images [n, c, h, w] of one expert's leaves."""
    if maker is None:
        return torch.sigmoid(leaves["pixels"])
    weights = {name: w for name, w in leaves.items() if name != "z"}
    return torch.func.functional_call(maker, weights, (leaves["z"], y))


def _rates(leaves: Weights, settings: Inverting) -> list[dict[str, Any]]:
    rates = {"z": settings.latent_lr, "pixels": settings.pixel_lr}
    weights = [leaf for name, leaf in leaves.items() if name not in rates]
    own = [{"params": [leaves[name]], "lr": rate} for name, rate in rates.items() if name in leaves]
    return own + ([{"params": weights, "lr": settings.generator_lr}] if weights else [])


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters lie."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))

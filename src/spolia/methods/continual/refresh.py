"""Refresh: before every step unlearn a little of the batch at hand, then let the learner learn it again. Around any learner.

For whoever trains with gradients on a stream and wants flatter minima at one more pass a step. Wang, Li, Shen, Huang, A Unified
and General Framework for Continual Learning, ICLR 2024, arXiv 2403.13249.

    J times:  theta <- theta + gamma P g + sqrt(2 gamma tau P) N(0, 1),    g: of a loss of the batch,  P = 1 / (F + damping)
    then the learner's own step;    F: diagonal Fisher, at the end of an experience F <- decay F + F_t, then mean 1

| paper | here |
|---|---|
| gamma | `settings.gamma` times the learning rate at that step |
| J | `settings.steps` |
| F^-1 | P, `settings.precondition`, `damping`; 1 until the first experience has ended |
| the noise | `settings.temperature` tau: 1 is Langevin's, 0 none |
| L_CL | `settings.loss`: the batch's cross-entropy, or the learner's whole loss with its replay |

Why gamma is relative: to first order both steps together are

    theta - (lr - J gamma P) g - lr J gamma grad(g' P g) / 2

so there is a pull to flat places, of the size lr gamma, and the descent itself is shortened by J gamma P: at J gamma P = lr
nothing is learned, above it the loss climbs. That limit is checked before training. `released` is what the published code
does instead: per tensor a step of 1e-5 of its norm, with preconditioner and noise too small to matter.

Data touched: as the learner it goes around. Departures: the default loss is the batch's, as both the abstract and the code
unlearn current data; Fisher as in ewc.py; running statistics of batch normalisation do not move while unlearning; norms and
biases keep out of the released step only where their norm is 0, as there.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import summed
from spolia.core.gradients import gradients, norm
from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.core.settings import setting
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.continual.anchored import KINDS, information
from spolia.methods.continual.around import Around, Hosted, Hosts
from spolia.methods.continual.learner import OURS

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Learner
    from spolia.parts.stream import Batch, Experience

_WANG, _CODE = "Wang et al. 2024", "the released code"
DELTA, NOISE, SCALE, DECAY = 1e-5, 1e-3, 1e-3, 1e-5  # of the released step
_TINY = 1e-12
_SHORT = 0.5  # share of the descent taken back, from which a warning is due


class Refresh(Hosted):
    """Settings of `RefreshLearner`."""

    host: Hosts = setting("derpp", "learner that it goes around, where none is handed in", source=_CODE)
    form: Literal["paper", "released"] = setting(
        "paper", "the equations, or what the published code does", source=_WANG
    )
    gamma: float = setting(0.1, "unlearning step, in learning rates of the learner", source=OURS, ge=0)
    steps: int = setting(1, "J, unlearning steps before each step", source=_WANG, ge=0)
    loss: Literal["current", "full"] = setting(
        "current", "what is unlearned: the batch, or the whole loss", source=_CODE
    )
    precondition: Literal["fisher", "none"] = setting("fisher", "P", source=_WANG)
    damping: float = setting(1.0, "added to F, whose mean is 1", source=OURS, gt=0)
    temperature: float = setting(0.0, "tau of the noise", source=OURS, ge=0)
    decay: float = setting(0.5, "what of the earlier Fisher stays", source=OURS, ge=0, lt=1)
    fisher: KINDS = setting("auto", "which diagonal Fisher", source=OURS)
    samples: int | None = setting(512, "inputs it is estimated on; None: all", source=OURS, ge=1)


class RefreshLearner(Around):
    """`host` with unlearning before each of its steps. `importance` is F."""

    def __init__(self, host: Learner | Around, settings: Refresh, *, seed: int = 0):
        super().__init__(host)
        self.settings = settings
        inner = self.inner
        self.parameters = inner.parameters
        self.importance: list[Tensor] = []  # of mean 1 in the paper's form
        self.noise = torch.Generator(inner.device).manual_seed(entropy(seed, "refresh") % (1 << 63))
        check_stable(settings, inner)

    def observe(self, batch: Batch) -> Tensor:
        if not self.settings.steps or (self.settings.form == "paper" and not self.settings.gamma):
            return self.host.observe(batch)
        self.unlearn(batch)
        return self.host.observe(batch)

    def unlearn(self, batch: Batch) -> None:
        """J steps up the loss: the learner's next step sees the same views and the same replayed samples."""
        for _ in range(self.settings.steps):
            slopes = self._slopes(batch)
            with torch.no_grad():
                torch._foreach_add_(self.parameters, self.step(slopes))

    def shares(self, batch: Batch) -> dict[str, float]:
        """|unlearning step| over |lr g| of every tensor: what of a plain step is taken back. Nothing is changed."""
        state, slopes = self.noise.get_state(), self._slopes(batch)
        pairs = zip(self.inner.names, self.step(slopes), slopes, strict=True)
        found = {name: float(up.norm() / (self.inner.lr * g.norm()).clamp(min=_TINY)) for name, up, g in pairs}
        self.noise.set_state(state)
        return found

    def step(self, slopes: list[Tensor]) -> list[Tensor]:
        """What one unlearning step adds to the weights."""
        if self.settings.form == "released":
            return self._released(slopes)
        gamma = self.settings.gamma * self.inner.lr
        scales = [1 / (f + self.settings.damping) for f in self.importance]
        up = torch._foreach_mul(slopes, gamma)
        if scales:
            torch._foreach_mul_(up, scales)
        if self.settings.temperature:
            for i, move in enumerate(up):
                spread = (2 * gamma * self.settings.temperature * (scales[i] if scales else 1.0)) ** 0.5
                move += spread * self._normal(move)
        return list(up)

    def end(self, experience: Experience) -> None:
        super().end(experience)
        if self.settings.form == "paper" and self.settings.precondition == "none":
            return
        kind = "weighted" if self.settings.form == "released" else self.settings.fisher
        found = information(self.inner, experience, kind, self.settings.samples)
        keep = DECAY if self.settings.form == "released" else self.settings.decay
        if self.settings.form == "paper":
            found = _of_mean_one(found)
        mixed = [keep * a + b for a, b in zip(self.importance, found, strict=True)] if self.importance else found
        self.importance[:] = _of_mean_one(mixed) if self.settings.form == "paper" else mixed

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"importance": self.importance, "noise": self.noise}

    def _slopes(self, batch: Batch) -> list[Tensor]:
        """The gradient of what is unlearned. Random numbers and running statistics are as before."""
        inner = self.inner
        memory = getattr(inner, "memory", None)
        sources = [inner.draws, *([] if memory is None else [memory.draws])]
        states, buffers = [s.bit_generator.state for s in sources], [b.clone() for b in inner.network.buffers()]
        slopes = gradients(self._loss(batch), self.parameters)
        for source, state in zip(sources, states, strict=True):
            source.bit_generator.state = state
        with torch.no_grad():
            for buffer, before in zip(inner.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return [summed(g).div_(inner.ranks) for g in slopes] if inner.ranks > 1 else slopes

    def _loss(self, batch: Batch) -> Tensor:
        if self.settings.loss == "full" and self.settings.form == "paper":
            return self.host.loss(batch)[0]
        inner = self.inner
        return inner.criterion(inner.logits(inner.viewed(batch.x)), batch.y)

    def _released(self, slopes: list[Tensor]) -> list[Tensor]:
        """delta (g |theta| / |g| + 1e-3 N) / (1 + 1e-3 F), tensor by tensor."""
        made = []
        for i, (weight, slope) in enumerate(zip(self.parameters, slopes, strict=True)):
            unit = slope * (weight.detach().norm() / (slope.norm() + _TINY))
            below = 1 + SCALE * self.importance[i] if self.importance else 1.0
            made.append(DELTA * (unit + NOISE * self._normal(slope)) / below)
        return made

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self.noise)


def check_stable(settings: Refresh, host: Learner) -> None:
    """SpoliaError where unlearning outweighs the step after it, SpoliaWarning where it takes back half of it or more.

    P is at most 1 / damping once there is a Fisher, and 1 before: the larger counts.
    """
    share = taken_back(settings)
    if not share:
        return
    told = f"J = {settings.steps} with gamma {settings.gamma:g} and P up to {_most(settings):g} take back {share:.0%}"
    told += " of the descent"
    if share >= 1:
        what = f"{told}: to first order a step is (lr - J gamma P) g, which climbs"
        mend = "lower gamma or steps, or raise damping, so that steps * gamma * max(1, 1 / damping) is below 1"
        raise SpoliaError(what, where="refresh", mend=mend)
    if share >= _SHORT:
        warnings.warn(f"refresh: {told}; learning slows by as much", SpoliaWarning, stacklevel=3)
    if not isinstance(host.optimizer, torch.optim.SGD):
        what = "refresh: gamma is relative to the learning rate of plain SGD; "
        what += f"{type(host.optimizer).__name__} steps otherwise, so that limit is no bound here"
        warnings.warn(what, SpoliaWarning, stacklevel=3)


def taken_back(settings: Refresh) -> float:
    """The largest share of a plain step that unlearning takes back, to first order: J gamma P. 0 for the released form."""
    return 0.0 if settings.form == "released" else settings.steps * settings.gamma * _most(settings)


def _most(settings: Refresh) -> float:
    """The largest P."""
    return max(1.0, 1 / settings.damping) if settings.precondition == "fisher" else 1.0


def sharpness(learner: Learner | Around, batch: Batch) -> float:
    """g' g of the batch's loss in eval mode: what refresh's second term pushes down where P is 1."""
    inner = learner.inner if isinstance(learner, Around) else learner
    with inner.at_rest():
        slopes = gradients(inner.criterion(inner.logits(inner.shown(batch.x)), batch.y), inner.parameters)
    return float(norm(slopes)) ** 2


def _of_mean_one(parts: list[Tensor]) -> list[Tensor]:
    """In units of the mean over all weights; zeros stay."""
    mean = sum(float(part.double().sum()) for part in parts) / max(1, sum(part.numel() for part in parts))
    return [part / mean for part in parts] if mean > 0 else parts

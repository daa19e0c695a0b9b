"""VCL, variational continual learning: a Gaussian over each weight, held near the one of the experience before.

For small networks whose uncertainty matters. Nguyen, Li, Bui, Turner, Variational Continual Learning, ICLR 2018,
arXiv 1710.10628.

    L = E_{theta ~ q_t} CE(f(x), y) + beta KL(q_t || q_{t-1}) / N_t,    q_t = prod_i N(mu_i, sigma_i^2),  q_0 = N(0, prior^2)

| paper | here |
|---|---|
| mu | the network's own parameters |
| sigma | exp of `spreads`, trained with them |
| N_t | training examples of the experience |
| beta | `settings.weight`; 1 is the bound itself |

Data touched: each experience once. Departures: no coreset: replay beside it is what er.py is for. Every parameter that asks for
a gradient is Gaussian, norms and biases too. With plain SGD the pull on mu is an implicit step. Answers are mean probabilities
over `samples` networks, the same for every call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spolia.core.gradients import pull_implicitly
from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.core.settings import setting
from spolia.methods.continual.learner import OURS, TABLES, Learner, Training
from spolia.methods.continual.objective import gaussian

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience


class Vcl(Training):
    """Settings of `VclLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    weight: float = setting(1.0, "beta, of the divergence from the last posterior", source="Nguyen et al. 2018", ge=0)
    prior: float = setting(1.0, "deviation of q_0", source="Nguyen et al. 2018", gt=0)
    spread: float = setting(0.05, "sigma at the beginning", source=OURS, gt=0)
    samples: int = setting(10, "networks that an answer averages", source=OURS, ge=1)


class VclLearner(Learner):
    settings: Vcl

    def __init__(self, model: Any, settings: Vcl, *, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        self.means = list(self.parameters)
        self.spreads = [torch.full_like(p, math.log(settings.spread)).requires_grad_() for p in self.means]
        self.parameters = self.means + self.spreads
        self.optimizer = self._optimizer()
        self.before = [torch.zeros_like(p) for p in self.means]  # of q_{t-1}
        self.before_spreads = [torch.full_like(p, settings.prior) for p in self.means]
        self.noise = torch.Generator(self.device).manual_seed(entropy(seed, "vcl") % (1 << 63))
        self.count = {"examples": 1}

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.count["examples"] = len(experience.train)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.logits_with(self.drawn(self.noise), self.viewed(batch.x))
        means = [mean.detach() for mean in self.means] if self.plain else self.means  # their pull comes in `descend`
        held = gaussian(means, [s.exp() for s in self.spreads], self.before, self.before_spreads)
        return self.criterion(logits, batch.y) + self.share * held, logits

    def descend(self, loss: Tensor) -> None:
        super().descend(loss)
        if self.plain:  # (mu - mu_0)^2 / (2 sigma_0^2), exactly: sigma_0 is small, and an explicit step would overshoot
            halves = [0.5 / s.square() for s in self.before_spreads]
            pull_implicitly(self.means, self.before, halves, self.lr * self.share)

    @property
    def share(self) -> float:
        """Of the divergence in the mean loss of a batch."""
        return self.settings.weight / self.count["examples"]

    def drawn(self, noise: torch.Generator) -> dict[str, Tensor]:
        """Weights of one network from q_t, differentiable in mu and sigma."""
        made = {}
        for name, mean, spread in zip(self.names, self.means, self.spreads, strict=True):
            unit = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=noise)
            made[name] = mean + spread.exp() * unit
        return made

    def end(self, experience: Experience) -> None:
        self.before[:] = [mean.detach().clone() for mean in self.means]
        self.before_spreads[:] = [spread.detach().exp() for spread in self.spreads]

    def predict(self, x: Any) -> Tensor:
        """Log of the mean probabilities [n, classes]."""
        noise = torch.Generator(self.device).manual_seed(entropy(self.seed, "vcl answers") % (1 << 63))
        with self.at_rest(), torch.no_grad():
            shown = self.shown(x)
            parts = [self.logits_with(self.drawn(noise), shown).log_softmax(-1) for _ in range(self.settings.samples)]
        return torch.stack(parts).logsumexp(0) - math.log(len(parts))

    def kept(self) -> dict[str, Any]:
        own: dict[str, Any] = {f"spread {i}": spread for i, spread in enumerate(self.spreads)}
        own |= {"before": self.before, "before spreads": self.before_spreads, "noise": self.noise, "count": self.count}
        return super().kept() | own

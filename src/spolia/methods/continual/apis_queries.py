"""Generators of queries: how they are made, kept and stepped, and the gradient that they step along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy
from spolia.core.zeroth import along, estimate, sphere
from spolia.methods.continual.apis_terms import stacked, worth

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.continual.apis import Apis
    from spolia.parts.api import Answers

_LEAST = 1e-12  # of a mean answer: its logarithm stays finite
_STEP = 0.1  # of the noise, where a generator's own directions are taken
_MOST = 1 << 63  # manual_seed takes no more


@dataclass(frozen=True)
class Inventing:
    """How queries are made: `make(draws)` a generator of noise [n, latent] to v [n, ...]; `act` brings v into range.

    Generators should go by the batch at hand (batch norms without running statistics): nothing is ever in eval mode.
    """

    make: Callable[[Any], nn.Module]
    latent: int
    act: Callable[[Tensor], Tensor]


class Inventors:
    """One or two generators and their optimisers."""

    def __init__(self, inventing: Inventing, count: int, lr: float, device: Any, seed: int):
        self.inventing, self.lr, self.device, self.seed = inventing, lr, device, seed
        self.made = torch.nn.ModuleList([self._fresh(side, -1) for side in range(count)]).to(device)
        self.steppers = [self._stepper(generator) for generator in self.made]

    def begin(self, place: int) -> None:
        """Anew, from random numbers of the API's own."""
        for side, generator in enumerate(self.made):
            generator.load_state_dict(self._fresh(side, place).state_dict())
            self.steppers[side] = self._stepper(generator)

    def act(self, v: Tensor) -> Tensor:
        return self.inventing.act(v)

    def noise(self, count: int, draws: np.random.Generator) -> Tensor:
        """[count, latent]"""
        drawn = draws.standard_normal((count, self.inventing.latent), dtype=np.float32)
        return torch.from_numpy(drawn).to(self.device)

    def raw(self, count: int, draws: np.random.Generator) -> Tensor:
        """v [count, ...] of the first generator."""
        with torch.no_grad():
            return self.made[0](self.noise(count, draws))

    def queries(self, count: int, draws: np.random.Generator) -> Tensor:
        """`count` of each generator, one after the other."""
        with torch.no_grad():
            return torch.cat([self.act(generator(self.noise(count, draws))) for generator in self.made])

    def step(self, z: Tensor, sloped: Callable[[Tensor, nn.Module], Tensor], diversity: float) -> None:
        """A step of each along `sloped(v, generator)` [n, ...], the mean over samples; two of them also apart."""
        made = [generator(z) for generator in self.made]
        slopes = [sloped(v.detach(), generator) / len(z) for v, generator in zip(made, self.made, strict=True)]
        outputs, gradients = list(made), list(slopes)
        if len(made) == 2 and diversity:
            a, b = (self.act(v) for v in made)
            outputs.append(-diversity * (a - b).abs().mean())
            gradients.append(torch.ones_like(outputs[-1]))
        for stepper in self.steppers:
            stepper.zero_grad()
        torch.autograd.backward(outputs, gradients)
        for stepper in self.steppers:
            stepper.step()

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made.state_dict(), "steppers": [stepper.state_dict() for stepper in self.steppers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made.load_state_dict(state["made"])
        for stepper, own in zip(self.steppers, state["steppers"], strict=True):
            stepper.load_state_dict(own)

    def _fresh(self, side: int, place: int) -> nn.Module:
        draws = torch.Generator().manual_seed(entropy(self.seed, "inventor", side, place) % _MOST)
        return self.inventing.make(draws).to(self.device)

    def _stepper(self, generator: nn.Module) -> Any:
        return torch.optim.Adam(generator.parameters(), lr=self.lr)


def slope(
    v: Tensor,
    z: Tensor,
    generator: nn.Module,
    act: Callable[[Tensor], Tensor],
    ours: Callable[[Tensor], Tensor],
    ask: Callable[[Tensor], Answers],
    settings: Apis,
    radius: float,
    draws: np.random.Generator,
) -> Tensor:
    """d worth / d v [n, ...]: through our model exactly, through the API by finite differences; `plain`: both by these.

    `ours(x)`: our logits of the API's classes. With a constant API it is the exact gradient, with a constant model of ours the
    plain estimate.
    """
    split = settings.estimator == "split"
    v = v.requires_grad_()
    x = act(v)
    answers = ask(x.detach())
    mean = answers.log_p.exp().mean(0).clamp(min=_LEAST)
    logits = ours(x)
    value = worth(settings.gap, logits, answers, mean, settings.balance)
    (exact,) = torch.autograd.grad(value.sum(), v, allow_unused=True, materialize_grads=True)

    def worths(points: Tensor) -> Tensor:
        """Of points [m, n, ...]: [m, n]; where split, our answer stays that at v."""
        m, n = points.shape[:2]
        moved = act(points.flatten(0, 1))
        there = logits.detach() if split else ours(moved).view(m, n, -1)
        return worth(settings.gap, there, stacked(ask(moved), m, n), mean, settings.balance)

    v = v.detach()
    with torch.no_grad():
        if settings.space == "generator":
            moves = sphere(settings.directions, len(z), z.shape[1], draws).to(z)
            ways = torch.stack([generator(z + _STEP * move) - v for move in moves])
            found = along(worths, v, ways, radius=radius, antithetic=settings.antithetic, value=value.detach())
        else:
            found = estimate(
                worths,
                v,
                settings.directions,
                draws,
                radius=radius,
                kind=settings.kind,
                antithetic=settings.antithetic,
                value=value.detach(),
            )
    return exact + found.gradient if split else found.gradient

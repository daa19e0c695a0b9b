"""One generator for all experts that adapts to each in a few steps, and learns from every visit to adapt better.

    phi_i = K steps on expert i from phi (inversion.py's loss)
    reptile        phi <- phi + epsilon (mean_i phi_i - phi),   epsilon falls from 1 to 0.1
    fomaml_last    phi <- Adam(phi, mean_i gradient of step K);    fomaml_sum: of the gradients of all steps
    released       as fomaml_last, summed, with an Adam begun anew each time: a step of lr times the sign

FIVE of FREE (arXiv 2405.00984), after Fang et al., AAAI 2022, arXiv 2112.06253. Its first images are of little worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.methods.datafree.inversion import generator_of, recovered

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.datafree.inversion import Recovered, Student
    from spolia.parts.white import WhitePool

LEAST = 0.1  # epsilon at the end
FALLS_OVER = 100  # visits over which it falls


class MetaGenerator:
    """`generator` holds phi. `settings`: Inverting's, `meta` and `meta_lr`."""

    def __init__(self, pool: WhitePool, settings: Any, seed: int = 0):
        self.pool, self.settings, self.seed = pool, settings, seed
        self.generator = generator_of(pool, settings, seed)
        self.visits = 0
        self._optimizer = self._adam()

    @property
    def epsilon(self) -> float:
        """How far Reptile moves at the next visit."""
        return max(LEAST, 1.0 - (1.0 - LEAST) * self.visits / FALLS_OVER)

    def recover(
        self, places: Sequence[int], step: int, student: Student | None = None, learn: bool = True
    ) -> list[Recovered]:
        """Images of the experts at `places`; with `learn`, phi moves afterwards."""
        phi = {name: p.detach() for name, p in self.generator.named_parameters()}
        found, fits = recovered(
            self.pool, places, self.settings, lambda turn: phi, self.generator, self.seed, step, student
        )
        if learn:
            seen = {part: _joined([getattr(fit, part) for fit in fits]) for part in ("ends", "last", "total")}
            with torch.no_grad():
                self._learn(phi, seen)
            self.visits += 1
        return found

    def _learn(self, phi: Mapping[str, Tensor], seen: Mapping[str, dict[str, Tensor]]) -> None:
        named = dict(self.generator.named_parameters())
        meta = self.settings.meta
        if meta == "reptile":
            step = self.epsilon
            for name, p in named.items():
                p += step * (seen["ends"][name].mean(0).to(p.device) - phi[name])
            return
        slopes = seen["total" if meta == "fomaml_sum" else "last"]
        if meta == "released":
            self._optimizer = self._adam()
        for name, p in named.items():
            p.grad = (slopes[name].sum(0) if meta == "released" else slopes[name].mean(0)).to(p.device)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.generator.parameters(), lr=self.settings.meta_lr)

    def state_dict(self) -> dict[str, Any]:
        state = {"generator": self.generator.state_dict(), "visits": self.visits}
        return state | {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.visits = state["visits"]


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors [experts, ...] of all groups in one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

"""Plackett-Luce: items drawn one after the other without replacement, each by its share of what is left.

    P(i_1 … i_k) = prod_j exp(s_{i_j}) / sum of exp(s_i) over the items i not among i_1 … i_{j-1}

Plackett 1975, doi:10.2307/2346567. The k largest of s + Gumbel noise, in falling order, have this law (Kool et al. 2019,
arXiv 1903.06059). The product of k single draws' probabilities is another number: it does not sum to one over the orders,
and its gradient is not that of an expectation under such draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


def log_probability(scores: Tensor, orders: Tensor) -> Tensor:
    """log P of the orders [..., k] of places in `scores` [n]: [...], differentiable in the scores.

    A score of -inf is never drawn before all others are. An order that names a place twice has -inf.
    """
    left = torch.zeros((*orders.shape[:-1], len(scores)), dtype=torch.bool, device=scores.device)
    total = scores.new_zeros(orders.shape[:-1])
    for place in orders.unbind(-1):
        at = place.unsqueeze(-1)
        rest = scores.expand(left.shape).masked_fill(left, -torch.inf)
        total = total + rest.gather(-1, at).squeeze(-1) - rest.logsumexp(-1)
        left = left.scatter(-1, at, True)
    return total


def draw(scores: Tensor, count: int, draws: np.random.Generator) -> Tensor:
    """`count` different places in the order in which they were drawn: int64 [count]."""
    possible = int((scores > -torch.inf).sum())
    if count > possible:
        raise SpoliaError(f"{count} of {possible} items", where="plackett_luce", mend="ask for fewer")
    noise = torch.from_numpy(draws.gumbel(size=len(scores))).to(scores)
    return torch.topk(scores.detach() + noise, count).indices

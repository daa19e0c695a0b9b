"""Features of a network: what its last linear layer is given, or what the user says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Features = Callable[[nn.Module, Any], Tensor]  # network, inputs -> [n, d]


def before_the_head(network: nn.Module, x: Any) -> Tensor:
    """What the last linear layer of the network is given: [n, d]."""
    linear = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        mend = "give features=, a function of network and inputs that returns [n, d]"
        raise SpoliaError("has no linear layer, so its features are not known", where="network", mend=mend)
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        network(x)
    finally:
        hook.remove()
    if len(seen) != 1:
        what = f"its last linear layer ran {len(seen)} times"
        raise SpoliaError(what, where="network", mend="give features=, a function of network and inputs")
    return seen[0].flatten(1)

"""Running statistics of batch normalisation: those of a merged network are no mixture of its experts'.

They are found anew from forward passes on inputs without labels: every layer normalises by its own batches meanwhile,
and keeps the mean and variance of everything that passed through it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from spolia.core.dist import summed
from spolia.core.lazy import torch
from spolia.parts.network import Network

if TYPE_CHECKING:
    from torch import Tensor, nn

_KEPT = ("running_mean", "running_var")


def statistics_of(module: nn.Module) -> list[str]:
    """Names of the running means and variances in its state dict."""
    return [f"{name}.{kind}" if name else kind for name, _ in _layers(module) for kind in _KEPT]


def reestimated(network: Network, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Running means and variances of the network's normalisation layers over all `batches`, fp64, by name.

    The network is as it was afterwards. Empty where it has no such layers.
    """
    layers = _layers(network.module)
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items() if name.endswith(_STATE)}
    sums = {name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in layers}
    hooks = [layer.register_forward_pre_hook(_adder(sums[name])) for name, layer in layers]
    try:
        for _, layer in layers:
            layer.train()
        with torch.no_grad():
            for batch in batches if layers else ():
                network.features(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for _, layer in layers:
            layer.eval()
        if layers:
            network.module.load_state_dict(before, strict=False)
    found = {}
    for name, total in sums.items():
        count, first, second = summed(total)
        mean = first / count.clamp(min=1)
        spread = (second / count.clamp(min=1) - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
        for kind, value in zip(_KEPT, (mean, spread), strict=True):
            found[f"{name}.{kind}" if name else kind] = value
    return found


_STATE = (*_KEPT, "num_batches_tracked")


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    from torch.nn.modules.batchnorm import _BatchNorm

    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    return [(name, layer) for name, layer in found if layer.track_running_stats]


def _adder(total: Tensor) -> Any:
    """Adds count, sum and sum of squares of each channel, inputs being [batch, channels, ...]."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double().transpose(0, 1).flatten(1).cpu()  # [channels, everything else]
        total[0] += x.shape[1]
        total[1] += x.sum(1)
        total[2] += x.square().sum(1)

    return add

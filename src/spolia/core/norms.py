"""Normalisation from primitive operations: exact under vmap, differentiable twice, without a memory between batches.

The framework's fused batch, instance and layer norms are wrong where a gradient is taken inside vmap and differentiated
again outside: no error, but another number. These are right there too. `exact` puts them into a copy of any module, under
the same names, over the same parameters. Group and root-mean-square norms are right as they are and stay.

Statistics of batch norm are a choice that is always stated:

| `bn` | support | query |
|---|---|---|
| batch | its own | its own: all queries of a task are seen at once (transductive) |
| support | its own | the support's, under the adapted weights |
| frozen | running statistics | running statistics |

Running statistics are read, never moved: an episode leaves no trace in the next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from spolia.errors import Problems, SpoliaError

Statistics = Literal["batch", "support", "frozen"]

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # places: a dimension more each


class _Norm(nn.Module):
    """Weight and bias (or None), eps, and of some the running statistics: what the framework's norms hold.

    `fused` lets the framework's operation do it, where that is exact: outside vmap.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, shape: Sequence[int], eps: float, affine: bool):
        super().__init__()
        self.eps, self.fused = eps, False
        self.register_parameter("weight", nn.Parameter(torch.ones(*shape)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(*shape)) if affine else None)

    def _over(self, layer: nn.Module) -> None:
        """Hold what `layer` holds, under its names."""
        self._parameters.update(layer._parameters)
        self._buffers.update(layer._buffers)


class BatchNorm(_Norm):
    """[batch, features, ...] to the same: over all dimensions but the second."""

    def __init__(self, features: int, eps: float = 1e-5, affine: bool = True, statistics: Statistics = "batch"):
        super().__init__((features,), eps, affine)
        self.statistics: Statistics = statistics
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.phase: Literal["own", "record", "recorded"] = "own"
        self.recorded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics == "frozen":
            assert self.running_mean is not None and self.running_var is not None  # asked for by `exact`
            mean, var = along(self.running_mean, 1, x), along(self.running_var, 1, x)
        elif self.phase == "recorded":
            if self.recorded is None:
                what = "the query meets a batch norm that the support did not pass"
                raise SpoliaError(what, where='bn="support"', mend='take bn="batch", or let the loss pass it')
            mean, var = self.recorded
        else:
            if x.numel() == x.shape[1]:
                what = "one value a feature has no variance"
                raise SpoliaError(what, where="batch norm", mend='give more inputs, or take bn="frozen"')
            if self.fused and self.phase == "own":
                return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
            mean, var = moments(x, [0, *range(2, x.dim())])
            if self.phase == "record":
                self.recorded = mean, var
        return scaled(x, mean, var, self, 1)


class LayerNorm(_Norm):
    """Over the last dimensions, those of `shape`."""

    def __init__(self, shape: int | Sequence[int], eps: float = 1e-5, affine: bool = True, bias: bool = True):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        super().__init__(shape, eps, affine)
        self.shape = shape
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return nn.functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        mean, var = moments(x, list(range(-len(self.shape), 0)))
        return scaled(x, mean, var, self, None)


class InstanceNorm(_Norm):
    """[batch, features, ...] to the same: each input and feature over its `places` last dimensions.

    With running statistics and `statistics="frozen"` those are used.
    """

    def __init__(
        self, features: int, places: int = 2, eps: float = 1e-5, affine: bool = False, statistics: Statistics = "batch"
    ):
        super().__init__((features,), eps, affine)
        self.places = places
        self.statistics: Statistics = statistics
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        axis = x.dim() - self.places - 1  # of the features; an input without a batch dimension has one less
        if self.statistics == "frozen" and self.running_mean is not None and self.running_var is not None:
            mean, var = along(self.running_mean, axis, x), along(self.running_var, axis, x)
        elif self.fused and axis == 1:
            return nn.functional.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            mean, var = moments(x, list(range(-self.places, 0)))
        return scaled(x, mean, var, self, axis)


def moments(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) over `axes`, which stay as dimensions of one; half types in fp32."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def along(vector: Tensor, axis: int, x: Tensor) -> Tensor:
    """A vector of features as it is broadcast over `x`."""
    return vector.view([-1 if i == axis else 1 for i in range(x.dim())])


def scaled(x: Tensor, mean: Tensor, var: Tensor, norm: _Norm, axis: int | None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias in x's type; weight and bias along `axis`, or as x's last dimensions."""
    factor = (var + norm.eps).rsqrt()
    weight, bias = (t if t is None or axis is None else along(t, axis, x) for t in (norm.weight, norm.bias))
    made = (x - mean) * (factor if weight is None else factor * weight)
    return (made if bias is None else made + bias).to(x.dtype)


# --- in the place of the framework's ---------------------------------------------------------------------------------


def exact(module: nn.Module, bn: Statistics = "batch") -> nn.Module:
    """A copy of `module` with these norms in the place of the framework's. Parameters are shared, buffers copied.

    SpoliaError names what cannot be: layers not yet sized, batch norms without running statistics where `bn` is frozen,
    norms of a kind of their own that would move their statistics.
    """
    for path, layer in module.named_modules():
        if any(is_lazy(t) for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
            raise SpoliaError("its size is not known yet", where=path, mend="run the module once first")
    made = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    problems, swapped = Problems(), {}
    for path, layer in list(made.named_modules(remove_duplicate=False)):
        if id(layer) not in swapped:
            swapped[id(layer)] = _swapped(layer, bn, path, problems)
        if (new := swapped[id(layer)]) is not layer:
            if not path:
                made = new
                continue
            parent, _, name = path.rpartition(".")
            made.get_submodule(parent)._modules[name] = new
    problems.raise_if_any()
    return made


def _swapped(layer: nn.Module, bn: Statistics, path: str, problems: Problems) -> nn.Module:
    """The norm that takes the layer's place, or the layer."""
    where = path or type(layer).__name__
    if isinstance(layer, _BATCH) and type(layer) in _BATCH:
        if bn == "frozen" and layer.running_mean is None:
            problems.add(where, "there are no running statistics to freeze", 'take bn="batch" or bn="support"')
        new: _Norm = BatchNorm(1, layer.eps, False, bn)
    elif isinstance(layer, _INSTANCE) and type(layer) in _INSTANCE:
        new = InstanceNorm(1, 1 + _INSTANCE.index(type(layer)), layer.eps, False, bn)
    elif type(layer) is nn.LayerNorm:
        new = LayerNorm(layer.normalized_shape, layer.eps, False)
    else:
        if isinstance(layer, _BatchNorm | _InstanceNorm) and layer.training and layer.running_mean is not None:
            what = f"a {type(layer).__name__} would carry statistics from one episode into the next"
            problems.add(where, what, "use the framework's own norm there, or call eval() on it")
        elif isinstance(layer, BatchNorm | InstanceNorm):
            layer.statistics = bn
        return layer
    new._over(layer)
    return new.train(layer.training)


def fuse(module: nn.Module, fused: bool) -> list[BatchNorm]:
    """Let the framework's operations do it, or not, in a module that `exact` made; its batch norms."""
    for layer in module.modules():
        if isinstance(layer, _Norm):
            layer.fused = fused
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@contextmanager
def phase(layers: Sequence[BatchNorm], name: Literal["record", "recorded"]) -> Iterator[None]:
    """Batch norms keep the statistics of what passes now, or use those kept. They are dropped after use."""
    for layer in layers:
        layer.phase = name
    try:
        yield
    finally:
        for layer in layers:
            layer.phase = "own"
            if name == "recorded":
                layer.recorded = None

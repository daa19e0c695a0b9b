"""White experts: classifiers that may be run, differentiated and looked into, of any architecture; and the pool they form.

    pool = WhitePool([White("a", module, shape=(3, 32, 32), classes=(3, 17, 20)), …], shape=(3, 32, 32))
    audit = pool.audit()               # what is broken, untrained or missing, each with its cure; nothing is trained yet

Images are fp32 [n, c, h, w] in 0 … 1 at the pool's one shape. Each expert shows them to itself in its own size, colours and
normalisation, so that unlike experts share generators, stores and episodes. A class list makes outputs of different experts
meet: equal names in one domain are one class. An expert without one keeps its outputs to itself.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.parts.network import outputs_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.audit import Audit

Shape = tuple[int, int, int]  # channels, height, width
GREY = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


class White:
    """One classifier. `module` takes normalised images of `shape`, or is a function that loads it whenever it is needed.

    `classes`: what each output stands for, in order; None where nobody knows. `mean` and `std` by channel, for pixels in
    0 … 1. `claimed`: the accuracy that its owner tells. A given module is copied and never changed.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module | Callable[[], nn.Module],
        *,
        shape: Shape,
        classes: Sequence[str | int] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        domain: str = "",
        claimed: float | None = None,
        outputs: Callable[[nn.Module, Any], Tensor] = outputs_of,
    ):
        self.name, self.shape, self.domain, self.claimed, self.outputs = name, tuple(shape), domain, claimed, outputs
        self.classes = None if classes is None else tuple(map(str, classes))
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._held: nn.Module | None = None
        self._load: Callable[[], nn.Module] | None = None
        if isinstance(module, torch.nn.Module):
            self._held = _resting(copy.deepcopy(module))
        else:
            self._load = module
        self._ways: int | None = None
        self._kind: tuple[Any, ...] | None = None

    def module(self) -> nn.Module:
        """The network, in eval mode and without gradients of its own. Not to be changed."""
        if self._held is not None:
            return self._held
        assert self._load is not None
        return _resting(self._load())

    @property
    def ways(self) -> int:
        """The number of its outputs; the first time it is run to see."""
        if self._ways is None:
            with torch.no_grad():
                self._ways = self.logits(self.module(), noise(2, self.shape)).shape[-1]
        return self._ways

    @property
    def kind(self) -> tuple[Any, ...]:
        """Experts of equal kinds may be run as one stack: the same layers, sizes, input and outputs."""
        if self._kind is None:
            self._kind = (_structure(self.module()), self.shape, self.mean, self.std, self.outputs)
        return self._kind

    def shown(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] in 0 … 1 of any size as its own input; differentiable."""
        x, (channels, *size) = images, self.shape
        if x.shape[1] == 3 and channels == 1:
            x = (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
        elif x.shape[1] == 1 and channels == 3:
            x = x.expand(-1, 3, -1, -1)
        if list(x.shape[2:]) != size:
            smaller = size[0] < x.shape[2]
            x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=smaller)
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def logits(self, module: nn.Module, images: Tensor) -> Tensor:
        """[n, ways] of its network `module` for images in 0 … 1."""
        return self.outputs(module, self.shown(images))


class WhitePool:
    """Experts in a fixed order. `shape` is that of the images which are made for all of them.

    `keys[i]` says which class of the pool each output of expert i is; `names` are theirs.
    """

    def __init__(self, experts: Sequence[White], shape: Shape | None = None):
        self.experts = list(experts)
        if not self.experts:
            raise SpoliaError("there are no experts", where="pool", mend="give one at least")
        self.shape: Shape = self._largest() if shape is None else (shape[0], shape[1], shape[2])
        self._keys: list[tuple[int, ...]] | None = None
        self._names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, place: int) -> White:
        return self.experts[place]

    def __iter__(self) -> Iterator[White]:
        return iter(self.experts)

    @property
    def shared(self) -> bool:
        """Whether every expert has a class list: then a task may take classes of several."""
        return all(expert.classes is not None for expert in self.experts)

    @property
    def ways(self) -> int:
        """The most outputs that an expert has."""
        return max(expert.ways for expert in self.experts)

    @property
    def keys(self) -> list[tuple[int, ...]]:
        """For each expert the class of each of its outputs, a place in `names`."""
        if self._keys is None:
            places: dict[str, int] = {}
            self._keys = [tuple(places.setdefault(n, len(places)) for n in _titles(e)) for e in self.experts]
            self._names = tuple(places)
        return self._keys

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of all experts: `domain/class`, or `expert/output 3` where there is no class list."""
        assert self.keys is not None
        return self._names

    def without(self, places: Sequence[int]) -> WhitePool:
        """The pool of the other experts."""
        return WhitePool([e for i, e in enumerate(self.experts) if i not in set(places)], self.shape)

    def audit(self) -> Audit:
        """What is wrong with each expert, found by looking at its weights and by one pass of noise."""
        from spolia.parts.audit import audited

        return audited(self)

    def _repr_html_(self) -> str:
        from spolia.core.shown import html_table

        rows = [
            (
                e.name,
                e.domain or "–",
                " x ".join(map(str, e.shape)),
                "unknown" if e.classes is None else ", ".join(e.classes),
            )
            for e in self.experts
        ]
        return html_table(("name", "domain", "input", "classes"), rows, "Pool of classifiers")

    def _largest(self) -> Shape:
        sizes = [expert.shape for expert in self.experts]
        return max(s[0] for s in sizes), max(s[1] for s in sizes), max(s[2] for s in sizes)


def noise(count: int, shape: Shape) -> Tensor:
    """Uniform images in 0 … 1, always the same."""
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(0))


def statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The batch norms that hold running statistics, with their paths."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    found = ((path, part) for path, part in module.named_modules() if isinstance(part, kind))
    return [(path, part) for path, part in found if part.running_mean is not None]


def flatness(logits: Tensor) -> float:
    """Mean entropy of the answers over that of no answer at all: 1 where all classes are equally likely."""
    log_p = logits.double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean()) / math.log(max(logits.shape[-1], 2))


def _titles(expert: White) -> list[str]:
    if expert.classes is None:
        return [f"{expert.name}/output {output}" for output in range(expert.ways)]
    return [f"{expert.domain}/{name}" if expert.domain else name for name in expert.classes]


def _resting(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _structure(module: nn.Module) -> str:
    """A digest of its layers, their plain attributes, and the names, shapes and types of its tensors."""
    told = []
    for path, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
        own = [
            (n, tuple(t.shape), str(t.dtype))
            for n, t in (*part._parameters.items(), *part._buffers.items())
            if t is not None
        ]
        told.append(
            (path, type(part).__module__, type(part).__qualname__, part.extra_repr(), sorted(plain.items()), own)
        )
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()

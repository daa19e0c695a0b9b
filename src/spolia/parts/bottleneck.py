"""Bottlenecks: small modules added at the sites of a network, one set a task; saved, loaded, attached and taken off.

    z_hat = z - U act(V z + v)        V [r, d], U [d, r]; act is ReLU and v = 0, or there is none (linear)

U = 0 at the start, so that a new bottleneck changes no bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spolia.core import tensorfile
from spolia.core.seeds import entropy
from spolia.errors import SpoliaError, SpoliaWarning, did_you_mean
from spolia.parts.network import NAMED
from spolia.parts.sites import Site, hooks

FORMAT = "spolia adapters 1"


class Bottleneck(nn.Module):
    """z - up act(down z + shift) along the last axis; up [d, r], down [r, d], shift [r] only where it is linear."""

    def __init__(self, width: int, rank: int, *, linear: bool = False):
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.shift = nn.Parameter(torch.zeros(rank)) if linear else None

    @classmethod
    def drawn(cls, width: int, rank: int, seed: int, *names: str) -> Bottleneck:
        """V uniform within 1 / sqrt(d), PyTorch's own for a linear layer; U zero."""
        made = cls(width, rank)
        source = torch.Generator().manual_seed(entropy(seed, "bottleneck", *names) % 2**63)
        bound = 1 / math.sqrt(width)
        with torch.no_grad():
            made.down.uniform_(-bound, bound, generator=source)
        return made

    def change(self, z: Tensor) -> Tensor:
        """What is subtracted from z [..., d], in fp32."""
        wide = z.to(self.down.dtype)
        if self.shift is None:
            return nn.functional.linear(torch.relu(nn.functional.linear(wide, self.down)), self.up)
        return nn.functional.linear(nn.functional.linear(wide, self.down, self.shift), self.up)

    def forward(self, z: Tensor, axis: int = -1) -> Tensor:
        """z with its channels along `axis`, in its own type."""
        change = self.change(z if axis == -1 else z.movedim(axis, -1)).to(z.dtype)
        return z - (change if axis == -1 else change.movedim(-1, axis))

    def folded(self, head: nn.Linear) -> nn.Linear:
        """A linear layer that does to z what `head` does to the repaired z. Linear bottlenecks only."""
        if self.shift is None:
            what = "a bottleneck with a ReLU cannot be folded"
            raise SpoliaError(what, where="solver", mend="fit with solver=closed_form")
        weight = head.weight.detach()
        made = nn.Linear(head.in_features, head.out_features, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            through = weight @ self.up.to(weight)  # [classes, r]
            made.weight.copy_(weight - through @ self.down.to(weight))
            start = head.bias.detach() if head.bias is not None else torch.zeros_like(made.bias)
            made.bias.copy_(start - through @ self.shift.to(weight))
        return made.requires_grad_(False)


class Adapters(nn.Module):
    """The bottlenecks of every task at every site; one set for all tasks where `shared`.

    `fingerprint` is that of the merged weights they were fitted to. `centroids` [tasks, d]: the mean final feature of each
    expert, by which inputs of unknown task are routed.
    """

    centroids: Tensor | None

    def __init__(
        self,
        tasks: Sequence[str],
        sites: Sequence[Site],
        sets: Sequence[Sequence[Bottleneck]],
        *,
        fingerprint: str = "",
        facts: Mapping[str, Any] | None = None,
        centroids: Tensor | None = None,
    ):
        super().__init__()
        assert len(sets) in (1, len(tasks))
        self.tasks, self.sites = list(tasks), list(sites)
        self.shared = len(sets) == 1 and len(tasks) > 1
        self.sets = nn.ModuleList(nn.ModuleList(one) for one in sets)
        self.fingerprint, self.facts = fingerprint, dict(facts or {})
        self.register_buffer("centroids", centroids)

    def of(self, task: str | None) -> list[Bottleneck]:
        """The bottlenecks of `task`, in the order of the sites."""
        if self.shared and task is None:
            return list(self.sets[0])  # type: ignore[arg-type]
        if task not in self.tasks:
            known = did_you_mean(str(task), self.tasks) if task is not None else f"one of {', '.join(self.tasks)}"
            raise SpoliaError("no task is named" if task is None else f"no task `{task}`", where="task", mend=known)
        return list(self.sets[0 if self.shared else self.tasks.index(task)])  # type: ignore[arg-type]

    def edit(self, task: str | None) -> Any:
        """What parts.sites calls at every site."""
        chosen = self.of(task)
        return lambda number, state: chosen[number](state, self.sites[number].axis)

    @property
    def count(self) -> int:
        """Numbers trained, all tasks together."""
        return sum(p.numel() for p in self.sets.parameters())

    def attach(self, model: nn.Module, task: str | None = None) -> Attached:
        """Put the bottlenecks of `task` on a loaded model by forward hooks; `detach()` takes them off again."""
        return Attached(self, model, task)

    def save(self, file: str | os.PathLike[str]) -> Path:
        """One safetensors file, whole or not at all."""
        about = {
            "format": FORMAT,
            "tasks": self.tasks,
            "sites": [asdict(site) for site in self.sites],
            "ranks": [len(b.down) for b in self.sets[0]],  # type: ignore[union-attr]
            "linear": self.sets[0][0].shift is not None,  # type: ignore[index]
            "shared": self.shared,
            "fingerprint": self.fingerprint,
            "facts": self.facts,
        }
        # several keys of metadata have no fixed order
        return tensorfile.write(Path(file), self.state_dict(), {"about": json.dumps(about, allow_nan=False)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Adapters:
        """Adapters that `save` wrote. SpoliaError for any other file."""
        metadata, tensors = tensorfile.read(file, "give the file that Adapters.save wrote")
        try:
            about = json.loads(metadata["about"])
            if about["format"] != FORMAT:
                raise ValueError("another format")
            sites = [Site(**site) for site in about["sites"]]
            count = 1 if about["shared"] else len(about["tasks"])
            pairs = list(zip(sites, about["ranks"], strict=True))
            sets = [[Bottleneck(s.width, r, linear=about["linear"]) for s, r in pairs] for _ in range(count)]
            centroids = tensors.get("centroids")
            made = cls(about["tasks"], sites, sets, fingerprint=about["fingerprint"], facts=about["facts"])
            made.register_buffer("centroids", torch.empty_like(centroids) if centroids is not None else None)
            made.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            mend = "fit and save them again"
            raise SpoliaError(f"holds no adapters of ours: {error}", where=str(file), mend=mend) from None
        return made.requires_grad_(False)


class Attached:
    """Adapters on a model. `task` may be changed between calls; None where one set serves all."""

    def __init__(self, adapters: Adapters, model: nn.Module, task: str | None):
        modules = dict(model.named_modules())
        for site in adapters.sites:
            if site.name not in modules:
                what = f"the model has no module `{site.name}`"
                raise SpoliaError(what, where="attach", mend=did_you_mean(site.name, modules))
        heads = adapters.facts.get("heads", ())  # not part of what was merged
        held = {name: tensor for name, tensor in model.state_dict().items() if name not in heads}
        if adapters.fingerprint and adapters.fingerprint != fingerprint(held):
            text = "the adapters were fitted to other merged weights than this model's"
            warnings.warn(text, SpoliaWarning, stacklevel=3)
        adapters.of(task)
        self.task, self._adapters = task, adapters
        self._handles = hooks(model, adapters.sites, self._edit)
        if not adapters.sites[-1].name:
            self._handles.append(model.register_forward_hook(self._at_the_end))

    def _edit(self, number: int, state: Tensor) -> Tensor:
        return self._adapters.edit(self.task)(number, state)

    def _at_the_end(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """The outputs that parts.network reads, repaired."""
        if torch.is_tensor(output):
            return self._edit(-1, output)
        name = next((name for name in NAMED if torch.is_tensor(getattr(output, name, None))), None)
        if name is None:
            what = f"a {type(output).__name__}, in which no features are known"
            raise SpoliaError(what, where="attach", mend="fit with `last` naming the module that gives the feature")
        setattr(output, name, self._edit(-1, getattr(output, name)))
        return output

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Names, shapes and values of a model, the values as bfloat16 has them: a copy in that type is still the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

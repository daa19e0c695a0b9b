"""A merged model with its bottlenecks: what surgery gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spolia.errors import SpoliaError
from spolia.parts.bottleneck import Adapters
from spolia.parts.expert import Weights
from spolia.parts.network import Network
from spolia.parts.sites import run_through


class SurgeredModel(nn.Module):
    """The merged network, merged once, and the adapters that repair it for each task.

    model(batch, task="dtd")        logits under the task's head, or the outputs where no task has a head
    model.features(batch, "dtd")    the repaired final feature
    model.route(batch)              the tasks that the inputs seem to come from
    """

    def __init__(self, network: Network, adapters: Adapters):
        super().__init__()
        self.network, self.adapters = network, adapters
        self.body = network.module  # registered, so that .to() moves it
        self.heads = nn.ModuleList(network.heads.values())
        self.requires_grad_(False).eval()

    @property
    def facts(self) -> dict[str, Any]:
        """How the adapters were fitted and what they saw: JSON."""
        return self.adapters.facts

    def forward(self, batch: Any, task: str | None = None) -> Tensor:
        features = self.features(batch, task)
        if not self.network.heads:
            return features
        if task not in self.network.heads:
            known = f"one of {', '.join(self.network.heads)}"
            raise SpoliaError("no task is named, so no head is known", where="task", mend=known)
        return self.network.heads[task](features)

    def features(self, batch: Any, task: str | None = None) -> Tensor:
        """Final features [inputs, d] with the bottlenecks of `task` at work."""
        return run_through(self.network, batch, self.adapters.sites, self.adapters.edit(task))

    @torch.no_grad()
    def route(self, batch: Any) -> list[str]:
        """For each input the task whose expert's mean feature is nearest to the merged model's feature of it."""
        centroids = self.adapters.centroids
        if centroids is None:
            raise SpoliaError("the adapters hold no centroids", where="route", mend="fit them again")
        plain: list[Tensor] = []

        def note(number: int, state: Tensor) -> Tensor:
            if number == len(self.adapters.sites) - 1:
                plain.append(self.adapters.sites[number].tokens(state).float().mean(1))
            return state

        run_through(self.network, batch, self.adapters.sites, note)
        nearest = torch.cdist(plain[0], centroids).argmin(1)
        return [self.adapters.tasks[int(i)] for i in nearest]

    def folded(self, task: str) -> nn.Module:
        """The head of `task` with the last bottleneck in it, for a linear head and a closed form at the last site only."""
        head = self.network.heads.get(task)
        if not isinstance(head, nn.Linear) or len(self.adapters.sites) > 1 or self.adapters.sites[-1].name:
            what = "folding needs a linear head right after the only bottleneck"
            raise SpoliaError(what, where="folded", mend="fit with the method `surgery` and solver=closed_form")
        return self.adapters.of(task)[-1].folded(head)


def merged_network(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """The network with a copy of `weights` inside, frozen. Names tied in the module may be given once."""
    own = network.module.state_dict()
    given = dict(weights)
    for name, tensor in own.items():
        if name not in given:
            tied = (o for o in given if o in own and own[o].shape == tensor.shape and tensor.numel())
            alias = next((other for other in tied if own[other].data_ptr() == tensor.data_ptr()), None)
            if alias is not None:
                given[name] = given[alias]
    return Network(network.loaded(given).requires_grad_(False), network.heads, network.outputs)


def state_of(weights: Weights) -> dict[str, Tensor]:
    """All tensors of open weights, in their own types."""
    state = {}
    for name, entry in weights.entries.items():
        out = torch.empty(entry.numel, dtype=getattr(torch, entry.dtype.torch_name))
        weights.plane(name, name).read(0, entry.numel, out)
        state[name] = out.reshape(entry.shape)
    return state

"""The stage before meta-training: the body learns all training classes at once, under a head that is then thrown away."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.episode import floats

if TYPE_CHECKING:
    from torch import Tensor, nn


def pretrain(network: nn.Module, episodes: Any, settings: Any, heads: list[str], journal: Journal) -> None:
    """Train the body of `network` in place on the classes of `episodes`. Its head is as before.

    Every process of a group does the same. Running statistics of batch norm move here.
    """
    sets = getattr(episodes, "sets", None)
    path = heads[0].rpartition(".")[0]
    head = network.get_submodule(path)
    if not sets or not isinstance(head, torch.nn.Linear):
        mend = "pretrain=0, or an EpisodeSampler and a network that ends with nn.Linear"
        raise SpoliaError("needs classes and a linear head", where="pretrain", mend=mend)
    counts = [len(held) for held in sets]
    device, draws = head.weight.device, generator(episodes.seed, "pretrain", "head")
    bound = head.in_features**-0.5
    other = torch.nn.Linear(head.in_features, sum(counts)).to(device, head.weight.dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.from_numpy(draws.uniform(-bound, bound, tuple(parameter.shape))))
    whole = _with(network, path, other)
    optimizer = torch.optim.SGD(
        whole.parameters(), lr=settings.pretrain_lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.pretrain))
    for step in journal.steps(settings.pretrain, {"network": whole, "optimizer": optimizer, "schedule": schedule}):
        x, y = batch(sets, settings.pretrain_batch, generator(episodes.seed, "pretrain", step))
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(whole(floats(x.to(device))), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            journal.log(loss=loss.detach())
    state = whole.state_dict()
    own = network.state_dict()
    network.load_state_dict({name: own[name] if name in heads else state[name] for name in own})


def batch(sets: Any, count: int, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [count, ...] and the places of their classes among those of all sets; classes are equally likely."""
    starts = np.cumsum([0, *(len(held) for held in sets)])
    classes = np.sort(draws.integers(0, starts[-1], count))
    found = []
    for start, held in zip(starts, sets, strict=False):
        own = classes[(classes >= start) & (classes < start + len(held))] - start
        if own.size:
            sizes = (held.support[own] >= 0).sum(1)
            places = held.support[own, (draws.random(own.size) * sizes).astype(np.int64)]
            found.append(held.taken(own, places[:, None])[:, 0])
    return torch.cat(found), torch.from_numpy(classes)


def _with(network: nn.Module, path: str, head: nn.Module) -> nn.Module:
    """A copy of `network` with another head."""
    made = copy.deepcopy(network)
    if not path:
        return head
    parent, _, name = path.rpartition(".")
    setattr(made.get_submodule(parent), name, head)
    return made

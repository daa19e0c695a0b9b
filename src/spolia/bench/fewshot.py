"""How few-shot learners are judged: the same episodes for all, plain or with a changed support, and nothing carried over.

A learner is asked `predict(support_x [n*k, ...], support_y [n*k], query_x [m, ...])` for logits [m, n]; pixels are fp32
0 … 1 and the support stands class by class. It must answer an episode as if it were its first: that is tried out, for
statistics that leak from one episode to the next make numbers that depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from spolia.bench.consistency import consistency, floor
from spolia.bench.fewshot_scores import ACCURACY, ORDERS, SPREAD, Scores
from spolia.core.dist import summed, world
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.episode import EpisodeSampler

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.episode import Episodes

    Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
    Change = Callable[[Tensor, Sequence[np.random.Generator]], Tensor]  # data.augment's Augment is one

EPISODES = 600  # as most papers have it
SAME = 1e-4  # of the largest logit: what rounding on an accelerator may change from one call to the next


def evaluate(
    predict: Predict,
    sampler: EpisodeSampler,
    episodes: int = EPISODES,
    *,
    augment: Change | None = None,
    views: int = 0,
    view: Change | None = None,
    orders: int = 0,
    modules: Sequence[torch.nn.Module] = (),
    together: int = 1,
    device: Any = None,
) -> Scores:
    """A learner on the episodes 0 … episodes - 1 of `sampler`.

    `augment` changes the support before it is shown: the augmented scenario. `views`: so many versions of the support,
    each changed by `view` (by default `augment`), are adapted to one by one, and their answers compared. `orders`: so
    many random orders of the labels, over which accuracy is averaged. `modules` get their weights, statistics and mode
    back after every call. `together` above 1: predict takes that many episodes at once, each tensor with a leading
    [tasks] (the last call may have fewer). All randomness is by the sampler's seed and the episode's number. Of a
    sharded sampler its own part, or, in a process group of as many ranks, all.
    """
    changed = view or augment
    if views and (views < 2 or changed is None):
        raise SpoliaError(f"{views} views", where="views", mend="give two or more, and `view`, which makes them")
    numbers = sampler.numbers(episodes)
    if together < 1:
        raise SpoliaError(f"{together} episodes", where="together", mend="give 1 or more")
    if not numbers:
        raise SpoliaError(f"none of {episodes} for rank {sampler.rank}", where="episodes", mend="ask for more")
    ask = _Asked(predict, modules, together > 1)
    _probe(ask, sampler, numbers, device)
    found: dict[int, dict[str, float]] = {}
    for start in range(0, len(numbers), together):
        batch = sampler.batch(numbers[start : start + together]).to(device).floats()
        support = _support(batch, augment, sampler)
        columns = [[{ACCURACY: share} for share in _right(ask(support, batch.support_y, batch.query_x), batch)]]
        if orders:
            columns.append(_over_orders(ask, batch, support, orders, sampler.seed))
        if views and changed is not None:
            columns.append(_over_views(ask, batch, views, changed, sampler))
        for number, *parts in zip(batch.numbers, *columns, strict=True):
            found[number] = {metric: value for part in parts for metric, value in part.items()}
    which, values = _gathered(found, episodes, sampler)
    return Scores(which, repr(augment) if augment else "standard", values)


class _Asked:
    """predict for several episodes [tasks, ...], each answered as if it were the first: [tasks, queries, classes]."""

    def __init__(self, predict: Predict, modules: Sequence[torch.nn.Module], together: bool):
        self._predict, self._together = predict, together
        self._saved = [(module, _copied(module), [part.training for part in module.modules()]) for module in modules]

    def __call__(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        if self._together:
            logits = self._one(support_x, support_y, query_x)
        else:
            logits = torch.stack([self._one(*task) for task in zip(support_x, support_y, query_x, strict=True)])
        wanted = (*query_x.shape[:2], int(support_y.max()) + 1)
        if tuple(logits.shape) != wanted:
            cut = 0 if self._together else 1
            what = f"gives {list(logits.shape[cut:])}, not {list(wanted[cut:])}"
            raise SpoliaError(what, where="predict", mend="return a logit for each query and class")
        return logits

    def _one(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        logits = self._predict(support_x, support_y, query_x).detach()
        for module, state, modes in self._saved:
            with torch.no_grad():
                for name, tensor in _tensors(module).items():
                    tensor.copy_(state[name])
            for part, mode in zip(module.modules(), modes, strict=True):
                part.training = mode
        return logits


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


def _probe(ask: _Asked, sampler: EpisodeSampler, numbers: Sequence[int], device: Any) -> None:
    """Ask one episode, another, and the first again. SpoliaError where the answers differ."""
    one, other = (sampler.batch([number]).to(device).floats() for number in (numbers[0], numbers[-1]))
    first, _, again = (ask(e.support_x, e.support_y, e.query_x) for e in (one, other, one))
    near = torch.isclose(
        first, again, rtol=0, atol=SAME * max(1.0, float(first.nan_to_num(0).abs().max())), equal_nan=True
    )
    if not near.all():
        what = f"answers an episode otherwise after another one, by up to {float((first - again).abs().max()):.3g}"
        mend = (
            "begin every episode anew (BatchNorm's statistics, dropout, an optimizer), or name its modules in `modules`"
        )
        raise SpoliaError(what, where="predict", mend=mend)


def _support(batch: Episodes, change: Change | None, sampler: EpisodeSampler) -> Tensor:
    return batch.support_x if change is None else change(batch.support_x, _draws(sampler, batch, "scenario"))


def _draws(sampler: EpisodeSampler, batch: Episodes, name: str) -> list[np.random.Generator]:
    return [generator(sampler.seed, name, number) for number in batch.numbers]


def _right(logits: Tensor, batch: Episodes) -> list[float]:
    """Of each task the share of queries whose largest logit is the label; a row with a NaN counts as wrong."""
    right = (logits.argmax(-1) == batch.query_y) & ~logits.isnan().any(-1)
    return right.double().mean(1).tolist()


def _over_orders(ask: _Asked, batch: Episodes, support: Tensor, orders: int, seed: int) -> list[dict[str, float]]:
    sources = [generator(seed, "orders", number) for number in batch.numbers]
    blocks = support.unflatten(1, (batch.ways, -1))  # [tasks, ways, shots, ...]
    tasks = torch.arange(len(batch), device=support.device).unsqueeze(1)
    found = []
    for _ in range(orders):
        drawn = torch.from_numpy(np.stack([s.permutation(batch.ways) for s in sources])).to(support.device)
        logits = ask(blocks[tasks, drawn].flatten(1, 2), batch.support_y, batch.query_x)  # label j is class drawn[j]
        found.append(_right(torch.empty_like(logits).scatter_(-1, drawn.unsqueeze(1).expand_as(logits), logits), batch))
    return [{ORDERS: fmean(of_task), SPREAD: pstdev(of_task)} for of_task in zip(*found, strict=True)]


def _over_views(
    ask: _Asked, batch: Episodes, views: int, change: Change, sampler: EpisodeSampler
) -> list[dict[str, float]]:
    many = batch.support_x.unsqueeze(1).expand(-1, views, *batch.support_x.shape[1:])
    support = change(many, _draws(sampler, batch, "views")).flatten(0, 1)  # [tasks * views, ...]
    labels, queries = (part.repeat_interleave(views, 0) for part in (batch.support_y, batch.query_x))
    logits = ask(support, labels, queries).unflatten(0, (-1, views))
    chance = _draws(sampler, batch, "floor")
    return [consistency(own) | floor(own, draws) for own, draws in zip(logits, chance, strict=True)]


def _gathered(
    found: Mapping[int, Mapping[str, float]], episodes: int, sampler: EpisodeSampler
) -> tuple[str, dict[str, tuple[float, ...]]]:
    """Which episodes, and every metric's values: of all ranks where they share the list, else of this sampler."""
    metrics, kept = list(next(iter(found.values()))), sorted(found)
    table = torch.zeros(episodes, len(metrics), dtype=torch.float64)
    table[kept] = torch.tensor([list(found[number].values()) for number in kept], dtype=torch.float64)
    if sampler.of > 1 and world()[1] == sampler.of:
        summed(table)
        kept = list(range(episodes))
    values = {metric: tuple(table[kept, column].tolist()) for column, metric in enumerate(metrics)}
    return f"{sampler.key}: {len(kept)} of {kept[0]} … {kept[-1]}", values

"""What networks hold at their sites for a task's inputs, and how far the merged model's states are from the expert's.

Surgery's measure of the harm done by merging, Yang et al., Representation Surgery for Multi-Task Model Merging, ICML 2024,
arXiv 2402.02705:

    bias = 1 / (n d) sum_x |z_merged(x) - z_expert(x)|_1,     relative: divided by 1 / (n d) sum_x |z_expert(x)|_1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import summed, world
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.parts.examples import Examples
from spolia.parts.network import Network
from spolia.parts.sites import Site, run_through

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.bottleneck import Adapters

Match = Literal["mean", "cls", "all_tokens"]


def token_mask(batch: Any, rows: Tensor) -> Tensor | None:
    """Which tokens of rows [inputs, tokens, d] count, where the batch says so and says it of as many tokens."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not torch.is_tensor(mask) or mask.shape != rows.shape[:2]:
        return None
    return mask.to(rows.device).bool()


def counted(rows: Tensor, batch: Any) -> Tensor:
    """The rows [rows, d] of compared states that count: all, or those of unmasked tokens."""
    mask = token_mask(batch, rows) if rows.dim() == 3 else None
    return rows.flatten(0, -2) if mask is None else rows[mask]


def matched(site: Site, state: Tensor, match: Match, batch: Any) -> Tensor:
    """What is compared of a state: [inputs, d], or [inputs, tokens, d] with zeros where a token does not count."""
    rows = site.tokens(state)
    if rows.shape[1] == 1 or match == "cls":
        return rows[:, 0]
    mask = token_mask(batch, rows)
    if match == "mean":
        return rows.mean(1) if mask is None else (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return rows if mask is None else rows * mask[..., None]


def matches(sites: Sequence[Site], match: Match) -> list[Match]:
    """How each site is compared: the final feature always whole."""
    return [*([match] * (len(sites) - 1)), "all_tokens"]


def states(
    network: Network,
    sites: Sequence[Site],
    examples: Examples,
    match: Match,
    chunk: int,
    adapters: Adapters | None = None,
    task: str | None = None,
) -> list[Tensor]:
    """Compared states of all examples at every site, in fp32; with `adapters`, repaired ones."""
    found: list[list[Tensor]] = [[] for _ in sites]
    rank, ranks = _parts(examples)
    how = matches(sites, match)
    edit = adapters.edit(task) if adapters is not None else None
    with torch.no_grad():
        for _, batch in chunks(examples, chunk, rank, ranks):

            def note(number: int, state: Tensor, batch: Any = batch) -> Tensor:
                state = edit(number, state) if edit is not None else state
                found[number].append(matched(sites[number], state, how[number], batch).float())
                return state

            run_through(network, batch, sites, note)
    rows = [torch.cat(parts) for parts in found]
    if ranks == 1:
        return rows
    whole = [own.new_zeros(len(examples), *own.shape[1:]) for own in rows]
    for all_of_them, own in zip(whole, rows, strict=True):
        all_of_them[rank::ranks] = own
        summed(all_of_them)
    return whole


def _parts(examples: Examples) -> tuple[int, int]:
    """This process's part of the examples, and of how many; where there are fewer than processes each has them all."""
    rank, ranks = world()
    return (rank, ranks) if ranks <= len(examples) else (0, 1)


def chunks(examples: Examples, chunk: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[np.ndarray, Any]]:
    """All examples, or a process's part of them, in portions: their places and the batch."""
    own = np.arange(rank, len(examples), ranks)
    for start in range(0, len(own), chunk):
        places = own[start : start + chunk]
        yield places, examples.batch(places)


def places_of(examples: Examples, batch: int, seed: int, step: int, online: bool) -> np.ndarray:
    """The examples of a step: drawn in epochs, or, online, the next ones of a stream in which each comes once."""
    if not online:
        return examples.drawn(batch, seed, step)
    return generator(seed, "stream", examples.name).permutation(len(examples))[step * batch : (step + 1) * batch]


def steps_of(examples: Examples, steps: int, batch: int, online: bool) -> int:
    return -(-len(examples) // batch) if online else steps


def marks(steps: int) -> dict[int, float]:
    """After which steps of a stream it is looked at: at 1 % and every 10 %."""
    return {max(0, round(share * steps) - 1): share for share in (0.01, *(i / 10 for i in range(1, 11)))}


def distances(
    network: Network,
    sites: Sequence[Site],
    examples: Examples,
    targets: Sequence[Tensor],
    match: Match,
    chunk: int,
    adapters: Adapters | None = None,
    task: str | None = None,
    squared: bool = False,
) -> list[float]:
    """Mean absolute (or squared) difference from `targets`, which `states` gave, at every site."""
    how, totals = matches(sites, match), [0.0] * len(sites)
    edit = adapters.edit(task) if adapters is not None else None
    rank, ranks = _parts(examples)
    with torch.no_grad():
        for places, batch in chunks(examples, chunk, rank, ranks):

            def note(number: int, state: Tensor, batch: Any = batch, places: Any = places) -> Tensor:
                state = edit(number, state) if edit is not None else state
                gap = matched(sites[number], state, how[number], batch).float() - targets[number][places]
                totals[number] += float((gap.square() if squared else gap.abs()).double().sum())
                return state

            run_through(network, batch, sites, note)
    if ranks > 1:
        totals = summed(torch.tensor(totals, dtype=torch.float64)).tolist()
    return [total / target.numel() for total, target in zip(totals, targets, strict=True)]


def bias_rows(
    sites: Sequence[Site], targets: Sequence[Tensor], before: Sequence[float], after: Sequence[float]
) -> list[dict[str, Any]]:
    """Bias at every site before and after surgery, raw and relative to the expert's own size: JSON."""
    rows = []
    for site, target, raw, left in zip(sites, targets, before, after, strict=True):
        size = float(target.abs().double().mean()) or 1.0
        shares = {"relative_before": raw / size, "relative_after": left / size}
        rows.append({"site": site.label, "before": raw, "after": left, **shares})
    return rows

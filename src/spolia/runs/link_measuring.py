"""One seed of a link's study: both ends made, every scheme through the same noise, and the bounds that hold for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench.link import SIMILARITY, Point, Yardstick, sweep
from spolia.core.lazy import torch
from spolia.core.modulation import bit_error_rate, modulate
from spolia.core.seeds import generator
from spolia.core.snr import n0_of, to_esn0
from spolia.methods.link import bounds
from spolia.runs.link_ends import Ends, ends_of, rates_of
from spolia.runs.link_frames import batches, by_length, tokens_of
from spolia.runs.link_problems import LinkProblem
from spolia.runs.link_schemes import link_of, schemes_of

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.bench.link import Batch
    from spolia.core.journal import Journal
    from spolia.parts.link import Link
    from spolia.runs.studies import StudyRecipe

    Told = Callable[[dict[str, Any]], None]
    """Hears of a seed's points and facts while they are measured."""

_SHOWN = 300  # symbols of the constellation's figure
_HELD = 1 << 24  # log-probabilities at once


def measured(
    recipe: StudyRecipe, seed: int, folder: Path, journal: Journal, told: Told
) -> tuple[dict[str, Any], Ends, dict[str, Link]]:
    """Points and facts of a seed, as JSON, with what they are of."""
    problem: LinkProblem = recipe.problem
    symbols = getattr(recipe.settings, "metric", "bit") == "symbol"
    ends = ends_of(problem, seed, folder, journal, symbols=symbols)
    bits = source_bits(ends)
    tokens = sum(len(frame.tokens) for frame in ends.test)
    rates = rates_of(ends, sum(bits) / tokens)
    esn0 = [to_esn0(db, problem.convention, rates) for db in problem.snr]
    links = {s.label: link_of(s, ends, recipe, seed, journal) for s in schemes_of(recipe)}
    facts = {
        "rates": dict(vars(rates)),
        "entropy": sum(bits) / tokens,
        "width": ends.code.labels.width,
        "vocabulary": ends.prior.vocabulary,
        "esn0": esn0,
        "bounds": bounds_of(ends, problem, esn0, bits),
        "limit": _limit(ends, problem, sum(bits)),
        "uses": {label: _uses(link, ends) for label, link in links.items()},
        "constellation": _scatter(ends, esn0[len(esn0) // 2], seed),
    }
    order = batches(ends.test, problem.batch, seed)

    def now(points: Sequence[Point]) -> dict[str, Any]:
        levels = dict(zip(map(float, esn0), problem.snr, strict=True))
        return facts | {
            "points": [
                {"label": p.system, "snr": levels[p.esn0_db], "esn0": p.esn0_db, "counts": p.counts} for p in points
            ]
        }

    by = Yardstick(ends.channel, ends.code, ends.constellation.bits)
    with journal.phase(f"seed {seed} sweep"):
        points = sweep(
            links,
            lambda number: _moved(order[number], problem.device),
            esn0,
            by,
            errors=problem.errors,
            batches=len(order),
            seed=seed,
            journal=journal,
            told=lambda points: told(now(points)),
        )
    if problem.embedding is not None:
        _compared(points, problem)
    return now(points), ends, links


def _moved(batch: Batch, device: str) -> Batch:
    from spolia.bench.link import Batch

    return Batch(batch.tokens.to(device), batch.contexts)


def source_bits(ends: Ends) -> list[float]:
    """-log2 P of every test frame under the model, frames of one length after the other."""
    found = []
    for length, frames in by_length(ends.test).items():
        rows = max(1, _HELD // (length * ends.prior.vocabulary))
        for start in range(0, len(frames), rows):
            own = frames[start : start + rows]
            tokens = tokens_of(own).to(ends.code.labels.codes.device)
            found += bounds.source_bits(ends.prior, tokens, [frame.before for frame in own]).tolist()
    return found


def bounds_of(
    ends: Ends, problem: LinkProblem, esn0_db: Sequence[float], bits: Sequence[float]
) -> dict[str, list[float]]:
    """Closed forms by level, where they hold: of separate coding at its best, and of labels without a model."""
    found: dict[str, list[float]] = {}
    if not problem.channel.plain:
        return found
    faded, c, width = problem.channel.fading, ends.constellation, ends.code.labels.width
    raw = [bit_error_rate(c.name, 10 ** (db / 10), faded) for db in esn0_db]
    if ends.prior.vocabulary == 1 << width and not problem.interleave:
        found["bit error"], found["token error"] = raw, [bounds.token_error(p, width) for p in raw]
    if faded == "none":
        groups = by_length(ends.test)
        lengths = [length for length, frames in groups.items() for _ in frames]  # in the order of `bits`
        found["frame error"] = []
        for db in esn0_db:
            each = [
                bounds.separate_frame_error(
                    c,
                    10 ** (db / 10),
                    ends.uses(length),
                    bounds.ideal_bits([b for b, other in zip(bits, lengths, strict=True) if other == length]),
                )
                * len(groups[length])
                for length in groups
            ]
            found["frame error"].append(sum(each) / len(lengths))
    return found


def _limit(ends: Ends, problem: LinkProblem, bits: float) -> float | None:
    """Es/N0 in dB below which no scheme can send the test's entropy in that many uses; None where none is known."""
    each = bits / sum(ends.uses(len(frame.tokens)) for frame in ends.test)
    if not problem.channel.plain or problem.channel.fading != "none" or not 0 < each < ends.constellation.bits:
        return None
    return bounds.limit_db(ends.constellation, each)


def _uses(link: Link, ends: Ends) -> float:
    """Channel uses a character, in the mean over a few test frames."""
    uses = characters = 0
    for frame in ends.test[:20]:
        tokens = torch.tensor([frame.tokens], device=ends.code.labels.codes.device)
        uses += int(link.send(tokens, [frame.before]).shape[1])
        characters += len(ends.tokenizer.decode(frame.tokens))
    return uses / max(1, characters)


def _scatter(ends: Ends, esn0_db: float, seed: int) -> dict[str, Any]:
    """Points that are sent, and what arrives, each turned back by the gain that the receiver knows."""
    c = ends.constellation
    first = by_length(ends.test)[len(ends.test[0].tokens)]
    sent = modulate(ends.code.bits(tokens_of(first).to(c.points.device)), c)
    received = ends.channel.transmit(sent, n0_of(esn0_db), generator(seed, "link", "figure"))
    y = received.y if received.gain is None else received.y / torch.where(received.gain == 0, 1, received.gain)
    return {"esn0": esn0_db, "sent": _parts(c.points), "received": _parts(y.flatten()[:_SHOWN])}


def _parts(values: Tensor) -> list[list[float]]:
    pairs = torch.view_as_real(values.cpu().to(torch.complex128))
    return [[round(float(v), 4) for v in own] for own in pairs.unbind(-1)]


def _compared(points: Sequence[Point], problem: LinkProblem) -> None:
    """Cosines of sent and read, added to every point."""
    from spolia.runs.link_embedding import Similarity

    assert problem.embedding is not None
    similarity = Similarity(problem.embedding, problem.device)
    for point in points:
        values = similarity(point.counts["sent"], point.counts["text"])
        point.counts[SIMILARITY], point.counts[f"{SIMILARITY} of"] = values, [1] * len(values)

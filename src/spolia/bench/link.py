"""How links are judged: the same texts through the same noise, counted until enough frames are wrong.

    points = sweep({"llm_sc": link, …}, draw, [0, 2, 4], Yardstick(channel, code))

`draw(number)` gives a batch of frames by its number, so that every system and every Es/N0 meets the same text, and under the
same noise where frames have as many channel uses. A system is done at a point when `errors` of its frames were wrong there,
or after `batches` of them. Noise is scaled, not drawn anew, from point to point: curves differ by more than chance sooner.

| metric | of |
|---|---|
| `exact frames` | frames whose text is exactly right |
| `frame error` | the others |
| `token error` | tokens that are not what was sent at their place |
| `bit error` | bits of the labels of decided tokens, as `code` assigns them, not of demodulated bits |
| `symbol error` | those bits, by symbols of the constellation |
| `character error` | edit distance of the texts, over characters sent |
| `bleu-1` … `bleu-4` | sacrebleu's, in per cent, where it is installed |
| `undetected` | frames that pass their check and are wrong |
| `similarity` | whatever was added to a point under that name: a text encoder's cosine of sent and read |
| `reads` | of the receiver's model, a token of text: hypotheses it reads on for each |

Intervals are 95 %: Wilson's for frames; for the rest by resampling frames, because errors within one go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import LEVEL, Interval, wilson
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel, Received

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.link import Decoded, Link
    from spolia.parts.textcode import TextCode

EXACT, FRAME, TOKEN, BIT, SYMBOL = "exact frames", "frame error", "token error", "bit error", "symbol error"
CHARACTER, UNDETECTED, SIMILARITY, READS = "character error", "undetected", "similarity", "reads"
BLEU = tuple(f"bleu-{n}" for n in (1, 2, 3, 4))
_RESAMPLED = 1000


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames of one length: tokens [N, T], and the tokens before each."""

    tokens: Tensor
    contexts: Sequence[Sequence[int]] | None = None


@dataclass
class Point:
    """What one system did at one Es/N0, frame by frame; plain lists, so that a journal keeps them."""

    system: str
    esn0_db: float
    counts: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return len(self.counts.get(FRAME, []))

    @property
    def wrong(self) -> int:
        return sum(self.counts.get(FRAME, []))

    @property
    def metrics(self) -> list[str]:
        """What can be said of it."""
        first = [EXACT, FRAME] if FRAME in self.counts else []
        known = [m for m in (TOKEN, BIT, SYMBOL, CHARACTER, UNDETECTED, SIMILARITY, READS) if m in self.counts]
        return [*first, *known, *(BLEU if "text" in self.counts and has_bleu() else ())]

    def measure(self, metric: str) -> Interval:
        """Mean and interval; shares are 0 … 1."""
        if metric not in self.metrics:
            raise SpoliaError(f"`{metric}` was not measured", where="link", mend=f"there is {', '.join(self.metrics)}")
        if metric in (EXACT, FRAME, UNDETECTED):
            wrong = sum(self.counts[FRAME if metric == EXACT else metric])
            share = (self.frames - wrong if metric == EXACT else wrong) / self.frames
            return Interval(share, *wilson(share, self.frames))
        if metric in BLEU:
            score = _bleu(self.counts["text"], self.counts["sent"], int(metric[-1]))
            return Interval(score)
        return ratio(self.counts[metric], self.counts[f"{metric} of"])


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What is sent through, and what errors are counted by."""

    channel: Channel
    code: TextCode
    """Gives texts, and the label bits that bit errors are counted by."""
    bits_per_symbol: int = 1
    keep_texts: bool = True
    """For BLEU; off, only counts are kept."""


def sweep(
    links: Mapping[str, Link],
    draw: Callable[[int], Batch],
    esn0_db: Sequence[float],
    yardstick: Yardstick,
    *,
    errors: int = 100,
    batches: int = 50,
    seed: int = 0,
    journal: Journal | None = None,
    told: Callable[[list[Point]], None] | None = None,
) -> list[Point]:
    """Every link at every Es/N0; `told` hears of all points after every batch.

    With a journal that has a folder the counts survive an interruption, and the sweep goes on where it stopped.
    """
    if not links or not esn0_db or errors < 1 or batches < 1:
        raise SpoliaError("nothing to measure", where="sweep", mend="give links, levels of noise, errors and batches")
    journal = journal or Journal()
    kept: dict[str, dict[str, list[Any]]] = {f"{name} {db:g}": {} for name in links for db in esn0_db}

    def points() -> list[Point]:
        return [Point(name, float(db), kept[f"{name} {db:g}"]) for name in links for db in esn0_db]

    with journal.phase("noise"), torch.no_grad():
        for number in journal.steps(batches, keep={"counts": kept}):
            open_ = [point for point in points() if point.wrong < errors]
            if not open_:
                continue
            batch = draw(number)
            for name, link in links.items():
                if own := [point for point in open_ if point.system == name]:
                    _measure(link, own, batch, yardstick, generator(seed, "channel", number))
            journal.log(points=len(open_), frames=sum(point.frames for point in points()))
            if told is not None:
                told(points())
    return points()


def _measure(link: Link, points: Sequence[Point], batch: Batch, by: Yardstick, rng: np.random.Generator) -> None:
    """One batch through one link at all its open points, which the receiver reads as one."""
    symbols = link.send(batch.tokens, batch.contexts)
    frames, length = batch.tokens.shape
    drawn = by.channel.draw(tuple(symbols.shape), rng).to(symbols.device)
    heard = [by.channel.apply(symbols, n0_of(point.esn0_db), drawn) for point in points]
    contexts = None if batch.contexts is None else list(batch.contexts) * len(points)
    decoded = link.receive(stacked(heard), length, contexts)
    for i, point in enumerate(points):
        _count(point, decoded, slice(i * frames, (i + 1) * frames), batch.tokens, by)


def stacked(parts: Sequence[Received]) -> Received:
    """Receptions of equal shape [N, n] as one [parts N, n]."""
    y = torch.cat([part.y for part in parts])
    level = [torch.as_tensor(part.n0, dtype=y.real.dtype, device=y.device).expand(part.y.shape) for part in parts]
    gains = [part.gain for part in parts]
    known = [gain.expand(part.y.shape) for gain, part in zip(gains, parts, strict=True) if gain is not None]
    return Received(y, torch.cat(level), torch.cat(known) if known else None)


def _count(point: Point, decoded: Decoded, own: slice, tokens: Tensor, by: Yardstick) -> None:
    """Add the frames `own` of a batch to a point."""
    code, sent = by.code, [by.code.text(row) for row in tokens]
    best = decoded.best[own]
    read = [code.text(row) for row in best] if decoded.texts is None else decoded.texts[own]
    found: dict[str, list[Any]] = {}
    if decoded.texts is None:
        differ = best != tokens
        labels = code.labels.bits.to(tokens.device)
        bits = (labels[best] != labels[tokens]).flatten(1)  # [N, T b]
        missing = -bits.shape[1] % by.bits_per_symbol
        symbols = torch.nn.functional.pad(bits, (0, missing)).unflatten(1, (-1, by.bits_per_symbol)).any(2)
        wrong = differ.any(1)
        for metric, errors in ((TOKEN, differ), (BIT, bits), (SYMBOL, symbols)):
            found[metric], found[f"{metric} of"] = errors.sum(1).tolist(), [errors.shape[1]] * len(errors)
    else:
        wrong = torch.tensor([a != b for a, b in zip(read, sent, strict=True)])
    found[FRAME] = wrong.long().tolist()
    found[CHARACTER] = [edits(a, b) for a, b in zip(read, sent, strict=True)]
    found[f"{CHARACTER} of"] = [len(text) for text in sent]
    if decoded.passes is not None:
        found[UNDETECTED] = (decoded.passes[own].cpu() & wrong.cpu()).long().tolist()
    if "rows read a token" in decoded.cost:  # by all frames that were read together
        length = tokens.shape[1]
        found[READS], found[f"{READS} of"] = (
            [decoded.cost["rows read a token"] * length] * len(best),
            [length] * len(best),
        )
    if decoded.log_posterior is not None:
        found["confidence"] = decoded.confidence[own].tolist()
    if by.keep_texts:
        found["text"], found["sent"] = read, sent
    for name, values in found.items():
        point.counts.setdefault(name, []).extend(values)


# --- numbers ---------------------------------------------------------------------------------------------------------


def ratio(errors: Sequence[float], of: Sequence[float], level: float = LEVEL) -> Interval:
    """Sum of errors over sum of places, with an interval from resampling frames (seeded, percentiles)."""
    top, bottom = np.asarray(errors, dtype=np.float64), np.asarray(of, dtype=np.float64)
    mean = float(top.sum() / max(bottom.sum(), 1))
    if len(top) < 2:
        return Interval(mean)
    if not top.any():  # resampling says nothing: no frame was wrong, so at most Wilson's share of frames is
        return Interval(mean, 0.0, wilson(0.0, len(top), level)[1])
    rng = generator(0, "bootstrap", len(top))
    picked = rng.integers(0, len(top), (_RESAMPLED, len(top)))
    shares = top[picked].sum(1) / np.maximum(bottom[picked].sum(1), 1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements that make b of a."""
    if a == b:
        return 0
    other = np.frombuffer(b.encode("utf-32-le"), dtype=np.uint32)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for i, character in enumerate(np.frombuffer(a.encode("utf-32-le"), dtype=np.uint32), start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != character))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - places) + places
    return int(row[-1])


def rows(points: Iterable[Point], baselines: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows of the results ledger; the task is the level of noise."""
    baselines, found = set(baselines), []
    for point in points:
        for metric in point.metrics:
            seen = point.measure(metric)
            row = {"method": point.system, "task": f"{point.esn0_db:g} dB", "metric": metric, "unit": ""}
            if metric in BLEU:
                row["unit"] = "%"
            row |= {"mean": seen.mean, "low": seen.low, "high": seen.high, "n": point.frames}
            found.append(row | ({"baseline": True} if point.system in baselines else {}))
    return found


def _bleu(texts: Sequence[str], sent: Sequence[str], order: int) -> float:
    metric = _sacrebleu().BLEU(max_ngram_order=order)
    return float(metric.corpus_score(list(texts), [list(sent)]).score)


def has_bleu() -> bool:
    """Whether sacrebleu is installed."""
    return _sacrebleu() is not None


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics  # type: ignore[import-not-found]
    except ImportError:
        return None
    return metrics

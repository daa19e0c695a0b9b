"""How a language model is judged: how likely it finds a text, every token predicted once.

A text is read in windows of `context` tokens that begin `stride` tokens apart. Each token but the first is predicted by
the first window that reaches it, so the count does not depend on the stride; a smaller one lets tokens see more of what
stands before them, at more cost. Log-softmax is taken in fp32 and summed in fp64, whatever the model computes in.

Perplexity is per token: it compares models of one tokenizer. Bits per byte compare all. Over several texts the mean is
taken of nats per token, each text of equal weight; its exponential is the geometric mean of the perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import AVERAGE, paired, t_interval
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

_UNSCORED = -100  # a target that cross_entropy leaves out


@dataclass(frozen=True)
class Likelihood:
    """Minus the log-likelihood of `tokens` predicted tokens, in nats; `size` is the text's length in bytes, if known."""

    nats: float
    tokens: int
    size: int | None = None

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return exponential(self.mean)

    @property
    def bits(self) -> float | None:
        """Bits per byte (per character, where `size` counts those); None where the size is not known."""
        return None if self.size is None else self.nats / math.log(2) / self.size


def exponential(nats: float) -> float:
    """exp, infinite where a float ends."""
    return math.exp(nats) if not nats > 709 else math.inf


def likelihood(
    outputs: Callable[[Tensor], Any],
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 16,
    size: int | None = None,
) -> Likelihood:
    """How likely a causal model finds `tokens` [n], the first of which is given and not predicted.

    `outputs(ids [windows, context])` gives logits [windows, context, vocabulary], bare or as `.logits`: a model of
    transformers, or any function; position i must not see what comes after it. `stride` is `context` unless given.
    The last window is filled up on the right, and that part is not scored. `tokens` lie on the model's device. A model
    that gives NaN has a likelihood of NaN. SpoliaError for a module in training mode, and for what does not fit.
    """
    stride = context if stride is None else stride
    _check(outputs, tokens, context, stride, batch)
    highest, nats, counted = int(tokens.max()), 0.0, 0
    with torch.no_grad():
        for inputs, targets in _batches(tokens, context, stride, batch):
            found = outputs(inputs)
            logits = found if isinstance(found, torch.Tensor) else found.logits
            _check_logits(logits, inputs, highest)
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=_UNSCORED, reduction="none"
            )
            nats += float(losses.double().sum())
            counted += int((targets != _UNSCORED).sum())
    assert counted == len(tokens) - 1
    return Likelihood(nats, counted, size)


def _batches(tokens: Tensor, context: int, stride: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [windows, context]. Targets that an earlier window had, and the filling, are unscored."""
    last = len(tokens) - 1
    starts = range(0, max(1, last - context + stride), stride)
    for at in range(0, len(starts), batch):
        group = starts[at : at + batch]
        inputs = tokens.new_zeros(len(group), context, dtype=torch.long)
        targets = torch.full_like(inputs, _UNSCORED)
        for row, start in enumerate(group):
            stop = min(start + context, last)
            seen = 0 if start == 0 else context - stride
            inputs[row, : stop - start] = tokens[start:stop]
            targets[row, seen : stop - start] = tokens[start + 1 + seen : stop + 1]
        yield inputs, targets


def _check(outputs: Any, tokens: Tensor, context: int, stride: int, batch: int) -> None:
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.is_floating_point():
        what = f"is {list(tokens.shape)} of {tokens.dtype}".replace("torch.", "")
        raise SpoliaError(what, where="tokens", mend="give two token ids or more, in one row")
    if context < 1 or batch < 1:
        raise SpoliaError("must be 1 or more", where="context" if context < 1 else "batch")
    if not 1 <= stride <= context:
        mend = "a larger stride would leave tokens out" if stride > context else ""
        raise SpoliaError(f"must be 1 to {context}, the context", where="stride", mend=mend)
    if isinstance(outputs, torch.nn.Module) and outputs.training:
        raise SpoliaError("is in training mode: dropout would count", where="outputs", mend="call model.eval() first")


def _check_logits(logits: Tensor, inputs: Tensor, highest: int) -> None:
    if logits.ndim != 3 or logits.shape[:2] != inputs.shape:
        what = f"gave {list(logits.shape)} for ids of {list(inputs.shape)}"
        raise SpoliaError(what, where="outputs", mend="return logits [windows, context, vocabulary]")
    if highest >= logits.shape[2]:
        what = f"holds token {highest}, the model's vocabulary ends at {logits.shape[2] - 1}"
        raise SpoliaError(what, where="tokens", mend="use the model's own tokenizer")


def mean_nats(found: Mapping[str, Likelihood]) -> float:
    """Mean over texts of nats per token, each of equal weight."""
    return fmean(one.mean for one in found.values())


# --- rows of the results ledger --------------------------------------------------------------------------------------

PERPLEXITY, BITS = "perplexity", "bits per byte"


def ledger_rows(
    scores: Mapping[str, Sequence[Mapping[str, Likelihood]]],
    *,
    metric: str = PERPLEXITY,
    baselines: Iterable[str] = (),
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of every method: each text, then their average. `scores[method]` has one entry per seed, in the same order.

    The average of perplexities is their geometric mean, that of bits per byte the plain one. Intervals are Student's over
    seeds, cut where the metric ends. A method measured on fewer texts than the first one has no average.
    """
    baselines, rows = set(baselines), []
    every_text = set(next(iter(scores.values()))[0]) if scores else set()
    for method, seeds in scores.items():
        whole = set(seeds[0]) == every_text
        for text in [*seeds[0], *([AVERAGE] if whole and len(every_text) > 1 else [])]:
            values = _values(seeds, text, metric)
            found, floor = t_interval(values), 1.0 if metric == PERPLEXITY else 0.0
            low = None if found.low is None else max(floor, found.low)
            row: dict[str, Any] = {"method": method, "task": text, "metric": metric, "unit": "", "mean": found.mean}
            row |= {"low": low, "high": found.high, "n": len(values)}
            if method in baselines:
                row["baseline"] = True
            if against in scores and method != against and whole:
                gap = paired(values, _values(scores[against], text, metric))
                row["paired_difference"] = {"against": against, "mean": gap.mean, "low": gap.low, "high": gap.high}
            rows.append(row)
    return rows


def _values(seeds: Sequence[Mapping[str, Likelihood]], text: str, metric: str) -> list[float]:
    if metric == BITS:
        return [
            fmean(_bits(one) for one in found.values()) if text == AVERAGE else _bits(found[text]) for found in seeds
        ]
    return [exponential(mean_nats(found)) if text == AVERAGE else found[text].perplexity for found in seeds]


def _bits(found: Likelihood) -> float:
    assert found.bits is not None, "bits per byte need the size of the text"
    return found.bits

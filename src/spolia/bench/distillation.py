"""How a student is judged: accuracy or perplexity, how far its confidence can be trusted, and how it ranks the classes.

    ECE = sum over bins of share(bin) |accuracy(bin) - mean confidence(bin)|       confidence: the largest probability
    rank agreement = mean over samples of Kendall's tau-b between the student's and the teacher's logits

Naeini, Cooper, Hauskrecht, AAAI 2015; Guo et al., ICML 2017, arXiv 1706.04599 (15 bins of equal width); Kendall, Biometrika
33, 1945 (tau-b, which allows for ties). All are per cent. Nothing here chooses anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import paired, t_interval
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15
_PAIRS = 1 << 23  # class pairs held at once

ACCURACY, ECE, TAU, NLL, PERPLEXITY = "accuracy", "ECE", "rank agreement", "NLL", "perplexity"
UNITS = {PERPLEXITY: "", NLL: "nats"}


@dataclass(frozen=True)
class Judgement:
    """What `count` samples say of a student: per cent, and the mean of -log p(label) in nats."""

    accuracy: float
    calibration: float
    rank_agreement: float
    nll: float
    count: int

    def to_dict(self) -> dict[str, float]:
        """By the metric's name; perplexity is exp(NLL), ended where a float ends."""
        found = {ACCURACY: self.accuracy, TAU: self.rank_agreement, ECE: self.calibration, NLL: self.nll}
        return found | {PERPLEXITY: math.exp(min(self.nll, 700.0))}


def judge(student: Tensor, teacher: Tensor, labels: Tensor, top: int | None = None) -> Judgement:
    """Logits [..., C] of both, labels [...]; labels below 0 count as nothing. `top`: ranks among the teacher's first alone."""
    if student.shape != teacher.shape or labels.shape != student.shape[:-1]:
        shapes = f"{list(student.shape)}, {list(teacher.shape)} and {list(labels.shape)}"
        raise SpoliaError(f"logits and labels are {shapes}", where="judge", mend="give [..., C], [..., C] and [...]")
    kept = labels.flatten() >= 0
    s, t = (x.reshape(-1, x.shape[-1])[kept].float() for x in (student, teacher))
    y = labels.flatten()[kept]
    logs = s.log_softmax(-1)
    return Judgement(
        accuracy=100 * float((s.argmax(-1) == y).double().mean()),
        calibration=100 * calibration_error(logs.exp(), y),
        rank_agreement=100 * float(kendall(s, t, top).mean()),
        nll=float(-logs.gather(-1, y.unsqueeze(-1)).double().mean()),
        count=len(y),
    )


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (0 … 1) of probabilities [n, C], by `bins` of equal width of the largest one."""
    confidence, answer = probabilities.double().max(-1)
    right = (answer == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open below and closed above
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, place, right)
    sums[1].index_add_(0, place, confidence)
    return float((sums[0] - sums[1]).abs().sum() / len(labels))


def kendall(student: Tensor, teacher: Tensor, top: int | None = None) -> Tensor:
    """Kendall's tau-b of every sample: [n, C] and [n, C] -> [n] in fp64, -1 … 1; 0 where either ties all classes.

    `top`: of the teacher's `top` largest classes alone. All pairs of classes are looked at, a few samples at a time.
    """
    if top is not None and top < teacher.shape[-1]:
        index = teacher.topk(top, -1).indices
        student, teacher = student.gather(-1, index), teacher.gather(-1, index)
    rows = max(1, _PAIRS // student.shape[-1] ** 2)
    return torch.cat([_tau(s, t) for s, t in zip(student.split(rows), teacher.split(rows), strict=True)])


def _tau(student: Tensor, teacher: Tensor) -> Tensor:
    """[n, C] twice -> [n]. Every pair counts twice, above and below."""
    s, t = ((x.unsqueeze(-1) - x.unsqueeze(-2)).sign() for x in (student, teacher))
    agree, mine, theirs = ((x * y).sum((-2, -1)).double() for x, y in ((s, t), (s, s), (t, t)))
    most = (mine * theirs).sqrt()
    return torch.where(most > 0, agree / most.clamp(min=1), torch.zeros_like(agree))


# --- rows of the results ledger --------------------------------------------------------------------------------------


def ledger_rows(
    values: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Sequence[str],
    task: str,
    *,
    against: Mapping[str, str] | None = None,
    baselines: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each method and metric. `values[method]` has one entry a seed, in the same order for all.

    `against[method]` names what its differences, seed by seed, are taken from. Intervals are Student's over seeds; of one
    seed there are none. A method that was not measured in a metric has no row there.
    """
    rows = []
    for metric in metrics:
        for method, seeds in values.items():
            if metric not in seeds[0]:
                continue
            found = t_interval([one[metric] for one in seeds])
            unit = UNITS.get(metric, "%")
            row: dict[str, Any] = {"method": method, "task": task, "metric": metric, "unit": unit, "mean": found.mean}
            row |= {"low": _held(found.low, metric, unit), "high": _held(found.high, metric, unit), "n": len(seeds)}
            if method in baselines:
                row["baseline"] = True
            other = (against or {}).get(method)
            if other is not None and len(seeds) > 1:
                gap = paired([one[metric] for one in seeds], [one[metric] for one in values[other]])
                row["paired_difference"] = {"against": other, "mean": gap.mean, "low": gap.low, "high": gap.high}
            rows.append(row)
    return rows


def _held(value: float | None, metric: str, unit: str) -> float | None:
    """An end of an interval, no further than the metric goes: only rank agreement may be negative."""
    if value is None:
        return None
    return min(100.0 if unit == "%" else math.inf, max(-100.0 if metric == TAU else 0.0, value))

"""Confidence that is right as often as it says: two numbers fitted on frames whose text is known.

    P(right) = sigmoid(slope logit(p) + offset)      (Platt 1999; p: what the receiver estimates)

Fitted by Newton's method on the log-loss, with a weak pull to slope 1 and offset 0, so that a handful of frames, or frames
that are all right, change little. Use frames of text that is not the test's, at the Es/N0 at hand or over those met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

_SURE = 1e-9  # a probability is taken to be at least this far from 0 and 1
_PULL = 1.0  # weight of the squared distance from slope 1, offset 0, in frames


@dataclass(frozen=True)
class Calibration:
    """The two numbers; the default changes nothing."""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, confidence: Tensor) -> Tensor:
        """Calibrated confidence, of any shape."""
        return torch.sigmoid(self.slope * _logit(confidence) + self.offset)


def calibrate(confidence: Tensor, right: Tensor, steps: int = 50) -> Calibration:
    """From confidences [n] and whether each was right [n], bool."""
    if confidence.shape != right.shape or confidence.dim() != 1 or not len(right):
        what = f"{list(confidence.shape)} confidences, {list(right.shape)} answers"
        raise SpoliaError(what, where="calibrate", mend="give one of each a frame")
    x = torch.stack([_logit(confidence), torch.ones_like(confidence, dtype=torch.float64)], dim=1)  # [n, 2]
    y, start = right.double(), torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    w = start.clone()
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        slope = x.T @ (p - y) + _PULL * (w - start)
        curve = (x * (p * (1 - p))[:, None]).T @ x + _PULL * torch.eye(2, dtype=x.dtype, device=x.device)
        move = torch.linalg.solve(curve, slope)
        w = w - move * min(1.0, 2.0 / float(move.abs().max().clamp(min=1e-12)))
        if float(move.abs().max()) < 1e-10:
            break
    return Calibration(float(w[0]), float(w[1]))


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Mean distance of confidence from the share that was right, over bins of equal width, by their frames."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    total = 0.0
    for b in range(bins):
        own = place == b
        if bool(own.any()):
            total += float((confidence[own].double().mean() - right[own].double().mean()).abs()) * int(own.sum())
    return total / len(right)


def _logit(p: Tensor) -> Tensor:
    p = p.double().clamp(_SURE, 1 - _SURE)
    return p.log() - torch.log1p(-p)

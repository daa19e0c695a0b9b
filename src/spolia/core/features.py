"""Distances between features of a student and a teacher that need not be of one width or size.

A feature is [batch, d], [batch, tokens, d], or a map [batch, channels, height, width]. Half precision is computed in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.divergence import wide
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


def width_of(feature: Tensor) -> int:
    """Channels: the second axis of a map, the last of anything else."""
    return feature.shape[1] if feature.dim() == 4 else feature.shape[-1]


def alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as fp32 or wider, the larger map averaged down to the smaller one's height and width."""
    student, teacher = wide(student), wide(teacher)
    if student.dim() == 4 and teacher.dim() == 4:
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student, teacher = (_shrunk(x, size) for x in (student, teacher))
    same = student.shape[0] == teacher.shape[0] and _places(student) == _places(teacher)
    if student.dim() != teacher.dim() or student.dim() not in (2, 3, 4) or not same:
        what = f"the student's feature is {list(student.shape)}, the teacher's {list(teacher.shape)}"
        raise SpoliaError(what, where="features", mend="name modules whose outputs have one kind of shape")
    return student, teacher


def projected(feature: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """A linear map of the channels, `matrix` [out, in]; on a feature map it is a convolution 1 x 1."""
    if feature.dim() == 4:
        return torch.nn.functional.conv2d(feature, matrix[:, :, None, None], shift)
    return torch.nn.functional.linear(feature, matrix, shift)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features of one width: [batch], or [batch, tokens] where there are tokens."""
    student, teacher = alike(student, teacher)
    if student.shape != teacher.shape:
        what = f"the student's feature is {list(student.shape)}, the teacher's {list(teacher.shape)}"
        raise SpoliaError(what, where="features", mend="fit a regressor between them, as fitnets does")
    apart = (student - teacher).square()
    return apart.mean((1, 2, 3)) if apart.dim() == 4 else apart.mean(-1)


def attention_map(feature: Tensor, power: float = 2.0) -> Tensor:
    """Mean over the channels of |value|^power at every place, divided by its length: [batch, places]."""
    if feature.dim() not in (3, 4):
        what = f"a feature {list(feature.shape)} has no places to attend to"
        raise SpoliaError(what, where="features", mend="name a module that gives [batch, channels, height, width]")
    x = wide(feature)
    rows = x.abs().pow(power).mean(1 if x.dim() == 4 else -1).flatten(1)
    return torch.nn.functional.normalize(rows, dim=1)


def attention_distance(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean over places of the squared difference of both attention maps: [batch]."""
    student, teacher = alike(student, teacher)
    return (attention_map(student, power) - attention_map(teacher, power)).square().mean(1)


def _places(feature: Tensor) -> tuple[int, ...]:
    return tuple(feature.shape[2:] if feature.dim() == 4 else feature.shape[1:-1])


def _shrunk(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else torch.nn.functional.adaptive_avg_pool2d(x, size)

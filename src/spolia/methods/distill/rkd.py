"""RKD, relational distillation: the student keeps the distances and the angles between the teacher's samples.

For embeddings whose width or meaning differs between student and teacher. Park et al., Relational Knowledge Distillation,
CVPR 2019, arXiv 1904.05068.

    L = ce CE(s, y) + distance mean_ij h(d_ij^S, d_ij^T) + angle mean_ijk h(cos_ijk^S, cos_ijk^T)

d is the Euclidean distance over the batch's mean distance, cos_ijk the cosine of the angle at i between j and k, h the Huber
loss that turns linear at 1.

| paper | here |
|---|---|
| psi_D, psi_A | `core.relations.distances`, `cosines`; terms `distance`, `angle` |
| lambda_RKD-D, lambda_RKD-A | `settings.distance`, `angle` |
| l_delta | `core.relations.huber` |

Data touched: inputs, and their labels unless `ce` is 0 or none are given. The loss of sample i is the mean over j, and over j
and k: their mean is the published loss. All leading axes are the batch, samples whose label does not count take no part.
Memory is n^2 (n + d) numbers for n samples of width d. Departure: without sites the logits are related; the paper relates
embeddings, which a module's name gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.relations import cosines, distances, huber
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_TABLES = "mdistiller, CIFAR-100"


class Rkd(Settings):
    """Settings of `rkd`."""

    distance: float = setting(25.0, "weight of the distances", source=_TABLES, ge=0)
    angle: float = setting(50.0, "weight of the angles; 0 leaves their n^3 out", source=_TABLES, ge=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_TABLES, ge=0)
    student_site: str = setting("", "module of the student whose output is related; empty: logits", source="our choice")
    teacher_site: str = setting("", "module of the teacher whose output is related; empty: logits", source="our choice")


def rkd(settings: Rkd | None = None) -> Objective:
    """The objective; its terms are `distance` and `angle`."""
    settings = settings or Rkd()
    if bool(settings.student_site) != bool(settings.teacher_site):
        raise SpoliaError(
            "one of two sites is named", where="rkd", mend="name student_site and teacher_site, or neither"
        )
    taps = ((settings.student_site, settings.teacher_site),) if settings.student_site else ()
    return Objective(lambda seen: _terms(seen, settings), ce=settings.ce, taps=taps)


def _terms(seen: Seen, settings: Rkd) -> dict[str, Tensor]:
    student, teacher = ((out.features or (out.logits,))[0] for out in (seen.student, seen.teacher))
    samples = seen.student.logits.shape[:-1]
    for owner, x in (("student", student), ("teacher", teacher)):
        if x.shape[: len(samples)] != samples:
            what = f"the {owner}'s feature is {list(x.shape)}, logits are of samples {list(samples)}"
            raise SpoliaError(what, where="rkd", mend="name a module that gives one vector a sample")
    terms = {"distance": settings.distance * seen.among(_distances_apart, student, teacher)}
    if settings.angle:
        terms["angle"] = settings.angle * seen.among(_angles_apart, student, teacher)
    return terms


def _distances_apart(student: Tensor, teacher: Tensor) -> Tensor:
    return huber(distances(student), distances(teacher)).mean(1)


def _angles_apart(student: Tensor, teacher: Tensor) -> Tensor:
    return huber(cosines(student), cosines(teacher)).mean((1, 2))

"""LSKD, logit standardisation: both sides' logits are made z-scores before any distillation loss sees them.

For students that cannot reach the scale of their teacher's logits. Sun et al., Logit Standardization in Knowledge
Distillation, CVPR 2024, arXiv 2403.01427.

    z(x) = (x - mean x) / (1e-7 + std x)   for every logit vector;    L = ce CE(s, y) + weight base(z(s), z(t))

The loss does not change when a student's logits are multiplied by a positive number or shifted. No z-score exceeds
(C - 1) / sqrt(C): with few classes the temperature alone decides how sure the student is asked to be.

| paper | here |
|---|---|
| Z(x; tau) | `core.divergence.standardized`, over `settings.temperature` |
| tau | `settings.temperature`, in place of the base's |
| lambda_KD | `settings.weight`, in place of the base's alpha; DKD's beta is multiplied by it |

Data touched: that of the base. Cross-entropy sees the logits as they are, and so do MLKD's Gram terms, as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spolia.core.divergence import standardized
from spolia.core.settings import Settings, setting
from spolia.methods.distill.ctkd import Ctkd, ctkd
from spolia.methods.distill.dkd import Dkd, dkd
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.mlkd import Mlkd, mlkd
from spolia.methods.distill.nested import one_of
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_SUN = "Sun et al. 2024, CIFAR-100"
_Base: Any = one_of({"kd": Kd, "dkd": Dkd, "mlkd": Mlkd, "ctkd": Ctkd})


class Lskd(Settings):
    """Settings of `lskd`."""

    base: _Base = setting("kd", "loss that sees z-scores: kd, dkd, mlkd, ctkd", source=_SUN, validate_default=True)
    temperature: float = setting(
        2.0, "T, by which z-scores are divided; not used by ctkd; published pairs have 2 or 3", source=_SUN, gt=0
    )
    weight: float = setting(9.0, "of the base's terms, in place of its alpha", source=_SUN, ge=0)


def lskd(settings: Lskd | None = None, base: Objective | None = None) -> Objective:
    """The base's objective on z-scores. A `base` of your own keeps its temperature; its terms are multiplied by `weight`."""
    settings = settings or Lskd()
    if base is not None:
        return on_scores(base, settings.weight)
    given, changed = settings.base, {"temperature": settings.temperature, "alpha": settings.weight}
    if isinstance(given, Mlkd):
        return mlkd(given.model_copy(update={**changed, "standardize": True}))
    if isinstance(given, Dkd):
        return on_scores(dkd(given.model_copy(update={**changed, "beta": given.beta * settings.weight})))
    if isinstance(given, Ctkd):
        unweighted = given.model_copy(update={"base": given.base.model_copy(update=_unweighted(given.base))})
        return on_scores(ctkd(unweighted), settings.weight)
    return on_scores(kd(given.model_copy(update=changed)))


def on_scores(base: Objective, weight: float = 1.0) -> Objective:
    """`base`, whose terms see z-scores and are multiplied by `weight`; its cross-entropy sees the logits."""

    def terms(seen: Seen) -> dict[str, Tensor]:
        student, teacher = (out._replace(logits=standardized(out.logits)) for out in (seen.student, seen.teacher))
        return {
            name: weight * term for name, term in base.terms(replace(seen, student=student, teacher=teacher)).items()
        }

    return replace(base, terms=terms)


def _unweighted(base: Settings) -> dict[str, float]:
    return {"alpha": 1.0} if isinstance(base, Kd) else {}

"""The audit of a pool of classifiers before anything is made of them: no data, one pass of noise each.

| level | what | then |
|---|---|---|
| broken | cannot be used: does not run, NaN, width unlike its class list, channels unlike its normalisation | raised |
| suspect | runs, but nothing was ever learned: batch norms as at the start, one answer for all images | stop, drop or keep |
| note | a loss that will be missing: no batch norm statistics; near-uniform answers | told |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import torch
from spolia.errors import Problems, SpoliaError
from spolia.parts.white import White, flatness, noise, statistics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.white import WhitePool

    Found = Callable[["Level", str, str], None]

Level = Literal["broken", "suspect", "note"]
LOOKED_AT = 16  # images of noise
_FLAT = 0.98  # of the largest entropy: fresh heads of 5 outputs lie above it, trained ones far below
_SAME = 1e-6  # of the largest logit: answers nearer than that are one answer


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the expert at `place`."""

    place: int
    expert: str
    level: Level
    what: str
    mend: str


@dataclass(frozen=True)
class Audit:
    """`findings` in the pool's order; `ways` outputs, `norms` batch norms with statistics, and `flat` entropy of each."""

    findings: tuple[Finding, ...]
    ways: tuple[int | None, ...]
    norms: tuple[int, ...]
    flat: tuple[float | None, ...]

    def of(self, *levels: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level in levels]

    @property
    def suspects(self) -> list[int]:
        """Places of experts that nothing was learned by."""
        return sorted({finding.place for finding in self.of("suspect")})

    def raise_if_any(self, *levels: Level) -> None:
        """SpoliaError with every finding of these levels; by default broken and suspect."""
        problems = Problems()
        for finding in self.of(*(levels or ("broken", "suspect"))):
            problems.add(f"expert {finding.expert}", finding.what, finding.mend)
        problems.raise_if_any()


def audited(pool: WhitePool) -> Audit:
    """Every expert looked at, one loaded at a time."""
    findings: list[Finding] = []
    ways: list[int | None] = []
    norms, flat = [], []
    twice = [name for name, count in Counter(expert.name for expert in pool).items() if count > 1]
    for place, expert in enumerate(pool):

        def found(level: Level, what: str, mend: str, place: int = place, expert: White = expert) -> None:
            findings.append(Finding(place, expert.name, level, what, mend))

        if expert.name in twice:
            found("broken", "another expert has its name", "give each a name of its own")
        seen = _looked(expert, found)
        ways.append(None if seen is None else seen[0])
        norms.append(0 if seen is None else seen[1])
        flat.append(None if seen is None else seen[2])
    return Audit(tuple(findings), tuple(ways), tuple(norms), tuple(flat))


def _looked(expert: White, found: Found) -> tuple[int, int, float] | None:
    """Outputs, norms with statistics, and flatness; None where it does not run."""
    channels = expert.shape[0]
    for name, values in (("mean", expert.mean), ("std", expert.std)):
        if len(values) not in (1, channels):
            found("broken", f"{len(values)} values of {name} for {channels} channels", "give one, or one a channel")
            return None
    if min(expert.std) <= 0:
        found("broken", f"std is {min(expert.std):g}", "give numbers above 0, those it was trained with")
        return None
    try:
        module = expert.module()
        with torch.no_grad():
            logits = expert.logits(module, noise(LOOKED_AT, expert.shape))
    except SpoliaError as error:
        for problem in error.problems:
            found("broken", problem.what, problem.mend)
        return None
    except Exception as error:  # whatever a strange module raises
        told = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        mend = "give the shape and channels that it was trained with"
        found("broken", f"cannot take images {list(expert.shape)}: {told}", mend)
        return None
    if logits.dim() != 2:
        found("broken", f"gives {list(logits.shape)} for {LOOKED_AT} images", "give `outputs` that return [n, classes]")
        return None
    layers = _norms(module, found)
    _weights(module, logits, found)
    _head(expert, logits.shape[1], found)
    if bool(torch.isfinite(logits).all()):
        _answers(logits, layers, found)
    return logits.shape[1], layers, flatness(logits.nan_to_num())


def _norms(module: nn.Module, found: Found) -> int:
    layers = statistics(module)
    if not layers:
        mend = "nothing to do; it is inverted by cross-entropy alone, which recovers less"
        found("note", "has no batch norm with running statistics", mend)
    elif all(bool((p.running_mean == 0).all() and (p.running_var == 1).all()) for _, p in layers):  # type: ignore[union-attr]
        found(
            "suspect",
            "was never trained: every batch norm is as at the start",
            "leave it out, or get its weights again",
        )
    return len(layers)


def _weights(module: nn.Module, logits: Tensor, found: Found) -> None:
    bad = [n for n, t in module.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        found("broken", f"`{bad[0]}`{more} holds NaN or Inf", "get a sound copy")
    elif not bool(torch.isfinite(logits).all()):
        found("broken", "answers noise with NaN or Inf", "look at its std, and at running variances near 0")


def _head(expert: White, width: int, found: Found) -> None:
    if width < 2:
        found("broken", f"has {width} output", "give a classifier of two classes at least")
    if expert.classes is None:
        return
    if width != len(expert.classes):
        what = f"its head has {width} outputs for {len(expert.classes)} classes"
        found("broken", what, "give one class an output, in their order; or none")
    again = [name for name, count in Counter(expert.classes).items() if count > 1]
    if again:
        found("broken", f"its class list has `{again[0]}` twice", "give one class an output")


def _answers(logits: Tensor, layers: int, found: Found) -> None:
    spread = float((logits - logits[:1]).abs().max())
    if spread <= _SAME * max(1.0, float(logits.abs().max())):
        found("suspect", "gives every image the same answer", "leave it out, or get its weights again")
    elif not layers and flatness(logits) > _FLAT:
        found("note", "answers noise almost evenly, as an untrained network does", "try it on images of its classes")

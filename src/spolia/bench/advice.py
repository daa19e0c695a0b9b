"""Will these models merge well? Plain words, and a method to begin with, from a pool's portrait alone.

The thresholds are ours: they were set on digits experts with known faults (tests/bench/test_advice.py), FAR between these
and eight image experts whose sum at 0.3 fell below their base (benchmarks/eight_tasks.py). They say where to look, not
what will happen. Nothing is evaluated.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from spolia.parts.portrait import Measured, Portrait

APART = 0.01  # distance over length of two task vectors below which two experts are one
KEPT = 0.5  # share of the base left in an expert's matrices below which it is no fine-tune of it
ALIEN = 0.8  # strangers to the base that are this alike: the base is not theirs
LONG, SHORT = 3.0, 0.1  # times the median length of the other task vectors
FAR = 1 / 3  # root of the summed squares of lengths over the base's, above which a sum may leave what the base can do
ALIKE = 0.6  # mean cosine above which the experts learned much the same
AGAINST = -0.5  # cosine below which two experts undo each other


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. `expert` is empty where it concerns the pool."""

    kind: str  # broken | wrong_base | not_a_fine_tune | untrained | overscaled | weak | copy | opposed | far
    expert: str
    text: str


@dataclass
class Advice:
    """What was found and what to do first. Lists in `settings` follow the experts that are not left out."""

    findings: list[Finding]
    verdict: str
    method: str | None  # None: there is nothing to merge
    settings: dict[str, Any] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)
    use_base: bool = True  # False: not with this base


def advise(portrait: Portrait) -> Advice:
    """Faults of single experts first, then the pool as a whole without them."""
    whole = portrait.total()
    broken = [
        Finding("broken", name, f"{name} holds NaN or Inf, or the base does.")
        for name, norm in zip(portrait.experts, whole.norms, strict=True)
        if not math.isfinite(norm)
    ]
    strangers = _strangers(portrait, whole)
    alien = [f for f in strangers if f.kind == "wrong_base"]
    out = {f.expert for f in (*broken, *strangers)}
    measured = _without(portrait.experts, out)
    lengths = _lengths(portrait, whole, measured) if not alien else []
    copies = _copies(portrait, whole, measured, bool(alien))
    findings = [*broken, *strangers, *lengths, *copies]
    bad = {f.expert for f in findings if f.kind in ("broken", "not_a_fine_tune", "untrained", "copy")}
    sound = _without(portrait.experts, bad)
    leave_out = [name for name in portrait.experts if name in bad]
    if alien:
        return _without_base(findings, leave_out, len(sound))
    findings += _opposed(portrait, whole, sound)
    if len(sound) < 2:
        verdict = "Fewer than two sound, different experts remain: there is nothing to merge."
        return Advice(findings, verdict, None, {}, leave_out)
    scaled = [f.expert for f in findings if f.kind == "overscaled" and f.expert not in bad]
    cosine, conflict = _mean(whole.cosines, sound), _mean(whole.conflict, sound)
    findings += _far(whole, sound, cosine) if not scaled else []
    method, settings, reason = _choose(len(sound), cosine, bool(scaled))
    if scaled:
        settings = {**settings, "weight": _even_weights(whole, sound)}
    said = f"The task vectors of {len(sound)} experts have a mean cosine of {cosine:.2f}"
    if math.isfinite(conflict):
        said += f", and they moved {conflict:.0%} of the elements that two of them changed in opposite directions"
        said += " (50% is chance)"
    verdict = [said + ".", reason]
    verdict += [f"Leave out {', '.join(leave_out)}."] if leave_out else []
    verdict += [f"Give {', '.join(scaled)} a smaller weight."] if scaled else []
    return Advice(findings, " ".join(verdict), method, settings, leave_out)


def _choose(count: int, cosine: float, scaled: bool) -> tuple[str, dict[str, Any], str]:
    """Method, settings and why, for sound experts."""
    if scaled:
        return (
            "task_arithmetic",
            {"scale": round(max(1.0 / count, 0.3), 2)},
            "Their lengths differ widely: add the task vectors with weights that even them out.",
        )
    if cosine >= ALIKE:
        why = (
            "They learned much the same, or all grew from a later model than this base: their average is a safe start."
        )
        return "average", {}, why
    name = "tsv" if count == 2 else "iso_c"
    why = "They learned different things that hardly touch: give each its own directions"
    return name, {}, f"{why} ({name}); task_arithmetic is the cheap alternative."


def _without_base(findings: list[Finding], leave_out: list[str], count: int) -> Advice:
    verdict = (
        "The base given is not the one these experts grew from: find that one, or average them, which needs no base."
    )
    if leave_out:
        verdict += f" Leave out {', '.join(leave_out)}."
    return Advice(findings, verdict, "average" if count > 1 else None, {}, leave_out, use_base=False)


def _without(names: list[str], bad: set[str]) -> list[int]:
    return [i for i, name in enumerate(names) if name not in bad]


def _mean(matrix: list[list[float]], sound: list[int]) -> float:
    """Mean over pairs; those that are nan do not count."""
    found = [matrix[a][b] for a in sound for b in sound if a < b and math.isfinite(matrix[a][b])]
    return statistics.fmean(found) if found else math.nan


def _even_weights(whole: Measured, sound: list[int]) -> list[float]:
    """Factors that cut every sound task vector to the median length of the others, where it is much longer."""
    norms, weights = whole.norms, []
    for i in sound:
        middle = statistics.median(norms[j] for j in sound if j != i)
        weights.append(round(middle / norms[i], 4) if norms[i] > LONG * middle else 1.0)
    return weights


def _strangers(portrait: Portrait, whole: Measured) -> list[Finding]:
    """Models that did not grow from this base. Fine-tuning moves matrices away from the base but keeps it; weights drawn
    anew have nothing in common with it. Vectors say little: norms and biases start alike in every model."""
    judged = portrait.total(portrait.matrices) if portrait.matrices else whole
    kept = judged.kept
    far = [i for i, share in enumerate(kept) if share < KEPT]
    cosines = whole.cosines
    if len(far) == len(portrait.experts) > 1 and all(cosines[a][b] > ALIEN for a in far for b in range(a)):
        return [
            Finding(
                "wrong_base", "", "All experts differ from the base in the same way: it is not the one they grew from."
            )
        ]
    found = []
    for i in far:
        name = portrait.experts[i]
        text = f"{name} is no fine-tune of this base: {max(0.0, kept[i]):.0%} of the base is left in its matrices."
        found.append(Finding("not_a_fine_tune", name, text))
    return found


def _lengths(portrait: Portrait, whole: Measured, measured: list[int]) -> list[Finding]:
    """Experts that moved not at all, much farther or much less than the others."""
    norms, found = whole.norms, []
    for i in measured:
        name, norm = portrait.experts[i], norms[i]
        others = [norms[j] for j in measured if j != i and norms[j] > 0]
        if norm == 0:
            found.append(Finding("untrained", name, f"{name} equals the base: it learned nothing."))
        elif others and norm > LONG * statistics.median(others):
            times = norm / statistics.median(others)
            text = f"{name} moved {times:.1f} times as far as the others: it was over-scaled or trained much longer."
            found.append(Finding("overscaled", name, text))
        elif others and norm < SHORT * statistics.median(others):
            share = norm / statistics.median(others)
            text = f"{name} moved only {share:.1%} as far as the others: a merge hardly notices it."
            found.append(Finding("weak", name, text))
    return found


def _copies(portrait: Portrait, whole: Measured, measured: list[int], alien: bool) -> list[Finding]:
    """Experts that repeat another one, at its length or a multiple of it; the longer of the two is named then.

    Far from a wrong base all experts point the same way, so there only equal ones count.
    """
    found: dict[str, Finding] = {}
    norms, gram = whole.norms, whole.gram.tolist()
    for at, b in enumerate(measured):
        for a in measured[:at]:
            short, long = (a, b) if norms[a] <= norms[b] else (b, a)
            if norms[short] == 0 or portrait.experts[a] in found or portrait.experts[b] in found:
                continue
            apart = math.sqrt(max(0.0, gram[a][a] + gram[b][b] - 2 * gram[a][b])) / norms[long]
            factor = norms[long] / norms[short]
            sine = math.sqrt(max(0.0, 1 - whole.cosines[a][b] ** 2)) if whole.cosines[a][b] > 0 else 1.0
            one, other = portrait.experts[b], portrait.experts[a]
            if apart <= (1e-6 if alien else APART):
                found[one] = Finding("copy", one, f"{one} is a copy of {other}: it would count twice.")
            elif sine <= APART and not alien:
                one, other = portrait.experts[long], portrait.experts[short]
                text = f"{one} is {other} with its change made {factor:.3g} times as long: it would count twice."
                found[one] = Finding("copy", one, text)
    return list(found.values())


def _opposed(portrait: Portrait, whole: Measured, sound: list[int]) -> list[Finding]:
    """Pairs that a sum would cancel."""
    found, names = [], portrait.experts
    for b in sound:
        for a in sound:
            if a < b and whole.cosines[a][b] < AGAINST:
                text = (
                    f"{names[a]} and {names[b]} undo each other (cosine {whole.cosines[a][b]:.2f}): merge one of them."
                )
                found.append(Finding("opposed", names[b], text))
    return found


def _far(whole: Measured, sound: list[int], cosine: float) -> list[Finding]:
    """Experts that went far, each its own way."""
    together = math.sqrt(sum(whole.relative[i] ** 2 for i in sound))
    if not together > FAR or cosine >= ALIKE:
        return []
    text = (
        f"Together the experts leave the base by {together:.0%} of its length, each in its own direction: a sum may fall below"
        " the base. Choose its scale on validation data, or learn it by the experts' answers (adamerging, objective: expert)."
    )
    return [Finding("far", "", text)]

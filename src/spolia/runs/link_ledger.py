"""What a run of a link leaves behind: results.json and the sentence of summary.txt. Seeds are pooled frame by frame."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from spolia.bench.link import EXACT, READS, Point, has_bleu, rows
from spolia.runs.link_problems import LinkProblem
from spolia.runs.link_schemes import schemes_of
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

Found = list[dict[str, Any]]
"""Points and facts of each seed."""


def pooled(recipe: StudyRecipe, found: Found) -> dict[str, list[Point]]:
    """Of every line its points by level, the frames of all seeds together."""
    made: dict[str, list[Point]] = {}
    for scheme in schemes_of(recipe):
        for db in recipe.problem.snr:
            own = [p for one in found for p in one["points"] if (p["label"], p["snr"]) == (scheme.label, db)]
            counts: dict[str, list[Any]] = {}
            for point in own:
                for name, values in point["counts"].items():
                    counts[name] = counts.get(name, []) + values
            if counts:
                made.setdefault(scheme.label, []).append(Point(scheme.label, db, counts))
    return made


def level(problem: LinkProblem, db: float) -> str:
    """A level of noise as the tables call it."""
    return f"{db:g} dB" if problem.convention == "esn0" else f"{db:g} dB {problem.convention}"


def ledger(run: RunFolder, recipe: StudyRecipe, found: Found, data: dict[str, str]) -> dict[str, Any]:
    """results.json."""
    points = pooled(recipe, found)
    beside = {scheme.label for scheme in schemes_of(recipe) if scheme.baseline}
    kinds = {scheme.label: scheme.kind for scheme in schemes_of(recipe)}
    made = []
    for own in points.values():
        for row in rows(own, beside):
            if row["metric"] == READS and kinds[row["method"]] == "no_model":
                continue  # a uniform model is none
            made.append(row | {"task": level(recipe.problem, float(row["task"].removesuffix(" dB")))})
    for label, uses in found[0]["uses"].items():
        row = {"method": label, "task": "all levels", "metric": "channel uses a character", "unit": "", "mean": uses}
        made.append(
            row | {"low": None, "high": None, "n": len(found)} | ({"baseline": True} if label in beside else {})
        )
    return run.ledger(
        recipe.name,
        data=data,
        seeds=recipe.every_seed[: len(found)],
        rows=made,
        notes=notes(recipe, found),
        average=False,  # of noise levels
    )


def notes(recipe: StudyRecipe, found: Found) -> str:
    """What the numbers mean, and what they leave out."""
    problem: LinkProblem = recipe.problem
    first, entropy = found[0], fmean(one["entropy"] for one in found)
    rates = first["rates"]
    lines = [
        f"Levels count {problem.convention}; in Es/N0 they are {', '.join(f'{db:.2f}' for db in first['esn0'])} dB.",
        f"A token has {first['width']} bits on the air and {entropy:.2f} bits of entropy under the receiver's model, at"
        f" {rates['symbols_per_char']:.2f} channel uses a character.",
        "All schemes but those with their own rate (see `channel uses a character`) take as many uses, and all receivers"
        " are told how many tokens a frame has.",
        f"A point ends after {problem.errors} wrong frames, or all frames; seeds are pooled. Intervals are 95 %:"
        " Wilson's for frames, by resampling frames for the rest.",
        "Bit and symbol errors are those of the labels of decided tokens.",
        "`reads`: hypotheses that the receiver's model reads on for each token, over all levels together; separate"
        " coding's transmitter reads as many again.",
    ]
    if any(scheme.kind in ("separate", "source") for scheme in schemes_of(recipe)):
        lines.append(
            "A text whose code does not fit its frame is lost, whatever the noise: separate coding and source codes."
        )
    limits = [one["limit"] for one in found if one["limit"] is not None]
    if limits:
        lines.append(f"No code sends that entropy in so many uses below {fmean(limits):.2f} dB Es/N0.")
    if not has_bleu():
        lines.append("BLEU was not measured: pip install 'spolia[text]' brings sacrebleu.")
    return " ".join(lines)


def summary(recipe: StudyRecipe, found: Found) -> str:
    """One sentence: at the level where the recipe's own scheme tells most."""
    points, own = pooled(recipe, found), schemes_of(recipe)[-1].label
    at = telling(points[own])
    point = points[own][at]
    seen = point.measure(EXACT)
    others = [f"{label} {100 * other[at].measure(EXACT).mean:.1f} %" for label, other in points.items() if label != own]
    said = (
        f"At {level(recipe.problem, point.esn0_db)}, {own} reads {100 * seen.mean:.1f} % of {point.frames} frames exactly"
        f" [{100 * (seen.low or 0):.1f}, {100 * (seen.high or 0):.1f}]"
    )
    if others:
        said += f"; {', '.join(others)}"
    if READS in point.metrics:
        said += f". Its model reads {point.measure(READS).mean:.1f} hypotheses a token"
    return said + "."


def telling(points: list[Point]) -> int:
    """The level at which nearest to half of the frames are right."""
    shares = [abs(point.measure(EXACT).mean - 0.5) for point in points]
    return shares.index(min(shares))

"""Figures of a run of a link: error curves beside their bounds, the constellation, sentences as they were read."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from spolia.bench.link import BIT, FRAME, TOKEN, Point
from spolia.runs.link_ledger import Found, level, pooled, telling
from spolia.runs.link_schemes import schemes_of
from spolia.runs.studies import StudyRecipe

_CURVES = {
    FRAME: ("Frames that are not exact", "best separate code"),
    TOKEN: ("Wrong tokens", "no model, closed form"),
    BIT: ("Wrong bits of labels", "no model, closed form"),
}
_SENTENCES = 3


def figures(recipe: StudyRecipe, found: Found) -> list[dict[str, Any]]:
    """figures.json."""
    points = pooled(recipe, found)
    made = [_curve(recipe, found, points, metric) for metric in _CURVES]
    if any("bleu-4" in own[0].metrics for own in points.values()):
        made.append(_plain(recipe, points, "bleu-4", "BLEU-4", "%"))
    made.append(_constellation(found[0]["constellation"]))
    return [*made, *_sentences(recipe, points)]


def _curve(recipe: StudyRecipe, found: Found, points: dict[str, list[Point]], metric: str) -> dict[str, Any]:
    """Errors against noise, on a logarithmic scale; a point without an error has no place there."""
    title, bound = _CURVES[metric]
    series = []
    for label, own in points.items():
        seen = [(p.esn0_db, p.measure(metric)) for p in own if metric in p.metrics]
        seen = [(db, one) for db, one in seen if one.mean > 0]
        if seen:
            low, high = ([getattr(one, end) for _, one in seen] for end in ("low", "high"))
            series.append({"name": label, "x": [db for db, _ in seen], "y": [one.mean for _, one in seen]})
            series[-1] |= {"low": low, "high": high}
    known = [one["bounds"][metric] for one in found if metric in one["bounds"]]
    if known:
        mean = [fmean(values) for values in zip(*known, strict=True)]
        pairs = [(db, y) for db, y in zip(recipe.problem.snr, mean, strict=True) if y > 1e-6]
        if pairs:
            series.append({"name": bound, "x": [x for x, _ in pairs], "y": [y for _, y in pairs]})
    told = "Bands are 95 % intervals; points without an error are left out, their upper ends stand in the table."
    if metric == FRAME and known:
        told += " The bound is the normal approximation for a code of as many uses that carries the model's bits."
    axes = {"x_label": _axis(recipe), "y_label": metric, "log": True}
    return {"kind": "lines", "title": title, "caption": told, **axes, "series": series or [_nothing()]}


def _plain(recipe: StudyRecipe, points: dict[str, list[Point]], metric: str, title: str, unit: str) -> dict[str, Any]:
    series = [
        {"name": label, "x": [p.esn0_db for p in own], "y": [p.measure(metric).mean for p in own]}
        for label, own in points.items()
    ]
    axes = {"x_label": _axis(recipe), "y_label": metric, "unit": unit}
    return {"kind": "lines", "title": title, "caption": "Of whole frames, by sacrebleu.", **axes, "series": series}


def _axis(recipe: StudyRecipe) -> str:
    return "Es/N0 (dB)" if recipe.problem.convention == "esn0" else f"{recipe.problem.convention} (dB)"


def _nothing() -> dict[str, Any]:
    return {"name": "no errors", "x": [], "y": []}


def _constellation(seen: dict[str, Any]) -> dict[str, Any]:
    series = [{"name": name, "x": seen[name][0], "y": seen[name][1]} for name in ("received", "sent")]
    return {
        "kind": "points",
        "title": "Constellation",
        "caption": f"Symbols at {seen['esn0']:.1f} dB Es/N0, after the gain that the receiver knows is undone.",
        "x_label": "in phase",
        "y_label": "quadrature",
        "series": series,
    }


def _sentences(recipe: StudyRecipe, points: dict[str, list[Point]]) -> list[dict[str, Any]]:
    """The first frames as every receiver reads them, at the level that tells most."""
    own = schemes_of(recipe)[-1].label
    at = telling(points[own])
    sent = points[own][at].counts["sent"][:_SENTENCES]
    made = []
    for i, text in enumerate(sent):
        read = {label: other[at].counts["text"][i] for label, other in points.items()}
        names = [f"{label}: {'right' if one == text else 'wrong'}" for label, one in read.items()]
        made.append(
            {
                "kind": "texts",
                "title": f"Frame {i + 1} at {level(recipe.problem, points[own][at].esn0_db)}",
                "caption": "What was sent, and what each receiver reads.",
                "rows": ["sent", *names],
                "texts": [text, *read.values()],
            }
        )
    return made

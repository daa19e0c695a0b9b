"""What a study of surgery on digits leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import Share, ledger_rows, t_interval
from spolia.catalog import find
from spolia.data.digits import SIZES
from spolia.runs.digits_ledger import EXPERTS, METRIC
from spolia.runs.digits_pool import DATA_TOUCHED
from spolia.runs.measuring import Measured
from spolia.runs.preprocessing import chained
from spolia.runs.recipe import Recipe
from spolia.runs.schema import DigitsPool
from spolia.runs.store import RunFolder
from spolia.runs.surgery_merge import merge_of

if TYPE_CHECKING:
    from spolia.methods.surgery.fitting import SurgerySettings

MERGED, ROUTED = "merged", ", task routed"


def labels(recipe: Recipe) -> tuple[str, str]:
    """What the merge and its repair are called."""
    if recipe.surgery is None:
        return MERGED, recipe.method.name
    merged = chained(recipe.preprocess, recipe.method.name)
    return merged, f"{merged} + {recipe.surgery[0].name}"


def sees(merge: str) -> str:
    """What the merge looks at."""
    inputs = f"{SIZES['validation']} validation digits of each domain, without labels"
    return inputs if find(merge).data else "weights only"


def seen(settings: SurgerySettings) -> str:
    """What the repairs look at."""
    if settings.protocol == "transductive":
        return f"the {SIZES['test']} test digits of each domain, without labels"
    return f"{SIZES['validation']} validation digits of each domain, without labels"


def ledger(run: RunFolder, recipe: Recipe, found: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json."""
    scores = {
        label: [{task: Share(*counts) for task, counts in one["scores"][label].items()} for one in found]
        for label in found[0]["scores"]
    }
    merged, own = labels(recipe)
    beside = set(scores) - {own, own + ROUTED} - ({merged} if recipe.surgery is not None else set())
    tested = "that nothing before had seen" if recipe.repair[1].protocol == "held_out" else "that surgery has seen too"
    return run.ledger(
        recipe.name,
        data=DATA_TOUCHED
        | {"merge": sees(merge_of(recipe)[0]), "surgery": seen(recipe.repair[1])}
        | {"test": f"{SIZES['test']} digits {tested}"},
        seeds=list(range(recipe.seed, recipe.seed + len(found))),
        rows=ledger_rows(scores, metric=METRIC, baselines=beside, against=merged),
        notes=_notes(recipe, found),
    )


def of_merge(run: RunFolder, recipe: Recipe, first: dict[str, Any]) -> Measured:
    """What the first seed found, for the card of its merge, which is called by its name there."""
    told, name = ledger(run, recipe, [first]), chained(recipe.preprocess, merge_of(recipe)[0])
    rows = [row | {"method": name} if row["method"] == labels(recipe)[0] else row for row in told["rows"]]
    return Measured(told | {"rows": rows}, name)


def _notes(recipe: Recipe, found: list[dict[str, Any]]) -> str:
    spread = "Student's over seeds" if len(found) > 1 else "Wilson's over test images of one seed"
    count = found[0]["facts"]["parameters"]
    merge = chained(recipe.preprocess, merge_of(recipe)[0])
    return (
        f"The merge is {merge}; every repair stands on it. {recipe.repair[0].name} adds {count:,} numbers"
        f" for all tasks together. Intervals are 95 %, {spread}. Where the task is routed, each input goes to the task whose"
        " expert's mean feature is nearest."
    )


def figures(recipe: Recipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: bias at every site, features in a plane, and accuracy along a stream."""
    return [_bias(found), *_plane(found), *_stream(recipe, found)]


def _bias(found: list[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]["bias"]
    sites = max(([row["site"] for row in next(iter(tasks.values()))] for tasks in first.values()), key=len)

    def mean(label: str, site: str, key: str) -> float | None:
        rows = [row for one in found for rows in one["bias"][label].values() for row in rows if row["site"] == site]
        return 100 * fmean(row[key] for row in rows) if rows else None

    whole = next(label for label, tasks in first.items() if len(next(iter(tasks.values()))) == len(sites))
    merged = {"name": MERGED, "values": [mean(whole, site, "relative_before") for site in sites], "baseline": True}
    after = [{"name": label, "values": [mean(label, site, "relative_after") for site in sites]} for label in first]
    return {
        "kind": "bars",
        "title": "Bias of the states, by site",
        "caption": "Mean absolute difference from the expert's states over their mean absolute size, on test images;"
        " means over tasks and seeds. Surgery repairs the last site alone.",
        "y_label": "relative bias",
        "unit": "%",
        "groups": sites,
        "series": [merged, *after],
    }


def _plane(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    points = found[0]["points"]
    if not points:
        return []
    return [
        {
            "kind": "points",
            "title": f"Final features of {points['task']} digits",
            "caption": "Test images of the first seed, in the plane in which the expert's features vary most. A repair is"
            " good where its points lie on the expert's.",
            "x_label": "first component",
            "y_label": "second component",
            "series": points["series"],
        }
    ]


def _stream(recipe: Recipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    streams = [one["facts"].get("stream") for one in found]
    if not all(streams):
        return []
    series = []
    for task in streams[0]:
        looks = [stream[task] for stream in streams]
        points = [t_interval([look[i]["accuracy"] for look in looks]).mean for i in range(len(looks[0]))]
        series.append({"name": task, "x": [100 * look["share"] for look in looks[0]], "y": points})
    return [
        {
            "kind": "lines",
            "title": "Accuracy along the stream",
            "caption": f"{recipe.repair[0].name} sees every input once; test images are counted on the way.",
            "x_label": "inputs seen (%)",
            "y_label": "accuracy",
            "unit": "%",
            "series": series,
        }
    ]


def summary(recipe: Recipe, ledger: dict[str, Any]) -> str:
    """One sentence."""
    assert isinstance(recipe.pool, DigitsPool)
    domains = recipe.pool.domains
    last = "average" if len(domains) > 1 else domains[0]
    rows = {row["method"]: row for row in ledger["rows"] if row["task"] == last}

    def shown(label: str) -> str:
        return f"{rows[label]['mean']:.1f} % [{rows[label]['low']:.1f}, {rows[label]['high']:.1f}]"

    merged, own = labels(recipe)
    count = f"{len(ledger['seeds'])} seeds" if len(ledger["seeds"]) > 1 else "one seed"
    return (
        f"Over {count}, {recipe.repair[0].name} brings a merge of {len(domains)} experts from {shown(merged)} to"
        f" {shown(own)}, where the experts, each on its own task, have {shown(EXPERTS)}."
    )

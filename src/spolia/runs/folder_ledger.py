"""What a study over folders leaves behind: results.json, figures.json, the sentence of summary.txt and the model's card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.bench import language, multitask
from spolia.bench.multitask import AVERAGE, Share
from spolia.catalog import Method, find
from spolia.runs.digits_ledger import BASE, EXPERTS, METRIC
from spolia.runs.preprocessing import chained
from spolia.runs.schema import DataPart, FoldersPool
from spolia.runs.surgery_merge import merge_of

if TYPE_CHECKING:
    from spolia.runs.folder_merge import Study
    from spolia.runs.recipe import Recipe
    from spolia.runs.store import RunFolder

    Count = Callable[[DataPart | None], int | str]

_MOST_POINTS = 400  # of a line of coefficients


def labels_of(recipe: Recipe) -> tuple[str, str]:
    """What the merge and its repair are called."""
    merge = chained(recipe.preprocess, merge_of(recipe)[0])
    return merge, f"{merge} + {recipe.repair[0].name}"


def sees(pool: FoldersPool, method: Method, count: Count) -> str:
    """What the merge looks at."""
    if not method.data:
        return "weights only: no training data, no inputs, no labels"
    given = ", ".join(f"{name}: {count(task.unlabelled)} inputs" for name, task in pool.tasks.items())
    return f"weights, and {method.data}; {given}"


def seen(pool: FoldersPool, settings: Any, count: Count) -> str:
    """What a repair looks at."""
    part = "test" if settings.protocol == "transductive" else "unlabelled"
    given = ", ".join(f"{name}: {count(getattr(task, part))} inputs" for name, task in pool.tasks.items())
    return f"{'the inputs of the test, ' if part == 'test' else ''}without labels; {given}"


def ledger(
    study: Study,
    run: RunFolder,
    scores: Mapping[str, Mapping[str, list[Any]]],
    facts: Mapping[str, Any],
    repaired: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """results.json."""
    recipe = study.recipe
    merged, own = labels_of(recipe)
    beside = set(scores) - {merged, own}
    return run.ledger(
        recipe.name,
        data=data_touched(study, facts, repaired),
        seeds=[recipe.seed],
        rows=rows_of(scores, beside, study.language, AVERAGE if merged != AVERAGE or not study.language else None),
        notes=_notes(study, facts),
    )


def rows_of(
    scores: Mapping[str, Mapping[str, list[Any]]], beside: set[str], is_language: bool, against: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the ledger from counts: accuracy, or perplexity of language models."""
    if is_language:
        likely = {k: [{t: language.Likelihood(*one) for t, one in v.items()}] for k, v in scores.items()}
        return language.ledger_rows(likely, baselines=beside, against=against)
    shares = {k: [{t: Share(*one) for t, one in v.items()}] for k, v in scores.items()}
    return multitask.ledger_rows(shares, metric=METRIC, baselines=beside, against=against)


def data_touched(study: Study, facts: Mapping[str, Any], repaired: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each phase saw, as counted when it ran."""
    method = find(merge_of(study.recipe)[0])
    given = ", ".join(f"{name}: {len(examples)} inputs" for name, examples in study.unlabelled.items())
    labels = "with" if facts.get("labels used") else "without"
    found = {"merge": f"weights, and inputs {labels} labels ({given})" if method.data else "weights only"}
    shared: dict[str, int] = {}
    for told, key in ((facts, "adapted on too"), *((one, "fitted to too") for one in repaired.values())):
        for task, one in (told.get("tested on") or {}).items():
            shared[task] = max(shared.get(task, 0), one[key])
    if repaired:
        found["surgery"] = f"inputs without labels ({given})"
    if study.test:
        tested = ", ".join(
            f"{name}: {len(examples)} inputs" + (f", {shared[name]} of them adapted on" if shared.get(name) else "")
            for name, examples in study.test.items()
        )
        found["test"] = tested + ("" if any(shared.values()) or not shared else "; none of them adapted on")
    return found


def _notes(study: Study, facts: Mapping[str, Any]) -> str:
    heads = study.opened.network.heads
    lines = [
        "Heads are each expert's own and were not merged." if heads else "Nothing was left out of the merge.",
        "Intervals are 95 %, Wilson's over test inputs." if not study.language else "Perplexity is per token.",
    ]
    return " ".join([*lines, *facts.get("warnings", [])])


def figures(
    run: RunFolder, facts: Mapping[str, Any], repaired: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """figures.json: coefficients along the network, agreement over steps, bias at the sites."""
    drawn: list[dict[str, Any]] = []
    kept = run.read_json("result/coefficients.json")
    if kept:
        values = list(kept["tensors"].values())[:_MOST_POINTS]
        places = list(range(len(values)))
        series = [{"name": e, "x": places, "y": [v[k] for v in values]} for k, e in enumerate(kept["experts"])]
        caption = "One point a tensor, in the model's order: what each expert's change is multiplied by."
        drawn.append(_lines("Coefficients", caption, "tensor", "coefficient", series))
    history = [seen for seen in facts.get("history", []) if "agreement" in seen]
    if len(history) > 1:
        steps = [seen["step"] for seen in history]
        series = [{"name": key, "x": steps, "y": [seen[key] for seen in history]} for key in ("agreement", "entropy")]
        caption = "On inputs kept apart: how often the merge says what the task's expert says, and the entropy in nats."
        drawn.append(_lines("Agreement with the experts", caption, "step", "", series))
    for label, told in repaired.items():
        tasks = told["bias"]
        sites = [row["site"] for row in next(iter(tasks.values()))]
        bars = [
            {"name": name, "values": _means(tasks, key, len(sites)), "baseline": name == "merged"}
            for name, key in (("merged", "relative_before"), (label, "relative_after"))
        ]
        drawn.append(
            {
                "kind": "bars",
                "title": "Bias of the states, by site",
                "caption": "Mean absolute difference from the expert's states over their mean absolute size, on the inputs"
                " that were fitted to; mean over tasks.",
                "y_label": "relative bias",
                "unit": "%",
                "groups": sites,
                "series": bars,
            }
        )
    return drawn


def _means(tasks: Mapping[str, Any], key: str, count: int) -> list[float]:
    """Per cent at every site."""
    return [100 * fmean(rows[i][key] for rows in tasks.values()) for i in range(count)]


def _lines(title: str, caption: str, x: str, y: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "lines", "title": title, "caption": caption, "x_label": x, "y_label": y, "series": series}


def summary(study: Study, ledger: Mapping[str, Any] | None) -> str:
    """One sentence."""
    merged, own = labels_of(study.recipe)
    names = ", ".join(entry.name for entry in study.pool.experts)
    if ledger is None:
        return f"{merged} of {names} stands in result/; nothing was evaluated."
    last = AVERAGE if len(study.test) > 1 else next(iter(study.test))
    rows = {row["method"]: row for row in ledger["rows"] if row["task"] == last}

    def shown(label: str) -> str:
        row = rows[label]
        interval = "" if row["low"] is None else f" [{row['low']:.1f}, {row['high']:.1f}]"
        return f"{row['mean']:.1f}{' %' if row['unit'] else ''}{interval}"

    final = own if own in rows else merged
    if final not in rows:
        return f"{merged} of {names} stands in result/; it is being evaluated."
    on = f"on {len(study.test)} tasks" if len(study.test) > 1 else f"on {last}"
    told = f"{final} reaches {shown(final)} {on} with one model" + (" of perplexity" if study.language else "")
    told += f", {merged} alone {shown(merged)}" if final != merged and merged in rows else ""
    start = f"the base has {shown(BASE)} and " if BASE in rows else ""
    return f"{told}, where {start}the experts, each on its own task, have {shown(EXPERTS)}."


def card(study: Study, facts: Mapping[str, Any], ledger: Mapping[str, Any] | None) -> str:
    """README.md of the merged model, with its numbers where there are any."""
    from spolia.runs.verbs import rendered

    told = dict(facts)
    if study.opened.network.heads:
        told["warnings"] = [
            *facts.get("warnings", []),
            "The folder holds the encoder; the heads of the tasks stand in heads/, each with its config.",
        ]
    if ledger is not None:
        merged, _ = labels_of(study.recipe)
        told |= {"results": ledger, "method": merged, "data": ledger["data"]}
        told["limits"] = ["Measured on what is listed above only: a merge can be worse elsewhere than its experts."]
    elif not find(merge_of(study.recipe)[0]).data:
        told["data"] = {"merge": "weights only: no training data, no inputs, no labels"}
    return rendered(told)

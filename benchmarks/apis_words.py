"""What apis.py says beside the numbers: notes of a ledger, and pictures of accuracy against queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import apis_rows
from apis_rows import SHOTS, Job, Row

from spolia.bench.continual_ledger import value_of
from spolia.bench.multitask import t_interval
from spolia.reports.figures import read_figure
from spolia.reports.plots import draw, standalone
from spolia.runs.apis_entries import DATA_FEW
from spolia.runs.apis_ledger import MEANINGS
from spolia.runs.apis_rounds import rounds_of


def notes(row: Row, recipe: Any, kept: Sequence[Mapping[str, Any]]) -> str:
    problem, settings = recipe.problem, recipe.settings
    kinds = [problem.experts[place % len(problem.experts)] for place in range(problem.count)]
    reached = ", ".join(f"{kind} {fmean(one['experts'][t] for one in kept):.1f}" for t, kind in enumerate(kinds))
    inputs = "all images of the file" if problem.most is None else f"the first {problem.most:,} images of each part"
    budgets = ", ".join(
        f"{apis_rows.told(budget)}: {rounds_of(problem.model_copy(update={'budget': budget}), settings)[0]} rounds"
        for budget in row.budgets()
    )
    each = rounds_of(problem, settings)[2]
    convolving = problem.questions == "images"
    queries = (
        f"convolve with {problem.questions_width} channels"
        if convolving
        else f"have two hidden layers of {problem.questions_width}"
    )
    looked = "; networks and generators of this stream after a look at seed 0's test" if convolving else ""
    changed = [f"{n} {v}" for n, v in settings.model_dump().items() if v != type(settings).model_fields[n].default]
    lines = [
        f"{problem.count} APIs of two classes, served over HTTP on loopback: {reached} per cent of their own test"
        f" (means over seeds; width {problem.expert_width}, {problem.expert_epochs:g} readings). {inputs.capitalize()}"
        + (f", at {problem.size} pixels." if problem.size else "."),
        f"The model is an {problem.network} of width {problem.width}, the generators"
        f" {queries}. The number behind a learner is what each API may be asked: {budgets} of {each:,} items."
        " An item is one input. Settings are the method's defaults"
        + (f" but {', '.join(changed)}." if changed else "."),
        " ".join(f"`{label}`: {what}." for label, what in MEANINGS.items())
        + f" `{DATA_FEW}` and `the few alone` have {SHOTS} real images of each class.",
        f"Cost is an estimate at {problem.price:g} {problem.currency} for 1,000 items, an assumed price. Queries of the"
        " router are those of the test.",
        *(["The plain estimator is measured at the middle budget alone."] if row.plain != apis_rows.FACTORS else []),
        "Intervals are Student's over seeds, differences seed by seed. Networks, images and budgets are cut to two cores;"
        " the paper's tables have larger ones and do not compare. Settings were chosen on the train part of MNIST, seed 0"
        f"{looked}.",
        "Querying a model to learn another from it may break the terms it is offered under.",
    ]
    return " ".join(lines)


def curve(row: Row, every: Sequence[Job], found: Mapping[str, Sequence[Any]], rule: str, file: Path) -> None:
    """Accuracy against items that an API was asked; what asks nothing is a level."""
    budgets = [budget for budget in row.budgets() if any(job.budget == budget for job in every)]
    series = []
    for line in dict.fromkeys(job.line for job in every):
        at = {
            job.budget: t_interval([value_of(one, rule) for one in found[job.label]])
            for job in every
            if job.line == line
        }  # type: ignore[misc]
        level = at.get(None)
        xs = [budget for budget in budgets if level or budget in at]
        points = [level or at[x] for x in xs]
        series.append({"name": line, "x": [x / 1000 for x in xs], "y": [point.mean for point in points]})
        if not level and all(point.low is not None for point in points):
            series[-1] |= {end: [min(100.0, max(0.0, getattr(p, end))) for p in points] for end in ("low", "high")}
    axes = {"x_label": "thousand items an API", "y_label": rule, "unit": "%"}
    figure = read_figure({"kind": "lines", "title": f"{row.name}: {rule} against queries", **axes, "series": series})
    file.write_text(standalone(draw(figure, file.stem)), encoding="utf-8", newline="\n")

"""What repairing the plain average needs: how the closed form of `deep` fares with fewer images and with wider bottlenecks.

Agreement with the task's own expert is counted on the images that a repair was fitted on and on test images: what is missing
on the first the repair cannot give, what is missing on the second only, more images would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from eight_tasks_pool import TASKS, EightTasks
from eight_tasks_rows import HELD, TEST, number_row
from torch import Tensor

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.parts.examples import Examples
from spolia.runs.store import write_json

REPAIRS: tuple[tuple[int, dict[str, Any]], ...] = (
    (125, {}), (250, {}), (500, {}), (500, {"rank": 64}), (500, {"rank": 192}),
)  # fmt: skip
_AT_ONCE = 250


def agreement(pool: EightTasks, merged: dict[str, Tensor], say: Callable[[str], None]) -> dict[str, list[float]]:
    """By repair: % of the expert's answers on the images it was fitted on, and on test images, means over tasks."""
    file = pool.work / f"scores-images-{pool.strength}-{pool.seed}.json"
    found: dict[str, list[float]] = json.loads(file.read_text()) if file.is_file() else {}
    experts = {task: read_tensors(folder) for task, folder in pool.experts.items()}
    for count, settings in REPAIRS:
        label = f"{count} images a task" + "".join(f", {name} {value}" for name, value in settings.items())
        if label in found:
            continue
        shown = {(task, TEST): pool.part(task, TEST).x for task in TASKS}
        shown |= {(task, HELD): pool.part(task, HELD).x[:count] for task in TASKS}
        model = spolia.surgery(
            merged,
            experts,
            network=pool.network,
            unlabelled={task: Examples(shown[task, HELD], name=task) for task in TASKS},
            method="deep",
            settings={"solver": "closed_form"} | settings,
            seed=pool.seed,
        )
        each: dict[str, list[float]] = {HELD: [], TEST: []}
        for (task, part), x in shown.items():
            expert = pool.encoder(experts[task]).eval()
            theirs = _answers(lambda x, task=task, expert=expert: pool.heads[task](pool.outputs(expert, x)), x)
            ours = _answers(lambda x, task=task, model=model: model(x, task), x)
            each[part].append(100 * float((ours == theirs).float().mean()))
        found[label] = [sum(values) / len(values) for values in each.values()]
        write_json(file, found)
        say(
            f"seed {pool.seed}: {label}, {found[label][0]:.1f} % as the expert where fitted, {found[label][1]:.1f} % on test"
        )
    return found


def image_rows(found: list[dict[str, list[float]]]) -> list[dict[str, Any]]:
    metrics = ("agreement where fitted", "agreement on test images")
    return [
        number_row("average + deep, closed form", label, metric, "%", [one[label][place] for one in found])
        for label in found[0]
        for place, metric in enumerate(metrics)
    ]


@torch.no_grad()
def _answers(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([logits(some).argmax(1).cpu() for some in x.split(_AT_ONCE)])

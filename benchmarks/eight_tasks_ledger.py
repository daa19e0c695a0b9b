"""The ledgers of eight_tasks.py: rows, what data each phase touched, and what a reader must know."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import measure
from eight_tasks_pool import TASKS, EightTasks, Recipe
from eight_tasks_training import PRETRAINED_ON

from spolia.data.images import SHARES
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text

PACKAGES = ["spolia", "torch", "numpy", "safetensors", "pillow"]


def write_ledger(
    kind: str, rows: list[dict[str, Any]], found: list[Any], pools: list[EightTasks], command: str, folder: Path
) -> None:
    """Writes eight_tasks_NET[_KIND].json into `folder` and prints its accuracies. `found`: Judged, one a pool."""
    recipe = pools[0].recipe
    name = "_".join(["eight_tasks", recipe.net, *([kind] if kind else [])])
    ledger = {
        "name": name,
        "average": False,
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine() | {"device": pools[0].device},
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": data_touched(recipe),
        "seeds": [pool.seed for pool in pools],
        "rows": rows,
        "notes": notes(kind, found, pools),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\n{name}\n{to_text(main_table({'rows': rows}, 'accuracy'))}")


def data_touched(recipe: Recipe) -> dict[str, str]:
    """What each phase sees."""
    validation, unlabelled = (f"{share:.0%}" for share in SHARES)
    most = recipe.most
    base = "ImageNet, by others (SqueezeNet 1.0)"
    if recipe.net == "vit":
        how = recipe.pretraining
        base = (
            f"{how.steps * how.batch} draws with labels from the train parts of {' and '.join(PRETRAINED_ON)}; the latter"
            " holds, as JPEG, the train images of the task cifar10, of which three other phases take theirs"
        )
    return {
        "base": base,
        "heads": f"the first {recipe.head_images} train images of each task with labels",
        "experts": f"its train images with labels: its file's train part less {validation} and {unlabelled}",
        "choice of scale": f"{validation} of the train part with labels, at most {most['validation']} images a task",
        "adaptation, surgery": f"another {unlabelled} of the train part without labels, at most {most['unlabelled']} images"
        " a task; where a row says so, the test images without labels",
        "test": f"the first {most['test']} images of each file's test part, or all where there are fewer",
    }


def notes(kind: str, found: list[Any], pools: list[EightTasks]) -> str:
    recipe, strength = pools[0].recipe, pools[0].strength
    lines = [f"Top-1 accuracy of one encoder ({_network(recipe)}) under the frozen head of each task, which is told."]
    strengths = recipe.strengths if kind == "regimes" else {strength: recipe.strengths[strength]}
    for name, how in strengths.items():
        lines.append(
            f"Fine-tuning, {name}: AdamW, fp32, highest rate {how.lr:g}, {how.steps} steps of {how.batch} images, warm-up of a"
            f" tenth, then half a cosine, weight decay {how.weight_decay:g}, no augmentation."
        )
    lines.append(
        "Intervals are 95 %: Student's over seeds, or with one seed Wilson's over test images. A seed draws the splits of the"
        " train parts, the batches, and what a method drops or adapts on; base and test images are the same for all, so"
        " intervals say nothing about other images."
    )
    if kind == "regimes":
        lines.append(
            "Length of the change: |expert - base| / |base|, all weights as one vector. Cosine: of an expert's change with the"
            f" others' changes, mean over the other {len(TASKS) - 1}. Entropy: of the answers to"
            " validation images, mean over tasks."
        )
    if kind == "images":
        lines.append(
            "Share of a task expert's answers that the repaired average gives too, mean over tasks; `rank` where it is not the"
            " default of 16."
        )
    if kind == "surgery":
        lines.append("Paired differences are against the merge that is repaired.")
    if recipe.net == "squeezenet":
        lines.append("regmean is left out: the network has no linear layers.")
    lines.append("Tiles of rsscn7 and dtd10 cut from one picture can lie in two splits of the train part, not in test.")
    if found and kind != "regimes":
        lines += [f"{label}: {', '.join(f'{one.chosen[label]:g}' for one in found)}." for label in found[0].chosen]
        rivals = [label for label in found[0].validation if not label.endswith("on test inputs")]
        if rivals:
            best = max(rivals, key=lambda label: sum(one.validation[label] for one in found))
            lines.append(f"Best on validation: {best}.")
    return " ".join(lines)


def _network(recipe: Recipe) -> str:
    if recipe.net == "squeezenet":
        return f"SqueezeNet 1.0 without its classifier, images enlarged to {recipe.enlarged} x {recipe.enlarged}"
    patch, width, depth, heads = recipe.shape
    return f"ViT, patch {patch}, width {width}, depth {depth}, {heads} heads, on 32 x 32"

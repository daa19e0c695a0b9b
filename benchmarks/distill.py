"""Distillation compared: a student by the labels, KD, DKD and DIST, each alone and with a rank term (RKKD).

    SPOLIA_DATA=FOLDER python benchmarks/distill.py cifar --work FOLDER     ResNet-56 -> ResNet-8, CIFAR-10 as JPEG
    SPOLIA_DATA=FOLDER python benchmarks/distill.py lm --work FOLDER        stories260k -> a smaller one, WikiText-2

Every training of a seed starts from the same weights and sees the same batches; differences are seed by seed. The work folder
keeps teacher, answers and every finished training: run again, it goes on where it stopped. Two processes may share it once
`--prepare` has made the teacher: `--share 1/2` and `--share 2/2` take every second seed each; run once more without, to write
the ledger. `--quick` only shows that everything runs. Ledgers: distill_cifar, distill_lm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import distill_pool
import measure
from distill_pool import Cifar, Lm, make_pair, recipe_of

from spolia.bench.distillation import ACCURACY, ECE, NLL, PERPLEXITY, TAU, ledger_rows
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.errors import SpoliaError
from spolia.methods.distill.bases import objective_of
from spolia.methods.distill.rkkd import Rkkd, rkkd
from spolia.methods.distill.train import distill
from spolia.reports.ledger import all_tables
from spolia.reports.tables import to_text
from spolia.runs.distill_pair import alone, nobody
from spolia.runs.distill_study import Looks
from spolia.runs.store import write_json

if TYPE_CHECKING:
    from spolia.core.settings import Settings
    from spolia.methods.distill.objective import Objective
    from spolia.runs.distill_pair import Pair

ALONE, TEACHER, RANK = "labels alone", "teacher", " + rank"
LAST = ", last step"
PACKAGES = ["spolia", "torch", "numpy", "transformers", "pillow"]
say = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Entry:
    """One line of the table. `loss`: settings of the loss below the rank term, None for the labels alone."""

    label: str
    loss: Settings | None
    rank: Rkkd | None = None
    against: str = ""

    def objective(self) -> Objective:
        """Made anew for every training."""
        base = alone() if self.loss is None else objective_of(self.loss)
        return base if self.rank is None else rkkd(self.rank, base)


def entries(recipe: Cifar | Lm) -> list[Entry]:
    """Each loss alone, held against the labels alone, and with the rank term, held against itself."""
    found = [Entry(ALONE, None), Entry(ALONE + RANK, None, recipe.rank, ALONE)]
    for name, loss in recipe.losses:
        found += [Entry(name, loss, None, ALONE), Entry(name + RANK, loss, recipe.rank, name)]
    return found


# --- one seed --------------------------------------------------------------------------------------------------------


def score(recipe: Cifar | Lm, data: Path, work: Path, seed: int) -> dict[str, Any]:
    """Trains and counts what `work` does not hold yet of a seed."""
    file = work / f"scores-{seed}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    missing = [entry for entry in entries(recipe) if entry.label not in found]
    if not missing:
        return found
    pair, asked = make_pair(recipe, data, work, seed, say)
    if TEACHER not in found:
        found[TEACHER] = {"kept": pair.judged(pair.teacher).to_dict()}
        say(f"teacher: {_told(found[TEACHER]['kept'], recipe)}")
    for entry in missing:
        found[entry.label] = train(recipe, pair, asked, entry, work, seed)
        write_json(file, found)
    return found


def train(recipe: Cifar | Lm, pair: Pair, asked: Any, entry: Entry, work: Path, seed: int) -> dict[str, Any]:
    """One student: what the test inputs say at the step that validation chose, and at the last one."""
    slug = f"{seed}-{entry.label}".replace(" + ", "-").replace(" ", "-")
    loops, looks, facts = work / "loops" / slug, Looks(pair, work / f"looks-{slug}.json"), dict[str, Any]()
    start = time.perf_counter()
    teacher = (
        nobody(distill_pool.VOCABULARY if isinstance(recipe, Lm) else 10) if entry == Entry(ALONE, None) else asked
    )
    distill(
        pair.student,
        teacher,
        pair.train,
        pair.training,
        objective=entry.objective(),
        validation=pair.validation,
        evaluate=looks,
        journal=Journal(loops, save_every=60),
        seed=seed,
        facts=facts,
    )
    shutil.rmtree(loops)
    made = looks.told(facts["best"]["step"])
    made |= {"validation": facts["best"], "parameters": facts["parameters"], "seconds": time.perf_counter() - start}
    say(f"seed {seed}: {entry.label}, {_told(made['kept'], recipe)} at step {made['step']} ({made['seconds']:.0f} s)")
    return made


def _told(numbers: dict[str, float], recipe: Cifar | Lm) -> str:
    first = PERPLEXITY if isinstance(recipe, Lm) else ACCURACY
    return f"{first} {numbers[first]:.2f}, {TAU} {numbers[TAU]:.1f} %, {ECE} {numbers[ECE]:.1f} %"


# --- ledger ----------------------------------------------------------------------------------------------------------


def write_ledger(recipe: Cifar | Lm, found: list[dict[str, Any]], command: str, folder: Path) -> None:
    """Writes distill_cifar.json or distill_lm.json into `folder` and prints its tables."""
    name = f"distill_{recipe.name}"
    ledger = {
        "name": name,
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": distill_pool.data_touched(recipe),
        "seeds": list(range(len(found))),
        "rows": rows_of(recipe, found),
        "notes": notes(recipe, found),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    for table in all_tables(ledger):
        print(f"\n{to_text(table)}")


def rows_of(recipe: Cifar | Lm, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every metric at the step chosen, and accuracy at the last step."""
    images = isinstance(recipe, Cifar)
    shown = ACCURACY if images else "next-token accuracy"
    values: dict[str, list[dict[str, float]]] = {}
    for label in [TEACHER, *(entry.label for entry in entries(recipe))]:
        values[label] = []
        for one in found:
            numbers = one[label]["kept"] | {shown: one[label]["kept"][ACCURACY]}
            if label == TEACHER:
                del numbers[TAU]  # with itself
            else:
                numbers[shown + LAST] = one[label]["last"][ACCURACY]
            values[label].append(numbers)
    against = {entry.label: entry.against for entry in entries(recipe) if entry.against}
    metrics = [ACCURACY, TAU, ECE, NLL] if images else [PERPLEXITY, TAU, ECE, shown]
    task = "CIFAR-10, JPEG" if images else "WikiText-2"
    return ledger_rows(values, [*metrics, shown + LAST], task, against=against, baselines=(TEACHER, ALONE))


def notes(recipe: Cifar | Lm, found: list[dict[str, Any]]) -> str:
    how, student = recipe.student, found[0][ALONE]["parameters"]
    length = f"{how.steps} steps" if how.steps else f"{how.epochs:g} epochs"
    losses = "; ".join(f"{name}: {_changed(loss)}" for name, loss in recipe.losses)
    lines = [
        f"The student has {student:,} weights: {length} of {how.batch}, {how.optimizer}, rate {how.lr:g}, cosine.",
        f"Losses with their defaults but {losses}; the rank term: {_changed(recipe.rank)}, gamma {recipe.rank.gamma:g}.",
        "Numbers are those of the step that validation chose; `last step` is beside them. Intervals are 95 %, Student's over"
        " seeds: the student's start and its batches. Splits, teacher and test inputs are the same for all seeds, so that"
        " intervals say nothing about other teachers or data. Differences are seed by seed: of a loss from the labels"
        " alone, of a loss with the rank term from the loss.",
        f"{ECE}: expected calibration error, 15 bins. {TAU.capitalize()}: Kendall's tau-b of the student's and the teacher's"
        " logits, mean over test inputs"
        + (", of the teacher's 100 first tokens; perplexity is per token of the teacher's tokenizer, within windows."
           if isinstance(recipe, Lm) else "."),
    ]  # fmt: skip
    if isinstance(recipe, Cifar):
        lines.append("The set is re-compressed JPEG: its numbers do not compare with published ones of CIFAR-10.")
    return " ".join(lines)


def _changed(loss: Settings) -> str:
    """The settings that are not the method's defaults."""
    default = type(loss)()
    found = [
        f"{name} {getattr(loss, name)}"
        for name in type(loss).model_fields
        if getattr(loss, name) != getattr(default, name)
    ]
    return ", ".join(found) or "none"


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("which", choices=("cifar", "lm"))
    told.add_argument("--data", type=Path, help="default: SPOLIA_DATA")
    told.add_argument("--work", type=Path, required=True, help="keeps all that is made; outside the repository")
    told.add_argument("--seeds", type=int, help="default: 5; quick: 2")
    told.add_argument("--share", default="1/1", help="which of how many processes this is")
    told.add_argument("--threads", type=int, help="default: torch's own")
    told.add_argument("--quick", action="store_true")
    told.add_argument("--prepare", action="store_true", help="make the teacher and its answers, and stop")
    told.add_argument("--json", type=Path, help="folder of the ledger; default: docs/results, quick: the work folder")
    asked = told.parse_args()
    if asked.work.resolve().is_relative_to(measure.REPOSITORY):
        raise SystemExit("--work lies in the repository: name a folder outside it")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    recipe = recipe_of(asked.which, asked.quick)
    work = asked.work.resolve() / (f"{asked.which}-quick" if asked.quick else asked.which)
    seeds = asked.seeds or (2 if asked.quick else 5)
    own, shares = (int(part) for part in asked.share.split("/"))
    command = f"python benchmarks/distill.py {asked.which} --work FOLDER --seeds {seeds}" + (" --quick" * asked.quick)
    try:
        data = data_folder(asked.data)
        _remember(recipe, work)
        if asked.prepare:
            make_pair(recipe, data, work, 0, say)
            return
        if shares > 1 and not (work / "teacher").is_dir():
            raise SystemExit("there is no teacher to share yet: run once with --prepare")
        found = [score(recipe, data, work, seed) for seed in range(own - 1, seeds, shares)]
    except SpoliaError as error:
        raise SystemExit(str(error)) from None
    if shares == 1:
        write_ledger(
            recipe, found, command, asked.json or (work if asked.quick else measure.REPOSITORY / "docs/results")
        )


def _remember(recipe: Cifar | Lm, work: Path) -> None:
    """Ends a run in a work folder that was made with other settings."""
    work.mkdir(parents=True, exist_ok=True)
    record, told = work / "settings.json", json.dumps(distill_pool.settings(recipe), indent=1)
    if record.is_file() and record.read_text() != told:
        raise SystemExit(f"{work} was made with other settings: give another --work, or remove it")
    record.write_text(told)


if __name__ == "__main__":
    main()

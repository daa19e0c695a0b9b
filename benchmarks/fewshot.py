"""Few-shot tables on real images: ProtoNet, MAML, ANIL and BOIL, and MSD on top of each that adapts by gradients.

    SPOLIA_DATA=FOLDER python benchmarks/fewshot.py --work FOLDER            everything, about three hours on two cores
    … --only omniglot_5_1,tiny_5_1 --methods maml,msd_maml --seeds 1         some rows
    … --estimate                                                             trains a little of each row and tells its time
    … --quick                                                                a few steps and episodes: does everything run?

Problems: Omniglot, 5- and 20-way, 1- and 5-shot, trained on the official background characters and tested on the evaluation
ones; Tiny-ImageNet-100 split by classes, 32 pixels; the models of the latter on GTSRB, another domain. Conv4 with 32 channels.
Every method has the same outer steps of as many tasks, msd half the tasks of two views each: equal cost. The budget is small
beside the papers' (see `tasks` of the table in a row): numbers compare with each other first.

Each training goes on where it stopped; each finished one keeps its scores in the work folder. Ledgers: docs/results/
fewshot_omniglot.json, fewshot_tiny.json. Two processes may share a work folder: a training belongs to who came first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from stages import held_alone, keep

from spolia.bench.fewshot_scores import Scores, ledger_rows
from spolia.catalog import find
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text
from spolia.runs.meta_entries import Entry, trained
from spolia.runs.meta_judging import judged
from spolia.runs.meta_problems import Classes, FewShot, OmniglotEpisodes, PackedEpisodes, classes_of, scenarios_of

PACKAGES = ["torch", "numpy", "spolia"]
BASES = ("maml", "anil", "boil")
METHODS = ("protonet", *(name for base in BASES for name in (base, f"msd_{base}")))
SEEDS = 3
CHECKS = 4  # looks at validation along a training
INNER = {"maml": (1, 0.4), "anil": (3, 0.1), "boil": (1, 0.5)}  # steps, rate
BUDGET = [1.0]  # factor of all outer steps, from the command line
QUICK = {"episodes": 4, "validation": 2}
DATA = {
    "omniglot": "training and validation: background characters, 85 and 15 %; test: evaluation characters",
    "tiny": "training, validation and test: 64, 16 and 20 % of the classes of Tiny-ImageNet-100; test also GTSRB's signs",
}


@dataclass(frozen=True)
class Row:
    """One problem with its budget: outer steps of `tasks` tasks, for every method."""

    problem: FewShot
    steps: int
    tasks: int
    ledger: str
    other: str = ""  # another set that its models are tested on

    @property
    def task(self) -> str:
        name = "Omniglot" if self.ledger == "omniglot" else "Tiny-ImageNet-100"
        return f"{name} {self.problem.ways}-way {self.problem.shots}-shot"


def omniglot(ways: int, shots: int, steps: int) -> Row:
    problem = OmniglotEpisodes(
        source="omniglot",
        ways=ways,
        shots=shots,
        width=32,
        queries=3 if ways == 20 else 5,
        validation=60,
        scenarios=["shaken"],
    )
    return Row(problem, steps, 16 if ways == 5 else 4, "omniglot")


def tiny(shots: int, steps: int) -> Row:
    problem = PackedEpisodes(
        source="packed", ways=5, shots=shots, width=32, queries=5, validation=60, scenarios=["corrupted", "mixed"]
    )
    return Row(problem, steps, 16, "tiny", other="gtsrb")


ROWS = {
    "omniglot_5_1": omniglot(5, 1, 300),
    "omniglot_5_5": omniglot(5, 5, 150),
    "omniglot_20_1": omniglot(20, 1, 100),
    "omniglot_20_5": omniglot(20, 5, 50),
    "tiny_5_1": tiny(1, 200),
    "tiny_5_5": tiny(5, 100),
}


def entry_of(name: str, row: Row) -> Entry:
    """The training of a method: the problem's budget, the method's own inner steps."""
    shared = {"steps": row.steps, "tasks": row.tasks, "check_every": max(1, row.steps // CHECKS)}
    if name == "protonet":
        return Entry(name, name, find(name).settings_class()(**shared, halve_every=max(1, row.steps // 2)))
    base = name.removeprefix("msd_")
    steps, lr = INNER[base]
    settings = {**shared, "inner_steps": steps, "inner_lr": lr, "lr": 3e-3, "test_steps": max(3, steps)}
    if name == base:
        return Entry(name, name, find(name).settings_class()(**settings))
    return Entry(f"msd on {base}", "msd", find("msd").settings_class()(base=base, base_settings=settings))


@cache
def classes(key: str, quick: bool) -> Classes:
    return classes_of(row_of(key, quick).problem, 0)


def row_of(key: str, quick: bool) -> Row:
    row = replace(ROWS[key], steps=round(ROWS[key].steps * BUDGET[0]))
    return replace(row, steps=4, tasks=4, problem=row.problem.model_copy(update=QUICK)) if quick else row


def elsewhere(row: Row) -> dict[str, Any]:
    """Test classes by the name of their set."""
    from spolia.data.fewshot import packed

    return {row.other: packed(row.other, size=32)} if row.other else {}


def stage(work: Path, key: str, name: str, seed: int, quick: bool) -> dict[str, Any] | None:
    """Scores of one training by test, with its seconds; None where another process is at it."""
    file, folder = work / key / f"{name}-{seed}.json", work / key / f"{name}-{seed}"
    if file.exists():
        return json.loads(file.read_text())
    with held_alone(folder, f"{key} {name} {seed}") as ours:
        if not ours:
            return None
        row, start = row_of(key, quick), time.perf_counter()
        held, entry = classes(key, quick), entry_of(name, row)
        learner = trained(entry, row.problem, held, seed, Journal(folder)).chosen()
        fitted = time.perf_counter()
        found = {"": judged(row.problem, learner, held.test, 0)}
        for other, test in elsewhere(row).items():
            found[other] = judged(row.problem, learner, test, 0)
        seconds = {"training": fitted - start, "test": time.perf_counter() - fitted}
        kept = {"scores": found, "seconds": seconds}
        keep(file, kept)
    accuracy = sum(found[""]["standard"]["values"]["accuracy"]) / row.problem.episodes
    print(f"{key} {name} {seed}: {100 * accuracy:.1f} %, {sum(seconds.values()):.0f} s", flush=True)
    return kept


def rows_of(work: Path, key: str, quick: bool) -> list[dict[str, Any]]:
    """Ledger rows of what is finished of one problem; a method counts when all others' seeds are there too."""
    row, found = row_of(key, quick), {}
    for name in METHODS:
        files = sorted((work / key).glob(f"{name}-*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
        if files:
            found[name] = [json.loads(file.read_text())["scores"] for file in files]
    made = []
    for place in ("", *([row.other] if row.other else [])):
        for test in scenarios_of(row.problem):
            task = f"{row.task}{f' to {place.upper()}' if place else ''}, {test}"
            scores = {n: [_scores(one[place][test]) for one in each] for n, each in found.items()}
            for base in ("protonet", *BASES):
                pair = {n: scores[n] for n in (base, f"msd_{base}") if n in scores}
                seeds = min(map(len, pair.values()), default=0)
                pair = {n.replace("msd_", "msd on "): each[:seeds] for n, each in pair.items()}
                made += ledger_rows(pair, task, baselines={base}, against=base) if seeds else []
    return made


def _scores(kept: dict[str, Any]) -> Scores:
    return Scores(kept["episodes"], kept["scenario"], {m: tuple(each) for m, each in kept["values"].items()})


def write_ledger(work: Path, kind: str, out: Path, quick: bool, command: str) -> None:
    """docs/results/fewshot_KIND.json, and its accuracies on the screen."""
    keys = [key for key in ROWS if ROWS[key].ledger == kind and (work / key).is_dir()]
    rows = [row for key in keys for row in rows_of(work, key, quick)]
    if not rows:
        return
    budget = "; ".join(
        f"{row_of(k, quick).task}: {row_of(k, quick).steps} steps of {row_of(k, quick).tasks} tasks" for k in keys
    )
    ledger = {
        "name": f"fewshot_{kind}",
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {"all": DATA[kind]},
        "seeds": sorted({int(file.stem.rpartition("-")[2]) for key in keys for file in (work / key).glob("*.json")}),
        "rows": rows,
        "notes": f"Conv4 of 32 channels, the model that validation chose. Budget: {budget}. msd takes half the tasks in two "
        "views each. Differences are to the base without msd, on the same episodes.",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"fewshot_{kind}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\nfewshot_{kind}\n{to_text(main_table({'rows': rows}, 'accuracy'))}", flush=True)


def estimate(keys: list[str], names: list[str], seeds: int) -> None:
    """Seconds of each row, from a few steps and episodes of it."""
    total = 0.0
    for key in keys:
        row, held = row_of(key, False), classes(key, False)
        problem = row.problem.model_copy(update={"episodes": 6, "validation": 2})
        for name in names:
            clock, marks = time.process_time, []
            for steps in (1, 5):
                entry, start = entry_of(name, replace(row, steps=steps)), clock()
                learner = trained(entry, problem, held, 0, Journal())
                marks.append(clock() - start)
            start = clock()
            judged(problem, learner, held.test, 0)
            places = 1 + bool(row.other)
            asked = (clock() - start) / 6 * row.problem.episodes * places
            seconds = (marks[1] - marks[0]) / 4 * row.steps + asked
            total += seeds * seconds
            print(f"{key} {name}: {seconds:.0f} s of one core a seed, {asked:.0f} s of them test", flush=True)
    print(f"all, {seeds} seeds: {total / 3600:.1f} hours of one core")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default=",".join(ROWS), help="problems")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="factor of all outer steps; another work folder for each"
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument(
        "--json", type=Path, default=measure.REPOSITORY / "docs" / "results", help="folder of the ledgers"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    BUDGET[0] = asked.budget
    data_folder()
    keys, names = asked.only.split(","), asked.methods.split(",")
    if asked.estimate:
        estimate(keys, names, asked.seeds)
        return
    if asked.work is None or (asked.quick and asked.json == measure.REPOSITORY / "docs" / "results"):
        parser.error("--work FOLDER, and with --quick also --json FOLDER")
    for seed in range(asked.seeds):
        for key in keys:
            for name in names:
                stage(asked.work, key, name, seed, asked.quick)
        for kind in DATA:
            write_ledger(asked.work, kind, asked.json, asked.quick, "python benchmarks/fewshot.py --work FOLDER")


if __name__ == "__main__":
    main()

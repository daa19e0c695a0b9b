"""Five two-class APIs one after the other, real images over HTTP: DFCL and DECL at three budgets, and what stands beside.

    SPOLIA_DATA=FOLDER python benchmarks/apis.py --work FOLDER        everything; goes on where it stopped
    … --only mnist --seeds 1                  some streams: mnist, fashion, cifar10
    … --estimate                              some rounds of each learner, and the time of all
    … --quick                                 a round of the smallest budget: does everything run?

Streams: MNIST, Fashion-MNIST and CIFAR-10 (JPEG file, halved to 16 pixels), APIs in the order of the labels. The experts are of
three architectures, trained on the train part of their own classes, and served by `spolia serve`'s server in a process of its
own; the learner sees their probabilities over loopback. Beside DFCL and DECL (five real images of each class): distillation
without replay, finite differences through both networks, DECL's few images alone, joint training on all real data, and the
most confident API. In one seed all have the same experts and the same first weights; differences are taken seed by seed.

Each run goes on where it stopped; each finished one keeps its numbers in the work folder. Ledgers: docs/results/
apis_STREAM.json, with pictures of accuracy against queries. Two processes may share a work folder: a run belongs to who came
first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import apis_rows
import apis_words
import measure
from apis_rows import ASKING, ONCE, ROWS, SHOTS, Job, Row, Server
from stages import held_alone, keep

from spolia.bench.continual import Protocol, run
from spolia.bench.continual_ledger import CLASS_IL, MEMORY, TASK_IL, TIME, found_of, ledger_rows, value_of
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text
from spolia.runs.apis_entries import DATA_FEW, DATA_FREE, learner_of
from spolia.runs.apis_ground import Ground, ground_of
from spolia.runs.apis_ledger import asked_rows, data_touched

PACKAGES = ["torch", "numpy", "httpx", "uvicorn", "starlette", "spolia"]
SEEDS = 3
BATCH = 32  # real examples of a step, of learners that have some
QUICK = {"most": 400, "expert_epochs": 1.0}
ROUNDS = 3  # of an estimate


def row_of(key: str, quick: bool) -> Row:
    row = ROWS[key]
    return replace(row, problem=row.problem.model_copy(update=QUICK), budget=1_000) if quick else row


class Grounds:
    """What the learners of a seed share, made when it is asked for: once without real examples, once with the few."""

    def __init__(self, row: Row, server: Server, seed: int):
        self.row, self.server, self.seed = row, server, seed
        self.made: dict[int, tuple[Any, Ground]] = {}

    def of(self, job: Job) -> tuple[Any, Ground]:
        """Recipe and ground, with as many rounds as the job's budget pays for."""
        if job.few not in self.made:
            recipe = apis_rows.recipe_of(self.row, job.few, [self.server.url])
            self.made[job.few] = recipe, ground_of(recipe, self.seed)
        recipe, ground = self.made[job.few]
        return recipe, apis_rows.at_budget(job, recipe, ground)

    def close(self) -> None:
        for _, ground in self.made.values():
            for api in ground.apis:
                api.close()


def made(job: Job, grounds: Grounds) -> tuple[Any, Any, Protocol]:
    """A learner, its stream and how it is run."""
    recipe, ground = grounds.of(job)
    learner, stream, passes = learner_of(apis_rows.line_of(job, recipe), recipe, ground, grounds.seed)
    return learner, stream, Protocol(epochs=passes, batch=BATCH, ahead=False)


def place_of(work: Path, key: str, job: Job, seed: int) -> Path:
    return work / key / f"{job.label.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def stage(file: Path, job: Job, grounds: Grounds) -> None:
    """Runs one learner of one seed, unless another process has done it or is at it."""
    folder = file.with_suffix("")
    with held_alone(folder, f"{file.stem}") as ours:
        if not ours or file.exists():
            return
        start = time.perf_counter()
        learner, stream, protocol = made(job, grounds)
        outcome = run(learner, stream, protocol, Journal(folder, save_every=60.0), grounds.seed)
        seconds = time.perf_counter() - start
        found = found_of(outcome) | {"asked": dict(getattr(learner, "asked", {}))}
        kept = {"label": job.label, "seed": grounds.seed, "found": found, "experts": grounds.server.accuracies}
        keep(file, kept | {"seconds": seconds})
    shutil.rmtree(folder, ignore_errors=True)
    told = ", ".join(f"{rule} {value_of(found, rule):.1f}" for rule in (CLASS_IL, TASK_IL))
    print(f"{file.parent.name} {file.stem}: {told}; {seconds:.0f} s", flush=True)


def remember(key: str, asked: argparse.Namespace) -> None:
    """Ends a run in a work folder that was made with other settings."""
    row = row_of(key, asked.quick)
    recipe = apis_rows.recipe_of(row, 0, [])
    told = json.dumps({"recipe": recipe.to_yaml(), "budgets": row.budgets(), "few": SHOTS}, indent=1)
    record = asked.work / key / "settings.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    if record.is_file() and record.read_text() != told:
        raise SystemExit(f"{record.parent} was made with other settings: give another --work, or remove it")
    record.write_text(told)


# --- the ledger ------------------------------------------------------------------------------------------------------


def finished(key: str, asked: argparse.Namespace) -> tuple[list[int], dict[str, list[dict[str, Any]]]]:
    """The seeds that all learners begun have, and by label, in the order of the table, what was kept of these."""
    by_label: dict[str, dict[int, Any]] = {}
    for file in sorted((asked.work / key).glob("*-*.json")):
        one = json.loads(file.read_text())
        by_label.setdefault(one["label"], {})[one["seed"]] = one
    every = apis_rows.jobs(row_of(key, asked.quick), asked.quick)
    order = [job.label for line in (*ONCE, *ASKING) for job in every if job.line == line]
    known = [label for label in order if label in by_label]
    shared = sorted(set.intersection(*(set(by_label[label]) for label in known))) if known else []
    return shared, {label: [by_label[label][seed] for seed in shared] for label in known}


def write_ledger(key: str, asked: argparse.Namespace) -> None:
    """docs/results/apis_KEY.json and its pictures, of what is finished."""
    row = row_of(key, asked.quick)
    seeds, kept = finished(key, asked)
    if not seeds:
        return
    found = {label: [one["found"] for one in each] for label, each in kept.items()}
    every = [job for job in apis_rows.jobs(row, asked.quick) if job.label in found]
    against = {job.label: other for job in every if (other := apis_rows.against_of(job)) in found}
    baselines = [job.label for job in every if job.line not in (DATA_FREE, DATA_FEW)]
    rows = ledger_rows(found, row.name, against=against, baselines=baselines, each=False)
    rows = [one for one in rows if one["metric"] not in (TIME, MEMORY)]
    recipe = apis_rows.recipe_of(row, 0, [])
    touched = data_touched(recipe.problem) | {"learning": "answers of the API at hand to synthetic inputs; DECL: five"
        " labelled images of each class too"}  # fmt: skip
    ledger = {
        "name": f"apis_{key}", "command": "python benchmarks/apis.py --work FOLDER", "commit": measure.commit(),
        "date": datetime.date.today().isoformat(), "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES), "data": touched, "seeds": seeds,
        "rows": [*rows, *asked_rows(found, baselines, recipe.problem)],
        "notes": apis_words.notes(row, recipe, next(iter(kept.values()))),
    }  # fmt: skip
    asked.json.mkdir(parents=True, exist_ok=True)
    (asked.json / f"apis_{key}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    for rule, end in ((CLASS_IL, ""), (TASK_IL, "_task")):
        apis_words.curve(row, every, found, rule, asked.json / f"apis_{key}{end}.svg")
        print(f"\napis_{key}, {len(seeds)} seeds\n{to_text(main_table(ledger, rule))}", flush=True)


# --- how long it takes -----------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Of a process on Linux, so far."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")


def estimate(key: str, seeds: int) -> float:
    """Core-seconds of a stream, learner and server together, from some rounds of every learner."""
    row, total = row_of(key, False), 0.0
    with apis_rows.serving(row.problem, 0) as server:
        start = cpu_seconds(server.pid)
        grounds = Grounds(row, server, 0)
        print(f"{key}: experts {', '.join(f'{a:.1f}' for a in server.accuracies)} %, {start:.0f} s", flush=True)
        for line in (*ONCE, *ASKING):
            own = [job for job in apis_rows.jobs(row) if job.line == line]
            learner, stream, protocol = made(own[0], grounds)
            clock = [time.process_time() + cpu_seconds(server.pid)]
            whole = 0.0
            if line in ONCE:
                run(learner, stream, protocol)
                clock.append(time.process_time() + cpu_seconds(server.pid))
                whole = clock[1] - clock[0]
            else:
                stages = [replace(e, rounds=ROUNDS) for e in stream.experiences]
                run(learner, replace(stream, experiences=tuple(stages)), protocol)
                clock.append(time.process_time() + cpu_seconds(server.pid))
                x = stream.tests[0].examples.batch(slice(0, protocol.lot)).x
                learner.predict(x)
                looked = time.process_time() + cpu_seconds(server.pid) - clock[1]
                tests = sum((i + 2) * len(t.examples) for i, t in enumerate(reversed(stream.tests)))
                looks = looked / len(x) * tests
                each = max(0.0, clock[1] - clock[0] - looks) / (ROUNDS * len(stream))
                recipe = grounds.of(own[0])[0]
                for job in own:
                    rounds = grounds.of(job)[1].stream.experiences[0].rounds  # type: ignore[attr-defined]
                    whole += each * rounds * recipe.problem.count + looks
            total += whole
            print(f"{key} {line}: {whole:.0f} s a seed, all budgets", flush=True)
        grounds.close()
    total = seeds * (total + start)
    print(f"{key}: {total / 60:.1f} core-minutes for {seeds} seeds", flush=True)
    return total


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default=",".join(ROWS), help="streams")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    results = measure.REPOSITORY / "docs" / "results"
    parser.add_argument("--json", type=Path, default=results, help="folder of the ledgers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    if not asked.estimate and (asked.work is None or (asked.quick and asked.json == results)):
        parser.error("--work FOLDER, and with --quick also --json FOLDER")
    if unknown := set(asked.only.split(",")) - set(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(ROWS)}")
    return asked


def main() -> None:
    asked = arguments()
    import torch

    torch.set_num_threads(asked.threads)
    data_folder()
    keys = asked.only.split(",")
    if asked.estimate:
        total = sum(estimate(key, asked.seeds) for key in keys)
        print(f"all: {total / 60:.0f} core-minutes")
        return
    for key in keys:  # a whole table before the next one
        remember(key, asked)
        row = row_of(key, asked.quick)
        for seed in range(asked.seeds):
            left = [
                job for job in apis_rows.jobs(row, asked.quick) if not place_of(asked.work, key, job, seed).exists()
            ]
            if left:
                with apis_rows.serving(row.problem, seed) as server:
                    grounds = Grounds(row, server, seed)
                    for job in left:
                        stage(place_of(asked.work, key, job, seed), job, grounds)
                    grounds.close()
            write_ledger(key, asked)


if __name__ == "__main__":
    main()

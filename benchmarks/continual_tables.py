"""Continual tables on real images: fine-tuning, joint training, EWC, LwF, ER, DER++, iCaRL, and refresh around ER and DER++.

    SPOLIA_DATA=FOLDER python benchmarks/continual_tables.py --work FOLDER     everything; goes on where it stopped
    … --only mnist,rotated --learners er,derpp --memories 200 --seeds 1        some rows
    … --estimate                                                               some steps of each row, and its time
    … --quick                                                                  a few steps: does everything run?
    … --budget 5 --device cuda                                                 five times all readings; on a GPU

Streams, one table after the other: Split-MNIST, Split-Fashion, Split-CIFAR-10 (JPEG file, 16 pixels), each 5 tasks of 2
classes; longer, Split-CIFAR-10 read twenty times by joint training, ER and DER++; strength, refresh of several strengths on
Split-MNIST; Rotated-MNIST, 10 angles; Split-Tiny-ImageNet-100, 10 tasks of 10 classes, 16 pixels. Class order is that of the
labels, angles are each seed's own. Networks, images and readings are cut to about 75 minutes of one core, and 65 for longer;
what was cut stands in each ledger.

All learners of a stream have one learning rate (iCaRL's on grey images is higher: its loss is a mean over classes). Weights and
batches are those of mammoth's tables where these have the stream, found there for other networks, rates and more readings:
numbers compare with each other first. EWC's strength is one for the true Fisher, 10. In one seed all learners have the same
network, batches and angles; differences are taken seed by seed. In `strength` a line `er at 0.7 lr` has the descent that
`er + refresh 0.3` is left with, to first order: what is above it is refresh's own.

Each run goes on where it stopped; each finished one keeps its numbers in the work folder. Ledgers: docs/results/
continual_STREAM.json. Two processes may share a work folder: a run belongs to who came first.
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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from continual_rows import LEARNERS, MEMORIES, ROWS, against_of, label_of, lines, settings_of
from stages import held_alone, keep

from spolia.bench.continual import Protocol, run
from spolia.bench.continual_ledger import found_of, ledger_rows
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text
from spolia.runs.continual_entries import learner_of
from spolia.runs.continual_problems import PackedStream, width_of
from spolia.runs.continual_streams import labelled_of, model_of, stream_of

PACKAGES = ["torch", "numpy", "spolia"]
SEEDS = 5
QUICK = {"most": 400, "epochs": 0.05}
STEPS, LOT = 6, 256  # of an estimate: steps timed, inputs answered
DATA = (
    "training part, task by task; joint: all tasks so far; memory: as many inputs as stated; test part after each task"
)


def problem_of(key: str, asked: argparse.Namespace) -> PackedStream:
    """The problem at the budget that is asked for."""
    problem = ROWS[key].problem
    if asked.quick:
        return problem.model_copy(update=QUICK | {"device": asked.device})
    return problem.model_copy(update={"epochs": problem.epochs * asked.budget, "device": asked.device})


@cache
def data(key: str, most: int | None) -> Any:
    held = labelled_of(ROWS[key].problem.model_copy(update={"most": most}), 0)
    if not ROWS[key].halved:
        return held
    from torch.nn.functional import avg_pool2d

    train, test = ((avg_pool2d(x.float(), 2).round().to(x.dtype), y) for x, y in (held.train, held.test))
    return replace(held, train=train, test=test)


@lru_cache(maxsize=1)  # the learners of a seed come one after the other
def stream_at(key: str, most: int | None, seed: int) -> Any:
    """The stream, each test cut to what the row says."""
    stream = stream_of(ROWS[key].problem, data(key, most), seed)
    tests = [
        replace(t, examples=replace(t.examples, places=t.examples.places[: ROWS[key].tests])) for t in stream.tests
    ]
    return replace(stream, tests=tuple(tests))


def made(key: str, learner: str, memory: int | None, seed: int, asked: argparse.Namespace) -> tuple[Any, Any, Protocol]:
    """A learner, its stream and how it is run."""
    problem = problem_of(key, asked)
    held = data(key, problem.most)
    stream = stream_at(key, problem.most, seed)
    method, settings = settings_of(ROWS[key], learner, memory)
    found = learner_of(method, settings, model_of(problem, held, seed), stream, seed)
    return found, stream, Protocol(epochs=problem.epochs, batch=problem.batch, ahead=False)


def stage(key: str, learner: str, memory: int | None, seed: int, asked: argparse.Namespace) -> None:
    """Runs one learner of one seed, unless it is done or another process is at it."""
    name = f"{label_of(learner, memory).replace(' + ', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
    file, folder = asked.work / key / f"{name}.json", asked.work / key / name
    if file.exists():
        return
    with held_alone(folder, f"{key} {name}") as ours:
        if not ours:
            return
        start = time.perf_counter()
        found, stream, protocol = made(key, learner, memory, seed, asked)
        outcome = run(found, stream, protocol, Journal(folder, save_every=60.0), seed)
        kept = {"learner": label_of(learner, memory), "seed": seed, "found": found_of(outcome)}
        keep(file, kept)
        seconds = time.perf_counter() - start
    shutil.rmtree(folder, ignore_errors=True)
    numbers = ", ".join(f"{k} {v:.1f}" for k, v in outcome.numbers().items() if k in ("average", "task average"))
    print(f"{key} {name}: {numbers}; {seconds:.0f} s", flush=True)


def finished(work: Path, key: str) -> tuple[list[int], dict[str, list[dict[str, Any]]]]:
    """The seeds that all learners have, and by learner, in the order of the table, what these found."""
    kept = [json.loads(file.read_text()) for file in sorted((work / key).glob("*.json"))]
    by_learner: dict[str, dict[int, Any]] = {}
    for one in kept:
        by_learner.setdefault(one["learner"], {})[one["seed"]] = one["found"]
    order = [label_of(*line) for line in lines(ROWS[key], list(LEARNERS), list(MEMORIES))]
    known = [name for name in order if name in by_learner] + sorted(by_learner.keys() - set(order))
    shared = sorted(set.intersection(*(set(by_learner[name]) for name in known))) if known else []
    return shared, {name: [by_learner[name][seed] for seed in shared] for name in known}


def write_ledger(key: str, asked: argparse.Namespace, command: str) -> None:
    """docs/results/continual_KEY.json, and its accuracies on the screen."""
    row, problem = ROWS[key], problem_of(key, asked)
    seeds, found = finished(asked.work, key)
    if not seeds:
        return
    against = against_of(list(found))
    rows = ledger_rows(found, row.name, against=against, baselines=["finetune", "joint"], judged=row.judged, each=False)
    inputs = "all" if problem.most is None else f"the first {problem.most:,}"
    ledger = {
        "name": f"continual_{key}",
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {"all": f"{problem.data}: {inputs} of the {DATA}"},
        "seeds": seeds,
        "rows": rows,
        "notes": _notes(row, problem),
    }
    asked.json.mkdir(parents=True, exist_ok=True)
    (asked.json / f"continual_{key}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\ncontinual_{key}, {len(seeds)} seeds\n{to_text(main_table({'rows': rows}))}", flush=True)


def _notes(row: Any, problem: PackedStream) -> str:
    """Network, lengths, and what was cut to make them."""
    shown = f" of {problem.size // (1 + row.halved)} pixels" if problem.size else ""
    tests = "" if row.tests is None else f" Of each test the first {row.tests:,} images."
    other = " but iCaRL, 0.1" if "icarl" in row.settings else ""
    return (
        f"{problem.network} of width {width_of(problem)} on images{shown}, {problem.count} tasks, {problem.epochs:g} readings"
        f" of each, batches of {problem.batch} and {row.replay} replayed, on {problem.device}.{tests} {row.cut} The number"
        f" behind a learner is its memory in samples. The learning rate is {row.lr:g} for all{other}; weights are of mammoth's"
        " tables, made for other networks and longer training; EWC's is for the true Fisher, estimated with sampled labels."
        " Time was taken while other work ran and compares roughly. Intervals are Student's over seeds,"
        " differences seed by seed."
    )


def estimate(keys: list[str], asked: argparse.Namespace) -> None:
    """Seconds of each row, from a few steps of its first task and a few answers."""
    total = 0.0
    for key in keys:
        problem, sum_ = problem_of(key, asked), 0.0
        for learner, memory in lines(ROWS[key], asked.learners, asked.memories):
            found, stream, protocol = made(key, learner, memory, 0, asked)
            first, clock = stream.experiences[0], time.process_time
            found.begin(first)
            start = clock()
            for step in range(2 + STEPS):
                if step == 2:  # the first ones make room and warm up
                    start = clock()
                found.observe(first.draw(protocol.batch, 0, step))
            each = (clock() - start) / STEPS
            steps = sum(e.steps(protocol.batch, protocol.epochs) for e in stream.experiences)
            times = (problem.count + 1) / 2 if learner == "joint" else 1.0
            x = stream.tests[0].examples.batch(slice(0, LOT)).x
            start = clock()
            found.predict(x)
            asks = (clock() - start) / len(x) * sum(len(test.examples) for test in stream.tests) * (len(stream) + 1) / 2
            seconds = each * steps * times + asks
            sum_ += seconds
            print(f"{key} {label_of(learner, memory)}: {seconds:.0f} s a seed, {asks:.0f} s of them tests", flush=True)
        print(f"{key}: {asked.seeds * sum_ / 3600:.2f} hours for {asked.seeds} seeds", flush=True)
        total += asked.seeds * sum_
    print(f"all, {asked.seeds} seeds: {total / 3600:.1f} hours of one core; ends of tasks are not counted")


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default=",".join(ROWS), help="streams")
    parser.add_argument("--learners", default=",".join(LEARNERS))
    parser.add_argument("--memories", default=",".join(map(str, MEMORIES)))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="factor of all readings; another work folder for each"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = measure.REPOSITORY / "docs" / "results"
    parser.add_argument("--json", type=Path, default=results, help="folder of the ledgers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    asked.learners, asked.memories = asked.learners.split(","), [int(size) for size in asked.memories.split(",")]
    if not asked.estimate and (asked.work is None or (asked.quick and asked.json == results)):
        parser.error("--work FOLDER, and with --quick also --json FOLDER")
    return asked, parser


def main() -> None:
    asked, parser = arguments()
    keys = asked.only.split(",")
    for given, known in ((keys, ROWS), (asked.learners, LEARNERS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(known)}")
    import torch

    torch.set_num_threads(asked.threads)
    data_folder()
    if asked.estimate:
        estimate(keys, asked)
        return
    budget = "" if asked.budget == 1.0 else f" --budget {asked.budget:g}"
    for key in keys:  # a whole table before the next one
        for seed in range(asked.seeds):
            for learner, memory in lines(ROWS[key], asked.learners, asked.memories):
                stage(key, learner, memory, seed, asked)
            write_ledger(key, asked, f"python benchmarks/continual_tables.py --work FOLDER{budget}")


if __name__ == "__main__":
    main()

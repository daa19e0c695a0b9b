"""Data-free tables on real images: FREE, TGR and Robust from pools of classifiers, beside what they must beat.

    SPOLIA_DATA=FOLDER python benchmarks/datafree.py --work FOLDER           everything; see --estimate
    … --only tiny,omniglot --lines free,inversion --seeds 1                  some rows and lines
    … --estimate                                                             does a little of each line and tells its time
    … --quick                                                                tiny pools, few steps: does everything run?

Rows: pools of 20 five-way Conv4 from base classes of Tiny-ImageNet-100 at 32 pixels and of Omniglot at 28; the same of
ResNet-10; a mixed pool of 32 Conv4 and ResNet-10 from Tiny-ImageNet-100, GTSRB, EuroSAT and Omniglot; Tiny-ImageNet-100 and
Omniglot pools of which 20, 40 and 60 % lie, all four attacks in turn. All are judged on unseen classes, 5-way 1- and 5-shot,
600 episodes, three seeds.

Questions: is FREE's recovery 20 times quicker a model than 200 steps of inversion, at equal accuracy (free, inversion)? Does
TGR beat training without groups on the mixed pool (groupings, no groups)? Does Robust lose a third, at most, of what the
unprotected learner loses (robust, unprotected, on the clean and the corrupted row)? What is forgotten when models come one
after the other (in turn)?

Pools and trainings go on where they stopped; finished lines keep their scores in the work folder. Ledger:
docs/results/datafree.json. Two processes may share a work folder: a line belongs to who came first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from datafree_rows import BUDGET, FREE_LINES, LINES, ORACLE, ROWS, STEPS, problem_of, settings_of
from stages import held_alone, keep

from spolia.bench.fewshot_scores import Point, Scores, ledger_rows, stages
from spolia.bench.multitask import t_interval
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text
from spolia.runs.datafree_entries import REAL, free_lines, learner_network, on_real_data
from spolia.runs.datafree_judging import along, judge_of, points_told, real_episodes, scores_told, selection_told
from spolia.runs.datafree_pool import make_pool
from spolia.runs.datafree_problems import classes_of, features

PACKAGES = ["torch", "numpy", "scikit-learn", "spolia"]
SEEDS = 3


def ground(work: Path, key: str, quick: bool) -> tuple[Any, Any, dict[str, str]]:
    """Classes, the pool, and by name what is wrong with those that lie. The pool is trained once for all lines and seeds."""
    problem = problem_of(key, quick)
    held = classes_of(problem, 0)
    pool, attacks = make_pool(problem, held, 0, work / key / "pool", Journal(work / key / "journal"))
    return held, pool, {expert.name: attack for expert, attack in zip(pool, attacks, strict=True) if attack}


def stage(work: Path, key: str, name: str, seed: int, quick: bool) -> dict[str, Any] | None:
    """Scores of one line by test, with its seconds; None where another process is at it."""
    slug = name.replace(", ", "-").replace(" ", "_")
    file, folder = work / key / f"{slug}-{seed}.json", work / key / f"{slug}-{seed}"
    if file.exists():
        return json.loads(file.read_text())
    with held_alone(folder, f"{key} {name} {seed}") as ours:
        if not ours:
            return None
        start = time.perf_counter()
        kept = _line(work, key, name, seed, quick, Journal(folder))
        kept["seconds"] = kept.get("seconds", {}) | {"all": time.perf_counter() - start}
        keep(file, kept)
    told = [f"{label} {_mean(tests):.1f} %" for label, tests in kept["scores"].items()]
    print(f"{key} {seed}: {', '.join(told)}; {kept['seconds']['all']:.0f} s", flush=True)
    return kept


def _line(work: Path, key: str, name: str, seed: int, quick: bool, journal: Journal) -> dict[str, Any]:
    from spolia.methods.datafree.combination import combined, selection_of
    from spolia.methods.datafree.training import audited

    (held, pool, attacks), problem = ground(work, key, quick), problem_of(key, quick)
    judge = judge_of(problem, held, 0)
    if name in (FREE_LINES, ORACLE):
        settings = settings_of("free", problem, quick)
        if name == ORACLE:
            learners = {REAL: on_real_data(problem, pool, held, settings, seed, journal)}
        else:
            learners = free_lines(problem, pool, settings, seed, pool.audit().suspects)
        return {"scores": {label: scores_told(judge.scores(one.predict)) for label, one in learners.items()}}
    settings = settings_of(name, problem, quick)
    sound = audited(pool, settings)
    chosen = selection_of(sound, settings, seed, embed=features)
    watched = along(problem, sound, real_episodes(problem, held, 0), judge, 0)
    network, begun = learner_network(problem, sound, seed), time.perf_counter()
    learner = combined(sound, network, settings, journal, seed=seed, embed=features, selection=chosen, watch=watched)
    recovery = [one["seconds"] for one in learner.recovered.values()]
    scores = {name: learner, f"{name}, selected": learner.chosen()}
    return {
        "scores": {label: scores_told(judge.scores(one.predict)) for label, one in scores.items()},
        "points": points_told(watched.points),
        "selection": selection_told(chosen, sound),
        "attacks": attacks,
        "seconds": {"training": time.perf_counter() - begun, "a model": sum(recovery) / max(1, len(recovery))},
    }


def _mean(tests: dict[str, Any]) -> float:
    values = [value for one in tests.values() for value in one["values"]["accuracy"]]
    return 100 * sum(values) / len(values)


# --- the ledger ------------------------------------------------------------------------------------------------------


def rows_of(work: Path, key: str) -> list[dict[str, Any]]:
    """Ledger rows of what is finished of one pool; of every line as many seeds as all compared with it have."""
    made: list[dict[str, Any]] = []
    found = {name: _kept(work, key, name) for name in (FREE_LINES, ORACLE, *ROWS[key].lines)}
    scores: dict[str, list[dict[str, Any]]] = {}
    for each in found.values():
        for label in each[0]["scores"] if each else ():
            scores[label] = [one["scores"][label] for one in each]
    for name, line in LINES.items():
        if name not in scores:
            continue
        group = [name, f"{name}, selected"] + ([line.against] if line.against in scores else [])
        made += _compared(key, {label: scores[label] for label in group}, {line.against} - {""}, line.against or None)
    cheap = {label: each for label, each in scores.items() if label not in LINES and not label.endswith(", selected")}
    made += _compared(key, cheap, set(cheap), None)
    for name in ROWS[key].lines:
        made += _others(key, name, found[name])
    unique = {(row["method"], row["task"], row["metric"], "paired_difference" in row): row for row in made}
    paired = {k[:3] for k in unique if k[3]}
    return [row for k, row in unique.items() if k[3] or k[:3] not in paired]


def _kept(work: Path, key: str, name: str) -> list[dict[str, Any]]:
    slug = name.replace(", ", "-").replace(" ", "_")
    files = sorted((work / key).glob(f"{slug}-[0-9]*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
    return [json.loads(file.read_text()) for file in files]


def _compared(key: str, scores: dict[str, Any], baselines: set[str], against: str | None) -> list[dict[str, Any]]:
    seeds, made = min(map(len, scores.values()), default=0), []
    if not seeds:
        return []
    for task in next(iter(scores.values()))[0]:
        each = {label: [_scores(one[task]) for one in kept[:seeds]] for label, kept in scores.items()}
        made += ledger_rows(each, f"{ROWS[key].name}, {task}", baselines=baselines, against=against)
    return made


def _others(key: str, name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peaks, times and trust of one line."""
    values: dict[tuple[str, str], list[float]] = {}
    for one in found:
        points = [Point(step, -1.0 if v is None else v, test) for step, v, test in one["points"] if test is not None]
        three = stages(points)
        values.setdefault(("accuracy at the peak, chosen on the test", "%"), []).append(three.peak.test)
        values.setdefault(("last less peak", "points"), []).append(three.last.test - three.peak.test)
        values.setdefault(("recovery time", "s a model"), []).append(one["seconds"]["a model"])
        told = one["selection"]
        if "trust" in told and one["attacks"]:
            honest = sum(t for n, t in zip(told["models"], told["trust"], strict=True) if n not in one["attacks"])
            values.setdefault(("trust in honest models", "%"), []).append(100 * honest)
    made = []
    for (metric, unit), each in values.items():
        span = t_interval(each)
        row = {"method": name, "task": ROWS[key].name, "metric": metric, "unit": unit}
        made.append(row | {"mean": span.mean, "low": span.low, "high": span.high, "n": len(each)})
    return made


def _scores(kept: dict[str, Any]) -> Scores:
    return Scores(kept["episodes"], kept["scenario"], {m: tuple(each) for m, each in kept["values"].items()})


def write_ledger(work: Path, out: Path, command: str) -> None:
    """docs/results/datafree.json, and its accuracies on the screen."""
    keys = [key for key in ROWS if (work / key).is_dir()]
    rows = [row for key in keys for row in rows_of(work, key)]
    if not rows:
        return
    ledger = {
        "name": "datafree",
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {
            "pool": "base classes: 64 % of each set's classes, of Omniglot the background characters",
            "training": "models, class lists, noise",
            "selection": "pseudo-tasks of recovered images",
            "test": "600 episodes of unseen classes",
        },
        "seeds": list(range(max(len(_kept(work, key, name)) for key in keys for name in ROWS[key].lines))),
        "rows": rows,
        "notes": f"{max(4, round(STEPS * BUDGET[0]))} outer steps a line. One pool a row, for all lines and seeds. A line is"
        " the end of its training; `selected` is what pseudo-tasks chose; a peak was chosen on the test and is no result.",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "datafree.json").write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\ndatafree\n{to_text(main_table({'rows': rows}, 'accuracy'))}", flush=True)


def estimate(work: Path, keys: list[str], names: list[str], seeds: int) -> None:
    """Seconds of each line at its own size: from a pool of one model of each network and a few steps."""
    from spolia.methods.datafree.combination import combined

    clock, total = time.process_time, 0.0
    for key in keys:
        problem = problem_of(key, False)
        experts = 2 * len(problem.data) * len(problem.archs)
        small = problem.model_copy(update={"experts": experts, "epochs": 1, "corrupted": 0.0})
        held, start = classes_of(small, 0), clock()
        pool, _ = make_pool(small, held, 0, work / "estimate" / key, Journal())
        once = (clock() - start) / experts * problem.epochs * problem.experts
        print(f"{key} pool: {once:.0f} s of one core, once", flush=True)
        total += once
        for name in [n for n in ROWS[key].lines if n in names]:
            settings, marks = settings_of(name, problem, False), []
            for steps in (2, 6):
                few = settings.model_copy(update={"steps": steps, "warm_up": 0, "suspects": "keep"})
                network, start = learner_network(problem, pool, 0), clock()
                learner = combined(pool, network, few, seed=0, embed=features)
                marks.append(clock() - start)
            start = clock()
            judge_of(problem.model_copy(update={"episodes": 6}), held, 0).scores(learner.predict)
            asked = (clock() - start) / 6 * problem.episodes * 2
            seconds = (marks[1] - marks[0]) / 4 * settings.steps + asked
            total += seeds * seconds
            print(f"{key} {name}: {seconds:.0f} s of one core a seed, {asked:.0f} s of them test", flush=True)
    print(f"all, {seeds} seeds: {total / 3600:.1f} hours of one core")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default=",".join(ROWS), help="pools")
    parser.add_argument("--lines", default=";".join((FREE_LINES, ORACLE, *LINES)), help="parted by semicolons")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="factor of all outer steps; another work folder for each"
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument(
        "--json", type=Path, default=measure.REPOSITORY / "docs" / "results", help="folder of the ledger"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    BUDGET[0] = asked.budget
    data_folder()
    keys, names = asked.only.split(","), asked.lines.split(";")
    if asked.quick and asked.json == measure.REPOSITORY / "docs" / "results":
        parser.error("with --quick also --json FOLDER")
    if asked.estimate:
        estimate(asked.work, keys, names, asked.seeds)
        return
    for seed in range(asked.seeds):
        for key in keys:
            for name in [n for n in (FREE_LINES, ORACLE, *ROWS[key].lines) if n in names]:
                stage(asked.work, key, name, seed, asked.quick)
        write_ledger(asked.work, asked.json, "python benchmarks/datafree.py --work FOLDER")


if __name__ == "__main__":
    main()

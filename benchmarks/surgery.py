"""What surgery costs, beside the scheme of the papers' published programs written out.

    python benchmarks/surgery.py                 six blocks of width 256, eight tasks
    python benchmarks/surgery.py --size normal   the size of a ViT-B/32
    python benchmarks/surgery.py --quick         tiny: does everything run?

Both sides fit the same parameters on the same batches, one thread each; they are compared after three steps before anything
is timed. A step of a task is timed over a few steps; a whole fit is what comes before once, and a thousand times that for
every task.
Writes docs/results/surgery_cost.json, or where `--json` says; a quick run only there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

WORK = str(Path(__file__).resolve().with_name("surgery_work.py"))
STEPS = {"quick": (3, 20), "small": (2, 20), "normal": (1, 4)}  # of the naive side, of ours
TASKS = {"quick": 3, "small": 8, "normal": 8}
PAPER = 1000  # steps of a task
METHODS = ("surgery", "deep")
NOTES = (
    "mean is the median of n turns, low and high the extremes; of a ratio, mean is the ratio of medians. naive: the published "
    "scheme written from its description: for every step of every task it merges anew, reads the expert's checkpoint, runs "
    "both encoders and sends gradients into every copy of the weights. A step is one batch of 16 of one task. whole fit: all "
    "tasks, what comes before the steps once and, where there are steps, 1000 times the measured step of every task. One "
    "thread a process; random weights and inputs, 128 a task. The import of torch is left out. Peak is resident memory of the "
    "process."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "normal"], default="small")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    size = "quick" if asked.quick else asked.size
    with tempfile.TemporaryDirectory() as spare:
        folder = (asked.work or Path(spare)).resolve() / size
        if not (folder / "inputs.safetensors").exists():
            measure.ask([sys.executable, WORK, "make", str(folder), size])
        rows = []
        for method in METHODS:
            found = json.loads(measure.ask([sys.executable, WORK, "compare", method, str(folder), size]))
            print(f"{method}: parameters differ by {found['rms']:.1e} (rms) after three steps", flush=True)
            # A tenth of one step of Adam, which takes a whole step where a gradient all but zero has another sign.
            if found["rms"] > 0.1 * found["step"]:
                raise SystemExit(f"{method}: the two sides do not compute the same")
            rows += measured(method, folder, size, asked.repeats)
    measure.print_table([["method", "task", "metric", "median"], *([*map(str, _line(r))] for r in rows)])
    file = asked.json or (None if asked.quick else measure.REPOSITORY / "docs" / "results" / "surgery_cost.json")
    if file is not None:
        write(file, rows, size)


def measured(method: str, folder: Path, size: str, repeats: int) -> list[dict[str, object]]:
    """Rows of one method: seconds of a step and of 1000 steps on both sides and of the closed form, memory, ratios."""
    few, more = STEPS[size]
    closed = f"{method}, closed form"
    sides = {"naive": (method, few), "spolia": (method, more), "closed form": (closed, 0)}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    log = folder / "log.txt"
    for _ in range(repeats):
        for side, (what, steps) in sides.items():
            program = "naive" if side == "naive" else "spolia"
            used = measure.process([sys.executable, WORK, program, what, str(folder), size, str(steps)], log)
            told = json.loads(log.read_text().splitlines()[-1])
            step = told["steps"] / (steps * TASKS[size]) if steps else 0.0
            whole = told["before"] + PAPER * TASKS[size] * step
            found[side].append({"step": step, "whole": whole, "peak": used.peak / 1e6})
    rows = []
    for side, runs in found.items():
        mark = {"baseline": True} if side == "naive" else {}
        if side != "closed form":
            rows.append(measure.row(side, method, "step of a task", "s", [r["step"] for r in runs], **mark))
        rows.append(measure.row(side, method, "whole fit", "s", [r["whole"] for r in runs], **mark))
        rows.append(measure.row(side, method, "peak memory", "MB", [r["peak"] for r in runs], **mark))
    for side in ("spolia", "closed form"):
        for metric, key in (("times faster", "whole"), ("times less memory", "peak")):
            ratios = [a[key] / b[key] for a, b in zip(found["naive"], found[side], strict=True)]
            of_medians = _median(found["naive"], key) / _median(found[side], key)
            rows.append({**measure.row(side, method, metric, "1", ratios), "mean": float(f"{of_medians:.4g}")})
    return rows


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _line(row: dict[str, object]) -> list[object]:
    return [row["method"], row["task"], row["metric"], f"{row['mean']} {row['unit']}"]


def write(file: Path, rows: list[dict[str, object]], size: str) -> None:
    ledger = {
        "name": file.stem,
        "command": shlex.join(["python", "benchmarks/surgery.py", *(["--size", size] if size == "normal" else [])]),
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "versions": {"spolia": measure.versions(sys.executable, ["spolia", "torch", "numpy", "safetensors"])},
        "data": {"surgery": "random weights and inputs, made on the spot; no data set is touched"},
        "seeds": [0],
        "rows": rows,
        "notes": NOTES,
    }
    file.write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\nwritten: {file}")


if __name__ == "__main__":
    main()

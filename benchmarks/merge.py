"""Merging checkpoints: time and memory of whole processes, beside mergekit and beside plain copying.

    python benchmarks/merge.py --peer PATH/TO/ENVIRONMENT      every row, medians of 3 runs taken in turn
    python benchmarks/merge.py --install-peer                  the same, with mergekit installed into the work folder
    python benchmarks/merge.py --quick                         tiny models: does everything run?

Results are compared before anything is timed. The rows stand in merge_rows.py; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from measure import Usage, cell, median
from merge_rows import DENSITY, GAMMA, NAMED, OTHERS, ROWS, Row, recipe, title
from merge_work import SIZES

PEER = "mergekit==0.1.5"
SEED = 0
SIDES = "spolia,mergekit,copy"
STARTS = ("--help", "import")  # the tasks of row 0
WORK = str(Path(__file__).resolve().with_name("merge_work.py"))
# Shares that results may differ by. rounding: both sides compute in float32 and round once, so almost every element is
# equal and none is further off than one bf16 step, or fp32's error where a sum cancels. cut, variance: the same away
# from ties. random: two draws at density 0.2 from 10^5 elements or more differ by less than 0.01 (seven standard
# deviations).
LIMITS = {"different": 1e-3, "beyond": 0.0, "kept": 0.01, "norm": 0.03}
NOTES = (
    "mean is the median of n whole processes run in turn, low and high the extremes; of a ratio, mean is the ratio of "
    "medians, low and high those of single turns. A row with a run slower than --slow is run once. Peak is resident memory "
    "of the process, mapped files included. Inputs lie in the page cache. copy: a loop that reads every input and writes "
    "one model, without torch. mergekit is timed in its default arithmetic, bfloat16, and compared, on models of 0.11 GB, in "
    "float32, or in float64 where its float32 sums over a whole tensor lose digits."
)


Found = tuple[list[dict], list[str]]  # rows of the ledger, and a line of the table


class Bench:
    """The work folder and the commands of each side."""

    def __init__(self, work: Path, sides: list[str], peer: Path | None, quick: bool):
        self.work, self.sides, self.peer, self.quick = work, sides, peer, quick
        self.log = work / "log.txt"
        self.unequal: list[str] = []

    def size(self, r: Row) -> str:
        return "quick" if self.quick else r.size

    def models(self, r: Row) -> Path:
        """The row's checkpoints, made on first use and kept."""
        size = self.size(r)
        folder = self.work / "models" / size
        if not (folder / "complete").exists():
            print(f"making {size} checkpoints …", flush=True)
            measure.ask([sys.executable, WORK, "make", str(folder), size, "3", str(SEED)])
            (folder / "complete").touch()
        return folder

    def inputs(self, r: Row) -> list[Path]:
        names = ["base"] * r.base + [f"expert-{k + 1}" for k in range(r.experts)]
        return [self.models(r) / name for name in names]

    def command(self, side: str, r: Row, out: Path, dtype: str = "") -> list[str]:
        file = self.work / f"{side}-{r.key}.yml"
        file.write_text(recipe(r, self.models(r), SIZES[self.size(r)][2], dtype))
        if side == "spolia":
            return [str(Path(sys.executable).with_name("spolia")), "merge", str(file), str(out)]
        if side == "mergekit":
            # Its model card needs the hub and fails after the weights are written; there is no tokenizer to copy.
            flags = ["--no-write-model-card", "--no-copy-tokenizer", "--random-seed", str(SEED)]
            return [str(self.peer / "bin" / "mergekit-yaml"), str(file), str(out), *flags]
        files = [str(path) for model in self.inputs(r) for path in sorted(model.glob("*.safetensors"))]
        size = sum(path.stat().st_size for path in self.inputs(r)[0].glob("*.safetensors"))
        return [sys.executable, "-S", WORK, "copy", str(out), str(size), *files]

    def run(self, side: str, r: Row, dtype: str = "") -> Usage:
        """One measured process. Its result stays in the work folder until the side's next run."""
        out = self.out(side)
        shutil.rmtree(out.parent, ignore_errors=True)  # with what a run that failed left beside it, to go on with
        out.parent.mkdir(parents=True)
        if side == "copy":
            out.mkdir()
            return measure.process(self.command(side, r, out / "model.safetensors"), self.log)
        return measure.process(self.command(side, r, out, dtype), self.log)

    def out(self, side: str) -> Path:
        return self.work / "out" / side / "merged"

    def check(self, r: Row) -> dict[str, float]:
        """Merge small models on both sides, the peer in arithmetic as wide as ours, and compare every element."""
        r = dataclasses.replace(r, size="small")
        self.run("spolia", r)
        self.run("mergekit", r, r.precision)
        experts = [str(self.models(r) / f"expert-{k + 1}") for k in range(r.experts)]
        cuts = [str(DENSITY), str(GAMMA if "gamma" in r.each else 0)]
        folders = [str(self.out("spolia")), str(self.out("mergekit")), str(self.models(r) / "base")]
        return json.loads(measure.ask([sys.executable, WORK, "compare", r.check, *folders, *cuts, *experts]))


def merge_row(bench: Bench, r: Row, repeats: int, slow: float, check: bool, peaks: dict[str, float]) -> Found:
    """Check, then time one merge, the sides in turn. Ledger rows and a table line; nothing where the results differ."""
    name, ledger = title(r, bench.quick), []
    sides = [side for side in bench.sides if side != "mergekit" or r.peer]
    bench.models(r)
    if check and {"spolia", "mergekit"} <= set(sides):
        found = bench.check(r)
        print(f"{r.key} {name}: " + ", ".join(f"{k} {v:.2e}" for k, v in found.items()), flush=True)
        off = [k for k, v in found.items() if v > LIMITS.get(k, 1)]
        if off and not bench.quick:  # shares of a tiny model are too coarse for the limits
            bench.unequal.append(f"{name}: {', '.join(off)} over the limit")
            return [], []  # times of unequal results mean nothing
        told = f"from mergekit in {r.precision}"
        ledger += [measure.row("spolia", name, f"{k} {told}", "1", [v]) for k, v in found.items()]
    runs = measure.in_turn({side: lambda side=side: bench.run(side, r) for side in sides}, repeats, slow)
    ledger += measure.usage_rows(name, runs, "spolia", "mergekit")
    peaks[r.key] = median(runs, "spolia", "peak")
    return ledger, _line(r, name, runs, peaks, bench.quick)


def starts(bench: Bench, repeats: int) -> tuple[list[dict], list[list[str]]]:
    """Row 0: what each command and each import costs before any work."""
    ours, theirs = Path(sys.executable), (bench.peer or Path()) / "bin" / "python"
    commands = {
        "--help": {
            "spolia": [str(ours.with_name("spolia")), "--help"],
            "mergekit": [str(theirs.with_name("mergekit-yaml")), "--help"],
        },
        "import": {
            "spolia": [str(ours), "-c", "import spolia, torch; spolia.merge"],
            "mergekit": [str(theirs), "-c", "from mergekit.merge import run_merge"],
            "torch": [str(ours), "-c", "import torch"],
        },
    }
    ledger, table = [], [["row", "start", "mergekit", "spolia", "torch", "demand", "met"]]
    for task, sides in commands.items():
        asked = [*bench.sides, "torch"]
        runs = measure.in_turn(
            {s: lambda c=c: measure.process(c, bench.log) for s, c in sides.items() if s in asked}, repeats
        )
        ledger += measure.usage_rows(task, runs, "spolia", "mergekit")
        wall, peak = median(runs, "spolia", "wall"), median(runs, "spolia", "peak")
        demand, met = "< 0.5 s", wall < 0.5
        if task == "import":
            demand = "torch + 0.3 s, + 30 MB"
            met = wall <= median(runs, "torch", "wall") + 0.3 and peak <= median(runs, "torch", "peak") + 30e6
        cells = [cell(runs, side) for side in ("mergekit", "spolia", "torch")]
        table.append(["0", task, *cells, demand, _told(met) if "spolia" in runs else ""])
        print("  ".join(table[-1]), flush=True)
    return ledger, table


def _line(r: Row, name: str, runs: dict[str, list[Usage]], peaks: dict[str, float], quick: bool) -> list[str]:
    """One line of the table; `met` is empty where a side was not run, or on tiny models, which show start-up alone."""
    faster = median(runs, "mergekit", "wall") / median(runs, "spolia", "wall")
    memory = median(runs, "spolia", "peak") / median(runs, "mergekit", "peak")
    if not r.peer:
        demand, met, known = "", False, False
    elif r.faster and r.memory:
        demand, met = f"≥ {r.faster:g}×, ≤ 1/{1 / r.memory:g}", faster >= r.faster and memory <= r.memory
        known = faster == faster
    else:  # 16 MB: run-to-run spread of a process's peak is a few MB
        demand, known = "peak of 1a", "1a" in peaks and peaks["1a"] == peaks["1a"]
        met = known and peaks[r.key] <= peaks["1a"] + 16e6
    cells = [cell(runs, side) for side in ("mergekit", "spolia", "copy")]
    ratio = [f"{faster:.1f}×", f"1/{1 / memory:.1f}"] if faster == faster else ["–", "–"]
    return [r.key, name, *cells, *ratio, demand, _told(met) if known and not quick else ""]


def _told(met: bool) -> str:
    return "yes" if met else "NO"


def find_peer(peer: str | None, install: bool, work: Path) -> Path | None:
    """The environment mergekit stands in, installed on request; None leaves its side out."""
    folder = Path(peer).absolute() if peer else work / "peer"
    folder = folder.parent.parent if folder.is_file() else folder  # its interpreter was given; a link not to follow
    if not (folder / "bin" / "mergekit-yaml").exists() and install and not peer:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", PEER], check=True)
    return folder if (folder / "bin" / "mergekit-yaml").exists() else None


def chosen(asked: str) -> list[str]:
    """Keys of the rows asked for by key or by method, 0 first. Unknown names end the program."""
    words = [word for word in asked.split(",") if word]
    known = {"0", *(name for r in ROWS for name in (r.key, r.method))}
    if odd := [word for word in words if word not in known]:
        raise SystemExit(f"--only: no row is called {', '.join(odd)}; known: {', '.join(sorted(known))}")
    keys = ["0"] if "0" in words or not words else []
    return keys + [r.key for r in ROWS if not words or r.key in words or r.method in words]


def ledgers(bench: Bench, told: argparse.Namespace) -> dict[str, measure.Ledger]:
    """Where each row's results are kept, by its key; empty where they are not."""
    whole_sides = bench.peer and set(bench.sides) == set(SIDES.split(","))
    if not told.json and (bench.quick or not whole_sides):
        return {}
    words = ["python", "benchmarks/merge.py", "--peer", "ENVIRONMENT", "--repeats", str(told.repeats)]
    words += ["--slow", f"{told.slow:g}"] if told.slow < math.inf else []
    words += ["--only", told.only] if told.only and told.json else []  # a ledger of its own; else the rest is kept
    used = {"spolia": measure.versions(sys.executable, ["spolia", "torch", "numpy", "safetensors"])}
    if bench.peer:
        packages = ["mergekit", "torch", "transformers", "safetensors"]
        used["mergekit's environment"] = measure.versions(str(bench.peer / "bin" / "python"), packages)

    def ledger(path: Path, rows: tuple[Row, ...], first: tuple[str, ...]) -> measure.Ledger:
        tasks = [*first, *(title(r, bench.quick) for r in rows)]
        data = {"merge": "random sharded bf16 checkpoints in Llama layout, made on the spot; no data set is touched"}
        return measure.Ledger(path, shlex.join(words), tasks, used, data, [SEED], NOTES)

    if told.json:
        one = ledger(Path(told.json), ROWS, STARTS)
        return dict.fromkeys(("0", *(r.key for r in ROWS)), one)
    results = measure.REPOSITORY / "docs" / "results"
    named = ledger(results / "merge_speed.json", NAMED, STARTS)
    others = ledger(results / "merge_speed_all.json", OTHERS, ())
    return {"0": named} | {r.key: named for r in NAMED} | {r.key: others for r in OTHERS}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of merging, beside mergekit.")
    parser.add_argument("--work", help="folder for checkpoints and results, 8 GB; kept. Default: a temporary one")
    parser.add_argument("--peer", help="environment folder (or its python) that has mergekit")
    parser.add_argument("--install-peer", action="store_true", help=f"install {PEER} into the work folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow", type=float, default=math.inf, help="rows with a run of more seconds are run once")
    parser.add_argument("--only", default="", help="some rows, by key or method: 0,1e,karcher. Default: every row")
    parser.add_argument("--sides", default=SIDES, help="default: %(default)s")
    parser.add_argument("--no-check", action="store_true", help="do not compare results first")
    parser.add_argument("--quick", action="store_true", help="tiny models, one run each, nothing kept")
    parser.add_argument("--json", help="one file for every row, in place of docs/results/merge_speed(_all).json")
    return parser.parse_args()


def main() -> None:
    told = parsed()
    keys = chosen(told.only)
    with tempfile.TemporaryDirectory(prefix="merge-") as temporary:
        work = Path(told.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        peer = find_peer(told.peer, told.install_peer, work)
        sides = [side for side in told.sides.split(",") if side != "mergekit" or peer]
        if peer is None:
            print("mergekit is not there (--peer or --install-peer); its side is left out")
        bench = Bench(work, sides, peer, told.quick)
        repeats = 1 if told.quick else told.repeats
        kept = ledgers(bench, told)
        tasks = [*(STARTS if "0" in keys else ()), *(title(r, told.quick) for r in ROWS if r.key in keys)]
        for ledger in {id(ledger): ledger for ledger in kept.values()}.values():
            ledger.require_one_machine(tasks)
        if "0" in keys:
            rows, table = starts(bench, repeats)
            if kept:
                kept["0"].add(rows)
            measure.print_table(table)
        table = [["row", "merge", "mergekit", "spolia", "copy", "faster", "peak", "demand", "met"]]
        peaks: dict[str, float] = {}
        for r in (r for r in ROWS if r.key in keys):
            rows, line = merge_row(bench, r, repeats, told.slow, not told.no_check, peaks)
            if line:
                table.append(line)
                print("  ".join(line), flush=True)
            if kept and rows:
                kept[r.key].add(rows)
        if len(table) > 1:
            measure.print_table(table)
        if bench.unequal:
            raise SystemExit("\n".join(["not timed, because the results differ:", *bench.unequal]))


if __name__ == "__main__":
    main()

"""Merging checkpoints: time and memory of whole processes, beside mergekit and beside plain copying.

    python benchmarks/merge.py --peer PATH/TO/ENVIRONMENT      every row, medians of 3 runs taken in turn
    python benchmarks/merge.py --install-peer                  the same, with mergekit installed into the work folder
    python benchmarks/merge.py --quick                         tiny models: does everything run?

Results are compared before anything is timed. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from measure import Usage, cell, median

PEER = "mergekit==0.1.5"
DENSITY, GAMMA, SEED = 0.2, 0.01, 0
# About 0.3. Round weights put sums of bf16 numbers exactly between two others, where the last fp32 bit decides.
WEIGHTS = (0.4321, 0.3457, 0.2222)
SIDES = "spolia,mergekit,copy"
LEDGER = "docs/results/merge_speed.json"
WORK = str(Path(__file__).resolve().with_name("merge_work.py"))


@dataclass(frozen=True)
class Row:
    """One merge. We demand that the peer takes `faster` times our seconds or more, we `memory` of its peak or less."""

    key: str
    method: str
    parameters: str  # of every expert beside its weight, as they stand in the recipe
    experts: int
    base: bool
    faster: float | None
    memory: float | None
    check: str  # how the results must agree: rounding, cut or random
    top: str = ""
    size: str = "normal"


_KEEP = f", density: {DENSITY}"
ROWS = (
    Row("1a", "linear", "", 3, False, 3, 1 / 4, "rounding"),
    Row("1b", "task_arithmetic", "", 3, True, 3, 1 / 4, "rounding"),
    Row("1c", "slerp", "", 1, True, 3, 1 / 4, "rounding", top="parameters: {t: 0.4}\n"),
    Row("1d", "dare_ties", _KEEP, 3, True, 4, 1 / 4, "random"),
    Row("1e", "ties", _KEEP, 3, True, 6, 1 / 5, "cut"),
    Row("1f", "breadcrumbs", f"{_KEEP}, gamma: {GAMMA}", 3, True, 5, 1 / 5, "cut"),
    Row("1g", "della", _KEEP, 3, True, 2, 1 / 5, "random"),
    Row("1h", "linear", "", 3, False, None, None, "rounding", size="double"),
)
ROW_KEYS = "0," + ",".join(r.key for r in ROWS)
# Shares that results may differ by. rounding: both sides compute in float32 and round once, so almost every element is
# equal and none is further off than one bf16 step, or fp32's error where a sum cancels. cut: the same away from ties.
# random: two draws at density 0.2 from 10^5 elements or more differ by less than 0.01 (seven standard deviations).
LIMITS = {"different": 1e-3, "beyond": 0.0, "kept": 0.01, "norm": 0.03}


def recipe(r: Row, models: Path, dtype: str = "") -> str:
    """The merge as a mergekit recipe, which both sides read."""
    lines = [f"merge_method: {r.method}\n", r.top, dtype]
    if r.base:
        lines.append(f"base_model: {models / 'base'}\n")
    lines.append("models:\n")
    if r.method == "slerp":
        lines.append(f"  - model: {models / 'base'}\n")
    for k in range(r.experts):
        lines.append(f"  - model: {models / f'expert-{k + 1}'}\n")
        if r.method != "slerp":
            lines.append(f"    parameters: {{weight: {WEIGHTS[k]}{r.parameters}}}\n")
    return "".join(lines)


class Bench:
    """The work folder and the commands of each side."""

    def __init__(self, work: Path, sides: list[str], peer: Path | None, quick: bool):
        self.work, self.sides, self.peer, self.quick = work, sides, peer, quick
        self.log = work / "log.txt"
        self.unequal: list[str] = []

    def models(self, r: Row) -> Path:
        """The row's checkpoints, made on first use and kept."""
        size = "quick" if self.quick else r.size
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
        file.write_text(recipe(r, self.models(r), dtype))
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
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        if side == "copy":
            out.mkdir()
            return measure.process(self.command(side, r, out / "model.safetensors"), self.log)
        return measure.process(self.command(side, r, out, dtype), self.log)

    def out(self, side: str) -> Path:
        return self.work / "out" / side

    def check(self, r: Row) -> dict[str, float]:
        """Merge once on both sides, the peer in float32 arithmetic as we always do, and compare every element."""
        self.run("spolia", r)
        self.run("mergekit", r, "dtype: float32\nout_dtype: bfloat16\n")
        experts = [str(self.models(r) / f"expert-{k + 1}") for k in range(r.experts)]
        cuts = [str(DENSITY), str(GAMMA if "gamma" in r.parameters else 0)]
        folders = [str(self.out("spolia")), str(self.out("mergekit")), str(self.models(r) / "base")]
        return json.loads(measure.ask([sys.executable, WORK, "compare", r.check, *folders, *cuts, *experts]))


def title(r: Row, quick: bool) -> str:
    size = "tiny" if quick else {"normal": "0.51 GB", "double": "1.03 GB"}[r.size]
    return f"{r.method}, {r.experts + r.base} × {size}"


def merges(bench: Bench, rows: list[Row], repeats: int, check: bool) -> tuple[list[dict], list[list[str]]]:
    """Check, then time every row, the sides in turn. Ledger rows and table lines."""
    ledger: list[dict] = []
    table = [["row", "merge", "mergekit", "spolia", "copy", "faster", "peak", "demand", "met"]]
    peaks: dict[str, float] = {}
    for r in rows:
        name = title(r, bench.quick)
        bench.models(r)
        if check and {"spolia", "mergekit"} <= set(bench.sides):
            found = bench.check(r)
            print(f"{r.key} {name}: " + ", ".join(f"{k} {v:.2e}" for k, v in found.items()), flush=True)
            off = [k for k, v in found.items() if v > LIMITS.get(k, 1)]
            if off and not bench.quick:  # shares of a tiny model are too coarse for the limits
                bench.unequal.append(f"{name}: {', '.join(off)} over the limit")
                continue  # times of unequal results mean nothing
            ledger += [measure.row("spolia", name, f"{k} from mergekit in float32", "1", [v]) for k, v in found.items()]
        runs = measure.in_turn({side: lambda side=side, r=r: bench.run(side, r) for side in bench.sides}, repeats)
        ledger += measure.usage_rows(name, runs, "spolia", "mergekit")
        peaks[r.key] = median(runs, "spolia", "peak")
        table.append(_line(r, name, runs, peaks, bench.quick))
        print("  ".join(table[-1]), flush=True)
    return ledger, table


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
    if r.faster and r.memory:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of merging, beside mergekit.")
    parser.add_argument("--work", help="folder for checkpoints and results, 8 GB; kept. Default: a temporary one")
    parser.add_argument("--peer", help="environment folder (or its python) that has mergekit")
    parser.add_argument("--install-peer", action="store_true", help=f"install {PEER} into the work folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default=ROW_KEYS, help="default: %(default)s")
    parser.add_argument("--sides", default=SIDES, help="default: %(default)s")
    parser.add_argument("--no-check", action="store_true", help="do not compare results first")
    parser.add_argument("--quick", action="store_true", help="tiny models, one run each, nothing kept")
    parser.add_argument("--json", help=f"where the ledger goes. Default: {LEDGER} after a whole run")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-") as temporary:
        work = Path(told.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        peer = find_peer(told.peer, told.install_peer, work)
        sides = [side for side in told.sides.split(",") if side != "mergekit" or peer]
        if peer is None:
            print("mergekit is not there (--peer or --install-peer); its side is left out")
        bench = Bench(work, sides, peer, told.quick)
        repeats = 1 if told.quick else told.repeats
        asked = told.rows.split(",")
        start = starts(bench, repeats) if "0" in asked else ([], [])
        merged = merges(bench, [r for r in ROWS if r.key in asked], repeats, not told.no_check)
        for _, table in (start, merged):
            if len(table) > 1:
                measure.print_table(table)
        whole = peer and sides == told.sides.split(",") == SIDES.split(",") and told.rows == ROW_KEYS and not told.quick
        if told.json or whole:  # a run of some rows or one side must not replace the ledger
            path = Path(told.json) if told.json else measure.REPOSITORY / LEDGER
            _write(path, bench, start[0] + merged[0], told)
        if bench.unequal:
            raise SystemExit("\n".join(["not timed, because the results differ:", *bench.unequal]))


def _write(path: Path, bench: Bench, rows: list[dict], told: argparse.Namespace) -> None:
    used = {"spolia": measure.versions(sys.executable, ["spolia", "torch", "numpy", "safetensors"])}
    if bench.peer:
        peer = measure.versions(
            str(bench.peer / "bin" / "python"), ["mergekit", "torch", "transformers", "safetensors"]
        )
        used["mergekit's environment"] = peer
    words = ["python", "benchmarks/merge.py", "--peer", "ENVIRONMENT", "--repeats", str(told.repeats)]
    words += ["--rows", told.rows] if told.rows != ROW_KEYS else []
    measure.write_ledger(
        path,
        "merge_speed",
        shlex.join(words),
        rows,
        versions=used,
        data={"merge": "random sharded bf16 checkpoints in Llama layout, made on the spot; no data set is touched"},
        seeds=[SEED],
        notes="mean is the median of n whole processes run in turn, low and high the extremes; of a ratio, mean is the "
        "ratio of medians, low and high those of single turns. Peak is resident memory of the process, mapped files "
        "included. Inputs lie in the page cache. copy: a loop that reads every input and writes one model, without "
        "torch. mergekit is timed in its default arithmetic, bfloat16, and compared in float32.",
    )
    print(f"\nwritten: {path}\nmachine: {measure.machine()['cpu']}, {measure.machine()['cores']} cores")


if __name__ == "__main__":
    main()

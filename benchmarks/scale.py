"""The cost model at 1 % of 8 × 70B: a base and eight experts of 0.7 B elements in bf16, merged by one process and by two.

    python benchmarks/scale.py                     measures, prints, writes docs/results/merge_scale.json; 15 GB of disk
    python benchmarks/scale.py --quick             tiny models, nothing kept: does everything run?
    python benchmarks/scale.py --work FOLDER       where the models go; removed at the end unless --keep

What `spolia plan` says of this disk and these cores stands beside what was measured. See docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from measure import Usage

LEDGER = "docs/results/merge_scale.json"
SEED, EXPERTS = 0, 8
METHODS = {"linear": "average", "TIES": "ties"}
# hidden, feed-forward, layers, keys and values, vocabulary
SIZES = {"normal": (2048, 5632, 13, 512, 32000), "quick": (64, 176, 2, 16, 500)}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an untied Llama; 717 million elements."""
    hidden, inner, layers, keys, vocabulary = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{i}.{name}.weight"] = shape
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make(folder: str, size: str) -> None:
    """Write base and experts. An expert's bf16 numbers lie up to eight steps from the base's, drawn anew for each."""
    import numpy as np

    named = shapes(size)
    entries, at = {}, 0
    for name, shape in named.items():
        count = int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * count]}
        at += 2 * count
    text = json.dumps(entries).encode()
    models = [Path(folder, name) for name in ("base", *(f"expert-{k + 1}" for k in range(EXPERTS)))]
    for model in models:
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for i, shape in enumerate(named.values()):
        count = int(np.prod(shape))
        numbers = np.random.Generator(np.random.SFC64([SEED, i])).standard_normal(count, dtype=np.float32) * 0.02
        base = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        base |= np.uint16(16)  # eight steps below it is still a number
        for k, model in enumerate(models):
            steps = np.random.Generator(np.random.SFC64([SEED, i, k])).integers(0, 16, count, dtype=np.uint8)
            bits = base if k == 0 else base + steps.astype(np.uint16) - np.uint16(8)
            with (model / "model.safetensors").open("ab") as stream:
                bits.tofile(stream)


def several(commands: list[list[str]], log: Path) -> Usage:
    """Run the commands at the same time: seconds until the last has ended, the largest peak of one."""
    os.sync()
    with log.open("wb") as sink:
        start = time.perf_counter()
        children = [subprocess.Popen(c, stdout=sink, stderr=subprocess.STDOUT, cwd=log.parent) for c in commands]
        ended = [os.wait4(child.pid, 0) for child in children]
        wall = time.perf_counter() - start
    for child, (_, status, _) in zip(children, ended, strict=True):
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(log.read_text(errors="replace")[-2000:])
    used = [usage for _, _, usage in ended]
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(wall, sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) * unit)


def disk_rates(folder: Path, size: int) -> tuple[int, int]:
    """Bytes a second of reading a model as it lies, in memory or not, and of writing `size` bytes to the disk."""
    buffer, file = bytearray(os.urandom(1 << 20) * 4), folder / "rate"
    start, done = time.perf_counter(), 0
    with file.open("wb", buffering=0) as stream:
        while done < size:
            done += stream.write(buffer)
        os.fsync(stream.fileno())
    written = int(done / (time.perf_counter() - start))
    file.unlink()
    start, done = time.perf_counter(), 0
    with (folder / "base" / "model.safetensors").open("rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            done += got
    return int(done / (time.perf_counter() - start)), written


def measured(work: Path, method: str, processes: int, rates: tuple[int, int], threads: int) -> tuple[dict, Usage]:
    """The plan of one merge, and what it took."""
    recipe, out = work / f"{method}.yaml", work / "out"
    base = f"  base: {work / 'base'}\n" if method != "average" else ""
    experts = ", ".join(str(work / f"expert-{k + 1}") for k in range(EXPERTS))
    recipe.write_text(f"spolia: 1\npool:\n{base}  experts: [{experts}]\nmethod: {{name: {method}}}\n")
    command = str(Path(sys.executable).with_name("spolia"))
    asked = ["--threads", str(threads), "--processes", str(processes)]
    asked += ["--read-rate", str(rates[0]), "--write-rate", str(rates[1])]
    plan = json.loads(measure.ask([command, "plan", str(recipe), "--json", *asked]))
    merge = [command, "merge", str(recipe), str(out), "--threads", str(threads), "--quiet"]
    usage = several([[*merge, *(["--share"] if processes > 1 else [])]] * processes, work / "log.txt")
    shutil.rmtree(out)
    return plan, usage


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        make(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description="What the plan says of a merge, and what it takes.")
    parser.add_argument("--work", help="folder for the models, 15 GB. Default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="do not remove them at the end")
    parser.add_argument("--quick", action="store_true", help="tiny models, nothing kept")
    parser.add_argument("--json", help=f"where the ledger goes. Default: {LEDGER}")
    told = parser.parse_args()
    work = Path(told.work or tempfile.mkdtemp(prefix="scale-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    size = "quick" if told.quick else "normal"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    rows: list[dict[str, object]] = []
    try:
        if not (work / "base").exists():
            print("making models …", flush=True)
            measure.ask([sys.executable, __file__, "make", str(work), size])
        rates = disk_rates(work, (work / "base" / "model.safetensors").stat().st_size)
        print(f"reading {rates[0] / 1e9:.2f} GB/s, writing {rates[1] / 1e9:.2f} GB/s, load {load:.1f}", flush=True)
        for name, method in METHODS.items():
            for processes in (1, 2):
                task = f"{name}, {processes} process{'es' if processes > 1 else ''}"
                plan, used = measured(work, method, processes, rates, max(1, cores // processes))
                print(
                    f"{task}: plan {plan['seconds']:.1f} s, {plan['peak_memory_bytes'] / 1e6:.0f} MB; "
                    f"measured {used.wall:.1f} s ({used.cpu:.1f} CPU s), {used.peak / 1e6:.0f} MB",
                    flush=True,
                )
                rows += [
                    measure.row("plan", task, "wall time", "s", [plan["seconds"]], baseline=True),
                    measure.row("plan", task, "peak memory", "MB", [plan["peak_memory_bytes"] / 1e6], baseline=True),
                    measure.row("spolia", task, "wall time", "s", [used.wall]),
                    measure.row("spolia", task, "CPU time", "s", [used.cpu]),
                    measure.row("spolia", task, "peak memory", "MB", [used.peak / 1e6]),
                ]
        for metric, rate in zip(("reading", "writing"), rates, strict=True):
            rows.append(measure.row("disk", "one model", metric, "GB/s", [rate / 1e9], baseline=True))
        if not told.quick or told.json:
            write(Path(told.json) if told.json else measure.REPOSITORY / LEDGER, rows, load)
    finally:
        if not told.keep:
            shutil.rmtree(work)


def write(path: Path, rows: list[dict[str, object]], load: float) -> None:
    ledger = measure.Ledger(
        path,
        "python benchmarks/scale.py",
        list(dict.fromkeys(str(row["task"]) for row in rows)),
        {"spolia": measure.versions(sys.executable, ["spolia", "torch", "numpy"])},
        {"merge": "nine random bf16 checkpoints of 0.7 billion elements, made on the spot; no data set is touched"},
        [SEED],
        "One run each. Plan: what `spolia plan` says for these cores and the rates of this disk, measured beforehand by "
        "reading one model and writing one; inputs may lie in the page cache. Two processes have half the threads each; "
        "their CPU time is the sum, their peak that of the larger. "
        f"Load of the machine by other work when it began: {load:.1f}.",
    )
    ledger.add(rows)


if __name__ == "__main__":
    main()

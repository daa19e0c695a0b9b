"""The rank loss and its gradient, beside the formula as it is written down: seconds and memory.

    python benchmarks/ranking.py                 all cases, one thread; about ten minutes and 5 GB of memory
    python benchmarks/ranking.py --threads 2     the same with two
    python benchmarks/ranking.py --only 1000     cases of these numbers of classes
    python benchmarks/ranking.py --quick         small: does everything run?

Every way runs in processes of its own, in turn. Extra memory is the peak above what is resident once torch and the logits
are there. Losses and gradients are compared first, where the formula fits into memory with it, else with exact blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure

WAYS = {"hard_teacher": ("broadcast", "chunked", "sorted"), "product": ("broadcast", "chunked", "expansion")}
CASES = [(100, 64), (100, 256), (1000, 64), (1000, 256), (32_000, 64)]
QUICK = [(100, 8), (700, 4)]
STEEPNESS, TOLERANCE = 1.0, 1e-4
ALLOWED = {"chunked": 2e-6, "sorted": 1.2e-4, "expansion": 2.2e-4}  # rounding; tolerance once; twice
BROADCAST_MOST = 4000  # classes above which the formula does not fit
NOTES = (
    "Student's logits 2 N(0, 1), teacher's half the same and half new; k = 1, tanh, tolerance 1e-4. broadcast: the formula in "
    "plain torch and autograd. Times faster: of medians; mean, low and high over processes. 32,000 classes: no formula "
    "beside them, it asks for 4 GB a sample and intermediate result; peak memory is that of the whole process."
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=3, help="processes of every way")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", default="", help="numbers of classes, comma between")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--json", type=Path, help="where the results go; by default docs/results/ranking.json")
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.child:
        work(json.loads(asked.child[0]), Path(asked.child[1]))
        return
    only = {int(number) for number in asked.only.split(",") if number}
    cases = [case for case in (QUICK if asked.quick else CASES) if not only or case[0] in only]
    task_names = [name_of(form, *case, asked.threads) for case in cases for form in WAYS]
    ledger = None
    if asked.json or not asked.quick:
        path = asked.json or measure.REPOSITORY / "docs/results/ranking.json"
        versions = {"spolia": measure.versions(sys.executable, ["spolia", "torch"])}
        data = {"all": "random logits, made in memory"}
        everything = [name_of(form, *case, n) for n in (1, 2) for case in [*CASES, *QUICK] for form in WAYS]
        tasks = list(dict.fromkeys([*everything, *task_names]))
        ledger = measure.Ledger(path, "python benchmarks/ranking.py", tasks, versions, data, [0], NOTES)
    for classes, samples in cases:
        for form in WAYS:
            rows = measured(form, classes, samples, asked)
            print_rows(name_of(form, classes, samples, asked.threads), rows)
            if ledger is not None:
                ledger.add(rows)


def name_of(form: str, classes: int, samples: int, threads: int) -> str:
    return f"{form}, C = {classes}, B = {samples}, {threads} thread{'s' if threads > 1 else ''}"


def measured(form: str, classes: int, samples: int, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one case, after its results were compared."""
    one = {"form": form, "classes": classes, "samples": samples, "threads": asked.threads}
    ways = [way for way in WAYS[form] if way != "broadcast" or classes <= BROADCAST_MOST]
    gaps = child({**one, "samples": min(samples, 2 if classes > BROADCAST_MOST else 16), "ways": ways})[0]
    for way, gap in gaps["gaps"].items():
        print(
            f"{form}, C = {classes}: {way} differs by {gap[0]:.1e}, its gradient by {gap[1]:.1e} of 2 k / C", flush=True
        )
        if not max(gap) < ALLOWED[way]:
            raise SystemExit(f"{way} does not give what {ways[0]} gives")
    found: dict[str, list[tuple[dict, measure.Usage]]] = {way: [] for way in ways}
    for _ in range(1 if asked.quick else asked.repeats):
        for way in ways:
            found[way].append(child({**one, "way": way}))
    task, rows = name_of(form, classes, samples, asked.threads), []
    for way, runs in found.items():
        mark = {"baseline": True} if way == "broadcast" else {}
        rows.append(measure.row(way, task, "loss and gradient", "ms", [1e3 * a["seconds"] for a, _ in runs], **mark))
        rows.append(measure.row(way, task, "extra memory", "MB", [a["extra"] / 1e6 for a, _ in runs], **mark))
        rows.append(measure.row(way, task, "peak memory", "MB", [u.peak / 1e6 for _, u in runs], **mark))
    base = found[ways[0]]
    for way in ways[1:]:
        ratios = [a["seconds"] / b["seconds"] for (a, _), (b, _) in zip(base, found[way], strict=True)]
        medians = [statistics.median(a["seconds"] for a, _ in runs) for runs in (base, found[way])]
        row = measure.row(way, task, f"times faster than {ways[0]}", "1", ratios)
        rows.append({**row, "mean": float(f"{medians[0] / medians[1]:.4g}")})
    return rows


def print_rows(task: str, rows: list[dict]) -> None:
    print(f"\n{task}")
    measure.print_table(
        [["way", "metric", "median", "unit"], *([r["method"], r["metric"], f"{r['mean']:g}", r["unit"]] for r in rows)]
    )


def child(what: dict) -> tuple[dict, measure.Usage]:
    """What a process found, and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(what), str(out)]
        used = measure.process(command, Path(folder) / "log")
        return json.loads(out.read_text()), used


def work(what: dict, out: Path) -> None:
    """In a process of its own: compare the ways, or measure one."""
    import torch

    torch.set_num_threads(what["threads"])
    draws = torch.Generator().manual_seed(0)
    s, t = (torch.randn(what["samples"], what["classes"], generator=draws) for _ in range(2))
    s, t = 2 * s, s + 3**0.5 * t
    if "ways" in what:
        found = {way: result(way, what["form"], s, t) for way in what["ways"]}
        (loss, slope), *_ = found.values()
        unit = 2 * STEEPNESS / what["classes"]
        gaps = {
            way: (float((own - loss).abs().max()), float((gradient - slope).abs().max()) / unit)
            for way, (own, gradient) in list(found.items())[1:]
        }
        out.write_text(json.dumps({"gaps": gaps}))
        return
    result(what["way"], what["form"], s[:1], t[:1])  # imports, fits, first use of the libraries
    before = forget_peak()
    first = time.perf_counter()
    result(what["way"], what["form"], s, t)
    seconds = [time.perf_counter() - first]
    extra = peak() - before
    while len(seconds) < 3 or (sum(seconds) < 1 and len(seconds) < 50):
        start = time.perf_counter()
        result(what["way"], what["form"], s, t)
        seconds.append(time.perf_counter() - start)
    out.write_text(json.dumps({"seconds": statistics.median(seconds[1:]), "extra": max(extra, 0)}))


def result(way: str, form: str, s, t):
    """Losses [samples] and gradient [samples, classes] of their sum."""
    import torch

    from spolia.core.ranking import tau_loss
    from spolia.core.ranking_terms import Tau

    x = s.clone().requires_grad_()
    if way == "broadcast":
        count = x.shape[1]
        ds, dt = x.unsqueeze(2) - x.unsqueeze(1), t.unsqueeze(2) - t.unsqueeze(1)
        teacher = (STEEPNESS * dt).tanh() if form == "product" else dt.sign()
        loss = 1 - ((STEEPNESS * ds).tanh() * teacher).sum((1, 2)) / (count * (count - 1))
    else:
        loss = tau_loss(x, t, Tau(form, "tanh", STEEPNESS), None, way, TOLERANCE)
    loss.sum().backward()
    assert isinstance(x.grad, torch.Tensor)
    return loss.detach(), x.grad


def forget_peak() -> int:
    """Starts a new peak where the system allows it; resident bytes now, or the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return peak()


def peak() -> int:
    """Bytes: the high-water mark of Linux, which can be reset, else of the whole process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()

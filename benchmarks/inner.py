"""The inner loop of meta-learning: tasks a second beside a plain loop and other libraries, and memory against steps.

    python benchmarks/inner.py                        rows 3a and 3b, and memory; a few minutes
    python benchmarks/inner.py --peer ENVIRONMENT     also higher and learn2learn, if the python in there has them
    python benchmarks/inner.py --quick                a width of 8 and one round: does everything run?

Conv4 with 32 channels and batch norm, 32 x 32 pixels, 5-way 1-shot, 15 queries a class, 5 inner steps of sgd, 8 tasks an
outer step, random images. A side runs alone in processes of its own, in turn; a process warms up, then times whole
meta-gradients. All sides give the same gradient in fp64, which is compared first.

Sides: `spolia` (mode auto), its modes, `plain loop` (functional_call and autograd.grad, written here), the libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

OURS = ("spolia", "spolia, loop", "spolia, workers", "spolia, vmap")
PEERS = ("higher", "learn2learn")
ORDERS = {"first order": 1, "second order": 2}
WAYS, QUERIES, TASKS, STEPS, LR, PIXELS = 5, 15, 8, 5, 0.1, 32
MEMORY = ("unroll", "reverse")  # sides of the second table
MEMORY_STEPS = (1, 5, 10, 20)
LIMIT = 1e-8  # of the gradient's norm, in fp64: 3 convolutions' sums of 10^4, three decades above what is seen
NOTES = (
    "mean is the median over processes run in turn, low and high the extremes; of a ratio, mean is the ratio of medians. A "
    "process's number is the median of its outer steps after the first. Memory is the peak of a whole process that takes "
    "one meta-gradient of one task by the plain way through autograd's graph, less that of a process that takes no step"
)


# --- one process -----------------------------------------------------------------------------------------------------


def network(width: int) -> Any:
    """Conv4 with statistics of the batch: 3 channels to 5 logits."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(4):
        conv = nn.Conv2d(3 if i == 0 else width, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (PIXELS // 16) ** 2, WAYS))


def drawn(count: int, dtype: Any) -> list[tuple[Any, Any, Any, Any]]:
    """Tasks: support [5, 3, 32, 32] and query [75, 3, 32, 32] with their labels."""
    import torch

    draws, shape = torch.Generator().manual_seed(1), (3, PIXELS, PIXELS)
    y = torch.arange(WAYS)
    found = []
    for _ in range(count):
        x, q = (torch.randn(n, *shape, generator=draws).to(dtype) for n in (WAYS, WAYS * QUERIES))
        found.append((x, y, q, y.repeat_interleave(QUERIES)))
    return found


def step_of(name: str, net: Any, order: int, steps: int = STEPS) -> Callable[[list[Any]], list[Any]]:
    """The meta-gradient of a list of tasks, in the order of the net's parameters."""
    if name.startswith("spolia"):
        return ours(name, net, order, steps)
    return {"plain loop": plain, "higher": with_higher, "learn2learn": with_learn2learn}[name](net, order, steps)


def ours(name: str, net: Any, order: int, steps: int) -> Callable[[list[Any]], list[Any]]:
    from spolia.core.inner import Execution, Inner, InnerLoop, Task

    _, _, asked = name.partition(", ")
    gradient, mode = (asked, "loop") if asked in MEMORY else ("unroll", asked or "auto")
    loop = InnerLoop(net, Inner(steps, LR, order=order, gradient=gradient), Execution(mode))
    names = [n for n, _ in net.named_parameters()]

    def step(tasks: list[Any]) -> list[Any]:
        found = loop.gradient([Task.of(*task) for task in tasks]).gradient
        return [found[n] for n in names]

    step.loop = loop  # so that its choice can be told
    return step


def plain(net: Any, order: int, steps: int) -> Callable[[list[Any]], list[Any]]:
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    def step(tasks: list[Any]) -> list[Any]:
        weights = dict(net.named_parameters())
        total = [torch.zeros_like(p) for p in weights.values()]
        for x, y, q, z in tasks:
            fast = weights
            for _ in range(steps):
                loss = cross_entropy(functional_call(net, fast, (x,)), y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
                fast = {n: t - LR * g for (n, t), g in zip(fast.items(), slopes, strict=True)}
            loss = cross_entropy(functional_call(net, fast, (q,)), z)
            for t, g in zip(total, torch.autograd.grad(loss, list(weights.values())), strict=True):
                t += g / len(tasks)
        return total

    return step


def with_higher(net: Any, order: int, steps: int) -> Callable[[list[Any]], list[Any]]:
    import higher
    import torch
    from torch.nn.functional import cross_entropy

    sgd = torch.optim.SGD(net.parameters(), LR)

    def step(tasks: list[Any]) -> list[Any]:
        total = [torch.zeros_like(p) for p in net.parameters()]
        for x, y, q, z in tasks:
            with higher.innerloop_ctx(net, sgd, copy_initial_weights=False, track_higher_grads=order == 2) as (
                fast,
                inner,
            ):
                for _ in range(steps):
                    inner.step(cross_entropy(fast(x), y))
                reached = list(fast.parameters(time=0) if order == 2 else fast.parameters())
                found = torch.autograd.grad(cross_entropy(fast(q), z), reached)
            for t, g in zip(total, found, strict=True):
                t += g / len(tasks)
        return total

    return step


def with_learn2learn(net: Any, order: int, steps: int) -> Callable[[list[Any]], list[Any]]:
    import learn2learn
    from torch.nn.functional import cross_entropy

    maml = learn2learn.algorithms.MAML(net, LR, first_order=order == 1)

    def step(tasks: list[Any]) -> list[Any]:
        for p in net.parameters():
            p.grad = None
        for x, y, q, z in tasks:
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(cross_entropy(learner(x), y))
            (cross_entropy(learner(q), z) / len(tasks)).backward()
        return [p.grad.clone() for p in net.parameters()]

    return step


def side(name: str, width: int, rounds: int, steps: int, out: Path) -> None:
    """Run one side and write its tasks a second and its gradients in fp64; or, for a memory row, one meta-gradient."""
    import torch

    if name in MEMORY:
        step_of(f"spolia, {name}", network(width), 2, steps)(drawn(1, torch.float32))
        out.write_text("{}")
        return
    told: dict[str, Any] = {"tasks a second": {}, "gradient": {}, "explained": ""}
    for label, order in ORDERS.items():
        net = network(width)
        exactly = step_of(name, network(width).double(), order)(drawn(2, torch.float64))
        told["gradient"][label] = torch.cat([g.flatten() for g in exactly]).tolist()
        step, tasks, seconds = step_of(name, net, order), drawn(TASKS, torch.float32), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            step(tasks)
            seconds.append(time.perf_counter() - start)
        told["tasks a second"][label] = TASKS / statistics.median(seconds[1:])
        if name == "spolia":
            told["explained"] += f"{label}, {step.loop.explain()}\n"  # type: ignore[attr-defined]
    out.write_text(json.dumps(told))


# --- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an environment with higher or learn2learn")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--rounds", type=int, default=5, help="outer steps timed in a process")
    parser.add_argument("--sides", help="sides, parted by `;`; by default all there are")
    parser.add_argument("--quick", action="store_true", help="a width of 8, one process and two outer steps a side")
    parser.add_argument("--json", type=Path, help="where the ledger goes; by default docs/results for the full size")
    parser.add_argument("--one", nargs=5, metavar=("SIDE", "WIDTH", "ROUNDS", "STEPS", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, width, rounds, steps, out = asked.one
        side(name, int(width), int(rounds), int(steps), Path(out))
        return
    width, repeats, rounds = (8, 1, 2) if asked.quick else (32, asked.repeats, asked.rounds)
    pythons = dict.fromkeys((*OURS, "plain loop"), sys.executable)
    packages = {"spolia": measure.versions(sys.executable, ["spolia", "torch"])}
    if asked.peer:
        python = str(asked.peer / "bin" / "python")
        packages["the others' environment"] = measure.versions(python, ["torch", *PEERS])
        pythons |= {name: python for name in PEERS if name in packages["the others' environment"]}
    if asked.sides:
        pythons = {s.strip(): pythons[s.strip()] for s in asked.sides.split(";")}
    found, peaks = measured(pythons, width, repeats, rounds)
    differing(found)
    rows = [*speed_rows(found), *memory_rows(peaks)]
    lines = [[r["task"], r["method"], r["metric"], f"{r['mean']:g}", r["unit"]] for r in rows]
    measure.print_table([["task", "side", "metric", "median", "unit"], *lines])
    path = asked.json or (None if asked.quick or asked.sides else measure.REPOSITORY / "docs/results/inner.json")
    if path is not None:
        tasks = list(dict.fromkeys(str(r["task"]) for r in rows))
        command = "python benchmarks/inner.py" + (" --peer ENVIRONMENT" if asked.peer else "")
        data = {"all": "random images, made in memory"}
        measure.Ledger(path, command, tasks, packages, data, [0], NOTES).add(rows)


def measured(
    pythons: dict[str, str], width: int, repeats: int, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[int, list[int]]]]:
    """What the processes of each side told, and the peaks of those that take one meta-gradient of so many steps."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    peaks: dict[str, dict[int, list[int]]] = {name: {k: [] for k in (0, *MEMORY_STEPS)} for name in MEMORY}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log.txt"

        def one(name: str, steps: int) -> measure.Usage:
            words = [pythons.get(name, sys.executable), __file__, "--one", name, width, rounds, steps, out]
            return measure.process([str(word) for word in words], log)

        for _ in range(repeats):
            for name in pythons:
                one(name, STEPS)
                found[name].append(json.loads(out.read_text()))
                speeds = found[name][-1]["tasks a second"]
                print(name, ", ".join(f"{label} {s:.1f} tasks/s" for label, s in speeds.items()), flush=True)
                print(found[name][-1]["explained"], end="")
            for name, by_steps in peaks.items():
                for steps, seen in by_steps.items():
                    seen.append(one(name, steps).peak)
    return found, peaks


def differing(found: dict[str, list[dict[str, Any]]]) -> None:
    """End the benchmark where a side's gradient is not that of the plain loop."""
    if "plain loop" not in found:
        return
    for label in ORDERS:
        wanted = found["plain loop"][0]["gradient"][label]
        norm = sum(w * w for w in wanted) ** 0.5
        for name, told in found.items():
            gap = sum((a - b) ** 2 for a, b in zip(told[0]["gradient"][label], wanted, strict=True)) ** 0.5 / norm
            print(f"{name}, {label}: gradient differs from the plain loop's by {gap:.1e} of its norm")
            if not gap < LIMIT:
                raise SystemExit(f"{name}: not the same gradient")


def speed_rows(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    rows = []
    for label in ORDERS:
        speeds = {name: [one["tasks a second"][label] for one in told] for name, told in found.items()}
        for name, values in speeds.items():
            mark = {} if name.startswith("spolia") else {"baseline": True}
            rows.append(measure.row(name, label, "tasks a second", "1/s", values, **mark))
        for name, values in speeds.items():
            if "spolia" in speeds and not name.startswith("spolia"):
                ratios = [a / b for a, b in zip(speeds["spolia"], values, strict=True)]
                row = measure.row("spolia", label, f"times faster than {name}", "1", ratios)
                of_medians = statistics.median(speeds["spolia"]) / statistics.median(values)
                rows.append({**row, "mean": float(f"{of_medians:.4g}")})
    return rows


def memory_rows(peaks: dict[str, dict[int, list[int]]]) -> list[dict[str, object]]:
    rows = []
    for steps in MEMORY_STEPS:
        for name, by_steps in peaks.items():
            more = [(peak - none) / 1e6 for peak, none in zip(by_steps[steps], by_steps[0], strict=True)]
            rows.append(measure.row(f"spolia, {name}", f"memory, {steps} steps", "more than no step", "MB", more))
    return rows


if __name__ == "__main__":
    main()

"""Continual learning: steps a second and memory of ER and DER++, beside a plain DataLoader loop and Avalanche.

    python benchmarks/continual.py                       rows 6a and 6b; a few minutes
    python benchmarks/continual.py --peer ENVIRONMENT    also Avalanche, if the python in there has it
    python benchmarks/continual.py --quick               a tenth of the data, one process a side: does everything run?

An MLP 784-100-100-10, five tasks of 2000 made-up images of 28 x 28, a memory of 500, plain SGD, one thread. Rows 6a: batch
10 and draws of 10; 6b: 64 and 64. A side runs alone in processes of its own, in turn, and reports steps a second of wall
time and of its own CPU time: on a busy machine the second is what counts. All sides must learn the tasks.

Sides: `spolia` (the whole run, batches and bookkeeping included), `plain loop` (DataLoader, a reservoir sample by sample,
one forward a lot, fancy indexing: written here as programs have it), `no replay` (the floor: the plain loop without
memory), `avalanche` (its own strategies: Naive with a ReplayPlugin; DER, whose beta makes it DER++, on one draw).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

ROWS = {"6a": 10, "6b": 64}
METHODS = ("er", "derpp")
SIDES = ("spolia", "plain loop", "no replay", "avalanche")
TASKS, EACH, ITEMS, LR, ALPHA, BETA = 5, 2000, 500, 0.05, 0.1, 0.5
LEAST = 60.0  # per cent of a side's final accuracy on all classes; without replay it is near 20
NOTES = (
    "Steps a second of a process after 30 steps of warming up; mean is the median over processes run in turn, low and high "
    "the extremes; of a ratio, mean is the ratio of medians. CPU: user and system time of the process. Peak is resident "
    "memory, imports included. The plain loop is written here as programs have it"
)


# --- one process -----------------------------------------------------------------------------------------------------


def data(each: int) -> tuple[Any, Any]:
    """Images [n, 784] around ten centres and their labels: train."""
    import torch

    draws = torch.Generator().manual_seed(0)
    centres = torch.rand(10, 784, generator=draws)
    y = torch.arange(TASKS * each) * 10 // (TASKS * each)
    return (centres[y] + 0.3 * torch.randn(len(y), 784, generator=draws)), y


def mlp() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


class Clock:
    """Wall and CPU seconds from the first step that counts."""

    def __init__(self, warm: int = 30):
        self.warm, self.steps = warm, 0

    def tick(self) -> None:
        """Before every step."""
        if self.steps == self.warm:
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.steps += 1

    def stop(self) -> dict[str, float]:
        n = self.steps - self.warm
        return {"wall": n / (time.perf_counter() - self.wall), "cpu": n / (time.process_time() - self.cpu)}


def by_spolia(method: str, batch: int, epochs: int, each: int) -> tuple[dict[str, float], Callable[[Any], Any]]:
    from spolia.bench.continual import Protocol, run
    from spolia.methods.continual.derpp import DerPp, DerPpLearner
    from spolia.methods.continual.er import Er, ErLearner
    from spolia.parts.stream import class_incremental

    x, y = data(each)
    if method == "er":
        learner: Any = ErLearner(mlp(), Er(lr=LR, items=ITEMS, replay=batch))
    else:
        learner = DerPpLearner(mlp(), DerPp(lr=LR, items=ITEMS, replay=batch, alpha=ALPHA, beta=BETA))
    clock, observe, stopped = Clock(), learner.observe, {}

    def timed(given: Any) -> Any:
        clock.tick()
        loss = observe(given)
        if clock.steps == total:
            stopped.update(clock.stop())
        return loss

    learner.observe = timed
    stream = class_incremental((x, y), (x[::50], y[::50]), TASKS)
    total = sum(e.steps(batch, epochs) for e in stream.experiences)
    run(learner, stream, Protocol(epochs=epochs, batch=batch, ahead=False))
    return stopped, learner.predict


def by_hand(method: str | None, batch: int, epochs: int, each: int) -> tuple[dict[str, float], Callable[[Any], Any]]:
    """DataLoader, a reservoir sample by sample, a forward for each lot."""
    import numpy as np
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    x, y = data(each)
    network, clock, seen = mlp(), Clock(), 0
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    held_x, held_y, held_z = torch.zeros(ITEMS, 784), torch.zeros(ITEMS, dtype=torch.int64), torch.zeros(ITEMS, 10)
    chance = np.random.RandomState(0)

    def drawn() -> Any:
        return chance.choice(min(seen, ITEMS), min(batch, seen, ITEMS), replace=False)

    for t in range(TASKS):
        own = slice(t * each, (t + 1) * each)
        for _ in range(epochs):
            for inputs, labels in DataLoader(TensorDataset(x[own], y[own]), batch, shuffle=True):
                clock.tick()
                optimizer.zero_grad()
                outputs = network(inputs)
                loss = nn.functional.cross_entropy(outputs, labels)
                if method and seen:
                    if method == "derpp":
                        at = drawn()
                        loss = loss + ALPHA * nn.functional.mse_loss(network(held_x[at]), held_z[at])
                    at = drawn()
                    weight = BETA if method == "derpp" else 1.0
                    loss = loss + weight * nn.functional.cross_entropy(network(held_x[at]), held_y[at])
                loss.backward()
                optimizer.step()
                for i in range(len(inputs) if method else 0):
                    place = seen if seen < ITEMS else chance.randint(0, seen + 1)
                    seen += 1
                    if place < ITEMS:
                        held_x[place], held_y[place], held_z[place] = inputs[i], labels[i], outputs.data[i]
    return clock.stop(), network


def by_avalanche(method: str, batch: int, epochs: int, each: int) -> tuple[dict[str, float], Callable[[Any], Any]]:
    """Its own strategies; a clock at the beginning of every iteration."""
    import torch
    from avalanche.benchmarks import nc_benchmark
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import DER, Naive

    class Timing(SupervisedPlugin):
        def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    x, y = data(each)
    whole = torch.utils.data.TensorDataset(x, y)
    whole.targets = y.tolist()
    stream = nc_benchmark(whole, whole, TASKS, task_labels=False, fixed_class_order=list(range(10))).train_stream
    network, clock = mlp(), Clock()
    common = {
        "model": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=LR),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": batch,
        "train_epochs": epochs,
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    if method == "er":
        plugins = [ReplayPlugin(mem_size=ITEMS, batch_size=batch, batch_size_mem=batch), Timing()]
        strategy = Naive(**common, plugins=plugins)
    else:
        strategy = DER(**common, mem_size=ITEMS, batch_size_mem=batch, alpha=ALPHA, beta=BETA, plugins=[Timing()])
    for experience in stream:
        strategy.train(experience)
    return clock.stop(), network


def side(name: str, method: str, batch: int, each: int, out: Path) -> None:
    """Run one side and write its steps a second and its accuracy on all classes."""
    import torch

    torch.set_num_threads(1)
    epochs = max(1, batch // 16)  # about as many steps for either batch
    if name == "spolia":
        rates, predict = by_spolia(method, batch, epochs, each)
    elif name == "avalanche":
        rates, predict = by_avalanche(method, batch, epochs, each)
    else:
        rates, predict = by_hand(None if name == "no replay" else method, batch, epochs, each)
    x, y = data(each)
    with torch.no_grad():
        accuracy = 100 * float((predict(x).argmax(1) == y).float().mean())
    out.write_text(json.dumps({"rates": rates, "accuracy": accuracy}))


# --- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side")
    parser.add_argument("--rows", default="6a,6b", help="rows, parted by commas")
    parser.add_argument("--peer", help="environment or python that has avalanche")
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, one process a side, no ledger")
    parser.add_argument("--json", type=Path, help="where the ledger goes; by default docs/results/continual_speed.json")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, method, batch, each, out = asked.one
        side(name, method, int(batch), int(each), Path(out))
        return
    repeats, each = (1, EACH // 10) if asked.quick else (asked.repeats, EACH)
    tasks = [(key, method) for key in asked.rows.split(",") for method in METHODS]
    packages = {"spolia": measure.versions(sys.executable, ["spolia", "torch"])}
    if asked.peer:
        packages["avalanche"] = measure.versions(_python(asked.peer), ["avalanche-lib", "torch"])
    path = asked.json or (None if asked.quick else measure.REPOSITORY / "docs/results/continual_speed.json")
    made = {"all": f"{TASKS} tasks of {each} random images, made in memory"}
    names = [_task(key, method) for key, method in tasks]
    ledger = (
        None
        if path is None
        else measure.Ledger(path, "python benchmarks/continual.py", names, packages, made, [0], NOTES)
    )
    table = [["row", "side", "steps a second", "of CPU time", "peak, MB", "accuracy"]]
    for key, method in tasks:
        found = dict(measured(key, method, each, repeats, asked.peer))
        table += [[_task(key, method), *line] for line in lines(found)]
        if ledger is not None:
            ledger.add(rows(key, method, found))
    measure.print_table(table)


Found = dict[str, list[tuple[dict[str, Any], measure.Usage]]]


def measured(key: str, method: str, each: int, repeats: int, peer: str | None) -> Iterator[tuple[str, Any]]:
    """What every side's processes reported, and what they took."""
    sides = [name for name in SIDES if name != "avalanche" or peer]
    found: Found = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log.txt"
        for _ in range(repeats):
            for name in sides:
                python = _python(peer) if name == "avalanche" and peer else sys.executable
                one = [python, __file__, "--one", name, method, str(ROWS[key]), str(each), str(out)]
                used = measure.process(one, log)
                told = json.loads(out.read_text())
                if name != "no replay" and each == EACH and told["accuracy"] < LEAST:
                    raise SystemExit(
                        f"{name}, {method}: {told['accuracy']:.1f} % of the tasks learned; {LEAST} demanded"
                    )
                found[name].append((told, used))
    yield from found.items()


def lines(found: Found) -> Iterator[list[str]]:
    """Cells of the printed table."""
    for name in found:
        values = [measure.row(name, "", "", "", part)["mean"] for part in _columns(found[name])]
        yield [name, *(f"{value:.4g}" for value in values)]


def rows(key: str, method: str, found: Found) -> list[dict[str, object]]:
    task, made = _task(key, method), []
    for name in found:
        mark = {} if name == "spolia" else {"baseline": True}
        units = (
            ("steps a second", "1/s"),
            ("steps a second of CPU time", "1/s"),
            ("peak memory", "MB"),
            ("accuracy", "%"),
        )
        for (metric, unit), values in zip(units, _columns(found[name]), strict=True):
            made.append(measure.row(name, task, metric, unit, values, **mark))
    ours = _columns(found["spolia"])
    for name in (n for n in found if n not in ("spolia", "no replay")):
        theirs = _columns(found[name])
        for metric, place in ((f"times faster than {name}", 0), (f"times faster than {name}, CPU time", 1)):
            ratios = [a / b for a, b in zip(ours[place], theirs[place], strict=True)]
            made.append(measure.row("spolia", task, metric, "1", ratios))
        memory = [a / b for a, b in zip(theirs[2], ours[2], strict=True)]
        made.append(measure.row("spolia", task, f"times less memory than {name}", "1", memory))
    return made


def _columns(runs: list[tuple[dict[str, Any], measure.Usage]]) -> list[list[float]]:
    rates = [[told["rates"][kind] for told, _ in runs] for kind in ("wall", "cpu")]
    return [*rates, [used.peak / 1e6 for _, used in runs], [told["accuracy"] for told, _ in runs]]


def _task(key: str, method: str) -> str:
    draws = "one draw" if method == "er" else "two draws"
    return f"{key}, {'ER' if method == 'er' else 'DER++'}, batch {ROWS[key]} and {draws} of {ROWS[key]}"


def _python(environment: str) -> str:
    place = Path(environment)
    return str(place / "bin/python" if place.is_dir() else place)


if __name__ == "__main__":
    main()

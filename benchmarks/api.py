"""Items a second through an API: in process, and over loopback against `spolia serve`'s server, beside the module itself.

    python benchmarks/api.py                  a minute; to docs/results/api_speed.json
    python benchmarks/api.py --json FILE --seconds 0.1     does everything run?

The server runs in a process of its own. For batches of 1, 32 and 256 it measures microseconds an item of the module alone,
through `Api.calling` (checks, conversion, meter), and over HTTP in binary and in JSON; then of many lots at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import torch

from spolia.parts.api import Api, Contract, Policy
from spolia.parts.api_http import Session
from spolia.parts.api_v2 import V2Endpoint

SHAPE, CLASSES, BATCHES, LOTS = (3, 32, 32), 10, (1, 32, 256), 8
PACKAGES = ["spolia", "torch", "httpx", "starlette", "uvicorn"]


def module() -> torch.nn.Module:
    """A small convolutional network for images of 32 pixels: what is served."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32 * 64, CLASSES)).eval()


def contract() -> Contract:
    return Contract(tuple(map(str, range(CLASSES))), SHAPE, "logits", most=max(BATCHES))


def serving(ready: Connection) -> None:
    """The server's process."""
    from spolia.runs.serve import application, serve
    from spolia.runs.serve_requests import Served

    torch.set_num_threads(1)
    serve(application([Served("m", module(), contract())]), "127.0.0.1", 0, ready.send)


def calls(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after one that does not count."""
    work()
    taken, end = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def measured(url: str, seconds: float) -> dict[tuple[str, int], list[float]]:
    """Microseconds an item by way and batch, a call each."""
    net, policy, found = module(), Policy(concurrency=4), {}
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "module": lambda x: net(x),
        "in process": Api.calling(net, contract(), name="near"),
        "HTTP, binary": Api.at(url, "m", policy=policy),
        "HTTP, JSON": Api(V2Endpoint(Session(url), "m", binary=False), name="plain", policy=policy),
    }
    with torch.no_grad():
        for batch in (*BATCHES, LOTS * max(BATCHES)):
            x = torch.rand(batch, *SHAPE)
            for name, way in ways.items():
                if batch <= max(BATCHES) or name != "HTTP, JSON":  # a hundred megabytes of text a call
                    found[name, batch] = [1e6 * t / batch for t in calls(lambda w=way, x=x: w(x), seconds)]
    return found


def rows_of(found: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    rows = []
    print(f"{'':14}{'batch':>7}{'us/item':>10}{'overhead':>10}{'items/s':>10}")
    for (way, batch), values in found.items():
        middle, alone = statistics.median(values), statistics.median(found["module", batch])
        print(f"{way:14}{batch:7}{middle:10.1f}{middle - alone:10.1f}{1e6 / middle:10.0f}")
        task = f"{batch:,} at once"
        mark = {"baseline": True} if way == "module" else {}
        rows.append(measure.row(way, task, "time an item", "us", values, **mark))
        rows.append(measure.row(way, task, "items a second", "1/s", [1e6 / value for value in values], **mark))
        if way != "module":
            rows.append(measure.row(way, task, "overhead an item", "us", [middle - alone]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=measure.REPOSITORY / "docs/results/api_speed.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls, for each way and batch")
    given = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=serving, args=(theirs,), daemon=True)
    server.start()
    try:
        rows = rows_of(measured(mine.recv(), given.seconds))
    finally:
        server.terminate()
    ledger = {
        "name": "api_speed", "command": "python benchmarks/api.py", "commit": measure.commit(),
        "date": datetime.date.today().isoformat(), "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {"all": "random images of 3 x 32 x 32, made in memory"}, "seeds": [0], "rows": rows,
        "notes": "A small convolutional network, one thread; the server is another process of the same machine. mean is the"
        " median over calls, low and high the extremes; overhead is the median less that of the module alone at the same batch."
        " Lots above 256 go as requests of 256, four at a time.",
    }  # fmt: skip
    given.json.write_text(json.dumps(ledger, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Items a second through an API: in process, and over loopback against `spolia serve`'s server, beside the module itself.

    python benchmarks/api.py [--json FILE] [--seconds 2]

The server runs in a process of its own. For batches of 1, 32 and 256 it prints microseconds an item of the module alone,
through `Api.calling` (checks, conversion, meter), and over HTTP in binary and in JSON; then of many lots at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from spolia.parts.api import Api, Contract, Policy
from spolia.parts.api_http import Session
from spolia.parts.api_v2 import V2Endpoint

SHAPE, CLASSES, BATCHES, LOTS = (3, 32, 32), 10, (1, 32, 256), 8


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


def rate(work: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call."""
    work()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=serving, args=(theirs,), daemon=True)
    server.start()
    url, net, rows = mine.recv(), module(), []
    policy = Policy(concurrency=4)
    near = Api.calling(net, contract(), name="near")
    far = Api.at(url, "m", policy=policy)
    plain = Api(V2Endpoint(Session(url), "m", binary=False), name="plain", policy=policy)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "module": lambda x: net(x),
        "in process": near,
        "HTTP, binary": far,
        "HTTP, JSON": plain,
    }
    try:
        with torch.no_grad():
            for batch in BATCHES:
                x = torch.rand(batch, *SHAPE)
                for name, way in ways.items():
                    rows.append(
                        {"way": name, "batch": batch, "us": 1e6 * rate(lambda w=way, x=x: w(x), given.seconds) / batch}
                    )
            x = torch.rand(LOTS * max(BATCHES), *SHAPE)
            del ways["HTTP, JSON"]  # a hundred megabytes of text a call
            for name, way in ways.items():
                rows.append(
                    {"way": name, "batch": len(x), "us": 1e6 * rate(lambda w=way: w(x), given.seconds) / len(x)}
                )
    finally:
        server.terminate()
    alone = {row["batch"]: row["us"] for row in rows if row["way"] == "module"}
    print(f"{'':14}{'batch':>7}{'us/item':>10}{'overhead':>10}{'items/s':>10}")
    for row in rows:
        row["overhead"], row["items per second"] = row["us"] - alone[row["batch"]], 1e6 / row["us"]
        print(f"{row['way']:14}{row['batch']:7}{row['us']:10.1f}{row['overhead']:10.1f}{row['items per second']:10.0f}")
    if given.json is not None:
        told = {
            "name": "api",
            "command": "python benchmarks/api.py",
            "machine": platform.processor() or platform.machine(),
        }
        given.json.write_text(json.dumps(told | {"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

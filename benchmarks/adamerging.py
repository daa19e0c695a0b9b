"""One step of AdaMerging: time and memory beside the two ways its coefficients are learned elsewhere.

    python benchmarks/adamerging.py                 rows 2a to 2c at ViT-B/32's size, K = 8; medians of 3 processes a way
    python benchmarks/adamerging.py --size small    4.6 million parameters: does everything run?

Ways: `spolia` (merge without a graph, project the gradient; fp32 and bf16 stack), `official` (every task merges anew, the
task vectors ask for gradients too, one backward through all tasks), `one merge` (FusionBench's scheme: one merge with a
graph, a backward through it for each task). The last two are written here from their descriptions, as naive as those are.
All give the same gradient of the coefficients, which is compared before anything is timed.

A side runs alone in a process: peak is its resident memory. Parts of a step are the medians of --steps steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

SIDES = ("spolia", "spolia, bf16 stack", "one merge", "official")
SIZES = {
    "vit-b-32": (768, 12, 49, 3072),
    "small": (256, 6, 49, 768),
}  # width, blocks, tokens without the class token, hidden
EXPERTS, BATCH, CLASSES = 8, 2, 100
# Inner products of random vectors nearly cancel, so rounding the vectors shows: bf16 is held against vectors that are bf16.
ROUNDED = "spolia, rounded"  # not timed: the fp32 stack of task vectors that are bf16 numbers
LIKE = {"spolia": "official", "spolia, bf16 stack": ROUNDED, "one merge": "official"}
LIMIT = 1e-3  # of the gradient's norm, between ways that compute the same: fp32 through twelve random blocks
HEAP = "glibc.malloc.mmap_threshold=4194304:glibc.malloc.hugetlb=1"
NOTES = (
    "A step is two random images a task through a vision transformer of ViT-B/32's shape, layer-wise coefficients. mean is "
    "the median over processes run in turn, low and high the extremes; a ratio is one of two processes of a turn. Merging "
    "part: all of a step but the network's own forward and backward, which spolia does for four tasks in one pass, as its "
    "settings have it, and the others task by task. Weights are drawn in place; the base is the given model's own memory. "
    "All ways but `official` run under the C library's defaults. Under those, the heap of `official` is left with holes that "
    "nothing fits into, and it is killed at 24 GB on this machine, so it alone runs under GLIBC_TUNABLES "
    + HEAP
    + ": large "
    "tensors go back to the system when they are freed, and are fetched anew, which is part of its time. "
    "The other ways are written here from their descriptions; the projects' own programs were not run"
)


# --- one process -----------------------------------------------------------------------------------------------------


def side(name: str, size: str, steps: int, out: Path) -> None:
    """Run one way and write its seconds a step, by part, and its gradient."""
    import torch

    torch.manual_seed(0)
    model = network(*SIZES[size])
    base = {n: p.detach() for n, p in model.named_parameters()}  # the same memory
    heads = [torch.randn(CLASSES, SIZES[size][0]) for _ in range(EXPERTS)]
    tokens = SIZES[size][2]
    images = [torch.randn(BATCH, tokens, 3 * 32 * 32) for _ in range(EXPERTS)]
    numel = sum(p.numel() for p in base.values())
    work = ours if name.startswith("spolia") else theirs
    parts, gradient = work(name, model, base, heads, images, steps)
    found = {key: [part[key] for part in parts] for key in parts[0]}
    out.write_text(json.dumps({"seconds": found, "gradient": gradient.flatten().tolist(), "parameters": numel}))


def network(width: int, blocks: int, tokens: int, hidden: int):
    """A vision transformer: patches [batch, tokens, 3072] to features [batch, width]."""
    import torch
    from torch import nn

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Linear(3 * 32 * 32, width, bias=False)
            self.cls, self.place = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(tokens + 1, width))
            layer = [
                nn.TransformerEncoderLayer(width, width // 64, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(blocks)
            ]
            self.before, self.blocks, self.after = nn.LayerNorm(width), nn.ModuleList(layer), nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.cls.expand(len(x), 1, -1), self.patch(x)], 1) + self.place
            x = self.before(x)
            for block in self.blocks:
                x = block(x)
            return self.after(x[:, 0])

    return Vit().train()  # train: no fused path without gradients; there is no dropout


def change(base: dict, k: int, name: str):
    """Task vector k in a tensor, the same in every process."""
    import torch

    draws = torch.Generator().manual_seed(1000 * k + sorted(base).index(name))
    return 0.02 * torch.randn(base[name].shape, generator=draws)


def entropy(features, head):
    log_p = (features @ head.t()).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def ours(name: str, model, base: dict, heads: list, images: list, steps: int):
    import torch
    from torch import nn

    from spolia import Examples
    from spolia.core.stream import TensorPlane
    from spolia.methods.merge.adamerging import AdaMerging
    from spolia.parts.adaptation import Batch, Objective
    from spolia.parts.combination import Combination
    from spolia.parts.expert import Expert, ExpertPool, MemoryWeights
    from spolia.parts.network import Network
    from spolia.parts.pieces import Storage

    class Drawn(MemoryWeights):
        """An expert whose tensors are made when they are read, so that the stack is the only copy of them all."""

        def __init__(self, k: int):
            super().__init__(base)
            self.k = k

        def plane(self, name: str, model: str) -> TensorPlane:
            made = base[name] + change(base, self.k, name)
            if rounded:
                made = base[name] + (made - base[name]).bfloat16()
            return TensorPlane(model, self.entries[name].dtype, made.view(-1))

    rounded = name == ROUNDED

    def frozen(weight: torch.Tensor) -> nn.Linear:
        head = nn.Linear(*reversed(weight.shape), bias=False)
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head

    tasks = [str(k) for k in range(EXPERTS)]
    given = Network(model, {task: frozen(head) for task, head in zip(tasks, heads, strict=True)})
    inputs = {task: Examples(x, name=task) for task, x in zip(tasks, images, strict=True)}
    pool = ExpertPool([Expert(str(k), Drawn(k)) for k in range(EXPERTS)], Expert("base", MemoryWeights(base)))
    made = Combination.of(pool, given, None, Storage("bfloat16" if "bf16" in name else "float32"))
    objective = Objective(inputs, AdaMerging(batch=BATCH), {})
    factors, parts, slope = torch.full((len(made.pieces), EXPERTS), 0.3, dtype=torch.float64), [], None
    for _ in range(steps):
        t = [time.perf_counter()]
        made.write(factors)
        t.append(time.perf_counter())
        objective.backward(made.network, [Batch(task, inputs[task].drawn(BATCH, 0, 0)) for task in tasks])
        t.append(time.perf_counter())
        slope = made.projected()
        t.append(time.perf_counter())
        parts.append({"merging part": t[1] - t[0] + t[3] - t[2], "network": t[2] - t[1], "step": t[3] - t[0]})
    return parts, slope[sorted(range(len(made.names)), key=made.names.__getitem__)]


def theirs(name: str, model, base: dict, heads: list, images: list, steps: int):
    """Both other ways: the coefficients are the leaves, and the merge stands in the graph."""
    import torch

    changes = [{n: change(base, k, n) for n in base} for k in range(EXPERTS)]
    names = sorted(base)
    if name == "official":
        for vector in changes:
            for tensor in vector.values():
                tensor.requires_grad_()
    factors = torch.full((len(names), EXPERTS), 0.3, requires_grad=True)

    def merged() -> dict:
        kept = factors.clamp(0, 1)
        return {
            n: sum((kept[i, k] * changes[k][n] for k in range(EXPERTS)), start=base[n]) for i, n in enumerate(names)
        }

    plain = network_seconds(model, images, heads)
    parts = []
    for _ in range(steps):
        factors.grad = None
        for vector in changes:
            for tensor in vector.values():
                tensor.grad = None
        start = time.perf_counter()
        if name == "official":
            losses = [
                entropy(torch.func.functional_call(model, merged(), (x,)), head)
                for x, head in zip(images, heads, strict=True)
            ]
            torch.stack(losses).sum().backward()
            del losses
        else:
            weights = merged()
            for x, head in zip(images, heads, strict=True):
                entropy(torch.func.functional_call(model, weights, (x,)), head).backward(retain_graph=True)
            del weights
        step = time.perf_counter() - start
        parts.append({"merging part": step - plain, "network": plain, "step": step})
    return parts, factors.grad


def network_seconds(model, images: list, heads: list) -> float:
    """The network's own forward and backward for all tasks: what every way has in common."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for x, head in zip(images, heads, strict=True):
            entropy(model(x), head).backward()
        found.append(time.perf_counter() - start)
        for parameter in model.parameters():
            parameter.grad = None
    return statistics.median(found)


# --- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="vit-b-32")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way")
    parser.add_argument("--steps", type=int, default=3, help="steps in a process; the first one only warms up")
    parser.add_argument("--sides", default="; ".join(SIDES), help="ways, parted by `;`")
    parser.add_argument("--json", type=Path, help="where the ledger goes; by default docs/results for the full size")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        side(asked.one[0], asked.size, asked.steps, Path(asked.one[1]))
        return
    sides = [s.strip() for s in asked.sides.split(";")]
    task = f"{asked.size}, K = {EXPERTS}, {BATCH} images a task"
    found: dict[str, list[dict]] = {s: [] for s in sides}
    used: dict[str, list[measure.Usage]] = {s: [] for s in sides}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log.txt"
        for _ in range(asked.repeats):
            for s in sides:
                command = [
                    sys.executable,
                    __file__,
                    "--size",
                    asked.size,
                    "--steps",
                    str(asked.steps),
                    "--one",
                    s,
                    str(out),
                ]
                os.environ.pop("GLIBC_TUNABLES", None)
                if s == "official":
                    os.environ["GLIBC_TUNABLES"] = HEAP  # see NOTES
                used[s].append(measure.process(command, log))
                found[s].append(json.loads(out.read_text()))
                print(f"{s}: {typical(found[s][-1], 'step'):.3f} s a step, {used[s][-1].peak / 1e9:.2f} GB", flush=True)
        if "spolia, bf16 stack" in sides:
            measure.process(
                [sys.executable, __file__, "--size", asked.size, "--steps", "1", "--one", ROUNDED, str(out)], log
            )
            found[ROUNDED] = [json.loads(out.read_text())]
    unequal = differing(found)
    found.pop(ROUNDED, None)
    rows = ledger_rows(task, found, used)
    lines = [[row["method"], row["metric"], f"{row['mean']:g}", row["unit"]] for row in rows]
    measure.print_table([["way", "metric", "median", "unit"], *lines])
    path = asked.json or (
        measure.REPOSITORY / "docs/results/adamerging_cost.json" if asked.size == "vit-b-32" else None
    )
    if unequal:
        raise SystemExit("the gradients differ: " + "; ".join(unequal))
    if path is not None:
        packages = {"spolia": measure.versions(sys.executable, ["spolia", "torch"])}
        data = {"all": "random weights and images, made in memory"}
        ledger = measure.Ledger(path, "python benchmarks/adamerging.py", [task], packages, data, [0], NOTES)
        ledger.add(rows)


def typical(one: dict, part: str) -> float:
    """Median seconds of a part over a process's steps but the first."""
    seconds = one["seconds"][part]
    return statistics.median(seconds[1:] or seconds)


def differing(found: dict[str, list[dict]]) -> list[str]:
    """Ways whose gradient is not that of the way that must give the same."""
    said = []
    for name, like in LIKE.items():
        if name in found and like in found:
            one, wanted = found[name][0]["gradient"], found[like][0]["gradient"]
            norm = sum(w * w for w in wanted) ** 0.5
            gap = sum((a - b) ** 2 for a, b in zip(one, wanted, strict=True)) ** 0.5 / norm
            print(f"{name}: gradient differs from that of `{like}` by {gap:.1e} of its norm")
            if not gap < LIMIT:
                said.append(f"{name} by {gap:.1e}")
    return said


def ledger_rows(task: str, found: dict[str, list[dict]], used: dict[str, list[measure.Usage]]) -> list[dict]:
    rows = []
    for name, processes in found.items():
        mark = {} if name.startswith("spolia") else {"baseline": True}
        for part in ("step", "network", "merging part"):
            rows.append(measure.row(name, task, part, "s", [typical(one, part) for one in processes], **mark))
        peaks = [u.peak / 1e6 for u in used[name]]
        rows.append(measure.row(name, task, "peak memory", "MB", peaks, **mark))
        copy = 4 * processes[0]["parameters"] / 1e6
        rows.append(
            measure.row(name, task, "peak memory, in copies of the model", "1", [p / copy for p in peaks], **mark)
        )
    for name in (n for n in found if n.startswith("spolia")):
        for peer in (n for n in found if not n.startswith("spolia")):
            for part, label in (("step", "times faster"), ("merging part", "times faster, merging part")):
                pairs = zip(found[peer], found[name], strict=True)
                ratios = [typical(a, part) / typical(b, part) for a, b in pairs]
                rows.append(measure.row(name, task, f"{label} than {peer}", "1", ratios))
            memory = [a.peak / b.peak for a, b in zip(used[peer], used[name], strict=True)]
            rows.append(measure.row(name, task, f"times less memory than {peer}", "1", memory))
    return rows


if __name__ == "__main__":
    main()

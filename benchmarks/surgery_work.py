"""The parts of benchmarks/surgery.py that need torch, each run as a process of its own.

surgery_work.py make FOLDER SIZE                base and experts of a small vision transformer as safetensors, inputs
surgery_work.py SIDE METHOD FOLDER SIZE STEPS   fit, and print seconds before the first step and of all steps, as JSON
surgery_work.py compare METHOD FOLDER SIZE      rms difference of the fitted parameters after a few steps, as JSON

SIDE is `spolia`, or `naive`: the scheme of the papers' published programs, written from its description. For every step of
every task it merges anew from all the task vectors, reads the expert's checkpoint, runs both encoders and sends gradients
through the whole merged one into every copy of the weights. Both sides see the same batches and have one Adam a task.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.bottleneck import Bottleneck
from spolia.parts.examples import Examples
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.sites import find_sites, run_through

# width, blocks, heads, tokens, tasks, inputs a task
SIZES = {
    "quick": (32, 2, 2, 5, 3, 32),
    "small": (256, 6, 4, 26, 8, 128),
    "normal": (
        768,
        12,
        12,
        50,
        8,
        128,
    ),  # the vision tower of CLIP ViT-B/32: 85 M parameters, 9 copies on the naive side
}
RANK, BATCH, LR, SCALE = 16, 16, 3e-3, 0.3


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.outer(nn.functional.gelu(self.inner(self.after(x))))


class Tower(nn.Module):
    """Patches in, the first token's projection out."""

    def __init__(self, size: str):
        super().__init__()
        width, blocks, heads, _, _, _ = SIZES[size]
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.projection = nn.LayerNorm(width), nn.Linear(width, 2 * width // 3, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        for block in self.blocks:
            patches = block(patches)
        return self.projection(self.norm(patches[:, 0]))


def make(folder: Path, size: str) -> None:
    width, _, _, tokens, tasks, count = SIZES[size]
    torch.manual_seed(0)
    base = Tower(size).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base, folder / "base.safetensors")
    for k in range(tasks):
        change = {name: t + 0.1 * t.std().nan_to_num(0.01) * torch.randn_like(t) for name, t in base.items()}
        save_file(change, folder / f"task-{k}.safetensors")
    save_file({f"task-{k}": torch.randn(count, tokens, width) for k in range(tasks)}, folder / "inputs.safetensors")


class Given:
    """Files of one size. Both sides begin here."""

    def __init__(self, folder: Path, size: str):
        self.tasks = [f"task-{k}" for k in range(SIZES[size][4])]
        self.files = {task: folder / f"{task}.safetensors" for task in self.tasks}
        self.base = load_file(folder / "base.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.network = Network(Tower(size).requires_grad_(False))
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # what the first optimizer imports counts for neither side

    def merged(self) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(t) for name, t in self.base.items()}
        for file in self.files.values():
            for name, t in load_file(file).items():
                total[name] += t - self.base[name]
        return {name: t + SCALE * total[name] for name, t in self.base.items()}


Fit = tuple[dict[str, list[Tensor]], float, float]  # parameters of each task; seconds before the steps; of the steps


def ours(given: Given, method: str, steps: int) -> Fit:
    """`closed form` of either method has no steps."""
    name, _, way = method.partition(", ")
    kind, fit = {"surgery": (Surgery, surgery), "deep": (Deep, deep)}[name]
    settings = kind(rank=RANK, batch=BATCH, lr=LR, steps=max(steps, 1), solver="closed_form" if way else "adam_l1")
    pool = ExpertPool.of({task: str(file) for task, file in given.files.items()})
    start, timed = time.perf_counter(), _Timed()
    model = fit(given.merged(), pool, given.network, given.inputs, settings, timed)
    whole = time.perf_counter() - start
    found = {task: [p.detach() for b in model.adapters.of(task) for p in b.parameters()] for task in given.tasks}
    return found, whole - timed.inside, timed.inside


class _Timed:
    """Stands in for a journal: the seconds spent inside loops."""

    def __init__(self) -> None:
        self.inside = 0.0

    def phase(self, _name: str) -> _Timed:
        return self

    def __enter__(self) -> _Timed:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def log(self, **_numbers: Any) -> None:
        pass

    def steps(self, n: int, _keep: Any) -> Any:
        start = time.perf_counter()
        yield from range(n)
        self.inside += time.perf_counter() - start


def naive(given: Given, method: str, steps: int) -> Fit:
    start = time.perf_counter()
    base = {name: t.clone().requires_grad_() for name, t in given.base.items()}
    vectors = [
        {name: (t - given.base[name]).requires_grad_() for name, t in load_file(file).items()}
        for file in given.files.values()
    ]
    examples = {task: Examples(given.inputs[task], name=task) for task in given.tasks}
    sites = find_sites(given.network, given.inputs["task-0"][:3], "blocks" if method == "deep" else "last")
    own = {
        task: nn.ModuleList(Bottleneck.drawn(site.width, RANK, 0, task, site.label) for site in sites)
        for task in given.tasks
    }
    optimizers = {task: torch.optim.Adam(own[task].parameters(), lr=LR) for task in given.tasks}
    ready = time.perf_counter()
    for step in range(steps):
        for task in given.tasks:
            x = examples[task].draw(BATCH, 0, step)
            merged = {name: t + SCALE * sum(v[name] for v in vectors) for name, t in base.items()}
            expert = load_file(given.files[task])
            with torch.no_grad():
                wanted = _states(given, expert, x, sites, None)
            loss = torch.stack(
                [(a - b).abs().mean() for a, b in zip(_states(given, merged, x, sites, own[task]), wanted, strict=True)]
            ).sum()
            optimizers[task].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[task].step()
    found = {task: [p.detach() for p in own[task].parameters()] for task in given.tasks}
    return found, ready - start, time.perf_counter() - ready


def _states(given: Given, weights: dict[str, Tensor], x: Tensor, sites: Any, own: Any) -> list[Tensor]:
    """Token means at every site, with bottlenecks or without."""
    seen: list[Tensor] = []

    def edit(number: int, state: Tensor) -> Tensor:
        state = own[number](state) if own is not None else state
        seen.append(sites[number].tokens(state).mean(1))
        return state

    class Weighted:
        module = given.network.module

        def features(self, batch: Tensor) -> Tensor:
            return given.network.features(batch, weights)

    run_through(Weighted(), x, sites, edit)  # type: ignore[arg-type]
    return seen


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    if words[0] == "make":
        return make(Path(words[1]), words[2])
    side, method, folder, size = words[:4]
    given = Given(Path(folder), size)
    if side == "compare":
        pairs = [fit(given, method, 3)[0] for fit in (ours, naive)]
        gaps = [(a - b).flatten() for t in given.tasks for a, b in zip(pairs[0][t], pairs[1][t], strict=True)]
        print(json.dumps({"rms": float(torch.cat(gaps).square().mean().sqrt()), "step": LR}))
        return None
    steps = int(words[4])
    _, before, inside = (ours if side == "spolia" else naive)(given, method, steps)
    print(json.dumps({"before": before, "steps": inside}))
    return None


if __name__ == "__main__":
    main(sys.argv[1:])

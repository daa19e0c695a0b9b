"""Recovering images of classifiers: seconds a model and images a second of FREE's five steps and of 200, beside a plain loop.

    python benchmarks/inversion.py                Conv4 and ResNet-10 at 32 px; ten minutes
    python benchmarks/inversion.py --width 64     with the generator of the papers; hours
    python benchmarks/inversion.py --quick        a narrow generator, two models, ten steps for 200: does everything run?

Models of one architecture with random weights, 5 classes, 20 images of each. A side runs alone in processes of its own, in
turn; a process warms up on a step, then visits four models with five steps each, and one with 200. Sides:

    spolia            the meta-generator's visit, experts one by one
    spolia, vmap      the four of them as one stack; five steps alone
    plain loop        as published codes do: the generator copied for each model, hooks hung on, one model after the other

All sides begin alike and give the same images after five steps, which is compared first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

SIDES = ("spolia", "spolia, vmap", "plain loop")
TASKS = {"Conv4, 32 px": "conv4", "ResNet-10 of 16 channels, 32 px": "resnet10"}
FEW, MANY, SIZE = 5, 200, 32  # steps of a visit, of an inversion; pixels
MODELS, CLASSES, EACH, FEWER = 4, 5, 20, 3  # images of each class, and with --quick
LIMIT = 2e-2  # of images in 0 … 1, after five steps in fp32: Adam divides slopes near 0 by themselves
NOTES = (
    "mean is the median over processes run in turn, low and high the extremes; of a ratio, mean is the ratio of medians. "
    "Seconds a model are those of a whole visit. Models have random weights: time does not depend on them"
)


# --- one process -----------------------------------------------------------------------------------------------------


def pool_of(kind: str, models: int) -> Any:
    import torch

    from spolia.parts.white import White, WhitePool

    experts = []
    for i in range(models):
        draws = torch.Generator().manual_seed(i)
        if kind == "conv4":
            from spolia.zoo.conv4 import Conv4

            module: Any = Conv4(CLASSES, width=32, size=SIZE, generator=draws)
        else:
            from spolia.zoo.resnet10 import SmallResNet

            module = SmallResNet(10, 16, CLASSES, generator=draws)
        experts.append(White(f"{i}", module, shape=(3, SIZE, SIZE)))
    return WhitePool(experts)


def settings_of(steps: int, width: int, each: int, vmap: bool) -> Any:
    from spolia.methods.datafree.training import Training

    together = "vmap" if vmap else "loop"
    more: dict[str, Any] = {"augment": "crop", "flip": True, "keep": "last", "together": together}
    return Training(recovery_steps=steps, per_class=each, generator_width=width, **more)


def spolia(pool: Any, settings: Any) -> list[Any]:
    """The images of every model."""
    from spolia.methods.datafree.metagenerator import MetaGenerator

    found = MetaGenerator(pool, settings).recover(range(len(pool)), 0)
    return [one.images for one in found]


def plain(pool: Any, settings: Any) -> list[Any]:
    """The same, as one writes it without this package: a copy of the generator for each model, one after the other."""
    import torch

    from spolia.core.seeds import generator
    from spolia.methods.datafree.inversion import generator_of
    from spolia.methods.datafree.looks import moved, moves

    start, found = generator_of(pool, settings, 0), []
    for turn, expert in enumerate(pool):
        draws, maker = generator(0, "recover", 0, turn), copy.deepcopy(start)
        y = torch.arange(CLASSES).repeat_interleave(settings.per_class)
        z = torch.from_numpy(draws.standard_normal((len(y), settings.latent), dtype="float32")).requires_grad_()
        groups = [
            {"params": [z], "lr": settings.latent_lr},
            {"params": maker.parameters(), "lr": settings.generator_lr},
        ]
        adam, module = torch.optim.Adam(groups, betas=(0.5, 0.999)), expert.module()
        for _ in range(settings.recovery_steps):
            gaps: list[Any] = []

            def hook(layer: Any, inputs: Any, _: Any, gaps: list[Any] = gaps) -> None:
                x = inputs[0]
                mean, var = x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
                gaps.append((layer.running_mean - mean).norm(2) + (layer.running_var - var).norm(2))

            norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            handles = [norm.register_forward_hook(hook) for norm in norms]
            rows, columns = moves([draws], len(y), pool.shape, settings, "cpu")
            x = maker(z, y)
            logits = expert.logits(module, moved(x, rows[0], columns[0], settings))
            loss = torch.nn.functional.cross_entropy(logits, y) + sum(gaps)
            adam.zero_grad()
            loss.backward()
            adam.step()
            for handle in handles:
                handle.remove()
        found.append(x.detach())
    return found


def side(name: str, width: int, many: int, models: int, each: int, out: Path) -> None:
    """Run one side on all tasks: seconds a model, and the mean of its images after five steps."""
    import torch

    told: dict[str, Any] = {}
    run, vmap = plain if name == "plain loop" else spolia, name.endswith("vmap")
    for task, kind in TASKS.items():
        pool = pool_of(kind, models)
        run(pool, settings_of(1, width, each, vmap))
        begun = time.perf_counter()
        images = run(pool, settings_of(FEW, width, each, vmap))
        told[task] = {"few": (time.perf_counter() - begun) / models}
        told[task]["images"] = torch.stack(images).mean((2, 3, 4)).flatten().tolist()
        if not vmap:
            begun = time.perf_counter()
            run(pool_of(kind, 1), settings_of(many, width, each, vmap))
            told[task]["many"] = time.perf_counter() - begun
    out.write_text(json.dumps(told))


# --- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the generator's last stage; 64 in the papers"
    )
    parser.add_argument("--quick", action="store_true", help="a narrow generator, two models, one process a side")
    parser.add_argument("--json", type=Path, help="where the ledger goes; by default docs/results for the full size")
    parser.add_argument(
        "--one", nargs=6, metavar=("SIDE", "WIDTH", "MANY", "MODELS", "EACH", "OUT"), help=argparse.SUPPRESS
    )
    asked = parser.parse_args()
    if asked.one:
        name, *numbers, out = asked.one
        side(name, *map(int, numbers), out=Path(out))
        return
    width, many, models, each = (4, 10, 2, FEWER) if asked.quick else (asked.width, MANY, MODELS, EACH)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log.txt"
        for _ in range(1 if asked.quick else asked.repeats):
            for name in SIDES:
                words = [sys.executable, __file__, "--one", name, width, many, models, each, out]
                measure.process([str(word) for word in words], log)
                found[name].append(json.loads(out.read_text()))
    alike(found)
    rows = rows_of(found, many, CLASSES * each)
    lines = [[r["task"], r["method"], r["metric"], f"{r['mean']:g}", r["unit"]] for r in rows]
    measure.print_table([["task", "side", "metric", "median", "unit"], *lines])
    path = asked.json or (None if asked.quick else measure.REPOSITORY / "docs/results/inversion.json")
    if path is not None:
        packages = {"spolia": measure.versions(sys.executable, ["spolia", "torch"])}
        data = {"all": "none: models with random weights"}
        tasks = list(dict.fromkeys(str(r["task"]) for r in rows))
        command = "python benchmarks/inversion.py" + ("" if width == 16 else f" --width {width}")
        measure.Ledger(path, command, tasks, packages, data, [0], NOTES).add(rows)


def alike(found: dict[str, list[dict[str, Any]]]) -> None:
    """End the benchmark where a side made other images than the plain loop."""
    for task in TASKS:
        wanted = found["plain loop"][0][task]["images"]
        for name in SIDES[:-1]:
            gap = max(abs(a - b) for a, b in zip(found[name][0][task]["images"], wanted, strict=True))
            print(f"{task}, {name}: the mean of an image differs from the plain loop's by {gap:.1e} at most")
            if not gap < LIMIT:
                raise SystemExit(f"{name}: not the same images")


def rows_of(found: dict[str, list[dict[str, Any]]], many: int, images: int) -> list[dict[str, object]]:
    rows = []
    for task in TASKS:
        seconds = {(name, part): [run[task][part] for run in runs] for name, runs in found.items() for part in ("few", "many")
                   if part in runs[0][task]}  # fmt: skip
        for (name, part), own in seconds.items():
            mark = {"baseline": True} if name == "plain loop" else {}
            where = f"{task}, {FEW if part == 'few' else many} steps"
            rows.append(measure.row(name, where, "seconds a model", "s", own, **mark))
            speed = [images / s for s in own]
            rows.append(measure.row(name, where, "images a second", "1/s", speed, **mark))
        ours = seconds["spolia", "few"]
        for theirs, metric in (
            (("plain loop", "few"), f"times faster than the plain loop of {FEW} steps"),
            (("plain loop", "many"), f"times faster than the plain loop of {many} steps"),
            (("spolia", "many"), f"times faster than {many} steps"),
        ):
            ratios = [b / a for a, b in zip(ours, seconds[theirs], strict=True)]
            row = measure.row("spolia", f"{task}, {FEW} steps", metric, "1", ratios)
            of_medians = statistics.median(seconds[theirs]) / statistics.median(ours)
            rows.append({**row, "mean": float(f"{of_medians:.4g}")})
    return rows


if __name__ == "__main__":
    main()

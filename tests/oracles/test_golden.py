"""Numbers written down once: what mergekit's operators gave on one 2 x 3 tensor, through our call and through its recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import spolia
from spolia.runs.verbs import merge_recipe

BASE = [[1, -1, 0.5], [0, 2, -0.5]]
CHANGES = {
    "A": [[0.4, -0.2, 0.1], [0.3, -0.6, 0.05]],
    "B": [[-0.1, -0.3, 0.2], [0.5, 0.4, -0.15]],
    "C": [[0.2, 0.1, -0.4], [-0.05, 0.3, 0.25]],
}
W, D = (0.7, 0.4, -0.3), (0.6, 0.5, 0.8)
TOLERANCE = 2e-5  # the results are rounded to five decimals

# what a recipe of mergekit means in the words of our settings
PER_TENSOR = {
    "weight": W,
    "density": D,
    "scope": "tensor",
    "count": "floor",
    "at_threshold": "exact",
    "zero_sign": "+",
    "scale": 1.0,
}
CRUMBS = {**PER_TENSOR, "gamma": 0.2, "normalize": False}
WD = {"weight": W, "density": D}
WDG = {**WD, "gamma": (0.2,) * 3}

# mergekit's method, per-model parameters, parameters of the whole merge, our method, our settings, result row by row
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any], list[float]]] = {
    "linear": (
        "linear", {"weight": W}, {}, "average", {"weight": W},
        [1.225, -1.3625, 0.8375, 0.53125, 1.5625, -0.625],
    ),
    "linear, sum": (
        "linear", {"weight": W}, {"normalize": False}, "average", {"weight": W, "normalize": False},
        [0.98, -1.09, 0.67, 0.425, 1.25, -0.5],
    ),
    "task_arithmetic": (
        "task_arithmetic", {"weight": W}, {}, "task_arithmetic", {"weight": W, "scale": 1.0},
        [1.18, -1.29, 0.77, 0.425, 1.65, -0.6],
    ),
    "task_arithmetic, mean": (
        "task_arithmetic", {"weight": W}, {"normalize": True, "lambda": 0.5},
        "task_arithmetic", {"weight": W, "scale": 0.5, "normalize": True},
        [1.1125, -1.18125, 0.66875, 0.26562, 1.78125, -0.5625],
    ),
    "ties": (
        "ties", WD, {}, "ties", PER_TENSOR,
        [1.4, -1.3, 0.1, 0.37273, 0.725, -0.25],
    ),
    "ties, sum, rescaled": (
        "ties", WD, {"normalize": False, "rescale": True},
        "ties", {**PER_TENSOR, "normalize": False, "rescale": "l1"},
        [1.35538, -1.165, 0.63565, 0.54154, 1.36518, -0.58478],
    ),
    "breadcrumbs": (
        "breadcrumbs", WDG, {}, "breadcrumbs", CRUMBS,
        [1.22, -1.29, 0.58, 0.21, 2.07, -0.575],
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", WDG, {}, "breadcrumbs_ties", CRUMBS,
        [1.28, -1.29, 0.58, 0.21, 2.16, -0.575],
    ),
}  # fmt: skip
SLERP = [1.13312, -1.07215, 0.53608, 0.09146, 1.83946, -0.49035]  # base to A, t = 0.3


def states() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base = torch.tensor(BASE)
    return {"w": base}, {name: {"w": base + torch.tensor(change)} for name, change in CHANGES.items()}


def check(merged: torch.Tensor, wanted: list[float]) -> None:
    assert merged.shape == (2, 3) and merged.dtype == torch.float32
    torch.testing.assert_close(merged.flatten(), torch.tensor(wanted), rtol=0, atol=TOLERANCE)


@pytest.fixture
def folders(write_model: Callable[..., Path], tmp_path: Path) -> Path:
    base, experts = states()
    for name, state in {"base": base, **experts}.items():
        write_model(tmp_path / name, state)
    return tmp_path


def through_recipe(folder: Path, recipe: dict[str, Any]) -> torch.Tensor:
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_file(Path(merge_recipe(folder / "recipe.yml", folder / "out")) / "model.safetensors")["w"]  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS)
def test_through_the_call(row: str):
    *_, method, settings, wanted = ROWS[row]
    base, experts = states()
    start = None if method == "average" else base
    check(spolia.merge(experts, base=start, method=method, settings=settings)["w"], wanted)


@pytest.mark.parametrize("row", ROWS)
def test_through_mergekits_recipe(row: str, folders: Path):
    method, each, whole, *_, wanted = ROWS[row]
    models = [
        {"model": f"./{name}", "parameters": {field: values[k] for field, values in each.items()}}
        for k, name in enumerate(CHANGES)
    ]
    base = {} if method == "linear" else {"base_model": "./base"}
    check(
        through_recipe(folders, {"merge_method": method, "models": models, **base, "parameters": whole}),
        wanted,
    )


def test_slerp_through_the_call():
    base, experts = states()
    check(spolia.merge([experts["A"]], base=base, method="slerp", settings={"t": 0.3})["w"], SLERP)
    check(spolia.merge([base, experts["A"]], method="slerp", settings={"t": 0.3})["w"], SLERP)


@pytest.mark.parametrize("order", [("base", "A"), ("A", "base")])
def test_slerp_through_mergekits_recipe_starts_at_the_base_in_any_order(order: tuple[str, str], folders: Path):
    models = [{"model": f"./{name}"} for name in order]
    recipe = {"merge_method": "slerp", "base_model": "./base", "models": models, "parameters": {"t": 0.3}}
    check(through_recipe(folders, recipe), SLERP)

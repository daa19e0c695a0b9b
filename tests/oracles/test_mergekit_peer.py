"""mergekit, run on the same recipe and folders, writes the same numbers.

Needs SPOLIA_MERGEKIT: the python of an environment with mergekit. Without it these tests are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spolia.runs.verbs import merge_recipe

PYTHON = os.environ.get("SPOLIA_MERGEKIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SPOLIA_MERGEKIT does not name a python with mergekit"),
]

# Tie-free fp32 data and a gamma that trims at least one element of the smallest tensor (64 elements): there both tools
# describe the same arithmetic, and only the order of a few fp32 operations differs.
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "each": {"weight": (0.7, 0.4, -0.3)}},
    "linear-sum": {
        "merge_method": "linear",
        "each": {"weight": (0.7, 0.4, -0.3)},
        "parameters": {"normalize": False},
    },
    "linear-gradient": {
        "merge_method": "linear",
        "each": {"weight": ([0.1, 0.9], [{"filter": "mlp", "value": 0.25}, {"value": 1}], 0.3)},
    },
    "slerp": {"merge_method": "slerp", "experts": 1, "parameters": {"t": 0.3}},
    "slerp-gradient": {
        "merge_method": "slerp",
        "experts": 1,
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.5}]},
    },
    "task_arithmetic": {"merge_method": "task_arithmetic", "each": {"weight": (0.7, 0.4, -0.3)}},
    "task_arithmetic-mean": {
        "merge_method": "task_arithmetic",
        "each": {"weight": (0.7, 0.4, 0.3)},
        "parameters": {"normalize": True, "lambda": 0.5},
    },
    "ties": {"merge_method": "ties", "each": {"weight": (0.7, 0.4, -0.3), "density": (0.6, 0.5, 0.8)}},
    "ties-sum-rescaled": {
        "merge_method": "ties",
        "each": {"weight": (0.7, 0.4, 0.3), "density": (0.6, 0.5, 0.8)},
        "parameters": {"normalize": False, "rescale": True, "lambda": 1.2},
    },
    "ties-29-percent": {"merge_method": "ties", "each": {"weight": 1.0, "density": 0.29}},
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "each": {"weight": (0.7, 0.4, -0.3), "density": (0.6, 0.5, 0.9), "gamma": (0.05, 0.1, 0.2)},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "each": {"weight": (0.7, 0.4, 0.3), "density": 0.5, "gamma": 0.05},
        "parameters": {"normalize": True, "rescale": True},
    },
    # what is random keeps everything at density 1
    "dare_linear": {"merge_method": "dare_linear", "each": {"weight": (0.7, 0.4, 0.3), "density": 1.0}},
    "dare_ties": {"merge_method": "dare_ties", "each": {"weight": (0.7, 0.4, 0.3), "density": 1.0}},
    "della": {"merge_method": "della", "each": {"weight": (0.7, 0.4, 0.3), "density": 1.0}},
    "nuslerp": {"merge_method": "nuslerp", "base": False, "experts": 2, "each": {"weight": (0.7, 0.4)}},
    "nuslerp-changes": {"merge_method": "nuslerp", "experts": 2, "each": {"weight": (0.7, 0.4)}},
    "nuslerp-rows": {
        "merge_method": "nuslerp",
        "experts": 2,
        "each": {"weight": (0.7, 0.4)},
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp-columns": {
        "merge_method": "nuslerp",
        "experts": 2,
        "each": {"weight": (0.7, 0.4)},
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "base": False, "each": {"weight": (0.7, 0.4, 0.3)}},
    "multislerp-changes": {
        "merge_method": "multislerp",
        "each": {"weight": (0.7, 0.4, 0.3)},
        "parameters": {"normalize_weights": False},
    },
    "karcher": {"merge_method": "karcher"},
    "model_stock": {"merge_method": "model_stock"},
    "model_stock-rows": {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
    "nearswap": {"merge_method": "nearswap", "experts": 1, "parameters": {"t": 0.01}},
    "arcee_fusion": {"merge_method": "arcee_fusion", "experts": 1},
    "sce": {"merge_method": "sce"},
    "sce-some": {"merge_method": "sce", "parameters": {"select_topk": 0.3}},
    "ram": {"merge_method": "ram", "parameters": {"epsilon": 0.02}},
    "ramplus_tl": {"merge_method": "ramplus_tl", "parameters": {"epsilon": 0.02, "r": 0.5, "alpha": 0.7}},
    "passthrough": {"merge_method": "passthrough", "base": False, "experts": 1, "parameters": {"scale": 0.5}},
}
DRIVER = """
import sys, traceback
from mergekit.scripts.run_yaml import main
for name in sys.argv[1:]:
    try:
        main([name + ".yml", name, "--no-write-model-card", "--no-copy-tokenizer"], standalone_mode=False)
    except Exception:
        traceback.print_exc()
"""


def recipe(wanted: dict[str, Any], base: Path, experts: list[Path]) -> dict[str, Any]:
    experts = experts[: wanted.get("experts", len(experts))]
    each = wanted.get("each", {})
    models = [
        {"model": str(path), "parameters": {f: v[k] if isinstance(v, tuple) else v for f, v in each.items()}}
        for k, path in enumerate(experts)
    ]
    if wanted["merge_method"] == "slerp":  # it lists both ends
        models = [{"model": str(base)}, *({"model": str(path)} for path in experts)]
    alone = wanted["merge_method"] == "linear" or not wanted.get("base", True)
    head = {} if alone else {"base_model": str(base)}
    rest = {"dtype": "float32", "parameters": wanted.get("parameters", {})}
    return {"merge_method": wanted["merge_method"], "models": models, **head, **rest}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def peer(make_pool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every recipe as NAME.yml and mergekit's result in NAME/. One process: its start takes seconds."""
    folder = tmp_path_factory.mktemp("peer")
    base, experts = make_pool("llama", 3, folder / "pool", spread=0.02)
    # wide apart, so that slerp's angle is far from the threshold where the tools turn to straight lines
    for name, wanted in RECIPES.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe(wanted, base, experts), sort_keys=False))
    run = subprocess.run(
        [PYTHON, "-c", DRIVER, *RECIPES],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    (folder / "log.txt").write_text(run.stdout + run.stderr)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_same_numbers(peer: Path, name: str, tmp_path: Path):
    assert (peer / name).is_dir(), (peer / "log.txt").read_text()[-3000:]
    theirs = tensors(peer / name)
    ours = tensors(Path(merge_recipe(peer / f"{name}.yml", tmp_path / "out")))  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for tensor, value in ours.items():
        assert value.dtype == theirs[tensor].dtype == torch.float32
        if name == "arcee_fusion":  # its KL is fp32 there: an element within 1e-3 of the threshold may go either way
            differ = ~torch.isclose(value, theirs[tensor], rtol=1e-5, atol=1e-6)
            assert int(differ.sum()) <= 1e-3 * differ.numel(), tensor
            continue
        # a handful of fp32 roundings of numbers near 1: 1e-5 relative, 1e-6 absolute leave room for no other rule
        torch.testing.assert_close(value, theirs[tensor], rtol=1e-5, atol=1e-6, msg=lambda m, t=tensor: f"{t}: {m}")


def test_the_configs_agree(peer: Path, tmp_path: Path):
    out = Path(merge_recipe(peer / "linear.yml", tmp_path / "out"))  # type: ignore[arg-type]
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, peer / "linear"))
    for key in ("architectures", "model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        assert ours[key] == theirs[key]

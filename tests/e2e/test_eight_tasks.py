"""benchmarks/eight_tasks.py: its parts, and all of it in its quick form, which goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spolia.catalog import find

HOUSE = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPOLIA_DATA", "nowhere"))
NAMES = ("measure", "eight_tasks_pool", "eight_tasks_training", "eight_tasks_rows")


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules by name."""
    sys.path.insert(0, str(HOUSE / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(HOUSE / "benchmarks"))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("net", ["vit", "squeezenet"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_row_is_a_method_with_settings_it_takes(parts: dict[str, ModuleType], net: str, quick: bool) -> None:
    rows, recipe = parts["eight_tasks_rows"], parts["eight_tasks_pool"].recipe_of(net, quick)
    entries = list(rows.entries(recipe))
    labels = [entry.label for entry in entries]
    assert len(labels) == len(set(labels))
    assert set(rows.IN_REGIMES) | set(rows.REPAIRED) <= set(labels)
    for entry in entries:
        kind = find(entry.method).settings_class()
        kind(**entry.settings)
        assert bool(entry.seen) == bool(find(entry.method).data)
        assert not entry.chosen or "scale" in kind.model_fields
    for merge in rows.REPAIRED:
        for _, method, settings, seen in rows.repairs(recipe, merge):
            asked = find(method).settings_class()(**settings)
            assert (asked.protocol == "transductive") == (seen == "test")


def test_augmented_images_are_the_images_moved_or_mirrored(parts: dict[str, ModuleType]) -> None:
    training = parts["eight_tasks_training"]
    x = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    made = training.augmented(x, np.random.default_rng(0))
    assert made.shape == x.shape and made.dtype == torch.uint8
    wide, shift = torch.nn.functional.pad(x[0], (training.SHIFT,) * 4), training.SHIFT
    windows = [wide[:, r : r + 8, c : c + 8] for r in range(2 * shift + 1) for c in range(2 * shift + 1)]
    places = {bytes(w.contiguous().numpy()): i for i, w in enumerate([*windows, *(w.flip(2) for w in windows)])}
    seen = [places[bytes(image.contiguous().numpy())] for image in made]
    # of 200 draws among 2 * 81: both ways of looking, and most of the 81 places (78 expected without mirrors, sd below 3)
    assert 60 < sum(i >= 81 for i in seen) < 140 and len({i % 81 for i in seen}) > 55


def test_heads_are_those_of_logistic_regression(parts: dict[str, ModuleType]) -> None:
    from sklearn.linear_model import LogisticRegression

    training, draws = parts["eight_tasks_training"], torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=draws) * torch.tensor([1.0, 2, 3, 0.5, 1]) + 4
    features[:, 0] += labels  # the classes overlap
    weight, bias = training._regressed(features, labels, 3, 200)
    ours = (features @ weight.T + bias).softmax(1)
    scaled = ((features - features.mean(0)) / features.std(0)).numpy()
    # there the sum of losses counts C times, and half the squares once
    peer = LogisticRegression(C=1 / (2 * training.DECAY * 300), tol=1e-8, max_iter=1000).fit(scaled, labels.numpy())
    theirs = torch.from_numpy(peer.predict_proba(scaled))
    assert float((ours - theirs).abs().max()) < 2e-3  # two solvers that stop at gradients of 1e-7 in fp32 and of 1e-8
    assert float((ours.argmax(1) == labels).float().mean()) > 0.5


SCRIPT = """
import runpy, sys
sys.argv.pop(0)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def call(fork: Callable[..., Any]) -> Callable[..., Any]:
    """call(*words) -> the benchmark's process, ended, with what it said as `stderr`."""

    def call(*words: str) -> Any:
        child = fork(SCRIPT, HOUSE / "benchmarks" / "eight_tasks.py", *words, "--threads", "1")
        child.stderr = child.communicate()[1]
        return child

    return call


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "tiny_imagenet100.npz").is_file(), reason="SPOLIA_DATA holds no images")
def test_all_stages_from_the_images_to_the_ledgers(tmp_path: Path, call: Callable[..., Any]) -> None:
    told = call("all", "--quick", "--data", str(DATA), "--work", str(tmp_path))
    assert told.returncode == 0, told.stderr[-3000:]
    assert "images/s" in told.stderr
    folder, kinds = tmp_path / "vit-quick", ("", "_regimes", "_surgery")
    ledgers = {kind: json.loads((folder / f"eight_tasks_vit{kind}.json").read_text()) for kind in kinds}
    table = {(row["method"], row["task"]): row for row in ledgers[""]["rows"]}
    methods = {method for method, _ in table}
    assert {"base", "experts, each on its own", "average", "ties", "regmean", "awd + ties"} <= methods
    assert {"adamerging, task-wise", "adamerging++, layer-wise", "awd + adamerging, layer-wise"} <= methods
    assert {f"adamerging, layer-wise{more}" for more in ("", ", on test inputs")} <= methods
    assert all((method, "average") in table and (method, "kmnist") in table for method in methods)
    assert {row["method"].partition(":")[0] for row in ledgers["_regimes"]["rows"]} == {"light", "medium", "strong"}
    repaired = [r for r in ledgers["_surgery"]["rows"] if r["task"] == "average" and " + " in r["method"]]
    assert len(repaired) == 4 * 4 + 2
    assert all(row["paired_difference"]["against"] == row["method"].partition(" + ")[0] for row in repaired)
    for kind, ledger in ledgers.items():
        places = [(row["method"], row["task"], row["metric"]) for row in ledger["rows"]]
        assert len(places) == len(set(places)), f"a row of eight_tasks_vit{kind} stands twice"
        assert str(tmp_path) not in json.dumps(ledger), "no path of the machine"
    again = call("table", "--quick", "--data", str(DATA), "--work", str(tmp_path))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "images/s" not in again.stderr and "seed 0" not in again.stderr, "nothing is done twice"
    assert json.loads((folder / "eight_tasks_vit.json").read_text())["rows"] == ledgers[""]["rows"]
    other = call("table", "--quick", "--net", "squeezenet", "--work", str(folder / "no"), "--data", str(tmp_path))
    assert other.returncode == 1 and "cannot be read" in other.stderr, "no weights there"


@pytest.mark.slow
def test_mistakes_are_told_before_anything_is_made(tmp_path: Path, call: Callable[..., Any]) -> None:
    inside = call("heads", "--work", str(HOUSE / "docs"))
    assert inside.returncode == 1 and "outside it" in inside.stderr
    nowhere = call("heads", "--data", str(tmp_path / "no"), "--work", str(tmp_path / "work"))
    assert nowhere.returncode == 1 and "is no folder" in nowhere.stderr and not (tmp_path / "work").exists()

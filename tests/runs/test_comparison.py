"""`spolia compare`: two models against dense arithmetic, run folders against their own numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from spolia import cli
from spolia.bench.multitask import paired
from spolia.core.seeds import TILE
from spolia.errors import SpoliaError
from spolia.runs.comparison import compare


def state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.2.w": (2 * TILE // 100 + 7, 100), "a.10.w": (9, 5), "bias": (4,), "one": (), "none": (0, 3)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()} | {
        "ids": torch.arange(12)
    }


def test_identical_is_said(tmp_path, write_model):
    a, b = write_model(tmp_path / "a", state()), write_model(tmp_path / "b", state(), shards=3)
    found = compare(a, b)
    assert found.identical and found.verdict == "identical: 6 tensors, every element equal"
    assert found.to_dict()["identical"] is True and "identical" in found.to_text()
    assert compare(a, a).identical


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_differences_equal_dense_ones(dtype, tmp_path, write_model):
    one = state(dtype)
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["a.2.w"][-1, ::3] += 0.5
    other["a.10.w"] *= 2
    other["ids"][7] = 40
    found = compare(write_model(tmp_path / "a", one), write_model(tmp_path / "b", other), threads=2)
    assert [t.name for t in found.tensors] == ["ids", "a.10.w", "a.2.w"] and found.equal == 3
    for seen in found.tensors:
        x, y = one[seen.name].double(), other[seen.name].double()
        # fp64 on both sides, added up in another order
        assert seen.largest == pytest.approx(float((y - x).abs().max()), rel=1e-12)
        assert seen.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
        assert seen.share == float((x != y).double().mean())
        assert seen.first == int((x != y).flatten().nonzero()[0])
    memory = compare(one, other)
    assert memory.tensors == found.tensors


def test_names_shapes_and_types(tmp_path, write_model):
    one = {"w": torch.ones(3, 2), "gone": torch.ones(2), "v": torch.ones(4)}
    other = {"w": torch.ones(2, 3), "new": torch.ones(2), "v": torch.ones(4).bfloat16()}
    found = compare(write_model(tmp_path / "a", one), write_model(tmp_path / "b", other))
    assert (found.only_a, found.only_b) == (["gone"], ["new"])
    assert found.shapes == [{"name": "w", "a": [3, 2], "b": [2, 3]}]
    assert found.dtypes == [{"name": "v", "a": "float32", "b": "bfloat16"}]
    assert not found.identical and found.equal == 1  # the values of v are equal
    assert "only in b" in found.to_text()


def test_nan_and_infinity():
    one = {"w": torch.tensor([1.0, float("nan"), 2.0, float("inf")])}
    assert compare(one, {"w": one["w"].clone()}).identical
    (seen,) = compare(one, {"w": torch.tensor([1.0, float("nan"), float("nan"), float("inf")])}).tensors
    assert (seen.share, seen.first, seen.largest, seen.relative) == (0.25, 2, None, None)
    json.dumps(compare(one, {"w": torch.zeros(4)}).to_dict(), allow_nan=False)
    (grown,) = compare({"w": torch.zeros(2)}, {"w": torch.ones(2)}).tensors
    assert (grown.largest, grown.relative) == (1.0, None)  # nothing to be relative to


# --- runs ------------------------------------------------------------------------------------------------------------

DATA = {"experts": "700 digits", "test": "600 digits"}


def run(folder: Path, counts: dict[int, dict[str, list[int]]], **more: Any) -> Path:
    """A run folder with one method `ties`: seed -> task -> [correct, total]."""
    (folder / "checkpoints").mkdir(parents=True)
    tasks = list(next(iter(counts.values())))
    percents = {t: [100 * c[t][0] / c[t][1] for c in counts.values()] for t in tasks}
    percents["average"] = [fmean(column) for column in zip(*percents.values(), strict=True)]
    rows = [
        {"method": "ties", "task": t, "metric": "accuracy", "unit": "%", "mean": fmean(v)} for t, v in percents.items()
    ]
    results = {"data": DATA, "seeds": list(counts), "rows": rows} | more
    (folder / "results.json").write_text(json.dumps(results))
    for seed, own in counts.items():
        kept = {"scores": {"accuracy": {"ties": own}}}
        (folder / "checkpoints" / f"scores-seed-{seed}.json").write_text(json.dumps(kept))
    (folder / "recipe.yaml").write_text(f"method: {{name: ties}}\nfolder: {folder.name}\n")
    return folder


def test_runs_are_paired_by_seed(tmp_path):
    first = {0: {"x": [50, 100], "y": [20, 50]}, 1: {"x": [60, 100], "y": [30, 50]}, 2: {"x": [55, 100], "y": [25, 50]}}
    second = {2: {"x": [58, 100], "y": [25, 50]}, 0: {"x": [52, 100], "y": [22, 50]}, 7: {"x": [0, 100], "y": [0, 50]}}
    found = compare(run(tmp_path / "a", first), run(tmp_path / "b", second))
    assert [(row.method, row.task) for row in found.rows] == [("ties", "x"), ("ties", "y"), ("ties", "average")]
    x, y, average = found.rows
    expected = paired([52.0, 58.0], [50.0, 55.0])
    assert x.differences == [{"mean": 2.5, "low": expected.low, "high": expected.high, "seeds": 2}]
    assert y.differences[0]["mean"] == 2.0 and average.differences[0]["mean"] == pytest.approx(2.25)
    assert x.means == [55.0, pytest.approx(110 / 3)]
    assert found.recipes == [["-folder: a", "+folder: b"]]
    text = found.to_text()
    assert "+2.50" in text and "only those in common" in text and "+folder: b" in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_seed_has_no_interval_and_missing_rows_are_dashes(tmp_path):
    a = run(tmp_path / "a", {0: {"x": [5, 10], "y": [5, 10]}})
    b, c = run(tmp_path / "b", {0: {"x": [6, 10]}}), run(tmp_path / "c", {1: {"x": [6, 10]}})
    found = compare(a, b, c)
    x, _, y = found.rows  # what not all have comes last
    assert x.differences == [{"mean": 10.0, "low": None, "high": None, "seeds": 1}, None]
    assert y.means == [50.0, None, None] and y.differences == [None, None]
    assert "-" in found.to_text()


def test_rows_in_which_runs_differ_come_first(tmp_path):
    a = run(tmp_path / "a", {0: {"x": [5, 10], "y": [4, 10], "z": [3, 10]}})
    b = run(tmp_path / "b", {0: {"x": [5, 10], "y": [5, 10], "z": [3, 10]}})
    assert [row.task for row in compare(a, b).rows] == ["y", "average", "x", "z"]


def test_a_merge_that_was_evaluated_is_a_model_still(tmp_path, write_model):
    """It has results of its own beside its weights."""
    a, b = (write_model(tmp_path / name, {"w": torch.ones(2)}) for name in "ab")
    (b / "results.json").write_text('{"rows": []}')
    assert "identical: 1 tensors" in compare(a, b).to_text()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"data": DATA | {"test": "600 other digits"}}, "600 other digits"),
        ({"data": DATA | {"choice": "197 digits"}}, "197 digits"),
        ({"rows": [{"method": "ties", "task": "x", "metric": "loss", "mean": 1.0}]}, "measured loss"),
    ],
)
def test_unlike_runs_are_refused(more, told, tmp_path):
    counts = {0: {"x": [5, 10]}}
    with pytest.raises(SpoliaError, match=told):
        compare(run(tmp_path / "a", counts), run(tmp_path / "b", counts, **more))


def test_what_methods_look_at_may_differ_and_is_told(tmp_path):
    counts = {0: {"x": [5, 10]}}
    looking = {"merge": "197 inputs without labels", "choice of scale": "197 labelled inputs"}
    a, b = run(tmp_path / "a", counts), run(tmp_path / "b", counts, data=DATA | looking)
    text = compare(a, b).to_text()
    assert f"{b} saw: merge: 197 inputs without labels, choice of scale: 197 labelled inputs." in text
    assert f"{a} saw: nothing." in text
    assert "saw:" not in compare(a, run(tmp_path / "c", counts)).to_text()


def test_what_cannot_be_compared_is_refused(tmp_path, write_model):
    one, model = run(tmp_path / "a", {0: {"x": [5, 10]}}), write_model(tmp_path / "m", {"w": torch.ones(2)})
    with pytest.raises(SpoliaError, match="is a run folder"):
        compare(one, model)
    with pytest.raises(SpoliaError, match="nothing to compare"):
        compare(model)
    with pytest.raises(SpoliaError, match="3 models"):
        compare(model, model, model)
    (one / "results.json").write_text("{")
    with pytest.raises(SpoliaError, match="cannot be read"):
        compare(one, one)


def says(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert not end.value.code
    return capsys.readouterr().out


def test_command(tmp_path, write_model, capsys):
    a = write_model(tmp_path / "a", {"w": torch.ones(4)})
    b = write_model(tmp_path / "b", {"w": torch.tensor([1.0, 1.0, 1.0, 3.0])})
    assert "1 of 1 shared tensors differ" in says(capsys, "compare", str(a), str(b))
    told = json.loads(says(capsys, "compare", str(a), str(b), "--json"))
    assert told["kind"] == "models" and told["tensors"][0]["share"] == 0.25 and told["tensors"][0]["largest"] == 2


@pytest.mark.slow
def test_runs_and_headers_need_no_torch(tmp_path, write_model):
    a, b = (run(tmp_path / name, {0: {"x": [5, 10]}}) for name in "ab")
    c, d = (write_model(tmp_path / name, {"w": torch.ones(n)}) for name, n in (("c", 2), ("d", 3)))
    code = (
        "import sys\nfrom spolia.runs.comparison import compare\n"
        "compare(*sys.argv[1:3]); compare(*sys.argv[3:])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, a, b, c, d], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""`spolia inspect` as a whole: what it says in text, JSON and HTML, and that its recipe runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spolia
from spolia import cli
from spolia.errors import SpoliaError
from spolia.runs.inspection import inspect
from spolia.runs.recipe import load_recipe


def state(seed: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{i}.mlp.weight": (24, 16) for i in range(3)}
    shapes |= {"model.embed_tokens.weight": (30, 16), "model.norm.weight": (16,)}
    return {name: spread * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def plus(base, change, factor=1.0):
    return {name: tensor + factor * change[name] for name, tensor in base.items()}


def tokenizer(folder: Path, tokens: list[str], added: list[str]) -> None:
    vocab = {token: i for i, token in enumerate(tokens)}
    extra = [{"id": len(tokens) + i, "content": token, "special": True} for i, token in enumerate(added)]
    data = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": extra}
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.fixture
def pool(tmp_path, write_model):
    """base, and the folders of math, code, a copy of code, and one over-scaled."""
    base, changes = state(0), [state(k, 0.05) for k in (1, 2, 3)]
    config = {"model_type": "llama", "vocab_size": 30, "num_hidden_layers": 3}
    models = {
        "base": base,
        "math": plus(base, changes[0]),
        "code": plus(base, changes[1]),
        "copy": plus(base, changes[1]),
        "long": plus(base, changes[2], 6.0),
    }
    for name, tensors in models.items():
        write_model(tmp_path / name, tensors, config | ({"rope_theta": 5} if name == "math" else {}))
        tokenizer(tmp_path / name, ["a", "b"], ["<x>"] if name == "code" else [])
    return [tmp_path / name for name in models]


def test_everything_is_said(pool):
    seen = inspect(pool[0], pool[1:], threads=1).to_dict()
    json.dumps(seen, allow_nan=False)
    assert [e["name"] for e in seen["experts"]] == ["math", "code", "copy", "long"]
    assert {(f["kind"], f["expert"]) for f in seen["findings"]} == {("copy", "copy"), ("overscaled", "long")}
    assert seen["leave_out"] == ["copy"] and "copy" in seen["verdict"]
    # 5 % noise on unit normals, the longest tensor has 480 elements: 10 % is three standard deviations and more
    assert seen["experts"][0]["relative"] == pytest.approx(0.05, rel=0.1)
    assert seen["cosines"][1][2] == pytest.approx(1) and abs(seen["cosines"][0][1]) < 0.1
    assert [item["layer"] for item in seen["layers"]] == [
        *("before the layers", "layer 0", "layer 1", "layer 2", "outside the layers")
    ]
    assert (
        sum(item["elements"] for item in seen["layers"])
        == seen["elements"]
        == sum(t.numel() for t in state(0).values())
    )
    words = {item["model"]: item for item in seen["vocabularies"]}
    assert (words["base"]["tokens"], words["base"]["config_vocab_size"]) == (2, 30)
    assert (words["code"]["added_tokens"], words["code"]["against_base"]) == (1, "tokens: 1 more")
    assert words["math"]["against_base"] == "same"
    (differs,) = seen["config_differences"]
    assert differs["key"] == "rope_theta" and differs["values"]["math"] == 5 and differs["values"]["base"] is None
    assert "256" in seen["notes"][0]


def test_recipe_loads_and_merges(pool, tmp_path):
    seen = inspect(str(pool[0]), [str(path) for path in pool[1:]])
    file = tmp_path / "elsewhere" / "suggested.yaml"
    file.parent.mkdir()
    file.write_text(seen.recipe)
    recipe = load_recipe(file)
    assert [entry.path for entry in recipe.pool.experts] == [pool[1], pool[2], pool[4]]
    assert recipe.method.name == "task_arithmetic" and len(recipe.settings.weight) == 3
    assert recipe.settings.weight[2] < 0.3  # the long one, made six times too long
    assert spolia.run(recipe, tmp_path / "run").joinpath("result", "model.safetensors").is_file()


def test_wrong_base_is_left_out_of_the_recipe(pool, tmp_path, write_model):
    other = write_model(tmp_path / "other", state(99))
    seen = inspect(other, pool[1:3])
    assert [f.kind for f in seen.advice.findings] == ["wrong_base"]
    (tmp_path / "r.yaml").write_text(seen.recipe)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.pool.base is None and recipe.method.name == "average"


def test_models_in_memory_and_one_expert():
    base = state(0)
    seen = inspect(base, {"only": plus(base, state(1, 0.1))})
    assert seen.recipe == "" and seen.advice.method is None and seen.to_dict()["experts"][0]["path"] == ""
    with pytest.raises(SpoliaError, match="no experts"):
        inspect(base, [])


def test_equal_folder_names_are_told_apart(pool, tmp_path, write_model):
    twin = write_model(tmp_path / "later" / "math", plus(state(0), state(7, 0.05)))
    seen = inspect(pool[0], [pool[1], twin])
    assert seen.names == ["base", "math", "later/math"]
    (tmp_path / "r.yaml").write_text(seen.recipe)
    assert len(load_recipe(tmp_path / "r.yaml").pool.experts) == 2


def test_longer_vocabulary_is_measured_and_told(pool, tmp_path, write_model):
    wide = plus(state(0), state(8, 0.05))
    wide["model.embed_tokens.weight"] = torch.cat([wide["model.embed_tokens.weight"], torch.ones(2, 16)])
    seen = inspect(pool[0], [pool[1], write_model(tmp_path / "wide", wide)])
    assert [f.kind for f in seen.advice.findings] == ["vocabulary"]
    assert seen.portrait.tensors["model.embed_tokens.weight"].numel == 30 * 16


def test_what_does_not_fit_is_refused(pool, tmp_path, write_model):
    short = {name: tensor for name, tensor in state(0).items() if "layers.2" not in name}
    with pytest.raises(SpoliaError, match=r"model.layers.2.mlp.weight"):
        inspect(pool[0], [pool[1], write_model(tmp_path / "short", short)])
    with pytest.raises(SpoliaError, match="nowhere"):
        inspect(pool[0], [tmp_path / "nowhere"])


def test_adapter_on_the_base(pool, tmp_path, write_adapter):
    name = "model.layers.0.mlp"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(24, 2) / 100}
    adapter = write_adapter(tmp_path / "adapter", factors)
    seen = inspect(str(pool[0]), [str(pool[1]), f"{pool[0]}+{adapter}"])
    assert seen.to_dict()["layers"][1]["relative"][1] > 0 and seen.to_dict()["layers"][2]["relative"][1] == 0
    assert seen.to_dict()["experts"][1]["effective_rank"] > 0
    (tmp_path / "r.yaml").write_text(seen.recipe)
    assert load_recipe(tmp_path / "r.yaml").pool.experts[1].lora == adapter


def spolia_says(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert not end.value.code
    return capsys.readouterr().out


def test_command(pool, capsys, tmp_path):
    paths = [str(path) for path in pool]
    text = spolia_says(capsys, "inspect", *paths)
    for part in ("copy is a copy of code", "verdict", "recipe to begin with", "layer 2", "rope_theta", "at most 256"):
        assert part in text
    told = json.loads(spolia_says(capsys, "inspect", *paths, "--json", "--threads", "1"))
    assert told["method"] == "task_arithmetic" and told["recipe"] in text + "\n"


def test_page_needs_a_folder(pool, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(pool[0]), str(pool[1]), "--html", str(tmp_path / "none" / "seen.html")])
    assert end.value.code == 2 and "--html" in capsys.readouterr().err


@pytest.mark.slow
def test_help_needs_no_torch():
    code = (
        "import sys\nfrom spolia.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    for command in ("inspect", "compare"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_page_stands_alone(pool, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    page = tmp_path / "seen.html"
    assert str(page) in spolia_says(capsys, "inspect", *map(str, pool), "--html", str(page))
    html = page.read_text()
    for part in ("copy is a copy of code", "Cosines between task vectors", "by layer", "spolia: 1"):
        assert part in html
    assert not re.search(r'(src|href)="https?:|<script', html)
    assert html.count("<svg") >= 8  # three bars, two matrices, three lines

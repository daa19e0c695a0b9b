"""spolia import: a folder that transformers loads, whole or not at all; and the table of a CLIP pool, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spolia.core.checkpoint import Checkpoint, read_tensors
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.runs.clip_pool import pool_names, read_pool
from spolia.runs.clip_table import BASE, EXPERTS, Asked, clip_table, main
from spolia.runs.importing import import_model, preprocessor, write_heads
from spolia.zoo.clip_names import to_open_clip

SIZE, DIM = 8, 12
WORDS = ("a", "photo", "of", "the", "digit", "cat", "dog", "stone", "wall")


def tiny_clip(seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    block = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 16, "max_position_embeddings": 12, "bos_token_id": 14, "eos_token_id": 15}
    sight = {"image_size": SIZE, "patch_size": 4, "projection_dim": DIM}
    config = CLIPConfig(
        text_config=block | text | {"projection_dim": DIM}, vision_config=block | sight, projection_dim=DIM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
            made.logit_scale.fill_(2.6592)
    return made


def save_clip(folder: Path, clip: Any) -> Path:
    """The model with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    clip.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"unused{i}" for i in range(4)), "<u>", "<b>", "<e>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 14), ("<e>", 15)])
    own = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<u>", bos_token="<b>", eos_token="<e>", pad_token="<e>"
    )
    own.save_pretrained(folder)
    return folder


def open_clip_state(clip: Any) -> dict[str, torch.Tensor]:
    return {f"model.{name}": t for name, t in to_open_clip(clip.state_dict()).items()}


# --- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_transformers_loads_what_was_imported(text: bool, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    clip = tiny_clip()
    torch.save(open_clip_state(clip), tmp_path / "x.pt")
    # two heads of attention in the text tower are in no file: width / 64 is none of them, so only the image tower is asked
    if text:
        with pytest.raises(SpoliaError, match="heads of attention"):
            import_model(tmp_path / "x.pt", tmp_path / "out", text=True, heads=2, quick_gelu=True)
        clip.save_pretrained(tmp_path / "whole")
        told = import_model(tmp_path / "whole", tmp_path / "out", text=True)
        loaded = CLIPModel.from_pretrained(tmp_path / "out")
    else:
        told = import_model(tmp_path / "x.pt", tmp_path / "out", heads=2, quick_gelu=True)
        loaded = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out")
        assert any(name.startswith("model.transformer") for name in told["left out"])
    own, wanted = loaded.state_dict(), clip.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in own) and told["tensors"] == len(own)
    batch = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = [model.vision_model(pixel_values=batch).pooler_output for model in (loaded.eval(), clip)]
        made, meant = (model.visual_projection(p) for model, p in zip((loaded, clip), pooled, strict=True))
    assert torch.allclose(made, meant, atol=1e-6)  # the same numbers through the same sums
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["crop_size"]["height"] == SIZE
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_file_does_not_tell_is_assumed_aloud(tmp_path: Path) -> None:
    torch.save(open_clip_state(tiny_clip()), tmp_path / "x.pt")
    with pytest.warns(SpoliaWarning, match="QuickGELU"):
        told = import_model(tmp_path / "x.pt", tmp_path / "out", heads=2)
    assert told["assumed"] and told["config"]["hidden_act"] == "quick_gelu"
    import_model(tmp_path / "x.pt", tmp_path / "plain", heads=2, quick_gelu=False, projection=False)
    assert Checkpoint.open(tmp_path / "plain").config["hidden_act"] == "gelu"
    assert "visual_projection.weight" not in Checkpoint.open(tmp_path / "plain").tensors


def test_storage_types_stay(tmp_path: Path) -> None:
    torch.save({name: t.half() for name, t in open_clip_state(tiny_clip()).items()}, tmp_path / "x.pt")
    import_model(tmp_path / "x.pt", tmp_path / "out", heads=2, quick_gelu=True)
    assert {info.dtype.code for info in Checkpoint.open(tmp_path / "out").tensors.values()} == {"F16"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(open_clip_state(tiny_clip()), tmp_path / "x.pt")
    import_model(tmp_path / "x.pt", tmp_path / "out", heads=2, quick_gelu=True)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(SpoliaError, match="exists already"):
        import_model(tmp_path / "x.pt", tmp_path / "out", heads=2)

    def dies(size: int) -> Any:
        raise RuntimeError("killed")

    monkeypatch.setattr("spolia.runs.importing.preprocessor", dies)
    for target in ("out", "new"):
        with pytest.raises(RuntimeError):
            import_model(tmp_path / "x.pt", tmp_path / target, heads=2, quick_gelu=True, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before and not (tmp_path / "new").exists()
    monkeypatch.undo()
    import_model(
        tmp_path / "x.pt", tmp_path / "new", heads=2, quick_gelu=True
    )  # what was left over does not stand in the way


def test_calls_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match="no such file"):
        import_model(tmp_path / "nowhere.pt", tmp_path / "out")
    with pytest.raises(SpoliaError, match="both towers"):
        import_model(tmp_path / "x.pt", tmp_path / "out", text=True, projection=False)
    assert preprocessor(224)["image_processor_type"] == "CLIPImageProcessor"


def test_heads_in_a_file(tmp_path: Path) -> None:
    from spolia.zoo.heads import head_of

    save_clip(tmp_path / "clip", tiny_clip())
    (tmp_path / "p.yaml").write_text(
        "pets: {classes: [cat, dog], templates: ['a photo of a {}']}\nwalls: {classes: [stone]}\n"
    )
    made = write_heads(tmp_path / "clip", tmp_path / "p.yaml", tmp_path / "heads.safetensors")
    assert made == {"pets": (2, 1), "walls": (1, 1)}
    logits = head_of(tmp_path / "heads.safetensors", "pets")(torch.ones(3, DIM))
    assert logits.shape == (3, 2) and logits.isfinite().all()
    with pytest.raises(SpoliaError, match="exists already"):
        write_heads(tmp_path / "clip", tmp_path / "p.yaml", tmp_path / "heads.safetensors")
    with pytest.raises(SpoliaError, match="safetensors"):
        write_heads(tmp_path / "clip", tmp_path / "p.yaml", tmp_path / "heads.pt")


# --- pools -----------------------------------------------------------------------------------------------------------


def test_the_pools_of_the_package_are_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    eight = {"sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"}
    assert pool_names() == ["vit-b32-eight", "vit-b32-eight-papers"]
    for name in pool_names():
        pool = read_pool(name)
        assert set(pool.tasks) == eight and pool.rows and pool.checked is None  # nobody has loaded these ids
    assert read_pool("vit-b32-eight").base == "openai/clip-vit-base-patch32"
    papers = read_pool("vit-b32-eight-papers")
    assert papers.tasks["dtd"].expert == str(tmp_path / "checkpoints/ViT-B-32/DTD/finetuned.pt")


def test_everything_wrong_in_a_pool_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(
        "spolia: 1\nname: x\nfamily: ours\nbase: b\nprojektion: frozen\ntasks:\n  a: {expert: e, data: {nam: d}}\n"
        "rows:\n  - {label: one, method: tiez}\n  - {label: one, method: ties, settings: {densty: 1}}\n"
        "  - {label: two, method: ties, surgery: average}\n"
    )
    with pytest.raises(SpoliaError) as caught:
        read_pool(file)
    text = str(caught.value)
    for said in (
        "projektion",
        "pool.yaml:7 tasks.a.data",
        "did you mean `ties`",
        "stands twice",
        "densty",
        "no surgery",
    ):
        assert said in text, text
    with pytest.raises(SpoliaError, match="no pool of the package"):
        read_pool("vit-b32-ate")


class Rows(list):
    """Stands for a data set: rows with a picture and a label, and the names of the classes."""

    features: dict[str, Any]

    def with_format(self, kind: str, columns: list[str]) -> Any:
        assert (kind, columns) == ("numpy", ["label"])
        return _Columns(self)


class _Columns:
    def __init__(self, rows: Rows):
        self.rows = rows

    def __getitem__(self, part: slice) -> dict[str, list[int]]:
        return {"label": [row["label"] for row in self.rows[part]]}


def a_data_set(name: str, config: str | None, split: str | None) -> Rows:
    """Two classes that differ in brightness, `name` in colour."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng([len(name), split == "train"])
    rows = Rows()
    for i in range(30 if split == "train" else 20):
        pixels = draws.integers(0, 120, (10, 12, 3)) + 120 * (i % 2)
        rows.append({"image": Image.fromarray(pixels.astype(np.uint8)), "label": i % 2})
    rows.features = {
        "image": None,
        "label": SimpleNamespace(names=["cat", "dog"] if name == "pets" else ["Stone", "Wall"]),
    }
    return rows


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    pytest.importorskip("PIL.Image")
    base = tiny_clip()
    save_clip(tmp_path / "clip", base)
    for seed, name in enumerate(("pets", "walls"), 1):
        other = tiny_clip()
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.vision_model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
        other.vision_model.save_pretrained(tmp_path / name)
    file = tmp_path / "pool.yaml"
    file.write_text(
        "spolia: 1\nname: tiny\nfamily: made in the test\nbase: ./clip\nprojection: frozen\ntasks:\n"
        "  pets: {expert: ./pets, data: {name: pets}}\n  walls: {expert: ./walls, data: {name: walls}}\n"
        "rows:\n  - {label: average, method: average}\n  - {label: learned, method: adamerging, settings: {steps: 2}}\n"
        "  - {label: average + Surgery, method: average, surgery: surgery, surgery_settings: {solver: closed_form}}\n"
    )
    return file


@pytest.mark.slow
def test_a_table_from_end_to_end(pool_file: Path, tmp_path: Path) -> None:
    pool, said, asked = read_pool(pool_file), list[str](), Asked(adapt=16)
    ledger = clip_table(pool, tmp_path / "out", asked, load=a_data_set, say=said.append)
    rows = {(row["method"], row["task"]): row for row in ledger["rows"]}
    assert {method for method, _ in rows} == {BASE, EXPERTS, "average", "learned", "average + Surgery"}
    assert all(rows[BASE, task]["n"] == 20 for task in ("pets", "walls")) and rows[BASE, "pets"]["baseline"]
    assert "made in the test" in ledger["notes"] and "pets 16" in ledger["data"]["merge"]
    mean = (rows["average", "pets"]["mean"] + rows["average", "walls"]["mean"]) / 2
    assert rows["average", "average"]["mean"] == pytest.approx(mean)
    experts = [read_tensors(tmp_path / "out" / "models" / "experts" / name) for name in pool.tasks]
    merged = next(read_tensors(f) for f in (tmp_path / "out" / "merged").glob("average-*"))
    name = "vision_model.post_layernorm.weight"
    assert torch.allclose(merged[name], (experts[0][name] + experts[1][name]) / 2, atol=1e-7)  # fp32 rounding of a mean
    again = clip_table(pool, tmp_path / "out", asked, load=a_data_set, say=said.append)
    assert again["rows"] == ledger["rows"]
    with pytest.raises(SpoliaError, match="another pool, protocol or seed"):
        clip_table(pool, tmp_path / "out", Asked("papers"), load=a_data_set, say=said.append)


@pytest.mark.slow
def test_the_papers_protocol_says_so(pool_file: Path, tmp_path: Path) -> None:
    pool = read_pool(pool_file)
    pool = pool.model_copy(update={"rows": pool.rows[:1]})
    ledger = clip_table(pool, tmp_path / "out", Asked("papers", limit=6), load=a_data_set, say=lambda text: None)
    assert "the test pictures themselves" in ledger["data"]["merge"] and "as the papers do" in ledger["notes"]
    assert all(row["n"] == 6 for row in ledger["rows"])


def test_the_command_tells_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["nowhere", "-o", str(tmp_path / "o")]) == 2
    assert main(["vit-b32-eight", "-o", str(tmp_path / "o"), "--rows", "averag"]) == 2
    assert "did you mean `average`" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()

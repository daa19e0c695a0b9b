"""Recipes of prompts, from the check to the table, killed and gone on; the call; files of others' encoders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spolia
from spolia.bench.fscil import ACCURACY, DROP
from spolia.core import kept
from spolia.errors import SpoliaError
from spolia.parts.stream import class_incremental
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.fscil_ground import Shown, ground_of, labelled_of
from spolia.runs.fscil_problems import ArraysSessions, DataSessions, DigitsSessions, name_of
from spolia.runs.fscil_study import lines_of
from spolia.runs.prompted import names_in
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder
from spolia.zoo.encoders import encoder_of
from spolia.zoo.vit import ViT

NAMES = ("asp", "ncm", "l2p", "dualprompt", "coda")
SMALL = ["problem.epochs=0.2", "problem.width=8", "problem.heads=2", "problem.pretraining=4", "seeds=1"]
DEPTH = ["problem.depth=2"]


def small(name: str = "asp", *overrides: str) -> Any:
    return load_recipe(f"continual/{name}-tiny", [*SMALL, *overrides])


def test_class_means_and_l2p_stand_beside() -> None:
    assert [name for name, _ in lines_of(small())] == ["ncm", "l2p", "asp"]
    assert [name for name, _ in lines_of(small("ncm"))] == ["l2p", "ncm"]
    assert [settings.readings for _, settings in lines_of(small())[1:]] == [0.2, 0.2]  # the problem's
    assert lines_of(small("asp", "method.readings=3"))[-1][1].readings == 3


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("asp", "problem.base=7", "sessions of 2"),
        ("asp", "problem.patch=3", "does not divide 8"),
        ("asp", "problem.width=9", "does not part into"),
        ("dualprompt", "problem.depth=2", "block 4 of an encoder of 2"),
        ("coda", "method.blocks=[7]", "block 7 of an encoder of 5"),
        ("asp", "method.half=-1", "at least 0"),
        ("asp", "problem={source: npz_sessions}", "no file is named"),
        ("asp", "problem={source: data_sessions}", "no encoder is named"),
        ("asp", "problem={source: data_sessions, encoder: x, train: a.tsv}", "no test is named"),
        ("asp", "problem={source: digits}", "does not work on"),
        ("er", "problem={source: digits_sessions}", "does not work on"),
    ],
)
def test_what_does_not_fit_is_told_first(name: str, override: str, said: str) -> None:
    with pytest.raises(SpoliaError) as told:
        load_recipe(f"continual/{name}-tiny", [override])
    assert said in str(told.value)


def test_planning_never_imports_torch() -> None:
    code = (
        "import sys; from spolia.runs.recipe import load_recipe; from spolia.runs.engine import plan_recipe\n"
        "plan = plan_recipe(load_recipe('continual/asp-tiny')); assert plan.phases and 10 < plan.seconds < 120\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_data_are_told_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match=r"there is no tiny_imagenet100\.npz"):
        plan_recipe(load_recipe("continual/asp", [f"problem.folder={tmp_path}"]))


def test_sessions_follow_from_problem_and_seed() -> None:
    problem = DigitsSessions(source="digits_sessions", shuffle=True)
    one, two, other = (ground_of(problem, seed) for seed in (0, 0, 1))
    shots = [g.stream.experiences[1].batch(slice(None)) for g in (one, two, other)]
    assert torch.equal(shots[0].x, shots[1].x) and not torch.equal(shots[0].x, shots[2].x)
    assert [len(e.train) for e in one.stream.experiences[1:]] == [10, 10] and one.classes != other.classes
    assert sum(len(t.examples) for t in one.stream.tests) == 600


def test_what_the_encoder_sees() -> None:
    grey = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    assert Shown(16, "half")(grey).shape == (2, 3, 16, 16) and (Shown(None, "half")(grey) == 1).all()
    assert (Shown(None, "none")(torch.zeros(1, 3, 8, 8)) == 0).all()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(Shown(None, "imagenet")(mean), torch.zeros(1, 3, 8, 8), atol=1e-6, rtol=0)


def test_a_users_arrays_become_sessions(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz", x=draws.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), y=np.repeat(np.arange(6), 10)
    )
    problem = ArraysSessions(source="npz_sessions", file=tmp_path / "own.npz", base=4, ways=1, shots=2)
    ground = ground_of(problem, 0)
    assert [len(e.classes) for e in ground.stream.experiences] == [4, 1, 1]
    assert ground.view(ground.stream.experiences[0].batch(slice(0, 3)).x, draws).shape == (3, 3, 8, 8)
    with pytest.raises(SpoliaError, match="6 classes: 4 and sessions of 3"):
        ground_of(problem.model_copy(update={"ways": 3}), 0)
    assert labelled_of(problem, 0).classes == tuple("012345")


# --- texts and `datasets` ----------------------------------------------------------------------------------------------

TOPICS = ("attribute-access", "compound", "debugger", "formatstrings", "types", "typesmapping")
SESSIONS = {"source": "data_sessions", "base": 4, "ways": 1, "shots": 3, "length": 16, "pool": "mean"}


def words_of(topic: str) -> list[str]:
    """Runs of ten words from CPython's own pages."""
    from pydoc_data.topics import topics

    words = re.findall("[a-z]+", topics[topic].lower())
    return [" ".join(words[i : i + 10]) for i in range(0, 300, 10)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pages.tsv with two parts, the test's rows in another order of classes; encoder/, a small BERT with its tokenizer."""
    hf = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("texts")
    rows = [("train", t, text) for t in TOPICS for text in words_of(t)[:20]]
    rows += [("test", t, text) for t in reversed(TOPICS) for text in words_of(t)[20:]]
    (folder / "pages.tsv").write_text("\n".join(["split\tlabel\ttext", *map("\t".join, rows)]) + "\n")
    known = sorted({word for part, _, text in rows if part == "train" for word in text.split()})
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *known])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    words.save_pretrained(folder / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.BertConfig(vocab_size=len(known) + 2, max_position_embeddings=16, pad_token_id=0, **sizes)
        hf.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "encoder")
    return folder


def about(folder: Path, **more: Any) -> dict[str, Any]:
    parts = {name: {"path": str(folder / "pages.tsv"), "split": name} for name in ("train", "test")}
    return {**SESSIONS, "encoder": str(folder / "encoder"), **parts, **more}


@pytest.mark.slow
def test_texts_become_sessions_in_the_words_of_their_encoder(texts: Path) -> None:
    problem = DataSessions(**about(texts, shuffle=True))
    ground = ground_of(problem, 1)
    assert sorted(ground.classes) == list(TOPICS) and ground.classes != TOPICS
    assert [len(e.train) for e in ground.stream.experiences] == [80, 3, 3] and ground.show is ground.view is None
    known = json.loads((texts / "encoder" / "tokenizer.json").read_text())["model"]["vocab"]
    for place, test in enumerate(ground.stream.tests[1:], start=4):  # each id's texts are its own topic's
        batch = test.examples.batch(slice(None))
        ids = [[known.get(w, 1) for w in text.split()] for text in words_of(ground.classes[place])[20:]]
        assert batch.y.tolist() == [place] * 10 and batch.x["input_ids"].tolist() == ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncm", "l2p", "asp"])
def test_prompts_are_learned_on_texts_by_a_recipe(name: str, texts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(f"continual/{name}-tiny", [f"problem={json.dumps(about(texts, epochs=0.2))}", "seeds=1"])
    assert str(plan_recipe(recipe).title).startswith(f"{name} on pages, 4 classes, then 1-way 3-shot")
    folder = run_recipe(recipe, RunFolder(tmp_path / "run"))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    means = {row["method"]: row["mean"] for row in rows if row["metric"] == ACCURACY and row["task"] == "average"}
    assert set(means) == {"ncm", "l2p", name}
    assert not (folder / "result" / "encoder").exists()  # the user's own
    file = folder / "result" / "prompts.safetensors"
    assert names_in(file) == list(TOPICS)
    learner = spolia.attach_prompts(encoder_of(texts / "encoder", pool="mean"), file)
    ids = torch.tensor([[5, 6, 7, 0]])
    assert learner.predict({"input_ids": ids, "attention_mask": (ids > 0).long()}).shape == (1, 6)


def test_what_texts_lack_is_told_by_the_plan(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**more: Any) -> str:
        with pytest.raises(SpoliaError) as error:
            plan_recipe(load_recipe("continual/asp-tiny", [f"problem={json.dumps(about(texts, **more))}"]))
        return str(error.value)

    assert "problem.encoder: `owner/model` is no folder" in told(encoder="owner/model")
    assert "problem.train" in (said := told(encoder=str(tmp_path))) and "tokenizer" in said and "problem.test" in said
    assert "problem.test: there is no such file" in told(test="none.tsv")
    assert "holds no column `topic`" in told(labels="topic")
    assert "`types` is none of the classes" in told(classes=list(TOPICS[:4]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'spolia[data]'" in told(train={"dataset": "owner/set", "split": "train"})


@pytest.mark.slow
def test_texts_of_datasets_have_their_own_names(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["brick", "mortar", "wood"]

    class Rows:
        column_names = ("text", "label")
        features = {"label": types.SimpleNamespace(names=names)}  # noqa: RUF012 - as theirs

        def __len__(self) -> int:
            return 9

        def __getitem__(self, column: str) -> list[Any]:
            return [2, 1, 0] * 3 if column == "label" else ["a value", "the class", "an object"] * 3

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: Rows()  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    parts: dict[str, Any] = {name: {"dataset": "owner/walls", "split": name} for name in ("train", "test")}
    problem = DataSessions(**about(texts, **parts, base=2))
    ground = ground_of(problem, 0)
    assert ground.classes == tuple(names) and name_of(problem) == "walls"
    assert ground.stream.tests[1].examples.batch(slice(None)).y.tolist() == [2, 2, 2]


# --- runs --------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    figures = json.loads((folder / "figures.json").read_text())
    seen = [row for row in rows if row["metric"] not in ("time",)]
    prompts = {n: t.tolist() for n, t in spolia_file(folder / "result" / "prompts.safetensors").items()}
    return {"rows": seen, "figures": figures, "prompts": prompts}


def spolia_file(file: Path) -> dict[str, torch.Tensor]:
    from spolia.core import tensorfile

    return tensorfile.read(file, "")[1]


@pytest.mark.slow
def test_a_run_leaves_a_table_and_goes_on_after_a_kill_to_the_bit(tmp_path: Path) -> None:
    recipe = small("asp", *DEPTH)
    whole = run_recipe(recipe, RunFolder(tmp_path / "whole"))
    found = files(whole)
    tasks = [row["task"] for row in found["rows"] if row["method"] == "asp" and row["metric"] == ACCURACY]
    assert tasks == ["base", "session 1", "session 2", "average"]
    assert {row["metric"] for row in found["rows"]} >= {DROP, "harmonic accuracy", "novel accuracy", "learned"}
    assert (whole / "report.html").exists() and "asp has" in (whole / "summary.txt").read_text()
    learner = spolia.attach_prompts(str(whole / "result" / "encoder"), whole / "result" / "prompts.safetensors")
    assert learner.predict(torch.zeros(2, 3, 8, 8)).shape == (2, 10)

    class Stop(Exception):
        pass

    class Bar:
        """Progress that stops the run after so many steps."""

        def __init__(self, most: int):
            self.left = most

        def start(self, *told: Any) -> None:
            pass

        def advance(self, count: int, **numbers: Any) -> None:
            self.left -= count
            if self.left < 0:
                raise Stop

        def finish(self) -> None:
            pass

    for steps in (2, 5, 2):  # inside pretraining, and inside the learners' base sessions
        with pytest.raises(Stop):
            run_recipe(recipe, RunFolder(tmp_path / "broken"), progress=Bar(steps))
    assert files(run_recipe(recipe, RunFolder(tmp_path / "broken"))) == found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncm", "dualprompt", "coda"])
def test_every_learner_runs_from_its_recipe(name: str, tmp_path: Path) -> None:
    folder = run_recipe(small(name), RunFolder(tmp_path / name))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    own = [row for row in rows if not row.get("baseline") and row["metric"] == ACCURACY and row["task"] == "average"]
    assert [row["method"] for row in own] == [name] and 0 <= own[0]["mean"] <= 100


# --- the call and others' encoders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream() -> Any:
    y = torch.arange(4).repeat(8)
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + y.view(-1, 1, 1, 1)
    return class_incremental((x, y), (x[:16], y[:16]), tasks=[2, 1, 1], shots=3)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES)
def test_the_call_learns_prompts_on_ones_own_network(name: str, stream: Any) -> None:
    vit = ViT(8, 4, 8, 5, 2, generator=torch.Generator().manual_seed(0))
    learner, outcome = spolia.continual(vit, stream, method=name, batch=8)
    assert learner.encoder.module is vit and len(learner.prototypes) == 4 and 0 <= outcome.fewshot()["last"] <= 100
    with pytest.raises(SpoliaError, match="its own loss"):
        spolia.continual(vit, stream, method=name, criterion=lambda logits, y: logits.sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_three_lines_put_prompts_on_a_model_of_transformers(kind: str, tmp_path: Path, stream: Any) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if kind == "vit":
        hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(
            tmp_path / "own"
        )
        own, x = stream, torch.randn(5, 3, 8, 8)
    else:
        hf.BertModel(hf.BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)).save_pretrained(tmp_path / "own")
        ids = torch.randint(0, 30, (32, 6), generator=torch.Generator().manual_seed(0))
        words, y = {"input_ids": ids, "attention_mask": (ids > 4).long()}, torch.arange(4).repeat(8)
        words["attention_mask"][:, 0] = 1
        own = class_incremental((words, y), (words, y), tasks=[2, 1, 1], shots=3)
        x = {name: t[:5] for name, t in words.items()}
    learner, _ = spolia.continual(encoder_of(tmp_path / "own"), own, method="asp", settings={"hidden": 4}, batch=8)
    file = spolia.save_prompts(learner, tmp_path / "prompts.safetensors")
    assert file.stat().st_size < (tmp_path / "own" / "model.safetensors").stat().st_size

    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "own")
    again = spolia.attach_prompts(model, file)
    assert torch.equal(again.predict(x), learner.predict(x))


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match="cannot be opened"):
        encoder_of(str(tmp_path))


def test_kept_state_goes_through_a_file(tmp_path: Path, stream: Any) -> None:
    vit = ViT(8, 4, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    learner, _ = spolia.continual(vit, stream, method="asp", settings={"hidden": 4}, batch=8)
    kept.save(tmp_path / "state.safetensors", learner.state_dict())
    other, _ = spolia.continual(vit, stream, method="asp", settings={"hidden": 4}, batch=8, seed=1)
    other.load_state_dict(kept.load(tmp_path / "state.safetensors"))
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(other.predict(x), learner.predict(x))

"""Recipes over folders whose tasks come with data: every mistake at once, the artefact transformers loads, resume, repair."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.runs import folder_study
from spolia.runs.recipe import load_recipe
from spolia.runs.verbs import merge_recipe

SIZES = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "hidden_dropout_prob": 0.0,
}  # fmt: skip
CLASSES = {"upright": 10, "parity": 2}
RECIPE = """\
spolia: 1
pool:
  base: ./base
  experts: [./upright, ./parity]
  tasks:
    upright: {unlabelled: ./upright.npz, test: ./upright-test.npz}
    parity: {unlabelled: ./parity.npz, test: ./parity-test.npz}
method: {name: task_arithmetic}
"""


def vit(classes: int, seed: int, start: dict[str, torch.Tensor] | None = None) -> Any:
    """A tiny ViT; with `start`, that encoder moved a little."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.ViTForImageClassification(hf.ViTConfig(**SIZES, num_labels=classes)).eval()
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        own = start.get(name) if start is not None and not name.startswith("classifier") else parameter.detach()
        assert own is not None
        parameter.data = own + 0.05 * torch.randn(own.shape, generator=noise)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts whose heads differ, random, and inputs for both tasks."""
    folder, draws = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    base = vit(10, 0)
    base.save_pretrained(folder / "base")
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    for seed, (name, classes) in enumerate(CLASSES.items(), 1):
        vit(classes, seed, start).save_pretrained(folder / name)
        x = draws.standard_normal((90, 1, 8, 8)).astype(np.float32)
        y = draws.integers(0, classes, 90)
        np.savez(folder / f"{name}.npz", x=x[:40])
        np.savez(folder / f"{name}-test.npz", x=x[40:], y=y[40:])
    return folder


def written(models: Path, text: str, name: str = "mine.yaml") -> Path:
    (models / name).write_text(text)
    return models / name


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def problems_of(models: Path, text: str) -> list[Any]:
    with pytest.raises(SpoliaError) as caught:
        load_recipe(written(models, text, "wrong.yaml"))
    return caught.value.problems


# --- mistakes --------------------------------------------------------------------------------------------------------


LEARNED = RECIPE.replace("task_arithmetic", "adamerging")
MISTAKES = [  # (in the good recipe, written instead, place, what, mend)
    ("    upright: {", "    uprigt: {", "pool.tasks.uprigt", "no expert is called `uprigt`", "`upright`"),
    ("unlabelled: ./parity.npz", "unlabeled: ./parity.npz", "pool.tasks.parity.unlabeled", "no `unlabeled`", "`unlabelled`"),
    ("./upright.npz", "./uprigt.npz", "pool.tasks.upright.unlabelled", "uprigt.npz: there is no such file", "`upright.npz`"),
    ("unlabelled: ./upright.npz, ", "", "pool.tasks.upright", "looks at unlabelled inputs, and none are named", "add `unlab"),
    ("./parity-test.npz}", "./parity-test.npz, labels: z}", "pool.tasks.parity.test", "no array `z`", "known: x, y"),
    ("./parity-test.npz}", "./parity-test.npz, inputs: z}", "pool.tasks.parity.test", "no array `z`", "known: x, y"),
    ("test: ./parity-test.npz", "test: ./parity.npz", "pool.tasks.parity.test", "no array looks like labels", "it holds x"),
    ("test: ./parity-test.npz", "test: ./upright-test.npz", "pool.tasks.parity.test", "for a head of 2 classes", "0 to 1"),
    ("test: ./parity-test.npz", "test: ./large.npz", "pool.tasks.parity.test", "of 9 x 9; the model's config says 8 x 8", ""),
    ("test: ./parity-test.npz", "test: ./texts.tsv", "pool.tasks.parity.test", "the expert's tokenizer", "tokenizer.json"),
    ("test: ./parity-test.npz", "test: ./mine.onnx", "pool.tasks.parity.test", "no such file", ""),
    ("test: ./parity-test.npz", "test: {dataset: glue}", "pool.tasks.parity.test", "datasets", ""),
    ("test: ./parity-test.npz", "test: {}", "pool.tasks.parity.test", "names no inputs", "path: FILE"),
    ("test: ./parity-test.npz", "test: {path: a.npz, splt: a}", "pool.tasks.parity.test.splt", "no `splt`", "`split`"),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(models: Path) -> Path:
    np.savez(models / "large.npz", x=np.zeros((4, 1, 9, 9), np.float32), y=np.zeros(4, np.int64))
    (models / "texts.tsv").write_text("text\tlabel\nfine\t1\n")
    return models


@pytest.mark.parametrize(("right", "wrong", "place", "what", "mend"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_a_mistake_is_told_with_place_and_cure(odd, right, wrong, place, what, mend) -> None:
    assert right in LEARNED
    found = problems_of(odd, LEARNED.replace(right, wrong, 1))
    hits = [p for p in found if p.where.split(" ")[-1] == place and what in p.what and mend in p.mend]
    assert hits, [str(p) for p in found]


def test_all_mistakes_are_told_at_once(odd: Path) -> None:
    text = (
        LEARNED.replace("./upright.npz", "./no.npz")
        .replace("./parity-test.npz", "./large.npz")
        .replace("pool:", "sed: 1\npool:")
    )
    places = {problem.where.split(" ")[-1] for problem in problems_of(odd, text)}
    assert places == {"sed", "pool.tasks.upright.unlabelled", "pool.tasks.parity.test"}


def test_without_tasks_a_method_that_looks_says_how_to_name_them(models: Path) -> None:
    text = LEARNED[: LEARNED.index("  tasks:")] + "method: {name: adamerging}\n"
    (problem,) = problems_of(models, text)
    assert "names none" in problem.what and "tasks: {EXPERT: {unlabelled: FILE" in problem.mend


def test_a_label_given_by_name_is_looked_up(models: Path) -> None:
    from spolia.runs.schema import TaskData
    from spolia.runs.taskdata import Known, class_numbers

    known = Known(models, {"id2label": {"0": "cat", "1": "dog"}}, 2)
    assert class_numbers(["dog", "cat"], TaskData(), known) == [1, 0]
    assert class_numbers(["dog", "cat"], TaskData(classes=["dog", "cat"]), known) == [0, 1]
    assert class_numbers(np.array([0.0, 1.0]), TaskData(), known) == [0, 1]
    with pytest.raises(SpoliaError, match="`cow` is none of the classes"):
        class_numbers(["cow"], TaskData(), known)
    with pytest.raises(SpoliaError, match="label -1 for a head of 2"):
        class_numbers([-1, 0], TaskData(), known)


def test_what_is_more_than_a_merge_of_weights_is_run_not_merged(models: Path, tmp_path: Path) -> None:
    for text in (LEARNED, RECIPE + "surgery: {name: surgery}\n"):
        with pytest.raises(SpoliaError, match="looks at unlabelled inputs: more than a merge of weights"):
            merge_recipe(written(models, text), tmp_path / "out")


def test_models_that_do_not_fit_leave_no_folder(models: Path, tmp_path: Path) -> None:
    import transformers as hf

    for layers, said in ((3, "parity: has tensor .* no layer"), (1, "parity: lacks 16 tensors")):
        sizes = {**SIZES, "num_hidden_layers": layers}
        hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=2)).save_pretrained(models / f"of-{layers}")
        text = RECIPE.replace("./parity]", f"{{name: parity, path: ./of-{layers}}}]")
        with pytest.raises(SpoliaError, match=said):
            spolia.run(written(models, text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resolved_recipe_loads_to_itself(models: Path) -> None:
    first = load_recipe(written(models, LEARNED))
    again = load_recipe(written(models, first.to_yaml(), "again.yaml"))
    assert again.pool == first.pool and again.to_yaml() == first.to_yaml()


def test_the_plan_says_what_is_seen(models: Path) -> None:
    plan = spolia.plan(written(models, LEARNED + "surgery: {name: surgery, solver: closed_form}\n"))
    data = {phase.name: phase.data for phase in plan.phases}
    assert data["merge"] == "weights, and unlabelled inputs; upright: 40 inputs, parity: 40 inputs"
    assert "upright: 50 inputs" in data["test"] and list(data) == ["merge", "surgery", "test"]
    assert plan.seconds > 0 and plan.time_basis


# --- runs ------------------------------------------------------------------------------------------------------------


def whole(run: Path, task: str) -> Any:
    """What the docs say: the merged model with a task's head, in two lines."""
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(run / "result" / "heads" / task)
    model = hf.AutoModelForImageClassification.from_pretrained(run / "result", config=config)
    model.load_state_dict(load_file(run / "result" / "heads" / task / "model.safetensors"), strict=False)
    return model.eval()


def right(model: Any, models: Path, task: str) -> int:
    held = np.load(models / f"{task}-test.npz")
    with torch.no_grad():
        return int((model(torch.from_numpy(held["x"])).logits.argmax(1) == torch.from_numpy(held["y"])).sum())


def scored(run: Path, label: str) -> dict[str, list[int]]:
    return read(run, folder_study.SCORES)[label]


def test_a_merge_is_judged_and_its_artefact_loads(models: Path, tmp_path: Path) -> None:
    import transformers as hf

    run = spolia.run(written(models, RECIPE), tmp_path / "run")
    rows = read(run, "results.json")["rows"]
    named = {"base", "experts, each on its own", "average", "task_arithmetic"}
    assert {row["method"] for row in rows if not row.get("baseline")} == {"task_arithmetic"}
    assert {(row["method"], row["task"]) for row in rows} == {(m, t) for m in named for t in (*CLASSES, "average")}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
    _, told = hf.AutoModel.from_pretrained(run / "result", output_loading_info=True)
    assert not told["unexpected_keys"] and all("pooler" in key for key in told["missing_keys"])
    base, experts = read_tensors(models / "base"), [read_tensors(models / name) for name in CLASSES]
    merged = read_tensors(run / "result")
    assert merged.keys() == {name for name in base if not name.startswith("classifier")}
    for name, tensor in merged.items():
        wanted = base[name] + 0.3 * sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)  # a few roundings of fp32 at size 1
    for task, classes in CLASSES.items():
        model = whole(run, task)
        assert model.config.num_labels == classes
        assert torch.equal(model.classifier.weight, read_tensors(models / task)["classifier.weight"])
        assert scored(run, "task_arithmetic")[task] == [right(model, models, task), 50]
        expert = hf.AutoModelForImageClassification.from_pretrained(models / task).eval()
        assert scored(run, "experts, each on its own")[task] == [right(expert, models, task), 50]
    assert "task_arithmetic reaches" in (run / "summary.txt").read_text()
    assert "accuracy" in (run / "result" / "README.md").read_text() and (run / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adamerging, steps: 12, check_every: 4", "fisher", "regmean", "regmean_plus"])
def test_what_looks_at_inputs_runs_and_says_what_it_saw(models: Path, tmp_path: Path, method: str) -> None:
    text = RECIPE.replace("name: task_arithmetic", f"name: {method}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", spolia.errors.SpoliaWarning)
        run = spolia.run(written(models, text), tmp_path / "run")
    name = method.partition(",")[0]
    ledger = read(run, "results.json")
    assert ledger["data"]["merge"] == "weights, and inputs without labels (upright: 40 inputs, parity: 40 inputs)"
    assert ledger["data"]["test"] == "upright: 50 inputs, parity: 50 inputs; none of them adapted on"
    assert {row["method"] for row in ledger["rows"]} >= {name, "average", "task_arithmetic", "base"}
    assert scored(run, name) == {task: [right(whole(run, task), models, task), 50] for task in CLASSES}
    if name == "adamerging":
        kept = read(run, "result/coefficients.json")
        assert kept["experts"] == list(CLASSES) and kept["tensors"].keys() <= read_tensors(run / "result").keys()
        assert read(run, "figures.json")[0]["title"] == "Coefficients"


@pytest.mark.slow
def test_inputs_that_are_adapted_on_and_tested_are_counted(models: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("task_arithmetic", "adamerging, steps: 1").replace("./parity.npz", "./parity-test.npz")
    with pytest.warns(spolia.errors.SpoliaWarning, match="parity: inputs to be tested on were adapted on"):
        run = spolia.run(written(models, text), tmp_path / "run")
    assert "parity: 50 inputs, 50 of them adapted on" in read(run, "results.json")["data"]["test"]


REPAIRED = RECIPE.replace("task_arithmetic", "adamerging, steps: 6, check_every: 3")
REPAIRED += "surgery: {name: NAME, rank: 4, solver: closed_form}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surgery", "deep"])
def test_adapters_attach_to_a_loaded_model_in_three_lines(models: Path, tmp_path: Path, name: str) -> None:
    run = spolia.run(written(models, REPAIRED.replace("NAME", name)), tmp_path / "run")
    label = f"adamerging + {name}"
    for task in CLASSES:
        model = whole(run, task)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the adapters know these weights
            spolia.Adapters.load(run / "result" / "adapters" / "adapters.safetensors").attach(model, task=task)
        assert scored(run, label)[task] == [right(model, models, task), 50]
    assert {row["method"] for row in read(run, "results.json")["rows"]} >= {"adamerging", label}
    assert any(figure["kind"] == "bars" for figure in read(run, "figures.json"))


@pytest.mark.slow
def test_surgery_as_the_method_merges_first(models: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("{name: task_arithmetic}", "{name: surgery, merge: ties, solver: closed_form, rank: 4}")
    run = spolia.run(written(models, text), tmp_path / "run")
    assert {row["method"] for row in read(run, "results.json")["rows"]} >= {"ties", "ties + surgery", "average"}


@pytest.mark.slow
def test_killed_and_run_again_gives_equal_bits(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = REPAIRED.replace("NAME, rank: 4, solver: closed_form", "surgery, rank: 4, steps: 9")
    one = spolia.run(written(models, text), tmp_path / "one")
    steps = Journal.steps

    def stopping(at: int) -> Callable[..., Any]:
        def stopped(self: Journal, n: int, keep: Any = None, *, shared: bool = False) -> Any:
            for step in steps(self, n, keep):
                if step == at:
                    self.request_stop()
                yield step

        return stopped

    for at in (4, 7):  # in the merge, then in the surgery
        monkeypatch.setattr(Journal, "steps", stopping(at))
        with pytest.raises(Interrupted):
            spolia.run(models / "mine.yaml", tmp_path / "two")
    monkeypatch.undo()
    two = spolia.run(models / "mine.yaml", tmp_path / "two")
    for file in ("model.safetensors", "coefficients.json"):
        assert (one / "result" / file).read_bytes() == (two / "result" / file).read_bytes()
    adapters = [load_file(run / "result" / "adapters" / "adapters.safetensors") for run in (one, two)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert read(one, "results.json")["rows"] == read(two, "results.json")["rows"]


@pytest.mark.slow
def test_a_folder_that_is_whole_is_not_made_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = spolia.run(written(models, RECIPE), tmp_path / "run")
    before = (run / "result" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(folder_study, "judged", lambda *_: pytest.fail("counted again"))
    spolia.run(models / "mine.yaml", tmp_path / "run")
    assert (run / "result" / "model.safetensors").stat().st_mtime_ns == before


# --- texts -----------------------------------------------------------------------------------------------------------


def tokenizer(folder: Path, words: list[str]) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *sorted(set(words))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return len(vocabulary)


WORDS = ["the", "old", "wall", "stands", "and", "a", "mason", "carves", "new", "stone"]


def texts(folder: Path, count: int = 24) -> None:
    draws = np.random.default_rng(1)
    for task in ("tone", "kind"):
        rows = [f"{s}\t{draws.integers(0, 2)}\t{' '.join(draws.choice(WORDS, 5))}" for s in ["train", "test"] * count]
        (folder / f"{task}.tsv").write_text("split\tlabel\ttext\n" + "\n".join(rows) + "\n")


@pytest.mark.slow
def test_texts_go_through_the_experts_own_tokenizer(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    texts(tmp_path)
    for seed, name in enumerate(("base", "tone", "kind")):
        size = tokenizer(tmp_path / name, WORDS)
        torch.manual_seed(seed)
        config = hf.BertConfig(**sizes, vocab_size=size, max_position_embeddings=16, num_labels=2 + seed)
        model = hf.BertForSequenceClassification(config) if seed else hf.BertModel(config)
        model.save_pretrained(tmp_path / name)
    lines = [f"    {t}: {{unlabelled: {{path: {t}.tsv, split: train}}, test: {{path: {t}.tsv, split: test}}, length: 8}}"
             for t in ("tone", "kind")]  # fmt: skip
    text = "spolia: 1\npool:\n  base: base\n  experts: [tone, kind]\n  tasks:\n" + "\n".join(lines)
    text += "\nmethod: {name: adamerging, steps: 3}\nsurgery: {name: surgery, solver: closed_form, rank: 2}\n"
    run = spolia.run(written(tmp_path, text), tmp_path / "run")
    assert scored(run, "adamerging + surgery").keys() == {"tone", "kind"}
    assert hf.AutoModel.from_pretrained(run / "result").config.architectures == ["BertModel"]  # as the base's
    batch = hf.AutoTokenizer.from_pretrained(tmp_path / "tone")(["the old stone"], return_tensors="pt")
    config = hf.AutoConfig.from_pretrained(run / "result/heads/tone")
    model = hf.AutoModelForSequenceClassification.from_pretrained(run / "result", config=config)
    model.load_state_dict(load_file(run / "result/heads/tone/model.safetensors"), strict=False)
    before = model.eval()(**batch).logits
    attached = spolia.Adapters.load(run / "result/adapters/adapters.safetensors").attach(model, task="tone")
    assert not torch.equal(model(**batch).logits, before)
    attached.detach()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.slow
def test_language_models_are_judged_by_perplexity(make_pool: Callable[..., Any], tmp_path: Path) -> None:
    import transformers as hf

    from spolia.bench.language import likelihood

    base, experts = make_pool("llama", 2, tmp_path)
    for k in (1, 2):
        (tmp_path / f"text{k}.txt").write_text("The stones of an old wall hold up a new one.\n" * (10 + k))
    tasks = [f"    expert-{k}: {{unlabelled: text1.txt, test: text{k}.txt, length: 16}}" for k in (1, 2)]
    text = f"spolia: 1\npool:\n  base: {base}\n  experts: [{experts[0]}, {experts[1]}]\n  tasks:\n" + "\n".join(tasks)
    with pytest.warns(spolia.errors.SpoliaWarning, match="were adapted on"):
        run = spolia.run(written(tmp_path, text + "\nmethod: {name: adamerging, steps: 2}\n"), tmp_path / "run")
    model = hf.AutoModelForCausalLM.from_pretrained(run / "result").eval()
    ids = hf.AutoTokenizer.from_pretrained(experts[1])((tmp_path / "text2.txt").read_text()[:-1], return_tensors="pt")
    ids = ids["input_ids"][0][: len(ids["input_ids"][0]) // 16 * 16]
    found = scored(run, "adamerging")["expert-2"]
    # the same tokens in the same windows, summed in fp64
    assert found == pytest.approx([likelihood(model, ids, context=16).nats, len(ids) - 1], rel=1e-5)
    row = next(r for r in read(run, "results.json")["rows"] if r["method"] == "adamerging" and r["task"] == "expert-2")
    assert row["metric"] == "perplexity" and row["mean"] == pytest.approx(np.exp(found[0] / found[1]))
    assert not (run / "result" / "heads").exists()
    # the coefficients as a recipe make the same weights by streaming
    out = merge_recipe(run / "result" / "mergekit_recipe.yml", tmp_path / "again")
    assert isinstance(out, Path)
    for name, tensor in read_tensors(run / "result").items():
        torch.testing.assert_close(read_tensors(out)[name], tensor, rtol=1e-5, atol=1e-6)  # two orders of one sum


# --- reading ---------------------------------------------------------------------------------------------------------


def loaded(task: dict[str, Any], folder: Path, config: dict[str, Any], labels: bool = True) -> Any:
    from spolia.runs.schema import TaskData
    from spolia.runs.taskdata import Known
    from spolia.runs.taskload import load_tasks

    return load_tasks({"t": TaskData(**task)}, {"t": Known(folder, config, 2)}, labels)


def test_folders_of_images_are_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / name).mkdir(parents=True)
        image.new("RGB", (12, 10), (100 * k, 50, 0)).save(tmp_path / "set" / name / "one.png")
    config = {"image_size": 8, "num_channels": 3, "id2label": {"0": "dog", "1": "cat"}}
    given, test = loaded({"unlabelled": tmp_path / "set", "test": tmp_path / "set"}, tmp_path, config)
    assert test["t"].labels_at([0, 1]).tolist() == [1, 0]  # by the config's names, not by their order
    batch = given["t"].batch([0, 1])
    assert batch.shape == (2, 3, 8, 8)
    torch.testing.assert_close(batch[1, 0], torch.full((8, 8), 100 / 255))
    with pytest.raises(SpoliaError, match="`dog` is none of the classes"):
        loaded({"test": tmp_path / "set", "classes": ["cat", "cow"]}, tmp_path, config)


def test_pixels_in_whole_numbers_are_scaled_and_floats_are_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((2, 8, 8), 51, np.uint8), y=[0, 1])
    np.savez(tmp_path / "b.npz", x=np.full((2, 1, 8, 8), 51, np.float32), y=[0, 1])
    config = {"image_size": 8, "num_channels": 1}
    found = [loaded({"test": tmp_path / f"{n}.npz"}, tmp_path, config)[1]["t"].batch([0]) for n in "ab"]
    assert found[0].shape == found[1].shape == (1, 1, 8, 8)
    torch.testing.assert_close(found[0] * 255, found[1])


def test_data_sets_by_name_are_read_by_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Rows:
        column_names = ("sentence", "label")

        def __init__(self, count: int = 3):
            self.count = count

        def __len__(self) -> int:
            return self.count

        def select(self, places: range) -> Any:
            return Rows(len(places))

        def __getitem__(self, name: str) -> list[Any]:
            return {"sentence": ["the old wall", "a stone", "and"], "label": [0, 1, 1]}[name][: self.count]

    tokenizer(tmp_path, WORDS)
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: Rows()  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    part = {"dataset": "glue", "config": "sst2", "split": "validation", "most": 2}
    _, test = loaded({"test": part, "length": 8}, tmp_path, {})
    assert len(test["t"]) == 2 and test["t"].labels_at([0, 1]).tolist() == [0, 1]
    assert test["t"].batch([0])["input_ids"].shape == (1, 3)


# --- real digits -----------------------------------------------------------------------------------------------------


def trained(start: Any, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float, head: bool) -> Any:
    import copy

    model = copy.deepcopy(start).train()
    model.classifier.requires_grad_(head)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=draws)
        loss = torch.nn.functional.cross_entropy(model(x[rows]).logits, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_digits_are_repaired_by_a_recipe(tmp_path: Path) -> None:
    """Experts on turned and inverted digits: merging costs them much, surgery on their own inputs brings some back."""
    import transformers as hf

    from spolia.data.digits import digits

    domains = {name: digits(name) for name in ("turned", "inverted")}

    def shown(split: Any) -> torch.Tensor:
        return split.x.view(-1, 1, 8, 8)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = hf.ViTForImageClassification(
            hf.ViTConfig(**{**SIZES, "patch_size": 2, "hidden_size": 32}, num_labels=10)
        )
    x, y = (torch.cat(parts) for parts in zip(*((shown(d.base), d.base.y) for d in domains.values()), strict=True))
    base = trained(start, x, y, 60, 2e-3, True)
    base.save_pretrained(tmp_path / "base")
    for name, splits in domains.items():
        trained(base, shown(splits.train), splits.train.y, 150, 2e-3, False).save_pretrained(tmp_path / name)
        np.savez(tmp_path / f"{name}.npz", x=shown(splits.validation).numpy())
        np.savez(tmp_path / f"{name}-test.npz", x=shown(splits.test).numpy(), y=splits.test.y.numpy())
    text = RECIPE.replace("upright", "turned").replace("parity", "inverted").replace("task_arithmetic", "average")
    text += "surgery: {name: deep, solver: closed_form}\n"
    run = spolia.run(written(tmp_path, text), tmp_path / "run")
    rows = {row["method"]: row["mean"] for row in read(run, "results.json")["rows"] if row["task"] == "average"}
    # 1,200 test images: intervals of 3 points to either side; what is measured is 34 and 15
    assert rows["experts, each on its own"] > rows["average"] + 10
    assert rows["average + deep"] > rows["average"] + 5

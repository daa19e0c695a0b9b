"""`spolia eval`: the numbers are those of the run that made the model, and of transformers; mistakes come before any count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spolia
from spolia import cli
from spolia.errors import SpoliaError
from spolia.runs.evaluation import evaluate

TASKS = ("expert-1", "expert-2")
EXPERTS = "experts, each on its own"
RECIPE = """\
spolia: 1
pool:
  base: ./base
  experts: [./expert-1, ./expert-2]
  tasks:
    expert-1: {unlabelled: ./one.npz, test: ./one-test.npz}
    expert-2: {unlabelled: ./two.npz, test: ./two-test.npz}
method: {name: task_arithmetic}
"""
HEADLESS = RECIPE.replace("  experts: [./expert-1, ./expert-2]\n", "")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_pool: Callable[..., Any]) -> Path:
    """A base and two experts with heads, random, inputs for both tasks, and two recipes."""
    folder, draws = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    make_pool("vit", 2, folder, spread=0.1)
    for name in ("one", "two"):
        x, y = draws.standard_normal((70, 1, 8, 8)).astype(np.float32), draws.integers(0, 3, 70)
        np.savez(folder / f"{name}.npz", x=x[:20])
        np.savez(folder / f"{name}-test.npz", x=x[20:], y=y[20:])
    (folder / "tasks.yaml").write_text(RECIPE)
    (folder / "own-head.yaml").write_text(HEADLESS)
    return folder


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that was repaired and judged by its run."""
    recipe = models / "repaired.yaml"
    recipe.write_text(RECIPE + "surgery: {name: surgery, solver: closed_form, rank: 2}\n")
    return spolia.run(recipe, tmp_path_factory.mktemp("runs") / "run")


def measured(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, ...]]:
    keys = ("metric", "unit", "mean", "low", "high", "n")
    return {(row["method"], row["task"]): tuple(row[key] for key in keys) for row in rows}


def results(folder: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    return measured(json.loads((folder / "results.json").read_text())["rows"])


def counted(model: Any, models: Path, file: str) -> float:
    """Per cent right, as transformers has it."""
    held = np.load(models / f"{file}-test.npz")
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(held["x"])).logits.argmax(1).numpy()
    return 100 * int((found == held["y"]).sum()) / len(held["y"])


def means(found: Any, method: str) -> dict[str, float]:
    return {row["task"]: row["mean"] for row in found.rows if row["method"] == method}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_again_to_the_same_numbers(run: Path) -> None:
    found = evaluate(run)
    own = measured(found.rows)
    assert {method for method, _ in own} == {"base", EXPERTS, "task_arithmetic", "task_arithmetic + surgery"}
    assert own == {place: row for place, row in results(run).items() if place in own}
    assert {row["method"] for row in found.rows if row.get("baseline")} == {"base", EXPERTS}
    assert found.data == {"test": "expert-1: 50 inputs, expert-2: 50 inputs"} and found.model == str(run)


def test_a_merged_folder_is_judged_under_the_experts_heads(models: Path, tmp_path: Path) -> None:
    import transformers as hf

    out = spolia.merge([models / name for name in TASKS], method="average", out=tmp_path / "merged")
    found = evaluate(out, models / "tasks.yaml")
    merged = hf.AutoModelForImageClassification.from_pretrained(out)
    for task, file in zip(TASKS, ("one", "two"), strict=True):
        model = hf.AutoModelForImageClassification.from_pretrained(models / task)
        assert means(found, EXPERTS)[task] == counted(model, models, file)
        merged.classifier.load_state_dict(model.classifier.state_dict())
        assert means(found, "merged")[task] == counted(merged, models, file)
    assert measured(evaluate(spolia.merge([models / n for n in TASKS]), models / "tasks.yaml").rows) == {
        (method.replace("merged", "model"), task): row for (method, task), row in measured(found.rows).items()
    }


def test_a_runs_result_is_judged_with_its_adapters_wherever_they_fit(run: Path, models: Path, tmp_path: Path) -> None:
    result = shutil.copytree(run / "result", tmp_path / "given")
    own, found = measured(evaluate(run).rows), evaluate(result, models / "tasks.yaml")
    for task in (*TASKS, "average"):
        assert measured(found.rows)["given", task] == own["task_arithmetic", task]
        assert measured(found.rows)["given + adapters", task] == own["task_arithmetic + surgery", task]
    other = RECIPE.replace("./expert-2]", "{name: third, path: ./expert-2}]").replace("expert-2: {u", "third: {u")
    (models / "other.yaml").write_text(other)
    found = evaluate(run, models / "other.yaml")
    assert means(found, "task_arithmetic + surgery") == {} and "third" in means(found, "task_arithmetic")
    assert "left aside: they are of expert-1, expert-2, not of third" in found.notes


def test_without_experts_a_model_answers_by_its_own_head(models: Path) -> None:
    import transformers as hf

    found = evaluate(models / "expert-2", models / "own-head.yaml")
    model = hf.AutoModelForImageClassification.from_pretrained(models / "expert-2")
    assert [means(found, "expert-2")[task] for task in TASKS] == [counted(model, models, f) for f in ("one", "two")]
    assert {row["method"] for row in found.rows} == {"base", "expert-2"} and "model's own" in found.notes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["merge/ties-tiny", "surgery/deep-tiny method.solver=closed_form"])
def test_digits_are_judged_again_to_the_same_numbers(
    recipe: str, ready_pools: Callable[[], Any], tmp_path: Path
) -> None:
    name, *overrides = recipe.split()
    with ready_pools():
        run = spolia.run(name, tmp_path / "run", overrides=[*overrides, "pool.domains=[upright, turned]"])
    own, told = measured(evaluate(run).rows), results(run)
    assert own[EXPERTS, "turned"] == told[EXPERTS, "turned"]
    if name.startswith("merge"):
        assert own["base", "average"] == told["base", "average"] and own["ties", "average"] == told["ties", "average"]
    else:
        assert own["task_arithmetic", "average"] == told["merged", "average"]
        assert own["task_arithmetic + deep", "turned"] == told["deep", "turned"]
    shutil.rmtree(run / "checkpoints" / "seed-0" / "heads")
    with pytest.raises(SpoliaError, match=r"heads: is gone.*\n.*spolia run .*recipe\.yaml -o NEW"):
        evaluate(run)


@pytest.mark.slow
def test_language_models_are_judged_by_perplexity(make_pool: Callable[..., Any], tmp_path: Path) -> None:
    make_pool("llama", 2, tmp_path)
    lines = ["spolia: 1", "pool:", "  base: ./base", "  experts: [./expert-1, ./expert-2]", "  tasks:"]
    for k in (1, 2):
        (tmp_path / f"text{k}.txt").write_text("The stones of an old wall hold up a new one.\n" * (10 + k))
        lines.append(f"    expert-{k}: {{test: text{k}.txt, length: 16}}")
    (tmp_path / "texts.yaml").write_text("\n".join([*lines, "method: {name: ties}\n"]))
    run = spolia.run(tmp_path / "texts.yaml", tmp_path / "run")
    found = evaluate(run)
    own = measured(found.rows)
    assert own == {place: row for place, row in results(run).items() if place in own}
    assert own["ties", "average"][0] == "perplexity" and "per token" in found.notes
    lone = tmp_path / "lone.yaml"
    lone.write_text("\n".join([lines[0], lines[1], *lines[4:]]))  # no method, no models: tasks alone
    alone = measured(evaluate(run / "result", lone).rows)
    assert {method for method, _ in alone} == {"result"}
    assert alone["result", "expert-1"] == own["ties", "expert-1"]


# --- mistakes --------------------------------------------------------------------------------------------------------


def refused(*asked: Any, **more: Any) -> str:
    with pytest.raises(SpoliaError) as caught:
        evaluate(*asked, **more)
    assert all(problem.where and problem.mend for problem in caught.value.problems)
    return str(caught.value)


MISTAKES = [  # (in the good recipe, written instead, what is said, how it is mended)
    (
        RECIPE[RECIPE.index("  tasks:") : RECIPE.index("method")],
        "",
        "names no tasks to judge on",
        "add `tasks: {EXPERT",
    ),
    (
        "test: ./one-test.npz",
        "test: ./on-test.npz",
        "on-test.npz: there is no such file",
        "did you mean `one-test.npz`?",
    ),
    (", test: ./one-test.npz", "", "expert-1: names no inputs", "add `test: FILE`"),
    ("    expert-1: {", "    expert1: {", "no expert is called `expert1`", "did you mean `expert-1`?"),
    ("spolia: 1", "spolia: 1\nsed: 3", "sed", "did you mean `seed`?"),
]


@pytest.mark.parametrize(("right", "wrong", "what", "mend"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_in_the_recipe_is_told(models: Path, right: str, wrong: str, what: str, mend: str) -> None:
    assert right in RECIPE
    (models / "wrong.yaml").write_text(RECIPE.replace(right, wrong, 1))
    told = refused(models / "expert-1", models / "wrong.yaml")
    assert what in told and mend in told and "wrong.yaml" in told


def test_what_is_not_judged_here_says_where_it_is(models: Path, tmp_path: Path) -> None:
    assert "spolia eval MODEL tasks.yaml" in refused(models / "expert-1")
    assert "models on disk and their `tasks`" in refused(models / "expert-1", "merge/ties-tiny")
    assert "models on disk and their `tasks`" in refused(models / "expert-1", "distill/kd-tiny")
    assert "their configs and heads run the model" in refused({"a": torch.ones(2)}, models / "own-head.yaml")
    (tmp_path / "status.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(spolia.load_recipe("distill/kd-tiny").to_yaml())
    assert "kd is no merge" in (told := refused(tmp_path)) and f"spolia report {tmp_path}" in told
    (tmp_path / "recipe.yaml").write_text(spolia.load_recipe("merge/ties-tiny").to_yaml())
    assert "the run has no result yet" in refused(tmp_path)
    (tmp_path / "result").mkdir()
    assert "is gone, and the result is judged beside it" in refused(tmp_path)
    assert "judged on its own digits" in refused(tmp_path, overrides=["seed=1"])


def test_models_that_do_not_fit_are_told_with_both_names(models: Path, tmp_path: Path) -> None:
    import transformers as hf

    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    other = hf.ViTForImageClassification(hf.ViTConfig(**sizes, hidden_size=16, num_labels=3))
    other.save_pretrained(tmp_path / "narrow")
    told = refused(tmp_path / "narrow", models / "tasks.yaml")
    assert "narrow" in told and "expert-1" in told and "16" in told and "32" in told
    hf.ViTModel(hf.ViTConfig(**sizes, hidden_size=32)).save_pretrained(tmp_path / "headless")
    (models / "bare.yaml").write_text(HEADLESS.replace("  base: ./base\n", ""))
    assert "has no head to answer with" in refused(tmp_path / "headless", models / "bare.yaml")


# --- the command -----------------------------------------------------------------------------------------------------


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", *map(str, words)])
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_command_prints_a_table_in_every_form(run: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = typed(capsys, run, "pool.tasks.expert-1.test.most=10")
    assert code == 0 and "accuracy (%), higher is better" in out and "Wilson's over test inputs" in out
    assert "test: expert-1: 10 inputs, expert-2: 50 inputs" in out and "task_arithmetic + surgery" in out
    assert "evaluate" in err  # progress goes where it does not mix with the table
    code, out, _ = typed(capsys, models / "base", models / "tasks.yaml", "--json")
    told = json.loads(out)
    assert told["kind"] == "evaluation" and {r["method"] for r in told["rows"]} == {"base", "model", EXPERTS}
    by = {(row["method"], row["task"]): row["mean"] for row in told["rows"]}
    assert all(by["base", task] == by["model", task] for task in TASKS)
    for form, sign in (("markdown", "| --- |"), ("latex", r"\begin{tabular}"), ("csv", "method,baseline,task")):
        code, out, _ = typed(capsys, models / "expert-1", models / "tasks.yaml", "--to", form)
        assert code == 0 and sign in out and "expert-1" in out
    code, out, err = typed(capsys, "nowhere", models / "tasks.yaml", "--to", "markdow")
    assert (code, out) == (2, "") and "did you mean `markdown`?" in err
    code, out, err = typed(capsys, "nowhere/at/all", models / "tasks.yaml")
    assert (code, out) == (2, "") and "nowhere/at/all" in err


def test_nothing_is_written(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "expert-1", tmp_path / "model")

    def seen() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for folder in (models, tmp_path) for file in folder.rglob("*")}

    before = seen()
    evaluate(tmp_path / "model", models / "tasks.yaml")
    assert seen() == before

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spolia
from spolia.core.journal import Journal
from spolia.errors import SpoliaError
from spolia.runs.datafree_entries import against, entries_of
from spolia.runs.datafree_pool import make_pool, members
from spolia.runs.datafree_problems import DigitsModels, PackedModels, classes_of
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder

SMALL = [
    "problem.most_steps=4",
    "problem.episodes=6",
    "problem.looks=3",
    "problem.checks=2",
    "problem.experts=4",
    "problem.epochs=2",
    "problem.width=4",
    "method.generator_width=4",
    "method.latent=8",
    "method.recovery_steps=2",
    "method.replays=2",
    "method.shots=2",
    "method.queries=3",
    "seeds=2",
]
PROBLEM = {"experts": 4, "epochs": 2, "width": 4}


def small(name: str, *overrides: str):
    return load_recipe(f"datafree/{name}-tiny", [*SMALL, *overrides])


def test_the_table_has_what_costs_nothing_and_the_method_without_its_idea():
    assert [e.label for e in entries_of(small("groupings"))] == [
        "groupings, no meta-generator",
        "groupings, no groups",
        "groupings",
    ]
    assert [e.label for e in entries_of(small("robust"))][1] == "robust, unprotected"
    assert against(small("robust")) == "robust, unprotected"
    mixed = small("robust", "method.recovery=fresh", "method.align=displaced", "method.selection=grouped")
    assert [e.label for e in entries_of(mixed)] == ["robust, unprotected", "robust"]
    assert all(e.settings.steps == 4 and e.settings.warm_up <= 1 for e in entries_of(mixed))


def test_digits_that_train_the_pool_do_not_test():
    held = classes_of(DigitsModels(domains=["upright", "inverted"]), 0)
    assert set(held.base) == {"upright", "inverted"} == set(held.test)
    for domain, base in held.base.items():
        assert not set(base.names) & set(held.test[domain].names) and len(held.test[domain]) == 3
    assert not {n for one in held.validation.values() for n in one.names} & set(held.test["upright"].names)


def test_domains_and_networks_take_turns_and_the_seed_says_who_lies():
    problem = PackedModels(source="packed", experts=8, archs=["conv4", "resnet10"], corrupted=0.5)
    held = classes_of(DigitsModels(domains=["upright", "inverted"]), 0)
    made = members(problem, held, 0)
    assert {(m.domain, m.arch) for m in made} == {(d, a) for d in held.base for a in ("conv4", "resnet10")}
    assert sorted(m.attack for m in made if m.attack) == ["mislabelled", "poisoned", "random", "untrained"]
    assert [m.attack for m in members(problem, held, 0)] == [m.attack for m in made]
    assert [m.classes for m in members(problem, held, 1)] != [m.classes for m in made]


def test_a_pool_is_made_once_and_its_folder_is_a_users_pool(tmp_path):
    problem = DigitsModels(**PROBLEM, corrupted=0.25, attack="mislabelled")
    held = classes_of(problem, 0)
    pool, attacks = make_pool(problem, held, 0, tmp_path, Journal())
    again, _ = make_pool(problem, held, 0, tmp_path, Journal())
    assert attacks.count("mislabelled") == 1 and len(pool) == 4
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for one, other in zip(pool, again, strict=True):
        assert torch.equal(one.logits(one.module(), x), other.logits(other.module(), x))
        assert one.classes == other.classes and 0 <= one.claimed <= 1
    known = spolia.classifiers(
        {
            "size": 8,
            "channels": 1,
            "mean": [0.5],
            "std": [0.25],
            "experts": [{"path": str(tmp_path / e.name), "classes": list(e.classes)} for e in pool],
        }
    )
    for one, other in zip(pool, known, strict=True):
        torch.testing.assert_close(one.logits(one.module(), x), other.logits(other.module(), x))
    assert not known.audit().of("broken")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("problem.ways=4", "problem.ways"),
        ("problem.source=digit", "did you mean `digits`"),
        ("problem.attack=mislabeled", "problem.attack"),
        ("problem.corrupted=2", "problem.corrupted"),
        ("method.selection=group", "method.selection"),
        ("method.embedding=probe", "a recipe names no probe"),
        ("method.reward=real", "no real episodes"),
        ("method.recoverysteps=3", "did you mean `recovery_steps`"),
        ("problem={source: models}", "no models are named"),
    ],
)
def test_a_mistake_is_told_before_any_work(override, said):
    with pytest.raises(SpoliaError) as told:
        load_recipe("datafree/robust-tiny", [override])
    assert said in str(told.value)


def test_missing_data_are_told_by_the_plan(tmp_path):
    with pytest.raises(SpoliaError, match=r"there is no tiny_imagenet100\.npz"):
        plan_recipe(load_recipe("datafree/robust", [f"problem.folder={tmp_path}"]))
    with pytest.raises(SpoliaError, match="is no file"):
        plan_recipe(load_recipe("datafree/robust-tiny", [f"problem={{source: models, models: {tmp_path}/no.yml}}"]))


def test_planning_never_imports_torch():
    code = (
        "import sys; from spolia.runs.recipe import load_recipe; from spolia.runs.engine import plan_recipe\n"
        "plan = plan_recipe(load_recipe('datafree/groupings-tiny')); assert plan.phases and plan.seconds > 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_call_tells_what_does_not_fit():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    pool = spolia.WhitePool([spolia.White("a", module, shape=(1, 8, 8), classes="abc")])
    with pytest.raises(SpoliaError, match="makes nothing of a pool"):
        spolia.datafree(pool, module, method="ties")
    with pytest.raises(SpoliaError) as told:
        spolia.datafree([1], "network", method="robust", settings={"embedding": "probe", "reward": "real"})
    assert {problem.where for problem in told.value.problems} == {"pool", "network", "probe", "validation"}


def files(folder: Path) -> dict[str, object]:
    ledger, figures = (json.loads((folder / name).read_text()) for name in ("results.json", "figures.json"))
    rows = [row for row in ledger["rows"] if row["metric"] != "time"]
    return {"rows": rows, "figures": figures, "weights": (folder / "result/learner.safetensors").read_bytes()}


@pytest.mark.slow
def test_a_run_leaves_a_table_and_goes_on_after_a_kill_to_the_bit(tmp_path):
    recipe = small("robust", "problem.corrupted=0.25", "problem.attack=mislabelled")
    whole = run_recipe(recipe, RunFolder(tmp_path / "whole"))
    found = files(whole)
    labels = {row["method"] for row in found["rows"]}
    assert {"random features", "best model's features", "real data", "robust", "robust, selected"} <= labels
    assert {"robust, no meta-generator", "robust, unprotected"} <= labels
    metrics = {row["metric"] for row in found["rows"]}
    assert {"accuracy", "accuracy over seeds", "last less peak", "trust in honest models"} <= metrics
    kinds = [figure["kind"] for figure in found["figures"]]
    assert kinds == ["images", "lines", "bars", "bars"]
    assert (whole / "summary.txt").read_text().count("\n") == 1 and "<image" in (whole / "report.html").read_text()

    class Stop(Exception):
        pass

    class Bar:
        """Progress that stops the run in the second seed's last training."""

        def __init__(self):
            self.steps = 0

        def start(self, what, total):
            self.most = total - 2

        def advance(self, count, **numbers):
            self.steps += count
            if self.steps > self.most:
                raise Stop

        def finish(self):
            pass

    with pytest.raises(Stop):
        run_recipe(recipe, RunFolder(tmp_path / "broken"), progress=Bar())
    assert files(run_recipe(recipe, RunFolder(tmp_path / "broken"))) == found


@pytest.mark.slow
def test_groups_are_in_the_report(tmp_path):
    run = run_recipe(small("groupings", "seeds=1"), RunFolder(tmp_path / "run"))
    figures = {figure["kind"]: figure for figure in files(run)["figures"]}
    assert len(figures["matrix"]["rows"]) == 4
    assert {row["task"] for row in files(run)["rows"]} >= {"upright, 3-way 1-shot", "inverted, 3-way 5-shot"}


@pytest.mark.slow
def test_ones_own_models_without_a_test(tmp_path):
    problem = DigitsModels(**PROBLEM)
    pool, _ = make_pool(problem, classes_of(problem, 0), 0, tmp_path / "pool", Journal())
    lines = ["size: 8", "channels: 1", "mean: [0.5]", "std: [0.25]", "experts:"]
    lines += [f"  - {{path: ./pool/{e.name}, classes: {json.dumps(list(e.classes))}}}" for e in pool]
    (tmp_path / "pool.yml").write_text("\n".join(lines))
    own = f"problem={{source: models, models: {tmp_path}/pool.yml, most_steps: 3, ways: 3, looks: 2, width: 4}}"
    keep = [item for item in SMALL if not item.startswith("problem.")]
    run = run_recipe(load_recipe("datafree/groupings-tiny", [*keep, own]), RunFolder(tmp_path / "run"))
    assert "nothing was measured" in (run / "summary.txt").read_text()
    ledger = json.loads((run / "results.json").read_text())
    known = {"time", "accuracy on pseudo-tasks", "dissimilarity within, above chance"}
    assert {row["metric"] for row in ledger["rows"]} <= known

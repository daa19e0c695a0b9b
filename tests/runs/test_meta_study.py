from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spolia
from spolia.errors import SpoliaError
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.meta_entries import entries_of
from spolia.runs.meta_problems import DigitsEpisodes, PackedEpisodes, classes_of, network_of, sampler
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder
from spolia.runs.sweep_numbers import validation_of

SMALL = [
    "problem.most_steps=3",
    "problem.episodes=6",
    "problem.validation=3",
    "method.base_settings.tasks=4",
    "seeds=2",
]


def small(*overrides: str, name: str = "meta/msd-tiny"):
    return load_recipe(name, [*(SMALL if "msd" in name else SMALL[:3]), *overrides])


def test_the_table_has_the_base_protonet_and_no_adaptation():
    entries = entries_of(small())
    assert [entry.label for entry in entries] == ["protonet", "maml", "msd on maml"]
    assert [entry.basis.steps for entry in entries] == [3, 3, 3]
    assert entries[1].settings.tasks == 4  # of the base alone; msd divides them by its views
    assert [e.label for e in entries_of(small(name="meta/boil-tiny"))] == ["protonet", "boil"]
    assert [e.label for e in entries_of(small(name="meta/protonet-tiny"))] == ["protonet"]


def test_digits_that_train_do_not_test():
    problem = DigitsEpisodes()
    classes = classes_of(problem, 0)
    assert not {name[0] for name in classes.train.names} & set(classes.test.names)
    assert len(classes.test) == 3
    episode = sampler(problem, classes.test, 0).episode(0)
    assert network_of(problem, classes.test.shape, 0)(episode.query_x).shape == (3 * problem.queries, 3)


def test_equal_seeds_have_equal_networks():
    problem = DigitsEpisodes()
    one, two, other = (network_of(problem, (1, 8, 8), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    assert any(not torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("problem.ways=4", "problem.ways"),
        ("problem.source=digit", "did you mean `digits`"),
        ("problem.scenarios=[shakn]", "problem.scenarios"),
        ("method.base_settings.inner_lrr=1", "did you mean `inner_lr`"),
        ("method.compare=logit", "msd"),
        ("method.base=mamml", "method.base"),
        ("problem.views={rotat: 0.1}", "problem.views"),
    ],
)
def test_a_mistake_is_told_before_any_work(override, said):
    if override == "method.compare=logit":
        load_recipe("meta/msd-tiny", [override])  # outputs may be compared with the cosine
        return
    with pytest.raises(SpoliaError) as told:
        load_recipe("meta/msd-tiny", [override])
    assert said in str(told.value)


def test_missing_data_are_told_by_the_plan(tmp_path):
    recipe = load_recipe("meta/maml", [f"problem.folder={tmp_path}"])
    with pytest.raises(SpoliaError, match=r"there is no omniglot28\.npz"):
        plan_recipe(recipe)
    with pytest.raises(SpoliaError, match="problem"):
        load_recipe("meta/maml-tiny", ["problem={source: folder}"])
    assert PackedEpisodes(source="packed").data == "tiny_imagenet100"


def test_planning_never_imports_torch():
    code = (
        "import sys; from spolia.runs.recipe import load_recipe; from spolia.runs.engine import plan_recipe\n"
        "plan = plan_recipe(load_recipe('meta/msd-tiny')); assert plan.phases and plan.seconds > 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_call_tells_what_does_not_fit():
    episodes = spolia.EpisodeSampler(classes_of(DigitsEpisodes(), 0).train, ways=3, shots=1, queries=2)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    with pytest.raises(SpoliaError, match="is no meta-learner"):
        spolia.meta(network, episodes, method="ties")
    with pytest.raises(SpoliaError) as told:
        spolia.meta("network", [1])
    assert {problem.where for problem in told.value.problems} == {"network", "episodes", "views"}
    with pytest.raises(SpoliaError, match="looks at the support alone"):
        spolia.meta(network, episodes, method="maml", views=lambda x, count, draws: x)


def files(folder: Path) -> dict[str, object]:
    ledger = json.loads((folder / "results.json").read_text())
    figures = json.loads((folder / "figures.json").read_text())
    return {"rows": ledger["rows"], "figures": figures, "weights": (folder / "result/learner.safetensors").read_bytes()}


@pytest.mark.slow
def test_a_run_leaves_a_table_with_intervals_and_goes_on_after_a_kill_to_the_bit(tmp_path):
    recipe = small()
    whole = run_recipe(recipe, RunFolder(tmp_path / "whole"))
    found = files(whole)
    methods = {row["method"] for row in found["rows"]}
    assert methods == {"protonet", "maml", "msd on maml", "msd on maml, not adapted", "msd on maml, last"}
    rows = {(row["method"], row["task"], row["metric"]): row for row in found["rows"]}
    for test in ("standard", "shaken support"):
        row = rows["msd on maml", test, "accuracy over seeds"]
        assert row["n"] == 2 and row["low"] <= row["mean"] <= row["high"]
        assert row["paired_difference"]["against"] == "maml"
    assert {"consistency", "consistency, floor", "logit cosine"} <= {row["metric"] for row in found["rows"]}
    assert [figure["kind"] for figure in found["figures"]] == ["lines", "points"]
    assert 0 <= validation_of(whole, "msd on maml")["accuracy"] <= 100  # what a search goes by
    assert (whole / "summary.txt").read_text().count("\n") == 1 and (whole / "report.html").exists()

    class Stop(Exception):
        pass

    class Bar:
        """Progress that stops the run in the second seed's training."""

        def __init__(self):
            self.steps = 0

        def start(self, *told):
            pass

        def advance(self, count, **numbers):
            self.steps += count
            if self.steps > 9 + 4:
                raise Stop

        def finish(self):
            pass

    broken = RunFolder(tmp_path / "broken")
    with pytest.raises(Stop):
        run_recipe(recipe, broken, progress=Bar())
    assert files(run_recipe(recipe, RunFolder(tmp_path / "broken"))) == found

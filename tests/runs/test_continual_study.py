from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import spolia
from spolia.bench.continual import Protocol, run
from spolia.bench.continual_ledger import CLASS_IL, TASK_IL, TIME, found_of, ledger_rows, metrics_of
from spolia.catalog import METHODS, find
from spolia.core import kept
from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.parts.stream import class_incremental
from spolia.runs.continual_entries import entries_of, learner_of
from spolia.runs.continual_problems import ArraysStream, DatasetStream, DigitsStream, FolderStream
from spolia.runs.continual_streams import labelled_of, model_of, stream_of
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder

NAMES = [m.name for m in METHODS if m.family == "continual" and m.needs.startswith("a network")]
SMALL = ["problem.epochs=0.5", "problem.width=12", "seeds=2"]


def small(name: str = "refresh", *overrides: str):
    return load_recipe(f"continual/{name}-tiny", [*SMALL, *overrides])


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_table_has_both_bounds_and_the_host():
    entries = entries_of(small())
    assert [e.label for e in entries] == ["finetune", "joint", "derpp", "derpp + refresh"]
    assert [e.against for e in entries] == ["", "finetune", "finetune", "derpp"]
    assert {e.settings.hosted().lr if e.own else e.settings.lr for e in entries} == {0.03}  # the same steps for all
    assert entries[2].settings.items == entries[3].settings.hosted().items == 50  # the problem's, at most
    assert [e.label for e in entries_of(small("finetune"))] == ["joint", "finetune"]
    assert [e.label for e in entries_of(small("er", "method.items=20"))] == ["finetune", "joint", "er"]
    assert entries_of(small("er", "method.items=20"))[-1].settings.items == 20
    assert entries_of(small("cpr", "method.host=finetune"))[-1].against == "finetune"


def test_host_and_plain_learner_have_equal_settings():
    *_, host, own = entries_of(small("refresh", "method.host=er", "method.host_settings.lr=0.05"))
    assert host.settings == own.settings.hosted() and host.settings.lr == 0.05


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("er", "problem.tasks=3", "do not go into 3"),
        ("er", "problem.tasks=[4, 4]", "do not go into"),
        ("er", "problem.tasks=0", "problem.tasks"),
        ("er", "problem.source=digit", "did you mean `digits`"),
        ("er", "problem.scenario=clas", "problem.scenario"),
        ("ewc", "problem.scenario=online", "in `online` none does"),
        ("cpr", "problem.scenario=online", "in `online` none does"),
        ("icarl", "problem.scenario=domain", "exemplars of new classes"),
        ("refresh", "method.gamma=1.5", "the loss climbs"),
        ("refresh", "method.host=joint", "method.host"),
        ("refresh", "method.host_settings.lrr=1", "did you mean `lr`"),
        ("er", "problem={source: npz}", "no file is named"),
        ("er", "problem={source: folder}", "no folder is named"),
        ("er", "problem={source: datasets}", "no data set is named"),
        ("er", "problem={source: packed, channels: 1, network: resnet8}", "takes colour"),
    ],
)
def test_a_mistake_is_told_before_any_work(name, override, said):
    with pytest.raises(SpoliaError) as told:
        load_recipe(f"continual/{name}-tiny", [override])
    assert said in str(told.value)


def test_missing_data_are_told_by_the_plan(tmp_path):
    recipe = load_recipe("continual/er", [f"problem.folder={tmp_path}"])
    with pytest.raises(SpoliaError, match=r"there is no cifar10_full_jpeg75\.npz"):
        plan_recipe(recipe)
    np.savez(tmp_path / "mine.npz", pictures=np.zeros(3))
    with pytest.raises(SpoliaError, match="pictures"):
        plan_recipe(load_recipe("continual/er-tiny", [f"problem={{source: npz, file: {tmp_path}/mine.npz}}"]))


def test_planning_never_imports_torch():
    code = (
        "import sys; from spolia.runs.recipe import load_recipe; from spolia.runs.engine import plan_recipe\n"
        "plan = plan_recipe(load_recipe('continual/refresh-tiny')); assert plan.phases and plan.seconds > 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scenario", ["class", "task", "domain", "online"])
def test_the_stream_follows_from_problem_and_seed(scenario):
    problem = DigitsStream(scenario=scenario, shuffle=True, blur=0.2)
    one, two, other = (stream_of(problem, labelled_of(problem, 0), seed) for seed in (0, 0, 1))
    draws = [s.experiences[-1].draw(10, 0, 0) for s in (one, two, other)]
    assert torch.equal(draws[0].x, draws[1].x) and torch.equal(draws[0].y, draws[1].y)
    assert not torch.equal(draws[0].x, draws[2].x)
    assert len(one.tests) == 5 and sum(len(t.examples) for t in one.tests) == 600 * (5 if scenario == "domain" else 1)


def test_equal_seeds_have_equal_networks():
    problem = DigitsStream(network="conv")
    held = labelled_of(problem, 0)
    one, two, other = (model_of(problem, held, seed).network.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    assert any(not torch.equal(t, other[name]) for name, t in one.items())


# --- a user's own data -----------------------------------------------------------------------------------------------


def test_a_users_arrays_become_a_stream(tmp_path):
    draws = np.random.default_rng(0)
    x, y = draws.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.repeat([3, 5, 7, 11], 10)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    problem = ArraysStream(source="npz", file=tmp_path / "one.npz", tasks=2, network="conv4", width=8, augment="crops")
    held = labelled_of(problem, 0)
    assert held.classes == ("3", "5", "7", "11") and held.shape == (3, 16, 16)
    assert torch.bincount(held.test[1]).tolist() == [2] * 4  # a fifth of each class
    stream = stream_of(problem, held, 0)
    learner = learner_of("er", find("er").settings_class()(), model_of(problem, held, 0), stream, 0)
    learner.observe(stream.experiences[0].draw(6, 0, 0))
    assert learner.predict(held.test[0]).shape == (8, 4) and learner.memory.all()["x"].dtype == torch.uint8


def test_folders_of_images_become_a_stream(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for name, grey in (("dark", 10), ("bright", 240)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                image.fromarray(np.full((10, 12), grey + i, dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
    problem = FolderStream(source="folder", folder=tmp_path, size=8, channels=1, tasks=2)
    held = labelled_of(problem, 0)
    assert held.classes == ("bright", "dark") and held.shape == (1, 8, 8)
    assert len(held.train[1]) == len(held.test[1]) == 6
    stream = stream_of(problem, held, 0)
    assert model_of(problem, held, 0).network(stream.experiences[1].batch(slice(None)).x.float()).shape == (3, 2)


class Rows:
    """What is asked of a loaded part of `datasets`: grey squares, as bright as their class."""

    column_names = ("img", "label")
    features = {"label": SimpleNamespace(names=["night", "dusk", "noon"])}  # noqa: RUF012 - as theirs

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, column):
        assert column == "label"
        return self.labels

    def __iter__(self):
        image = pytest.importorskip("PIL.Image")
        return ({"img": image.new("L", (10, 12), 100 * label), "label": label} for label in self.labels)

    def select(self, places):
        return Rows([self.labels[place] for place in places])


def with_datasets(monkeypatch, parts):
    """A module `datasets` that knows these splits. What it was asked."""
    asked, fake = [], ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: asked.append((name, config, split)) or parts[split]
    fake.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_a_set_of_datasets_becomes_a_stream(monkeypatch, tmp_path):
    asked = with_datasets(monkeypatch, {"train": Rows([2, 0, 1] * 5), "validation": Rows([0, 1, 2])})
    problem = DatasetStream(
        source="datasets", data="owner/sky", test="validation", size=8, channels=1, most=12, tasks=[1, 2]
    )
    held = labelled_of(problem, 0)
    assert asked == [("owner/sky", None, "train"), ("owner/sky", None, "validation")]
    assert held.classes == ("night", "dusk", "noon") and held.train[1].tolist() == [2, 0, 1] * 4
    assert held.train[0].dtype == torch.uint8 and held.train[0][:3, 0, 0, 0].tolist() == [200, 0, 100]
    stream = stream_of(problem, held, 0)
    assert [len(e.train) for e in stream.experiences] == [4, 8] and [len(t.examples) for t in stream.tests] == [1, 2]
    assert labelled_of(problem.model_copy(update={"data": str(tmp_path)}), 0).name == tmp_path.name  # a folder of files
    assert asked[-1] == (str(tmp_path), None, "validation")


def test_what_datasets_cannot_give_is_told(monkeypatch):
    with_datasets(monkeypatch, {"train": Rows([0, 1, 2]), "test": Rows([0, 1])})
    problem = DatasetStream(source="datasets", data="owner/sky", size=8)
    with pytest.raises(SpoliaError, match="only one part has noon"):
        labelled_of(problem, 0)
    with pytest.raises(SpoliaError, match="no column `picture`"):
        labelled_of(problem.model_copy(update={"image": "picture"}), 0)
    monkeypatch.setattr(Rows, "column_names", ("text", "label"))
    with pytest.raises(SpoliaError, match=r"none of the columns image(.|\n)*it holds text, label"):
        labelled_of(problem, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpoliaError, match=r"not installed\n  mend: pip install 'spolia\[data\]'"):
        plan_recipe(load_recipe("continual/er-tiny", ["problem={source: datasets, data: owner/sky}"]))


# --- runs ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, object]:
    ledger = json.loads((folder / "results.json").read_text())
    figures = json.loads((folder / "figures.json").read_text())
    rows = [row for row in ledger["rows"] if row["metric"] != TIME]
    state = kept.load(folder / "result" / "learner.safetensors")
    weights = {name: t.tolist() for name, t in read_tensors(folder / "result").items()}
    memory = state["host"]["memory"]["fields"]["logits"].tolist()
    return {"rows": rows, "figures": figures, "weights": weights, "memory": memory}


@pytest.mark.slow
def test_a_run_leaves_a_table_and_goes_on_after_a_kill_to_the_bit(tmp_path):
    """Killed in the second seed, once inside a task and once between two learners."""
    recipe = small("refresh", "problem.epochs=0.3", "method.samples=20")
    whole = run_recipe(recipe, RunFolder(tmp_path / "whole"))
    found = files(whole)
    rows = {(row["method"], row["task"], row["metric"]): row for row in found["rows"]}  # type: ignore[union-attr]
    assert {name for name, *_ in rows} == {"finetune", "joint", "derpp", "derpp + refresh"}
    for metric in (CLASS_IL, TASK_IL):
        row = rows["derpp + refresh", "average", metric]
        each = [rows["derpp + refresh", f"task {j}", metric]["mean"] for j in range(1, 6)]
        assert row["mean"] == pytest.approx(sum(each) / 5) and row["n"] == 2
        assert row["paired_difference"]["against"] == "derpp"
    assert {metric for *_, metric in rows} >= {"incremental accuracy", "forgetting", "backward transfer", "memory"}
    assert [figure["kind"] for figure in found["figures"]] == ["lines", "matrix", "matrix"]  # type: ignore[union-attr]
    assert (whole / "summary.txt").read_text().count("\n") == 1 and (whole / "report.html").exists()

    class Stop(Exception):
        pass

    class Bar:
        """Progress that stops the run after so many steps."""

        def __init__(self, most: int):
            self.left = most

        def start(self, *told):
            pass

        def advance(self, count, **numbers):
            self.left -= count
            if self.left < 0:
                raise Stop

        def finish(self):
            pass

    one = plan_steps(recipe)
    folder = tmp_path / "broken"
    for steps in (4 * one + one // 3, one + one // 2):
        with pytest.raises(Stop):
            run_recipe(recipe, RunFolder(folder), progress=Bar(steps))
    assert files(run_recipe(recipe, RunFolder(folder))) == found


def plan_steps(recipe) -> int:
    stream = stream_of(recipe.problem, labelled_of(recipe.problem, 0), 0)
    return sum(e.steps(recipe.problem.batch, recipe.problem.epochs) for e in stream.experiences)


@pytest.mark.sampled(6)  # of many cases alike
@pytest.mark.parametrize("name", NAMES)
def test_every_learner_meets_the_stream_of_its_recipe(name):
    least = {"gdumb": ["method.epochs=2"]}.get(name, [])
    recipe = load_recipe(f"continual/{name}-tiny", ["problem.width=8", "problem.batch=40", *least])
    held = labelled_of(recipe.problem, 0)
    stream, own = stream_of(recipe.problem, held, 0), entries_of(recipe)[-1]
    learner = learner_of(own.method, own.settings, model_of(recipe.problem, held, 0), stream, 0)
    found = found_of(run(learner, stream, Protocol(epochs=0.2, batch=40)))
    rows = ledger_rows({own.label: [found]}, "digits")
    assert {row["metric"] for row in rows} == set(metrics_of("class"))
    assert own.own and len(found["matrix"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["task", "domain", "online"])
def test_every_scenario_runs(scenario, tmp_path):
    overrides = ["problem.epochs=0.1", "problem.width=8", "seeds=1", f"problem.scenario={scenario}"]
    folder = run_recipe(load_recipe("continual/derpp-tiny", overrides), RunFolder(tmp_path / "run"))
    ledger = json.loads((folder / "results.json").read_text())
    assert ledger["rows"][0]["metric"] == (TASK_IL if scenario == "task" else "accuracy")


# --- the call --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream():
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(12)
    x = 2 * nn.functional.one_hot(y, 5) + 0.5 * torch.randn(48, 5, generator=draws)
    return class_incremental((x, y), (x[:20], y[:20]), tasks=2)


def test_the_call_is_the_learner_and_the_run(stream):
    network = nn.Linear(5, 4)
    before = network.weight.detach().clone()
    learner, outcome = spolia.continual(network, stream, settings={"items": 6, "replay": 3}, batch=8, epochs=2)
    assert isinstance(learner, DerPpLearner) and torch.equal(network.weight, before)  # a copy was trained
    again, same = spolia.continual(
        network, stream, method="derpp", settings=DerPp(items=6, replay=3), batch=8, epochs=2
    )
    assert outcome.matrix == same.matrix and torch.equal(learner.network.weight, again.network.weight)


def test_the_call_leads_a_learner_of_ones_own(stream):
    class Mean:
        """Class means of what has come by."""

        sums, counts = torch.zeros(4, 5), torch.zeros(4, 1)

        def begin(self, experience):
            pass

        def observe(self, batch):
            self.sums.index_add_(0, batch.y, batch.x)
            self.counts.index_add_(0, batch.y, torch.ones(len(batch.y), 1))

        def end(self, experience):
            pass

        def predict(self, x):
            return -torch.cdist(x, self.sums / self.counts.clamp(min=1))

    own = Mean()
    learner, outcome = spolia.continual(own, stream, batch=8)
    assert learner is own and outcome.numbers()["average"] > 90  # four far clusters
    with pytest.raises(SpoliaError) as told:
        spolia.continual(own, stream, method="er", settings={})
    assert {problem.where for problem in told.value.problems} == {"method", "settings"}


def test_the_call_tells_what_does_not_fit(stream):
    with pytest.raises(SpoliaError, match="is no learner of labelled streams"):
        spolia.continual(nn.Linear(5, 4), stream, method="ties")
    with pytest.raises(SpoliaError) as told:
        spolia.continual("network", [1], method="er", settings={"lrr": 1}, batch=0, features=len)  # type: ignore[arg-type]
    assert {p.where for p in told.value.problems} == {"network", "stream", "settings.lrr", "batch", "features"}
    with pytest.raises(SpoliaError, match="no parameters to train"):
        spolia.continual(nn.Linear(5, 4).requires_grad_(False), stream)


def test_hosts_are_named_by_settings(stream):
    settings = {"host": "cpr", "host_settings": {}}
    with pytest.raises(SpoliaError, match=r"settings\.host"):
        spolia.continual(nn.Linear(5, 4), stream, method="refresh", settings=settings)
    learner, _ = spolia.continual(nn.Linear(5, 4), stream, method="refresh", settings={"host": "icarl"}, batch=8)
    assert type(learner.host).__name__ == "ICarlLearner" and learner.host.settings.items == 500

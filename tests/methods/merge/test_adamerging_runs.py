"""AdaMerging as it is run: killed and taken up, on two processes, on other libraries' models, and remade from its recipe."""

from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia import Examples, ExpertPool, Journal, Network, SpoliaError
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Interrupted
from spolia.errors import SpoliaWarning
from spolia.methods.merge.adamerging import AdaMerging, adamerging
from spolia.parts.combination import Combination
from spolia.parts.learned import Learned
from spolia.parts.pieces import Storage

pytestmark = pytest.mark.sampled(3)  # of many cases alike

State = dict[str, Tensor]
TASKS = ("a", "b")


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6))


def made(seed: int = 0) -> tuple[Network, State, dict[str, State], dict[str, Tensor]]:
    """A network with batch normalisation, its base, an expert a task, and 60 inputs a task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = body()
        base = {n: t.clone() for n, t in module.state_dict().items()}
        base["1.running_mean"], base["1.running_var"] = torch.randn(8), torch.rand(8) + 0.5
        experts = {
            task: {n: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t + 7 for n, t in base.items()}
            for task in TASKS
        }
        heads = {task: nn.Linear(6, 4) for task in TASKS}
        return Network(module, heads), base, experts, {task: torch.randn(60, 5) for task in TASKS}


def learn(settings: dict[str, Any], **more: Any) -> Learned:
    network, base, experts, inputs = made()
    chosen = {"steps": 30, "lr": 1e-2, "batch": 8, "check_every": 7, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpoliaWarning)
        return spolia.merge(
            experts, base=base, method="adamerging", network=network, unlabelled=inputs, settings=chosen, **more
        )


def same(one: Learned, other: Learned) -> None:
    assert one.coefficients == other.coefficients
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    assert json.dumps(one.facts) == json.dumps(other.facts)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("stop", [1, 13, 29])
def test_stopped_and_run_again_it_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    class Stopping(Journal):
        def log(self, **numbers: Any) -> None:
            super().log(**numbers)
            if self._step == stop:
                self.request_stop()

    whole = learn({"objective": "expert"}, journal=Journal(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        learn({"objective": "expert"}, journal=Stopping(tmp_path / "run"))
    again = learn({"objective": "expert"}, journal=tmp_path / "run")
    same(whole, again)
    same(whole, learn({"objective": "expert"}, journal=tmp_path / "run"))  # finished: nothing is done twice
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (f / "metrics.jsonl").open()]
        for f in (tmp_path / "whole", tmp_path / "run")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 30


DYING = """
import os, signal, sys
from pathlib import Path
from spolia import Journal
sys.path.insert(0, sys.argv[1])
from test_adamerging_runs import learn

class Dying(Journal):
    def log(self, **numbers):
        super().log(**numbers)
        if self._step == 17:
            os.kill(os.getpid(), signal.SIGKILL)

learn({"objective": "information"}, journal=Dying(Path(sys.argv[2]), save_every=0.0))
"""


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_bits(tmp_path: Path, fork: Callable[..., Any]) -> None:
    child = fork(DYING, Path(__file__).parent, tmp_path / "run")
    child.communicate()
    assert child.returncode == -9
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 18
    again = learn({"objective": "information"}, journal=tmp_path / "run")
    same(learn({"objective": "information"}), again)


def test_a_few_labels_can_take_the_place_of_entropy() -> None:
    network, base, experts, inputs = made()
    labelled = {
        task: Examples(x, network.logits(task, x, experts[task]).argmax(1).detach(), name=task)
        for task, x in inputs.items()
    }
    learned = spolia.merge(
        experts, base=base, method="adamerging", network=network, unlabelled=labelled,
        settings={"steps": 40, "lr": 2e-2, "objective": "labels", "guard": "accuracy", "start": 0.0},
    )  # fmt: skip
    assert learned.facts["labels used"] and learned.facts["guard"] == "accuracy"
    assert learned.facts["kept"]["accuracy"] >= learned.facts["start"]["accuracy"]
    assert (
        learned.facts["kept"]["accuracy"] == learned.facts["kept"]["agreement"]
    )  # the labels are the experts' answers


def test_a_recipe_over_folders_says_how_it_is_done(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    named = [f"pool.base={tmp_path / 'base'}", f"pool.experts=[{tmp_path / 'a'}, {tmp_path / 'b'}]"]
    with pytest.raises(SpoliaError, match=r"no expert is called `math`"):
        spolia.plan("merge/adamerging", named)


def test_running_statistics_are_those_of_the_merged_network() -> None:
    _, base, experts, inputs = made()
    learned = learn({"guard": "none", "held_out": 0.0})
    first = nn.functional.linear(
        torch.cat(list(inputs.values())), learned.weights["0.weight"], learned.weights["0.bias"]
    )
    # fp64 sums of fp32 numbers
    torch.testing.assert_close(learned.weights["1.running_mean"], first.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learned.weights["1.running_var"], first.var(0), rtol=1e-5, atol=1e-6)
    averaged = learn({"batchnorm": "average", "steps": 0})
    wanted = (experts["a"]["1.running_var"] + experts["b"]["1.running_var"]) / 2
    torch.testing.assert_close(averaged.weights["1.running_var"], wanted, rtol=1e-6, atol=0)
    assert int(averaged.weights["1.num_batches_tracked"]) == int(base["1.num_batches_tracked"])


@pytest.mark.parametrize("lr", [1e-2, 3.0])
def test_with_the_guard_no_run_ends_below_its_start(lr: float) -> None:
    for objective in ("entropy", "information"):
        learned = learn({"lr": lr, "objective": objective, "clamp": "none"})
        kept, start = learned.facts["kept"], learned.facts["start"]
        assert kept["agreement"] >= start["agreement"]
        best = max(learned.facts["history"], key=lambda seen: seen["agreement"])
        assert kept["agreement"] == best["agreement"]


def test_the_guard_sees_what_the_weights_do() -> None:
    network, _, experts, inputs = made()
    learned = learn({})
    for task in TASKS:
        _, held = Examples(inputs[task], name=task).split(0.2, 0)
        x = held.batch(range(len(held)))
        answers = [network.logits(task, x, weights).argmax(1) for weights in (learned.weights, experts[task])]
        seen = learned.facts["kept"]["tasks"][task]
        assert seen["agreement"] == pytest.approx(float((answers[0] == answers[1]).float().mean()))
        assert seen["predicted"] == torch.bincount(answers[0], minlength=4).tolist()


def test_collapse_is_told() -> None:
    """A head whose bias grows with one feature: entropy is least where all inputs get one class."""
    module = nn.Linear(2, 2, bias=False)
    base = {"weight": torch.eye(2)}
    experts = {"t": {"weight": torch.eye(2) + 9 * torch.tensor([[1.0, 0.0], [0.0, 0.0]])}}
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 3.0], [0.0, -3.0]]))
        head.bias.zero_()
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))

    def outputs(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        return torch.stack([y[:, 0] * 0, y[:, 1] + m.weight[0, 0] - 10], 1)  # the expert's weight is 10

    with pytest.warns(SpoliaWarning, match="t: predictions have collapsed"):
        learned = spolia.merge(
            experts, base=base, method="adamerging", network=Network(module, {"t": head}, outputs), unlabelled={"t": x},
            settings={"steps": 3, "guard": "none", "start": 0.1},
        )  # fmt: skip
    assert min(learned.facts["kept"]["tasks"]["t"]["predicted"]) == 0


def test_inputs_that_are_tested_on_too_are_counted() -> None:
    _, _, _, inputs = made()
    other = torch.randn(9, 5)
    apart = learn({"steps": 1}, tested_on=dict.fromkeys(TASKS, other))
    assert apart.facts["tested on"] == {task: {"inputs": 9, "adapted on too": 0} for task in TASKS}
    network, base, experts, _ = made()
    with pytest.warns(SpoliaWarning, match="a: inputs to be tested on were adapted on"):
        learned = spolia.merge(
            experts, base=base, method="adamerging", network=network, unlabelled=inputs, settings={"steps": 1},
            tested_on={"a": torch.cat([inputs["a"][:4], other]), "b": other},
        )  # fmt: skip
    assert learned.facts["tested on"]["a"] == {"inputs": 13, "adapted on too": 4}


# --- the recipe that repeats it, and the folder ----------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, write_model: Callable[..., Path]) -> dict[str, Path]:
    _, base, experts, _ = made()
    return {
        name: write_model(tmp_path / name, state, {"model_type": "toy"})
        for name, state in {"base": base, **experts}.items()
    }


@pytest.mark.parametrize("granularity", ["tensor", "module", "task"])
def test_the_recipe_makes_the_same_weights_by_streaming(
    granularity: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    network, _, _, inputs = made()
    out = spolia.merge(
        {task: folders[task] for task in TASKS}, base=folders["base"], method="adamerging", network=network,
        unlabelled=inputs, settings={"steps": 20, "lr": 1e-2, "granularity": granularity, "batchnorm": "average"},
        out=tmp_path / "out",
    )  # fmt: skip
    from spolia.runs.verbs import merge_recipe

    again = read_tensors(merge_recipe(out / "mergekit_recipe.yml", tmp_path / "again"))
    for name, tensor in read_tensors(out).items():
        # the same products, added in another order: fp32's last digit at numbers of size 1
        torch.testing.assert_close(again[name], tensor, rtol=2e-6, atol=1e-6)
    kept = json.loads((out / "coefficients.json").read_text())
    assert kept["experts"] == list(TASKS) and len(set(kept["tensors"]["0.weight"])) == 2
    facts = json.loads((out / "learned.json").read_text())
    assert facts["labels used"] is False and facts["inputs"]["a"] == {"adapted on": 48, "kept apart": 12}
    card = (out / "README.md").read_text()
    assert "inputs without labels (a: 48 adapted on, 12 kept apart" in card and str(tmp_path) not in card
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy"}
    with pytest.raises(SpoliaError, match="exists already"):  # told before anything is learned
        learn({"steps": 10**9}, out=out)


def test_a_name_within_another_gets_its_own_value(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    coefficients = {"w": (0.1,), "norm.w": (0.2,), "layers.1.norm.w": (0.3,), "layers.11.norm.w": (0.4,)}
    base = {name: torch.zeros(2) for name in coefficients}
    folders = {
        n: write_model(tmp_path / n, {k: t + x for k, t in base.items()}) for n, x in (("base", 0.0), ("e", 1.0))
    }
    learned = Learned({}, coefficients, {"method": "adamerging"})
    (tmp_path / "r.yml").write_text(spolia.recipe_of(learned, {"e": folders["e"]}, folders["base"]))
    from spolia.runs.verbs import merge_recipe

    again = read_tensors(merge_recipe(tmp_path / "r.yml", tmp_path / "out"))
    assert {n: pytest.approx(float(t[0])) for n, t in again.items()} == {n: c[0] for n, c in coefficients.items()}


def test_coefficients_of_changed_vectors_make_no_recipe(folders: dict[str, Path], tmp_path: Path) -> None:
    learned = learn({"preprocess": "ties", "steps": 1})
    with pytest.raises(SpoliaError, match="changed by ties"):
        spolia.recipe_of(learned, {}, None)
    out = learn({"preprocess": "ties", "steps": 1}, out=tmp_path / "out")
    assert not (out / "mergekit_recipe.yml").exists() and (out / "coefficients.json").exists()


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_stay_factors_and_learn_what_dense_experts_learn(
    tmp_path: Path, write_model: Callable[..., Path], write_adapter: Callable[..., Path]
) -> None:
    draws = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6))
    base = write_model(tmp_path / "base", {n: t.detach() for n, t in module.state_dict().items()})
    rank = {"lora_A.weight": (2, 5), "lora_B.weight": (8, 2)}
    adapters = {
        task: write_adapter(
            tmp_path / task, {f"0.{n}": torch.randn(s, generator=draws) for n, s in rank.items()}, target_modules=["0"]
        )
        for task in TASKS
    }
    network = Network(module, {task: nn.Linear(6, 4) for task in TASKS})
    inputs = {task: torch.randn(40, 5, generator=draws) for task in TASKS}
    pool = ExpertPool.of(adapters, base)
    with pool.opened():
        pieces = {piece.name: piece for piece in Combination.of(pool, network, None, Storage()).pieces}
        assert all(piece.rows is None for piece in pieces.values())
        dense = {task: {n: t.clone() for n, t in read_tensors(base).items()} for task in TASKS}
        for expert in pool.experts:
            plane = expert.weights.plane("0.weight", expert.name)
            plane.read(0, 40, dense[expert.name]["0.weight"].view(-1))
    settings = AdaMerging(steps=10, lr=1e-2)
    one = adamerging(pool, network, inputs, settings)
    other = adamerging(ExpertPool.of(dense, read_tensors(base)), network, inputs, settings)
    for name, row in one.coefficients.items():
        assert row == pytest.approx(other.coefficients[name], abs=1e-5)  # ten steps of fp32 gradients, two ways
    for name, tensor in one.weights.items():
        torch.testing.assert_close(tensor, other.weights[name], rtol=1e-4, atol=1e-5)


# --- two processes ---------------------------------------------------------------------------------------------------

RANK = """
import sys, json
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_adamerging_runs import learn
learned = learn(json.loads(sys.argv[2]), journal=Path(sys.argv[3]) / "run")
import os
torch.save(learned.weights, Path(sys.argv[3]) / f"weights-{os.environ['RANK']}.pt")
(Path(sys.argv[3]) / f"{os.environ['RANK']}.json").write_text(json.dumps([learned.coefficients, learned.facts]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"objective": "information", "micro_batch": 3, "batch": 7}], ids=["plain", "parts"]
)
def test_two_processes_learn_what_one_does(settings: dict[str, Any], tmp_path: Path, fork: Callable[..., Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {**settings, "steps": 12}
    words = (RANK, Path(__file__).parent, json.dumps(given), tmp_path)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [fork(*words, RANK=str(r), **world) for r in range(2)]
    said = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert found[0] == found[1] and found[0][1]["processes"] == 2
    alone = learn(given)
    for name, row in alone.coefficients.items():
        # Adam divides by the gradient's size, so fp32 rounding of its smallest entries shows: a thousandth of lr a step
        assert found[0][0][name] == pytest.approx(row, abs=12 * 1e-2 * 1e-3)
    assert found[0][1]["start"]["agreement"] == alone.facts["start"]["agreement"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12  # one process writes


# --- other libraries' models -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_of_transformers_learn(kind: str, make_pool: Callable[..., Any], tmp_path: Path) -> None:
    import transformers as hf

    base, experts = make_pool(kind, 2, tmp_path, spread=0.05)
    door = hf.AutoModelForSequenceClassification if kind == "bert" else hf.AutoModelForImageClassification
    network = Network(door.from_pretrained(base))
    draws = torch.Generator().manual_seed(0)
    if kind == "bert":
        inputs: Any = {
            "input_ids": torch.randint(0, 100, (30, 6), generator=draws),
            "attention_mask": torch.ones(30, 6),
        }
    else:
        inputs = {"pixel_values": torch.randn(30, 1, 8, 8, generator=draws)}
    given: dict[str, Any] = {expert.name: expert for expert in experts}
    start: Any = base
    if kind == "vit":  # its files call tensors by other names than the module does
        with pytest.raises(SpoliaError, match="the experts as modules where loading renames"):
            spolia.merge(
                given, base=base, method="adamerging", network=network, unlabelled=dict.fromkeys(given, inputs)
            )
        given, start = {name: door.from_pretrained(path) for name, path in given.items()}, door.from_pretrained(base)
    out = spolia.merge(
        given, base=start, method="adamerging", network=network, unlabelled=dict.fromkeys(given, inputs),
        settings={"steps": 6, "lr": 1e-2, "held_out": 0.3, "granularity": "block"}, out=tmp_path / "out",
    )  # fmt: skip
    facts, weights = json.loads((out / "learned.json").read_text()), read_tensors(out)
    assert facts["kept"]["agreement"] >= facts["start"]["agreement"] and facts["groups"] >= 4
    assert facts["last"]["entropy"] < facts["start"]["entropy"]
    merged = door.from_pretrained(out) if kind == "bert" else door.from_config(network.module.config)
    merged.load_state_dict(weights)
    loaded = network.logits("any", Examples(inputs).batch(range(5)), weights)
    torch.testing.assert_close(Network(merged).logits("any", Examples(inputs).batch(range(5))), loaded)

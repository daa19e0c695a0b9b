"""Api: what can be had through it, what it promises, and what its answers say."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.api import Api, Budget, BudgetSpent, Contract, Price
from spolia.parts.api_answers import FLOOR, Misfit, answers_of, rows_of

TWO = ("cat", "dog")


def expert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def api(**more) -> Api:
    network = expert()
    contract = Contract(("a", "b", "c"), (2, 2), "logits")
    return Api.calling(network, contract, name="abc", **more)


# --- rights ----------------------------------------------------------------------------------------------------------


def attributes(thing: object) -> list[object]:
    """Everything that its attributes lead to, as an honest reader follows them: by name, not into closures."""
    seen, todo, found = set(), [thing], []
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | str | bytes | int | float):
            continue
        seen.add(id(one))
        found.append(one)
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            todo += list(one)
        elif type(one).__module__.startswith("spolia."):
            names = [*getattr(one, "__dict__", {}), *getattr(type(one), "__slots__", ())]
            todo += [getattr(one, name) for name in names if hasattr(one, name)]
    return found


def test_no_weight_can_be_reached_through_it() -> None:
    asked = api()
    asked(torch.rand(5, 2, 2))
    assert not [one for one in attributes(asked) if isinstance(one, nn.Module | torch.Tensor)]
    for name in ("parameters", "state_dict", "modules", "forward", "backward", "network", "function", "model"):
        assert not hasattr(asked, name)
    public = {name for name in dir(asked) if not name.startswith("_")}
    assert public == {"at", "calling", "classes", "close", "contract", "left", "name", "spent", "span"}


def test_no_gradient_passes_it() -> None:
    network = expert()
    asked = Api.calling(network, Contract(("a", "b", "c"), (4,), "logits"), name="abc")
    x = torch.rand(5, 4, requires_grad=True)
    answers = asked(x)
    assert not answers.log_p.requires_grad and answers.log_p.grad_fn is None
    assert all(p.grad is None for p in network.parameters())
    assert x.grad is None


def test_a_function_that_hands_out_itself_hands_out_a_copy() -> None:
    table = torch.rand(5, 3)
    asked = Api.calling(lambda x: table, Contract(("a", "b", "c"), (4,), "logits"), name="abc")
    asked(torch.rand(5, 4)).log_p.zero_()
    assert float(table.sum()) > 0


def test_a_function_cannot_change_what_it_is_given() -> None:
    x = torch.rand(3, 4)
    before = x.clone()
    spoil = Api.calling(lambda batch: batch.zero_()[:, :3], Contract(("a", "b", "c"), (4,), "logits"), name="abc")
    spoil(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_not_copied(make) -> None:
    with pytest.raises(SpoliaError, match="copied or pickled"):
        make(api())


def test_it_does_not_keep_queries() -> None:
    asked = api()
    x = torch.rand(50, 2, 2)
    asked(x)
    assert not [one for one in attributes(asked) if isinstance(one, np.ndarray)]


# --- asking ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_experts_own() -> None:
    network, asked, x = expert(), api(), torch.rand(7, 2, 2)
    with torch.no_grad():
        wanted = network(x).double().log_softmax(1)
    found = asked(x)
    torch.testing.assert_close(found.log_p, wanted, rtol=1e-6, atol=1e-7)  # logits pass in fp32
    assert torch.equal(found.labels, wanted.argmax(1))
    assert asked.spent.calls == 1 and asked.spent.items == 7


def test_inputs_are_brought_into_the_apis_range() -> None:
    seen = []
    contract = Contract(("a", "b", "c"), (4,), "logits", low=0, high=255, whole=True)
    asked = Api.calling(lambda x: seen.append(x.clone()) or x[:, :3], contract, name="abc", span=(-1.0, 1.0))
    asked(torch.tensor([[-1.0, 0.0, 1.0, 7.0]]))
    assert seen[0].tolist() == [[0.0, 128.0, 255.0, 255.0]]  # 127.5 rounds to even


def test_what_it_cannot_take_is_told() -> None:
    with pytest.raises(SpoliaError, match=r"inputs \[5\]; it takes \[2, 2\]"):
        api()(torch.rand(3, 5))
    with pytest.raises(SpoliaError, match="not finite"):
        api()(torch.full((1, 2, 2), torch.nan))
    assert len(api()(torch.rand(0, 2, 2)).labels) == 0


def test_the_budget_ends_before_a_query_that_it_does_not_pay() -> None:
    asked = api(budget=Budget(items=10))
    asked(torch.rand(7, 2, 2))
    assert asked.left == 3
    with pytest.raises(BudgetSpent, match="10 items"):
        asked(torch.rand(4, 2, 2))
    assert asked.spent.items == 7
    asked(torch.rand(3, 2, 2))
    assert asked.left == 0


def test_money_and_calls_are_budgets_too() -> None:
    asked = api(budget=Budget(money=1.0), price=Price(item=0.1, call=0.05))
    asked(torch.rand(9, 2, 2))
    assert asked.spent.money == pytest.approx(0.95)
    with pytest.raises(BudgetSpent, match="1 USD"):
        asked(torch.rand(1, 2, 2))
    few = api(budget=Budget(calls=1))
    few(torch.rand(1, 2, 2))
    with pytest.raises(BudgetSpent, match="1 calls"):
        few(torch.rand(1, 2, 2))


def test_a_large_batch_goes_out_in_lots() -> None:
    sizes = []
    contract = Contract(("a", "b", "c"), (4,), "logits", most=4)
    asked = Api.calling(lambda x: sizes.append(len(x)) or x[:, :3], contract, name="abc")
    x = torch.rand(10, 4)
    assert torch.equal(asked(x).labels, x[:, :3].argmax(1))
    assert sizes == [4, 4, 2]


def test_what_was_answered_is_not_asked_again(tmp_path) -> None:
    asked_for = []

    def make() -> Api:
        contract = Contract(("a", "b", "c"), (4,), "logits")
        return Api.calling(
            lambda x: asked_for.append(len(x)) or x[:, :3], contract, name="abc", store=tmp_path / "a.sqlite"
        )

    x = torch.rand(6, 4)
    first = make()
    one = first(torch.cat([x, x[:2]]))  # two of them twice
    first.close()
    again = make()
    two = again(torch.cat([x, x[:2]]))
    three = again(torch.cat([x[3:], torch.rand(2, 4)]))
    assert asked_for == [6, 2]
    assert torch.equal(one.log_p, two.log_p) and torch.equal(three.log_p[:3], one.log_p[3:6])
    assert (again.spent.items, again.spent.kept) == (8, 2 + 8 + 3)


def test_two_apis_in_one_store_do_not_answer_for_each_other(tmp_path) -> None:
    x, found = torch.rand(3, 4), []
    for name, sign in (("one", 1), ("two", -1)):
        contract = Contract(("a", "b", "c"), (4,), "logits")
        asked = Api.calling(lambda b, s=sign: s * b[:, :3], contract, name=name, store=tmp_path / "a.sqlite")
        found.append(asked(x).labels)
        assert asked.spent.items == 3
    assert torch.equal(found[0], x[:, :3].argmax(1)) and torch.equal(found[1], x[:, :3].argmin(1))


def test_a_store_that_is_none_is_told(tmp_path) -> None:
    (tmp_path / "a.sqlite").write_text("these are not the answers you look for" * 40)
    with pytest.raises(SpoliaError, match="cannot be used"):
        api(store=tmp_path / "a.sqlite")


# --- promises and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ("one",)},
        {"classes": ("a", "a")},
        {"shape": ()},
        {"answers": "vibes"},
        {"low": 1.0, "high": 0.0},
        {"high": float("nan")},
        {"top": 3},
        {"most": 0},
        {"resolution": 1.0},
    ],
)
def test_a_contract_that_cannot_be_kept_is_told(wrong: dict) -> None:
    with pytest.raises(SpoliaError):
        Contract(**({"classes": TWO, "shape": (4,)} | wrong))


def test_a_contract_survives_json() -> None:
    contract = Contract(("a", "b"), (1, 8, 8), "top", top=2, resolution=0.01, most=7)
    assert Contract.of(contract.to_dict() | {"unknown": 1}) == contract


def test_every_kind_of_answer_becomes_log_probabilities() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
    three, truth = ("a", "b", "c"), torch.from_numpy(p)
    whole = Contract(three, (4,))
    torch.testing.assert_close(
        answers_of(rows_of({"probabilities": p}, whole, 2), whole).log_p.exp(), truth, atol=1e-6, rtol=0
    )
    logits = Contract(three, (4,), "logits")
    torch.testing.assert_close(
        answers_of(rows_of({"logits": np.log(p) + 5}, logits, 2), logits).log_p.exp(), truth, atol=1e-6, rtol=0
    )  # rows are fp32
    top = Contract(three, (4,), "top", top=1)
    found = answers_of(rows_of({"values": p.max(1, keepdims=True), "classes": p.argmax(1)[:, None]}, top, 2), top)
    torch.testing.assert_close(found.log_p.exp()[0], torch.tensor([0.7, 0.15, 0.15]).double(), atol=1e-6, rtol=0)
    label = Contract(three, (4,), "label")
    for given in (np.array([0, 2]), np.array([[0], [2]]), np.array(["a", "c"]), np.array([b"a", b"c"], dtype=object)):
        found = answers_of(rows_of({"label": given}, label, 2), label)
        assert found.hard and found.labels.tolist() == [0, 2]
        torch.testing.assert_close(found.log_p.exp().sum(1), torch.ones(2).double())


def test_zeros_of_rounded_answers_have_a_logarithm() -> None:
    contract = Contract(TWO, (4,), resolution=0.01)
    found = answers_of(rows_of({"probabilities": np.array([[1.0, 0.0]])}, contract, 1), contract)
    assert float(found.log_p[0, 1].exp()) == pytest.approx(0.005, rel=0.01)
    exact = Contract(TWO, (4,))
    found = answers_of(rows_of({"probabilities": np.array([[1.0, 0.0]])}, exact, 1), exact)
    assert float(found.log_p[0, 1].exp()) == pytest.approx(FLOOR, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "raw", "word"),
    [
        ("probabilities", {}, "no `probabilities`"),
        ("probabilities", {"probabilities": np.ones((2, 3)) / 3}, "where"),
        ("probabilities", {"probabilities": np.array([[0.5, 0.5]])}, "where"),
        ("probabilities", {"probabilities": np.array([[0.5, np.nan], [1, 0]])}, "NaN"),
        ("probabilities", {"probabilities": np.array([[3.0, -2.0], [1, 0]])}, "logits"),
        ("probabilities", {"probabilities": np.array([["a", "b"], ["c", "d"]])}, "place of numbers"),
        ("logits", {"logits": np.array([[np.inf, 0], [1, 0]])}, "infinite"),
        ("label", {"label": np.array([0, 2])}, "2 classes"),
        ("label", {"label": np.array([0.5, 1])}, "2 classes"),
        ("label", {"label": np.array(["cat", "cow"])}, "cow"),
        ("label", {"label": np.array([0])}, "labels"),
        ("top", {"values": np.array([[0.9], [0.8]])}, "classes"),
        ("top", {"values": np.array([[0.9], [1.8]]), "classes": np.array([[0], [1]])}, "no probabilities"),
    ],
)
def test_an_answer_that_does_not_fit_is_named(kind: str, raw: dict, word: str) -> None:
    with pytest.raises(Misfit, match=word):
        rows_of(raw, Contract(TWO, (4,), kind), 2)

"""Fisher merging against closed forms: the Fisher of logistic regression, its weighted mean, and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia import Examples, ExpertPool, Journal, Network, SpoliaError
from spolia.core.journal import Interrupted
from spolia.methods.merge.fisher import Fisher, fisher, information
from spolia.parts.learned import Learned
from spolia.parts.stage import Stage, drawn

State = dict[str, Tensor]
WIDE = torch.float64
# two fp64 sums of some hundred products in another order
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def logistic(module: nn.Module, x: Tensor) -> Tensor:
    """Two classes whose logits are (w x, 0)."""
    z = module(x)
    return torch.cat([z, torch.zeros_like(z)], 1)


def line(outputs: Any = logistic, width: int = 3, classes: int = 1) -> Network:
    return Network(nn.Linear(width, classes, bias=False).double(), outputs=outputs)


class Stubborn(nn.Module):
    """A layer that looks at its numbers, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x)).tanh()
        return self.last(y if float(y.detach().sum()) < 1e9 else -y)


class Pliant(Stubborn):
    """The same numbers without looking."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.layer(x)).tanh())


def of(network: Network, weights: State, inputs: Any, **settings: Any) -> State:
    """F of the one expert `t` with these weights."""
    pool = ExpertPool.of({"t": weights})
    chosen = Fisher(**{"examples": 10**6, **settings})
    part = drawn({"t": Examples.of(inputs, "t")}, chosen.examples, 0)["t"]
    stage = Stage.of(pool, network)
    with pool.opened():
        stage.show(0)
        return information(stage, "t", part, chosen, 0)


def merged(experts: dict[str, State], network: Network, inputs: dict[str, Any], **settings: Any) -> State:
    return fisher(ExpertPool.of(experts), network, inputs, Fisher(**settings)).weights


def net(kind: type[nn.Module] = Pliant) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(kind().double())


# --- the Fisher ------------------------------------------------------------------------------------------------------


def test_of_logistic_regression_it_is_the_textbooks() -> None:
    x, w = randn(50, 3), randn(1, 3, seed=1)
    p = torch.sigmoid(x @ w.t())
    torch.testing.assert_close(of(line(), {"weight": w}, x)["weight"], (p * (1 - p) * x**2).mean(0)[None], **EXACT)


def test_of_a_linear_softmax_it_is_known_too() -> None:
    x, w = randn(50, 3), randn(4, 3, seed=1)
    p = (x @ w.t()).softmax(1)
    found = of(line(lambda m, x: m(x), classes=4), {"weight": w}, x)["weight"]
    torch.testing.assert_close(found, (p * (1 - p)).t() @ x**2 / 50, **EXACT)


def test_it_is_the_mean_of_squares_over_examples_and_classes() -> None:
    """Not the square of a batch's mean gradient, in which examples and classes cancel."""
    network, x = net(), randn(7, 4)
    weights = {n: t.clone() for n, t in network.module.state_dict().items()}
    wanted = {n: torch.zeros_like(t) for n, t in weights.items()}
    for i in range(7):
        for c in range(3):
            leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
            log_p = network.logits("t", x[i : i + 1], leaves)[0].log_softmax(0)[c]
            for n, slope in zip(leaves, torch.autograd.grad(log_p, list(leaves.values())), strict=True):
                wanted[n] += log_p.exp().detach() * slope**2 / 7
    torch.testing.assert_close(of(network, weights, x), wanted, **EXACT)


@pytest.mark.parametrize("classes", [16, 2])
def test_where_vmap_refuses_a_loop_gives_the_same(classes: int) -> None:
    x = randn(9, 4)
    weights = {n: t.clone() for n, t in net().module.state_dict().items()}
    with pytest.raises(RuntimeError):
        torch.func.vmap(net(Stubborn).module)(x)
    both = [of(net(kind), weights, x, max_classes=classes, chunk=4) for kind in (Pliant, Stubborn)]
    torch.testing.assert_close(both[1], both[0], **EXACT)


@pytest.mark.parametrize("classes", [16, 2])
def test_chunks_change_nothing(classes: int) -> None:
    """Neither the sum nor, with drawn labels, the draws."""
    weights = {n: t.clone() for n, t in net().module.state_dict().items()}
    whole = of(net(), weights, randn(20, 4), max_classes=classes, chunk=20)
    for chunk in (1, 7):
        torch.testing.assert_close(of(net(), weights, randn(20, 4), max_classes=classes, chunk=chunk), whole, **EXACT)


def test_drawn_labels_are_right_on_average() -> None:
    """One input n times over: g^2 is (1 - p)^2 x^2 or p^2 x^2, with probabilities p and 1 - p."""
    count, x, w = 3000, torch.tensor([[1.0, -2.0, 0.5]], dtype=WIDE), torch.tensor([[0.3, 0.2, 1.0]], dtype=WIDE)
    p = torch.sigmoid(x @ w.t()).item()
    found = of(line(), {"weight": w}, x.expand(count, 3).contiguous(), max_classes=1)["weight"]
    spread = math.sqrt(p * (1 - p)) * abs((1 - p) ** 2 - p**2)
    off = (found / x**2 - p * (1 - p)).abs().max().item()
    assert 0 < off < 5 * spread / math.sqrt(count)  # five standard deviations of the mean; 0 would be no draw


class Tokens(nn.Module):
    """Every token's logits from its own embedding: [inputs, tokens] -> [inputs, tokens, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_padding_has_no_fisher() -> None:
    network = net(Tokens)
    weights = {n: t.clone() for n, t in network.module.state_dict().items()}
    short = torch.randint(1, 9, (6, 3), generator=torch.Generator().manual_seed(0))
    long = torch.cat([short, torch.zeros(6, 2, dtype=torch.int64)], 1)
    mask = torch.ones(6, 5)
    mask[:, 3:] = 0
    alone = of(network, weights, {"ids": short, "attention_mask": torch.ones(6, 3)})
    padded = of(network, weights, {"ids": long, "attention_mask": mask})
    torch.testing.assert_close(padded, alone, **EXACT)
    assert not padded["embed.weight"][0].any() and padded["embed.weight"][1:].any()


# --- the merge -------------------------------------------------------------------------------------------------------


def test_two_experts_are_averaged_by_their_fishers() -> None:
    experts = {t: {"weight": randn(1, 3, seed=k + 1)} for k, t in enumerate("ab")}
    inputs = {"a": randn(40, 3, seed=5), "b": 3 * randn(40, 3, seed=6)}
    f = {t: of(line(), experts[t], inputs[t])["weight"] for t in "ab"}
    found = merged(experts, line(), inputs, normalize=False, floor=0.0, weight=(1.0, 2.0))
    total = f["a"] + 2 * f["b"]
    wanted = (f["a"] * experts["a"]["weight"] + 2 * f["b"] * experts["b"]["weight"]) / total
    torch.testing.assert_close(found["weight"], wanted, **EXACT)
    even = {t: x / x.norm() for t, x in f.items()}
    wanted = (even["a"] * experts["a"]["weight"] + even["b"] * experts["b"]["weight"]) / (even["a"] + even["b"])
    torch.testing.assert_close(merged(experts, line(), inputs, floor=0.0)["weight"], wanted, **EXACT)


def test_equal_fishers_give_the_mean() -> None:
    """A shift of all logits alike changes no prediction, so it changes no Fisher."""
    start, inputs = randn(4, 3), dict.fromkeys("abc", randn(40, 3, seed=7))
    experts = {t: {"weight": start + randn(1, 3, seed=k + 1)} for k, t in enumerate("abc")}
    found = merged(experts, line(lambda m, x: m(x), classes=4), inputs)
    wanted = torch.stack([e["weight"] for e in experts.values()]).mean(0)
    torch.testing.assert_close(found["weight"], wanted, **EXACT)


def test_an_expert_without_fisher_has_no_say() -> None:
    experts = {t: {"weight": randn(1, 3, seed=k)} for k, t in enumerate("abc")}
    inputs = {"a": torch.zeros(10, 3, dtype=WIDE), "b": randn(10, 3, seed=5), "c": torch.zeros(10, 3, dtype=WIDE)}
    learned = fisher(ExpertPool.of(experts), line(), inputs, Fisher())
    torch.testing.assert_close(learned.weights["weight"], experts["b"]["weight"], rtol=0, atol=0)
    assert [warning.partition(":")[0] for warning in learned.facts["warnings"]] == ["a", "c"]


def test_where_no_fisher_speaks_the_mean_is_left() -> None:
    experts = {t: {"weight": randn(1, 3, seed=k)} for k, t in enumerate("ab")}
    inputs = {t: randn(30, 3, seed=5) * torch.tensor([1.0, 1.0, 0.0], dtype=WIDE) for t in "ab"}
    mean = (experts["a"]["weight"] + experts["b"]["weight"]) / 2
    for floor in (0.0, 1e-6):
        found = merged(experts, line(), inputs, floor=floor)["weight"]
        torch.testing.assert_close(found[0, 2], mean[0, 2], **EXACT)
        assert not torch.allclose(found[0, :2], mean[0, :2])


@pytest.mark.parametrize("dtype", [torch.float32, WIDE, torch.bfloat16])
def test_a_single_expert_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    network = Network(Pliant().to(dtype))
    expert = {n: t.clone() for n, t in network.module.state_dict().items()}
    found = merged({"t": expert}, network, {"t": randn(5, 4).to(dtype)})
    assert all(torch.equal(found[n], t) and found[n].dtype == dtype for n, t in expert.items())


def test_the_order_of_experts_does_not_matter() -> None:
    experts = {t: {"weight": randn(1, 3, seed=k)} for k, t in enumerate("abc")}
    inputs = {t: randn(10, 3, seed=k + 5) for k, t in enumerate("abc")}
    other = {t: experts[t] for t in "cab"}
    torch.testing.assert_close(merged(experts, line(), inputs), merged(other, line(), inputs), **EXACT)


def test_under_heads_only_the_body_is_merged() -> None:
    network = Network(nn.Linear(4, 6).double(), {t: nn.Linear(6, 3 + 20 * (t == "b")).double() for t in "ab"})
    experts = {t: {"weight": randn(6, 4, seed=k), "bias": randn(6, seed=k + 2)} for k, t in enumerate("ab")}
    learned = fisher(ExpertPool.of(experts), network, {t: randn(12, 4) for t in "ab"}, Fisher(examples=8))
    assert learned.weights.keys() == {"weight", "bias"}
    assert learned.facts["inputs"] == {t: {"looked at": 8} for t in "ab"}


def test_running_statistics_are_those_of_the_merged_network() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    start = module.state_dict()
    experts = {
        t: {n: x + 0.1 * randn(*x.shape, seed=k).abs() if x.is_floating_point() else x for n, x in start.items()}
        for k, t in enumerate("ab")
    }
    inputs = {t: randn(30, 4, seed=k) for k, t in enumerate("ab")}
    found = merged(experts, Network(module), inputs)
    first = torch.cat(list(inputs.values())) @ found["0.weight"].t() + found["0.bias"]
    torch.testing.assert_close(found["1.running_mean"], first.mean(0), **EXACT)
    torch.testing.assert_close(found["1.running_var"], first.var(0), **EXACT)
    averaged = merged(experts, Network(module), inputs, batchnorm="average")["1.running_var"]
    torch.testing.assert_close(averaged, (experts["a"]["1.running_var"] + experts["b"]["1.running_var"]) / 2, **EXACT)


def test_nothing_given_is_changed() -> None:
    network, x = net(), randn(6, 4)
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    experts = {t: {n: v + 1 for n, v in before.items()} for t in "ab"}
    merged(experts, network, dict.fromkeys("ab", x))
    assert all(torch.equal(before[n], t) for n, t in network.module.state_dict().items())
    assert all(torch.equal(before[n] + 1, t) for e in experts.values() for n, t in e.items())
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())


# --- running it ------------------------------------------------------------------------------------------------------


def learn(**more: Any) -> Learned:
    network = net()
    start = {n: t.clone() for n, t in network.module.state_dict().items()}
    experts = {t: {n: x + 0.1 * randn(*x.shape, seed=k) for n, x in start.items()} for k, t in enumerate("abc")}
    inputs = {t: randn(12, 4, seed=k) for k, t in enumerate("abc")}
    return spolia.merge(experts, method="fisher", network=network, unlabelled=inputs, **more)


def test_stopped_and_run_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    class Stopping(Journal):
        def log(self, **numbers: Any) -> None:
            super().log(**numbers)
            if self._step == 1:
                self.request_stop()

    whole = learn()
    with pytest.raises(Interrupted):
        learn(journal=Stopping(tmp_path))
    for again in (learn(journal=tmp_path), learn(journal=tmp_path)):  # taken up; finished
        assert all(torch.equal(again.weights[n], t) for n, t in whole.weights.items())
        assert again.facts == whole.facts


def test_a_folder_holds_what_memory_does(tmp_path: Path) -> None:
    from spolia.core.checkpoint import read_tensors

    found, wanted = read_tensors(str(learn(out=tmp_path / "out"))), learn().weights
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "inputs without labels (a: 12 looked at; b: 12 looked at; c: 12 looked at)" in card


def call(**change: Any) -> Learned:
    network = Network(nn.Linear(3, 4), {t: nn.Linear(4, 2) for t in "ab"})
    given: dict[str, Any] = {
        "experts": {t: {n: x.clone() for n, x in network.module.state_dict().items()} for t in "ab"},
        "network": network,
        "unlabelled": {t: torch.zeros(4, 3) for t in "ab"},
        "settings": {},
    } | change
    return spolia.merge(given.pop("experts"), method="fisher", **given)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"network": Network(nn.Linear(3, 4), {"a": nn.Linear(4, 2)})}, "no head for b"),
        ({"unlabelled": {"a": torch.zeros(4, 3)}}, "nothing for b"),
        ({"unlabelled": {"a": torch.zeros(4, 3), "b": torch.zeros(0, 3)}}, "unlabelled.b: is empty"),
        ({"unlabelled": {"a": torch.zeros(4, 3), "b": torch.zeros(4, 5)}}, "unlabelled.b: the network fails"),
        ({"network": Network(nn.Linear(3, 5))}, r"tensor `weight` is \[5, 3\] in the module"),
        ({"network": None}, "there is no network"),
        ({"settings": {"weight": (1.0, -1.0)}}, "no weight may be below 0"),
        ({"settings": {"floor": -1.0}}, "greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(
    change: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Stage, "mean", work)
    with pytest.raises(SpoliaError, match=word):
        call(**change)


def test_gradients_that_are_not_finite_are_named() -> None:
    bad = {"a": torch.ones(4, 3), "b": torch.full((4, 3), float("inf"))}
    with pytest.raises(SpoliaError, match=r"unlabelled\.b: its expert's gradients are NaN or Inf"):
        call(unlabelled=bad)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_of_transformers_are_merged(kind: str, make_pool: Callable[..., Any], tmp_path: Path) -> None:
    import transformers as hf

    _, experts = make_pool(kind, 2, tmp_path, spread=0.05)
    door = hf.AutoModelForSequenceClassification if kind == "bert" else hf.AutoModelForCausalLM
    network = Network(door.from_pretrained(experts[0]))
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (12, 6), generator=draws)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(12, 6, dtype=torch.int64)}
    given = {path.name: path for path in experts}
    learned = spolia.merge(given, method="fisher", network=network, unlabelled=dict.fromkeys(given, inputs))
    mean = spolia.merge(given, method="average")
    assert learned.weights.keys() == mean.keys() and not learned.facts["warnings"]
    ends = [door.from_pretrained(path).state_dict() for path in experts]
    for name, tensor in learned.weights.items():
        low, high = (f(ends[0][name], ends[1][name]) for f in (torch.minimum, torch.maximum))
        # a share of each expert lies between them, but for fp32's last digit
        assert bool((tensor >= low - 1e-6).all() and (tensor <= high + 1e-6).all())
    assert any(not torch.allclose(learned.weights[n], mean[n], atol=1e-3) for n in mean)


@pytest.mark.slow
def test_on_digits_it_does_not_fall_behind_the_mean(digit_pool: Callable[..., Any]) -> None:
    from spolia.bench.multitask import evaluate, mean_percent
    from spolia.core.checkpoint import read_tensors
    from spolia.runs.digits_pool import one_thread

    domains, gain = ("upright", "turned", "inverted", "permuted"), 0.0
    for seed in range(3):
        pool = digit_pool(domains, seed)
        experts = {domain: read_tensors(pool.expert(domain)) for domain in domains}
        with one_thread():
            learned = spolia.merge(experts, method="fisher", network=pool.network, unlabelled=pool.unlabelled(domains))
            both = [pool.outputs(weights) for weights in (learned.weights, spolia.merge(experts))]
        own, mean = (mean_percent(evaluate(outputs, pool.tasks("test"))) for outputs in both)
        gain += (own - mean) / 3
    assert (
        gain > -0.5
    )  # 0.5 points over these seeds, with a standard error of about half a point: no claim to be better

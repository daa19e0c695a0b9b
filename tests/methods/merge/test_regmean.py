"""RegMean against closed forms: the regression it solves, its limits (one Gram, no Gram, one expert), and RegMean++."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spolia
from spolia import Examples, ExpertPool, Journal, Network, SpoliaError
from spolia.core.journal import Interrupted
from spolia.methods.merge.regmean import RegMean, RegMeanPlus, regmean, regmean_plus
from spolia.parts.grams import fed_together, grams, linear_layers, rows_of
from spolia.parts.learned import Learned
from spolia.parts.stage import Stage

State = dict[str, Tensor]
WIDE = torch.float64
# fp64 sums of some hundred products in another order
EXACT = {"rtol": 1e-9, "atol": 1e-11}
LEAST = 1e-12  # ridge: what is left of it is below EXACT


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def near(start: State, count: int = 3, size: float = 0.5) -> dict[str, State]:
    """Experts around a start: every number changed."""
    draws = torch.Generator().manual_seed(9)

    def change(t: Tensor) -> Tensor:
        return t + size * torch.randn(t.shape, dtype=t.dtype, generator=draws) if t.is_floating_point() else t

    return {t: {n: change(x) for n, x in start.items()} for t in "abcdef"[:count]}


def made(module: nn.Module) -> tuple[Network, dict[str, State]]:
    module = module.double()
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + k))
    return Network(module), near(module.state_dict())


def line(width: int = 4, outputs: int = 3) -> tuple[Network, dict[str, State]]:
    return made(nn.Linear(width, outputs, bias=False))


def inputs_of(experts: dict[str, State], count: int = 50, width: int = 4) -> dict[str, Tensor]:
    return {t: randn(count, width, seed=20 + k) * (k + 1) for k, t in enumerate(experts)}


def learn(network: Network, experts: dict[str, State], inputs: dict[str, Any], **settings: Any) -> Learned:
    chosen = RegMean(**{"alpha": 1.0, "ridge": LEAST, "examples": 10**6, **settings})
    return regmean(ExpertPool.of(experts), network, inputs, chosen)


def learn_plus(network: Network, experts: dict[str, State], inputs: dict[str, Any], **settings: Any) -> Learned:
    chosen = RegMeanPlus(**{"alpha": 1.0, "ridge": LEAST, "examples": 10**6, **settings})
    return regmean_plus(ExpertPool.of(experts), network, inputs, chosen)


def mean(experts: dict[str, State], name: str) -> Tensor:
    return torch.stack([e[name] for e in experts.values()]).mean(0)


def solved(inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The least-squares answer from all rows at once [out, in], every task's mean square counting alike."""
    rows = torch.cat([x / len(x) ** 0.5 for x in inputs])
    wanted = torch.cat([x @ w.t() / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)])
    return torch.linalg.lstsq(rows, wanted).solution.t()


def disturbance(inputs: list[Tensor], weights: list[Tensor], w: Tensor) -> float:
    return sum(float((x @ (w - v).t()).square().mean(0).sum()) for x, v in zip(inputs, weights, strict=True))


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [learn, learn_plus])
def test_it_is_the_least_squares_answer(learn: Callable[..., Learned]) -> None:
    """So the gradient of sum_k |X_k W^T - X_k W_k^T|^2 is zero there."""
    network, experts = line()
    inputs = inputs_of(experts)
    found = learn(network, experts, inputs).weights["weight"]
    weights = [e["weight"] for e in experts.values()]
    torch.testing.assert_close(found, solved(list(inputs.values()), weights), **EXACT)
    slope = sum((found - w) @ x.t() @ x / len(x) for x, w in zip(inputs.values(), weights, strict=True))
    assert float(slope.abs().max()) < 1e-9 * float(found.norm() * inputs["c"].square().sum() / 50)


def test_without_entries_off_the_diagonal_columns_are_averaged_by_their_squares() -> None:
    network, experts = line()
    inputs = inputs_of(experts)
    found = learn(network, experts, inputs, alpha=0.0, weight=(1.0, 2.0, 0.5)).weights["weight"]
    c = dict(zip(experts, (1.0, 2.0, 0.5), strict=True))
    squares = {t: c[t] * x.square().mean(0) for t, x in inputs.items()}
    wanted = sum(squares[t] * experts[t]["weight"] for t in experts) / sum(squares.values())
    torch.testing.assert_close(found, wanted, **EXACT)


def test_with_round_inputs_it_is_the_mean() -> None:
    network, experts = line()
    q = torch.linalg.qr(randn(8, 4)).Q  # Q^T Q = 1
    for alpha in (0.3, 1.0):
        found = learn(network, experts, dict.fromkeys(experts, 3 * q), alpha=alpha).weights["weight"]
        torch.testing.assert_close(found, mean(experts, "weight"), **EXACT)


@pytest.mark.parametrize("learn", [learn, learn_plus])
@pytest.mark.parametrize("count", [2, 50])
def test_equal_weights_stay_bit_for_bit(learn: Callable[..., Learned], count: int) -> None:
    network, experts = line()
    same = dict.fromkeys(experts, experts["a"])
    assert torch.equal(learn(network, same, inputs_of(same, count)).weights["weight"], experts["a"]["weight"])
    one = {"b": experts["b"]}
    assert torch.equal(learn(network, one, inputs_of(one, count)).weights["weight"], experts["b"]["weight"])


def test_where_no_input_points_the_mean_is_left() -> None:
    network, experts = line(6)
    inputs = {t: torch.cat([x, torch.zeros(len(x), 2, dtype=WIDE)], 1) for t, x in inputs_of(experts).items()}
    found = learn(network, experts, inputs).weights["weight"]
    torch.testing.assert_close(found[:, 4:], mean(experts, "weight")[:, 4:], **EXACT)
    nothing = {t: torch.zeros(5, 6, dtype=WIDE) for t in experts}
    torch.testing.assert_close(learn(network, experts, nothing).weights["weight"], mean(experts, "weight"), **EXACT)


def test_fewer_inputs_than_columns_are_fine() -> None:
    """One row a task: on it, the merged layer does what the expert does, for three rows in eight directions can agree."""
    network, experts = line(8)
    inputs = inputs_of(experts, 1, 8)
    weights, rows = [e["weight"] for e in experts.values()], list(inputs.values())
    found = learn(network, experts, inputs, ridge=1e-9).weights["weight"]
    assert disturbance(rows, weights, found) < 1e-12 * disturbance(rows, weights, mean(experts, "weight"))
    across = torch.linalg.qr(torch.cat(rows).t(), mode="complete").Q[:, 3:]  # no input points there
    torch.testing.assert_close(
        found @ across, mean(experts, "weight") @ across, rtol=1e-6, atol=1e-6
    )  # Gram's squared eps


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_of_two_layers_each_does_better_than_the_mean(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
        experts = {t: {n: torch.randn_like(x) for n, x in module.state_dict().items()} for t in "ab"}
        inputs = {t: torch.randn(30, 4, dtype=WIDE) for t in "ab"}
    found = learn(Network(module), experts, inputs).weights
    given = {"0.weight": list(inputs.values()), "1.weight": [x @ experts[t]["0.weight"].t() for t, x in inputs.items()]}
    for name, rows in given.items():
        weights = [e[name] for e in experts.values()]
        both = [disturbance(rows, weights, w) for w in (found[name], mean(experts, name))]
        assert both[0] < both[1]


def test_its_own_account_of_the_disturbance_is_right() -> None:
    network, experts = line()
    inputs = inputs_of(experts)
    learned = learn(network, experts, inputs)
    rows, weights = list(inputs.values()), [e["weight"] for e in experts.values()]
    told = learned.facts["layers"][""]
    assert told["mean"] == pytest.approx(disturbance(rows, weights, mean(experts, "weight")), rel=1e-9)
    assert told["solved"] == pytest.approx(disturbance(rows, weights, learned.weights["weight"]), rel=1e-9)


# --- networks --------------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def given_to(network: Network, weights: State, name: str, x: Tensor) -> Tensor:
    """What layer `name` of a Sequential is given."""
    return network.loaded(weights)[: int(name)](x).detach()


def test_every_layer_is_solved_for_what_its_own_expert_gives_it() -> None:
    network, experts = made(deep())
    inputs = inputs_of(experts)
    found = learn(network, experts, inputs).weights
    for name in ("0", "3", "5"):
        rows = [given_to(network, experts[t], name, x) for t, x in inputs.items()]
        wanted = solved(rows, [e[f"{name}.weight"] for e in experts.values()])
        torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-8)  # squared condition of X
    for name in ("0.bias", "1.weight", "1.bias", "3.bias", "5.bias"):
        torch.testing.assert_close(found[name], mean(experts, name), **EXACT)


def test_plus_is_solved_for_what_the_merged_layers_before_give_it() -> None:
    network, experts = made(deep())
    inputs = inputs_of(experts)
    found = learn_plus(network, experts, inputs).weights
    for name in ("0", "3", "5"):
        rows = [given_to(network, found, name, x) for x in inputs.values()]
        wanted = solved(rows, [e[f"{name}.weight"] for e in experts.values()])
        torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-8)  # squared condition of X
    plain = learn(network, experts, inputs).weights
    torch.testing.assert_close(found["0.weight"], plain["0.weight"], **EXACT)
    assert not torch.allclose(found["5.weight"], plain["5.weight"], rtol=1e-3)


@pytest.mark.parametrize("memory", [0, 2000])
def test_with_less_memory_there_are_more_passes_and_the_same_bits(memory: int) -> None:
    network, experts = made(deep())
    inputs = inputs_of(experts)
    passes = []
    network.module.register_forward_hook(lambda *_: passes.append(1))
    one, other = learn(network, experts, inputs), None
    first = len(passes)
    other = learn(network, experts, inputs, memory=memory)
    assert len(passes) - first > first
    assert all(torch.equal(other.weights[n], t) for n, t in one.weights.items())


def test_batches_change_nothing() -> None:
    network, experts = made(deep())
    inputs = inputs_of(experts)
    whole = learn(network, experts, inputs, batch=50).weights
    torch.testing.assert_close(learn(network, experts, inputs, batch=7).weights, whole, rtol=1e-6, atol=1e-8)


def test_only_the_named_layers_are_solved_for() -> None:
    network, experts = made(deep())
    learned = learn(network, experts, inputs_of(experts), layers=r"^[05]$")
    assert learned.facts["layers"].keys() == {"0", "5"}
    torch.testing.assert_close(learned.weights["3.weight"], mean(experts, "3.weight"), **EXACT)
    assert not torch.allclose(learned.weights["5.weight"], mean(experts, "5.weight"))


class Conv1D(nn.Module):
    """As Hugging Face has it: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("learn", [learn, learn_plus])
def test_a_turned_layer_is_solved_as_its_mirror_image(learn: Callable[..., Learned]) -> None:
    network, experts = made(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))
    turned = {t: {n: x.t() if x.dim() == 2 else x for n, x in e.items()} for t, e in experts.items()}
    inputs = inputs_of(experts)
    found = learn(Network(nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(3, 6)).double()), turned, inputs).weights
    for name, tensor in learn(network, experts, inputs).weights.items():
        torch.testing.assert_close(found[name].t() if tensor.dim() == 2 else found[name], tensor, **EXACT)


class Language(nn.Module):
    """Tokens embedded, query and key of one input, a head tied to the embedding: [inputs, tokens] -> [inputs, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pool, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        x = (self.query(x) * self.key(input=x)).tanh() * attention_mask[..., None]
        return self.head(self.pool(x.sum(1)))


def language() -> tuple[Network, dict[str, State]]:
    network, experts = made(Language())
    return network, {t: {**e, "head.weight": e["embed.weight"]} for t, e in experts.items()}


def sentences(count: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(1, 9, (count, 5), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(5) < torch.arange(count)[:, None] % 4 + 2).to(WIDE)
    return {"ids": ids, "attention_mask": mask}


def test_layers_with_one_input_share_a_gram_and_tied_ones_are_left() -> None:
    network, experts = language()
    stage = Stage.of(ExpertPool.of(experts), network)
    layers = linear_layers(stage.network, [t.name for t in stage.arithmetic], "")
    batch = Examples(sentences()).batch(range(4))
    fed = fed_together(stage.network, layers, [batch])
    assert [[layer.module for layer in one.layers] for one in fed] == [["query", "key"], ["pool"]]
    learned = learn(network, experts, dict.fromkeys(experts, sentences()))
    assert learned.facts["layers"].keys() == {"query", "key", "pool"}
    assert learned.facts["warnings"] == ["linear layer idle: no input runs through it as a module; it takes the mean"]
    for name in ("head.weight", "embed.weight", "idle.weight"):
        torch.testing.assert_close(learned.weights[name], mean(experts, name), **EXACT)


@pytest.mark.parametrize("learn", [learn, learn_plus])
def test_padding_does_not_count(learn: Callable[..., Learned]) -> None:
    network, experts = language()
    inputs, other = sentences(), sentences()
    other["ids"] = torch.where(other["attention_mask"] > 0, other["ids"], 0)
    both = [learn(network, experts, dict.fromkeys(experts, x)).weights for x in (inputs, other)]
    assert all(torch.equal(both[1][n], t) for n, t in both[0].items())
    for t in experts:  # the Gram of query is that of the embeddings of real tokens
        stage = Stage.of(ExpertPool.of({t: experts[t]}), Network(network.loaded(experts[t])))
        layers = linear_layers(stage.network, ["query.weight"], "")
        fed = fed_together(stage.network, layers, [inputs])
        rows = experts[t]["embed.weight"][inputs["ids"][inputs["attention_mask"] > 0]]
        torch.testing.assert_close(grams(stage.network, fed, [inputs])[0], rows.t() @ rows / len(rows), **EXACT)


def test_rows_are_taken_by_the_mask_that_is_about_them() -> None:
    x, mask = randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(rows_of(x, mask), x[mask])
    torch.testing.assert_close(rows_of(x.view(12, 2), mask), x[mask])
    torch.testing.assert_close(rows_of(x, None), x.view(12, 2))
    torch.testing.assert_close(rows_of(x[:, 0], mask), x[:, 0])  # pooled
    torch.testing.assert_close(rows_of(x[:, :3], mask), x[:, :3].reshape(9, 2))  # other tokens


def test_nothing_given_is_changed() -> None:
    network, experts = made(deep())
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    copies = {t: {n: x.clone() for n, x in e.items()} for t, e in experts.items()}
    inputs = inputs_of(experts)
    learn(network, experts, inputs)
    learn_plus(network, experts, inputs)
    assert all(torch.equal(before[n], t) for n, t in network.module.state_dict().items())
    assert all(torch.equal(copies[t][n], x) for t, e in experts.items() for n, x in e.items())
    assert not any(m._forward_pre_hooks for m in network.module.modules())


# --- running it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_stopped_and_run_again_it_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    network, experts = made(deep())
    chosen = {"memory": 0} if method == "regmean" else {}

    def run(journal: Any = None) -> Learned:
        inputs = inputs_of(experts)
        return spolia.merge(
            experts, method=method, network=network, unlabelled=inputs, settings=chosen, journal=journal
        )

    stopped = Journal(tmp_path, progress=lambda _, done, *__: stopped.request_stop() if done == 2 else None)
    with pytest.raises(Interrupted):
        run(stopped)
    whole = run()
    for again in (run(tmp_path), run(tmp_path)):  # taken up; finished
        assert all(torch.equal(again.weights[n], t) for n, t in whole.weights.items())
        assert again.facts == whole.facts


def call(method: str, **change: Any) -> Learned:
    network = Network(nn.Linear(3, 4), {t: nn.Linear(4, 2) for t in "ab"})
    given: dict[str, Any] = {
        "experts": {t: {n: x.clone() for n, x in network.module.state_dict().items()} for t in "ab"},
        "network": network,
        "unlabelled": {t: torch.zeros(4, 3) for t in "ab"},
        "settings": {},
    } | change
    return spolia.merge(given.pop("experts"), method=method, **given)


def plain_attention() -> Network:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x, x, x, need_weights=False)[0]

    return Network(Attention())


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"network": Network(nn.Linear(3, 4), {"a": nn.Linear(4, 2)})}, "no head for b"),
        ({"unlabelled": {"a": torch.zeros(4, 3)}}, "nothing for b"),
        ({"unlabelled": {"a": torch.zeros(4, 3), "b": torch.zeros(0, 3)}}, "unlabelled.b: is empty"),
        ({"settings": {"layers": "attn"}}, "no linear layer's name holds `attn`"),
        ({"settings": {"layers": "("}}, "is no regular expression"),
        ({"settings": {"alpha": 1.5}}, "less than or equal to 1"),
        ({"settings": {"weight": 0.0}}, "one must be above"),
        (
            {"network": Network(nn.LayerNorm(3)), "experts": {t: nn.LayerNorm(3).state_dict() for t in "ab"}},
            "it has no linear layer",
        ),
        (
            {"network": plain_attention(), "experts": {t: plain_attention().module.state_dict() for t in "ab"}},
            "none of its 1 linear layers runs as a module",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(
    method: str, change: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Stage, "mean", work)
    with pytest.raises(SpoliaError, match=word):
        call(method, **change)


def test_inputs_that_are_not_finite_are_named() -> None:
    bad = {"a": torch.ones(4, 3), "b": torch.full((4, 3), float("inf"))}
    with pytest.raises(SpoliaError, match=r"unlabelled\.b: layer `` is given NaN or Inf"):
        call("regmean", unlabelled=bad)


# --- real digits -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_digits_it_is_better_than_the_mean(digit_pool: Callable[..., Any]) -> None:
    from spolia.bench.multitask import evaluate, mean_percent
    from spolia.core.checkpoint import read_tensors
    from spolia.runs.digits_pool import one_thread

    domains, gains = ("upright", "turned", "inverted", "permuted"), {"regmean": 0.0, "regmean_plus": 0.0}
    for seed in range(3):
        pool = digit_pool(domains, seed)
        experts = {domain: read_tensors(pool.expert(domain)) for domain in domains}
        with one_thread():
            for method in gains:
                learned = spolia.merge(
                    experts, method=method, settings={"alpha": 1.0}, network=pool.network, unlabelled=pool.unlabelled(domains)
                )  # fmt: skip
                told = learned.facts["layers"]
                assert sum(x["solved"] for x in told.values()) < 0.9 * sum(x["mean"] for x in told.values())
                both = [pool.outputs(weights) for weights in (learned.weights, spolia.merge(experts))]
                own, mean = (mean_percent(evaluate(outputs, pool.tasks("test"))) for outputs in both)
                gains[method] += (own - mean) / 3
    assert min(gains.values()) > 0.3  # 1.4 points over these seeds, with a standard error of about half a point

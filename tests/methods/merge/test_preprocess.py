"""Preprocessing against the methods of the same names, dense arithmetic, and merges of models that hold the changed vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia.catalog import METHODS, data_free, find
from spolia.core.checkpoint import read_tensors
from spolia.core.settings import MergeSettings
from spolia.core.stream import BLOCK
from spolia.errors import Problems, SpoliaError
from spolia.methods.merge.awd import Awd, disentangle
from spolia.parts.align import align
from spolia.parts.expert import ExpertPool
from spolia.parts.merging import bytes_needed
from spolia.runs.preprocessing import asked_steps

State = dict[str, Tensor]
Write = Callable[..., Path]
# "wide" is longer than a block, and its rows are no part of one; "k" is a kernel
SHAPES = {"a.weight": (9, 7), "k.weight": (4, 3, 2, 2), "b": (5,), "wide.weight": (30, BLOCK // 10 + 1)}
TIES, AWD = {"name": "ties", "density": 0.3}, {"name": "awd", "steps": 40}
CHAINS = [[TIES], [AWD], [TIES, AWD], [AWD, TIES], [{**TIES, "scope": "row"}, {**AWD, "granularity": "tensor"}, TIES]]
FAST: dict[str, dict[str, Any]] = {"awd": {"steps": 40}, "breadcrumbs": {"gamma": 0.1}}
ABLE = [method.name for method in data_free() if method.settings_class().vectors]


def models(count: int = 3, dtype: Any = torch.float32) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(count)
    base = {n: torch.randn(s, generator=noise, dtype=dtype) for n, s in SHAPES.items()}
    alike = {n: 0.05 * torch.randn(s, generator=noise, dtype=dtype) for n, s in SHAPES.items()}
    experts = [
        {n: t + alike[n] + 0.1 * torch.randn(t.shape, generator=noise, dtype=dtype) for n, t in base.items()}
        for _ in range(count)
    ]
    return base, experts


def close(got: State, expected: State, atol: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.to(got[name]), rtol=0, atol=atol)


# --- the methods of the same names -----------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scope", ["model", "tensor", "row"])
@pytest.mark.parametrize("density", [0.3, (0.1, 0.5, 1.0)])
def test_ties_then_a_sum_is_ties_with_sums(scope: str, density: Any) -> None:
    base, experts = models()
    step = {"name": "ties", "density": density, "scope": scope}
    got = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.4}, preprocess=[step])
    settings = {"density": density, "scope": scope, "normalize": False, "scale": 0.4}
    close(got, spolia.merge(experts, base=base, method="ties", settings=settings), 1e-6)  # fp32 sums in another order


@pytest.mark.parametrize("granularity", ["global", "tensor", "row"])
def test_awd_then_a_sum_is_awd(granularity: str) -> None:
    base, experts = models()
    step = {"name": "awd", "granularity": granularity, "steps": 60, "exclude": "^b"}
    settings = {"weight": (1.0, -0.5, 2.0), "scale": 0.7}
    got = spolia.merge(experts, base=base, method="task_arithmetic", settings=settings, preprocess=[step])
    own = {name: value for name, value in step.items() if name != "name"}
    alone = spolia.merge(experts, base=base, method="awd", settings=settings | own)
    close(got, alone, 2e-6)  # here remainders are added, there task vectors with folded factors: fp32 rounding of both


# --- dense arithmetic ------------------------------------------------------------------------------------------------


def trimmed(vectors: list[State], density: float) -> list[State]:
    """TIES as published, dense: the largest of the whole model, an elected sign, no sum."""
    kept = []
    for one in vectors:
        sizes = torch.cat([t.abs().flatten() for t in one.values()])
        least = sizes.topk(round(density * len(sizes))).values[-1]
        kept.append({n: torch.where(t.abs() >= least, t, 0.0) for n, t in one.items()})
    sums = {n: sum(one[n] for one in kept) for n in kept[0]}
    majority = 1.0 if sum(float(t.sign().sum()) for t in sums.values()) >= 0 else -1.0
    signs = {n: torch.where(t == 0, majority, t.sign()) for n, t in sums.items()}
    return [{n: torch.where(t.sign() == signs[n], t, 0.0) for n, t in one.items()} for one in kept]


def freed(vectors: list[State], settings: Awd) -> list[State]:
    """AWD, dense, row by row."""
    out: list[State] = [{} for _ in vectors]
    for name, first in vectors[0].items():
        tau = torch.stack([one[name].double() for one in vectors])
        if first.dim() > 1:
            rows = tau.flatten(2)
            a = disentangle(torch.einsum("irn,jrn->rij", rows, rows), settings)[0]
            tau = (rows - torch.einsum("rk,krn->rn", a, rows)).view_as(tau)
        for k, rest in enumerate(tau):
            out[k][name] = rest
    return out


@pytest.mark.parametrize("order", ["ties awd", "awd ties"])
def test_the_second_step_sees_what_the_first_leaves(order: str) -> None:
    base, experts = models(dtype=torch.float64)
    vectors: list[State] = [{n: t - base[n] for n, t in one.items()} for one in experts]
    for name in order.split():
        vectors = trimmed(vectors, 0.3) if name == "ties" else freed(vectors, Awd(steps=40))
    expected = {n: t + 0.6 * sum(one[n] for one in vectors) for n, t in base.items()}
    chain = [TIES if name == "ties" else AWD for name in order.split()]
    got = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.6}, preprocess=chain)
    # fp64, but Gram matrices of blocks are summed in another order, and 40 steps of the solver carry that on
    close(got, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ABLE)
@pytest.mark.parametrize("chain", [[TIES, AWD], [AWD, TIES]], ids=["ties-awd", "awd-ties"])
def test_it_is_the_merge_of_models_that_hold_the_changed_vectors(method: str, chain: list[Any]) -> None:
    base, experts = models(dtype=torch.float64)
    alone = {"scale": 1.0}
    changed = [
        spolia.merge(
            experts,
            base=base,
            method="task_arithmetic",
            settings=alone | {"weight": tuple(float(k == i) for i in range(3))},
            preprocess=chain,
        )
        for k in range(3)
    ]
    call: dict[str, Any] = {"base": base, "method": method, "settings": FAST.get(method), "seed": 3}
    got = spolia.merge(experts, preprocess=chain, **call)
    expected = spolia.merge(changed, **call)
    close(got, expected, 1e-9)  # (base + v) - base is v but for the last digits of fp64
    plain = spolia.merge(experts, **call)
    assert any(not torch.allclose(got[n], plain[n], atol=1e-4) for n in base)


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    base, experts = models()
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"m{i}", state, {"model_type": "x"}) for i, state in enumerate([base, *experts])]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_streamed_is_in_memory_bit_for_bit_with_any_number_of_threads(
    chain: list[Any], folders: list[Path], tmp_path: Path
) -> None:
    base, *experts = folders
    for method in ("task_arithmetic", "dare", "pcb"):
        call: dict[str, Any] = {"base": base, "method": method, "preprocess": chain, "seed": 1}
        first = spolia.merge(experts, threads=1, **call)
        for threads, memory in ((1, 10**9), (3, 10**9), (2, 24_000_000)):
            out = tmp_path / f"{method}-{threads}-{memory}"
            spolia.merge(experts, out=out, threads=threads, chunk_memory=memory, **call)
            assert all(torch.equal(t, first[n]) for n, t in read_tensors(out).items())


@pytest.mark.slow
def test_shared_work_gives_the_same_bits(folders: list[Path], tmp_path: Path) -> None:
    base, *experts = folders
    call: dict[str, Any] = {"base": base, "method": "ties", "preprocess": CHAINS[4]}
    shared = read_tensors(spolia.merge(experts, out=tmp_path / "shared", share=True, **call))
    alone = spolia.merge(experts, **call)
    assert all(torch.equal(t, shared[n]) for n, t in alone.items())


@pytest.mark.slow
def test_another_chain_is_another_merge(folders: list[Path], tmp_path: Path) -> None:
    base, *experts = folders
    for chain in CHAINS:
        out = spolia.merge(experts, base=base, method="magmax", preprocess=chain, out=tmp_path / "out", overwrite=True)
        expected = spolia.merge(experts, base=base, method="magmax", preprocess=chain)
        assert all(torch.equal(t, expected[n]) for n, t in read_tensors(out).items())
    assert '"preprocess"' in (tmp_path / "out" / "spolia.json").read_text()
    assert "the task vectors went through ties and awd and ties first" in (tmp_path / "out" / "README.md").read_text()


def test_whole_rows_count_in_the_memory() -> None:
    state = {"w": torch.zeros(2, 4 * BLOCK)}
    pool = ExpertPool.of([state, state], state)
    aligned, _ = align(pool, Problems())
    plain, _ = bytes_needed(aligned, 2, lambda name: MergeSettings())
    rows = asked_steps(["awd"], find("task_arithmetic"), 2)
    assert bytes_needed(aligned, 2, lambda name: MergeSettings(), rows)[0] > 2 * plain
    assert bytes_needed(aligned, 2, lambda name: MergeSettings(), asked_steps(["ties"], find("ties"), 2))[0] == plain


# --- learned coefficients --------------------------------------------------------------------------------------------


class Toy:
    """Two experts on a linear network, and their inputs."""

    def __init__(self) -> None:
        noise = torch.Generator().manual_seed(0)
        module = nn.Linear(6, 4)
        self.base = {n: torch.randn(t.shape, generator=noise) for n, t in module.state_dict().items()}
        self.experts = {
            task: {n: t + 0.4 * torch.randn(t.shape, generator=noise) for n, t in self.base.items()} for task in "ab"
        }
        self.network = spolia.Network(module)
        self.inputs = {task: torch.randn(40, 6, generator=noise) for task in "ab"}

    def learn(self, chain: list[Any] | None = None, **settings: Any) -> Any:
        chosen = {"steps": 4, "lr": 0.05, "batch": 8, "guard": "none", "held_out": 0.0, **settings}
        call: dict[str, Any] = {"network": self.network, "unlabelled": self.inputs, "settings": chosen}
        return spolia.merge(self.experts, base=self.base, method="adamerging", preprocess=chain, **call)


@pytest.mark.parametrize(
    ("chain", "setting", "same"),
    [
        ([{"name": "ties", "density": 0.5}], {}, {"preprocess": "ties", "density": 0.5}),
        (["awd"], {}, {"preprocess": "awd"}),
    ],
)
def test_the_setting_of_adamerging_is_the_same_step(chain: list[Any], setting: Any, same: Any) -> None:
    toy = Toy()
    first, second = toy.learn(chain, **setting), toy.learn(**same)
    assert all(torch.equal(t, second.weights[n]) for n, t in first.weights.items())
    assert first.coefficients == second.coefficients
    plain = toy.learn()
    assert any(not torch.equal(t, plain.weights[n]) for n, t in first.weights.items())


def test_the_settings_step_comes_after_the_chain() -> None:
    toy = Toy()
    first = toy.learn([{"name": "awd", "alpha": 0.3}], preprocess="ties", density=0.5)
    second = toy.learn([{"name": "awd", "alpha": 0.3}, {"name": "ties", "density": 0.5}])
    assert all(torch.equal(t, second.weights[n]) for n, t in first.weights.items())
    assert [step["name"] for step in first.facts["preprocess"]] == ["awd", "ties"]
    with pytest.raises(SpoliaError, match="changed by awd and ties"):
        spolia.recipe_of(first, toy.experts, toy.base)


def test_without_steps_learned_coefficients_are_the_sum_of_changed_vectors() -> None:
    toy, chain = Toy(), [{"name": "ties", "density": 0.5}, "awd"]
    still = toy.learn(chain, steps=0).weights
    summed = spolia.merge(toy.experts, base=toy.base, method="task_arithmetic", preprocess=chain)
    close(still, summed, 1e-6)  # both 0.3; fp32 sums in another order


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS if m.family == "merge" and m.name not in (*ABLE, "adamerging")]
)
def test_other_merges_are_refused_by_name(method: str) -> None:
    with pytest.raises(SpoliaError, match=f"{method} does not merge task vectors alone") as caught:
        spolia.merge([{}, {}], method=method, preprocess=["ties"])
    assert caught.value.problems[0].where == "preprocess" and "task_arithmetic" in caught.value.problems[0].mend


@pytest.mark.parametrize(
    ("given", "where", "what", "mend"),
    [
        ("ties", "preprocess", "a str is no list of steps", "[{name: ties, density: 0.2}, {name: awd}]"),
        ({"name": "ties"}, "preprocess", "a dict is no list of steps", "write a list"),
        (["tiess"], "preprocess[0]", "no preprocessing is called `tiess`", "did you mean `ties`?"),
        (["awd", {"name": "adw"}], "preprocess[1].name", "no preprocessing is called `adw`", "did you mean `awd`?"),
        ([{"density": 0.2}], "preprocess[0]", "`name` is missing", "one of ties, awd"),
        ([3], "preprocess[0]", "no preprocessing is called `3`", "known: ties, awd"),
        ([{"name": "ties", "densty": 0.2}], "preprocess[0].densty", "there is no `densty` here", "did you mean `density`?"),
        ([{"name": "ties", "weight": 2}], "preprocess[0].weight", "there is no `weight` here", "known: density"),
        ([{"name": "ties", "density": 1.2}], "preprocess[0].density", "must lie in 0..1", "0 to 1"),
        ([{"name": "ties", "density": [0.1, 0.2, 0.3]}], "preprocess[0].density", "3 values for 2 experts", "give 2 numbers"),
        ([{"name": "awd", "scale": 0.3}], "preprocess[0].scale", "there is no `scale` here", "known: granularity"),
        ([{"name": "awd", "granularity": "rows"}], "preprocess[0].granularity", "`rows` is not known here", "`row`?"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_and_cure(given: Any, where: str, what: str, mend: str) -> None:
    with pytest.raises(SpoliaError) as caught:
        spolia.merge([{}, {}], base={}, method="task_arithmetic", preprocess=given)
    problem = caught.value.problems[0]
    assert problem.where == where and what in problem.what and mend in problem.mend


def test_a_missing_base_is_told() -> None:
    _, experts = models()
    with pytest.raises(SpoliaError, match="needs the base model"):
        spolia.merge(experts, method="task_arithmetic", preprocess=["ties"])


def test_all_steps_are_checked_at_once() -> None:
    wrong = [{"name": "ties", "density": -1}, "sort", {"name": "awd", "steps": -1}]
    with pytest.raises(SpoliaError) as caught:
        spolia.merge([{}], base={}, preprocess=wrong, method="task_arithmetic")
    places = ["preprocess[0].density", "preprocess[1]", "preprocess[2].steps"]
    assert [problem.where for problem in caught.value.problems] == places

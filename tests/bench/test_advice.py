"""The advice on pools where the right answer is known: it names the bad expert, and what it suggests is better on test digits.

Three seeds draw three splits, bases and pools. A claim of "better" is a mean over seeds with a margin, and no seed against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pytest
import torch

import spolia
from spolia.bench.advice import Advice, advise
from spolia.bench.multitask import evaluate, mean_percent
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Journal
from spolia.errors import Problems
from spolia.parts.align import align
from spolia.parts.expert import ExpertPool
from spolia.parts.portrait import portray
from spolia.runs.digits_pool import make_pool

pytestmark = pytest.mark.slow
DOMAINS = ("upright", "turned", "inverted")
SEEDS = (0, 1, 2)
State = dict[str, torch.Tensor]


def advice_on(base: State, experts: Mapping[str, State]) -> Advice:
    pool, problems = ExpertPool.of(experts, base), Problems()
    aligned, _ = align(pool, problems)
    problems.raise_if_any()
    with pool.opened():
        return advise(portray(pool, aligned, 1, ranks=False))


def faults(advice: Advice) -> list[tuple[str, str]]:
    return [(finding.kind, finding.expert) for finding in advice.findings]


class Digits:
    """One seed's pool in memory."""

    def __init__(self, pool: Any):
        self.pool, self.base = pool, read_tensors(pool.base)
        self.experts = {domain: read_tensors(pool.expert(domain)) for domain in DOMAINS}

    def moved(self, domain: str, factor: float) -> State:
        return {n: start + factor * (self.experts[domain][n] - start) for n, start in self.base.items()}

    def score(self, experts: Mapping[str, State], method: str, **settings: Any) -> float:
        """Mean test accuracy over all domains, in per cent."""
        base = None if method == "average" else self.base
        merged = spolia.merge(experts, base=base, method=method, settings=settings)
        return mean_percent(evaluate(self.pool.outputs(merged), self.pool.tasks("test")))

    def follow(self, experts: Mapping[str, State], advice: Advice) -> float:
        assert advice.method is not None
        kept = {name: state for name, state in experts.items() if name not in advice.leave_out}
        return self.score(kept, advice.method, **advice.settings)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Digits]:
    folder = tmp_path_factory.mktemp("pools")
    return [Digits(make_pool(folder / str(seed), DOMAINS, seed, Journal())) for seed in SEEDS]


def gains(seeds: list[Digits], better: list[float], worse: list[float], margin: float) -> None:
    """Better in every seed, and by `margin` points on average."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    assert min(differences) > 0 and fmean(differences) >= margin, differences


def test_no_false_alarm_on_sound_pools(seeds):
    for one in seeds:
        for names in (DOMAINS, DOMAINS[:2], DOMAINS[1:]):
            advice = advice_on(one.base, {name: one.experts[name] for name in names})
            assert faults(advice) == [] and advice.leave_out == [] and advice.use_base


def test_suggested_method_beats_the_plain_average(seeds):
    better = [one.follow(one.experts, advice_on(one.base, one.experts)) for one in seeds]
    plain = [one.score(one.experts, "average") for one in seeds]
    gains(seeds, better, plain, 0.5)  # 1.1 points when the thresholds were set


def test_suggested_method_for_two_beats_their_average(seeds):
    better, plain = [], []
    for one in seeds:
        two = {name: one.experts[name] for name in DOMAINS[:2]}
        advice = advice_on(one.base, two)
        tasks = [task for task in one.pool.tasks("test") if task.name in two]
        for found, method in ((better, advice.method), (plain, "average")):
            merged = spolia.merge(two, base=one.base if method != "average" else None, method=method)
            found.append(mean_percent(evaluate(one.pool.outputs(merged), tasks)))
    gains(seeds, better, plain, 0.5)


def test_overscaled_expert_is_named_and_evened_out(seeds):
    advised, unweighted, averaged = [], [], []
    for one in seeds:
        experts = {**one.experts, "turned": one.moved("turned", 4.0)}
        advice = advice_on(one.base, experts)
        assert faults(advice) == [("overscaled", "turned")]
        assert advice.method == "task_arithmetic" and advice.leave_out == []
        assert advice.settings["weight"][0] == advice.settings["weight"][2] == 1.0
        assert 0.2 < advice.settings["weight"][1] < 0.3  # about 1 / 4: experts differ in length by a few per cent
        assert "turned" in advice.verdict
        advised.append(one.follow(experts, advice))
        unweighted.append(one.score(experts, "task_arithmetic", scale=advice.settings["scale"]))
        averaged.append(one.score(experts, "average"))
    gains(seeds, advised, unweighted, 3.0)
    gains(seeds, advised, averaged, 1.0)


def test_untrained_copy_of_the_base_is_left_out(seeds):
    for one in seeds:
        advice = advice_on(one.base, {**one.experts, "fresh": one.base})
        assert faults(advice) == [("untrained", "fresh")] and advice.leave_out == ["fresh"]


def test_barely_trained_expert_is_weak(seeds):
    for one in seeds:
        advice = advice_on(one.base, {**one.experts, "turned": one.moved("turned", 0.05)})
        assert faults(advice) == [("weak", "turned")] and advice.leave_out == []


def test_copies_are_left_out_and_that_pays(seeds):
    advised, with_copies = [], []
    for one in seeds:
        again = {name: tensor.clone() for name, tensor in one.experts["turned"].items()}
        experts = {**one.experts, "again": again, "once more": again, "rounded": rounded(again)}
        advice = advice_on(one.base, experts)
        assert faults(advice) == [("copy", "again"), ("copy", "once more"), ("copy", "rounded")]
        advised.append(one.follow(experts, advice))
        with_copies.append(one.score(experts, "task_arithmetic", scale=0.3))
    gains(seeds, advised, with_copies, 2.0)


def rounded(state: State) -> State:
    """As a float16 release of the same model reads."""
    return {name: tensor.half().float() for name, tensor in state.items()}


def test_a_stretched_copy_is_told_from_its_original(seeds):
    for one in seeds:
        experts = {"stretched": one.moved("turned", 2.0), **one.experts}
        assert faults(advice_on(one.base, experts)) == [("copy", "stretched")]


def test_stranger_is_left_out_and_that_pays(seeds):
    advised, with_stranger = [], []
    for one, other in zip(seeds, [*seeds[1:], seeds[0]], strict=True):
        experts = {**one.experts, "stranger": other.experts["turned"]}
        advice = advice_on(one.base, experts)
        assert faults(advice) == [("not_a_fine_tune", "stranger")] and advice.leave_out == ["stranger"]
        advised.append(one.follow(experts, advice))
        with_stranger.append(one.score(experts, "average"))
    gains(seeds, advised, with_stranger, 3.0)


def test_wrong_base_is_told_and_not_used(seeds):
    advised, misled = [], []
    for one, other in zip(seeds, [*seeds[1:], seeds[0]], strict=True):
        advice = advice_on(other.base, one.experts)
        assert faults(advice) == [("wrong_base", "")]
        assert advice.method == "average" and not advice.use_base and advice.leave_out == []
        assert "not the one" in advice.verdict
        advised.append(one.follow(one.experts, advice))
        usual = advice_on(one.base, one.experts).method  # what the right base would have led to
        merged = spolia.merge(one.experts, base=other.base, method=usual)
        misled.append(mean_percent(evaluate(one.pool.outputs(merged), one.pool.tasks("test"))))
    gains(seeds, advised, misled, 3.0)


def test_unrelated_models_are_no_wrong_base(seeds):
    advice = advice_on(seeds[0].base, {"a": seeds[1].experts["turned"], "b": seeds[2].experts["turned"]})
    assert faults(advice) == [("not_a_fine_tune", "a"), ("not_a_fine_tune", "b")]
    assert advice.method is None and "nothing to merge" in advice.verdict


def test_broken_expert_is_left_out(seeds):
    broken = {name: tensor.clone() for name, tensor in seeds[0].experts["turned"].items()}
    broken["layers.1.weight"][0, 0] = float("nan")
    advice = advice_on(seeds[0].base, {**seeds[0].experts, "broken": broken})
    assert faults(advice) == [("broken", "broken")] and advice.leave_out == ["broken"]


def test_experts_that_undo_each_other_are_told(seeds):
    one = seeds[0]
    advice = advice_on(one.base, {**one.experts, "undone": one.moved("turned", -1.0)})
    assert faults(advice) == [("opposed", "undone")]


def test_several_faults_at_once(seeds):
    one, other = seeds[:2]
    experts = {**one.experts, "fresh": one.base, "twin": one.experts["upright"], "stranger": other.experts["turned"]}
    experts["inverted"] = one.moved("inverted", 5.0)
    advice = advice_on(one.base, experts)
    assert set(faults(advice)) == {
        ("not_a_fine_tune", "stranger"), ("untrained", "fresh"), ("overscaled", "inverted"), ("copy", "twin"),
    }  # fmt: skip
    assert advice.leave_out == ["fresh", "twin", "stranger"]
    assert len(advice.settings["weight"]) == 3


@pytest.mark.parametrize(("length", "told"), [(0.15, []), (0.2, [("far", "")])])
def test_experts_that_go_far_each_its_own_way_are_told(length: float, told: list[tuple[str, str]]):
    """Four unrelated changes of 0.2 of the base's length lie 0.4 apart from it; 0.15 gives 0.3. The threshold is a third."""
    base = {"w": torch.eye(64)}
    noise = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    experts = {str(i): {"w": base["w"] + length * 8 * n / n.norm()} for i, n in enumerate(noise)}
    assert faults(advice_on(base, experts)) == told
    alike = {
        k: {"w": base["w"] + length * 8 * (noise[0] + 0.3 * n) / noise[0].norm()}
        for k, n in zip("abcd", noise, strict=True)
    }
    assert ("far", "") not in faults(advice_on(base, alike))  # they agree: their average goes as far as each

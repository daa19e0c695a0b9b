"""Models that do not fit are told apart by name, tensor and shape; those that fit line up, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spolia
from spolia.errors import Problems
from spolia.parts.align import Aligned, align
from spolia.parts.expert import Expert, ExpertPool, MemoryWeights

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
State = dict[str, torch.Tensor]


def model(name: str, tensors: State, config: dict[str, Any] | None = None) -> Expert:
    weights = MemoryWeights(tensors)
    weights.config = config
    return Expert(name, weights)


def lined_up(
    base: Expert | None, *experts: Expert, **options: Any
) -> tuple[dict[str, Aligned], dict[str, str], Problems]:
    problems = Problems()
    aligned, tied = align(ExpertPool(list(experts), base), problems, **options)
    return {t.name: t for t in aligned}, tied, problems


def layers(count: int, **extra: torch.Tensor) -> State:
    return {f"layers.{i}.{part}": torch.ones(2) for i in range(count) for part in ("q", "k", "v", "o", "up")} | extra


def told(problems: Problems) -> str:
    assert all(problem.where and problem.mend for problem in problems.errors)
    return "\n".join(map(str, problems.errors))


def test_equal_models_line_up_in_natural_order() -> None:
    base = model("base", {"w.10": torch.ones(2), "w.2": torch.ones(3, 2, dtype=torch.bfloat16), "n": torch.tensor(3)})
    a = model("a", {"n": torch.tensor(4), "w.2": torch.ones(3, 2), "w.10": torch.ones(2)})
    found, tied, problems = lined_up(base, a, a)
    assert list(found) == ["n", "w.2", "w.10"] and not tied and not problems.errors
    assert found["w.2"] == Aligned(
        "w.2", (3, 2), found["w.2"].stored, (0, "w.2"), ((1, "w.2"), (2, "w.2")), (0, 1), True
    )
    assert found["w.2"].stored.torch_name == "bfloat16" and found["w.2"].numel == 6  # the base's type
    assert not found["n"].arithmetic


@pytest.mark.parametrize("lacks", ["base", "a", "b"])
def test_a_missing_tensor_is_told_with_its_model(lacks: str) -> None:
    full = {"w": torch.ones(2), "v": torch.ones(2)}
    states = {name: {"w": torch.ones(2)} if name == lacks else full for name in ("base", "a", "b")}
    found, _, problems = lined_up(*[model(name, state) for name, state in states.items()])
    assert told(problems).startswith(f"{lacks}: lacks tensor `v`") and list(found) == ["w"]
    assert len(problems.errors) == 1


@pytest.mark.parametrize(("deep", "flat"), [("base", "a"), ("a", "base")])
def test_other_depths_are_one_line(deep: str, flat: str) -> None:
    counts = {deep: 40, flat: 38}
    both = {n: model(n, layers(counts[n]), {"num_hidden_layers": counts[n]}) for n in ("base", "a")}
    problems = lined_up(both["base"], both["a"])[2]
    text = told(problems)
    assert len(problems.errors) == 1 and len(text.splitlines()) <= 2 and len(text) < 400
    assert all(word in text for word in (f"{flat}: lacks 10 tensors", deep, "layers.38.k", "40", "38"))


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_other_architectures_are_told(key: str) -> None:
    kinds = (
        {key: ["llama"] if key == "architectures" else "llama"},
        {key: ["bert"] if key == "architectures" else "bert"},
    )
    made = [model(name, {"w": torch.ones(2)}, kind) for name, kind in zip("ab", kinds, strict=True)]
    text = told(lined_up(None, *made)[2])
    assert "b: is a bert model, a a llama" in text and "one architecture" in text
    assert not lined_up(None, made[0], model("c", {"w": torch.ones(2)}, None))[2].errors  # unknown is no quarrel


@pytest.mark.parametrize(
    ("shapes", "cure"),
    [
        (((2, 3), (2, 3), (3, 2)), "fine-tunes of one base"),
        (((4,), (4, 1), (4,)), "fine-tunes"),
        (((), (1,), ()), "fine-tunes"),
    ],
)
def test_other_shapes_name_both_models(shapes: tuple[tuple[int, ...], ...], cure: str) -> None:
    names = ("base", "a", "b")
    problems = lined_up(*[model(n, {"w": torch.ones(s)}) for n, s in zip(names, shapes, strict=True)])[2]
    odd = next(i for i in range(3) if shapes[i] != shapes[0])
    assert f"w: is {list(shapes[0])} in base but {list(shapes[odd])} in {names[odd]}" in told(problems)
    assert cure in told(problems) and len(problems.errors) == 1


@pytest.mark.parametrize("name", [EMBED, "transformer.wte.weight", HEAD])
def test_other_vocabularies_have_a_cure_and_can_be_cut(name: str) -> None:
    base, a = model("base", {name: torch.ones(10, 4)}), model("a", {name: torch.ones(8, 4)})
    assert "vocabular" in told(lined_up(base, a)[2]) and "truncate" in told(lined_up(base, a)[2])
    found, _, problems = lined_up(base, a, on_size_mismatch="truncate")
    assert found[name].shape == (8, 4) and not problems.errors
    assert any(name in str(w) and "8" in str(w) for w in problems.warnings)


def test_only_vocabularies_are_cut() -> None:
    made = [model(n, {"mlp.up.weight": torch.ones(rows, 4)}) for n, rows in (("a", 10), ("b", 8))]
    assert "mlp.up.weight" in told(lined_up(None, *made, on_size_mismatch="truncate")[2])


def test_numbers_and_integers_do_not_mix() -> None:
    made = [model("a", {"w": torch.ones(2)}), model("b", {"w": torch.ones(2, dtype=torch.int64)})]
    text = told(lined_up(None, *made)[2])
    assert "w: " in text and "a float32" in text and "b int64" in text


@pytest.mark.parametrize("who", ["base", "a", "b", "a b"])
@pytest.mark.parametrize("name", ["l.rotary_emb.inv_freq", "position_ids", "h.0.attn.bias", "bn.num_batches_tracked"])
@pytest.mark.parametrize("integer", [False, True])
def test_optional_buffers_are_lent_by_whoever_has_them(who: str, name: str, integer: bool) -> None:
    value = torch.arange(3) if integer else torch.ones(3)
    made = [model(n, {"w": torch.ones(2)} | ({name: value} if n in who.split() else {})) for n in ("base", "a", "b")]
    found, _, problems = lined_up(*made)
    assert not problems.errors and set(found) == {"w", name} and not found[name].arithmetic
    for method in ("task_arithmetic", "ties", "dare_ties", "average"):  # none may stumble over it
        states = {m.name: m.weights for m in made}
        merged = spolia.merge([states["a"], states["b"]], base=states["base"], method=method)
        if method != "average" or who != "base":  # average leaves the base aside
            assert torch.equal(merged[name], value)


def test_per_model_settings_meet_a_tensor_only_the_base_has() -> None:
    base = {"a.attn.bias": torch.ones(3), "w": torch.zeros(4)}
    for method in ("ties", "breadcrumbs", "dare"):
        found = spolia.merge([{"w": torch.ones(4)}] * 2, base=base, method=method, settings={"density": (0.5, 1.0)})
        assert set(found) == set(base)


# --- tied weights ----------------------------------------------------------------------------------------------------

TIED, LOOSE = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def with_head(seed: int, shared: bool) -> State:
    noise = torch.Generator().manual_seed(seed)
    embed = torch.randn(6, 2, generator=noise)
    return {
        EMBED: embed,
        HEAD: embed if shared else torch.randn(6, 2, generator=noise),
        "w": torch.randn(2, generator=noise),
    }


def test_shared_memory_is_merged_once_and_stays_shared() -> None:
    states = [with_head(i, shared=True) for i in range(3)]
    found, tied, problems = lined_up(model("base", states[0]), *[model(str(i), s) for i, s in enumerate(states[1:])])
    assert tied == {HEAD: EMBED} and HEAD not in found and not problems.errors
    merged = spolia.merge(states[1:], base=states[0], method="dare")
    assert list(merged) == list(states[0]) and merged[HEAD].data_ptr() == merged[EMBED].data_ptr()


@pytest.mark.parametrize("loose", [0, 1, 2])
def test_memory_tied_in_some_is_merged_twice(loose: int) -> None:
    states = [with_head(i, shared=i != loose) for i in range(3)]
    merged = spolia.merge(states, method="average")
    for name in (EMBED, HEAD):
        # fp32 sums of three numbers near one: a few units in the last place.
        torch.testing.assert_close(merged[name], sum(s[name] for s in states) / 3, rtol=1e-6, atol=1e-6)


def test_config_tied_with_both_stored_is_merged_once() -> None:
    made = [model(str(i), with_head(i, shared=False) | {HEAD: with_head(i, False)[EMBED]}, TIED) for i in range(3)]
    found, tied, problems = lined_up(made[0], *made[1:])
    assert tied == {HEAD: EMBED} and HEAD not in found and not problems.errors


@pytest.mark.parametrize("stores", [0, 1, 2])
def test_a_head_that_only_some_store_is_merged_once(stores: int) -> None:
    """All configs tie: the stored copy says nothing new, so it must not draw coins or thresholds of its own."""
    states = [with_head(i, shared=True) for i in range(3)]
    for i, state in enumerate(states):
        if i != stores:
            del state[HEAD]
    found, _, problems = lined_up(*[model(str(i), s, TIED) for i, s in enumerate(states)])
    assert not problems.errors and HEAD not in found


def test_a_tied_donor_does_not_swallow_a_head_of_its_own() -> None:
    """The base ties, one expert was trained with a head apart: dropping that head silently would lose it."""
    base, expert = with_head(0, shared=True), with_head(1, shared=False)
    found, _, problems = lined_up(model("base", base, TIED), model("expert", expert, LOOSE))
    assert HEAD in found or HEAD in "".join(map(str, problems.errors + problems.warnings))


def test_an_untied_model_without_its_head_is_told() -> None:
    state = with_head(1, shared=False)
    del state[HEAD]
    problems = lined_up(model("base", with_head(0, False), LOOSE), model("expert", state, LOOSE))[2]
    assert HEAD in "".join(map(str, problems.errors + problems.warnings))

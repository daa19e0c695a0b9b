"""LoRA on a base, against the dense sum in fp64: every option of the config, every block, every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spolia
from spolia.core.checkpoint import BY_TORCH_NAME, Checkpoint
from spolia.core.stream import BLOCK, TensorPlane
from spolia.errors import SpoliaError
from spolia.parts.adapter import Adapter
from spolia.parts.expert import ExpertPool, FileWeights, MemoryWeights
from spolia.parts.inputs import Inputs
from spolia.parts.lora import LoraPlane, LoraWeights

pytestmark = pytest.mark.sampled(3)  # of many cases alike

Write = Callable[..., Path]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * math.prod(shape))).to(dtype)


def pair(module: str, out: int, inner: int, r: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": rand(r, inner, seed=seed),
        f"{module}.lora_B.weight": rand(out, r, seed=seed + 1),
    }


def delta(tensors: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    """scale * B A in fp64."""
    a, b = tensors[f"{module}.lora_A.weight"].double(), tensors[f"{module}.lora_B.weight"].double()
    return scale * (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def lora(base: dict[str, torch.Tensor], folder: Path) -> LoraWeights:
    return LoraWeights(MemoryWeights(base), Adapter.open(folder))


def read(weights: LoraWeights, name: str) -> torch.Tensor:
    entry = weights.entries[name]
    out = torch.empty(entry.numel, dtype=torch.float64 if entry.dtype.code == "F64" else torch.float32)
    with weights.opened():
        weights.plane(name, "m").read(0, entry.numel, out)
    return out.reshape(entry.shape)


def refused(base: dict[str, torch.Tensor], folder: Path, *words: str) -> str:
    with pytest.raises(SpoliaError) as caught:
        lora(base, folder)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert all(problem.mend and problem.where for problem in caught.value.problems)
    return text


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_a_tensor_is_base_plus_scaled_product(name: str, tmp_path: Path, write_adapter: Write) -> None:
    base = {"a.weight": rand(5, 7, dtype=getattr(torch, name)), "n.weight": rand(7)}
    tensors = pair("a", 5, 7)
    weights = lora(base, write_adapter(tmp_path / "l", tensors, lora_alpha=3))
    dense = base["a.weight"].double() + delta(tensors, "a", 1.5)
    found = read(weights, "a.weight")
    # One rounding of the fp64 sum; in fp64 the order of two terms may differ in the last bit.
    assert (
        torch.equal(found, dense.float()) if name != "float64" else torch.allclose(found, dense, rtol=1e-15, atol=1e-15)
    )
    assert weights.entries["a.weight"].dtype.torch_name == name
    assert torch.equal(read(weights, "n.weight"), base["n.weight"])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 1}, 0.5),
        ({"lora_alpha": 3.5}, 1.75),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"r": 8, "rank_pattern": {"q": 2}}, 2.0),
        ({"r": 8, "rank_pattern": {"layers.0.q": 2}, "alpha_pattern": {"layers.0.q": 6}}, 3.0),
        ({"alpha_pattern": {r"layers\.\d+\.q": 8}}, 4.0),
        ({"alpha_pattern": {"layers.[0-9]+.(q|k)": 8}}, 4.0),
        ({"alpha_pattern": {"model.layers.0.q": 10}}, 5.0),
        ({"alpha_pattern": {"ers.0.q": 10}}, 2.0),  # not at a dot: another module
        ({"alpha_pattern": {"k": 10, "layers.1.q": 12}}, 2.0),
        ({"alpha_pattern": {"q": 6, "layers.0.q": 10}}, 3.0),  # the first that fits counts
        ({"r": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3}, "use_rslora": True}, 3 / math.sqrt(2)),
    ],
)
def test_scale_follows_the_config(config: dict, scale: float, tmp_path: Path, write_adapter: Write) -> None:
    base, tensors = {"model.layers.0.q.weight": rand(4, 3)}, pair("model.layers.0.q", 4, 3)
    weights = lora(base, write_adapter(tmp_path / "l", tensors, **config))
    dense = base["model.layers.0.q.weight"].double() + delta(tensors, "model.layers.0.q", scale)
    assert torch.equal(read(weights, "model.layers.0.q.weight"), dense.float())


def test_conv1d_lies_the_other_way(tmp_path: Path, write_adapter: Write) -> None:
    """GPT-2's c_attn is [in, out]; the square c_proj is turned by the config alone."""
    base = {"h.0.c_attn.weight": rand(4, 12), "h.0.c_proj.weight": rand(4, 4, seed=5)}
    tensors = pair("h.0.c_attn", 12, 4) | pair("h.0.c_proj", 4, 4, seed=9)
    weights = lora(base, write_adapter(tmp_path / "l", tensors, fan_in_fan_out=True))
    for module in ("h.0.c_attn", "h.0.c_proj"):
        dense = base[f"{module}.weight"].double() + delta(tensors, module, 2.0).t()
        assert torch.equal(read(weights, f"{module}.weight"), dense.float())


def test_a_square_matrix_beside_a_contradiction_is_refused(tmp_path: Path, write_adapter: Write) -> None:
    base = {"a.weight": rand(4, 12), "b.weight": rand(4, 4)}
    folder = write_adapter(tmp_path / "l", pair("a", 12, 4) | pair("b", 4, 4))
    refused(base, folder, "fan_in_fan_out", "`a`", "`b`")
    assert lora({"a.weight": base["a.weight"]}, write_adapter(tmp_path / "m", pair("a", 12, 4))).changes


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel: int, tmp_path: Path, write_adapter: Write) -> None:
    base = {"c.weight": rand(6, 5, kernel, kernel)}
    a, b = rand(2, 5, kernel, kernel, seed=3), rand(6, 2, 1, 1, seed=4)
    weights = lora(base, write_adapter(tmp_path / "l", {"c.lora_A.weight": a, "c.lora_B.weight": b}))
    # What two convolutions after one another do: A, then the 1 x 1 of B.
    moved = torch.einsum("or,rihw->oihw", b.double().flatten(1), a.double())
    found, dense = read(weights, "c.weight"), (base["c.weight"].double() + 2 * moved).float()
    assert torch.equal(found, dense)


def test_embeddings(tmp_path: Path, write_adapter: Write) -> None:
    base = {"embed.weight": rand(9, 4)}
    a, b = rand(2, 9, seed=3), rand(4, 2, seed=4)
    folder = write_adapter(tmp_path / "l", {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b})
    dense = base["embed.weight"].double() + 2 * (b.double() @ a.double()).t()
    assert torch.equal(read(lora(base, folder), "embed.weight"), dense.float())


def test_modules_to_save_biases_and_wrapped_names(tmp_path: Path, write_adapter: Write) -> None:
    base = {
        "a.weight": rand(4, 3), "a.bias": rand(4), "score.weight": rand(2, 4), "e.weight": rand(5, 3), "b.bias": rand(3),
    }  # fmt: skip
    tensors = pair("a", 4, 3) | {
        "a.lora_B.bias": rand(4, seed=8),
        "score.weight": rand(2, 4, seed=9, dtype=torch.float16),
        "e.base_layer.weight": rand(5, 3, seed=10),
        "e.lora_embedding_A": rand(2, 5, seed=11),
        "e.lora_embedding_B": rand(3, 2, seed=12),
        "b.modules_to_save.default.bias": rand(3, seed=13),
        "b.original_module.bias": rand(3, seed=14),
    }
    weights = lora(base, write_adapter(tmp_path / "l", tensors, modules_to_save=["score"], bias="all"))
    assert torch.equal(
        read(weights, "a.bias"), (base["a.bias"].double() + 2 * tensors["a.lora_B.bias"].double()).float()
    )
    assert torch.equal(read(weights, "score.weight"), tensors["score.weight"].float())
    assert weights.entries["score.weight"].dtype.code == "F32"
    product = tensors["e.lora_embedding_B"].double() @ tensors["e.lora_embedding_A"].double()
    assert torch.equal(read(weights, "e.weight"), (tensors["e.base_layer.weight"].double() + 2 * product.t()).float())
    assert torch.equal(read(weights, "b.bias"), tensors["b.modules_to_save.default.bias"])


@pytest.mark.parametrize(
    ("stored", "spelled"),
    [
        ("h.0.q", "transformer.h.0.q"),
        ("transformer.h.0.q", "h.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("model.layers.0.q", "model.language_model.layers.0.q"),
        ("visual.blocks.0.q", "model.visual.blocks.0.q"),
        ("language_model.lm_head", "lm_head"),
    ],
)
def test_spellings_of_one_model_meet(stored: str, spelled: str, tmp_path: Path, write_adapter: Write) -> None:
    base, tensors = {f"{stored}.weight": rand(4, 3), "other.weight": rand(4, 3)}, pair(spelled, 4, 3)
    weights = lora(base, write_adapter(tmp_path / "l", tensors))
    assert list(weights.changes) == [f"{stored}.weight"]
    assert torch.equal(
        read(weights, f"{stored}.weight"), (base[f"{stored}.weight"].double() + delta(tensors, spelled, 2)).float()
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_block_of_any_shape_is_the_dense_block(data: st.DataObject) -> None:
    """Element for element, whatever is read in whichever order: tiles lie fast."""
    draw = data.draw
    columns = draw(st.sampled_from([1, 2, 7, 1000, BLOCK - 1, BLOCK, BLOCK + 3, 2 * BLOCK + 1]))
    rows = draw(st.integers(1, max(1, 200_000 // columns)))
    left, right = rand(rows, r := draw(st.integers(1, 5)), seed=1).double(), rand(r, columns, seed=2).double()
    start = rand(rows, columns, seed=3)
    plane = TensorPlane("m", BY_TORCH_NAME["float32"], start.reshape(-1))
    # fp64 sums of five products may differ in the last bit by their order; rounded to fp32 that is not seen here.
    dense = (start.double() + (left @ right) * 0.75).float().reshape(-1)
    n = rows * columns
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})
    spans = draw(st.permutations(list(pairwise(cuts))))
    reader = LoraPlane("m", plane.dtype, plane, left, right, 0.75)
    for low, high in spans:
        out = torch.empty(high - low)
        reader.read(low, high, out)
        assert torch.equal(out, dense[low:high])


def test_nothing_else_is_touched_and_the_base_is_shared(
    tmp_path: Path, write_model: Write, write_adapter: Write
) -> None:
    base = write_model(tmp_path / "base", {"a.weight": rand(4, 3), "n": torch.arange(3)}, {"model_type": "x"})
    first = write_adapter(tmp_path / "one", pair("a", 4, 3))
    pool = ExpertPool.of([first, f"{base}+{write_adapter(tmp_path / 'two', pair('a', 4, 3, seed=5))}"], base=base)
    assert [m.name for m in pool.models] == ["base", "one", "two"]
    assert isinstance(pool.base.weights, FileWeights) and all(e.weights.base is pool.base.weights for e in pool.experts)
    assert pool.experts[0].weights.config == {"model_type": "x"}
    with pool.opened():
        out = torch.empty(3, dtype=torch.int64)
        pool.experts[0].weights.plane("n", "m").read(0, 3, out)
        assert out.tolist() == [0, 1, 2]
    assert not pool.base.weights._fds


def test_where_the_base_comes_from(tmp_path: Path, write_model: Write, write_adapter: Write, monkeypatch) -> None:
    named = write_model(tmp_path / "named", {"a.weight": rand(4, 3)})
    given = {"a.weight": rand(4, 3, seed=99)}
    tensors = pair("a", 4, 3)
    folder = write_adapter(tmp_path / "l", tensors, base_model_name_or_path=str(named))
    change = delta(tensors, "a", 2.0)
    alone = ExpertPool.of([folder]).experts[0].weights
    assert torch.equal(read(alone, "a.weight"), (rand(4, 3).double() + change).float())
    pooled = ExpertPool.of([folder], base=given).experts[0].weights  # the pool's base comes before the config's
    assert torch.equal(read(pooled, "a.weight"), (given["a.weight"].double() + change).float())
    monkeypatch.chdir(tmp_path)
    relative = write_adapter(tmp_path / "r", tensors, base_model_name_or_path="named")
    assert torch.equal(read(ExpertPool.of([relative]).experts[0].weights, "a.weight"), read(alone, "a.weight"))
    for config, word in (({}, "names none"), ({"base_model_name_or_path": "org/gone"}, "org/gone")):
        lost = write_adapter(tmp_path / "lost", tensors, **config)
        with pytest.raises(SpoliaError, match=r"base is not known") as caught:
            ExpertPool.of([lost])
        assert word in str(caught.value) and "BASE+ADAPTER" in str(caught.value)
    loop = write_adapter(tmp_path / "loop", tensors, base_model_name_or_path=str(tmp_path / "loop"))
    for call in (lambda: ExpertPool.of([loop]), lambda: Inputs().open(loop, loop)):
        with pytest.raises(SpoliaError, match="adapter"):
            call()


def test_an_existing_path_with_a_plus_is_a_path(tmp_path: Path, write_model: Write) -> None:
    folder = write_model(tmp_path / "a+b", {"w": torch.ones(2)})
    assert isinstance(ExpertPool.of([str(folder)]).experts[0].weights, FileWeights)


def test_pickled_adapters(tmp_path: Path, write_adapter: Write) -> None:
    base, tensors = {"a.weight": rand(4, 3)}, pair("a", 4, 3)
    weights = lora(base, write_adapter(tmp_path / "l", tensors, pickled=True))
    assert torch.equal(read(weights, "a.weight"), (base["a.weight"].double() + delta(tensors, "a", 2.0)).float())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, ["IA3", "merge_and_unload"]),
        ({"peft_type": "PROMPT_TUNING"}, ["PROMPT_TUNING"]),
        ({"peft_type": "LOHA"}, ["LOHA"]),
        ({"peft_type": None}, ["what kind"]),
        ({"use_dora": True}, ["DoRA", "merge_and_unload"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"target_parameters": ["experts"]}, ["target_parameters"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"alora_invocation_tokens": [1]}, ["aLoRA"]),
        ({"use_qalora": True}, ["QALoRA"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["pissa_niter_16", "path_initial_model"]),
        ({"init_lora_weights": "olora"}, ["olora"]),
        ({"r": 3}, ["rank 3", "[2, 3]", "a.lora_A.weight"]),
        ({"r": None}, ["rank", "`a`"]),
        ({"r": True}, ["rank"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"rank_pattern": [1]}, ["rank_pattern"]),
        ({"rank_pattern": {"(": 2}}, ["rank_pattern", "'(' is not read"]),
        ({"alpha_pattern": {"(a+)+$": 2}}, ["alpha_pattern", "repeated groups"]),
    ],
)
def test_adapters_that_are_not_read(config: dict, words: list[str], tmp_path: Path, write_adapter: Write) -> None:
    refused({"a.weight": rand(4, 3)}, write_adapter(tmp_path / "l", pair("a", 4, 3), **config), *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (pair("b", 4, 3), ["b.lora_A.weight", "`b.weight`"]),
        (pair("a", 5, 3), ["`a.weight` [4, 3]", "[5, 2]", "[2, 3]"]),
        (pair("a", 4, 2), ["`a.weight` [4, 3]", "[2, 2]"]),
        (pair("n", 4, 3), ["n.lora_A.weight", "whole numbers"]),
        ({"a.lora_A.weight": torch.ones(2, 3)}, ["only lora_A"]),
        (pair("a", 4, 3) | {"a.lora_magnitude_vector": torch.ones(4)}, ["DoRA"]),
        (pair("a", 4, 3) | {"a.lora_magnitude_vector.weight": torch.ones(4)}, ["DoRA"]),
        (pair("a", 4, 3) | {"a.token_adapter.trainable_tokens_delta": torch.ones(4)}, ["no kind of adapter"]),
        (pair("a", 4, 3) | {"score.weight": torch.ones(2, 4)}, ["score.weight", "no tensor"]),
        ({"a.weight": torch.ones(6, 3)}, ["[6, 3]", "`a.weight`", "[4, 3]", "vocabulary"]),
        ({"a.lora_B.bias": torch.ones(4)}, ["without factors"]),
        (pair("a", 4, 3) | {"a.lora_B.bias": torch.ones(4)}, ["`a.bias`"]),
        (
            {"a.lora_A.weight": torch.ones(2, 3, dtype=torch.int8), "a.lora_B.weight": torch.ones(4, 2)},
            ["whole numbers"],
        ),
        ({}, ["holds no tensors"]),
        (pair("a", 4, 3) | pair("model.a", 4, 3), ["both fall on `a.weight`"]),
    ],
)
def test_tensors_that_find_no_place(tensors: dict, words: list[str], tmp_path: Path, write_adapter: Write) -> None:
    base = {"a.weight": rand(4, 3), "n.weight": torch.ones(4, 3, dtype=torch.int32)}
    refused(base, write_adapter(tmp_path / "l", tensors), *words)


def test_all_misfits_are_told_at_once(tmp_path: Path, write_adapter: Write) -> None:
    tensors = pair("a", 5, 3) | pair("b", 4, 3) | {"score.weight": torch.ones(1)}
    with pytest.raises(SpoliaError) as caught:
        lora({"a.weight": rand(4, 3)}, write_adapter(tmp_path / "l", tensors))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("damage", ["config gone", "config torn", "config list", "weights gone", "weights torn"])
def test_damaged_folders_are_refused(damage: str, tmp_path: Path, write_adapter: Write) -> None:
    folder = write_adapter(tmp_path / "l", pair("a", 4, 3))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if damage == "config gone":
        config.unlink()
    elif damage == "config torn":
        config.write_bytes(config.read_bytes()[:20])
    elif damage == "config list":
        config.write_text("[1]")
    elif damage == "weights gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-4])
    refused({"a.weight": rand(4, 3)}, folder, "adapter_")
    with pytest.raises(SpoliaError, match="adapter"):
        Checkpoint.open(folder)


def test_a_head_that_is_the_embedding(tmp_path: Path, write_model: Write, write_adapter: Write) -> None:
    tensors = {"model.embed_tokens.weight": rand(6, 4)}
    base = FileWeights.open(write_model(tmp_path / "b", tensors, {"tie_word_embeddings": True}))
    with pytest.raises(SpoliaError, match="ties its head"):
        LoraWeights(base, Adapter.open(write_adapter(tmp_path / "l", pair("lm_head", 6, 4))))
    change = {"model.embed_tokens.lora_embedding_A": rand(2, 6), "model.embed_tokens.lora_embedding_B": rand(4, 2)}
    weights = LoraWeights(base, Adapter.open(write_adapter(tmp_path / "e", change)))
    assert "merge_and_unload" in weights.checkpoint.notes[0]


def test_an_adapter_that_changes_meanwhile_is_refused(tmp_path: Path, write_model: Write, write_adapter: Write) -> None:
    base = write_model(tmp_path / "b", {"a.weight": rand(4, 3)})
    weights = Inputs().open(base, write_adapter(tmp_path / "l", pair("a", 4, 3)))
    write_adapter(tmp_path / "l", pair("a", 4, 3) | pair("c", 4, 3))
    with pytest.raises(SpoliaError, match="changed while"), weights.opened():
        pass


def test_in_memory_merges_take_adapters(tmp_path: Path, write_adapter: Write) -> None:
    base = torch.nn.Linear(3, 4)
    one, two = pair("", 4, 3, seed=1), pair("", 4, 3, seed=7)
    one, two = ({k.removeprefix("."): v for k, v in t.items()} for t in (one, two))
    folders = [
        write_adapter(tmp_path / n, {f"layer.{k}": v for k, v in t.items()}) for n, t in (("one", one), ("two", two))
    ]
    state = {"layer.weight": base.weight, "layer.bias": base.bias}
    merged = spolia.merge(folders, base=state, method="task_arithmetic", settings={"scale": 1.0})
    total = sum(2 * t["lora_B.weight"].double() @ t["lora_A.weight"].double() for t in (one, two))
    # Task vectors are formed in fp32: an ulp of the experts, twice.
    assert torch.allclose(merged["layer.weight"].double(), base.weight.detach().double() + total, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["layer.bias"], base.bias)

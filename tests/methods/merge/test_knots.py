"""KnOTS against an explicit dense one, the cases in which it becomes simpler merges, and adapters by their factors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError
from spolia.methods.merge.knots import Knots, merged_pair
from spolia.parts.adapter import Adapter
from spolia.parts.lora import whole

Write = Callable[..., Path]
CLOSE = {"rtol": 0, "atol": 1e-11}  # fp64 with norms of some tens
STORED = {"rtol": 0, "atol": 2e-5}  # factors, models or task vectors of size up to ten, stored in fp32


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(ranks: list[int], out: int = 10, into: int = 14, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    return [(draw(out, r), draw(r, into)) for r in ranks]


def by_factors(factors: list[tuple[torch.Tensor, torch.Tensor]], **given: Any) -> torch.Tensor:
    basis, mix = merged_pair(factors, Knots(**given), seed=given.pop("seed", 0))
    return basis @ mix


def merged(changes: list[torch.Tensor], **given: Any) -> torch.Tensor:
    """What the merge adds to a base of zeros, in the changes' type."""
    base = torch.zeros_like(changes[0])
    return spolia.merge([{"w": c} for c in changes], base={"w": base}, method="knots", settings=given)["w"]


def written_out(changes: list[torch.Tensor], density: float = 0.2, mean: bool = True) -> torch.Tensor:
    """KnOTS with TIES, by a dense SVD and by sorting."""
    u, s, v = torch.linalg.svd(torch.cat([c.double() for c in changes], dim=1), full_matrices=False)
    kept = s > 1e-5
    parts = (s[kept, None] * v[kept]).split(changes[0].shape[1], dim=1)
    cut = []
    for part in parts:
        flat = part.flatten()
        level = flat.abs().sort(descending=True)[0][round(density * flat.numel()) - 1]
        cut.append(torch.where(part.abs() >= level, part, 0.0))
    stack = torch.stack(cut)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    return u[:, kept] @ ((stack * agree).sum(0) / (agree.sum(0).clamp(min=1) if mean else 1))


lists = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(ranks=lists, shape=st.sampled_from([(10, 14), (14, 5), (6, 40)]), mean=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.slow
def test_ties_in_the_basis(ranks: list[int], shape: tuple[int, int], mean: bool, seed: int):
    factors = pairs(ranks, *shape, seed=seed)
    changes = [b @ a for b, a in factors]
    expected = written_out(changes, mean=mean)
    # the signs of singular vectors are free, and TIES does not see them: both flip the coordinates of all experts
    torch.testing.assert_close(by_factors(factors, scale=1.0, normalize=mean), expected, **CLOSE)
    torch.testing.assert_close(merged(changes, scale=1.0, normalize=mean), expected, **CLOSE)


def test_full_rank_and_the_official_setting():
    changes = [rand(9, 7, seed=k) for k in range(3)]
    torch.testing.assert_close(merged(changes), 0.6 * written_out(changes), **CLOSE)
    single = merged([c.float() for c in changes], precision="float32")
    torch.testing.assert_close(single.double(), 0.6 * written_out([c.float() for c in changes]), **STORED)


@settings(max_examples=30, deadline=None)
@given(ranks=lists, seed=st.integers(0, 99))
def test_adding_in_the_basis_is_adding(ranks: list[int], seed: int):
    factors = pairs(ranks, seed=seed)
    weights = tuple(float(k + 1) for k in range(len(ranks)))
    total = torch.stack([w * b @ a for w, (b, a) in zip(weights, factors, strict=True)]).sum(0)
    chosen: dict[str, Any] = {"combine": "linear", "scale": 0.5, "weight": weights}
    torch.testing.assert_close(by_factors(factors, **chosen), 0.5 * total, **CLOSE)
    torch.testing.assert_close(merged([b @ a for b, a in factors], **chosen), 0.5 * total, **CLOSE)


@pytest.mark.parametrize("combine", ["ties", "dare", "dare_ties", "linear"])
def test_one_expert_kept_whole_is_itself(combine: str):
    (b, a) = pairs([3])[0]
    chosen: dict[str, Any] = {"combine": combine, "density": 1.0, "scale": 1.0}
    torch.testing.assert_close(by_factors([(b, a)], **chosen), b @ a, **CLOSE)
    torch.testing.assert_close(merged([b @ a], **chosen), b @ a, **CLOSE)


def test_equal_experts_are_one():
    change = rand(8, 11)
    torch.testing.assert_close(merged([change] * 3, scale=1.0), merged([change], scale=1.0), **CLOSE)
    b, a = pairs([3])[0]
    torch.testing.assert_close(by_factors([(b, a)] * 4), by_factors([(b, a)]), **CLOSE)


def test_experts_of_orthogonal_columns_do_not_disturb_each_other():
    """Each direction of the basis belongs to one expert: nothing is averaged or voted away. TIES alone loses some."""
    q, _ = torch.linalg.qr(rand(12, 12))
    changes = [q[:, 3 * k : 3 * k + 3] @ rand(3, 9, seed=k + 1) for k in range(4)]
    total = torch.stack(changes).sum(0)
    torch.testing.assert_close(merged(changes, density=1.0, scale=1.0), total, **CLOSE)
    plain = spolia.merge(
        [{"w": c} for c in changes],
        base={"w": torch.zeros(12, 9, dtype=torch.float64)},
        method="ties",
        settings={"density": 1.0},
    )["w"]
    assert float((plain - total).norm()) > 0.1 * float(total.norm())


def test_small_directions_are_dropped():
    (b, a), other = pairs([2, 2])
    b[:, 1] *= 1e-8
    factors = [(b, a), (other[0] * 0, other[1])]
    for got in (
        by_factors(factors, combine="linear", scale=1.0),
        merged([b @ a, 0 * b @ a], combine="linear", scale=1.0),
    ):
        torch.testing.assert_close(got, b @ a, rtol=0, atol=1e-5)  # the floor
        assert torch.linalg.matrix_rank(got) == 1
    assert merged_pair(factors, Knots(floor=0.0))[0].shape[1] > merged_pair(factors, Knots())[0].shape[1] == 1
    assert torch.equal(merged([torch.zeros(3, 4)] * 2), torch.zeros(3, 4))


@pytest.mark.parametrize("combine", ["dare", "dare_ties"])
def test_coins_follow_seed_and_name(combine: str):
    factors, chosen = pairs([3, 3]), Knots(combine=combine, density=0.5)  # type: ignore[arg-type]
    first = merged_pair(factors, chosen, seed=1, name="q")[1]
    assert torch.equal(first, merged_pair(factors, chosen, seed=1, name="q")[1])
    assert not torch.equal(first, merged_pair(factors, chosen, seed=2, name="q")[1])
    assert not torch.equal(first, merged_pair(factors, chosen, seed=1, name="v")[1])


def test_the_order_of_experts_does_not_count():
    factors = pairs([2, 3, 1])
    torch.testing.assert_close(by_factors(factors), by_factors(factors[::-1]), **CLOSE)


def test_what_is_no_matrix_is_merged_where_it_stands():
    shapes = {"b": (9,), "conv": (3, 2, 2), "model.embed_tokens.weight": (8, 5), "w": (6, 4)}
    base = {n: rand(*s, seed=k) for k, (n, s) in enumerate(shapes.items())}
    experts = [{n: t + rand(*t.shape, seed=10 * k + t.numel()) for n, t in base.items()} for k in range(3)]
    chosen = {"density": 0.5, "weight": (1.0, 0.5, 2.0), "scale": 0.7}
    got = spolia.merge(experts, base=base, method="knots", settings=chosen)
    ties = spolia.merge(experts, base=base, method="ties", settings={**chosen, "scope": "tensor", "zero_sign": "+"})
    for name in shapes:
        assert torch.equal(got[name], ties[name]) == (name != "w"), name
    turned = spolia.merge(experts, base=base, method="knots", settings={**chosen, "exclude": ""})
    assert not torch.allclose(turned["model.embed_tokens.weight"], got["model.embed_tokens.weight"])


def test_bf16_is_the_fp32_result_rounded_once():
    base = rand(12, 8).bfloat16()
    experts = [(base.float() + rand(12, 8, seed=k + 1).float()).bfloat16() for k in range(2)]
    low = spolia.merge([{"w": e} for e in experts], base={"w": base}, method="knots")["w"]
    high = spolia.merge([{"w": e.float()} for e in experts], base={"w": base.float()}, method="knots")["w"]
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())


@pytest.mark.slow
def test_slices_cover_a_large_tensor():
    left, right = torch.zeros(1100), torch.zeros(1100)  # more than one slice
    left[0] = left[-1] = right[-1] = 1
    got = merged([torch.outer(left, right)], density=1.0, scale=1.0)
    torch.testing.assert_close(got, torch.outer(left, right), rtol=0, atol=1e-6)


def test_too_little_memory_names_the_tensor():
    big = torch.zeros(1500, 1200)
    with pytest.raises(SpoliaError, match=r"(?s)tensor `big` is merged in one piece.*allow at least"):
        spolia.merge([{"big": big}] * 2, base={"big": big}, method="knots", chunk_memory=40_000_000)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"density": 1.5}, "0..1"),
        ({"combine": "slerp"}, "ties"),
        ({"floor": -1}, "floor"),
        ({"exclude": "("}, "regular"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], word: str):
    with pytest.raises(SpoliaError, match=word):
        merged([torch.ones(3, 3)], **given)


# adapters

BASE = {
    "layers.0.q.weight": rand(24, 16, seed=1).float(),
    "layers.0.o.weight": rand(16, 24, seed=2).float(),
    "layers.0.o.bias": rand(16, seed=3).float(),
    "wte.weight": rand(50, 16, seed=4).float(),
    "conv.weight": rand(6, 5, 3, 3, seed=5).float(),
}


def tensors(seed: int, r: int = 2) -> dict[str, torch.Tensor]:
    """Factors of a linear layer, an embedding and a convolution."""
    shapes = {
        "layers.0.q.lora_A.weight": (r, 16),
        "layers.0.q.lora_B.weight": (24, r),
        "wte.lora_embedding_A": (r, 50),
        "wte.lora_embedding_B": (16, r),
        "conv.lora_A.weight": (r, 5, 3, 3),
        "conv.lora_B.weight": (6, r, 1, 1),
    }
    return {n: rand(*s, seed=100 * seed + k).float() for k, (n, s) in enumerate(shapes.items())}


def change(folder: Path, module: str) -> torch.Tensor:
    """scale B A of an adapter's module, out x in, convolutions flattened; written here once more."""
    adapter = Adapter.open(folder)
    pair = adapter.pairs[module]
    with adapter.weights.opened():
        return pair.scale * whole(adapter.weights, pair.b).flatten(1) @ whole(adapter.weights, pair.a).flatten(1)


@pytest.fixture
def adapters(tmp_path: Path, write_model: Write, write_adapter: Write) -> tuple[Path, list[Path]]:
    """A base, an adapter of rank 2, and one of rank 3 with the scale of rsLoRA that adapts one module more."""
    more = {
        "layers.0.o.lora_A.weight": rand(3, 24, seed=8).float(),
        "layers.0.o.lora_B.weight": rand(16, 3, seed=9).float(),
    }
    base = write_model(tmp_path / "base", BASE)
    one = write_adapter(tmp_path / "one", tensors(1), lora_alpha=3)
    two = write_adapter(tmp_path / "two", tensors(2, r=3) | more, r=3, lora_alpha=4, use_rslora=True)
    return base, [one, two]


def test_adapters_on_their_base_are_the_written_out_merge(adapters: tuple[Path, list[Path]]):
    base, (one, two) = adapters
    got = spolia.merge([one, two], base=base, method="knots")
    changes = [change(one, "layers.0.q"), change(two, "layers.0.q")]
    scale = [3 / 2, 4 / 3**0.5]  # alpha / r, and alpha / sqrt(r) of rsLoRA
    for k, found in enumerate(changes):
        by_hand = tensors(k + 1, r=k + 2)
        product = by_hand["layers.0.q.lora_B.weight"].double() @ by_hand["layers.0.q.lora_A.weight"].double()
        torch.testing.assert_close(found, scale[k] * product, **CLOSE)
    name = "layers.0.q.weight"
    torch.testing.assert_close(got[name].double(), BASE[name].double() + 0.6 * written_out(changes), **STORED)
    lone = change(two, "layers.0.o")  # the other adapter leaves it alone
    name = "layers.0.o.weight"
    torch.testing.assert_close(got[name].double(), BASE[name].double() + 0.6 * written_out([lone]), **STORED)
    # the embedding is stored as in x out of B A: the basis is that of the outputs all the same
    changes = [change(one, "wte"), change(two, "wte")]
    expected = BASE["wte.weight"].double() + 0.6 * written_out(changes).t()
    torch.testing.assert_close(got["wte.weight"].double(), expected, **STORED)
    assert torch.equal(got["layers.0.o.bias"], BASE["layers.0.o.bias"])


@pytest.mark.parametrize(
    "chosen",
    [{}, {"combine": "linear", "scale": 1.0}, {"combine": "dare", "density": 0.5}, {"density": (0.3, 0.6)}],
    ids=str,
)
def test_the_merged_adapter_is_the_merge_of_the_models(
    chosen: dict[str, Any], adapters: tuple[Path, list[Path]], tmp_path: Path
):
    base, folders = adapters
    out = spolia.merge_adapters(
        folders, method="knots", settings=chosen, weights=[1.0, 0.5], out=tmp_path / "m", seed=7
    )
    whole_model = spolia.merge([out], base=base, method="task_arithmetic", settings={"scale": 1.0})
    both = spolia.merge(folders, base=base, method="knots", settings={**chosen, "weight": (1.0, 0.5)}, seed=7)
    for name in BASE:
        torch.testing.assert_close(whole_model[name], both[name], **STORED)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5 and config["rank_pattern"] == {"layers.0.o": 3}
    told = json.loads((out / "spolia.json").read_text())
    assert told["method"] == "knots" and told["settings"]["scale"] == chosen.get("scale", 0.6) and told["seed"] == 7


def test_ranks_stop_where_the_matrix_ends(tmp_path: Path, write_adapter: Write):
    small = {"w.lora_A.weight": rand(4, 3).float(), "w.lora_B.weight": rand(5, 4, seed=1).float()}
    folders = [write_adapter(tmp_path / n, small, r=4, lora_alpha=4) for n in ("a", "b")]
    out = spolia.merge_adapters(
        folders, method="knots", settings={"combine": "linear", "scale": 1.0}, out=tmp_path / "m"
    )
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    torch.testing.assert_close(change(out, "w"), 2 * change(folders[0], "w"), **STORED)
    assert json.loads((out / "spolia.json").read_text())["relative_error"] < 1e-12  # nothing was cut but rounding


@pytest.mark.parametrize("rank", [1, 3])
def test_a_cut_rank_is_the_best_there_is(rank: int, adapters: tuple[Path, list[Path]], tmp_path: Path):
    _, folders = adapters
    out = spolia.merge_adapters(folders, method="knots", rank=rank, out=tmp_path / "m")
    u, s, v = torch.linalg.svd(0.6 * written_out([change(f, "layers.0.q") for f in folders]), full_matrices=False)
    torch.testing.assert_close(change(out, "layers.0.q"), (u[:, :rank] * s[:rank]) @ v[:rank], **STORED)
    assert json.loads((out / "spolia.json").read_text())["relative_error"] > 0


def test_dropped_directions_leave_room_that_is_empty(tmp_path: Path, write_adapter: Write):
    same = {"w.lora_A.weight": rand(2, 9).float(), "w.lora_B.weight": rand(8, 2, seed=1).float()}
    folders = [write_adapter(tmp_path / n, same) for n in ("a", "b")]  # four columns, of which two are new
    out = spolia.merge_adapters(folders, method="knots", settings={"density": 1.0, "scale": 1.0}, out=tmp_path / "m")
    stored = read_tensors(out / "adapter_model.safetensors")
    assert stored["base_model.model.w.lora_A.weight"].shape == (4, 9)
    assert torch.count_nonzero(stored["base_model.model.w.lora_A.weight"].norm(dim=1)) == 2
    torch.testing.assert_close(change(out, "w"), change(folders[0], "w"), **STORED)


def test_weights_stored_the_other_way_round(tmp_path: Path, write_model: Write, write_adapter: Write):
    """GPT-2's Conv1D: the tensor is the transpose of B A, the basis still that of the outputs."""
    base = write_model(tmp_path / "base", {"c_attn.weight": rand(7, 21).float()})
    folders = []
    for k in (1, 2):
        made = {
            "c_attn.lora_A.weight": rand(2, 7, seed=k).float(),
            "c_attn.lora_B.weight": rand(21, 2, seed=k + 9).float(),
        }
        folders.append(write_adapter(tmp_path / str(k), made, fan_in_fan_out=True))
    got = spolia.merge(folders, base=base, method="knots")["c_attn.weight"]
    changes = [change(folder, "c_attn") for folder in folders]
    expected = rand(7, 21).float().double() + 0.6 * written_out(changes).t()
    torch.testing.assert_close(got.double(), expected, **STORED)


def test_adapters_beside_full_models_are_taken_as_full(adapters: tuple[Path, list[Path]], tmp_path: Path):
    base, (one, two) = adapters
    dense = spolia.merge([two], base=base, method="task_arithmetic", settings={"scale": 1.0})
    got = spolia.merge([one, dense], base=base, method="knots")
    name = "layers.0.q.weight"
    changes = [change(one, "layers.0.q"), change(two, "layers.0.q")]
    torch.testing.assert_close(got[name].double(), BASE[name].double() + 0.6 * written_out(changes), **STORED)


def test_what_adapters_cannot_do(tmp_path: Path, write_adapter: Write):
    plain = write_adapter(tmp_path / "plain", tensors(1))
    saved = write_adapter(tmp_path / "saved", tensors(2) | {"norm.weight": rand(4).float()})
    broken = tensors(3)
    broken["conv.lora_B.weight"][0, 0] = torch.nan
    bad = write_adapter(tmp_path / "bad", broken)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"adapters": [plain, saved]}, r"saved.*replaces `norm.weight` of the base, and knots merges factors only"),
        ({"adapters": [plain, bad]}, r"bad.*`base_model.model.conv.lora_B.weight` holds NaN or Inf"),
        ({"adapters": [plain], "settings": {"densitty": 1}}, "density"),
        ({"adapters": [plain], "settings": {"weight": 2.0}}, "give `weights`"),
        ({"adapters": [plain], "settings": {"density": (0.1, 0.2)}}, "2 values for 1 experts"),
        ({"adapters": [plain], "method": "average", "settings": {"scale": 1.0}}, "has no settings"),
    ]
    for call, word in calls:
        with pytest.raises(SpoliaError, match=word):
            spolia.merge_adapters(**{"method": "knots", "out": tmp_path / "m", **call})
        assert not (tmp_path / "m").exists()


def test_a_broken_adapter_on_its_base_is_named(adapters: tuple[Path, list[Path]], tmp_path: Path, write_adapter: Write):
    broken = tensors(3)
    broken["layers.0.q.lora_A.weight"][1, 2] = torch.inf
    bad = write_adapter(tmp_path / "bad", broken)
    with pytest.raises(SpoliaError, match=r"bad.*`layers.0.q.weight` holds NaN or Inf"):
        spolia.merge([adapters[1][0], bad], base=adapters[0], method="knots")


@pytest.mark.slow
def test_adapters_never_become_dense(
    tmp_path: Path, write_model: Write, write_adapter: Write, fork: Callable[..., Any]
):
    """Two adapters on a base of 200 MB: what the process grows by stays far below one copy of it."""
    base = write_model(tmp_path / "base", {f"layers.{i}.q.weight": torch.zeros(2500, 2500) for i in range(8)}, {})
    folders = []
    for k in range(2):
        made = {}
        for i in range(8):
            made[f"layers.{i}.q.lora_A.weight"] = rand(2, 2500, seed=k).float()
            made[f"layers.{i}.q.lora_B.weight"] = rand(2500, 2, seed=i + k).float()
        folders.append(str(write_adapter(tmp_path / str(k), made)))
    code = (
        "import resource, torch, spolia\nfrom spolia.runs import merging\ntorch.linalg.svd(torch.ones(9, 9))\n"
        "top = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = top()\n"
        f"spolia.merge({folders!r}, base={str(base)!r}, method='knots', out={str(tmp_path / 'm')!r}, threads=2)\n"
        "print(top() - before)"
    )
    grown = int(fork(code).communicate()[0])
    assert (
        grown < 125_000
    )  # KiB, modules that a merge imports among them; the base has 200 000, a dense shared basis of one
    # matrix 150 000

"""Every kind of input through a whole merge: adapters like their dense models, odd folders, and adapters among themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spolia
from spolia.core.checkpoint import Checkpoint, read_tensors
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.parts.adapter import Adapter
from spolia.parts.expert import MemoryWeights
from spolia.parts.lora import LoraWeights
from spolia.runs.verbs import merge_recipe, read_request

pytestmark = pytest.mark.sampled(3)  # of many cases alike

Write = Callable[..., Path]
CONFIG = {"model_type": "x", "vocab_size": 50}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = {
    "embed_tokens.weight": rand(50, 16),
    "layers.0.q.weight": rand(24, 16, seed=1),
    "layers.0.o.weight": rand(16, 24, seed=2),
    "layers.0.o.bias": rand(16, seed=3),
    "norm.weight": rand(16, seed=4),
    "big.weight": rand(300, 1000, seed=5),
}


def factors(seed: int, r: int = 2) -> dict[str, torch.Tensor]:
    """Some modules, an embedding, and a module to save."""
    return {
        "layers.0.q.lora_A.weight": rand(r, 16, seed=seed),
        "layers.0.q.lora_B.weight": rand(24, r, seed=seed + 1),
        "big.lora_A.weight": rand(r, 1000, seed=seed + 2),
        "big.lora_B.weight": rand(300, r, seed=seed + 3),
        "embed_tokens.lora_embedding_A": rand(r, 50, seed=seed + 4),
        "embed_tokens.lora_embedding_B": rand(16, r, seed=seed + 5),
        "norm.weight": rand(16, seed=seed + 6),
    }


def densified(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The whole model, independently of the code under test: products in fp64, one rounding."""
    dense = dict(BASE) | {"norm.weight": tensors["norm.weight"]}
    for module in ("layers.0.q", "big"):
        if f"{module}.lora_A.weight" in tensors:
            product = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
            dense[f"{module}.weight"] = (BASE[f"{module}.weight"].double() + scale * product).float()
    product = tensors["embed_tokens.lora_embedding_B"].double() @ tensors["embed_tokens.lora_embedding_A"].double()
    dense["embed_tokens.weight"] = (BASE["embed_tokens.weight"].double() + scale * product.t()).float()
    return dense


@pytest.fixture
def pools(tmp_path: Path, write_model: Write, write_adapter: Write) -> tuple[Path, list[Path], list[Path]]:
    """The base, two adapters, and the same two as whole models."""
    base = write_model(tmp_path / "base", BASE, CONFIG)
    (base / "tokenizer.json").write_text("{}")
    adapters, dense = [], []
    for name, seed, config, scale in (
        ("one", 10, {}, 2.0),
        ("two", 40, {"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
    ):
        adapters.append(write_adapter(tmp_path / name, factors(seed), **config))
        dense.append(write_model(tmp_path / f"dense-{name}", densified(factors(seed), scale), CONFIG))
    return base, adapters, dense


METHODS = ["average", "task_arithmetic", "ties", "dare", "della", "breadcrumbs"]


@pytest.mark.parametrize("method", METHODS)
def test_adapters_merge_like_their_dense_models(method: str, pools: Any, tmp_path: Path) -> None:
    """Bit for bit in fp32: methods read the same numbers, in whatever blocks they read them."""
    base, adapters, dense = pools
    for sources, out in ((adapters, "a"), (dense, "b")):
        spolia.merge(sources, base=base, method=method, out=tmp_path / out)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/tokenizer.json").exists() and Checkpoint.open(tmp_path / "a").config == CONFIG


def test_every_way_to_name_an_adapter_gives_one_result(pools: Any, tmp_path: Path, monkeypatch) -> None:
    base, (one, two), _ = pools
    monkeypatch.chdir(tmp_path)
    settings = {"scale": 0.5}
    spolia.merge([one, two], base=base, method="task_arithmetic", settings=settings, out="m1")
    spolia.merge([f"{base}+{one}", "base+two"], base="base", method="task_arithmetic", settings=settings, out="m2")
    (tmp_path / "native.yaml").write_text(
        "spolia: 1\npool:\n  base: ./base\n  experts: [./one, {name: second, path: base, lora: ./two}]\n"
        "method: {name: task_arithmetic, scale: 0.5}\n"
    )
    merge_recipe("native.yaml", "m3")
    (tmp_path / "plus.yaml").write_text(
        "spolia: 1\npool: {base: ./base, experts: [base+one, two]}\nmethod: {name: task_arithmetic, scale: 0.5}\n"
    )
    merge_recipe("plus.yaml", "m4")
    (tmp_path / "theirs.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: base+one\n"
        "  - model: {model: base, lora: {path: two}}\nparameters: {weight: 0.5}\n"
    )
    merge_recipe("theirs.yml", "m5")
    (tmp_path / "alone.yml").write_text(
        "merge_method: task_arithmetic\nmodels:\n  - model: one\n  - model: two\nbase_model: base\nparameters: {weight: 0.5}\n"
    )
    merge_recipe("alone.yml", "m6")
    first = (tmp_path / "m1/model.safetensors").read_bytes()
    assert all((tmp_path / f"m{k}/model.safetensors").read_bytes() == first for k in range(2, 7))
    recipe = spolia.load_recipe("native.yaml")
    assert [(e.path.name, e.lora and e.lora.name) for e in recipe.pool.experts] == [("one", None), ("base", "two")]
    again = tmp_path / "resolved.yaml"
    again.write_text(recipe.to_yaml())
    assert spolia.load_recipe(str(again)).pool == recipe.pool
    assert [e.name for e in read_request("theirs.yml").experts] == ["base+one", "base+two"]
    assert [i.path.rsplit("/", 1)[1] for i in spolia.plan("native.yaml").inputs] == ["base", "one", "two"]


def test_an_adapter_with_a_base_of_its_own_needs_no_other(pools: Any, tmp_path: Path, write_adapter: Write) -> None:
    base, _, dense = pools
    named = write_adapter(tmp_path / "named", factors(10), base_model_name_or_path=str(base))
    spolia.merge([named, base], method="average", out=tmp_path / "m")
    spolia.merge([dense[0], base], method="average", out=tmp_path / "d")
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "d/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "m/config.json").read_text()) == CONFIG  # the base's, not the adapter's


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ("base+one+two", "more than one `+`"),
        ("base+gone", "there is no model at `gone`"),
        ("gone+one", "there is no model at `gone`"),
        ("base+base", "`base` is no LoRA adapter"),
        ("{model: base, lora: base}", "`base` is no LoRA adapter"),
        ("one", "base is not known"),
    ],
)
def test_mergekit_references_that_do_not_hold(models: str, told: str, pools: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels:\n  - model: {models}\nparameters: {{weight: 1}}\n")
    with pytest.raises(SpoliaError) as caught:
        read_request(tmp_path / "r.yml")
    assert told in str(caught.value) and "r.yml:3" in str(caught.value)


def test_native_recipes_tell_a_missing_adapter_at_its_line(pools: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "spolia: 1\npool:\n  base: ./base\n  experts:\n    - {path: base, lora: ./ohne}\n    - base+tow\n"
        "method: {name: average}\n"
    )
    with pytest.raises(SpoliaError) as caught:
        spolia.load_recipe(str(tmp_path / "r.yaml"))
    text = str(caught.value)
    assert "r.yaml:5" in text and "ohne" in text and "r.yaml:6" in text and "did you mean `two`?" in text


def test_inputs_are_never_the_target(pools: Any) -> None:
    base, (one, two), _ = pools
    for target in (base, one, one.parent):
        with pytest.raises(SpoliaError, match="somewhere else"):
            spolia.merge([one, two], base=base, method="task_arithmetic", out=target, overwrite=True)


def test_a_folder_that_stopped_goes_on_only_with_the_same_adapter(
    pools: Any, tmp_path: Path, write_adapter: Write
) -> None:
    """The rank and alpha are part of what is made: another alpha gives another key."""
    from spolia.catalog import find
    from spolia.runs.asked import check_settings, request_from
    from spolia.runs.merging import key_of, prepare

    base, (one, two), _ = pools
    method = find("average", "method")
    settings = check_settings(method, None, 2)
    first = key_of(prepare(request_from([one, two], base, method, settings, None, 0)))
    assert first == key_of(prepare(request_from([one, two], base, method, settings, None, 0)))
    write_adapter(tmp_path / "one", factors(10), lora_alpha=5)
    assert first != key_of(prepare(request_from([one, two], base, method, settings, None, 0)))


# adapters among themselves


def dense_of(folder: Path) -> dict[str, torch.Tensor]:
    """Change of every adapted tensor, by the config that peft would read, in fp64."""
    adapter = Adapter.open(folder)
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for module, pair in adapter.pairs.items():
        product = tensors[pair.b].double().flatten(1) @ tensors[pair.a].double().flatten(1)
        found[module] = pair.scale * (product.t() if pair.embedding else product)
    return found


def without_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if name != "norm.weight"}


@pytest.mark.parametrize(
    ("method", "weights"), [("task_arithmetic", 1.0), ("task_arithmetic", [0.5, -2]), ("average", [1, 3])]
)
def test_adapters_merge_into_an_adapter(method: str, weights: Any, tmp_path: Path, write_adapter: Write) -> None:
    second = without_norm(factors(40, r=5))
    del second["big.lora_A.weight"], second["big.lora_B.weight"]  # a module that only one adapts
    one = write_adapter(tmp_path / "one", without_norm(factors(10)), target_modules=["q", "big", "embed_tokens"])
    two = write_adapter(tmp_path / "two", second, r=5, use_rslora=True, target_modules=["q", "embed_tokens"])
    out = spolia.merge_adapters([one, two], weights=weights, method=method, out=tmp_path / "m")
    shares = [weights] * 2 if isinstance(weights, float) else weights
    shares = [w / sum(shares) for w in shares] if method == "average" else shares
    parts = [dense_of(one), dense_of(two)]
    merged = dense_of(out)
    assert set(merged) == {"layers.0.q", "big", "embed_tokens"}
    for module, found in merged.items():
        wanted = sum(share * part[module] for share, part in zip(shares, parts, strict=True) if module in part)
        # The scaled factors are rounded to fp32 once: half an ulp of each of at most seven terms.
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7 and not config["use_rslora"] and config["peft_type"] == "LORA"
    assert config["rank_pattern"] == config["alpha_pattern"] == {"big": 2}
    assert set(config["target_modules"]) == set(merged)
    names = set(load_file(out / "adapter_model.safetensors"))
    assert names == set(load_file(one / "adapter_model.safetensors"))


def test_ranks_that_are_powers_of_two_add_up_without_rounding(tmp_path: Path, write_adapter: Write) -> None:
    folders = [write_adapter(tmp_path / n, without_norm(factors(s)), lora_alpha=4) for n, s in (("a", 1), ("b", 50))]
    out = spolia.merge_adapters(folders, out=tmp_path / "m")
    tensors = load_file(out / "adapter_model.safetensors")
    a, b = factors(1), factors(50)
    assert torch.equal(
        tensors["base_model.model.big.lora_A.weight"], torch.cat([a["big.lora_A.weight"], b["big.lora_A.weight"]])
    )
    assert torch.equal(
        tensors["base_model.model.big.lora_B.weight"],
        2 * torch.cat([a["big.lora_B.weight"], b["big.lora_B.weight"]], 1),
    )
    assert json.loads((out / "spolia.json").read_text())["relative_error"] == 0.0


@pytest.mark.parametrize("rank", [1, 3, 4, 100])
def test_a_cut_rank_is_the_best_there_is(rank: int, tmp_path: Path, write_adapter: Write) -> None:
    folders = [write_adapter(tmp_path / n, without_norm(factors(s))) for n, s in (("a", 1), ("b", 50))]
    out = spolia.merge_adapters(folders, rank=rank, out=tmp_path / "m")
    parts, lost, size = [dense_of(f) for f in folders], 0.0, 0.0
    for module, found in dense_of(out).items():
        whole = parts[0][module] + parts[1][module]
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert torch.allclose(found, best, atol=1e-5 * float(s[0]))  # factors stored in fp32
        lost, size = lost + float((whole - best).square().sum()), size + float(whole.square().sum())
        assert torch.linalg.matrix_rank(found, rtol=1e-6) <= rank
    told = json.loads((out / "spolia.json").read_text())["relative_error"]
    assert told == pytest.approx((lost / size) ** 0.5 if rank < 4 else 0.0, abs=1e-9)


def test_the_merged_adapter_on_the_base_is_the_merge_of_the_models(pools: Any, tmp_path: Path) -> None:
    base, adapters, _ = pools
    out = spolia.merge_adapters(adapters, method="average", out=tmp_path / "m")
    one = spolia.merge([out, base], base=base, method="task_arithmetic", settings={"scale": 1.0})
    both = spolia.merge(adapters, base=base, method="average")
    for name in BASE:  # norm.weight too: the mean of what takes its place
        assert torch.allclose(one[name], both[name], rtol=1e-5, atol=1e-5)  # factors and task vectors rounded to fp32


def test_convolutions_and_other_types(tmp_path: Path, write_adapter: Write) -> None:
    tensors = {"c.lora_A.weight": rand(2, 5, 3, 3), "c.lora_B.weight": rand(6, 2, 1, 1)}
    folder = write_adapter(tmp_path / "a", tensors)
    for rank, dtype in ((None, "float32"), (1, "bfloat16"), (3, "float16")):
        out = spolia.merge_adapters([folder, folder], rank=rank, dtype=dtype, out=tmp_path / f"{dtype}")
        merged = load_file(out / "adapter_model.safetensors")
        assert merged["base_model.model.c.lora_A.weight"].shape == (rank or 4, 5, 3, 3)
        assert merged["base_model.model.c.lora_B.weight"].shape == (6, rank or 4, 1, 1)
        assert {str(t.dtype) for t in merged.values()} == {f"torch.{dtype}"}
        base = {"c.weight": rand(6, 5, 3, 3, seed=9)}
        assert LoraWeights(MemoryWeights(base), Adapter.open(out)).changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "ties"}, ["`ties`", "spolia.merge"]),
        ({"weights": [1.0]}, ["1 weights for 2"]),
        ({"weights": [1.0, float("nan")]}, ["finite"]),
        ({"weights": [1.0, -1.0], "method": "average"}, ["sum to zero"]),
        ({"rank": 0}, ["rank of 0"]),
        ({"rank": True}, ["rank of True"]),
        ({"dtype": "int8"}, ["`int8`"]),
        ({"weights": [1.0, 1.0]}, ["norm.weight", "do not sum to 1"]),
        ({"adapters": ["one", "gone"]}, ["gone"]),
        ({"adapters": ["one", "base"]}, ["adapter_config.json"]),
        ({"adapters": ["one", "bare"]}, ["replaces `norm.weight`", "bare does not"]),
        ({"adapters": ["one", "small"]}, ["small", "`big`"]),
        ({"adapters": ["turned", "bare"]}, ["fan_in_fan_out"]),
        ({"adapters": ["biased", "biased"]}, ["lora_bias"]),
        ({"out": "one"}, ["one of the adapters"]),
        ({"adapters": []}, ["0 adapters"]),
    ],
)  # fmt: skip
def test_adapters_that_do_not_merge(
    change: dict, words: list[str], pools: Any, tmp_path: Path, write_adapter: Write, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "bare", without_norm(factors(3)))
    write_adapter(tmp_path / "turned", without_norm(factors(3)), fan_in_fan_out=True)
    write_adapter(tmp_path / "biased", {**without_norm(factors(3)), "big.lora_B.bias": rand(300)})
    write_adapter(tmp_path / "small", {**factors(3), "big.lora_A.weight": rand(2, 7)})
    call = {"adapters": ["one", "two"], "method": "task_arithmetic", "out": "m"} | change
    with pytest.raises(SpoliaError) as caught:
        spolia.merge_adapters(call.pop("adapters"), **call, overwrite=True)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "m").exists() and (tmp_path / "one/adapter_config.json").exists()


def test_adapters_of_unlike_bases_are_told(tmp_path: Path, write_adapter: Write) -> None:
    folders = [
        write_adapter(tmp_path / n, without_norm(factors(s)), base_model_name_or_path=f"org/{n}")
        for n, s in (("a", 1), ("b", 5))
    ]
    with pytest.warns(SpoliaWarning, match="org/a.*org/b"):
        spolia.merge_adapters(folders, out=tmp_path / "m")


# folders as they come


def test_consolidated_files_and_other_releases_are_left_aside(tmp_path: Path, write_model: Write) -> None:
    w = {"w": torch.ones(2)}
    folder = write_model(tmp_path / "m", w)
    save_file({"w": torch.zeros(2), "other": torch.zeros(9)}, folder / "consolidated.safetensors")
    assert torch.equal(read_tensors(folder)["w"], w["w"]) and Checkpoint.open(folder).notes == []
    save_file({"w": torch.zeros(2)}, folder / "model.fp16.safetensors")
    opened = Checkpoint.open(folder)
    assert torch.equal(read_tensors(folder)["w"], w["w"]) and "model.fp16.safetensors left aside" in opened.notes[0]
    (folder / "model.safetensors").unlink()
    opened = Checkpoint.open(folder)
    assert [f.name for f in opened.files] == ["model.fp16.safetensors"] and "only release" in opened.notes[0]
    save_file({"w": torch.ones(2)}, folder / "model.fp32.safetensors")
    opened = Checkpoint.open(folder)
    assert [f.name for f in opened.files] == ["model.fp32.safetensors"] and "model.fp16" in opened.notes[0]
    plain = write_model(tmp_path / "plain", w)
    with pytest.warns(SpoliaWarning, match=r"model\.fp32\.safetensors is read"):
        spolia.merge([folder, plain], out=tmp_path / "out")
    (alone := tmp_path / "alone").mkdir()
    save_file(w, alone / "consolidated.safetensors")  # nothing else there: then it is the model
    assert list(read_tensors(alone)) == ["w"]


def test_indexes_of_other_releases(tmp_path: Path, write_model: Write) -> None:
    folder = write_model(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    plain = folder / "model.safetensors.index.json"
    (folder / "model.safetensors.index.fp16.json").write_bytes(plain.read_bytes())
    assert "index.fp16.json left aside" in Checkpoint.open(folder).notes[0]
    plain.unlink()
    assert list(read_tensors(folder)) == ["a", "b"]
    (folder / "other.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(SpoliaError, match="several models"):
        Checkpoint.open(folder)


def test_batch_norm_counts_are_copied_and_statistics_merged(tmp_path: Path) -> None:
    """A convolutional network as torch saves it: running statistics are numbers, the batch count is not."""
    torch.manual_seed(0)
    paths, states = [], []
    for k in range(3):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
        )
        for _ in range(k + 1):
            net(torch.randn(4, 3, 8, 8))
        states.append(net.state_dict())
        torch.save(net.state_dict(), path := tmp_path / f"{k}.pth")
        paths.append(path)
    spolia.merge(paths[1:], base=paths[0], method="task_arithmetic", settings={"scale": 0.5}, out=tmp_path / "m")
    merged = read_tensors(tmp_path / "m")
    assert merged["1.num_batches_tracked"].item() == 1 and merged["1.num_batches_tracked"].dtype == torch.int64
    for name in ("1.running_mean", "1.running_var", "0.weight"):
        wanted = 0.5 * (states[1][name] + states[2][name])  # b + (x - b) / 2 + (y - b) / 2
        assert torch.allclose(merged[name], wanted, rtol=1e-5, atol=1e-6)
    net.load_state_dict(merged)


VLM = {
    "model_type": "vlm",
    "text_config": {"vocab_size": 6, "num_hidden_layers": 2},
    "vision_config": {"num_hidden_layers": 1},
}


def vlm(seed: int, vocabulary: int = 6, layers: int = 2) -> dict[str, torch.Tensor]:
    tensors = {"model.language_model.embed_tokens.weight": rand(vocabulary, 4, seed=seed)}
    tensors |= {f"model.language_model.layers.{i}.q.weight": rand(4, 4, seed=seed + i) for i in range(layers)}
    return tensors | {
        "model.visual.patch_embed.weight": rand(4, 3, 2, 2, seed=seed),
        "model.visual.blocks.0.q.weight": rand(4, 4),
    }


def test_vision_language_folders(tmp_path: Path, write_model: Write) -> None:
    """Ties, depth and vocabulary stand in the config of the tower that has them."""
    tied = VLM | {"text_config": VLM["text_config"] | {"tie_word_embeddings": True}}
    base = write_model(tmp_path / "base", vlm(0), tied)
    stored = vlm(1) | {"lm_head.weight": rand(6, 4, seed=1)}  # a release that stores the tied head as well
    one, two = write_model(tmp_path / "one", stored, tied), write_model(tmp_path / "two", vlm(2), tied)
    spolia.merge([one, two], base=base, method="task_arithmetic", settings={"scale": 1.0}, out=tmp_path / "m")
    merged = read_tensors(tmp_path / "m")
    assert set(merged) == set(vlm(0))  # the head is merged as the embedding, once
    name = "model.visual.patch_embed.weight"
    assert torch.allclose(merged[name], vlm(1)[name] + vlm(2)[name] - vlm(0)[name], atol=1e-6)
    assert json.loads((tmp_path / "m/config.json").read_text()) == tied
    other = write_model(tmp_path / "larger", vlm(3, vocabulary=8), VLM)
    with pytest.raises(SpoliaError, match="vocabularies differ"):
        spolia.merge([one, other], out=tmp_path / "n")
    deeper = VLM | {"text_config": VLM["text_config"] | {"num_hidden_layers": 9}}
    deep = write_model(tmp_path / "deep", vlm(3, layers=9), deeper)
    with pytest.raises(SpoliaError, match="2 layers, deep 9"):
        spolia.merge([deep, two], out=tmp_path / "n")


@pytest.mark.slow
def test_adapters_never_become_dense(tmp_path: Path, write_adapter: Write, fork: Callable[..., Any]) -> None:
    """Two adapters on a base of 200 MB: what the process grows by stays far below one copy of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"layers.{i}.q.weight": torch.zeros(2500, 2500) for i in range(8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    adapters = []
    for k in range(2):
        tensors = {}
        for i in range(8):
            tensors |= {
                f"layers.{i}.q.lora_A.weight": rand(2, 2500, seed=k),
                f"layers.{i}.q.lora_B.weight": rand(2500, 2, seed=i),
            }
        adapters.append(str(write_adapter(tmp_path / str(k), tensors)))
    code = (
        "import resource, sys, torch, spolia\nfrom spolia.runs import merging\ntorch.ones(9) @ torch.ones(9)\n"
        "top = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = top()\n"
        f"spolia.merge({adapters!r}, base={str(folder)!r}, method='task_arithmetic', out={str(tmp_path / 'm')!r}, threads=2)\n"
        "print(top() - before)"
    )
    grown = int(fork(code).communicate()[0])
    assert grown < 100_000  # KiB; the base has 200 000

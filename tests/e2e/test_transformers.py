"""Merged folders open in transformers and compute what a dense merge, written here from the papers, computes."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spolia

pytestmark = pytest.mark.slow

KINDS = ("llama", "llama-tied", "gpt2", "bert", "vit")
State = dict[str, Any]  # tensor name -> fp32 tensor


@pytest.fixture(scope="module")
def pools(make_pool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def pool(kind: str) -> Any:
        if kind not in made:
            name, _, tied = kind.partition("-")
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_pool(name, 3, folder, **({"tied": True} if tied else {}))
        return made[kind]

    return pool


def load(kind: str, folder: Path) -> Any:
    import transformers as hf

    doors = {
        "bert": hf.AutoModelForSequenceClassification,
        "vit": hf.AutoModelForImageClassification,
    }
    model, told = doors.get(kind, hf.AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def logits(kind: str, model: Any) -> Any:
    import torch

    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if kind == "vit":
            return model(pixel_values=torch.randn(2, 1, 8, 8, generator=noise)).logits
        return model(input_ids=torch.randint(0, 100, (2, 12), generator=noise)).logits


def weights(kind: str, folder: Path) -> State:
    """The parameters as transformers loads them; a tied tensor stands once."""
    return {name: p.detach().clone() for name, p in load(kind, folder).named_parameters()}


def average(base: State, experts: list[State]) -> State:
    return {name: sum(e[name].double() for e in experts).div(len(experts)).float() for name in base}


def task_arithmetic(base: State, experts: list[State], scale: float = 0.3) -> State:
    return {n: (b.double() + scale * sum(e[n].double() - b.double() for e in experts)).float() for n, b in base.items()}


def ties(base: State, experts: list[State], density: float = 0.2) -> State:
    """Yadav et al. 2023, algorithm 1, on flattened models: trim by sorting, elect, disjoint mean, lambda 1."""
    import torch

    start = torch.cat([base[name].flatten() for name in base])
    changes = torch.stack([torch.cat([e[name].flatten() for name in base]) - start for e in experts])  # [experts, n]
    size = changes.abs()
    keep = round(density * start.numel())
    threshold = size.sort(dim=1, descending=True).values[:, keep - 1 : keep]
    trimmed = torch.where(size >= threshold, changes, 0).double()
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = trimmed.sign() == sign
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    flat, result, at = (start.double() + merged).float(), {}, 0
    for name, tensor in base.items():
        result[name] = flat[at : at + tensor.numel()].reshape(tensor.shape)
        at += tensor.numel()
    return result


DENSE = {"average": average, "task_arithmetic": task_arithmetic, "ties": ties}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", DENSE)
def test_merged_folder_equals_dense_merge(kind: str, method: str, pools: Any, tmp_path: Path) -> None:
    import torch

    base, experts = pools(kind)
    told = None if method == "average" else base
    out = spolia.merge(experts, base=told, method=method, out=tmp_path / "out")
    assert out == tmp_path / "out"
    model = load(kind, out)

    before = weights(kind, base)
    dense = DENSE[method](before, [weights(kind, e) for e in experts])
    found = dict(model.named_parameters())
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        # weights and changes below 1: a handful of fp32 roundings of 6e-8 each
        torch.testing.assert_close(found[name].detach(), tensor, rtol=0, atol=5e-7, msg=lambda m, n=name: f"{n}: {m}")

    reference = load(kind, base)
    reference.load_state_dict({**reference.state_dict(), **dense}, strict=True)
    if hasattr(reference, "tie_weights"):
        reference.tie_weights()
    merged = logits(kind, model)
    assert torch.isfinite(merged).all()
    # weights differ by 5e-7 at most; a few layers of width 64 carry that to some 1e-5 of logits of size 0.1 to 1
    torch.testing.assert_close(merged, logits(kind, reference), rtol=1e-4, atol=2e-5)
    assert (merged - logits(kind, load(kind, base))).abs().max() > 1e-3  # and it is not the base


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_tying_survives(kind: str, pools: Any, tmp_path: Path) -> None:
    base, experts = pools(kind)
    model = load(kind, spolia.merge(experts, base=base, method="task_arithmetic", out=tmp_path / "out"))
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (kind != "llama")


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_bfloat16_result_is_the_rounded_float32_one(kind: str, make_pool: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base, experts = make_pool(kind, 3, tmp_path / "pool", dtype="bfloat16", max_shard_size="30KB", seed=3)
    # not 0.3: norm weights near 1 change by multiples of 2^-8, and 0.3 * 5 of them end just between two bf16 numbers
    out = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.37}, out=tmp_path / "out")

    def read(folder: Path) -> State:
        return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}

    start, found, trained = read(base), read(out), [read(e) for e in experts]
    assert found.keys() == start.keys()
    total = differing = 0
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        exact = start[name].double() + 0.37 * sum(e[name].double() - start[name].double() for e in trained)
        # one rounding to 8 significant bits: 2^-8 of the value; and fp32's own 1e-6 where terms cancel
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
        total, differing = total + tensor.numel(), differing + int((tensor != exact.bfloat16()).sum())
    assert differing <= total * 1e-3  # only values within fp32's error of the middle between two bf16 numbers
    assert torch.isfinite(logits(kind, load(kind, out)).float()).all()


def test_merging_changes_no_input(pools: Any, tmp_path: Path) -> None:
    base, experts = pools("llama")
    files = [file for folder in (base, *experts) for file in sorted(folder.iterdir())]
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    spolia.merge(experts, base=base, method="ties", out=tmp_path / "out")
    assert before == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_text_from_a_mergekit_recipe(pools: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from spolia.runs.verbs import merge_recipe

    base, experts = pools("llama")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        textwrap.dedent(f"""\
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - model: {experts[0]}
            parameters: {{weight: 0.5}}
          - model: {experts[1]}
            parameters:
              weight:
                - filter: self_attn
                  value: [0.0, 1.0]
                - value: 0.25
        dtype: float32
        tokenizer_source: base
        """)
    )
    out = merge_recipe(recipe, tmp_path / "out")
    model, tokenizer = load("llama", out), AutoTokenizer.from_pretrained(out)

    start, a, b = (weights("llama", folder) for folder in (base, *experts[:2]))
    for name, tensor in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        second = layer / 3 if "self_attn" in name else 0.25  # a gradient over four layers
        dense = (
            start[name].double() + 0.5 * (a[name] - start[name]).double() + second * (b[name] - start[name]).double()
        )
        torch.testing.assert_close(tensor.detach().double(), dense, rtol=0, atol=5e-7)  # fp32 roundings

    prompt = tokenizer("The stones of", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert text.startswith("The stones of")
    reference = load("llama", base)
    reference.load_state_dict(model.state_dict())
    assert torch.equal(tokens, reference.generate(**prompt, max_new_tokens=8, do_sample=False))

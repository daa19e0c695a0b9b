"""Every merge of the catalog on seven architectures: streamed to a folder, in memory, and against dense references."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.catalog import data_free, find

pytestmark = pytest.mark.slow

State = dict[str, torch.Tensor]
MODELS = ("base", "first", "second", "third")
FEW_STEPS = {"wudi": {"steps": 3}}  # 300 are the default; the third is computed as the last is
WORDS, WIDTH, HEADS, LAYERS, HIDDEN = 96, 32, 4, 2, 48
TOWER = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TOKENS = {"vocab_size": WORDS, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEXT, GROUPED = {**TOWER, **TOKENS}, {**TOWER, **TOKENS, "num_key_value_heads": 2}
SIGHT = {**TOWER, "image_size": 8, "patch_size": 4, "num_channels": 3}
T5 = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
ARCHITECTURES: dict[str, Any] = {  # transformers' class, its config's, the config, and the door it is loaded by
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "CausalLM"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, "CausalLM"),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "vocab_size": WORDS}, "Seq2SeqLM"),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, "MaskedLM"),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": SIGHT, "projection_dim": 16}, None),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIGHT, "num_labels": 3}, "ImageClassification"),
    "cnn": None,
}  # fmt: skip


class Case(NamedTuple):
    """A method with as many models as it takes, three experts at most."""

    method: str
    experts: int
    base: bool

    def label(self) -> str:
        return self.method + ("-from-base" if self.base else "")

    def given(self, models: dict[str, Any]) -> dict[str, Any]:
        experts, base = {name: models[name] for name in MODELS[1 : 1 + self.experts]}, models["base"]
        asked = {"method": self.method, "settings": FEW_STEPS.get(self.method)}
        return {"experts": experts, "base": base if self.base else None, **asked}

    def names(self) -> list[str]:
        """The models that take part, whoever lends integers first."""
        return list(MODELS[0 if self.base else 1 : 1 + self.experts])


def cases() -> list[Case]:
    """One case a method, two where the base is optional."""
    found = []
    for method in data_free():
        kind = method.settings_class()
        for base in {"required": [True], "unused": [False], "optional": [False, True]}[kind.base]:
            most = min(3, kind.experts[1] or 3)
            found.append(Case(method.name, most - (base and kind.base_counts), base))
    return found


def cnn() -> torch.nn.Module:
    nn = torch.nn
    norms = [nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)]
    body = [nn.Conv2d(3, WIDTH, 3), norms[0], nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3), norms[1], nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))


def build(kind: str) -> Any:
    """A randomly initialised model; Mistral in bf16, CLIP with position ids as its first releases store them."""
    import transformers as hf

    if kind == "cnn":
        return cnn()
    model, config, told, _ = ARCHITECTURES[kind]
    model = getattr(hf, model)(getattr(hf, config)(**told))
    for tower in (model.text_model.embeddings, model.vision_model.embeddings) if kind == "clip" else ():
        tower.register_buffer("position_ids", tower.position_ids.clone(), persistent=True)
    return model.to(torch.bfloat16) if kind == "mistral" else model


def load(kind: str, folder: Path) -> Any:
    """The folder as its users open it: nothing may be missing, left over or of another shape."""
    import transformers as hf

    if kind == "cnn":
        model = cnn()
        model.load_state_dict(stored(folder), strict=True)
        return model.eval()
    door = ARCHITECTURES[kind][3]
    auto = getattr(hf, f"AutoModelFor{door}") if door else hf.AutoModel
    model, told = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def outputs(kind: str, model: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    words, pixels = torch.randint(3, WORDS, (2, 9), generator=noise), torch.randn(2, 3, 8, 8, generator=noise)
    with torch.no_grad():
        if kind in ("cnn", "vit"):
            found = model(pixels)
            return getattr(found, "logits", found)
        if kind == "clip":
            return model(input_ids=words, pixel_values=pixels).logits_per_image
        return model(input_ids=words, **({"decoder_input_ids": words} if kind == "t5" else {})).logits


def stored(folder: Path) -> State:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def tied(state: State) -> dict[str, str]:
    """Names that share the memory of an earlier one: name -> the first."""
    first: dict[int, str] = {}
    return {name: other for name, t in state.items() if (other := first.setdefault(t.data_ptr(), name)) != name}


def differing(found: State, wanted: State) -> list[str]:
    """Names of tensors of which any bit differs."""

    def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    return [name for name, tensor in found.items() if bits(tensor) != bits(wanted[name])]


class Pool(NamedTuple):
    """A base and three experts, as folders and as state dicts whose tied names share memory."""

    folders: dict[str, Path]
    states: dict[str, State]


def make(kind: str, folder: Path, write_model: Callable[..., Path]) -> Pool:
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
        torch.manual_seed(list(ARCHITECTURES).index(kind))
        model, pool = build(kind), Pool({}, {})
    for k, name in enumerate(MODELS):
        noise = torch.Generator().manual_seed(k)
        with torch.no_grad():
            if k:
                model.load_state_dict(pool.states["base"])
                for parameter in model.parameters():
                    change = 0.02 + 0.02 * torch.randn(parameter.shape, generator=noise)  # at 60 degrees to each other
                    parameter.add_(change.to(parameter.dtype))
            for _ in range(2 + k if kind == "cnn" else 0):  # running statistics and the count of batches
                model.train()(1 + k + torch.randn(8, 3, 8, 8, generator=noise))
        pool.states[name], pool.folders[name] = dict(copy.deepcopy(model.state_dict())), folder / name
        if kind == "cnn":
            write_model(folder / name, pool.states[name], shards=2)
        else:
            model.save_pretrained(folder / name, max_shard_size="20KB", save_original_format=False)
    return pool


@pytest.fixture(scope="module")
def pools(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pool]:
    return functools.cache(lambda kind: make(kind, tmp_path_factory.mktemp(kind), write_model))


def test_the_pools_hold_what_they_are_here_for(pools: Any) -> None:
    for kind in ARCHITECTURES:
        assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in pools(kind).folders.values())
    base = {kind: pools(kind).states["base"] for kind in ARCHITECTURES}
    ties = {"qwen2": 1, "t5": 3, "roberta": 2}  # head; both embeddings and head; head and its bias
    assert all(len(tied(state)) == ties.get(kind, 0) for kind, state in base.items())
    assert {t.dtype for t in base["mistral"].values()} == {torch.bfloat16}
    assert base["mistral"]["model.layers.0.self_attn.k_proj.weight"].shape == (WIDTH // 2, WIDTH)
    assert "model.layers.0.self_attn.k_proj.bias" in base["qwen2"]
    assert base["clip"]["logit_scale"].shape == ()
    assert torch.equal(base["clip"]["text_model.embeddings.position_ids"], torch.arange(32)[None])
    assert [int(state["4.num_batches_tracked"]) for state in pools("cnn").states.values()] == [2, 5, 6, 7]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("case", cases(), ids=Case.label)
def test_streamed_is_in_memory_bit_for_bit_and_loads(kind: str, case: Case, pools: Any, tmp_path: Path) -> None:
    pool = pools(kind)
    out = spolia.merge(**case.given(pool.folders), out=tmp_path / "out", threads=2, max_shard_size=40_000)
    wanted = spolia.merge(**case.given(pool.states), threads=1)
    assert len(list(out.glob("*.safetensors"))) > 1
    found, start = stored(out), stored(pool.folders["base"])
    assert found.keys() == start.keys()  # a tied tensor stands once
    assert wanted.keys() == pool.states["base"].keys()
    assert differing(found, wanted) == []
    assert tied(wanted) == tied(pool.states["base"])
    for name, tensor in found.items():
        assert tensor.dtype == start[name].dtype
        if not tensor.is_floating_point():
            assert torch.equal(tensor, pool.states[case.names()[0]][name]), name  # as the base has it, or the first
    model = load(kind, out)
    assert tied(model.state_dict()) == tied(pool.states["base"])
    assert torch.isfinite(outputs(kind, model)).all()
    if find(case.method).masks() is not None:
        masks = spolia.masks(**case.given(pool.states))
        worn = spolia.attach(out, "first", base=pool.folders["base"], out=tmp_path / "first", threads=2)
        assert differing(stored(worn), spolia.attach(wanted, masks["first"], base=pool.states["base"])) == []


# Dense references: whole tensors, in fp64 but for task vectors. These are taken in fp32 where something is chosen by
# them, for in fp64 two that fp32 rounds to equal sizes would not be equal.


def changes(base: State, experts: list[State], name: str) -> torch.Tensor:
    return torch.stack([(e[name].float() - base[name].float()).double() for e in experts])


def average(base: State | None, experts: list[State]) -> State:
    return {name: torch.stack([e[name].double() for e in experts]).mean(0) for name in experts[0]}


def task_arithmetic(base: State, experts: list[State]) -> State:
    return {n: b.double() + 0.3 * sum(e[n].double() - b.double() for e in experts) for n, b in base.items()}


def ties(base: State, experts: list[State]) -> State:
    """Yadav et al. 2023, algorithm 1: a fifth of the whole model, disjoint mean; cancelled votes go to the majority."""
    flat = torch.cat([changes(base, experts, name).view(len(experts), -1) for name in base], 1)  # [experts, elements]
    keep = round(0.2 * flat.shape[1])
    trimmed = flat * (flat.abs() >= flat.abs().sort(1, descending=True).values[:, keep - 1 : keep])
    votes = trimmed.sum(0).sign()
    votes[votes == 0] = -1.0 if votes.sum() < 0 else 1.0
    agree = trimmed.sign() == votes
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = merged.split([t.numel() for t in base.values()])
    return {name: b.double() + part.view(b.shape) for (name, b), part in zip(base.items(), parts, strict=True)}


def slerp(base: State | None, experts: list[State]) -> State:
    first, second = ([base] if base is not None else []) + experts
    merged = {}
    for name in first:
        a, b = first[name].double(), second[name].double()
        norms = float(a.norm() * b.norm())
        angle = math.acos(min(1.0, float((a * b).sum()) / norms)) if norms else 0.0
        merged[name] = (a + b) * (0.5 if math.cos(angle) > 1 - 1e-9 else math.sin(angle / 2) / math.sin(angle))
    return merged


def model_stock(base: State, experts: list[State]) -> State:
    merged, count = {}, len(experts)
    for name, b in base.items():
        taus = [(e[name].double() - b.double()).flatten() for e in experts]
        pairs = [float(s @ t / (s.norm() * t.norm())) for s, t in itertools.combinations(taus, 2)]
        cosine = max(0.0, sum(pairs) / len(pairs))
        share = count * cosine / (1 + (count - 1) * cosine)
        merged[name] = b.double() + share * (sum(taus) / count).view(b.shape)
    return merged


def magmax(base: State, experts: list[State]) -> State:
    merged = {}
    for name, b in base.items():
        ranked = changes(base, experts, name).sort(0, descending=True).values  # so of equal sizes the positive one
        merged[name] = b.double() + 0.5 * ranked.gather(0, ranked.abs().argmax(0, keepdim=True))[0]
    return merged


DENSE: dict[str, Any] = {f.__name__: f for f in (average, task_arithmetic, ties, slerp, model_stock, magmax)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("case", [case for case in cases() if case.method in DENSE], ids=Case.label)
def test_merged_is_the_dense_reference(kind: str, case: Case, pools: Any) -> None:
    given = {n: {k: t for k, t in stored(f).items() if t.is_floating_point()} for n, f in pools(kind).folders.items()}
    experts = [given[name] for name in MODELS[1 : 1 + case.experts]]
    exact = DENSE[case.method](given["base"] if case.base else None, experts)
    found = spolia.merge(**case.given(given))
    assert found.keys() == exact.keys()
    moved = 0
    for name, tensor in exact.items():
        inputs = torch.stack([given[model][name].double() for model in case.names()])
        # some eight roundings of fp32 at the size of the inputs, then one to the eight digits of bf16
        room = 8 * 2**-24 * inputs.abs().amax(0) + (2**-8 * tensor.abs() if kind == "mistral" else 0)
        error = (found[name].double() - tensor).abs()
        assert (error <= room).all(), f"{name}: off by {float(error.max()):.2e}"
        moved += all(bool(((model - tensor).abs() > room).any()) for model in inputs)
    assert moved >= len(exact) / 2  # and it is none of its inputs


def test_running_statistics_are_averaged(pools: Any, tmp_path: Path) -> None:
    pool, case = pools("cnn"), Case("average", 3, base=False)
    merged = load("cnn", spolia.merge(**case.given(pool.folders), out=tmp_path / "out")).state_dict()
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        each = torch.stack([pool.states[model][name] for model in case.names()])
        torch.testing.assert_close(merged[name], each.mean(0), rtol=5e-7, atol=1e-7)  # fp32's last digit, some times
    assert int(merged["1.num_batches_tracked"]) == 5  # the first expert's: a count is no weight

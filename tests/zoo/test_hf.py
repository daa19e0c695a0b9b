"""Encoders and heads of transformers' classifiers: the parts compute what the whole did, under whatever names files have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.expert import ExpertPool, MemoryWeights
from spolia.parts.surgered import state_of
from spolia.zoo.heads import Cosine, Passing, head_of, slots_of
from spolia.zoo.hf import build, module_names, open_pool
from spolia.zoo.mlp import ResidualMLP

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24, "pad_token_id": 1,
}  # fmt: skip
SIGHT = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT |= {"intermediate_size": 32, "num_channels": 3}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "pad_token_id": 1}
CONV = {"num_channels": 3, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {  # model, config, sizes, modules of the head
    "vit": ("ViTForImageClassification", "ViTConfig", SIGHT, ("classifier",)),
    "clip": (
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": SIGHT, "text_config": TEXT},
        ("classifier",),
    ),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", CONV, ("classifier",)),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, ("classifier",)),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, ("classifier",)),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, ("pre_classifier", "classifier")),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT, ("pooler", "classifier")),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", GPT, ("score",)),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", TEXT, ("score",)),
}


def model_of(kind: str, labels: int, seed: int) -> Any:
    import transformers as hf

    name, config, sizes, _ = CASES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(hf, name)(getattr(hf, config)(**copy.deepcopy(sizes), num_labels=labels)).eval()


def batch_of(kind: str) -> Any:
    noise = torch.Generator().manual_seed(9)
    if kind in ("vit", "clip", "convnext"):
        return torch.randn(3, 3, 8, 8, generator=noise)
    mask = torch.ones(3, 7, dtype=torch.long)
    ids = torch.randint(2, 40, (3, 7), generator=noise)
    mask[1, 5:], ids[1, 5:] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return (model(**batch) if isinstance(batch, dict) else model(batch)).logits


def values(weights: Any) -> dict[str, torch.Tensor]:
    with weights.opened():
        return state_of(weights)


FAST = ("vit", "roberta")


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in CASES])
def test_encoder_and_head_do_what_the_whole_does(kind: str, tmp_path: Path) -> None:
    models = {name: model_of(kind, labels, k) for k, (name, labels) in enumerate((("a", 3), ("b", 5)))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    pool, batch = ExpertPool.of({name: tmp_path / name for name in models}), batch_of(kind)
    state = torch.get_rng_state()
    opened = open_pool(pool, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert opened.slot == CASES[kind][3][0]
    for expert in opened.pool.experts:
        own, whole = values(expert.weights), models[expert.name]
        assert own.keys() == set(opened.network.module.state_dict())
        assert not any(name.startswith(CASES[kind][3]) for name in own)
        with torch.no_grad():
            made = opened.network.logits(expert.name, batch, own)
        torch.testing.assert_close(made, run(whole, batch), rtol=1e-5, atol=1e-5)  # the same products, perhaps in parts
        assert opened.heads[expert.name].keys() == whole.state_dict().keys() - own.keys()


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_file_names_of_older_releases_are_the_modules_own(kind: str, tmp_path: Path) -> None:
    whole = model_of(kind, 3, 0)
    whole.save_pretrained(tmp_path / "a")  # in the original form
    stored = ExpertPool.of({"a": tmp_path / "a"}).experts[0].weights
    names = module_names(whole, stored.entries)
    assert names is not None and names.keys() == whole.state_dict().keys()
    assert set(names.values()) == set(stored.entries)
    for own, tensor in values(
        open_pool(ExpertPool.of({"a": tmp_path / "a"}), batch_of(kind)).pool.experts[0].weights
    ).items():
        assert torch.equal(tensor, whole.state_dict()[own])


def test_a_base_without_head_and_prefix_is_the_same_encoder(tmp_path: Path) -> None:
    whole = model_of("bert", 3, 0)
    whole.save_pretrained(tmp_path / "a")
    whole.bert.save_pretrained(tmp_path / "base")
    opened = open_pool(ExpertPool.of({"a": tmp_path / "a"}, tmp_path / "base"), batch_of("bert"))
    assert opened.pool.base is not None
    base, own = values(opened.pool.base.weights), values(opened.pool.experts[0].weights)
    assert base.keys() == own.keys() and all(torch.equal(base[name], own[name]) for name in own)


@pytest.mark.slow
def test_fused_experts_are_loaded_whole(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)).eval()
    whole.save_pretrained(tmp_path / "a")
    opened = open_pool(ExpertPool.of({"a": tmp_path / "a"}), batch_of("llama"))
    own = values(opened.pool.experts[0].weights)
    with torch.no_grad():
        made = opened.network.logits("a", batch_of("llama"), own)
    torch.testing.assert_close(made, run(whole, batch_of("llama")), rtol=1e-5, atol=1e-5)


def test_a_clip_tower_takes_its_heads_from_files(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"vision_config": SIGHT, "text_config": TEXT, "projection_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = hf.CLIPModel(hf.CLIPConfig(**sizes)).eval()
        texts = torch.randn(4, 12)
    whole.save_pretrained(tmp_path / "a")
    save_file({"weight": texts, "logit_scale": torch.tensor(2.0)}, tmp_path / "head.safetensors")
    opened = open_pool(
        ExpertPool.of({"a": tmp_path / "a"}), batch_of("clip"), None, {"a": tmp_path / "head.safetensors"}
    )
    with torch.no_grad():
        features = whole.get_image_features(pixel_values=batch_of("clip"))
        features = getattr(features, "pooler_output", features)
        made = opened.network.logits("a", batch_of("clip"), values(opened.pool.experts[0].weights))
    wanted = torch.tensor(2.0).exp() * nn.functional.cosine_similarity(features[:, None], texts[None], dim=-1)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def test_models_of_this_package_and_plain_state_dicts(tmp_path: Path) -> None:
    encoder = ResidualMLP(8, 2, generator=torch.Generator().manual_seed(0))
    save_file(encoder.state_dict(), tmp_path / "plain.safetensors")
    heads = {"a.weight": torch.ones(3, 8), "a.bias": torch.zeros(3), "b.weight": torch.zeros(2, 8)}
    save_file(heads, tmp_path / "heads.safetensors")
    pool = ExpertPool.of({"a": tmp_path / "plain.safetensors"})
    with pytest.raises(SpoliaError, match=r"has no config\.json"):
        open_pool(pool, torch.zeros(1, 8))
    files, x = {"a": tmp_path / "heads.safetensors"}, torch.ones(2, 8)
    opened = open_pool(pool, x, None, files, encoder.config())
    with torch.no_grad():
        made = opened.network.logits("a", x, values(opened.pool.experts[0].weights))
        wanted = encoder(x).sum(1, keepdim=True).expand(2, 3)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)  # a sum in another order
    with pytest.raises(SpoliaError, match="holds no head for a"):
        save_file({"other": torch.ones(3)}, tmp_path / "none.safetensors")
        head_of(tmp_path / "none.safetensors", "a")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "no_such"}, "no architecture `no_such`"),
        ({}, "no model_type"),
        ({"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}, "makes no model"),
    ],
)
def test_what_is_no_known_architecture_is_refused(config: dict[str, Any], what: str) -> None:
    with pytest.raises(SpoliaError, match=what):
        build(config, "a")


def test_code_beside_a_model_is_never_run(tmp_path: Path) -> None:
    model_of("bert", 2, 0).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "modeling.py").write_text("raise SystemExit('run')\n")
    weights = ExpertPool.of({"a": tmp_path / "a"}).experts[0].weights
    assert weights.config is not None
    told = {**weights.config, "auto_map": {"AutoModel": "modeling.Own"}}
    assert type(build(told)).__name__ == "BertForSequenceClassification"
    with pytest.raises(SpoliaError, match="code that comes with a model is not run"):
        build({**told, "model_type": "own"}, "a")


def test_heads_are_found_named_or_merged() -> None:
    module = build({"model_type": "bert", "architectures": ["BertForSequenceClassification"], **TEXT})
    same = [{"classifier.weight": (2, 16)}] * 2
    assert slots_of(module, same, None) == ["classifier"]
    assert slots_of(module, same, "merged") == []
    assert slots_of(module, same, ["bert.pooler", "classifier"]) == ["bert.pooler", "classifier"]
    with pytest.raises(SpoliaError, match="did you mean `classifier`"):
        slots_of(module, same, ["classifer"])
    plain = nn.ModuleDict({"body": nn.Linear(4, 4), "last": nn.Linear(4, 2)})
    assert slots_of(plain, [{"last.weight": (2, 4)}, {"last.weight": (3, 4)}], None) == ["last"]
    assert slots_of(plain, [{"last.weight": (2, 4)}] * 2, None) == []


def test_an_expert_without_its_head_is_told(tmp_path: Path) -> None:
    whole = model_of("bert", 3, 0)
    whole.save_pretrained(tmp_path / "a")
    whole.bert.save_pretrained(tmp_path / "b")
    with pytest.raises(SpoliaError, match=r"b: lacks its head's tensor `classifier\.\w+`"):
        open_pool(ExpertPool.of({"a": tmp_path / "a", "b": tmp_path / "b"}), batch_of("bert"))


def test_a_head_that_is_no_chain_is_told() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            return self.left(x) - self.right(x.flip(1))

    from spolia.zoo.heads import part

    with pytest.raises(SpoliaError, match="no chain of modules"):
        part(Forked().eval(), ["left", "right"], torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))


def test_passing_gives_what_a_hook_has_changed() -> None:
    module = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with torch.no_grad():
        assert torch.equal(Passing("0")(module, x), x)
        handle = module[0].register_forward_hook(lambda _m, _i, output: output + 1)
        assert torch.equal(Passing("0")(module, x), x + 1)
        handle.remove()
    assert torch.equal(Cosine(torch.eye(2), torch.tensor(0.0))(torch.tensor([[3.0, 0.0]])), torch.tensor([[1.0, 0.0]]))


def test_state_dicts_in_memory_are_seen_under_the_modules_names() -> None:
    encoder = ResidualMLP(8, 2, generator=torch.Generator().manual_seed(0))
    weights = MemoryWeights(encoder.state_dict())
    assert module_names(encoder, [*weights.entries, "stray"]) == {name: name for name in weights.entries}

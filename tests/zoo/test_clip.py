"""CLIP in a pool: heads as the formula has them, the same logits as transformers, projections merged or frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia.errors import SpoliaError
from spolia.parts.expert import ExpertPool, FileWeights
from spolia.parts.sites import find_sites
from spolia.runs.importing import import_model
from spolia.zoo.clip import (
    ImageTower,
    clip_network,
    heads_state,
    image_tower,
    load_clip,
    published_head,
    text_head,
    tower_in,
)
from spolia.zoo.heads import head_of

SIZE, DIM, VOCABULARY = 8, 12, 32
TOLERANCE = 5e-5  # logits up to exp(2.66) = 14 in fp32, summed in another order
NAMES = ("cat", "dog", "old stone", "wall")


class Words:
    """A tokenizer of letters: begins with 30, ends with 31, filled up with 31 as CLIP's is."""

    def __call__(self, texts: list[str], **asked: Any) -> dict[str, Tensor]:
        assert asked["padding"] and asked["truncation"] and asked["return_tensors"] == "pt"
        rows = [[30, *[ord(c) % 29 for c in text[: asked["max_length"] - 2]], 31] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [31] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_clip(0)


def tiny_clip(seed: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    block = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 24, "bos_token_id": 30, "eos_token_id": 31}
    sight = {"image_size": SIZE, "patch_size": 4, "projection_dim": DIM}
    config = CLIPConfig(
        text_config=block | text | {"projection_dim": DIM}, vision_config=block | sight, projection_dim=DIM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
            made.logit_scale.fill_(2.6592)
    return made


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_one_template_gives_the_logits_of_transformers(clip: Any) -> None:
    head, batch = text_head(clip, Words(), NAMES, ["a {}"]), pictures(5)
    network = clip_network(image_tower(clip), {"task": head})
    tokens = Words()([f"a {name}" for name in NAMES], padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        whole = clip(pixel_values=batch, **tokens)
        assert (network.logits("task", batch) - whole.logits_per_image).abs().max() < TOLERANCE


def test_many_templates_are_averaged_on_the_sphere(clip: Any) -> None:
    """Against the formula, one text at a time: normalise, mean, normalise, times exp(logit scale)."""
    templates = ["a {}", "the picture of {} here", "{}"]
    rows = []
    for name in NAMES:
        alone = []
        for template in templates:
            tokens = Words()(
                [template.replace("{}", name)], padding=1, truncation=1, max_length=24, return_tensors="pt"
            )
            with torch.no_grad():
                found = clip.text_projection(clip.text_model(**tokens).pooler_output)[0].double()
            alone.append(found / found.norm())
        mean = torch.stack(alone).mean(0)
        rows.append(mean / mean.norm() * clip.logit_scale.detach().double().exp())
    head = text_head(clip, Words(), NAMES, templates)
    features = torch.randn(6, DIM, generator=torch.Generator().manual_seed(2))
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    assert (head(features) - unit @ torch.stack(rows).T).abs().max() < TOLERANCE
    assert torch.allclose(head(7 * features), head(features), atol=TOLERANCE)  # only directions count
    assert not any(p.requires_grad for p in head.parameters())


def test_texts_go_through_in_parts(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text_head(clip, Words(), NAMES, ["a {}", "{}!"])
    monkeypatch.setattr("spolia.zoo.clip.TEXTS", 3)
    assert torch.allclose(
        text_head(clip, Words(), NAMES, ["a {}", "{}!"]).weight, whole.weight, atol=1e-6
    )  # fp32 rounding


@pytest.mark.parametrize(
    ("classes", "templates"), [((), ["{}"]), (NAMES, []), (NAMES, ["no place"]), (NAMES, ["{} {}"])]
)
def test_prompts_that_make_no_head(clip: Any, classes: Any, templates: Any) -> None:
    with pytest.raises(SpoliaError) as caught:
        text_head(clip, Words(), classes, templates, "dtd")
    assert caught.value.problems[0].where == "dtd" and caught.value.problems[0].mend


def test_a_published_head_is_the_head_it_was(clip: Any, tmp_path: Path) -> None:
    head = text_head(clip, Words(), NAMES, ["a {}"])
    folded = head.weight * head.logit_scale.exp()  # as the papers store it
    features = torch.randn(6, DIM, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(published_head(folded)(features), head(features), atol=TOLERANCE)
    with pytest.raises(SpoliaError, match="differ in length"):
        published_head(folded * torch.tensor([[1.0], [1.0], [1.01], [1.0]]))
    with pytest.raises(SpoliaError):
        published_head(torch.zeros(2, 3))
    from safetensors.torch import save_file

    save_file(heads_state({"pets": head}), tmp_path / "heads.safetensors")
    again = head_of(tmp_path / "heads.safetensors", "pets")
    assert torch.allclose(again(features), head(features), atol=TOLERANCE)  # rows are set to length 1 once more


def test_projection_merged_or_frozen(clip: Any) -> None:
    merged, frozen = image_tower(clip), image_tower(clip, "frozen")
    batch = pictures(3)
    assert torch.allclose(merged(batch), frozen(batch), atol=1e-5)  # x @ W.T in two ways, features of size 1
    assert merged.state_dict().keys() - frozen.state_dict().keys() == {"visual_projection.weight"}
    network = clip_network(frozen, {})
    weights = {name: (t * 1.5).requires_grad_() for name, t in frozen.state_dict().items()}
    network.features(batch, weights).sum().backward()
    assert all(t.grad is not None for t in weights.values())
    assert torch.equal(network.features(batch), frozen(batch))  # the module is as it was
    plain = ImageTower(frozen.vision_model)
    assert plain(batch).shape == (3, 16)  # without a projection the width itself
    for tower in (merged, frozen):  # the base is not touched by what is done to its copy
        assert tower.vision_model is not clip.vision_model


def test_blocks_are_found_for_deep_surgery(clip: Any) -> None:
    network = clip_network(image_tower(clip), {"a": nn.Identity()})
    names = [site.name for site in find_sites(network, pictures(2), "blocks")]
    assert names == ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1", ""]


@pytest.mark.slow
def test_towers_from_folders(clip: Any, tmp_path: Path) -> None:
    batch = pictures(3)
    clip.save_pretrained(tmp_path / "whole")
    clip.vision_model.save_pretrained(tmp_path / "tower")
    wanted = image_tower(clip)(batch)
    assert torch.allclose(tower_in(tmp_path / "whole")(batch), wanted, atol=1e-6)  # fp32 rounding
    frozen = tower_in(tmp_path / "tower", clip.visual_projection.weight)
    assert torch.allclose(frozen(batch), wanted, atol=1e-5)
    import_model(tmp_path / "tower", tmp_path / "imported")
    assert set(frozen.state_dict()) == set(FileWeights.open(tmp_path / "imported").entries)  # a pool of these fits it
    with pytest.raises(SpoliaError, match=r"config\.json"):
        (tmp_path / "tower" / "config.json").unlink()
        tower_in(tmp_path / "tower")
    with pytest.raises(SpoliaError, match="can make heads"):
        load_clip(tmp_path / "tower")


@pytest.mark.slow
def test_a_pool_of_towers_merges_learns_and_is_repaired(clip: Any, tmp_path: Path) -> None:
    """Experts are the base with noise on it: their mean is merged, AdaMerging runs, surgery attaches."""
    heads = {name: text_head(clip, Words(), NAMES, [f"{name} {{}}"]) for name in ("a", "b")}
    network = clip_network(image_tower(clip), heads)
    base = {name: t.clone() for name, t in network.module.state_dict().items()}
    draws = torch.Generator().manual_seed(3)
    experts = {n: {k: t + 0.05 * torch.randn(t.shape, generator=draws) for k, t in base.items()} for n in heads}
    unlabelled = {name: pictures(24, seed) for seed, name in enumerate(heads)}
    mean = spolia.merge(experts, method="average")
    assert torch.allclose(
        mean["visual_projection.weight"], sum(e["visual_projection.weight"] for e in experts.values()) / 2
    )
    learned = spolia.merge(
        experts, base=base, method="adamerging", settings={"steps": 3}, network=network, unlabelled=unlabelled
    )
    assert set(learned.weights) == set(base) and ExpertPool.of(experts, base).base is not None
    repaired = spolia.surgery(
        learned, experts, network=network, unlabelled=unlabelled, settings={"solver": "closed_form"}, seed=0
    )
    assert repaired(pictures(2), "a").shape == (2, len(NAMES))

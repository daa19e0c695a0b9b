"""Adapters on real architectures: nothing changes at the start; what was saved is attached, works alike, and comes off."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.fitting import identity, prepare
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.bottleneck import Adapters, fingerprint
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network, outputs_of
from spolia.parts.surgered import SurgeredModel

TASKS = ("a", "b")
COUNT = 12


class SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (1, 4, 6)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in itertools.pairwise(widths)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x).mean((2, 3))


def build(kind: str) -> tuple[nn.Module, Any]:
    """A module and COUNT inputs."""
    import transformers as hf

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    pixels = torch.randn(COUNT, 1, 8, 8)
    if kind == "cnn":
        return SmallCNN(), pixels
    if kind == "vit":
        return hf.ViTModel(hf.ViTConfig(**size, **image)), {"pixel_values": pixels}
    if kind == "clip":
        config = hf.CLIPVisionConfig(**size, **image, projection_dim=12)
        return hf.CLIPVisionModelWithProjection(config), {"pixel_values": pixels}
    ids = torch.randint(0, 30, (COUNT, 6))
    mask = torch.arange(6) < torch.randint(3, 7, (COUNT, 1))
    return hf.BertModel(hf.BertConfig(**size, vocab_size=30)), {"input_ids": ids, "attention_mask": mask.long()}


class Setup:
    def __init__(self, kind: str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module, self.inputs = build(kind)
            self.module.eval()
            start = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
            self.experts = {
                task: {n: t + 0.1 * torch.randn(t.shape) if t.is_floating_point() else t for n, t in start.items()}
                for task in TASKS
            }
            for state in self.experts.values():
                for name in state:
                    if name.endswith("running_var"):
                        state[name] = state[name].abs()
        pairs = zip(*(state.items() for state in self.experts.values()), strict=True)
        self.merged = {a[0]: (a[1] + b[1]) / 2 if a[1].is_floating_point() else a[1] for a, b in pairs}
        self.pool = ExpertPool.of(self.experts)
        self.network = Network(self.module)
        self.unlabelled = dict.fromkeys(TASKS, self.inputs)

    def fit(self, **settings: Any) -> SurgeredModel:
        fit = Deep(**{"steps": 3, "rank": 3, "batch": 4} | settings)
        return deep(self.merged, self.pool, self.network, self.unlabelled, fit)

    def fresh(self) -> nn.Module:
        """The merged model as a user would load it."""
        return self.network.loaded(self.merged)


@pytest.fixture(scope="module", params=["cnn", "vit", "clip", "bert"])
def setup(request) -> Setup:
    return Setup(request.param)


@pytest.mark.slow
def test_new_adapters_change_no_bit(setup: Setup) -> None:
    settings = Deep(rank=3)
    work = prepare(setup.merged, setup.pool, setup.network, setup.unlabelled, settings, "blocks")
    model = SurgeredModel(work.body, identity(work, settings, 0, "deep"))
    plain = setup.network.features(setup.inputs, setup.merged)
    assert len(work.sites) == 3
    assert torch.equal(model(setup.inputs, "a"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["adam_l1", "closed_form"])
def test_saved_attached_and_taken_off(setup: Setup, tmp_path, solver: str) -> None:
    model = setup.fit(solver=solver)
    file = model.adapters.save(tmp_path / "adapters.safetensors")
    loaded = setup.fresh()
    plain = outputs_of(loaded, setup.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same weights: no word of others
        attached = Adapters.load(file).attach(loaded, "a")
    for task in TASKS:
        attached.task = task
        assert torch.equal(outputs_of(loaded, setup.inputs), model(setup.inputs, task))
        assert not torch.equal(model(setup.inputs, task), plain)
    attached.detach()
    assert torch.equal(outputs_of(loaded, setup.inputs), plain)
    with Adapters.load(file).attach(loaded, "b"):
        assert torch.equal(outputs_of(loaded, setup.inputs), model(setup.inputs, "b"))
    assert torch.equal(outputs_of(loaded, setup.inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["mean", "cls", "all_tokens"])
def test_every_match_brings_the_final_feature_nearer(setup: Setup, match: str) -> None:
    model = setup.fit(solver="closed_form", match=match, ridge=1e-3)
    for task in TASKS:
        last = model.facts["bias"][task][-1]
        assert last["after"] < 0.9 * last["before"]  # 12 inputs, features as wide: nearly an exact fit


@pytest.mark.slow
def test_padding_does_not_count() -> None:
    """Tokens that the mask leaves out may hold anything: a fit sees nothing of them."""
    setup = Setup("bert")
    other = dict(setup.inputs)
    other["input_ids"] = torch.where(other["attention_mask"].bool(), other["input_ids"], 7)
    for solver in ("adam_l1", "closed_form"):
        for match in ("mean", "all_tokens"):
            settings = Deep(steps=2, rank=3, batch=4, solver=solver, match=match)
            one, two = (
                deep(setup.merged, setup.pool, setup.network, dict.fromkeys(TASKS, inputs), settings)
                for inputs in (setup.inputs, other)
            )
            for p, q in zip(one.adapters.parameters(), two.adapters.parameters(), strict=True):
                assert torch.equal(p, q)


@pytest.mark.slow
def test_a_classifier_is_repaired_inside_by_naming_its_feature() -> None:
    """`last` names a module, so the head after it sees the repaired feature, here and where adapters are attached."""
    import transformers as hf

    setup = Setup("vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = hf.ViTForImageClassification(setup.module.config)
    base = dict(module.state_dict())
    experts = {t: {n: x + 0.1 * torch.ones_like(x) * k for n, x in base.items()} for k, t in enumerate(TASKS)}
    pool, network = ExpertPool.of(experts), Network(module)
    model = surgery(experts["b"], pool, network, setup.unlabelled, Surgery(solver="closed_form", last="vit.layernorm"))
    assert [site.label for site in model.adapters.sites] == ["vit.layernorm"]
    loaded = network.loaded(experts["b"])
    with model.adapters.attach(loaded, "a"):
        assert torch.equal(loaded(**setup.inputs).logits, model(setup.inputs, "a"))
    before, after = ((network.features(setup.inputs, experts["a"]) - x).abs().mean() for x in (
        network.features(setup.inputs, experts["b"]), model(setup.inputs, "a")
    ))  # fmt: skip
    assert after < before


# --- files -----------------------------------------------------------------------------------------------------------


def small() -> Setup:
    return Setup("cnn")


@pytest.mark.slow
def test_the_file_says_what_it_holds(tmp_path) -> None:
    model = small().fit(protocol="transductive")
    file = model.adapters.save(tmp_path / "deep" / "adapters.safetensors")
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["about"])
    assert about["tasks"] == ["a", "b"] and about["ranks"] == [3, 3, 3] and not about["linear"]
    assert [(s["name"], s["width"], s["axis"]) for s in about["sites"]] == [
        ("stages.0", 4, 1), ("stages.1", 6, 1), ("", 6, -1),
    ]  # fmt: skip
    assert about["facts"]["protocol"] == "transductive"
    assert about["fingerprint"] == fingerprint(model.body.state_dict())
    assert [path.name for path in file.parent.iterdir()] == ["adapters.safetensors"], "no half-written file is left"
    again = Adapters.load(file)
    assert again.facts == model.facts and again.sites == model.adapters.sites
    assert torch.equal(again.centroids, model.adapters.centroids)


def test_a_copy_in_bfloat16_is_the_same_model_and_others_are_not() -> None:
    setup = small()
    state = setup.fresh().state_dict()
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    assert fingerprint(half) == fingerprint(state)
    assert fingerprint(setup.experts["a"]) != fingerprint(state)
    with pytest.warns(SpoliaWarning, match="other merged weights"):
        setup.fit(steps=1).adapters.attach(setup.network.loaded(setup.experts["a"]), "a").detach()


def test_half_precision_models_stay_so() -> None:
    setup = small()
    model, loaded = setup.fit(), setup.fresh().bfloat16()
    with model.adapters.attach(loaded, "a"):
        made = loaded(setup.inputs.bfloat16())
    assert made.dtype == torch.bfloat16
    # three layers, each rounded to eight bits
    torch.testing.assert_close(made.float(), model(setup.inputs, "a"), rtol=0.1, atol=0.05)


def test_what_is_no_adapter_file_is_told(tmp_path) -> None:
    (tmp_path / "text").write_text("no")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, word in (("text", "cannot be read"), ("gone", "cannot be read"), ("other.safetensors", "no adapters")):
        with pytest.raises(SpoliaError, match=word):
            Adapters.load(tmp_path / name)
    setup = small()
    adapters = setup.fit(steps=1).adapters
    with pytest.raises(SpoliaError, match=r"no module `stages.0`"):
        adapters.attach(nn.Linear(2, 2), "a")
    with pytest.raises(SpoliaError, match="no task is named"):
        adapters.attach(setup.fresh())

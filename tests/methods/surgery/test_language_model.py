"""AdaMerging and surgery where every token has an answer: a small Llama with tied words, random weights, no downloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spolia import Adapters, Examples, ExpertPool, Network
from spolia.methods.merge.adamerging import AdaMerging, adamerging
from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.surgery import Surgery, surgery

pytestmark = pytest.mark.slow  # the import of transformers
State = dict[str, Tensor]
TASKS = ("a", "b")


@dataclass
class Words:
    """A base, two experts and 20 windows of 12 tokens a task. Tied words stand in the weights once, as in files."""

    module: Any
    base: State
    experts: dict[str, State]
    inputs: dict[str, Tensor]

    @property
    def merged(self) -> State:
        return {name: torch.stack([e[name] for e in self.experts.values()]).mean(0) for name in self.base}

    def logits(self, weights: State, ids: Tensor) -> Tensor:
        full = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
        with torch.no_grad():
            return torch.func.functional_call(self.module, full, (ids,)).logits


@pytest.fixture(scope="module")
def words() -> Words:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "use_cache": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
        state = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
        base = {name: tensor * 8 if tensor.dim() > 1 else tensor for name, tensor in state.items()}  # away from uniform
        experts = {t: {n: x + 0.1 * torch.randn_like(x) for n, x in base.items()} for t in TASKS}
        inputs = {task: torch.randint(40, (20, 12)) for task in TASKS}
    return Words(module, base, experts, inputs)


def test_agreement_and_divergence_count_tokens(words: Words) -> None:
    pool = ExpertPool.of(words.experts, words.base)
    settings = AdaMerging(steps=1, guard="divergence", held_out=0.25)
    learned = adamerging(pool, Network(words.module), words.inputs, settings)
    start = {n: words.base[n] + 0.3 * sum(e[n] - words.base[n] for e in words.experts.values()) for n in words.base}
    for task in TASKS:
        held = Examples(words.inputs[task], name=task).split(0.25, 0)[1]
        ids = held.batch(range(len(held)))
        ours, theirs = words.logits(start, ids), words.logits(words.experts[task], ids)
        seen = learned.facts["start"]["tasks"][task]
        # a token in 60 may stand between two answers; its logits differ by fp32 sums in another order
        agreeing = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        assert seen["agreement"] == pytest.approx(float(agreeing), abs=1.5 / ids.numel())
        kl = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1).mean()
        assert seen["divergence"] == pytest.approx(float(kl), rel=1e-3)
    assert learned.weights.keys() == words.base.keys() and not learned.facts["no gradient"]


def test_surgery_repairs_every_token_and_goes_onto_the_loaded_model(words: Words, tmp_path: Any) -> None:
    pool, network = ExpertPool.of(words.experts), Network(words.module)
    plain = {t: words.logits(words.merged, x) for t, x in words.inputs.items()}
    theirs = {t: words.logits(words.experts[t], x) for t, x in words.inputs.items()}
    fits = [
        surgery(words.merged, pool, network, words.inputs, Surgery(solver="closed_form")),
        deep(words.merged, pool, network, words.inputs, Deep(solver="closed_form", match="all_tokens")),
    ]
    for model in fits:
        for task, ids in words.inputs.items():
            with torch.no_grad():
                repaired = model(ids, task)
            assert repaired.shape == plain[task].shape == (20, 12, 40)
            # 240 tokens for a map of 40 to 16: what is left is far less than what there was
            assert float((repaired - theirs[task]).norm()) < 0.8 * float((plain[task] - theirs[task]).norm())
    assert [site.label for site in fits[1].adapters.sites] == ["model.layers.0", "model.layers.1", "features"]
    file = fits[1].adapters.save(tmp_path / "adapters.safetensors")
    loaded = network.loaded(words.merged | {"lm_head.weight": words.merged["model.embed_tokens.weight"]})
    with Adapters.load(file).attach(loaded, "b"), torch.no_grad():
        assert torch.equal(loaded(words.inputs["b"]).logits, fits[1](words.inputs["b"], "b"))

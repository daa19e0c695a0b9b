from __future__ import annotations

import pytest
import torch

from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.errors import SpoliaError
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.methods.link.processor import ChannelProcessor
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.channel import Channel
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import permuted_labels

COUNT, BPSK = 40, constellation("bpsk")


class Letters:
    size, fingerprint = COUNT, "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 0x4E00 for c in text]

    def decode(self, tokens) -> str:
        return "".join(chr(0x4E00 + int(t)) for t in tokens)


def model_of(kind: str) -> torch.nn.Module:
    """50 rows of logits, of which 3 … 42 are tokens; bos 0, eos 1, pad 2."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 24, "max_position_embeddings": 32}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, **ends)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **more, **ends))
    else:
        config = transformers.Qwen2Config(**shape, **more, **ends, num_key_value_heads=1)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_beam_search_of_transformers_reads_what_ours_does(kind):
    """Two frames under one context, 4 beams: the same tokens and the same scores."""
    model, length, ids = model_of(kind), 8, list(range(3, 43))
    code = TextCode(Letters(), permuted_labels(COUNT, generator(0, "labels")), check_bits=0)
    prior = CausalPrior(model, tokens=ids)
    tokens = torch.randint(0, COUNT, (3, length), generator=torch.Generator().manual_seed(1))
    for beams in (1, 4):
        link = llm_sc(prior, code, BPSK, LLMSC(beam=beams))
        received = Channel().transmit(link.send(tokens), n0_of(0.0), generator(0, "noise"))
        ours = link.receive(received, length, [[5, 6]] * 3)
        scores = code.labels.scores(code.heard(received.llrs(BPSK).float(), length).labels)
        start = torch.tensor([[0, ids[5], ids[6]]] * 3)
        processor = ChannelProcessor(scores, prompt=3, tokens=ids)
        found = model.generate(
            start, num_beams=beams, logits_processor=[processor], **processor.arguments,
            attention_mask=torch.ones_like(start), return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert torch.equal(found.sequences[:, 3:], prior.ids(ours.best))
        if beams > 1:
            # fp32 logits of size 10 over eight places
            torch.testing.assert_close(found.sequences_scores, ours.scores[:, 0], rtol=0, atol=1e-3)


def test_scores_are_log_probabilities_given_the_tokens_plus_what_was_heard():
    heard, ids = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), [1, 2, 5, 6]
    processor = ChannelProcessor(heard, prompt=2, tokens=ids, lm_weight=0.5)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))  # two texts, two beams
    found = processor(torch.zeros(4, 3, dtype=torch.long), logits.log_softmax(-1))
    expected = 0.5 * logits[:, ids].log_softmax(-1) + heard[:, 1].repeat_interleave(2, 0)
    torch.testing.assert_close(found[:, ids], expected)
    assert torch.isinf(found[:, [0, 3, 4, 7]]).all()


def test_what_does_not_fit_is_refused():
    processor = ChannelProcessor(torch.zeros(3, 4), prompt=2)  # one text
    with pytest.raises(SpoliaError, match="position 4 of 3"):
        processor(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 4))
    with pytest.raises(SpoliaError, match="scores are"):
        ChannelProcessor(torch.zeros(4), prompt=0)

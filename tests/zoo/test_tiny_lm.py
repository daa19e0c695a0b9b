from __future__ import annotations

import math

import pytest
import torch

from spolia.errors import SpoliaError
from spolia.zoo.tiny_lm import TinyLM


def build(seed: int = 0, depth: int = 2) -> TinyLM:
    return TinyLM(30, 12, 16, depth, 2, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 30, (count, length), generator=torch.Generator().manual_seed(1))


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_logits_have_the_shape_said_and_start_near_even():
    model, ids = build(), tokens(3, 12)
    logits = model(ids)
    assert logits.shape == (3, 12, 30)
    # normed states of 16 numbers times rows of deviation 0.02: logits of 0.08, a token's own 0.2 higher
    log_p = logits.detach().log_softmax(-1)
    assert (log_p + math.log(30)).abs().max() < 0.5


def test_no_position_sees_what_follows():
    model, ids = build(), tokens(2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 30
    one, other = model(ids), model(changed)
    # the same products, perhaps in another order: fp32 at logits of size 0.1
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=1e-6)
    assert all((one[:, i] - other[:, i]).abs().max() > 1e-4 for i in range(7, 12))
    torch.testing.assert_close(model(ids[:, :5]), one[:, :5], rtol=0, atol=1e-6)


def test_attention_is_softmax_over_what_came_before():
    """One block against the sum written out, in fp64."""
    model = build(depth=1).double()
    block, ids = model.blocks[0], tokens(1, 5)
    x = model.embed(ids) + model.positions.weight[:5]
    q, k, v = (part.view(5, 2, 8) for part in block.qkv(block.norm1(x))[0].chunk(3, -1))
    mixed = torch.zeros(5, 2, 8, dtype=torch.float64)
    for i in range(5):
        for h in range(2):
            weight = torch.stack([q[i, h] @ k[j, h] / math.sqrt(8) for j in range(i + 1)]).softmax(0)
            mixed[i, h] = (weight[:, None] * v[: i + 1, h]).sum(0)
    y = x + block.proj(mixed.view(1, 5, 16))
    y = y + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(y))))
    torch.testing.assert_close(model(ids), model.norm(y) @ model.embed.weight.T, rtol=1e-12, atol=1e-12)


def test_the_embedding_is_the_output_matrix_too():
    model = build()
    assert [n for n, p in model.named_parameters() if 30 in p.shape] == ["embed.weight"]
    assert model.config() == {
        "model_type": "spolia_tiny_lm", "hidden_size": 16, "vocab_size": 30, "max_position_embeddings": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpoliaError, match="a sequence of 13 tokens, for a context of 12"):
        build()(tokens(1, 13))
    with pytest.raises(SpoliaError, match="a width of 16 does not part into 3 heads"):
        TinyLM(30, 12, 16, 1, 3, generator=torch.Generator())

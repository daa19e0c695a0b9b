from __future__ import annotations

import torch

from spolia.zoo.mlp import ResidualMLP, heads


def build(seed: int) -> ResidualMLP:
    return ResidualMLP(16, 2, generator=torch.Generator().manual_seed(seed))


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)
    bound = 1 / 4  # 1 / sqrt(16)
    assert all(0.5 * bound < layer.weight.abs().max() <= bound for layer in one.layers)


def test_blocks_are_residual():
    encoder = build(0)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for norm in encoder.norms:
            norm.weight.zero_()  # gelu(norm(...)) = gelu(0) = 0: only the shortcut is left
        assert torch.equal(encoder(x), x)
        encoder.norms[1].bias.fill_(1.0)
        shift = torch.nn.functional.gelu(torch.tensor(1.0))
        assert torch.equal(encoder(x), x + shift)


def test_heads_are_apart_and_named():
    made = heads(["a", "b"], 16, 3, generator=torch.Generator().manual_seed(0))
    assert {name: tuple(t.shape) for name, t in made.state_dict().items()} == {
        "a.weight": (3, 16), "a.bias": (3,), "b.weight": (3, 16), "b.bias": (3,),
    }  # fmt: skip
    assert not torch.equal(made["a"].weight, made["b"].weight)


def test_config_names_the_model():
    assert build(0).config() == {"model_type": "spolia_mlp", "width": 16, "depth": 2}


def test_the_state_after_every_block_can_be_hooked():
    encoder, seen = build(0), []
    assert [name for name in encoder.state_dict() if name.startswith("blocks")] == [], "places, no weights"
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, state: seen.append(state) or 2 * state)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    made = encoder(x)
    assert torch.equal(made, 2 * seen[1])
    first = x + torch.nn.functional.gelu(encoder.norms[0](encoder.layers[0](x)))
    assert torch.equal(seen[0], first)

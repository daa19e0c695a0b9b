"""Prompts enter a frozen transformer as they would by hand, whatever its architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spolia.core.attention import Prefixed
from spolia.errors import SpoliaError
from spolia.parts.encoder import Encoder, Prompts, mean_token
from spolia.zoo.vit import ViT

WIDTH = 16


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vit(pool: str = "token") -> ViT:
    return ViT(8, 4, WIDTH, 3, 2, pool=pool, generator=draws())  # type: ignore[arg-type]


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=draws(1))


def prompt(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=draws(2))


def embedded(module: ViT, x: Tensor) -> Tensor:
    h = module.patch_embed(x)
    return torch.cat([module.cls_token.expand(len(x), -1, -1), h], 1) + module.pos_embed


def test_nothing_put_in_is_the_module_itself() -> None:
    module, x = vit(), images()
    assert torch.equal(Encoder(module).features(x), module(x))


def test_deep_tokens_enter_their_block_and_are_left_behind() -> None:
    module, x, p = vit(), images(), prompt(2)
    h = embedded(module, x)
    for place, block in enumerate(module.blocks):
        n = h.shape[1]
        h = block(torch.cat([h, p.expand(3, -1, -1)], 1))[:, :n] if place in (0, 2) else block(h)
    by_hand = module.norm(h)[:, 0]
    torch.testing.assert_close(Encoder(module).features(x, Prompts(tokens={0: p, 2: p})), by_hand)


def test_a_start_goes_along_to_the_last_block() -> None:
    module, x, p = vit(), images(), prompt(3, 2)  # each input its own
    h = torch.cat([embedded(module, x), p], 1)
    for block in module.blocks:
        h = block(h)
    torch.testing.assert_close(Encoder(module).features(x, Prompts(start=p)), module.norm(h)[:, 0])


def test_a_mean_over_tokens_does_not_see_prompts() -> None:
    module = vit("mean")
    seen: list[int] = []
    module.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    Encoder(module).features(images(), Prompts(start=prompt(2), tokens={1: prompt(3)}))
    assert seen == [4]  # patches alone


def test_prefixes_are_keys_and_values_by_hand() -> None:
    module, x = vit(), images()
    keys, values = prompt(2), torch.randn(3, 2, WIDTH, generator=draws(3))
    h = embedded(module, x)
    for place, block in enumerate(module.blocks):
        inner = block.norm1(h)
        if place == 1:
            n, t, d = inner.shape
            q, k, v = (part.unflatten(2, (2, d // 2)).transpose(1, 2) for part in block.attn.qkv(inner).chunk(3, 2))
            more = [p.expand(n, -1, -1).unflatten(2, (2, d // 2)).transpose(1, 2) for p in (keys, values)]
            weights = (q @ torch.cat([more[0], k], 2).mT / (d // 2) ** 0.5).softmax(-1)
            made = (weights @ torch.cat([more[1], v], 2)).transpose(1, 2).reshape(n, t, d)
            h = h + block.attn.proj(made)
        else:
            h = h + block.attn(inner)
        h = h + block.mlp(block.norm2(h))
    found = Encoder(module).features(x, Prompts(prefixes={1: (keys, values)}))
    torch.testing.assert_close(found, module.norm(h)[:, 0])


@pytest.mark.slow
def test_gradients_reach_prompts_and_agree_with_differences() -> None:
    module, x = vit().double(), images(2).double()
    encoder, w = Encoder(module), torch.randn(WIDTH, generator=draws(4)).double()

    def value(start: Tensor, deep: Tensor, keys: Tensor) -> Tensor:
        # through the double forward: features() returns fp32, whose differences would be noise
        with encoder._prompted(Prompts(start=start, tokens={1: deep}, prefixes={2: (keys, keys)})):
            return module(x) @ w

    given = [prompt(1).double().requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(value, given)
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    module, x = vit(), images()
    encoder, before = Encoder(module), module(x)
    with pytest.raises(RuntimeError):
        encoder.features(x, Prompts(tokens={0: torch.randn(2, WIDTH + 1)}))
    assert torch.equal(module(x), before)
    assert all(not block._forward_pre_hooks and not block._forward_hooks for block in module.blocks)


def test_what_does_not_fit_is_told() -> None:
    encoder = Encoder(vit())
    assert (encoder.depth, encoder.width) == (3, WIDTH)
    with pytest.raises(SpoliaError, match="block 5 of 3"):
        encoder.features(images(), Prompts(tokens={5: prompt(1)}))
    with pytest.raises(SpoliaError, match="no list of equal blocks"):
        Encoder(nn.Linear(3, 3))

    class Slow(nn.Module):
        """An attention that is not torch's."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.norm(x))

    plain = Encoder(nn.Sequential(nn.Sequential(Slow(), Slow())))
    with pytest.raises(SpoliaError, match="prefixes reached 0 of 1"):
        plain.features(torch.randn(2, 4, WIDTH), Prompts(prefixes={0: (prompt(1), prompt(1))}))


def test_a_mark_changes_with_any_weight() -> None:
    one, other = Encoder(vit()), Encoder(vit())
    assert one.mark() == other.mark()
    with torch.no_grad():
        other.module.norm.bias[0] += 1e-6  # type: ignore[union-attr, operator]
    assert one.mark() != other.mark()


def test_masks_let_prefixes_be_seen() -> None:
    q = torch.randn(1, 2, 3, 4, generator=draws())
    for mask in (torch.tensor([True, True, False]), torch.tensor([0.0, 0.0, -1e9])):
        with Prefixed() as inside:
            inside.now = (torch.zeros(1, 8), torch.ones(1, 8))
            found = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.expand(1, 1, 3, 3))
        keys = torch.cat([torch.zeros(1, 2, 1, 4), q[:, :, :2]], 2)
        values = torch.cat([torch.ones(1, 2, 1, 4), q[:, :, :2]], 2)
        torch.testing.assert_close(found, (q @ keys.mT / 2).softmax(-1) @ values)


# --- architectures of others -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_encoder_hides_padding_from_prompts_too() -> None:
    hf = pytest.importorskip("transformers")
    from spolia.zoo.encoders import encoder_of

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=30, max_position_embeddings=16, **sizes))
    ids, mask = torch.randint(3, 30, (2, 6), generator=draws()), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    longer = {"input_ids": ids, "attention_mask": mask}
    alone = {"input_ids": ids[:1, :4], "attention_mask": mask[:1, :4]}
    kinds = (Prompts(), Prompts(tokens={0: prompt(2), 1: prompt(1)}), Prompts(start=prompt(2)))
    for pool in ("first", "mean"):
        encoder = encoder_of(bert, pool=pool)  # type: ignore[arg-type]
        assert encoder.module is bert.bert
        for prompts in (*kinds, Prompts(prefixes={1: (prompt(2), prompt(2))})):
            found = encoder.features(longer, prompts)[:1]
            torch.testing.assert_close(
                found, encoder.features(alone, prompts), rtol=1e-4, atol=1e-5
            )  # fp32, other shapes
    assert torch.equal(mean_token(bert.bert, alone), bert.bert(**alone).last_hidden_state.mean(1))

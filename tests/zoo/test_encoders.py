"""Encoders from names, folders and others' modules."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from spolia.core.checkpoint import write_checkpoint
from spolia.errors import SpoliaError
from spolia.parts.encoder import Prompts
from spolia.zoo.encoders import encoder_of
from spolia.zoo.vit import ViT


def vit() -> ViT:
    return ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0))


def test_a_folder_of_our_own(tmp_path: Path) -> None:
    module, x = vit(), torch.randn(2, 3, 8, 8)
    write_checkpoint(tmp_path / "own", module.state_dict(), module.config())
    assert torch.equal(encoder_of(tmp_path / "own").plain(x), module(x))


def test_timms_way_of_giving_features(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(ViT):
        """Tokens from `forward_features`, and the class token of them from `forward_head`."""

        def forward_features(self, x: Tensor) -> Tensor:
            h = self.patch_embed(x)
            h = torch.cat([self.cls_token.expand(len(x), -1, -1), h], 1) + self.pos_embed
            for block in self.blocks:
                h = block(h)
            return self.norm(h)

        def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
            return h[:, 0] if pre_logits else h[:, 0] @ torch.ones(16, 3)

    asked: list[tuple[str, bool, int]] = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> Theirs:
        asked.append((name, pretrained, num_classes))
        return Theirs(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0))

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    encoder, x, p = encoder_of("timm/vit_own.tag"), torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    assert asked == [("vit_own.tag", True, 0)]
    ours = encoder_of(vit())
    assert torch.equal(encoder.plain(x), ours.plain(x))
    assert torch.equal(encoder.features(x, Prompts(tokens={1: p})), ours.features(x, Prompts(tokens={1: p})))


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    with pytest.raises(SpoliaError, match="needs timm"):
        encoder_of("timm/vit_tiny_patch16_224.augreg_in21k")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpoliaError, match="is no JSON"):
        encoder_of(tmp_path)

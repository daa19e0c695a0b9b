"""Encoders for prompts, opened from what people have: models of transformers and timm, by name or folder, and our own ViT.

No code of a model's folder is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.encoder import Encoder, first_token, mean_token

if TYPE_CHECKING:
    from torch import Tensor

TIMM = "timm/"  # beginning of the names of timm's models


def encoder_of(
    model: nn.Module | str | os.PathLike[str], *, pool: Literal["first", "mean"] = "first", device: str | None = None
) -> Encoder:
    """A frozen encoder from a module, a folder, a name on the hub, or `timm/NAME`.

    A model of transformers with a head is used without it. `pool`: the first token's last state (ViT, BERT), or the mean of
    those that the attention mask shows; a module that returns one vector an input has its own.
    """
    module = model if isinstance(model, nn.Module) else opened(str(model))
    module = getattr(module, "base_model", module)
    if device is not None:
        module = module.to(device)
    if hasattr(module, "forward_features") and hasattr(module, "forward_head"):
        return Encoder(module, feature=_before_the_head)
    return Encoder(module, feature=first_token if pool == "first" else mean_token)


def opened(name: str) -> nn.Module:
    """The model of that name or folder. SpoliaError for what cannot be had."""
    if name.startswith(TIMM):
        return timm_model(name.removeprefix(TIMM))
    folder = Path(name).expanduser()
    if folder.is_dir() and _is_ours(folder):
        from spolia.core.checkpoint import read_tensors
        from spolia.zoo.hf import build

        module = build(_config(folder), name)
        module.load_state_dict(read_tensors(folder))
        return module
    try:
        from transformers import AutoModel
    except ImportError:
        raise SpoliaError("needs transformers", where=name, mend="pip install 'spolia[llm]'") from None
    try:
        return AutoModel.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False).float()
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        mend = "give a folder that save_pretrained wrote, or a name on the hub"
        raise SpoliaError(f"cannot be opened: {said}", where=name, mend=mend) from None


def timm_model(name: str, *, pretrained: bool = True) -> nn.Module:
    """A model of timm without its head. Name the tag too (`vit_base_patch16_224.augreg_in21k_ft_in1k`): a bare name has
    meant different weights in different releases."""
    try:
        import timm  # type: ignore[import-not-found]
    except Exception:  # not installed, or beside a torchvision that does not fit: its import then fails in its own ways
        mend = "pip install timm, or take the same weights from transformers"
        raise SpoliaError("needs timm, which cannot be imported", where=f"{TIMM}{name}", mend=mend) from None
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise SpoliaError(
            f"timm cannot make it: {said}", where=f"{TIMM}{name}", mend="see timm.list_models()"
        ) from None


def _before_the_head(module: nn.Module, x: Any) -> Tensor:
    return module.forward_head(module.forward_features(x), pre_logits=True)  # type: ignore[operator]


def _config(folder: Path) -> dict[str, Any]:
    import json

    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise SpoliaError(f"is no JSON: {error}", where=str(file), mend="restore it") from None


def _is_ours(folder: Path) -> bool:
    from spolia.zoo.vit import MODEL_TYPE

    return _config(folder).get("model_type") == MODEL_TYPE

"""CLIP's tensors under two sets of names: open_clip's, in which the merging papers publish, and those of transformers.

Radford et al., Learning transferable visual models from natural language supervision, ICML 2021, arXiv 2103.00020. The two
differ in names, in the order of projections (x @ proj against a linear layer) and in attention, where open_clip keeps
queries, keys and values in one matrix. Numbers are copied, never computed, so both directions are exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

SAME, TURNED, PARTED = "same", "turned", "parted"
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}  # fmt: skip
_IMAGE = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", SAME),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", SAME),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", SAME),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight", SAME),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias", SAME),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight", SAME),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias", SAME),
    ("visual.proj", "visual_projection.weight", TURNED),
)
_TEXT = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight", SAME),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", SAME),
    ("ln_final.weight", "text_model.final_layer_norm.weight", SAME),
    ("ln_final.bias", "text_model.final_layer_norm.bias", SAME),
    ("text_projection", "text_projection.weight", TURNED),
    ("logit_scale", "logit_scale", SAME),
)
TOWERS = {"visual.transformer": "vision_model.encoder", "transformer": "text_model.encoder"}
PATCHES = "vision_model.embeddings.patch_embedding.weight"
PROJECTION = "visual_projection.weight"


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors (without a prefix) under transformers' names; queries, keys and values apart."""
    made = {}
    for old, new, how in pairs_of(set(tensors), text=_has_text(tensors), where="open_clip"):
        if old not in tensors:
            continue
        tensor = tensors[old]
        if (how == TURNED and tensor.dim() != 2) or (how == PARTED and (tensor.dim() not in (1, 2) or len(tensor) % 3)):
            mend = "download or save the file again"
            raise SpoliaError(f"is {list(tensor.shape)}, which no CLIP has", where=old, mend=mend)
        if how == PARTED:
            made |= {new.format(letter): part.clone() for letter, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            made[new] = tensor.t().contiguous() if how == TURNED else tensor
    return made


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors of a CLIP under open_clip's names: the way back."""
    made = {}
    counts = {theirs: count_layers(tensors, rf"^{re.escape(theirs)}\.layers\.(\d+)\.") for theirs in TOWERS.values()}
    for old, new, how in every_pair(counts["vision_model.encoder"], counts["text_model.encoder"]):
        parts = [new.format(letter) for letter in "qkv"] if how == PARTED else [new]
        if any(part not in tensors for part in parts):
            continue
        found = torch.cat([tensors[part] for part in parts]) if how == PARTED else tensors[new]
        made[old] = found.t().contiguous() if how == TURNED else found
    return made


def pairs_of(own: set[str], *, text: bool, where: str) -> Iterator[tuple[str, str, str]]:
    """(open_clip's name, transformers', what is done) of every tensor that a CLIP of this depth has."""
    if "visual.class_embedding" not in own:
        raise SpoliaError("its image tower is no transformer", where=where, mend="import a CLIP of the ViT kind")
    depth = count_layers(own, r"^visual\.transformer\.resblocks\.(\d+)\.")
    text_depth = count_layers(own, r"^transformer\.resblocks\.(\d+)\.")
    if not depth:
        raise SpoliaError("its image tower has no blocks", where=where, mend="download or save the file again")
    if text and not text_depth:
        mend = "import the image tower alone; published experts have had their text tower taken out"
        raise SpoliaError("has no text tower", where=where, mend=mend)
    for pair in every_pair(depth, text_depth if text else 0):
        if pair[1] != PROJECTION or "visual.proj" in own:
            yield pair


def every_pair(depth: int, text_depth: int) -> Iterator[tuple[str, str, str]]:
    yield from _IMAGE
    if text_depth:
        yield from _TEXT
    for (ours, theirs), layers in zip(TOWERS.items(), (depth, text_depth), strict=True):
        for layer in range(layers):
            old, new = f"{ours}.resblocks.{layer}", f"{theirs}.layers.{layer}"
            for kind in ("weight", "bias"):
                yield f"{old}.attn.in_proj_{kind}", f"{new}.self_attn.{{}}_proj.{kind}", PARTED
                yield from ((f"{old}.{a}.{kind}", f"{new}.{b}.{kind}", SAME) for a, b in _BLOCK.items())


def count_layers(names: Mapping[str, Any] | set[str], pattern: str) -> int:
    numbers = [int(match[1]) for name in names if (match := re.match(pattern, name)) and len(match[1]) < 4]
    return max(numbers) + 1 if numbers else 0


def _has_text(names: Mapping[str, Any]) -> bool:
    return any(name.startswith("transformer.resblocks.") for name in names)


def expected_shapes(image: Mapping[str, Any], words: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes by transformers' names of the image tower `image` describes, and of the text tower `words` does."""
    width, patch = image["hidden_size"], image["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,),
        PATCHES: (width, image["num_channels"], patch, patch),
        "vision_model.embeddings.position_embedding.weight": ((image["image_size"] // patch) ** 2 + 1, width),
        **_norms(width, "vision_model.pre_layrnorm", "vision_model.post_layernorm"),
        **_block_shapes("vision_model.encoder", image),
    }
    if "projection_dim" in image:
        shapes[PROJECTION] = (image["projection_dim"], width)
    if words is not None:
        width = words["hidden_size"]
        shapes |= {
            "text_model.embeddings.token_embedding.weight": (words["vocab_size"], width),
            "text_model.embeddings.position_embedding.weight": (words["max_position_embeddings"], width),
            "text_projection.weight": (words["projection_dim"], width),
            "logit_scale": (),
            **_norms(width, "text_model.final_layer_norm"),
            **_block_shapes("text_model.encoder", words),
        }
    return shapes


def _norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def _block_shapes(tower: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, shapes = config["hidden_size"], config["intermediate_size"], dict[str, tuple[int, ...]]()
    for layer in range(config["num_hidden_layers"]):
        block = f"{tower}.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{block}.self_attn.{name}.weight": (width, width), f"{block}.self_attn.{name}.bias": (width,)}
        shapes |= {f"{block}.mlp.fc1.weight": (inner, width), f"{block}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{block}.mlp.fc2.weight": (width, inner), f"{block}.mlp.fc2.bias": (width,)}
        shapes |= _norms(width, f"{block}.layer_norm1", f"{block}.layer_norm2")
    return shapes

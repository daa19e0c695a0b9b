"""A CLIP as others published it: pickled modules of open_clip, state dicts, safetensors, folders of transformers.

What comes out are tensors under transformers' names and the config.json that belongs to them, all sizes from shapes. Of a
pickled module nothing is run: core/inert.py reads it as data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import Checkpoint, iterate_tensors, read_config
from spolia.core.files import is_folder
from spolia.core.inert import read_inert
from spolia.core.pickled import SUFFIXES, has_pickles, weight_files
from spolia.errors import Problems, SpoliaError
from spolia.zoo.clip_names import (
    PARTED,
    PATCHES,
    PROJECTION,
    TOWERS,
    count_layers,
    every_pair,
    expected_shapes,
    pairs_of,
    to_transformers,
)

if TYPE_CHECKING:
    from torch import Tensor

HEAD_WIDTH = 64  # of every CLIP of OpenAI and, unless its config says otherwise, of open_clip
EPS = 1e-5  # of the norms, in both
_BARE = PATCHES.removeprefix("vision_model.")


@dataclass(frozen=True)
class Found:
    """A CLIP as its file has it: tensors under transformers' names, and what only a pickled module tells of itself.

    `heads` of attention and `quick_gelu` are None where the file does not say. `left_out` holds tensors with no place in
    what was asked for, under the file's names.
    """

    tensors: dict[str, Tensor]
    heads: int | None = None
    text_heads: int | None = None
    quick_gelu: bool | None = None
    eps: float = EPS
    left_out: list[str] = field(default_factory=list)


def read_clip(path: Path, *, text: bool = False, projection: bool = True) -> Found:
    """The CLIP at `path`: a pickled module or state dict, safetensors or a folder of transformers.

    `text` keeps the text tower; without `projection` the image tower's last matrix is left out. SpoliaError names what is
    missing. Runs nothing of what a pickle holds.
    """
    path = _single_pickle(path)
    if path.suffix in SUFFIXES:
        inert = read_inert(path)
        names, take, config = list(inert.views), inert.tensor, read_config(path)
        kinds, states = inert.kinds, inert.states
    else:
        checkpoint = Checkpoint.open(path)
        held = dict(iterate_tensors(checkpoint))
        names, take, config, kinds, states = list(held), held.__getitem__, checkpoint.config, {}, {}
    if any(name.endswith(_BARE) for name in names):
        tensors = {name: take(name) for name in names}
        return _of_transformers(tensors, config, str(path), text=text, projection=projection)
    prefix = _prefix(names, "visual.conv1.weight", str(path))
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    pairs = [*pairs_of(own, text=text, where=str(path))]
    if not projection:
        pairs = [pair for pair in pairs if pair[1] != PROJECTION]
    _check_there(own, [pair[0] for pair in pairs], str(path))
    taken = {name: take(prefix + name) for name, _, _ in pairs}
    used = {prefix + name for name in taken}
    left_out = [name for name in names if name not in used]
    return Found(to_transformers(taken), **_told(kinds, states, prefix), left_out=left_out)


def read_head(path: Path) -> Tensor:
    """The weight [classes, dim] of a published zero-shot head, the logit scale in it. SpoliaError where it has a bias."""
    inert = read_inert(path)
    weights = [name for name in inert.views if name.rpartition(".")[2] == "weight"]
    if len(weights) != 1 or len(inert.views[weights[0]].shape) != 2:
        raise SpoliaError("holds no single matrix", where=str(path), mend="give the head of one task, as published")
    bias = weights[0].removesuffix("weight") + "bias"
    if bias in inert.views and bool(inert.tensor(bias).any()):
        raise SpoliaError(
            "has a bias, which a zero-shot head has not", where=str(path), mend="use it as a linear layer"
        )
    return inert.tensor(weights[0]).float()


def _single_pickle(path: Path) -> Path:
    """The pickle in a folder that has no safetensors; any other path as it is."""
    if not is_folder(path) or any(path.glob("*.safetensors")) or not has_pickles(path):
        return path
    files, _ = weight_files(path)
    if len(files) > 1:
        raise SpoliaError("holds its pickled weights in several files", where=str(path), mend="save it as safetensors")
    return files[0]


# --- what a file tells of itself -----------------------------------------------------------------------------------------


def _prefix(names: Sequence[str], last: str, where: str) -> str:
    """What stands before CLIP's own names: `model.` in the papers' experts, `module.` of parallel training, nothing."""
    prefixes = [name.removesuffix(last) for name in names if f".{name}".endswith(f".{last}")]
    if len(prefixes) != 1:
        said = f"holds {len(prefixes)} CLIPs" if prefixes else f"holds no tensor `{last}`"
        mend = "give a CLIP that open_clip or transformers saved, one in a file"
        raise SpoliaError(said, where=where, mend=mend)
    return prefixes[0]


def _check_there(own: set[str], wanted: list[str], where: str) -> None:
    missing = [name for name in wanted if name not in own]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SpoliaError(f"lacks tensor `{missing[0]}`{more}", where=where, mend="download or save the file again")


def _told(kinds: Mapping[str, str], states: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """What a pickled module says of itself: heads, the activation's class and the norms' epsilon."""

    def of(name: str, attribute: str, kind: type) -> Any:
        value = states.get(prefix + name, {}).get(attribute)
        return value if type(value) is kind and value > 0 else None

    made: dict[str, Any] = {"eps": of("visual.ln_pre", "eps", float) or EPS}
    for name, ours in (("heads", "visual.transformer"), ("text_heads", "transformer")):
        made[name] = of(f"{ours}.resblocks.0.attn", "num_heads", int)
    activation = kinds.get(f"{prefix}visual.transformer.resblocks.0.mlp.gelu", "").rpartition(".")[2]
    made["quick_gelu"] = {"QuickGELU": True, "GELU": False}.get(activation)
    return made


def _of_transformers(
    held: dict[str, Tensor], config: dict[str, Any] | None, where: str, *, text: bool, projection: bool
) -> Found:
    """A CLIP of transformers, or its image tower: what was not asked for is left out."""
    prefix = _prefix(list(held), _BARE, where)
    tower = "" if prefix.endswith("vision_model.") else "vision_model."  # an image tower alone may be saved without it
    prefix = prefix.removesuffix("vision_model.")
    named = {name: tower + name.removeprefix(prefix) for name in held if name.startswith(prefix)}
    own = {new: held[name] for name, new in named.items() if not name.endswith("position_ids")}
    depths = [count_layers(own, rf"^{re.escape(theirs)}\.layers\.(\d+)\.") for theirs in TOWERS.values()]
    if text and not depths[1]:
        raise SpoliaError("has no text tower", where=where, mend="import the image tower alone")
    wanted = []
    for _, name, how in every_pair(depths[0], depths[1] if text else 0):
        if name != PROJECTION or (projection and PROJECTION in own):
            wanted += [name.format(letter) for letter in "qkv"] if how == PARTED else [name]
    _check_there(set(own), wanted, where)
    left_out = [name for name in held if named.get(name) not in wanted]
    config = config or {}
    image = config.get("vision_config", config)
    words = config.get("text_config") or {}
    gelu = {"quick_gelu": True, "gelu": False}.get(image.get("hidden_act", ""))
    return Found(
        {name: own[name] for name in wanted},
        _whole(image.get("num_attention_heads")),
        _whole(words.get("num_attention_heads")),
        gelu,
        float(image.get("layer_norm_eps") or EPS),
        left_out,
    )


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


# --- config ----------------------------------------------------------------------------------------------------------


def clip_config(found: Found, *, quick_gelu: bool, heads: int | None = None, where: str = "") -> dict[str, Any]:
    """config.json of transformers for these tensors, all sizes from their shapes; SpoliaError where they disagree.

    Heads of attention are not in any shape: `heads`, else what the file says, else width / 64.
    """
    tensors, problems = found.tensors, Problems()
    image = _image_config(found, heads, where) | {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    has_text = "text_projection.weight" in tensors
    words = _text_config(found, where) | {"hidden_act": image["hidden_act"]} if has_text else None
    for name, shape in expected_shapes(image, words).items():
        if name not in tensors and name == PROJECTION:
            continue
        if tuple(tensors[name].shape) != shape:
            what = f"`{name}` is {list(tensors[name].shape)}, and the other tensors ask for {list(shape)}"
            problems.add(where, what, "download or save the file again")
    problems.raise_if_any()
    if words is None:
        kind = "CLIPVisionModelWithProjection" if PROJECTION in tensors else "CLIPVisionModel"
        return {"architectures": [kind], **image}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image["projection_dim"],
        "logit_scale_init_value": float(tensors["logit_scale"]),
        "vision_config": image,
        "text_config": words,
    }


def _image_config(found: Found, heads: int | None, where: str) -> dict[str, Any]:
    tensors = found.tensors
    patches = tensors[PATCHES]  # [width, colours, patch, patch]
    places = tensors["vision_model.embeddings.position_embedding.weight"]
    if patches.dim() != 4 or places.dim() != 2 or patches.shape[2] != patches.shape[3] or min(patches.shape) < 1:
        raise SpoliaError("its patches are not square", where=where, mend="import a CLIP of the ViT kind")
    width, colours, patch = patches.shape[:3]
    side = math.isqrt(max(places.shape[0] - 1, 0))
    if side * side + 1 != places.shape[0] or not side:
        what = f"has {places.shape[0]} positions, which is no square of patches and a class token"
        raise SpoliaError(what, where=where, mend="import a CLIP for square pictures")
    depth = count_layers(tensors, r"^vision_model\.encoder\.layers\.(\d+)\.")
    made = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0] if depth else 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(heads or found.heads, width, where),
        "num_channels": colours,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": found.eps,
    }
    return made | ({"projection_dim": tensors[PROJECTION].shape[0]} if PROJECTION in tensors else {})


def _text_config(found: Found, where: str) -> dict[str, Any]:
    tensors = found.tensors
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_layers(tensors, r"^text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": _heads(found.text_heads, width, where),
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": tensors["text_projection.weight"].shape[0],
        "layer_norm_eps": found.eps,
        "bos_token_id": vocabulary - 2,  # the last two entries of CLIP's vocabulary begin and end a text
        "eos_token_id": vocabulary - 1,
    }


def _heads(heads: int | None, width: int, where: str) -> int:
    heads = heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)
    if not heads or width % heads:
        what = f"a width of {width} and {heads or 'unknown'} heads of attention do not go together"
        raise SpoliaError(what, where=where, mend="give the number of heads")
    return heads

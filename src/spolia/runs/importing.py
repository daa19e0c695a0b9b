"""`spolia import`: a published CLIP becomes a folder that transformers, and every verb here, can read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import storage
from spolia.core.files import shown
from spolia.core.layout import Layout, Slot
from spolia.core.lazy import torch
from spolia.core.staging import Staging
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.runs.references import fetched
from spolia.zoo.importers import Found, clip_config, read_clip

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_SIZE = 5_000_000_000  # bytes
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training, white is 1
BICUBIC = 3  # Pillow's number for it


def import_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: bool = False,
    projection: bool = True,
    quick_gelu: bool | None = None,
    heads: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the CLIP at `path` (a pickle, safetensors, a folder, a hub id) as a folder of transformers at `out`.

    By default its image tower with the projection, which is what the merging papers merge; `text` keeps the text tower
    too, `projection=False` leaves the projection out. `quick_gelu` and `heads` (of attention in the image tower) are asked
    for only where the file does not tell. The folder appears whole or not at all. Tensors keep their storage type, and are
    read into memory. Returns what was read, left out and assumed. Nothing in a pickle is run.
    """
    if text and not projection:
        mend = "leave one of the two away"
        raise SpoliaError("both towers meet in the projections", where="projection", mend=mend)
    target = Path(out)
    if not overwrite and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SpoliaError("exists already", where=str(target), mend="choose another folder, or allow --overwrite")
    source = Path(fetched(os.fspath(path)))
    if not source.exists():
        mend = "check the path; download a published checkpoint first"
        raise SpoliaError("no such file or folder", where=shown(source), mend=mend)
    found = read_clip(source, text=text, projection=projection)
    told = found.quick_gelu if quick_gelu is None else quick_gelu
    assumed = [] if told is not None else ["QuickGELU: the file does not name the activation, and OpenAI's CLIP has it"]
    for words in assumed:
        warnings.warn(f"{source}: {words}", SpoliaWarning, stacklevel=2)
    config = clip_config(found, quick_gelu=told is not False, heads=heads, where=str(source))
    _write(found, config, target, overwrite=overwrite)
    return {
        "from": str(source),
        "folder": str(target),
        "tensors": len(found.tensors),
        "bytes": sum(t.numel() * t.element_size() for t in found.tensors.values()),
        "architecture": config["architectures"][0],
        "left out": found.left_out,
        "assumed": assumed,
        "config": config,
    }


def write_heads(
    clip: str | os.PathLike[str], prompts: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, tuple[int, int]]:
    """Zero-shot heads of every task in the file `prompts`, made by the whole CLIPModel at `clip`, into one safetensors file.

    Recipes name the file as the `head` of a task. Returns classes and templates of each. Runs the text tower.
    """
    from safetensors.torch import save

    from spolia.data.prompts import read_prompts
    from spolia.zoo.clip import heads_state, load_clip, text_head

    target = Path(out)
    if target.exists() or target.suffix != ".safetensors":
        what = "exists already" if target.exists() else "is no name of a safetensors file"
        raise SpoliaError(what, where=str(target), mend="choose a new file such as heads.safetensors")
    asked = read_prompts(prompts)
    model, tokenizer = load_clip(fetched(os.fspath(clip)))
    heads = {task: text_head(model, tokenizer, one.classes, one.templates, task) for task, one in asked.items()}
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(save(heads_state(heads), {"format": "pt"}))
        part.replace(target)
    except OSError as error:
        raise SpoliaError(
            f"cannot be written: {error.strerror}", where=str(target), mend="choose another place"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return {task: (len(one.classes), len(one.templates)) for task, one in asked.items()}


def _write(found: Found, config: Mapping[str, Any], target: Path, *, overwrite: bool) -> None:
    slots = [Slot(name, storage(tensor), tuple(tensor.shape)) for name, tensor in found.tensors.items()]
    layout = Layout.of(slots, MAX_SHARD_SIZE)
    image = config.get("vision_config", config)
    # without a key of its own a half-written folder is begun anew: reading it again is cheaper than telling two apart
    with Staging(target, layout, key=os.urandom(8).hex(), overwrite=overwrite) as staging:
        for name, tensor in found.tensors.items():
            staging.write(name, 0, _bytes(tensor))
        staging.write_text("config.json", json.dumps(dict(config), indent=2) + "\n")
        staging.write_text("preprocessor_config.json", json.dumps(preprocessor(image["image_size"]), indent=2) + "\n")
        staging.finish()


def preprocessor(size: int) -> dict[str, Any]:
    """preprocessor_config.json of CLIP: the shorter side to `size` pixels by bicubic, the middle, CLIP's mean and deviation."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")

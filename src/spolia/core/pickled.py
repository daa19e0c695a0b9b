"""State dicts that torch.save wrote: `pytorch_model*.bin`, `.pt`, `.pth`, `.ckpt`. Tensors are taken, no code is run.

Torch's weights-only unpickler knows tensors and plain containers and refuses every other name in the file. Zip archives
are mapped, not read; the older form of the file has to be read whole.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import BY_TORCH_NAME
from spolia.core.files import is_folder, open_regular, unreadable
from spolia.core.folders import check_complete, indexed
from spolia.core.lazy import torch
from spolia.errors import Problems, SpoliaError, SpoliaWarning

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "pytorch_model.bin.index.json"
_NESTED = ("state_dict", "model")  # where trainers put the weights beside their own state
# What trainers leave beside the weights.
_NOT_WEIGHTS = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)([._].*)?$"
)
_SAFE = "save the weights alone (`torch.save(model.state_dict(), FILE)`, or as safetensors) where you trust the file"


def has_pickles(path: Path) -> bool:
    """Whether `path` is a pickled state dict by its name, or a folder with one."""
    if is_folder(path):
        return os.path.isfile(path / _INDEX) or any(_candidates(path))
    return os.path.isfile(path) and path.suffix in SUFFIXES


def _candidates(folder: Path) -> list[Path]:
    try:
        found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and os.path.isfile(f))
    except OSError as error:
        raise unreadable(error, folder) from None
    return [f for f in found if not _NOT_WEIGHTS.match(f.stem)]


def weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights of `path`, and the index's map when there is one. Opens none of them."""
    if os.path.isfile(path):
        check_complete([path])
        return [path], None
    whole, files = path / "pytorch_model.bin", _candidates(path)
    if whole in files:
        return [whole], None
    if os.path.isfile(path / _INDEX):
        return indexed(path / _INDEX)
    shards = [f for f in files if f.name.startswith("pytorch_model")]
    if not shards and len(files) > 1:
        names = ", ".join(f.name for f in files[:5])
        raise SpoliaError(f"holds several state dicts: {names}", where=str(path), mend="name the one file you mean")
    check_complete(shards or files)
    return shards or files, None


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], dict[Path, os.stat_result]]:
    """Every tensor of a pickled model by name, mapped where the files allow it; and its files as they were before.

    Raises SpoliaError for what is damaged, holds more than tensors, or names a tensor twice.
    """
    files, weight_map = weight_files(path)
    problems, found, owner, stats = Problems(), dict[str, Any](), dict[str, Path](), dict[Path, os.stat_result]()
    for file in files:
        try:
            stats[file] = file.stat()
            tensors = load(file)
        except OSError as error:
            problems.errors.extend(unreadable(error, file).problems)
            continue
        except SpoliaError as error:
            problems.errors.extend(error.problems)
            continue
        for name, tensor in tensors.items():
            if name in found:
                problems.add(str(file), f"tensor `{name}` stands in {owner[name].name} too", "delete stray shards")
            elif weight_map is None or weight_map.get(name) == file.name:
                found[name], owner[name] = tensor, file
    if weight_map is not None and not problems.errors:
        lost = sorted(weight_map.keys() - found.keys())
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            what = f"the index puts `{lost[0]}`{more} in {weight_map[lost[0]]}, where it is not"
            problems.add(str(path), what, "save or download the model again")
    problems.raise_if_any()
    if not found:
        raise SpoliaError("holds no tensors", where=str(path), mend="point to the weights of a model")
    return found, stats


def load(file: Path) -> dict[str, Tensor]:
    """The state dict in one file. `{"state_dict": ...}` and `{"model": ...}` are unwrapped."""
    mapped = _is_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load with less care
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or hostile file provokes in the unpickler
        raise _refusal(file, error) from None
    if not mapped:
        what = f"{file}: written in the form of torch before 1.6, which cannot be mapped: read into memory whole"
        warnings.warn(what, SpoliaWarning, stacklevel=2)
    return _state_dict(file, value)


def _is_archive(file: Path) -> bool:
    """Zip archives can be mapped. A compressed one is refused: torch writes none, and it may grow without bound."""
    try:
        with open(open_regular(file), "rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                return False
        with zipfile.ZipFile(file) as archive:
            squeezed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    except SpoliaError:
        raise
    except OSError as error:
        raise unreadable(error, file) from None
    except Exception:  # zipfile has no one error for a damaged archive
        raise SpoliaError("is cut short or damaged", where=str(file), mend="download or save the file again") from None
    if any("/code/" in name for name in squeezed):
        raise SpoliaError("is a TorchScript program, not a state dict", where=str(file), mend=_SAFE)
    if squeezed:
        raise SpoliaError(
            f"is a compressed archive (`{squeezed[0][:80]}`), not a file of torch.save", where=str(file), mend=_SAFE
        )
    return True


def _refusal(file: Path, error: Exception) -> SpoliaError:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        what = f"wants to run or build `{named[1]}`: not opened, for a pickle may run any code"
        return SpoliaError(what, where=str(file), mend=_SAFE)
    if "TorchScript" in text:
        return SpoliaError("is a TorchScript program, not a state dict", where=str(file), mend=_SAFE)
    if isinstance(error, MemoryError):
        return SpoliaError(
            "does not fit into memory", where=str(file), mend="save it as safetensors, which is streamed"
        )
    words = " ".join(text.split())[:160] or type(error).__name__
    if "weights only" in words.lower():
        words = "more than tensors, or no pickle at all"
    what = f"cannot be read as a state dict: {words}"
    return SpoliaError(what, where=str(file), mend=f"download it again if it is damaged; else {_SAFE}")


def _state_dict(file: Path, value: Any) -> dict[str, Tensor]:
    """`value` if it maps names to tensors, or the mapping inside it that does."""
    if isinstance(value, Mapping) and not _all_tensors(value):
        value = next((value[key] for key in _NESTED if isinstance(value.get(key), Mapping)), value)
    if not isinstance(value, Mapping):
        what = f"holds a {type(value).__name__}, not a state dict"
        raise SpoliaError(what, where=str(file), mend="save `model.state_dict()`")
    size = file.stat().st_size
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            what = f"`{str(name)[:80]}` is a {type(tensor).__name__}, not a tensor"
            raise SpoliaError(what, where=str(file), mend="save `model.state_dict()` and nothing else")
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in BY_TORCH_NAME:
            mend = "save it in a plain floating type, as float32"
            raise SpoliaError(f"`{name}` holds {kind}, which cannot be merged", where=str(file), mend=mend)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{tensor.device.type}, {tensor.layout}, {tensor.dtype}".replace("torch.", "")
            raise SpoliaError(
                f"`{name}` is no plain tensor ({kind})", where=str(file), mend="save it dense and on the CPU"
            )
        if tensor.numel() * tensor.element_size() > size:
            what = f"`{name}` claims {tensor.numel()} numbers in a file of {size} bytes"
            raise SpoliaError(what, where=str(file), mend="save it with `tensor.contiguous()`")
    return dict(value)


def _all_tensors(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(item, torch.Tensor) for item in value.values())

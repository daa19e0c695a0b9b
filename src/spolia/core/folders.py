"""Which files of a model folder hold its weights: shards by their index, one release where several lie side by side."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from spolia.core.files import is_folder, read_json, shown, unreadable
from spolia.errors import Problems, SpoliaError

_CONVERT = "save it as safetensors first (transformers: `model.save_pretrained(DIR)`)"
_VARIANT = re.compile(r"^(?P<model>.+)\.(?P<variant>fp32|bf16|fp16)$")  # of a stem: model.fp16
_SHARD = re.compile(r"^(?P<model>.+)-(?P<number>\d{1,9})-of-(?P<of>\d{1,9})(?P<rest>\..+)$", re.ASCII)
_AGAIN = "save or download the model again"
_WIDEST = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Found:
    """The safetensors files of a model, the index's map if one was used, and what was decided on the way."""

    files: list[Path]
    weight_map: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def find_weights(path: Path) -> Found:
    """The safetensors files at `path`. SpoliaError when there are none, or more than one model among them."""
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise SpoliaError("is not a safetensors file", where=str(path), mend=_CONVERT)
        check_complete([path])
        return Found([path])
    if not is_folder(path):
        raise SpoliaError(
            "is no regular file" if os.path.exists(path) else "no such folder or file",
            where=shown(path),
            mend="check the path; download a hub model into a folder first (`hf download OWNER/NAME --local-dir DIR`)",
        )
    try:
        files = sorted(
            f for f in path.iterdir() if f.suffix == ".safetensors" and not f.name.startswith("adapter_model")
        )
    except OSError as error:
        raise unreadable(error, path) from None
    own = [f for f in files if not f.name.startswith("consolidated")]
    files = own or files  # `consolidated` is the same model once more, under its authors' names
    whole = path / "model.safetensors"
    if whole in files:
        return Found([whole], None, _aside(whole, files))
    indexes = sorted(path.glob("*.safetensors.index*.json"))
    if indexes:
        return _by_index(path, indexes)
    if files:
        found = _by_variant(path, files)
        check_complete(found.files)
        return found
    if (path / "adapter_config.json").exists() or any(path.glob("adapter_model.*")):
        raise SpoliaError(
            "holds a LoRA adapter, not a whole model", where=str(path), mend="name its base too: `BASE+ADAPTER`"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise SpoliaError("holds pickled weights only", where=str(path), mend=_CONVERT)
    raise SpoliaError("holds no *.safetensors", where=str(path), mend="point to the folder with the weights")


def _aside(taken: Path, files: list[Path]) -> list[str]:
    """Says which other releases of the same model were left aside."""
    others = [f.name for f in files if (match := _VARIANT.match(f.stem)) and match["model"] == taken.stem]
    return (
        [f"{taken.name} is read, {', '.join(others)} left aside: the same model stored in other types"]
        if others
        else []
    )


def _by_index(path: Path, indexes: list[Path]) -> Found:
    plain = path / "model.safetensors.index.json"
    chosen = plain if plain in indexes else indexes[0]
    files, weight_map = indexed(chosen)
    others = [index.name for index in indexes if index != chosen]
    if others and chosen != plain:
        raise SpoliaError(
            f"holds several models: {', '.join(i.name for i in indexes)}",
            where=str(path),
            mend="keep one index and its shards in a folder of their own",
        )
    return Found(files, weight_map, [f"{chosen.name} is read, {', '.join(others)} left aside"] if others else [])


def _by_variant(path: Path, files: list[Path]) -> Found:
    """Of `model.fp16.safetensors` and `model.fp32.safetensors` the widest; files of one kind belong together."""
    kinds = {file: match["variant"] if (match := _VARIANT.match(file.stem)) else "" for file in files}
    present = set(kinds.values())
    if present == {""}:
        return Found(files)
    best = "" if "" in present else next(variant for variant in _WIDEST if variant in present)
    taken = [file for file in files if kinds[file] == best]
    others = [file.name for file in files if kinds[file] != best]
    names = ", ".join(file.name for file in taken)
    if not others:
        return Found(taken, None, [f"{names} is read: the only release here"])
    return Found(taken, None, [f"{names} is read, {', '.join(others)} left aside: name one file to choose another"])


def indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards an index names, all of them there and beside it, and its map from tensor to shard."""
    try:
        weight_map = read_json(index, _AGAIN)["weight_map"]
        if not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise SpoliaError("is no valid index", where=str(index), mend=_AGAIN) from None
    problems, files = Problems(), []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            problems.add(
                str(index), f"points outside its folder: {name[:200]!r}", "only plain file names may stand there"
            )
        elif not os.path.isfile(index.parent / name):
            problems.add(str(index), f"shard {name[:200]!r} is missing", "download the missing file")
        else:
            files.append(index.parent / name)
    problems.raise_if_any()
    return files, weight_map


def check_complete(files: list[Path]) -> None:
    """SpoliaError when shards say `-00001-of-00003` and the others are not among `files`."""
    problems, models = Problems(), dict[tuple[str, str, int], dict[int, Path]]()
    for file in files:
        if match := _SHARD.match(file.name):
            model = (match["model"], match["rest"], int(match["of"]))
            models.setdefault(model, {})[int(match["number"])] = file
    for (*_, of), parts in models.items():
        lost = next((number for number in range(1, of + 1) if number not in parts), None)
        if lost is not None:
            number, file = next(iter(parts.items()))
            what = f"is part {number} of {of}, and part {lost} is not beside it"
            problems.add(str(file), what, "download the missing parts, and name the folder that holds all of them")
    problems.raise_if_any()

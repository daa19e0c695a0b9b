"""Where a finished model lies, and which of its files may leave this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spolia.core.checkpoint import read_header
from spolia.core.folders import check_complete, indexed
from spolia.core.staging import LOG
from spolia.errors import Problems, SpoliaError

_SENT = re.compile(
    r".*\.(safetensors|json|md|ya?ml|model|tiktoken|jinja|py|png|jpe?g)|(tokenizer|vocab|chat_template)\.\w+|merges\.txt"
    r"|(licen[cs]e|notice)(\.\w+)?",
    re.IGNORECASE,
)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_OF_A_RUN = ("status.json", "plan.json", "env.json")  # a merged folder has none of them
_WORKING = ("checkpoints", "loops")


def model_of(run: Path) -> Path:
    """Where the model lies: result/ of a finished run, or the folder itself. SpoliaError for what is unfinished."""
    if not run.is_dir():
        raise SpoliaError("there is no such folder", where=str(run), mend="name a run folder or a merged folder")
    whole = Path(os.path.abspath(run))
    for outer in (whole, *whole.parents):
        if not any((outer / name).is_file() for name in _OF_A_RUN):
            continue
        if outer != whole and not (outer / "recipe.yaml").is_file():
            continue  # files of those names, but no run's
        inside = whole.relative_to(outer).parts
        if inside[:1] not in ((), ("result",)):
            mend = f"push the run: spolia push {outer} OWNER/NAME"
            raise SpoliaError("is a part of a run, not its model", where=str(run), mend=mend)
        _check_finished(outer)
        return whole if inside else _result(outer, run)
    if whole.name.endswith(".partial") or os.path.lexists(whole / LOG):
        raise SpoliaError("is a merge that has not ended", where=str(run), mend="give its command again: it goes on")
    return whole


def _result(run: Path, given: Path) -> Path:
    result = run / "result"
    if result.is_symlink() or not result.is_dir():
        what = "its result/ is a link" if result.is_symlink() else "the run wrote no model: there is no result/ in it"
        raise SpoliaError(what, where=str(given), mend="name the folder of the model itself, if there is one")
    return result


def _check_finished(run: Path) -> None:
    try:
        state = json.loads((run / "status.json").read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError):
        state = "unknown"
    if state != "done":
        mend = "give the command of the run again: it goes on, and may be pushed once it has ended"
        raise SpoliaError(f"the run has not ended: its state is `{state}`", where=str(run), mend=mend)


def files_of(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The files of the model in `folder` with their bytes, and the names left out, which begin with a dot.

    SpoliaError with everything that must not be sent.
    """
    problems, files, aside = Problems(), dict[str, int](), list[str]()
    for path in _walk(folder, folder.resolve(), problems, aside):
        if _checked(path, problems):
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    weights = [folder / name for name in files if name.endswith(".safetensors")]
    _check_shards(weights, [folder / name for name in files if name.endswith(".safetensors.index.json")], problems)
    if not any(path.parent == folder for path in weights) and not problems.errors:
        problems.add(str(folder), "holds no *.safetensors", "name a run folder or a merged folder")
    problems.raise_if_any()
    return files, aside


def _walk(folder: Path, root: Path, problems: Problems, aside: list[str]) -> Iterator[Path]:
    """Every file below `folder`, in order. What begins with a dot goes to `aside`, links out of `root` to `problems`."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            aside.append(entry.name)
        elif entry.is_symlink() and (entry.is_dir() or not entry.resolve().is_relative_to(root)):
            what = "is a link to a folder" if entry.is_dir() else f"is a link that leads out, to {entry.resolve()}"
            problems.add(str(entry), what, "put the file itself there, or take the link away")
        elif entry.is_dir():
            if entry.name in _WORKING:
                problems.add(str(entry), "are checkpoints of a loop, no part of a model", "take the folder away")
            else:
                yield from _walk(entry, root, problems, aside)
        else:
            yield entry


def _checked(path: Path, problems: Problems) -> bool:
    """Whether `path` may be sent; what speaks against it goes to `problems`."""
    if path.suffix == ".safetensors":
        try:
            read_header(path)  # whole, and tensors alone
        except SpoliaError as error:
            problems.errors.extend(error.problems)
            return False
        return True
    if not path.is_file():
        problems.add(str(path), "is no regular file", "take it away")
    elif path.suffix.lower() in _PICKLES or _begins_as_pickle(path):
        problems.add(str(path), "may hold pickled code", "save its tensors as safetensors, and take it away")
    elif not _SENT.fullmatch(path.name):
        problems.add(str(path), "is no part of a model", "move it to another folder")
    else:
        return True
    return False


def _begins_as_pickle(path: Path) -> bool:
    """A pickle of protocol 2 or later, or an archive, as torch.save writes them, under whatever name."""
    with path.open("rb") as stream:
        first = stream.read(2)
    return first == b"PK" or (first[:1] == b"\x80" and first[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _check_shards(weights: list[Path], indexes: list[Path], problems: Problems) -> None:
    asked: list[tuple[Any, Any]] = [(check_complete, weights), *((indexed, index) for index in indexes)]
    for check, given in asked:
        try:
            check(given)
        except SpoliaError as error:
            problems.errors.extend(error.problems)

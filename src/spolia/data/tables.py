"""What stands in files of data before any of it is used: arrays of npz files, columns of tables, names of data sets.

Headers are read without the values, so that a recipe can be checked in an instant. Values come as numpy arrays or lists of
text; nothing here knows a model.

    .npz                        arrays, named
    .tsv .csv                   a first line that names the columns; .gz too. A column `split` names each row's part
    .jsonl                      one mapping a line
    .txt                        one text a line, the column `text`
"""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from spolia.core.lazy import np
from spolia.errors import SpoliaError, did_you_mean

Kind = Literal["arrays", "table", "pictures"]
TEXT, SPLIT = "text", "split"
INPUTS = ("pixel_values", "input_ids", "x", "inputs", "images")  # arrays, the first that is there
BESIDE = ("attention_mask", "token_type_ids")  # arrays that go with input_ids
TEXTS = (TEXT, "sentence", "content", "review", "question")  # columns
LABELS = ("y", "labels", "label", "target")
_ENDS = {".tsv": "\t", ".csv": ",", ".jsonl": "", ".txt": ""}
_UNSOUND = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, csv.Error, UnicodeDecodeError)


def kind_of(path: Path) -> Kind | None:
    """What `path` holds, by its name; None for what is not read."""
    if path.is_dir():
        return "pictures"
    if path.suffix == ".npz":
        return "arrays"
    return "table" if _end(path) in _ENDS else None


def _end(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def sound(file: Path) -> Iterator[None]:
    """Inside, what an unsound file raises becomes a SpoliaError."""
    try:
        yield
    except _UNSOUND as error:
        said = " ".join(str(error).split())[:160]
        raise SpoliaError(f"cannot be read: {said}", where=str(file), mend="get a sound copy") from None


# --- arrays ----------------------------------------------------------------------------------------------------------


def array_heads(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of an npz file, from the headers alone."""
    found = {}
    with sound(file), zipfile.ZipFile(file) as held:
        for name in held.namelist():
            with held.open(name) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, kind = read(stream)
            found[name.removesuffix(".npy")] = (shape, kind)
    return found


def read_arrays(file: Path, names: Sequence[str], most: int | None = None) -> dict[str, np.ndarray]:
    """The first `most` entries of these arrays. No pickled objects are opened."""
    with sound(file), np.load(file, allow_pickle=False) as held:
        return {name: held[name][:most] for name in names}


def named_arrays(heads: Sequence[str], inputs: str | Sequence[str] | None, split: str | None) -> list[str]:
    """The arrays that are the inputs, as they are asked for or by their usual names. SpoliaError where there are none."""
    end = f"_{split}" if split else ""
    if inputs is not None:
        asked = [inputs] if isinstance(inputs, str) else list(inputs)
        return [_known(name, heads, "array") for name in asked]
    first = next((name + end for name in INPUTS if name + end in heads), None)
    if first is None:
        usual = ", ".join(name + end for name in INPUTS)
        mend = f"name the array in `inputs`; it holds {', '.join(heads)}"
        raise SpoliaError(f"holds none of the arrays {usual}", mend=mend)
    return [first, *(name + end for name in BESIDE if first == f"input_ids{end}" and name + end in heads)]


def named_labels(known: Sequence[str], labels: str | None, split: str | None, what: str) -> str:
    """The array or column with the labels. SpoliaError where there is none."""
    if labels is not None:
        return _known(labels, known, what)
    end = f"_{split}" if split and what == "array" else ""
    found = next((name + end for name in LABELS if name + end in known), None)
    if found is None:
        mend = f"name the {what} in `labels`; it holds {', '.join(known)}"
        raise SpoliaError(f"no {what} looks like labels ({', '.join(name + end for name in LABELS)})", mend=mend)
    return found


def _known(name: str, known: Sequence[str], what: str) -> str:
    if name not in known:
        raise SpoliaError(f"holds no {what} `{name}`", mend=did_you_mean(name, known))
    return name


# --- tables ----------------------------------------------------------------------------------------------------------


def columns(file: Path) -> list[str]:
    """The names of a table's columns."""
    if _end(file) == ".txt":
        return [TEXT]
    with sound(file), _opened(file) as stream:
        line = stream.readline()
        if _end(file) == ".jsonl":
            first = json.loads(line)
            if not isinstance(first, dict):
                raise ValueError("its first line is no mapping")
            return list(first)
        return next(csv.reader([line], delimiter=_ENDS[_end(file)], quoting=_quoting(file)), [])


def read_columns(
    file: Path, names: Sequence[str], split: str | None = None, most: int | None = None
) -> dict[str, list[Any]]:
    """These columns of the first `most` rows, those of part `split` where it is given."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    with sound(file), _opened(file) as stream:
        for row in _rows(file, stream):
            if split is not None and row.get(SPLIT) != split:
                continue
            if most is not None and len(found[names[0]]) >= most:
                break
            for name in names:
                value = row[name]
                if value is None:
                    raise ValueError(f"a row lacks `{name}`")
                found[name].append(value)
    return found


def named_texts(known: Sequence[str], inputs: str | Sequence[str] | None) -> list[str]:
    """The column with the texts, or two with pairs. SpoliaError where there is none."""
    if inputs is not None:
        asked = [inputs] if isinstance(inputs, str) else list(inputs)
        return [_known(name, known, "column") for name in asked]
    found = next((name for name in TEXTS if name in known), None)
    if found is None:
        mend = f"name the column in `inputs`; it holds {', '.join(known)}"
        raise SpoliaError(f"has none of the columns {', '.join(TEXTS)}", mend=mend)
    return [found]


def _opened(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    return file.open(encoding="utf-8", newline="")


def _rows(file: Path, stream: IO[str]) -> Iterator[dict[str, Any]]:
    if _end(file) == ".txt":
        yield from ({TEXT: line.rstrip("\r\n")} for line in stream if line.strip())
    elif _end(file) == ".jsonl":
        yield from (json.loads(line) for line in stream if line.strip())
    else:
        yield from csv.DictReader(stream, delimiter=_ENDS[_end(file)], quoting=_quoting(file))


def _quoting(file: Path) -> Literal[0, 3]:
    """Quotes hold cells of .csv together; in .tsv they are text."""
    return csv.QUOTE_MINIMAL if _end(file) == ".csv" else csv.QUOTE_NONE


# --- data sets by name -----------------------------------------------------------------------------------------------


def without_datasets(where: str = "") -> SpoliaError:
    """The library `datasets`, which loads what is named at `where`, is not there."""
    what = "is loaded by `datasets`, which is not installed"
    return SpoliaError(what, where=where, mend="pip install 'spolia[data]'; or write the inputs to an npz file")


def read_dataset(name: str, config: str | None, split: str | None) -> Any:
    """The part `split` of a data set of the library `datasets`, which fetches it. SpoliaError where it cannot."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise without_datasets(name) from None
    if split is None:
        raise SpoliaError("no part of it is named", where=name, mend="add `split: train`, validation or test")
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its own errors, those of its transport, and those of the disk
        said = " ".join(str(error).split())[:160]
        mend = "check `dataset`, `config` and `split`, and the connection"
        raise SpoliaError(f"cannot be loaded: {type(error).__name__}: {said}", where=name, mend=mend) from None

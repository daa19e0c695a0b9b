"""Texts to send: prose that comes with Python, text files, and two packed sets in the folder that SPOLIA_DATA names.

A corpus has three parts that share no document: `train` is what tokenizers and models learn, `design` what labels and settings
are chosen on, `test` what is sent. A text is a sentence, a paragraph, or a whole part where nothing tells one from the next.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spolia.data.images import data_folder
from spolia.errors import SpoliaError, did_you_mean

PACKED = {
    "europarl": ("sent_europarl_en_train.txt.gz", "sent_europarl_en_test.txt.gz"),
    "wikitext2": ("lm_wikitext2_valid.txt.gz", "lm_wikitext2_test.txt.gz"),
}
"""Train and test files. Europarl as DeepSC prepares it, a sentence a line; WikiText-2 by its official valid and test parts."""
_DESIGN = 10  # the last of so many parts of what would train
_TEST = 10  # the last of so many parts, where no test files are given


@dataclass(frozen=True)
class Texts:
    """The three parts, in the files' order."""

    train: list[str]
    design: list[str]
    test: list[str]


def python_texts(seed: int = 0) -> Texts:
    """The language reference of CPython; the seed says which topics are in which part. A part is one text."""
    from spolia.data.prose import prose

    parts = prose(seed)
    train, design, test = (
        "".join(parts.characters[i] for i in own.tolist()) for own in (parts.train, parts.validation, parts.test)
    )
    return Texts([train], [design], [test])


def packed_texts(name: str, folder: Path | None = None) -> Texts:
    """`europarl` or `wikitext2`; headings of articles and empty lines are left out."""
    train, test = (_lines(file) for file in packed_files(name, folder))
    if name == "wikitext2":
        train, test = ([line for line in lines if not line.startswith("= ")] for lines in (train, test))
    return _parted(train, test)


def packed_files(name: str, folder: Path | None = None) -> tuple[Path, Path]:
    """Train and test file of a packed set. SpoliaError where one is not there; nothing is read."""
    if name not in PACKED:
        raise SpoliaError(f"no texts are called `{name}`", where="texts", mend=did_you_mean(name, PACKED))
    place = data_folder(folder)
    train, test = (place / file for file in PACKED[name])
    for file in (train, test):
        if not file.is_file():
            raise SpoliaError(f"there is no {file.name}", where=str(place), mend="name the folder that holds it")
    return train, test


def file_texts(files: Sequence[Path], test: Sequence[Path] = ()) -> Texts:
    """The lines of text files (UTF-8, or gzip of it). Without `test` the last tenth of the lines is the test."""
    own = [line for file in files for line in _lines(file)]
    held = [line for file in test for line in _lines(file)]
    if not test:
        cut = len(own) - len(own) // _TEST
        own, held = own[:cut], own[cut:]
    found = _parted(own, held)
    if not (found.train and found.design and found.test):
        what = f"{len(own)} lines to learn from and {len(held)} to send"
        raise SpoliaError(what, where=", ".join(map(str, files)), mend="give ten lines and more, a sentence or so each")
    return found


def _parted(train: list[str], test: list[str]) -> Texts:
    cut = len(train) - len(train) // _DESIGN
    return Texts(train[:cut], train[cut:], test)


def _lines(file: Path) -> list[str]:
    """What stands in the lines of a file, without the blanks around it."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpoliaError(f"cannot be read: {reason}", where=str(file), mend="give text files in UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]

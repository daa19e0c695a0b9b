"""Real English without a download: the language reference that every CPython carries in `pydoc_data.topics`.

A text is read as bytes of ASCII, other characters as `?`; a token is one of the characters that the whole reference holds.
The splits go by topic, and a paragraph that two topics share stays in the first by name that has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["train", "validation", "test"]
HELD = {"validation": 6, "test": 8}  # topics


@dataclass(frozen=True)
class Prose:
    """Token ids [n] of each part; `characters[id]` is what a token stands for."""

    characters: str
    train: Tensor
    validation: Tensor
    test: Tensor

    def windows(self, part: Part, length: int, most: int | None = None) -> Tensor:
        """Windows [count, length] that follow each other without overlap; `most` of them, at even distances."""
        tokens: Tensor = getattr(self, part)
        count = len(tokens) // length
        if count < 1:
            raise SpoliaError(f"{len(tokens)} tokens make no window of {length}", where=part, mend="a shorter context")
        whole = tokens[: count * length].view(count, length)
        if most is None or most >= count:
            return whole
        return whole[torch.arange(most) * count // most]


def prose(seed: int = 0) -> Prose:
    """The reference in three parts. The seed says which topics are in which."""
    pages = _pages()
    characters = "".join(sorted(set("".join(pages.values()))))
    order = sorted(pages, key=lambda name: entropy(seed, "prose", name))
    test, held = HELD["test"], HELD["test"] + HELD["validation"]
    parts = (order[held:], order[test:held], order[:test])
    return Prose(characters, *(_ids("".join(pages[name] for name in part), characters) for part in parts))


def _ids(text: str, characters: str) -> Tensor:
    table = np.zeros(128, dtype=np.int64)
    table[[ord(c) for c in characters]] = np.arange(len(characters))
    return torch.from_numpy(table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)])


@cache
def _pages() -> dict[str, str]:
    """Every topic's own paragraphs."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        mend = "install the whole standard library, or use another source"
        raise SpoliaError("this Python comes without pydoc_data", where="problem.source prose", mend=mend) from None
    seen: set[str] = set()
    pages: dict[str, str] = {}
    for name in sorted(topics):
        own = []
        for paragraph in re.split(r"\n\s*\n", topics[name].encode("ascii", "replace").decode()):
            plain = " ".join(paragraph.split())
            if plain and plain not in seen:
                seen.add(plain)
                own.append(paragraph)
        if own:
            pages[name] = "\n\n".join(own) + "\n\n"
    return pages

"""YAML whose every value remembers its line, so that an error can say `recipe.yaml:4 method.density`.

`load` reads with the safe constructors only, refuses duplicate keys, and gives plain values beside a table of lines.
YAML 1.1 reads `3e-4` as text; here it is a number, as everybody who writes it means.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from spolia.errors import Problems, SpoliaError

Path = tuple[str | int, ...]
_DEEPEST, _LARGEST = 40, 30_000  # aliases can make a short text grow without bound
_LONGEST = 500_000  # bytes; a recipe that names every layer of a large model has some 100 kB
_DIGITS = 400  # of a number; Python itself refuses to write more than 4300
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value", "map", "seq", "merge")
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Stops at the first node too many."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > _LARGEST:
            raise RecursionError
        return super().compose_node(parent, index)


@dataclass
class Marked:
    """A document: `value` is plain Python; `lines[path]` is the line (from 1) where the key or item at `path` stands."""

    name: str
    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def where(self, path: Path = ()) -> str:
        """`file:line a.b[0].c` of the deepest known prefix of `path`."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known)
        place = f"{self.name}:{line}" if line else self.name
        return f"{place} {dotted(path)}".rstrip()


def dotted(path: Path) -> str:
    """`('models', 0, 'weight')` as `models[0].weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def text_of(path: pathlib.Path, name: str) -> str:
    """The file's text, read no further than a recipe may be long: `/dev/zero` and a checkpoint are files too."""
    with path.open("rb") as stream:
        raw = stream.read(_LONGEST + 1)
    if len(raw) > _LONGEST:
        raise SpoliaError(f"has more than {_LONGEST:,} bytes", where=name, mend="give a recipe: a YAML file")
    return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def load(text: str, name: str = "recipe") -> Marked:
    """The first document of `text`. Raises SpoliaError with the line on bad syntax, duplicate keys, or unsafe tags."""
    return only(load_all(text, name), name)


def only(documents: Sequence[Marked], name: str) -> Marked:
    """The one document of a text; an empty one where there is none."""
    if len(documents) > 1:
        raise SpoliaError(f"{len(documents)} documents in one file", where=name, mend="keep one recipe a file")
    return documents[0] if documents else Marked(name, None)


def load_all(text: str, name: str = "recipe") -> list[Marked]:
    """Every document of `text`, in order."""
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except RecursionError:
        raise SpoliaError(
            "too large or too deeply nested", where=name, mend="close brackets; a recipe is short and a few levels deep"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        hint = _syntax_hint(text, mark)
        if "escape character" in problem:
            hint = "in double quotes a backslash is an escape: write paths with /, or in single quotes"
        raise SpoliaError(f"not valid YAML: {problem}", where=place, mend=hint) from None
    documents, problems = [], Problems()
    for node in nodes:
        document = Marked(name, None)
        if node is not None:
            document.value = _build(node, (), document, problems, depth=0)
        documents.append(document)
    problems.raise_if_any()
    return documents


def _syntax_hint(text: str, mark: Any) -> str:
    if mark is not None and mark.line < len(text.splitlines()) and "\t" in text.splitlines()[mark.line]:
        return "YAML wants spaces, not tabs, for indentation"
    return "check indentation, colons and quotes near this line"


def _build(node: yaml.Node, path: Path, document: Marked, problems: Problems, depth: int) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if depth > _DEEPEST or len(document.lines) > _LARGEST:
        raise SpoliaError("too large or too deeply nested", where=document.name, mend="check its aliases (`*name`)")
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise SpoliaError(
            f"the tag `{node.tag}` is not allowed", where=document.where(path), mend="write a plain value"
        )
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, path, document)
            here = (*path, key)
            document.lines[here] = key_node.start_mark.line + 1
            if key in result:
                problems.add(document.where(here), "the key is written twice", "keep one of the two")
            result[key] = _build(value_node, here, document, problems, depth + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), document, problems, depth + 1) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, document, path)


def _key(node: yaml.Node, path: Path, document: Marked) -> str:
    """Keys are text as written."""
    where = f"{document.name}:{node.start_mark.line + 1} {dotted(path)}".rstrip()
    if not isinstance(node, yaml.ScalarNode):
        raise SpoliaError("a key must be a word", where=where, mend="put quotes around it")
    if node.tag == "tag:yaml.org,2002:merge":
        raise SpoliaError("merge keys (`<<`) are not read", where=where, mend="write the keys out")
    _check_text(node, where)
    return node.value


def _check_text(node: yaml.ScalarNode, where: str) -> None:
    """Escapes can make characters that no file and no file's name holds."""
    if bad := _UNWRITABLE.search(node.value):
        raise SpoliaError(f"a character that cannot be written, {bad[0]!a}", where=where, mend="take it out")


def _scalar(node: yaml.ScalarNode, document: Marked, path: Path) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "str":
        _check_text(node, document.where(path))
        return float(node.value.replace("_", "")) if node.style is None and _FLOAT.match(node.value) else node.value
    if kind in ("int", "float") and len(node.value) > _DIGITS:
        what = f"a number of {len(node.value)} characters"
        raise SpoliaError(what, where=document.where(path), mend="quote it if it is text")
    if kind in ("timestamp", "value"):
        return node.value  # a model called 2024-01-01 is a name
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError, IndexError, yaml.YAMLError):
        shown = node.value if len(node.value) <= 40 else node.value[:40] + "…"
        where = document.where(path)
        raise SpoliaError(f"`{shown}` is not a valid {kind}", where=where, mend="quote it if it is text") from None

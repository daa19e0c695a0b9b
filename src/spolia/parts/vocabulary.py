"""Tokenizers as what they are on disk: tokens with ids. Read, compared, cut and joined without any tokenizer library.

Only the vocabulary is touched: a joined tokenizer is the first one, with its normaliser, splitting and special tokens,
that also knows the tokens of the others. Tokens of the others' models are added to its model (BPE with the merges that
make them), tokens added by hand stay added tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError

_OTHERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_RESTORE = "restore the model's tokenizer"
_DEEPEST = 100  # levels of a JSON file; real ones have ten
_HALVES = re.compile("[\ud800-\udfff]")
_SAVE = "save the fast tokenizer beside it (transformers: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)"


@dataclass
class Vocabulary:
    """Tokens and ids of one tokenizer. `data` is its tokenizer.json, None for one kept in other files; `seal` is what is
    equal for equal files when the tokens cannot be read (`tokens` is None then)."""

    name: str
    tokens: dict[str, int] | None
    data: dict[str, Any] | None = None
    seal: str = ""
    cut: bool = False  # not as it lies on disk

    @property
    def kind(self) -> str:
        return str(self.data["model"].get("type", "BPE")) if self.data else ""

    @property
    def added(self) -> list[dict[str, Any]]:
        return self.data.get("added_tokens") or [] if self.data else []

    def same(self, other: Vocabulary) -> bool:
        """Whether row i means the same in both."""
        if self.tokens is None or other.tokens is None:
            return self.seal == other.seal
        return self.tokens == other.tokens

    def within(self, size: int) -> Vocabulary:
        """Without tokens whose id is `size` or more: the model has no rows for them."""
        if self.tokens is None or all(number < size for number in self.tokens.values()):
            return self
        kept = {token: number for token, number in self.tokens.items() if number < size}
        data = copy.deepcopy(self.data)
        if data is not None:
            model = data["model"]
            data["added_tokens"] = [entry for entry in self.added if entry["id"] < size]
            if isinstance(model["vocab"], list):
                model["vocab"] = model["vocab"][:size]
            else:
                model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
            if "merges" in model:
                pairs = map(_pair, model["merges"])
                fits = [{a, b, a + b} <= model["vocab"].keys() for a, b in pairs]
                model["merges"] = [merge for merge, fit in zip(model["merges"], fits, strict=True) if fit]
        return Vocabulary(self.name, kept, data, self.seal, cut=True)


def read_vocabulary(folder: Path, name: str) -> Vocabulary | None:
    """The tokenizer in a model's folder; None when there is none. SpoliaError for a damaged one."""
    file = folder / "tokenizer.json"
    if file.is_file():
        data = read_mapping(file)
        try:
            tokens = _tokens(data)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            raise SpoliaError("is no tokenizer that can be read", where=str(file), mend=_RESTORE) from None
        return Vocabulary(name, tokens, data)
    found = next((folder / other for other in _OTHERS if (folder / other).is_file()), None)
    if found is None:
        return None
    raw = found.read_bytes()
    seal = hashlib.sha256(raw).hexdigest()
    tokens = None
    if found.name == "vocab.json":
        tokens = _numbered(found)
    elif found.name == "vocab.txt":
        tokens = {line: n for n, line in enumerate(raw.decode(errors="replace").splitlines())}
    if (folder / "added_tokens.json").is_file():
        added = _numbered(folder / "added_tokens.json")
        seal, tokens = seal + repr(sorted(added.items())), None if tokens is None else tokens | added
    return Vocabulary(name, tokens, None, seal)


def _tokens(data: dict[str, Any]) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json. Some error of Python's where it is damaged."""
    model = data["model"]
    vocab, kind, pairs = model["vocab"], model.get("type"), model.get("merges", [])
    scored = vocab if isinstance(vocab, list) else []  # Unigram: [token, score]
    listed = {token: number for number, (token, _) in enumerate(scored)} if scored else dict(vocab)
    numbers = all(type(score) in (int, float) for _, score in scored)
    forms = isinstance(kind, str | None) and isinstance(pairs, list) and all(isinstance(p, str | list) for p in pairs)
    if not forms or not numbers or not all(isinstance(part, str) for pair in pairs for part in _pair(pair)):
        raise TypeError
    return _sound(listed | {entry["content"]: entry["id"] for entry in data.get("added_tokens") or ()})


def _sound(tokens: dict[str, Any]) -> dict[str, int]:
    """`tokens`, if these are texts with ids; else TypeError or ValueError."""
    "".join(tokens).encode()  # half of a pair of code units is no text
    if not all(type(number) is int and number >= 0 for number in tokens.values()):
        raise TypeError("an id is a whole number")
    return tokens


def _numbered(file: Path) -> dict[str, int]:
    """vocab.json or added_tokens.json."""
    try:
        return _sound(read_mapping(file))
    except (TypeError, ValueError):
        raise SpoliaError("is no list of tokens and ids", where=str(file), mend=_RESTORE) from None


def read_mapping(file: Path, mend: str = _RESTORE) -> dict[str, Any]:
    """A JSON file that holds a mapping, no deeper than can be copied and written again. SpoliaError for any other."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SpoliaError(f"cannot be read: {error}", where=str(file), mend=mend) from None
    if not isinstance(data, dict):
        raise SpoliaError("is no mapping", where=str(file), mend=mend)
    level: list[Any] = [data]
    for _ in range(_DEEPEST):
        level = [i for v in level if isinstance(v, dict | list) for i in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return data
    raise SpoliaError(f"is nested more than {_DEEPEST} levels deep", where=str(file), mend=mend)


def json_text(value: Any) -> str:
    """For a file: people's letters as they are, unless UTF-8 cannot hold them."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text if not _HALVES.search(text) else json.dumps(value, indent=2) + "\n"


def _pair(merge: Any) -> tuple[str, str]:
    a, b = merge.split(" ", 1) if isinstance(merge, str) else merge
    return a, b


@dataclass
class Joined:
    """A vocabulary and, where it is nobody's own, the tokenizer.json to write."""

    tokens: dict[str, int]
    data: dict[str, Any] | None = None
    new: dict[str, int] = field(default_factory=dict)  # what the first tokenizer did not know


def join(first: Vocabulary, others: Sequence[Vocabulary], extra: Iterable[str], problems: Problems) -> Joined:
    """`first` with the tokens of `others`, in their order and by id, then `extra` as added tokens.

    Ids of `first` stay; new ones follow its highest. Where two define an added token apart, the first wins.
    """
    assert first.tokens is not None
    new: dict[str, int] = {}
    following = max(first.tokens.values(), default=-1) + 1
    wanted = [t for other in others for t, _ in sorted((other.tokens or {}).items(), key=lambda pair: pair[1])]
    for token in [*wanted, *extra]:
        if token not in first.tokens and token not in new:
            new[token] = following + len(new)
    definitions = _definitions(first, others, problems)
    joined = Joined(first.tokens | new, None, new)
    if not new:
        joined.data = first.data if first.cut else None
        return joined
    if first.data is None:
        problems.add(first.name, f"{len(new)} tokens must be added to a tokenizer without tokenizer.json", _SAVE)
        return joined
    data = copy.deepcopy(first.data)
    givers = {token: other for other in reversed(others) for token in other.tokens or ()}
    added = {token for token in new if token in definitions or token not in givers}
    model_new = [token for token in new if token not in added]
    strange = next((givers[t] for t in model_new if givers[t].kind != first.kind), None)
    if strange is not None:
        kind = strange.kind or "no tokenizer.json"
        what = f"has a {kind} vocabulary, {first.name} a {first.kind} one: they cannot be joined"
        problems.add(
            strange.name, what, f"use `source: base`, or {_SAVE}" if not strange.kind else "use `source: base`"
        )
        return joined
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    entries = [{"id": new[t], "content": t, **(definitions.get(t) or plain)} for t in new if t in added]
    data["added_tokens"] = [*first.added, *entries]
    _add_to_model(data, joined.tokens, first, others, model_new)
    joined.data = data
    return joined


def _definitions(first: Vocabulary, others: Sequence[Vocabulary], problems: Problems) -> dict[str, dict[str, Any]]:
    """Flags of added tokens by content."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for vocabulary in (first, *others):
        for entry in vocabulary.added:
            flags = {key: value for key, value in entry.items() if key not in ("id", "content")}
            known, owner = found.setdefault(entry["content"], (flags, vocabulary.name))
            if known != flags:
                differ = ", ".join(sorted(key for key in known if known[key] != flags.get(key)))
                what = f"the added token `{entry['content']}` is defined apart ({differ}); {owner} wins"
                problems.warn(vocabulary.name, what, "make the two equal if it matters")
    return {token: flags for token, (flags, _) in found.items()}


def _add_to_model(
    data: dict[str, Any], ids: dict[str, int], first: Vocabulary, others: Sequence[Vocabulary], tokens: list[str]
) -> None:
    """Enter `tokens` into the tokenizer's model, which is of the same kind in all that have them.

    Added tokens enter it too: the library numbers those that are not in it anew, whatever the file says.
    """
    model = data["model"]
    if isinstance(model["vocab"], list):  # Unigram: the place in the list is the id
        same = [other for other in reversed(others) if other.kind == first.kind]
        scores = {entry[0]: entry[1] for other in same for entry in (other.data or {})["model"]["vocab"]}
        lowest = min((entry[1] for entry in model["vocab"]), default=0.0)
        names, fresh_words = {number: token for token, number in ids.items()}, set(tokens)
        for number in range(len(model["vocab"]), max(ids.values()) + 1):
            token = names.get(number, f"<unused{number}>")
            model["vocab"].append([token, scores.get(token, lowest) if token in fresh_words else lowest - 100])
        return
    model["vocab"] |= {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    model["vocab"] |= {token: ids[token] for token in tokens}
    if "merges" not in model:
        return
    made, known = set(tokens), {_pair(merge) for merge in model["merges"]}
    fresh: list[tuple[str, str]] = []
    for other in others:
        for a, b in map(_pair, (other.data or {}).get("model", {}).get("merges") or ()):
            if a + b in made and {a, b} <= model["vocab"].keys() and (a, b) not in known:
                known.add((a, b))
                fresh.append((a, b))
    texts = all(isinstance(merge, str) for merge in model["merges"]) and not any(" " in a + b for a, b in fresh)
    if texts and model["merges"]:
        model["merges"] += [f"{a} {b}" for a, b in fresh]
    else:
        model["merges"] = [*map(list, map(_pair, model["merges"])), *map(list, fresh)]

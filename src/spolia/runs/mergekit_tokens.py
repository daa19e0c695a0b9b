"""The `tokenizer` section: one vocabulary for the result, and a row for each of its tokens in every model.

    tokenizer:
      source: union | base | REF          # default union
      tokens:
        "<tok>": {source: REF | {kind: zero} | {kind: model_token, model: REF, token: "..."}, force: false}
      pad_to_multiple_of: 64

Departures from mergekit: models count in the order of the file. New tokens of a model enter the tokenizer's own model
(BPE with their merges) and not as literal added tokens, so that text is cut as before. A token whose id lies beyond the
embedding counts as missing. Special ids in the configs follow the tokens. `keep_padding` keeps rows beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError
from spolia.parts.expert import Weights
from spolia.parts.rows import Asked, embeddings_of, map_rows
from spolia.parts.vocabulary import Joined, Vocabulary, join, json_text, read_mapping, read_vocabulary
from spolia.runs.mergekit_settings import Check
from spolia.runs.request import ModelRef, TokenPlan
from spolia.runs.yamlmarks import Path as Place

_LARGEST_PAD = 2**20  # rows; the largest vocabularies have a quarter of that
Refer = Callable[[Any, Place], ModelRef | None]


@dataclass(frozen=True)
class Section:
    """What the recipe asks for. `tokens`: by token, (source, force) as written, with the place."""

    at: Place
    source: str | ModelRef  # union, base, or a model
    tokens: dict[str, tuple[Any, bool, Place]] = field(default_factory=dict)
    pad: int = 1


def read_section(value: dict[str, Any], refer: Refer, check: Check) -> Section | None:
    """The section, or the older `tokenizer_source`. None: there is none, or it is wrong and that is told."""
    asked = [key for key in ("tokenizer_source", "tokenizer") if value.get(key) is not None]
    if len(asked) == 2:
        check.error(("tokenizer",), "`tokenizer` and `tokenizer_source` exclude each other", "keep one of the two")
    if len(asked) != 1:
        return None
    at: Place = (asked[0],)
    if asked[0] == "tokenizer_source":
        source = _source(value[asked[0]], at, refer)
        return Section(at, source) if source is not None else None
    body = value["tokenizer"]
    if not isinstance(body, dict):
        check.error(at, "`tokenizer` must be a mapping", "write `tokenizer: {source: base}`")
        return None
    check.keys(body, at, ("source", "tokens", "pad_to_multiple_of"))
    given = {key: v for key, v in body.items() if v is not None}
    body = {"source": "union", "tokens": {}, "pad_to_multiple_of": 0} | given
    pad = 1 if body["pad_to_multiple_of"] == 0 else body["pad_to_multiple_of"]
    if type(pad) is not int or pad < 1:
        check.error((*at, "pad_to_multiple_of"), f"`{pad}` is no count of rows", "write a whole number such as 64")
        return None
    if pad > _LARGEST_PAD:
        what = f"padded to {str(pad)[:20]} rows: no model has so many tokens"
        check.error((*at, "pad_to_multiple_of"), what, f"write a number such as 64; at most {_LARGEST_PAD}")
        return None
    tokens = body["tokens"]
    if not isinstance(tokens, dict):
        check.error((*at, "tokens"), "`tokens` must be a mapping", 'write `tokens: {"<tok>": {source: PATH}}`')
        return None
    source = _source(body["source"], (*at, "source"), refer)
    found = {str(t): _token(entry, (*at, "tokens", t), check) for t, entry in tokens.items()}
    return Section(at, source, found, pad) if source is not None else None


def _source(value: Any, at: Place, refer: Refer) -> str | ModelRef | None:
    return value if value in ("union", "base") else refer(value, at)


def _token(entry: Any, at: Place, check: Check) -> tuple[Any, bool, Place]:
    if entry is None:
        return None, False, at
    if not isinstance(entry, dict):
        check.error(at, "a token's entry must be a mapping", "write `{source: PATH}` or `{source: {kind: zero}}`")
        return None, False, at
    check.keys(entry, at, ("source", "force"))
    force = False if entry.get("force") is None else entry["force"]
    if not isinstance(force, bool):
        check.error((*at, "force"), f"`force` cannot be {force!r}", "write true or false")
    return entry.get("source"), bool(force), at


class Tokens:
    """Turns a section into a plan. `models`: the base first, then the order of the file; `base`: whether there is one."""

    def __init__(
        self, section: Section, models: list[ModelRef], based: bool, weights: list[Weights], refer: Refer, check: Check
    ):
        self._section, self._models, self._based, self._weights = section, models, based, weights
        self._refer, self._check, self._problems = refer, check, Problems()

    def plan(self, keep_padding: bool, donor: ModelRef) -> TokenPlan | None:
        """None: told what is wrong."""
        owner = self._owner()
        vocabularies = self._vocabularies() if owner is not None else None
        if vocabularies is None or owner is None:
            return None
        asked = {token: self._asked(token, vocabularies) for token in self._section.tokens}
        if any(v.tokens is None for v in vocabularies):
            return self._sealed(vocabularies, owner)
        known = [self._rows_of(v, w) for v, w in zip(vocabularies, self._weights, strict=True)]
        joined = self._joined(vocabularies, owner)
        for problem in self._problems.errors:
            self._check.error(self._section.at, f"{problem.where}: {problem.what}", problem.mend)
        for problem in self._problems.warnings:
            self._check.warn(self._section.at, f"{problem.where}: {problem.what}", problem.mend)
        if self._problems.errors or any(a is None for a in asked.values()):
            return None
        sizes = [_embedding_rows(weights) for weights in self._weights]
        rows = max(joined.tokens.values(), default=-1) + 1
        rows = max([rows, *sizes]) if keep_padding else rows
        rows += -rows % self._section.pad
        plan = TokenPlan(self._models[owner], self._files(owner, joined), lenders=self._models)
        ids = dict(zip((ref.key for ref in self._models), vocabularies, strict=True))[donor.key].tokens or {}
        pairs = {number: joined.tokens.get(token, number) for token, number in ids.items()}
        plan.renumbered = {old: new for old, new in pairs.items() if old != new}
        same = all(own == joined.tokens for own in known) and not any(a.force for a in asked.values() if a)
        if not same or any(size != rows for size in sizes):
            wishes = {token: wish for token, wish in asked.items() if wish is not None}
            base = 0 if self._based else None
            plan.maps, nobody = map_rows(joined.tokens, rows, known, sizes, base, wishes, keep_padding)
            plan.rows = rows
            if nobody:
                names = ", ".join(f"`{token}`" for token in nobody[:5]) + (" …" if len(nobody) > 5 else "")
                what = f"no model has {names}: their rows are zero"
                self._check.warn(self._section.at, what, "give them a `source`")
        return plan

    def _vocabularies(self) -> list[Vocabulary] | None:
        """Of every model; one without tokenizer is taken to use the first one's."""
        found: list[Vocabulary | None] = []
        for ref in self._models:
            try:
                found.append(read_vocabulary(_tokenizer_folder(ref), ref.name))
            except SpoliaError as error:
                for problem in error.problems:
                    self._check.error(self._section.at, f"{problem.where}: {problem.what}", problem.mend)
                return None
        first = found[0]
        if first is None:
            what = f"`{self._models[0].name}` has no tokenizer files, and the others' are compared with it"
            self._check.error(self._section.at, what, "put its tokenizer.json into its folder")
            return None
        size = _vocabulary_size(self._weights[0])
        if size is None:
            what = f"`{self._models[0].name}` has no tensor that looks like an embedding"
            self._check.error(self._section.at, what, "remove the section: there are no rows to line up")
            return None
        vocabularies = [first.within(size)]
        for ref, own in zip(self._models[1:], found[1:], strict=True):
            if own is None:
                what = f"`{ref.name}` has no tokenizer files: it is taken to use that of `{first.name}`"
                self._check.warn(self._section.at, what, "put its own into its folder if it has another")
                own = Vocabulary(ref.name, vocabularies[0].tokens, vocabularies[0].data, first.seal)
            vocabularies.append(own)
        return vocabularies

    def _owner(self) -> int | None:
        """Number of the model whose tokenizer is the result's, or grows into it."""
        source = self._section.source
        return 0 if isinstance(source, str) else self._number(source, (*self._section.at, "source"))

    def _number(self, ref: ModelRef, at: Place) -> int | None:
        for number, model in enumerate(self._models):
            if model.key == ref.key:
                return number
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(model.name for model in self._models))
        self._check.error(at, f"`{ref.name}` is none of the models that are merged", f"write one of {names}")
        return None

    def _sealed(self, vocabularies: list[Vocabulary], owner: int) -> TokenPlan | None:
        """Tokenizers that cannot be looked into: only equal ones pass, and rows stay where they are."""
        sealed = next(v for v in vocabularies if v.tokens is None)
        if self._section.tokens or self._section.pad > 1 or not all(v.same(sealed) for v in vocabularies):
            mend = "save the fast tokenizer beside it (transformers: `AutoTokenizer.from_pretrained(DIR)."
            what = f"`{sealed.name}` has no tokenizer.json, and other files cannot be lined up"
            self._check.error(self._section.at, what, f"{mend}save_pretrained(DIR)`)")
            return None
        return TokenPlan(self._models[owner])

    def _rows_of(self, vocabulary: Vocabulary, weights: Weights) -> dict[str, int]:
        size = _vocabulary_size(weights) or 0
        return {token: number for token, number in (vocabulary.tokens or {}).items() if number < size}

    def _joined(self, vocabularies: list[Vocabulary], owner: int) -> Joined:
        sizes = [_vocabulary_size(weights) or 0 for weights in self._weights]
        cut = [v.within(size) for v, size in zip(vocabularies, sizes, strict=True)]
        others = cut[1:] if self._section.source == "union" else []
        return join(cut[owner], others, self._section.tokens, self._problems)

    def _asked(self, token: str, vocabularies: list[Vocabulary]) -> Asked | None:
        """What the recipe says about one token; None: told."""
        source, force, at = self._section.tokens[token]
        here: Place = (*at, "source")
        if source is None:
            return Asked(force=force)
        if isinstance(source, dict) and source.get("kind") == "zero":
            self._check.keys(source, here, ("kind",))
            return Asked(zero=True, force=force)
        wanted: Any = token
        if isinstance(source, dict) and "kind" in source:
            if source["kind"] != "model_token":
                mend = "write zero or model_token"
                self._check.error((*here, "kind"), f"no kind is called `{source['kind']}`", mend)
                return None
            self._check.keys(source, here, ("kind", "model", "token", "token_id"))
            if ("token" in source) == ("token_id" in source) or "model" not in source:
                mend = 'write `{kind: model_token, model: PATH, token: "..."}`, or `token_id` instead of `token`'
                self._check.error(here, "a model_token needs `model`, and `token` or `token_id`", mend)
                return None
            wanted, source = source.get("token", source.get("token_id")), source["model"]
        ref = self._refer(source, here)
        number = self._number(ref, here) if ref is not None else None
        if number is None:
            return None
        own = self._rows_of(vocabularies[number], self._weights[number])
        row = wanted if type(wanted) is int else own.get(str(wanted))
        if row is None or not 0 <= row < _embedding_rows(self._weights[number]):
            what = f"`{self._models[number].name}` has no token {wanted!r}"
            self._check.error(here, what, "name one of its tokens, or write `{kind: zero}`")
            return None
        return Asked((number, row), force=force)

    def _files(self, owner: int, joined: Joined) -> dict[str, str]:
        """tokenizer.json and its config, where the vocabulary is nobody's own."""
        if joined.data is None:
            return {}
        files = {"tokenizer.json": json_text(joined.data)}
        config = _tokenizer_folder(self._models[owner]) / "tokenizer_config.json"
        if config.is_file():
            value = read_mapping(config)
            if isinstance(value.get("added_tokens_decoder"), dict):
                for entry in joined.data["added_tokens"]:
                    flags = {key: v for key, v in entry.items() if key != "id"}
                    value["added_tokens_decoder"].setdefault(str(entry["id"]), flags)
            files["tokenizer_config.json"] = json_text(value)
        return files


def _tokenizer_folder(ref: ModelRef) -> Path:
    """Where the model's tokenizer lies: with an adapter that has its own, there."""
    if ref.lora is not None and (ref.lora / "tokenizer.json").is_file():
        return ref.lora
    return ref.path if ref.path.is_dir() else ref.path.parent


def _embedding_rows(weights: Weights) -> int:
    return min((weights.entries[name].shape[0] for name in embeddings_of(weights)), default=0)


def _vocabulary_size(weights: Weights) -> int | None:
    """Ids that the model has rows for; None when it has no embedding."""
    rows = _embedding_rows(weights)
    if not rows:
        return None
    config = weights.config or {}
    places = (place for place in (config, config.get("text_config")) if isinstance(place, dict))
    said = (place.get("vocab_size") for place in places)
    return min(next((size for size in said if type(size) is int and size > 0), rows), rows)

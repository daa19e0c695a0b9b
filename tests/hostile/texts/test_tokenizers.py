"""Hostile tokenizers: files that are damaged, ids that lie, vocabularies that cannot be joined, sections that ask too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")
Case = tuple[str | None, dict[str, bytes | dict[str, Any] | None]]

LINEAR = "merge_method: linear\nmodels:\n" + "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
UNION = LINEAR + "tokenizer: {source: union}\n"
BROKEN = {
    "empty": b"", "half": b"{", "a list": b"[]", "null": b"null", "a number": b"7", "a text": b'"x"',
    "not UTF-8": b"\xff{}", "zeros": b"\0" * 99, "deep": b'{"a":' * 100_000,
    "5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "two mappings": b"{}{}", "a pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "nested deep": b'{"x":' + b"[" * 300 + b"]" * 300 + b"}",
}  # fmt: skip
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
MORE = {"a": 0, "b": 1, "ba": 2}  # b has a token that a lacks: the tokenizers must be joined
OLDER = {f"{m}/{file}": content for m in "ab" for file, content in (
    ("tokenizer.json", None), ("vocab.json", b'{"a": 0, "b": 1}'))}  # fmt: skip


def added(**entry: Any) -> dict[str, Any]:
    return {"added_tokens": [entry]}


def section(text: str) -> str:
    return f"{LINEAR}tokenizer: {text}\n"


REFUSED: dict[str, Case] = {
    **{f"{m}'s tokenizer is {kind}": (UNION, {f"{m}/tokenizer.json": raw}) for m in "ab" for kind,
    raw in BROKEN.items()},
    **{f"tokenizer with {key} {value!r:.24}": (UNION, {"b/tokenizer.json": {key: value}}) for key, value in (
        ("model", None), ("model", []), ("model", {}), ("model", "BPE"), ("added_tokens", 5), ("added_tokens", [1]),
        ("added_tokens", {"a": 1}), ("added_tokens", "abc"), ("added_tokens", [{}]), ("added_tokens", [None]))},
    **{f"added token {entry!r:.40}": (UNION, {"b/tokenizer.json": added(**entry)}) for entry in (
        {"id": "x", "content": "y"}, {"id": 1, "content": []}, {"id": 1, "content": 5}, {"id": -1, "content": "y"},
        {"id": 1.0, "content": "y"}, {"id": True, "content": "y"}, {"id": None, "content": "y"}, {"id": 1},
        {"content": "y"}, {"id": 0, "content": "\ud800"})},
    **{f"tokenizer's model with {key} {value!r:.24}": (UNION, {"b/tokenizer.json": {"model": BPE | {key: value}}})
       for key, value in (
        ("type", []), ("type", 5), ("vocab", None), ("vocab", 5), ("vocab", "ab"), ("vocab", [[]]), ("vocab", [5]),
        ("vocab", ["ab"]), ("vocab", [["a"]]), ("vocab", [["a", "0"]]), ("vocab", [["a", 0.0], None]),
        ("vocab", [[["a"], 0.0]]), ("vocab", {"a": "0"}), ("vocab", {"a": -1}), ("vocab", {"a": 0.5}),
        ("vocab", {"a": True}), ("vocab", {"a": None}), ("vocab", {"\ud800": 0}), ("merges", None), ("merges", 5),
        ("merges", ["ab"]), ("merges", [5]), ("merges", [[]]), ("merges", [["a", "b", "c"]]), ("merges", [["a", 5]]),
        ("merges", {"a": 1}), ("merges", "a b"), ("merges", [None]), ("merges", [{"a": 1, "b": 2}]))},
    **{f"{file} is {kind}, without tokenizer.json": (UNION, OLDER | {f"b/{file}": raw})
       for file in ("vocab.json", "added_tokens.json") for kind, raw in BROKEN.items()},
    **{f"{file} says {raw!r:.30}": (UNION, OLDER | {f"b/{file}": raw}) for file in ("vocab.json", "added_tokens.json")
       for raw in (b'{"a": "x"}', b'{"a": []}', b'{"a": null}', b'{"a": -1}', b'{"a": 1.5}', b'{"a": true}',
                   b'{"\\ud800": 0}', b'{"a": {}}')},
    "no tokenizer at all": (UNION, {f"{m}/tokenizer.json": None for m in "ab"}),
    "tokens to add, and a file that cannot take them": (UNION, OLDER | {"b/vocab.json": b'{"a": 0, "c": 1}'}),
    "a Unigram vocabulary and a BPE one": (UNION, {"b/tokenizer.json": {
        "model": {"type": "Unigram", "vocab": [["a", -1.0], ["z", -2.0]]}}}),
    **{f"padding {pad:.16}": (section(f"{{source: union, pad_to_multiple_of: {pad}}}"), {}) for pad in (
        "-1", "x", "1.5", "[]", "{}", "true", ".nan", ".inf", str(2**20 + 1), str(10**9), str(10**13), str(2**62),
        "1" + "0" * 300, "1" + "0" * 5000)},
    **{f"tokenizer: {text}": (section(text), {}) for text in (
        "[]", "5", "union", "{source: []}", "{source: {}}", "{source: 5}", "{source: ./nobody}", "{source: a+b+c}",
        "{source: union, tokens: 5}", "{source: union, tokens: [a]}", "{source: union, tokens: {a: 5}}",
        "{source: union, tokens: {a: []}}", "{source: union, tokens: {a: {force: 2}}}",
        "{source: union, tokens: {a: {source: []}}}", "{source: union, tokens: {a: {source: {kind: one}}}}",
        "{source: union, tokens: {a: {source: {kind: []}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token, model: ./a, token: no}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token, model: ./a, token_id: 4}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token, model: ./a, token_id: -1}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token, model: ./a, token_id: 1.5}}}}",
        "{source: union, tokens: {a: {source: {kind: model_token, model: [], token_id: 1}}}}",
        "{source: union, tokens: {a: {source: ./nobody}}}", "{source: union, unknown: 1}",
        '{source: union, tokens: {"\\ud800": {source: ./a}}}', '{source: union, tokens: {"\\0": {source: ./a}}}')},
    "both forms of the section": (UNION + "tokenizer_source: base\n", {}),
    "a file of the system as tokenizer": (LINEAR + "tokenizer_source: /etc/passwd\n", {}),
    "tokenizer_config is half, and the union needs it": (UNION, {
        "a/tokenizer_config.json": b"{", "b/tokenizer.json": {"model": BPE | {"vocab": MORE, "merges": []}}}),
    "generation_config is half, and its ids move": (
        UNION.replace("union", "./b"), {"a/generation_config.json": b"{", "b/tokenizer.json": {
            "model": BPE | {"vocab": {"a": 1, "b": 0, "ab": 2}}}}),
    "generation_config is a list, and its ids move": (
        UNION.replace("union", "./b"), {"a/generation_config.json": b"[]", "b/tokenizer.json": {
            "model": BPE | {"vocab": {"a": 1, "b": 0, "ab": 2}}}}),
}  # fmt: skip
AVERAGED: dict[str, Case] = {
    **{f"tokenizer is {kind} and nobody reads it": (None, {"a/tokenizer.json": raw}) for kind, raw in BROKEN.items()},
    "no type": (UNION, {f"{m}/tokenizer.json": {"model": BPE | {"type": None}} for m in "ab"}),
    "merges as pairs and as texts": (UNION, {"b/tokenizer.json": {"model": BPE | {"merges": [["a", "b"]]}}}),
    "a config whose text_config is a number": (UNION, {f"{m}/config.json": {"text_config": 7} for m in "ab"}),
    "a config whose vocab_size is below zero": (UNION, {f"{m}/config.json": {"vocab_size": -1} for m in "ab"}),
    "a config whose vocab_size is text": (UNION, {f"{m}/config.json": {"vocab_size": "4"} for m in "ab"}),
    "10^15 rows said": (UNION, {f"{m}/config.json": {"vocab_size": 10**15} for m in "ab"}),
    "vocab.txt that is not UTF-8": (UNION, {f"{m}/tokenizer.json": None for m in "ab"} | {
        f"{m}/vocab.txt": b"\xff\n\xfe\nx\ny" for m in "ab"}),
}  # fmt: skip
WHOLE: dict[str, Case] = {
    **{f"b's added tokens {value!r:.40}": (UNION, {"b/tokenizer.json": {"added_tokens": value}}) for value in (
        {}, None, "", [], [{"id": 2**63, "content": "y"}], [{"id": 3, "content": ""}], [{"id": 3, "content": "y",
        "x": {}}],
        [{"id": 3, "content": "\0"}], [{"id": 0, "content": "y"}], [{"id": 3, "content": "y"}, {"id": 3,
        "content": "z"}])},
    **{f"b's vocabulary {value!r:.40}": (UNION, {"b/tokenizer.json": {"model": BPE | {"vocab": value, "merges": []}}})
       for value in ([], {}, {"a": 2**63}, {"a": 0, "b": 0}, {"": 0}, {"a": 0, "zz": 1}, {"a": 10**300}, {"\u202e": 0},
                     {"\0": 0}, {"a" * 100_000: 0}, MORE)},
    "a's vocabulary without tokens": (UNION, {"a/tokenizer.json": {
        "model": BPE | {"vocab": {}, "merges": []}, "added_tokens": []}}),
    "merges of tokens that nobody has": (UNION, {"b/tokenizer.json": {"model": BPE | {
        "vocab": MORE, "merges": ["q q", ["z", "z"]]}}}),
    "a Unigram score that is no number": (UNION, {f"{m}/tokenizer.json": {
        "model": {"type": "Unigram", "vocab": [[t, float("nan")] for t in ("a", m)]}} for m in "ab"}),
    "b without tokenizer": (UNION, {"b/tokenizer.json": None}),
    "padding to 4096 rows": (section("{source: union, pad_to_multiple_of: 4096}"), {}),
    "half a letter in the flags of an added token": (UNION, {"b/tokenizer.json": added(id=3, content="y",
    note="\ud800")}),
    "half a letter in tokenizer_config": (UNION, {
        "a/tokenizer_config.json": {"x": "\ud800"}, "b/tokenizer.json": {"model": BPE | {"vocab": MORE,
        "merges": []}}}),
    "half a letter in generation_config, ids move": (UNION.replace("union", "./b"), {
        "a/generation_config.json": {"x": "\ud800", "eos_token_id": [[1], "x", 1]},
        "b/tokenizer.json": {"model": BPE | {"vocab": {"a": 1, "b": 0, "ab": 2}}}}),
    "ids of the config in lists, and they move": (UNION.replace("union", "./b"), {
        "a/config.json": {"eos_token_id": [[1], {}, None, "x", 1]},
        "b/tokenizer.json": {"model": BPE | {"vocab": {"a": 1, "b": 0, "ab": 2}}}}),
}  # fmt: skip
CASES = [
    (name, outcome, case)
    for outcome, cases in (("refused", REFUSED), ("averaged", AVERAGED), ("whole", WHOLE))
    for name, case in cases.items()
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("outcome", "case"), [pytest.param(o, c, id=ascii(n)) for n, o, c in CASES])
def test_tokenizers(outcome: str, case: Case, judge_text: Callable[..., None]) -> None:
    judge_text(outcome, *case)


def test_what_is_written_of_odd_tokenizers_can_be_read_again(models: Any, put: Callable[..., None]) -> None:
    from spolia.runs.verbs import merge_recipe

    put(models, {"b/tokenizer.json": added(id=3, content="y", note="\ud800")})
    (models / "r.yaml").write_text(UNION)
    out = merge_recipe(models / "r.yaml", models / "out", threads=1)
    written = json.loads((out / "tokenizer.json").read_bytes())
    assert {entry["content"]: entry.get("note") for entry in written["added_tokens"]} == {"<x>": None, "y": "\ud800"}


def test_there_are_enough() -> None:
    assert len(CASES) >= 150

"""Hostile texts beside the weights: configs, generation configs, cards and code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")
Case = tuple[str | None, dict[str, bytes | dict[str, Any] | None]]

LINEAR = "merge_method: linear\nmodels:\n" + "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
TEMPLATE = LINEAR + "chat_template: chatml\n"
UNION = LINEAR + "tokenizer: {source: union}\n"
SLICES = "merge_method: passthrough\nslices:\n- sources: [{model: ./a, layer_range: [0, 1000000000000]}]\n"
BROKEN = {
    "empty": b"", "half": b"{", "a list": b"[]", "null": b"null", "a number": b"7", "a text": b'"x"',
    "not UTF-8": b"\xff{}", "zeros": b"\0" * 99, "deep": b'{"a":' * 100_000,
    "5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "two mappings": b"{}{}", "UTF-16 of half a letter": b"\xff\xfe{", "a page": b"<!DOCTYPE html><html>404</html>",
    "a pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 570\n",
}  # fmt: skip
DEEP = b'{"x":' + b"[" * 300 + b"]" * 300 + b"}"  # Python reads it, and cannot copy it

REFUSED: dict[str, Case] = {
    **{f"{m}'s config is {kind}": (None, {f"{m}/config.json": raw}) for m in "ab" for kind, raw in BROKEN.items()},
    "the donor's config is nested too deep to be copied": (None, {"a/config.json": DEEP}),
    **{f"tokenizer_config is {kind} and its template goes": (TEMPLATE, {"a/tokenizer_config.json": raw})
       for kind, raw in (BROKEN | {"nested deep": DEEP}).items()},
    "another type": (None, {"b/config.json": {"model_type": "gpt2"}}),
    "a type that is a number": (None, {"b/config.json": {"model_type": 5}}),
    "a type that is a mapping": (None, {"b/config.json": {"model_type": {"a": 1}}}),
    "a type of 100 000 letters": (None, {"a/config.json": {"model_type": "x" * 100_000}}),
    "a type of half a letter": (None, {"a/config.json": {"model_type": "\ud800"}}),
    "other architectures, types unsaid": (None, {
        "a/config.json": {"model_type": None}, "b/config.json": {"model_type": None,
        "architectures": ["GPT2LMHeadModel"]}}),
    "10^15 layers, and slices of as many": (SLICES, {"a/config.json": {"num_hidden_layers": 10**15}}),
}  # fmt: skip
AVERAGED: dict[str, Case] = {
    **{f"config with {key} {value!r:.20}": (None, {"b/config.json": {key: value}}) for key, value in (
        ("architectures", 5), ("architectures", {}), ("architectures", {"a": 1}), ("architectures", "x"),
        ("architectures", []), ("architectures", [[]]), ("model_type", []), ("model_type", ""), ("text_config", 7),
        ("text_config", []), ("tie_word_embeddings", "x"), ("tie_word_embeddings", []), ("num_hidden_layers", "\0"),
        ("num_hidden_layers", 10**30), ("num_hidden_layers", -1), ("num_hidden_layers", True), ("vocab_size", -1),
        ("vocab_size", {}), ("x", "\ud800"), ("", ""), ("x", float("nan")), ("x", float("inf")))},
    **{f"donor's config with {key} {value!r:.20}": (None, {"a/config.json": {key: value}}) for key, value in (
        ("text_config", 7), ("torch_dtype", {}), ("torch_dtype", "float4"), ("vocab_size", "x"), ("eos_token_id", {}),
        ("eos_token_id", [[1], {}]), ("x", "\ud800"), ("auto_map", {"AutoModel": "evil.Evil"}), ("model_type", None),
        ("quantization_config", 5), ("transformers_version", []), ("_name_or_path", "../../etc/passwd"))},
    **{f"{m}'s types unsaid, architectures {value!r:.20}": (None, {f"{m}/config.json": {
        "model_type": None, "architectures": value}}) for m in "ab" for value in (5, {"a": 1}, [], [None], "x", None)},
    "donor's ids in lists, ids move": (UNION, {"a/config.json": {"eos_token_id": [[1], {}, None, "x", 2]}}),
    "no config": (None, {"a/config.json": None}),
    "no config but a template": (TEMPLATE, {"a/config.json": None}),
    **{f"tokenizer_config is {kind} and stays": (None, {"a/tokenizer_config.json": raw}) for kind,
    raw in BROKEN.items()},
    **{f"generation_config is {kind} and stays": (UNION, {"a/generation_config.json": raw})
       for kind, raw in (BROKEN | {"nested deep": DEEP}).items()},
    **{f"special_tokens_map is {kind}": (UNION, {"a/special_tokens_map.json": raw}) for kind, raw in BROKEN.items()},
    "a template of half a letter that goes": (TEMPLATE, {"a/tokenizer_config.json": {"chat_template": "\ud800"}}),
    "half a letter beside a template that goes": (
        TEMPLATE, {"a/tokenizer_config.json": {"chat_template": "x", "y": "\ud800"}}),
    "code beside the model": (None, {"a/modeling_evil.py": b"open('ran', 'w')"}),
    "a card that lies": (None, {"a/README.md": b"---\nlicense: " + b"\xff" * 99 + b"\n---\n" * 99}),
    "a card with a licence of markup": (None, {"a/README.md": b"---\nlicense: <script>\n---\n"}),
    "a card without an end": (None, {"a/README.md": b"---\n" * 100_000}),
    "a template file that is no Jinja": (None, {"a/chat_template.jinja": b"{% for %}"}),
    "vocab.txt of zeros": (None, {"a/vocab.txt": b"\0" * 1000}),
    "merges.txt not UTF-8": (None, {"a/merges.txt": b"\xff\xfe"}),
}  # fmt: skip
CASES = [(name, "refused", case) for name, case in REFUSED.items()]
CASES += [(name, "averaged", case) for name, case in AVERAGED.items()]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("outcome", "case"), [pytest.param(o, c, id=ascii(n)) for n, o, c in CASES])
def test_configs(outcome: str, case: Case, judge_text: Callable[..., None]) -> None:
    judge_text(outcome, *case)


def test_a_donor_that_is_spoilt_while_it_is_merged_counts_as_it_was(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spolia
    from spolia.parts.merging import Merge

    (models / "a" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (models / "r.yaml").write_text(TEMPLATE)
    run = Merge.run

    def spoiling(self: Merge, *given: Any) -> None:
        for name in ("config.json", "tokenizer_config.json"):
            (models / "a" / name).write_bytes(b"{")
        run(self, *given)

    monkeypatch.setattr(Merge, "run", spoiling)
    out = spolia.runs.verbs.merge_recipe(models / "r.yaml", models / "out", threads=1)
    config = json.loads((models / "out" / "config.json").read_bytes())
    assert out == models / "out" and config["model_type"] == "llama"
    assert json.loads((models / "out" / "tokenizer_config.json").read_bytes()) == {}


LOOKED_AT: dict[str, dict[str, Any]] = {
    **{f"{file} is {kind}": {f"{m}/{file}.json": raw for m in "ab"} for kind, raw in (BROKEN | {"deep in lists": DEEP}).items()
       for file in ("config", "tokenizer", "tokenizer_config")},
    "lists of 900 levels": {f"{m}/config.json": b'{"x":' + b"[" * 900 + b"]" * 900 + b"}" for m in "ab"},
    **{f"{key} {value!r:.20}": {"b/config.json": {key: value}} for key, value in (
        ("vocab_size", {}), ("vocab_size", "\ud800"), ("text_config", {"vocab_size": []}), ("num_hidden_layers", 10**30),
        ("x", float("nan")), ("", ""), ("\x1b[2J", "\x1b[2J"), ("x", 10**300), ("model_type", None))},
}  # fmt: skip


@pytest.mark.sampled(8)
@pytest.mark.parametrize("files", [pytest.param(files, id=ascii(name)) for name, files in LOOKED_AT.items()])
def test_inspected(
    files: dict[str, Any], models: Any, put: Callable[..., None], told: Callable[..., str | None]
) -> None:
    from spolia.reports.inspection import render
    from spolia.runs.describe import inspection_text
    from spolia.runs.environment import environment
    from spolia.runs.inspection import inspect

    put(models, files)
    seen: list[Any] = []
    if told(lambda: seen.append(inspect(models / "a", [models / "b"], threads=1).to_dict())) is None:
        assert json.dumps(seen[0]) and "\x1b" not in inspection_text(seen[0])
        render(seen[0], environment(seed=0, seeds=[])).encode()


def test_there_are_enough() -> None:
    assert len(CASES) >= 140 and len(LOOKED_AT) >= 50

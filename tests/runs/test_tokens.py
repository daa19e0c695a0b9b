"""The tokenizer section: one vocabulary, the right row for every token in every model, and files that agree with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spolia.errors import SpoliaError
from spolia.parts.rows import ZERO, Asked, RowMap, map_rows
from spolia.runs.mergekit import read_mergekit
from spolia.runs.merging import prepare, run_merge
from spolia.runs.yamlmarks import load

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 3
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PLAIN = SPECIAL | {"special": False, "normalized": True}


def bpe(vocab: list[str], merges: list[str] = (), added: dict[str, dict] | None = None) -> dict[str, Any]:
    """A tokenizer.json; ids are places in `vocab`, then in `added` (content -> flags)."""
    table = {token: i for i, token in enumerate(vocab)}
    extra = [
        {"id": table.get(t, len(vocab) + i), "content": t} | flags for i, (t, flags) in enumerate((added or {}).items())
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": extra, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": table, "merges": list(merges)},
    }  # fmt: skip


TOKENIZERS = {
    "base": bpe(["<s>", "</s>", "a", "b", "c", "ab"], ["a b"]),
    "A": bpe(["<s>", "</s>", "b", "a", "d", "ab", "abd"], ["a b", "ab d"], {"<x>": SPECIAL}),
    "B": bpe(["<s>", "</s>", "a", "b", "c", "e", "d"], [], {"<y>": PLAIN}),
}
ROWS = {"base": 6, "A": 10, "B": 8}  # A's embedding is padded by two rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, rows) in enumerate(ROWS.items()):
        noise = torch.Generator().manual_seed(seed)
        tensors = {EMBED: torch.randn(rows, WIDTH, generator=noise), HEAD: torch.randn(rows, WIDTH, generator=noise)}
        tensors |= {"lm_head.bias": torch.randn(rows, generator=noise), "model.norm.weight": torch.ones(WIDTH)}
        config = {"vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
        config |= {"pad_token_id": 3} if name == "base" else {}
        path = write_model(root / name, tensors, config)
        (path / "tokenizer.json").write_text(json.dumps(TOKENIZERS[name]))
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "added_tokens_decoder": {}}))
        (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "made_by": name}))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "pad_token_id": 3}))
        (path / "vocab.json").write_text("{}")
    return root


def ids(name: str) -> dict[str, int]:
    data = TOKENIZERS[name]
    return data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


@pytest.fixture
def merge(folder, tmp_path):
    def merge(text: str, **options) -> Path:
        return run_merge(read_mergekit(load(text, "r.yml"), folder=folder), tmp_path / "out", **options)

    return merge


@pytest.fixture
def refusal(folder):
    def refusal(text: str) -> str:
        with pytest.raises(SpoliaError) as caught:
            prepare(read_mergekit(load(text, "r.yml"), folder=folder))
        return str(caught.value)

    return refusal


def stored(folder: Path, name: str, tensor: str = EMBED) -> torch.Tensor:
    return load_file(folder / name / "model.safetensors")[tensor]


def result(out: Path) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    data = json.loads((out / "tokenizer.json").read_text())
    table = data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    return table, data, json.loads((out / "config.json").read_text())


def dense(folder: Path, models: list[str], tokens: dict[str, int], rows: int, tensor: str = EMBED, base: str | None = None,
          default: dict[str, torch.Tensor] | None = None, force: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:  # fmt: skip
    """Every model's new matrix, row by row as the rules say, all in memory: the reference."""
    new = {}
    for model in models:
        old = {m: stored(folder, m, tensor).double() for m in models}
        matrix = torch.zeros(rows, *old[model].shape[1:], dtype=torch.float64)
        for token, place in tokens.items():
            owners = [m for m in models if token in ids(m) and ids(m)[token] < len(old[m])]
            if model in owners and token not in force:
                matrix[place] = old[model][ids(model)[token]]
            elif default and token in default:
                matrix[place] = default[token]
            elif base in owners:
                matrix[place] = old[base][ids(base)[token]]
            elif owners:
                matrix[place] = torch.stack([old[m][ids(m)[token]] for m in owners]).mean(0)
        matrix[len(tokens) :] = matrix[: len(tokens)].mean(0)
        new[model] = matrix
    return new


UNION = (
    "merge_method: linear\nmodels:\n  - {model: A, parameters: {weight: 1}}\n  - {model: B, parameters: {weight: 3}}\n"
)
# fp32 sums of two rows, and a mean over all rows summed in fp64: a few units in the last place of values near 1
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def test_union_of_two_with_a_base(folder, merge):
    """Shared, base-only, other-only and nobody's tokens; the new ids follow the file and, within a model, its ids."""
    out = merge(UNION + "base_model: base\ntokenizer:\n  source: union\n  tokens: {<new>: null}\n")
    tokens, data, config = result(out)
    assert tokens == ids("base") | {"d": 6, "abd": 7, "<x>": 8, "e": 9, "<y>": 10, "<new>": 11}
    assert config["vocab_size"] == 12 and config["bos_token_id"] == 0
    for tensor in (EMBED, HEAD, "lm_head.bias"):
        new = dense(folder, ["base", "A", "B"], tokens, 12, tensor, base="base")
        torch.testing.assert_close(stored(out.parent, "out", tensor).double(), (new["A"] + 3 * new["B"]) / 4, **CLOSE)
    assert stored(out.parent, "out")[11].eq(0).all()
    flags = {entry["content"]: entry for entry in data["added_tokens"]}
    assert flags["<x>"] == {"id": 8, "content": "<x>"} | SPECIAL and flags["<y>"]["special"] is False
    assert set(flags) == {"<x>", "<y>", "<new>"} and data["model"]["merges"] == ["a b", "ab d"]


def test_the_union_tokenizer_loads_and_makes_the_tokens_of_the_others(merge):
    tokenizers = pytest.importorskip("tokenizers")
    out = merge(UNION + "base_model: base\ntokenizer_source: union\n")
    tokens, _, _ = result(out)
    made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert made.get_vocab() == tokens
    assert made.encode("abd ab<x>e").tokens == ["abd", "ab", "<x>", "e"]
    assert made.encode("ab c").ids == tokenizers.Tokenizer.from_str(json.dumps(TOKENIZERS["base"])).encode("ab c").ids


def test_without_a_base_the_first_tokenizer_grows_and_strangers_share_their_mean(folder, merge):
    text = (
        "merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}, {model: A, parameters: {weight: 0}}, "
    )
    out = merge(
        text + "{model: B, parameters: {weight: 0}}]\nparameters: {normalize: false}\ntokenizer_source: union\n"
    )
    tokens, _, _ = result(out)
    mean = (stored(folder, "A")[ids("A")["d"]] + stored(folder, "B")[ids("B")["d"]]) / 2
    torch.testing.assert_close(stored(out.parent, "out")[tokens["d"]], mean, **CLOSE)  # base lacks `d`, two have it
    assert torch.equal(stored(out.parent, "out")[tokens["e"]], stored(folder, "B")[ids("B")["e"]])  # only B has it


def test_the_task_arithmetic_family_meets_the_base_in_its_rows(folder, merge):
    out = merge(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: A, parameters: {weight: .5}}, "
        "{model: B, parameters: {weight: -2}}]\ntokenizer: {}\n"
    )
    tokens, _, _ = result(out)
    new = dense(folder, ["base", "A", "B"], tokens, 11, base="base")
    want = new["base"] + 0.5 * (new["A"] - new["base"]) - 2 * (new["B"] - new["base"])
    torch.testing.assert_close(stored(out.parent, "out").double(), want, **CLOSE)


@pytest.mark.parametrize("force", [False, True])
def test_tokens_with_a_source(folder, merge, force):
    flag = f"force: {str(force).lower()}"
    out = merge(
        UNION + "base_model: base\ntokenizer:\n  source: union\n  tokens:\n"
        f"    c: {{source: B, {flag}}}\n"
        f"    d: {{source: {{kind: model_token, model: A, token: abd}}, {flag}}}\n"
        f"    e: {{source: {{kind: model_token, model: A, token_id: 9}}, {flag}}}\n"  # a row no token of A has
        f"    ab: {{source: {{kind: zero}}, {flag}}}\n    '<n>': {{source: {{kind: zero}}}}\n"
    )
    tokens, _, _ = result(out)
    a, b = stored(folder, "A").double(), stored(folder, "B").double()
    default = {"c": b[4], "d": a[6], "e": a[9], "ab": torch.zeros(WIDTH).double(), "<n>": torch.zeros(WIDTH).double()}
    forced = ("c", "d", "e", "ab") if force else ()
    new = dense(folder, ["base", "A", "B"], tokens, 12, base="base", default=default, force=forced)
    torch.testing.assert_close(stored(out.parent, "out").double(), (new["A"] + 3 * new["B"]) / 4, **CLOSE)


@pytest.mark.parametrize(
    ("pad", "keep", "rows"), [(1, False, 11), (8, False, 16), (64, False, 64), (1, True, 11), (4, True, 12)]
)
def test_padding(folder, merge, pad, keep, rows):
    """Rows beyond the vocabulary are the mean of the others, per model."""
    out = merge(
        UNION + f"base_model: base\ntokenizer: {{source: union, pad_to_multiple_of: {pad}}}\n"
        f"x-spolia: {{keep_padding: {str(keep).lower()}}}\n"
    )
    tokens, _, config = result(out)
    got = stored(out.parent, "out").double()
    new = dense(folder, ["base", "A", "B"], tokens, rows, base="base")
    torch.testing.assert_close(got, (new["A"] + 3 * new["B"]) / 4, **CLOSE)
    assert config["vocab_size"] == rows == len(got)


@pytest.mark.parametrize("keep", [False, True])
def test_padded_inputs_lose_their_padding_unless_it_is_kept(folder, merge, keep):
    """One model with its own tokenizer: 8 tokens, 10 rows."""
    out = merge(
        "merge_method: linear\nmodels: [{model: A, parameters: {weight: 1}}]\ntokenizer_source: base\n"
        f"x-spolia: {{keep_padding: {str(keep).lower()}}}\n"
    )
    assert torch.equal(stored(out.parent, "out"), stored(folder, "A")[: 10 if keep else 8])
    assert result(out)[2]["vocab_size"] == (10 if keep else 8)
    assert (out / "tokenizer.json").read_bytes() == (folder / "A" / "tokenizer.json").read_bytes()


def test_the_tokenizer_of_another_model(folder, merge):
    """Its files as they are; config and generation files of the base, with ids that follow the tokens."""
    out = merge(UNION + "base_model: base\ntokenizer: {source: A}\n")
    assert (out / "tokenizer.json").read_bytes() == (folder / "A" / "tokenizer.json").read_bytes()
    assert json.loads((out / "special_tokens_map.json").read_text())["made_by"] == "A" and (out / "vocab.json").exists()
    tokens, _, config = result(out)
    assert config["pad_token_id"] == tokens["b"] == 2 and config["vocab_size"] == 8  # `b` has id 3 in the base
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 2], "pad_token_id": 2}
    new = dense(folder, ["base", "A", "B"], tokens, 8, base="base")
    torch.testing.assert_close(stored(out.parent, "out").double(), (new["A"] + 3 * new["B"]) / 4, **CLOSE)


def test_a_new_vocabulary_leaves_no_file_that_contradicts_it(merge):
    out = merge(UNION + "base_model: base\ntokenizer_source: union\n")
    assert not (out / "vocab.json").exists() and (out / "special_tokens_map.json").exists()
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["8"] == {"content": "<x>"} | SPECIAL


def test_equal_vocabularies_stay_as_they_are(folder, merge, write_model, tmp_path):
    out = merge("merge_method: linear\nmodels: [{model: B, parameters: {weight: 1}}]\ntokenizer_source: union\n")
    assert torch.equal(stored(out.parent, "out"), stored(folder, "B"))


def test_ids_beyond_the_embedding_count_as_missing(folder, tmp_path, write_model, merge):
    path = write_model(folder / "short", {EMBED: torch.ones(5, WIDTH)}, {"vocab_size": 5})
    (path / "tokenizer.json").write_text(json.dumps(bpe(["<s>", "</s>", "a", "b", "c", "ab", "zz"], ["a b"])))
    names = (
        "merge_method: linear\nbase_model: short\nmodels: [{model: short, parameters: {weight: 1}}]\ntokenizer: {}\n"
    )
    out = merge(names)
    tokens, data, config = result(out)
    assert tokens == {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4} and data["model"]["merges"] == []
    assert config["vocab_size"] == 5 == len(stored(out.parent, "out"))


def test_tied_models_lend_their_embedding_as_head(folder, write_model, tmp_path):
    """One stores a head, the other ties it; both have other vocabularies."""
    for name, head in (("tied", {}), ("loose", {HEAD: torch.full((7, WIDTH), 5.0)})):
        path = write_model(
            tmp_path / name, {EMBED: torch.full((7, WIDTH), 1.0)} | head, {"tie_word_embeddings": not head}
        )
        (path / "tokenizer.json").write_text(json.dumps(bpe(["a", "b", "c", "d", "e", "f", "g" if head else "h"])))
    text = "merge_method: linear\nmodels: [{model: tied}, {model: loose}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    out = run_merge(read_mergekit(load(text, "r.yml"), folder=tmp_path), tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged[HEAD], torch.tensor([3.0] * 6 + [1.0, 5.0]).unsqueeze(1).expand(8, WIDTH))
    assert torch.equal(merged[EMBED], torch.ones(8, WIDTH))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False  # else the head were not read


def test_a_model_without_tokenizer_is_taken_to_use_the_bases(folder, write_model):
    tensors = {EMBED: torch.ones(6, WIDTH), HEAD: torch.ones(6, WIDTH), "lm_head.bias": torch.ones(6)}
    write_model(folder / "bare", tensors | {"model.norm.weight": torch.ones(WIDTH)}, {"vocab_size": 6})
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: bare}, {model: A}]\n"
    text += "parameters: {weight: 1}\ntokenizer: {}\n"
    request = read_mergekit(load(text, "r.yml"), folder=folder)
    assert "`bare` has no tokenizer files: it is taken to use that of `base`" in "\n".join(map(str, request.warnings))
    assert request.tokens.maps[1].who[:6] == [1] * 6


def test_flags_defined_apart_are_told(folder, write_model, tmp_path):
    for name, flags in (("one", SPECIAL), ("two", PLAIN)):
        path = write_model(tmp_path / name, {EMBED: torch.ones(3, WIDTH)}, {"vocab_size": 3})
        (path / "tokenizer.json").write_text(json.dumps(bpe(["a", "b"], [], {"<z>": flags})))
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    request = read_mergekit(load(text, "r.yml"), folder=tmp_path)
    assert "`<z>` is defined apart (normalized, special); one wins" in "\n".join(map(str, request.warnings))


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
def test_other_kinds_of_vocabulary(write_model, tmp_path, kind):
    """Appended words keep their ids, and for Unigram their scores."""
    words = {"one": ["<unk>", "a", "b"], "two": ["<unk>", "b", "c", "d"]}
    for name, vocab in words.items():
        data = bpe(vocab, [], {"<e>": SPECIAL} if name == "one" else {})
        data["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                         "vocab": [[w, -float(i)] for i, w in enumerate(vocab)]} if kind == "Unigram" else {
                         "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                         "max_input_chars_per_word": 100, "vocab": {w: i for i, w in enumerate(vocab)}}  # fmt: skip
        rows = len(vocab) + (name == "one")
        path = write_model(tmp_path / name, {EMBED: torch.full((rows, WIDTH), float(rows))}, {"vocab_size": rows})
        (path / "tokenizer.json").write_text(json.dumps(data))
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    out = run_merge(read_mergekit(load(text, "r.yml"), folder=tmp_path), tmp_path / "out")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    wanted = {"<unk>": 0, "a": 1, "b": 2, "<e>": 3, "c": 4, "d": 5}
    assert made.get_vocab() == wanted and made.encode("a c").tokens == ["a", "c"]
    assert load_file(out / "model.safetensors")[EMBED].shape == (6, WIDTH)


# gathering


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_rows_are_gathered_whatever_the_blocks(folder, block, monkeypatch):
    from spolia.errors import Problems
    from spolia.runs.along import dress
    from spolia.runs.merging import _open

    text = UNION + "base_model: base\ntokenizer: {source: union, pad_to_multiple_of: 4, tokens: {q: null}}\n"
    request, problems = read_mergekit(load(text, "r.yml"), folder=folder), Problems()
    pool = _open(request, problems)
    dress(pool, request, problems)
    with pool.opened():
        for model in pool.models:
            plane = model.weights.plane(EMBED, model.name)
            whole, parts = torch.empty(12 * WIDTH), torch.empty(12 * WIDTH)
            plane.read(0, 12 * WIDTH, whole)
            for start in range(0, 12 * WIDTH, block):  # blocks begin and end inside rows
                stop = min(start + block, 12 * WIDTH)
                plane.expect(start, stop)
                plane.read(start, stop, parts[start:stop])
            assert torch.equal(whole, parts)


def test_runs_are_the_longest_stretches():
    made = RowMap([0, 0, 0, 1, 1, ZERO, ZERO, 0], [3, 4, 7, 8, 9, 0, 0, 1], 8)
    assert list(made.runs()) == [
        (0, 2, 0, 3),
        (2, 3, 0, 7),
        (3, 5, 1, 8),
        (5, 6, ZERO, 0),
        (6, 7, ZERO, 0),
        (7, 8, 0, 1),
    ]
    assert made.used(0) == 8 and made.used(1) == 10 and made.used(2) == 0


def test_ids_that_no_token_has_keep_the_first_models_rows():
    (a, b), nobody = map_rows({"x": 0, "y": 3}, 4, [{"x": 0, "y": 3}, {"x": 1}], [4, 2], 0, {"y": Asked()})
    assert (a.who, a.row) == ([0] * 4, [0, 1, 2, 3]) and not nobody
    assert (b.who, b.row) == ([1, 0, 0, 0], [1, 1, 2, 3])


# refusals


@pytest.mark.parametrize(
    ("section", "line", "word", "cure"),
    [
        ("tokenizer: {source: nowhere}", 6, "no model at `nowhere`", "write the path"),
        ("tokenizer_source: short", 6, "`short` is none of the models", "`base`, `A`"),
        ("tokenizer: {tokens: {a: {source: {kind: nil}}}}", 6, "no kind is called `nil`", "zero or model_token"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: A}}}}", 6, "`token` or `token_id`", "token_id"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: A, token: zzz}}}}", 6, "has no token 'zzz'", "zero"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: A, token_id: 10}}}}", 6, "has no token 10", "zero"),
        ("tokenizer: {tokens: {a: {source: {kind: zero, model: A}}}}", 6, "unknown key `model`", "kind"),
        ("tokenizer: {tokens: {e: {source: A}}}", 6, "`A` has no token 'e'", "kind: zero"),
        ("tokenizer: {tokens: {a: {sauce: A}}}", 6, "sauce", "did you mean `source`?"),
        ("tokenizer: {tokens: {a: A}}", 6, "must be a mapping", "{source: PATH}"),
        ("tokenizer: {tokens: {a: {source: A, force: maybe}}}", 6, "`force` cannot be 'maybe'", "true or false"),
        ("tokenizer: {pad_to_multiple_of: -8}", 6, "no count of rows", "64"),
    ],
)  # fmt: skip
def test_refused_with_line_and_cure(folder, refusal, write_model, section, line, word, cure):
    if not (folder / "short").exists():
        write_model(folder / "short", {EMBED: torch.ones(5, WIDTH)}, {"vocab_size": 5})
    text = UNION + "base_model: base\n" + section
    text = text.replace("merge_method: linear\n", "merge_method: linear\nout_dtype: float32\n").replace(
        "base_model", "base_model", 1
    )
    message = refusal(text)
    assert f"r.yml:{line}" in message or f"r.yml:{line + 1}" in message
    assert word in message and cure in message


def test_kinds_that_cannot_be_joined(write_model, tmp_path, folder):
    for name, kind in (("one", "BPE"), ("two", "WordPiece")):
        path = write_model(tmp_path / name, {EMBED: torch.ones(3, WIDTH)}, {"vocab_size": 3})
        data = bpe(["a", "b", name])
        data["model"]["type"] = kind
        (path / "tokenizer.json").write_text(json.dumps(data))
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    with pytest.raises(SpoliaError, match="two: has a WordPiece vocabulary, one a BPE one") as caught:
        read_mergekit(load(text, "r.yml"), folder=tmp_path)
    assert "r.yml:4" in str(caught.value) and "use `source: base`" in str(caught.value)
    read_mergekit(load(text.replace("{}", "{source: base}"), "r.yml"), folder=tmp_path)  # nothing has to be joined


def test_tokenizers_in_other_files(write_model, tmp_path):
    """sentencepiece models pass if they are equal; nothing is known about their tokens."""
    for name, raw in (("one", b"x"), ("two", b"x"), ("three", b"y")):
        path = write_model(tmp_path / name, {EMBED: torch.ones(3, WIDTH)}, {"vocab_size": 3})
        (path / "tokenizer.model").write_bytes(raw)
    text = (
        "merge_method: linear\nmodels: [{model: one}, {model: %s}]\nparameters: {weight: 1}\ntokenizer_source: union\n"
    )
    out = run_merge(read_mergekit(load(text % "two", "r.yml"), folder=tmp_path), tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == b"x"
    with pytest.raises(
        SpoliaError, match=r"`one` has no tokenizer\.json, and other files cannot be lined up"
    ) as caught:
        read_mergekit(load(text % "three", "r.yml"), folder=tmp_path)
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": 1}', '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": "b"}}}']
)
def test_damaged_tokenizers(write_model, tmp_path, text):
    path = write_model(tmp_path / "one", {EMBED: torch.ones(3, WIDTH)}, {"vocab_size": 3})
    (path / "tokenizer.json").write_text(text)
    recipe = "merge_method: linear\nmodels: [{model: one}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    with pytest.raises(SpoliaError, match=r"r\.yml:4 tokenizer: .*tokenizer\.json"):
        read_mergekit(load(recipe, "r.yml"), folder=tmp_path)


def test_other_widths_cannot_share_rows(write_model, tmp_path):
    for name, width in (("one", 3), ("two", 4)):
        path = write_model(tmp_path / name, {EMBED: torch.ones(3, width)}, {"vocab_size": 3})
        (path / "tokenizer.json").write_text(json.dumps(bpe(["a", "b", name])))
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    with pytest.raises(SpoliaError, match="rows of another width"):
        prepare(read_mergekit(load(text, "r.yml"), folder=tmp_path))


def test_vocabularies_cut_to_the_shorter_show_in_the_config(write_model, tmp_path):
    for name, rows in (("one", 6), ("two", 4)):
        config = {"text_config": {"vocab_size": rows}, "vocab_size": rows}
        write_model(tmp_path / name, {EMBED: torch.ones(rows, WIDTH), HEAD: torch.ones(rows, WIDTH)}, config)
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    with pytest.raises(SpoliaError, match="source: union"):
        prepare(read_mergekit(load(text, "r.yml"), folder=tmp_path))
    cut = read_mergekit(load(text + "x-spolia: {on_size_mismatch: truncate}\n", "r.yml"), folder=tmp_path)
    out = run_merge(cut, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 4


def test_another_map_is_another_merge(folder, merge, tmp_path):
    """A half-finished folder of one vocabulary is not gone on with for another."""
    from spolia.runs.merging import key_of

    keys = set()
    for section in (
        "tokenizer: {}",
        "tokenizer: {tokens: {b: {source: A, force: true}}}",
        "tokenizer: {tokens: {c: null}}",
    ):
        keys.add(key_of(prepare(read_mergekit(load(UNION + section, "r.yml"), folder=folder))))
    assert len(keys) == 2  # the last changes nothing


@pytest.mark.slow
def test_hash_seeds_change_no_byte(folder, tmp_path):
    """Two processes with other string hashes write equal folders."""
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        UNION.replace("{model: ", f"{{model: {folder}/") + "tokenizer: {pad_to_multiple_of: 8, tokens: {q: null}}\n"
    )
    for seed in ("1", "2"):
        code = f"from spolia.runs.verbs import merge_recipe; merge_recipe({str(recipe)!r}, {str(tmp_path / seed)!r})"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "2").iterdir()) and "tokenizer.json" in files
    for name in files:
        first, second = ((tmp_path / seed / name).read_bytes() for seed in ("1", "2"))
        # the card is named after its folder
        assert first == second or (name == "README.md" and len(first) == len(second))

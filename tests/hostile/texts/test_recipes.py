"""Hostile recipes of our form: sections of another kind, sizes without sense, every setting of every method with junk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spolia.catalog import METHODS, Method
from spolia.runs.recipe import Source, check_recipe, load_recipe
from spolia.runs.yamlmarks import load

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")

NATIVE = "spolia: 1\npool: {experts: [./a, ./b]}\nmethod: {name: average}\n"
POOL, METHOD = "{experts: [./a, ./b]}", "{name: average}"
JUNK = (
    "null",
    "[]",
    "{}",
    "x",
    "''",
    "{a: 1}",
    "[[1]]",
    "[x]",
    "[null]",
    "[1, 2, 3, 4, 5]",
    "true",
    "[true, 1]",
    "2026-11-21",
)
NUMBERS = (
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "-1e400",
    "9" * 400,
    "-1",
    "1e308",
    "[.nan, 1]",
    "[1e400, 1]",
    "0x" + "f" * 300,
)
REFUSED = {
    **{f"{key}: {value:.30}": f"{NATIVE}{key}: {value}\n" for key, value in (
        ("seeds", "0"), ("seeds", "1000000"), ("seeds", "true"), ("seeds", "[]"), ("output", "[]"), ("output", "5"),
        ("output", "{max_shard_size: 0}"), ("output", "{max_shard_size: -1}"), ("output", "{max_shard_size: 1e400}"),
        ("output", "{max_shard_size: .nan}"), ("output", "{max_shard_size: true}"), ("output", "{max_shard_size: []}"),
        ("output", "{max_shard_size: 0.1}"), ("output", "{max_shard_size: 5 parsecs}"), ("output",
        "{max_shard_size: 5GB5}"),
        ("output", "{max_shard_size: " + "9" * 5000 + "GB}"), ("output", "{max_shard_size: " + "9" * 400 + "GB}"),
        ("output", "{max_shard_size: \u0665\u0665GB}"), ("output", "{chunk_memory: -1}"), ("output",
        "{chunk_memory: {}}"),
        ("output", "{chunk_memory: " + "9" * 5000 + "}"), ("output", "{dtype: __class__}"), ("output", "{dtype: int8}"),
        ("output", "{dtype: [float32]}"), ("output", "{dtype: 32}"), ("output", "{dtype: true}"), ("output",
        "{path: /etc}"),
        ("unknown", "1"), ("__class__", "x"), ("method_", "x"))},
    **{f"version {value:.20}": NATIVE.replace("spolia: 1", f"spolia: {value}") for value in (
        "0", "2", "-1", "x", "[]", "{}", "null", "1.5", "true", "'1x'", "9" * 300, ".nan", "2026-11-21")},
    **{f"pool {value:.40}": NATIVE.replace(POOL, value) for value in (
        "null", "5", "x", "[]", "[./a, ./b]", "{}", "{experts: null}", "{experts: []}", "{experts: 5}",
        "{experts: ./a}",
        "{experts: {a: ./a}}", "{experts: [null]}", "{experts: [5]}", "{experts: [[]]}", "{experts: [{}]}",
        "{experts: [true]}",
        "{experts: [{name: a}]}", "{experts: [{path: null}]}", "{experts: [{path: []}]}", "{experts: [{path: {a: 1}}]}",
        "{experts: [{path: ./a, name: []}]}", "{experts: [{path: ./a, name: ''}]}",
        "{experts: [{path: ./a, lora: []}]}",
        "{experts: [{path: ./a, lora: ./b}]}", "{experts: [{path: ./a, lora: 5}]}",
        "{experts: [{path: ./a, unknown: 1}]}",
        "{experts: [./a, ./a]}", "{experts: [./a, ./b], base: []}", "{experts: [./a, ./b], base: {}}",
        "{experts: [./a, ./b], base: 5}",
        "{experts: [./a, ./b], base: ./a}", "{experts: [./a, ./b], base: {path: 5}}",
        "{experts: [./a, ./b], source: x}",
        "{experts: [./a, ./b], source: []}", "{experts: [./a, ./b], source: {}}", "{source: digits}",
        "{source: digits, domains: 5}",
        "{source: digits, domains: [x]}", "{source: digits, domains: []}",
        "{source: digits, domains: [upright, upright]}",
        "{experts: [" + "./a, " * 300 + "./b]}")},
    **{f"method {value:.40}": NATIVE.replace(METHOD, value) for value in (
        "null", "5", "average", "[]", "{}", "{name: null}", "{name: []}", "{name: {}}", "{name: 5}", "{name: ''}",
        "{name: averrage}",
        "{name: true}", "{name: os.system}", "{name: __import__}", "{name: 'spolia.cli:main'}",
        "{name: " + "x" * 5000 + "}",
        "{name: ties}", "{name: average, name_: x}", "{name: average, __class__: x}", "{name: average, experts: 5}",
        "{name: average, base: x}", "{name: average, model_config: {}}")},
    **{f"weight {value:.20}": NATIVE.replace(METHOD, f"{{name: average, weight: {value}}}") for value in (
        ".nan", ".inf", "1e400", "[1]", "[1, 2, 3]", "[]", "x", "{}", "9" * 400, "[1, -1]", "[0, 0]", "1e-300",
        "[.nan, 1]", "true", "[true, 1]")},
}  # fmt: skip
AVERAGED = {
    **{f"{key}: {value:.30}": f"{NATIVE}{key}: {value}\n" for key, value in (
        ("output", "{max_shard_size: 1}"), ("output", "{chunk_memory: 1}"), ("output", "{max_shard_size: 9999999TB}"),
        ("output", "{}"), ("seeds", "1"), ("seed", "'7'"), ("output", "{max_shard_size: 1e9}"))},
    **{f"weight {value:.20}": NATIVE.replace(METHOD, f"{{name: average, weight: {value}}}") for value in (
        "-1", "0.1", "[2, 2]", "'1'", "1e-6")},
    "a name of markup": NATIVE.replace("./b", "{name: '<script>', path: ./b}"),
    "a name of 10 000 letters": NATIVE.replace("./b", "{name: " + "x" * 10_000 + ", path: ./b}"),
    "a name of signs that move the cursor": NATIVE.replace("./b", '{name: "\\e[2J\\r\\n", path: ./b}'),
    "a name that climbs": NATIVE.replace("./b", "{name: ../../x, path: ./b}"),
}  # fmt: skip
CASES = [(name, "refused", text) for name, text in REFUSED.items()]
CASES += [(f"fine: {name}", "averaged", text) for name, text in AVERAGED.items()]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("outcome", "text"), [pytest.param(o, t, id=ascii(n)) for n, o, t in CASES])
def test_recipes(outcome: str, text: str, judge_text: Callable[..., None]) -> None:
    judge_text(outcome, text, {})


def settings_of(method: Method) -> list[str]:
    return list(method.settings_class().model_fields)


MERGES = [method for method in METHODS if method.family == "merge"]


@pytest.mark.slow
@pytest.mark.parametrize("method", MERGES, ids=lambda method: method.name)
def test_every_setting_with_junk_is_refused_or_read(method: Method, told: Callable[..., str | None]) -> None:
    for name in settings_of(method):
        for value in (*JUNK, *NUMBERS):
            experts = "[./a]" if method.settings_class().experts[1] == 1 else "[./a, ./b]"
            pool = f"{{base: ./o, experts: {experts}}}"
            text = f"spolia: 1\npool: {pool}\nmethod: {{name: {method.name}, {name}: {value}}}\n"
            source = Source("r", text, load(text, "r.yaml"), Path())
            read: list[Any] = []

            def reading(source: Source = source, read: list[Any] = read) -> None:
                read.append(check_recipe(source, check_paths=False))

            message = told(reading)
            if message is not None:
                assert name in message and len(message) < 5000, (name, value, message)
                continue
            resolved = read[0].to_yaml()  # what was read is kept in the run folder, and reads back to the same
            again = check_recipe(Source("r", resolved, load(resolved, "r.yaml"), Path()), check_paths=False)
            assert again.settings == read[0].settings, (name, value)
            assert value not in (".nan", ".inf", "-.inf", "1e400", "-1e400", "[.nan, 1]", "[1e400, 1]"), (name, value)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("override", [
    "", "=", "x", "x=", "=x", "[0]=1", "pool=", "pool.experts=", "pool.experts[9]=./a", "pool.experts[-1]=./a",
    "pool.experts[x]=./a",
    "pool..experts=1", "method.name=[", "method.name=!!python/name:os.system", "method.name={a: 1}", "seed=\0",
    "seed=\ud800",
    "a.b.c.d.e=1", "spolia.x=1", "seed=" + "9" * 5000, "a" * 5000 + "=1", "pool.experts[" + "9" * 5000 + "]=1",
    "seed=*x",
    "seed=[" + "[" * 400, ".=1", "pool.experts[0].path=~nobody-of-this-name/x", "--seed=1", "method.weight[0]=1",
    "pool.experts[\u0661]=./a",
])  # fmt: skip
def test_overrides(override: str, models: Path, told: Callable[..., str | None]) -> None:
    (models / "r.yaml").write_text(NATIVE)
    assert told(lambda: load_recipe(models / "r.yaml", [override])) is not None


def test_there_are_enough() -> None:
    assert len(CASES) >= 120
    assert sum(len(settings_of(method)) for method in MERGES) * len(JUNK + NUMBERS) >= 1500

"""Hostile YAML: texts that are no YAML, too much of it, tags that would run code, and values that look like others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")

NATIVE = "spolia: 1\npool: {experts: [./a, ./b]}\nmethod: {name: average}\n"
LINEAR = "merge_method: linear\nmodels:\n" + "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
ALIASED = "merge_method: linear\nmodels:\n- {model: ./a, parameters: &p {weight: 1}}\n- {model: ./b, parameters: *p}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
KEYS = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{? *{a} : 1, y: *{a}, z: *{a}}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))
TEXTS: dict[str, str | bytes] = {
    "empty": "", "null": "null", "a list": "[]", "a number": "7", "a word": "x", "a comment": "# nothing\n",
    "half": "{", "not UTF-8": b"\xff{}", "bytes of all kinds": bytes(range(256)), "zeros": b"\0" * 99,
    "UTF-16": NATIVE.encode("utf-16"), "UTF-16 without mark": NATIVE.encode("utf-16-le"),
    "UTF-32": NATIVE.encode("utf-32"),
    "Latin letters of one byte": "spolia: 1\nname: caf\xe9\n".encode("latin-1"),
    "an escape of terminals": "\x1b[2Jx: 1\n",
    "open brackets": "[" * 5000, "closed brackets": "[" * 900 + "]" * 900, "open braces": "{" * 5000,
    "half a megabyte of brackets": "[" * 499_999, "half a megabyte of colons": ":" * 499_999,
    "half a megabyte of dashes": "- " * 249_999,
    "a word of half a megabyte": "x" * 499_999, "half a megabyte of question marks": "? " * 249_999,
    "too long a text": "#" * 500_001, "two hundred thousand numbers": "x: [" + "1," * 200_000 + "]",
    "half a megabyte of empty documents": "---\n" * 124_999, "a thousand documents": "---\nx: 1\n" * 1000,
    "a tab before a key": "a:\n\tb: 1", "bad indentation": NATIVE + "  x: 1\n", "a lone quote": NATIVE + 'x: "\n',
    "an unknown escape": NATIVE + 'x: "\\q"\n', "a directive": "%YAML 9.9\n---\n" + NATIVE.replace("1", "2", 1),
    "an unknown directive alone": "%EVIL x\n", "a percent sign": "%", "an at sign": "@x", "a backquote": "`x`",
    "a key that is a list": NATIVE + "? [1]\n: 2\n", "a key that is a mapping": NATIVE + "? {a: 1}\n: 2\n",
    "a key of nothing": NATIVE + "? \n: 2\n", "an unknown alias": NATIVE + "seed: *x\n",
    "an alias of itself": "a: &a [*a]\n" + NATIVE, "a mapping of itself": "&a {a: *a}\n",
    "a billion laughs": LAUGHS + NATIVE,
    "a billion laughs as keys": KEYS + NATIVE, "2^60 items by aliases": CHAIN + NATIVE,
    "the same anchor twice": "x: &x 1\ny: &x 2\n" + NATIVE, "a merge key": "x: &x {seed: 1}\n<<: *x\n" + NATIVE,
    "a merge key of a list": "<<: [1, 2]\n" + NATIVE, "a key twice": NATIVE + "spolia: 1\n",
    "a key twice inside": NATIVE.replace("name: average", "name: average, name: ties"),
    "a key twice, once quoted": NATIVE + '"spolia": 1\n', "two documents": NATIVE + "---\n" + NATIVE,
    "an end and more": NATIVE + "...\nx\n", "a key that looks like another": NATIVE.replace("pool", "p\u043e\u043el"),
    "a name that looks like another": NATIVE.replace("average", "\u0430verage"),
    "a key of __class__": NATIVE + "__class__: x\n",
    "a wide colon": "spolia\uff1a 1\n", "spaces that do not break": NATIVE.replace(" ", "\xa0"),
    "written from right to left": NATIVE.replace("average", "\u202eegareva"),
    "a key with a mark": NATIVE.replace("pool", "pool\u200b"),
    "a zero byte": NATIVE + 'x: "\\0"\n', "half a letter": NATIVE + 'x: "\\ud800"\n',
    "a key of half a letter": NATIVE + '"\\ud800": 1\n',
    "a key of a zero byte": NATIVE + '"\\0": 1\n', "JSON": '{"spolia": 1, "pool": 5}',
    "Python": "{'spolia': __import__('os')}",
    "a page": "<!DOCTYPE html><html>404</html>",
    "a pointer of git lfs": "version https://git-lfs.github.com/spec/v1\nsize 5\n",
    "Jinja": "{{ 7 * 7 }}", "a safetensors header": b"\x08\0\0\0\0\0\0\0{}      ",
    "a zip file": b"PK\x03\x04" + b"\0" * 50,
}  # fmt: skip
TAGS = (
    "!!python/object/apply:os.system [touch ran]", "!!python/object/apply:subprocess.check_output [[touch, ran]]",
    "!!python/object/new:os.system [touch ran]", "!!python/name:os.system", "!!python/module:os",
    "!!python/object:pathlib.Path {}", "!!python/tuple [1]", "!!python/bytes AAAA", "!!python/complex 1j",
    "!<tag:yaml.org,2002:python/object/apply:os.system> [touch ran]", "!x 1", "!!binary AAAA", "!!set {a}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!int x", "!!int []", "!!float x", "!!bool x", "!!null x", "!!timestamp 2001-99-99",
    "!!map []", "!!seq {}",
    "!!str []", "!!merge x", "!env PATH", "!include r.yaml", "!!" + "x" * 300,
)  # fmt: skip
SEEDS = (  # none is a seed: words and numbers that YAML, Python or an eye take for others
    "-1", "1e400", "-1e400", ".nan", ".inf", "[1]", "{}", "0.5", "yes", "on", "true", "no", "~x", "2026-11-21",
    "12:30:45.5", "'x'",
    "0x", "0b2", "1__0_x", "0o17", "1,000", "'1 000'", "\u0663x", "\xbd", "\u221e", "9" * 401, "9" * 5000,
    "0x" + "f" * 5000,
    "0b" + "1" * 20_000, "1:" * 2000 + "1", "1." + "0" * 500, "1e99999999999", "!!int '" + "9" * 5000 + "'",
)  # fmt: skip
FINE: dict[str, str | bytes] = {
    "sound": NATIVE, "sound of the other form": LINEAR, "a byte order mark": "\ufeff" + NATIVE,
    "line ends of two bytes": NATIVE.replace("\n", "\r\n"), "line ends of old": NATIVE.replace("\n", "\r"),
    "no line end": NATIVE.rstrip(),
    "as JSON": '{"spolia": 1, "pool": {"experts": ["./a", "./b"]}, "method": {"name": "average"}}',
    "an end": NATIVE + "...\n", "a directive that is known": "%YAML 1.1\n---\n" + NATIVE,
    "a tag that says nothing": NATIVE + "seed: !!int 1\n",
    "aliases for the models": ALIASED,
    "a seed of 70 bits": NATIVE + f"seed: {2**70}\n", "a seed in base 60": NATIVE + "seed: 1:30\n",
    "a seed in base 16": NATIVE + "seed: 0x1f\n",
    "a hundred thousand comments": "# x\n" * 100_000 + NATIVE, "an empty document before": "---\n" + NATIVE,
    "a weight in words of YAML 1.2": NATIVE.replace("average", "average, weight: 1e0"),
    "a null": NATIVE + "seeds: 1\noutput: {dtype: ~}\n",
}  # fmt: skip
SLOW = {  # more than a second, as large as they may be
    f"text: {name}" for name in TEXTS if name.startswith(("half a megabyte", "a word of half", "two hundred",
    "open b", "closed br"))
} | {"fine: a hundred thousand comments"}  # fmt: skip
CASES = [(f"text: {name}", "refused", text) for name, text in TEXTS.items()]
CASES += [(f"tag: {tag:.60}", "refused", f"{NATIVE}seed: {tag}\n") for tag in TAGS]
CASES += [(f"seed: {seed:.16} of {len(seed)}", "refused", f"{NATIVE}seed: {seed}\n") for seed in SEEDS]
CASES += [(f"fine: {name}", "averaged", text) for name, text in FINE.items()]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("outcome", "text"),
    [pytest.param(o, t, id=ascii(n), marks=[pytest.mark.slow] if n in SLOW else []) for n, o, t in CASES],
)
def test_yaml(outcome: str, text: str | bytes, judge_text: Callable[..., None]) -> None:
    judge_text(outcome, text, {})


def test_there_are_enough() -> None:
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 120

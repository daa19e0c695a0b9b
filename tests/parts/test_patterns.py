"""Patterns of module names: PEFT's rule by Python's `re` where that is quick, and quick where it is not."""

from __future__ import annotations

import re

import pytest

from spolia.parts.patterns import BadPattern, compile_patterns, first_fit

pytestmark = pytest.mark.sampled(3)  # of many cases alike

NAMES = [
    "", "q", "a.q", "a.xq", "b.a.k", "layers.0.q", "layers.12.self_attn.q_proj", "model.layers.1.mlp.up", "a.b.q", "aq",
    "a_q", "a..q", "layers.1", "xlayers.1", "layers.10", "q.a", "k", "qk", "aab", "ab", "-1.w", "\u0663.q",
]  # fmt: skip
PATTERNS = [
    "q", "a.q", "a\\.q", r"a\.[qk]", r"layers\.\d+\.q", r"layers.[0-9]+.(q|k)", "^q", "^a.q$", "q$", ".*q", ".*", ".+",
    "a?q", "(a|b).q", "(?:a|b)[._]q", "a|q", "^a|q$", "(a|)q", "(a)?q", "(|a)(|a)b", "[^a]q", r"[\w.]*", r"\w+", "a*b",
    "a*?b", "a+?b", r".*\.(q|k|(up|down))", r"layers\.(0|1|10|12)", r"-\d\.w", r"\D", "()", "", "a.*q.*",
]  # fmt: skip
UNREAD = [
    "(", ")", "a)", "[", "[]", "*", "a**", "a{2}", "a{99999999999}", "(a+)+$", "(a*)*", "(a){2}", "(?P<x>a)", "(?=a)",
    "(?i)a", r"(a)\1", r"\b", "\\", "a*+", "[z-a]", "(" * 5000, "(" * 22 + ")" * 22, "[]a]q", "}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_as_peft(pattern: str) -> None:
    """Its rule: re.match(rf"(.*\\.)?({pattern})$", name)."""
    told = [name for name in NAMES if first_fit(compile_patterns({pattern: True}, NAMES), name, False)]
    assert told == [name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)]


@pytest.mark.parametrize("pattern", UNREAD)
def test_what_is_not_read_is_refused(pattern: str) -> None:
    with pytest.raises(BadPattern, match="is not read"):
        compile_patterns({pattern: 1}, NAMES)


@pytest.mark.parametrize(
    "pattern", [".*" * 16 + "x", "(a|a)" * 30 + "x", "a?" * 30 + "a" * 30 + "x", "[a-z.]*" * 20 + "x"]
)
def test_what_takes_re_for_ever_is_answered(pattern: str) -> None:
    """More than 2^29 ways lead through each of these; they end because the ways are followed together."""
    assert first_fit(compile_patterns({pattern: 1}, ["a" * 60]), "a" * 60, 0) == 0


def test_the_first_that_fits_counts_and_too_many_are_refused() -> None:
    assert first_fit(compile_patterns({"x": 1, "q": 2, "a.q": 3}, NAMES), "a.q", 0) == 2
    assert first_fit([], "a.q", 7) == 7
    with pytest.raises(BadPattern, match="too many"):
        compile_patterns({f"{n}x": 1 for n in range(5000)}, [f"{n}y" for n in range(5000)])

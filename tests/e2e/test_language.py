"""A real small language model, fine-tuned, merged and judged. Needs stories260k in the folder that SPOLIA_DATA names."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import spolia
from spolia.bench.language import likelihood

BASE = Path(os.environ.get("SPOLIA_DATA", "nowhere")) / "stories260k"
needs_model = pytest.mark.skipif(not BASE.is_dir(), reason="SPOLIA_DATA names no folder with stories260k")
pytestmark = pytest.mark.slow

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 6
OTHER = ("the vote will take place on thursday at noon\n" * 12, "= Lobster =\n The lobster is a crustacean .\n" * 12)


@pytest.fixture(scope="module")
def made() -> Any:
    """benchmarks/language_pool.py"""
    file = Path(__file__).parents[2] / "benchmarks" / "language_pool.py"
    spec = importlib.util.spec_from_file_location("language_pool", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["language_pool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["language_pool"]


@pytest.fixture(scope="module")
def pool(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base, and two fine-tunes of six steps each."""
    pool = made.LanguagePool(BASE.parent, tmp_path_factory.mktemp("pool"), 0)
    pool.texts = {name: made.Parts(text * 3, text, text) for name, text in zip(made.TEXTS, OTHER, strict=False)}
    for name in pool.texts:
        for _, model in made.fit(pool, name, made.Recipe(steps=6, batch=4, warmup=1), (6,)):
            made.write(model, pool.base, pool.experts[name])
    return pool


def judged(made: Any, pool: Any, folder: Path, text: str = TEXT) -> Any:
    return likelihood(made.new_model(folder), pool.tokens(text), context=64, stride=32, size=len(text))


@needs_model
def test_one_window_is_the_loss_of_transformers(made: Any, pool: Any) -> None:
    model, tokens = made.new_model(BASE), pool.tokens(TEXT)
    found = likelihood(model, tokens, context=len(tokens))
    # two fp32 means over some two hundred tokens
    assert found.mean == pytest.approx(model(tokens[None], labels=tokens[None]).loss.item(), rel=1e-5)
    assert found.perplexity < 3  # the opening of half its training stories; uniform would be 512


@needs_model
def test_fine_tunes_merge_load_and_are_judged(made: Any, pool: Any, tmp_path: Path) -> None:
    experts = [pool.experts[name] for name in pool.texts]
    for name, expert in zip(pool.texts, experts, strict=True):
        text = pool.texts[name].test
        # six steps on a text that is one sentence, said again and again
        assert judged(made, pool, expert, text).mean < judged(made, pool, BASE, text).mean - 0.5
    for method in ("average", "task_arithmetic", "ties", "tsv"):
        start = None if method == "average" else BASE
        out = spolia.merge(experts, base=start, method=method, out=tmp_path / method)
        assert math.isfinite(judged(made, pool, out).perplexity)


@needs_model
def test_the_average_of_a_model_and_itself_is_that_model(made: Any, pool: Any, tmp_path: Path) -> None:
    expert = pool.experts[made.TEXTS[0]]
    out = spolia.merge({"a": expert, "b": expert}, out=tmp_path / "out")
    assert judged(made, pool, out) == judged(made, pool, expert)  # (w + w) / 2 is w


def test_parts_of_the_reference_share_no_paragraph(made: Any) -> None:
    parts = made._topics()
    plain = [
        {" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()}
        for text in (parts.train, parts.validation, parts.test)
    ]
    assert all(plain) and not plain[0] & plain[1] and not plain[0] & plain[2] and not plain[1] & plain[2]


def test_stretches_are_taken_from_all_over(made: Any) -> None:
    lines = [f"{i} is a number" for i in range(5000)]
    found = made.spread("\n".join(lines) + "\n", 2400)
    starts = [int(line.split()[0]) for line in found.splitlines()]
    assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] > 4500  # the last begins at 11/12 of 5000
    assert 2400 <= len(found) <= 2400 + made.STRETCHES * 8  # a stretch ends with its word, of 6 letters, and a new line
    assert all(line in lines[i] for i, line in zip(starts, found.splitlines(), strict=True))
    assert made.spread("short\n", 2400) == "short\n" and made.left("short\n", 2400) == ""


def test_what_is_left_and_the_stretches_are_the_text(made: Any) -> None:
    lines = [f"{i} is a number" for i in range(500)]
    text = "\n".join(lines) + "\n"
    taken, rest = (set(part(text, 2400).splitlines()) for part in (made.spread, made.left))
    assert taken & set(lines) and rest & set(lines)
    assert not taken & rest & set(lines) and len(made.spread(text, 2400)) + len(made.left(text, 2400)) >= len(text)

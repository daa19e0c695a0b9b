"""Extras that are missing: whatever needs one says which, in three parts, before any work."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from spolia import cli
from spolia.data.digits import _scans
from spolia.errors import SpoliaError
from spolia.runs.doctor import EXTRAS

HOUSE = Path(__file__).parents[2]
DECLARED = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
OURS = {"docs", "test", "lint"}  # for those who work on the package; make installs them

SERVED = ["continual/apis-tiny", "problem.tasks=[5, 5]", "problem.urls=[http://127.0.0.1:9]"]
CASES = [  # (extra, package that is missing, how it is imported, what a user types, where it is told)
    ("llm", "tokenizers", "tokenizers", ["run", "link/llm_sc-tiny", "-o", "run"], "problem"),
    ("llm", "transformers", "transformers", ["inspect", "hf"], ""),
    ("hub", "huggingface_hub", "huggingface_hub", ["inspect", "some/base", "some/expert"], "some/base"),
    ("digits", "scikit-learn", "sklearn", ["run", "merge/ties-tiny", "-o", "run"], "pool.source digits"),
    ("data", "datasets", "datasets", ["run", "streamed.yaml", "-o", "run"], "problem.data some/set"),
    ("comms", "sionna-no-rt", "sionna", ["run", "link/separate-tiny", "method.code=ldpc", "-o", "run"], "method.code"),
    ("api", "starlette", "starlette", ["serve", "digits:01"], "serve"),
    ("api", "uvicorn", "uvicorn", ["ui", "."], "ui"),
    ("api", "httpx", "httpx", ["run", *SERVED, "-o", "run"], "API over HTTP"),
    ("slurm", "submitit", "submitit", ["sweep", "merge/ties-tiny", "--on", "slurm"], "--on slurm"),
    ("ray", "ray", "ray", ["sweep", "merge/ties-tiny", "--on", "ray"], "--on ray"),
    (
        "tune",
        "optuna",
        "optuna",
        ["sweep", "merge/ties-tiny", "--over", "method.scale=0..1", "--search", "2"],
        "--search",
    ),
]
STREAMED = "spolia: 1\nproblem: {source: datasets, data: some/set}\nmethod: {name: er}\n"


def hide(package: str, name: str, patch: pytest.MonkeyPatch) -> None:
    """As if `package`, imported as `name`, were not installed."""
    version = importlib.metadata.version

    def found(asked: str) -> str:
        if asked == package:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version(asked)

    patch.setattr("spolia.data.digits._scans", _scans.__wrapped__)  # as if they had not been read yet
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        patch.delitem(sys.modules, module)
    patch.setitem(sys.modules, name, None)  # importing it fails, find_spec finds nothing
    patch.setattr("spolia.runs.environment.version", found)


def test_every_extra_is_tried() -> None:
    tried = {extra for extra, *_ in CASES} | {"text"}
    assert tried == set(DECLARED) - OURS
    for extra, package, *_ in CASES:
        assert any(wanted.startswith(package) for wanted in DECLARED[extra]) or extra == "api"


@pytest.mark.parametrize(("extra", "package", "name", "words", "where"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_what_is_missing_is_named_with_its_extra(
    extra: str, package: str, name: str, words: list[str], where: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "streamed.yaml").write_text(STREAMED)
    hide(package, name, monkeypatch)
    if words == ["inspect", "hf"]:
        from spolia.zoo.hf import build

        with pytest.raises(SpoliaError) as caught:
            build({"model_type": "bert"}, "expert")
        told = str(caught.value)
        where = "expert"
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        out, told = capsys.readouterr()
        assert (end.value.code, out) == (2, ""), told
    assert told.startswith(f"{where}: ") or f"\n{where}: " in told, told
    assert name in told or package in told or "digits" in told
    assert re.search(rf"\n  mend: pip install 'spolia\[{extra}\]'", told), told
    assert "Traceback" not in told and not (tmp_path / "run" / "result").exists()


def test_without_sacrebleu_a_report_says_what_was_not_measured(monkeypatch) -> None:
    from spolia.runs.link_ledger import notes
    from spolia.runs.recipe import load_recipe

    recipe: Any = load_recipe("link/source-tiny")
    found = {"entropy": 1.0, "rates": {"symbols_per_char": 1.0}, "width": 9, "esn0": [0.0], "limit": None}
    told = "BLEU was not measured: pip install 'spolia[text]'"
    assert told not in notes(recipe, [found])
    hide("sacrebleu", "sacrebleu", monkeypatch)
    assert told in notes(recipe, [found])


def test_every_cure_names_an_extra_that_exists() -> None:
    for file in sorted((HOUSE / "src").rglob("*.py")):
        for extra in re.findall(r"spolia\[([a-z]+)\]", file.read_text(encoding="utf-8")):
            assert extra in DECLARED, (
                f"{file.name} tells to install spolia[{extra}], which pyproject.toml does not have"
            )


def test_the_doctor_knows_every_extra() -> None:
    assert {extra for _, extra, _ in EXTRAS} == set(DECLARED) - OURS

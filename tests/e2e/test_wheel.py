"""The wheel: built, looked into, installed into an empty environment, and asked what a stranger asks first."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import spolia
from spolia.catalog import METHODS

HOUSE = Path(__file__).parents[2]
SRC = HOUSE / "src"
pytestmark = pytest.mark.slow


def called(*words: str | Path, cwd: Path) -> str:
    """What a command says on stdout, once it has ended well."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None or find_spec("pip") is None:
        pytest.skip("pip and hatchling, which build the wheel, are not both installed here")
    out = tmp_path_factory.mktemp("dist")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir")
    called(sys.executable, "-m", "pip", "wheel", *options, out, HOUSE, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel; what it depends on is read from where the tests run."""
    home = tmp_path_factory.mktemp("empty")
    called(sys.executable, "-m", "venv", "--without-pip", home / "env", cwd=home)  # ours serves: `pip --python`
    python = home / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    options = ("install", "--no-deps", "--no-index", "--quiet")
    called(sys.executable, "-m", "pip", "--python", python, *options, wheel, cwd=home)
    (site,) = called(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).splitlines()
    # behind the wheel on the path: a plain path file, so that editable installations there are not followed
    (Path(site) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_what_the_package_reads_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {p.relative_to(SRC).as_posix() for p in SRC.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    inside = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert inside == {name for name in kept if not name.endswith((".pyc", ".pyo"))}
    assert {"spolia/py.typed", "spolia/reports/report.html.j2", "spolia/reports/style.css"} <= inside
    assert {f"spolia/recipes/{m.family}/{m.name}-tiny.yaml" for m in METHODS} <= inside
    assert not any("test" in Path(name).parts or Path(name).name.startswith("test_") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_metadata_ask_for_what_pyproject_says(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    told = archive.read(file).decode()
    assert f"\nVersion: {spolia.__version__}\n" in told and "\nRequires-Python: >=3.11\n" in told
    assert "\nRequires-Dist: torch<3,>=2.9\n" in told and "\nProvides-Extra: llm\n" in told


def test_it_runs_where_nothing_of_the_repository_is(installed: Path, tmp_path: Path) -> None:
    spolia_at = called(installed, "-c", "import spolia; print(spolia.__file__)", cwd=tmp_path).strip()
    assert Path(spolia_at).is_relative_to(installed.parents[1]) and HOUSE not in Path(spolia_at).parents
    program = installed.with_name("spolia")
    assert called(program, "--version", cwd=tmp_path) == f"spolia {spolia.__version__}\n"
    assert "Merge" in called(program, "--help", cwd=tmp_path)
    assert "adamerging" in called(program, "list", cwd=tmp_path)
    assert "digits" in called(program, "plan", "merge/ties-tiny", cwd=tmp_path)
    called(program, "run", "merge/average-tiny", "pool.domains=[upright, turned]", "-o", "run", "-q", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()

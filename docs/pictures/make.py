"""Remakes the pictures of docs/reports.md: runs tiny recipes, opens every report in Chromium, keeps the top and the figures.

    python docs/pictures/make.py                 all of them; runs that stand in build/pictures are not made again
    python docs/pictures/make.py rkkd ui         these alone
    python docs/pictures/make.py --check         looks at every page in four ways and tells what is wrong; writes nothing

Needs Chromium (or CHROMIUM=program), Pillow, and the extras digits and api. About ten minutes on two cores.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from browser import Browser, Seen
from PIL import Image

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "pictures"
RUNS = {
    "task_arithmetic": "merge/task_arithmetic-tiny",
    "adamerging": "merge/adamerging-tiny",
    "deep": "surgery/deep-tiny",
    "rkkd": "distill/rkkd-tiny",
    "msd": "meta/msd-tiny",
    "free": "datafree/free-tiny",
    "refresh": "continual/refresh-tiny",
    "asp": "continual/asp-tiny",
    "apis": "continual/apis-tiny",
    "llm_sc": "link/llm_sc-tiny",
    "deepsc": "link/deepsc-tiny",
    "folders": "folders.yaml",
}
NAMES = (*RUNS, "inspect", "ui", "compare")
DOMAINS = ("upright", "inverted", "permuted")
WIDTH, HEIGHT, COLOURS = 1160, 1300, 56
VIEWS = ({}, {"dark": True}, {"width": 390}, {"width": 794, "printed": True})


def spolia(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from spolia.cli import main; main()", *words], cwd=WORK, check=True)


def make(name: str) -> None:
    """The run or page called `name`, where it is not there yet."""
    if name == "folders":
        experts()
    if name in RUNS:
        made = (WORK / "runs" / name / "report.html").is_file()
        spolia(*(("report", f"runs/{name}", "--to", "html") if made else ("run", RUNS[name], "-o", f"runs/{name}")))
    if name == "inspect" and not (WORK / "inspect.html").is_file():
        experts()
        spolia("inspect", "pool/base", *(f"pool/{domain}" for domain in DOMAINS), "--html", "inspect.html")
    if name in ("ui", "compare"):
        for run in ("task_arithmetic", "adamerging"):
            make(run)


def experts() -> None:
    """Digits experts as folders with their heads and data, and a recipe over them."""
    from spolia.core.journal import Journal
    from spolia.runs.digits_pool import make_pool

    if (WORK / "folders.yaml").is_file():
        return
    pool = make_pool(WORK / "pool", DOMAINS, seed=0, journal=Journal())
    for domain, splits in pool.splits.items():
        np.savez(WORK / f"{domain}.npz", x=splits.validation.x.numpy())
        np.savez(WORK / f"{domain}-test.npz", x=splits.test.x.numpy(), y=splits.test.y.numpy())
    heads = "pool/heads/model.safetensors"
    tasks = {d: {"unlabelled": f"{d}.npz", "test": f"{d}-test.npz", "head": heads} for d in DOMAINS}
    recipe = {
        "spolia": 1,
        "pool": {"base": "pool/base", "experts": [f"pool/{domain}" for domain in DOMAINS], "tasks": tasks},
        "method": {"name": "adamerging", "preset": "fast", "objective": "expert"},
        "surgery": {"name": "deep", "solver": "closed_form"},
    }
    (WORK / "folders.yaml").write_text(json.dumps(recipe, indent=1))


@contextmanager
def served() -> Iterator[str]:
    """The address at which `spolia ui` shows the runs, from a folder whose name may be seen."""
    place = Path(tempfile.gettempdir()) / "project"
    shutil.copytree(WORK / "runs", place / "runs", dirs_exist_ok=True)
    command = [sys.executable, "-c", "from spolia.cli import main; main()", "ui", "runs", "--no-browser"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            shutil.rmtree(place)


def shown(browser: Browser, name: str, **look: object) -> Seen:
    """The page called `name`."""
    if name not in ("ui", "compare"):
        page = WORK / "inspect.html" if name == "inspect" else WORK / "runs" / name / "report.html"
        return browser.open(page, **look)  # type: ignore[arg-type]
    with served() as address:
        where = "compare?run=task_arithmetic&run=adamerging" if name == "compare" else ""
        return browser.open(address + where, **{**look, "only": ()})  # type: ignore[arg-type]


def small(png: bytes) -> bytes:
    """The same picture in a palette."""
    image, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def main(words: list[str]) -> int:
    names = [word for word in words if not word.startswith("-")] or list(NAMES)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in names:
        make(name)
    wrong = 0
    with Browser() as browser:
        for name in names:
            if "--check" in words:
                for look in VIEWS:
                    seen = shown(browser, name, **look)
                    asked = [url for url in seen.requests if not url.startswith("http://127.0.0.1:")]
                    for fault in (*asked, *seen.said, *seen.faults):
                        print(f"{name} {look}: {fault}")
                        wrong += 1
                continue
            picture = small(shown(browser, name, width=WIDTH, height=HEIGHT, only=("results", "figures")).png)
            (HERE / f"{name}.png").write_bytes(picture)
            print(f"{name}: {len(picture) / 1000:.0f} kB")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

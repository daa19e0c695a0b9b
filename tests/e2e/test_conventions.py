"""The conventions of the interface, one test for each, as a user meets them: through the command, on pools made here.

What is tested more closely elsewhere is tested at its heart here, so that this file is the list of what must hold.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

import spolia
from spolia import catalog, cli
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.runs import complete, devices, doctor, progress, schema
from spolia.runs.recipe import load_recipe

HOUSE = Path(__file__).parents[2]
TINY = ["run", "merge/ties-tiny", "pool.domains=[upright, turned]", "--seeds", "2", "-o", "run"]
FEW = ["pool.base=base", "pool.experts=[math, code]"]
HEAVY = ("torch", "numpy", "transformers")
RECIPE = "spolia: 1\npool:\n  base: ./base\n  experts: [./math, ./code]\nmethod:\n  name: task_arithmetic\n"
Write = Callable[..., Path]


class Screen(io.StringIO):
    terminal = False

    def isatty(self) -> bool:
        return self.terminal


@dataclass
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def spolia_(*words: object) -> Said:
    out, err = Screen(), Screen()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return Said(int(end.value.code or 0), out.getvalue(), err.getvalue())


def well(*words: object) -> str:
    said = spolia_(*words)
    assert said.code == 0, said.err
    return said.out


def refused(*words: object) -> str:
    """What is said on stderr to input that cannot be used."""
    said = spolia_(*words)
    assert (said.code, said.out) == (2, ""), said
    return said.err


@pytest.fixture
def place(tmp_path: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of zeros, experts of ones and of threes, and a recipe of them: a user's folder."""
    for name, value in {"base": 0.0, "math": 1.0, "code": 3.0}.items():
        tensors = {"layers.0.weight": torch.full((4, 3), value), "head.weight": torch.full((2, 4), value)}
        write_model(tmp_path / name, tensors, {"model_type": "llama"})
    (tmp_path / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Signals:
    """A progress bar that sends Ctrl-C once, in the training of the second seed."""

    def __init__(self) -> None:
        self.done, self.after = 0.0, float("inf")

    def start(self, phase: str, total: float, unit: str = "steps") -> None:
        self.after = total / 2 + 20

    def advance(self, n: float = 1, **numbers: float) -> None:
        self.done += n
        if self.done >= self.after:
            self.after = float("inf")
            signal.raise_signal(signal.SIGINT)

    def finish(self) -> None: ...


@dataclass
class Digits:
    """A run of two seeds on real digits: interrupted in the second, with what it then held, and taken up again."""

    folder: Path
    beside: list[str]  # what else stands where it was started
    stopped: Said
    kept: dict[str, str]  # the texts in the folder after the interruption
    ended: Said

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    place = tmp_path_factory.mktemp("digits")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "choose", lambda *_, **__: Signals())
        stopped = spolia_(*TINY)
        patch.undo()
        kept = {file.name: file.read_text() for file in (place / "run").iterdir() if file.is_file()}
        ended = spolia_(*TINY)
    return Digits(place / "run", sorted(file.name for file in place.iterdir()), stopped, kept, ended)


@pytest.fixture
def there(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> Digits:
    monkeypatch.chdir(digits.folder.parent)
    return digits


# --- finding one's way -----------------------------------------------------------------------------------------------


def test_one_command_from_yaml(place: Path) -> None:
    well("run", "my.yaml", "method.scale=0.5", "-o", "mine")
    well("run", "merge/task_arithmetic", *FEW, "method.scale=0.5", "-o", "theirs")
    for run in ("mine", "theirs"):
        assert torch.equal(load_file(place / run / "result/model.safetensors")["head.weight"], torch.full((2, 4), 2.0))


def test_first_success(there: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo makes is tested in test_demo.py; here what it shows at the end."""
    opened: list[str] = []
    monkeypatch.setattr("spolia.runs.demo.demo", lambda out, quiet: there.folder)
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = well("demo")
    for family in dict.fromkeys(method.family for method in catalog.METHODS):
        (named,) = re.findall(rf"spolia run ({family}/\w+-tiny)", out)
        assert load_recipe(named).method.family == family
    assert opened == []  # nobody looks at a pipe
    monkeypatch.setattr(Screen, "terminal", True)
    well("demo")
    assert opened == [(there.folder / "report.html").as_uri()]


def test_start_up(tmp_path: Path) -> None:
    """Nothing heavy is imported: what the limit on the start's time is about, and the same on every machine."""
    program = (
        "import json, os, sys\nfrom spolia.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    os.environ.update(words.pop()); \n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert not end.code, words\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if heavy: sys.exit(f'{words} brings in {heavy}')"
    )
    typed = "spolia run merge/ties-tiny method."
    completing = {"_SPOLIA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": "3"}
    said = [["--help", {}], ["list", {}], ["show", "adamerging", {}], ["run", "--help", {}], [completing]]
    words = [sys.executable, "-c", program, json.dumps(said)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("method.scope=\n") or "method.density=" in done.stdout


def test_discover() -> None:
    assert "slerp" in well("list", "slrp")
    whole = well("list")
    for family in dict.fromkeys(method.family for method in catalog.METHODS):
        assert re.search(rf"^{family}: ", whole, re.MULTILINE)
    assert re.search(r"^  name +needs +cost +what it does +paper$", whole, re.MULTILINE)
    for need in ("weights", "white-box", "APIs", "unlabelled", "labels", "nothing"):
        assert any(need in method.needs for method in catalog.METHODS) and need in whole
    page = well("show", "ties")
    for part in ("setting", "default", "source", "density", "Yadav", "tau", "try", "spolia run merge/ties-tiny"):
        assert part in page


def test_start_from_a_copy(place: Path) -> None:
    well("new", "ties", "-o", "copy.yaml")
    text = (place / "copy.yaml").read_text()
    heads = ("paper", "command", "time", "score", "data", "origin")
    assert [name for name in heads if not re.search(rf"^# {name}: +\S", text, re.MULTILINE)] == []
    lines = text.split("method:\n")[1].split("\noutput:")[0].splitlines()[1:]
    settings = [i for i, line in enumerate(lines) if re.match(r"  \w+:", line)]
    assert len(settings) == len(catalog.find("ties").settings_class().model_fields)
    for before, at in zip([-1, *settings], settings, strict=False):
        comment = " ".join(lines[before + 1 : at])
        assert re.search(r"# .+ \(.+default: \S+", comment), comment  # what it is, what may stand here, and its source
    assert refused("new", "ties", "-o", "copy.yaml").startswith("copy.yaml: the file exists")


def test_editor_help(place: Path) -> None:
    well("new", "ties", "-o", "copy.yaml")
    text, told = (place / "copy.yaml").read_text(), json.loads(well("schema"))
    assert "# yaml-language-server: $schema=spolia.schema.json" in text and "spolia schema > spolia.schema.json" in text
    written, method = yaml.safe_load(text), told["$defs"]["merge/ties"]
    assert written.keys() <= told["properties"].keys() and written["method"].keys() == method["properties"].keys()
    assert (
        method["additionalProperties"] is False and told["additionalProperties"] is False
    )  # red under what is unknown
    assert "description" in method["properties"]["density"]


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_validate_early(place: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(os, "preadv", opened)
    text = RECIPE.replace("./math", "./maths").replace("method:", "sed: 1\nmethod:\n  scale: much")
    (place / "bad.yaml").write_text(text + "output: {dtype: bf8}\n")
    told = refused("run", "bad.yaml")
    assert told.startswith("4 problems, nothing was done")
    for part in ("pool.experts[0]: there is no", "there is no `sed`", "method.scale: `much`", "output.dtype: `bf8`"):
        assert part in told
    write_model(place / "code", {"layers.0.weight": torch.zeros(4, 5), "head.weight": torch.zeros(2, 4).int()})
    told = refused("run", "my.yaml")
    assert "layers.0.weight" in told and "head.weight" in told and "2 problems" in told
    x, y = np.zeros((8, 1, 8, 8), np.uint8), np.arange(8) % 2
    np.savez(place / "few.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr("spolia.runs.target.free_bytes", lambda _: 10)
    assert "free" in refused("run", "merge/average", "pool.experts=[base, math]")
    there = "problem={source: npz, file: few.npz, device: 'cuda:900'}"
    assert "this machine has no cuda:900" in refused("run", "continual/derpp", there)
    assert not (place / "runs").exists()


def test_error_message(place: Path, write_model: Write) -> None:
    (place / "my.yaml").write_text(RECIPE + "  scal: 0.5\n")
    told = refused("run", "my.yaml")
    assert told == "my.yaml:7 method.scal: there is no `scal` here\n  mend: did you mean `scale`?\n"
    with pytest.raises(SpoliaError):
        cli.main(["--debug", "run", "my.yaml"])
    (place / "my.yaml").write_text(RECIPE)
    write_model(place / "code", {"layers.0.weight": torch.zeros(4, 5), "head.weight": torch.zeros(2, 4)})
    told = refused("run", "my.yaml")
    for part in ("layers.0.weight", "[4, 3]", "[4, 5]", "base", "code", "mend: "):
        assert part in told
    assert "Traceback" not in told


DEPTHS = ["sed=1", "pool.exprts=1", "method.scal=1", "output.dtyp=1", "pool.base={path: base, nam: b}"]


@pytest.mark.parametrize("override", [*DEPTHS, "problem.wayss=3", "problem.views={rotat: 1}"])
def test_unknown_key(place: Path, override: str) -> None:
    recipe = "meta/msd-tiny" if override.startswith("problem") else "my.yaml"
    told = refused("plan", recipe, override)
    assert "did you mean" in told and not (place / "runs").exists()


def test_plan_preview(place: Path) -> None:
    told = json.loads(well("plan", "my.yaml", "--json"))
    assert told["phases"][0]["data"].startswith("weights only") and told["phases"][0]["trained"] == "nothing"
    assert told["peak_memory_bytes"] > 0 and told["seconds"] > 0 and told["time_basis"] and told["files"]
    page = well("plan", "meta/msd-tiny", "seed=3")
    for part in ("phase", "data", "trained", "frozen", "memory", "time", "seeds    3", "results.json", "one core"):
        assert part in page
    before = sorted(place.iterdir())
    page = well("run", "merge/ties-tiny", "--dry-run")
    assert "tried: 2 steps, stopped in seed 0" in page and sorted(place.iterdir()) == before


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_progress(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = spolia_("run", "my.yaml", "-o", "a").err
    assert re.search(r"^merge: 100% of 80 bytes, \d+ s$", plain, re.MULTILINE)
    quiet = spolia_("run", "my.yaml", "-o", "b", "--quiet")
    assert (quiet.out, quiet.err) == ("", "")
    told = spolia_("run", "my.yaml", "-o", "c", "--json")
    assert json.loads(told.out)["folder"] == "c"
    assert [json.loads(line)["done"] for line in told.err.splitlines()][-1] == 80
    assert progress.EVERY == 10
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress.choose(), progress.RichProgress)


def test_interrupt(there: Digits) -> None:
    assert there.stopped.code == 130
    assert "finishing this step, then saving; once more to stop at once" in there.stopped.err
    assert there.stopped.err.splitlines()[-1].strip() == (
        "spolia run merge/ties-tiny 'pool.domains=[upright, turned]' --seeds 2 -o run"
    )
    assert json.loads(there.kept["status.json"])["state"] == "interrupted"
    assert "interrupted" in there.kept["report.html"]
    from spolia.runs.interrupt import gentle_stop

    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt), gentle_stop(lambda: asked.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert asked == [1]
        signal.raise_signal(signal.SIGINT)


def test_resume(there: Digits) -> None:
    """That the numbers are those of an uninterrupted run is in test_moments.py."""
    assert there.ended.code == 0 and there.read("status.json")["state"] == "done"
    loops = list((there.folder / "checkpoints/loops").iterdir())
    assert loops and all(1 <= len(list(loop.glob("*.safetensors"))) <= 2 for loop in loops)
    assert not list(there.folder.rglob("*.part"))
    told = refused(*TINY, "method.density=0.9")
    assert "-  density: 0.2" in told and "+  density: 0.9" in told and "--fresh" in told


def test_results_kept_as_they_come(there: Digits) -> None:
    first = json.loads(there.kept["results.json"])
    assert first["seeds"] == [0] and there.read("results.json")["seeds"] == [0, 1]
    lines = there.kept["metrics.jsonl"].splitlines()
    assert "loss" in json.loads(lines[-1]) and "seed 1" in json.loads(lines[-1])["phase"]
    assert (there.folder / "metrics.jsonl").read_text().startswith("\n".join(lines[:100]))


def test_run_folder(there: Digits) -> None:
    files = {"recipe.yaml", "plan.json", "env.json", "metrics.jsonl", "report.html", "log.txt", "checkpoints", "result"}
    files |= {"results.json", "figures.json", "summary.txt", "status.json"}
    assert {file.name for file in there.folder.iterdir() if file.name != ".lock"} == files
    assert there.beside == ["run"]  # and nothing elsewhere
    env = there.read("env.json")
    assert (
        env["seeds"] == [0, 1] and env["machine"]["device"] == "cpu" and {"torch", "spolia"} <= env["versions"].keys()
    )
    resolved = yaml.safe_load((there.folder / "recipe.yaml").read_text())
    assert resolved["method"].keys() == {"name", *catalog.find("ties").settings_class().model_fields}
    log = (there.folder / "log.txt").read_text()
    assert "interrupted" in log and log.splitlines()[-1].split(" ", 1)[1].startswith("done")


# --- what comes out --------------------------------------------------------------------------------------------------


def test_result_artefact(place: Path) -> None:
    """That transformers loads them is in test_transformers.py and test_architectures.py."""
    well("run", "my.yaml", "-o", "run")
    result = place / "run/result"
    merged = spolia.merge([place / "math", place / "code"], base=place / "base", method="task_arithmetic")
    found = load_file(result / "model.safetensors")
    assert found.keys() == merged.keys() and all(torch.equal(found[name], merged[name]) for name in merged)
    assert json.loads((result / "config.json").read_text()) == {"model_type": "llama"}
    assert not [file for file in (place / "run").rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_model_card(there: Digits) -> None:
    card = (there.folder / "result/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert {"merge", "spolia", "ties"} <= set(front["tags"])
    assert [one["metrics"][0]["name"] for one in front["model-index"][0]["results"]] == ["accuracy (%)"] * 3
    for part in ("How it was made", "Results", "Data touched", "Limits", "Licence", "Citation"):
        assert f"\n## {part}\n" in card
    table = card.split("## Results")[1].split("## Data")[0]
    for line in ("| base", "| ties", "expert upright", "expert turned", "average", "The weights are the first seed's."):
        assert line in table
    assert "weights only" in card.split("## Data touched")[1].split("## Limits")[0]
    assert "density: 0.2" in card or '"density": 0.2' in card


def test_hub_push(there: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    from spolia.runs.push import Upload

    sent: list[Upload] = []
    monkeypatch.setattr(Upload, "send", lambda upload: sent.append(upload) or "there")
    monkeypatch.setattr("spolia.runs.push.library", lambda: None)
    shown = well("push", "run", "owner/name", "--private", "--dry-run")
    for part in ("to     owner/name (private)", "model.safetensors", "README.md", "## Data touched"):
        assert part in shown
    told = spolia_("push", "run", "owner/name")
    assert told.code == 2 and "no terminal to ask on" in told.err
    assert sent == []
    well("push", "run", "owner/name", "--yes")
    assert len(sent) == 1


def test_html_report(there: Digits) -> None:
    page = (there.folder / "report.html").read_text()
    assert len(page.encode()) < 3_000_000 and not re.search(r"https?://(?!www\.w3\.org)|<script|<link|@import", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    for part in (
        "ties reaches",
        "base",
        "expert upright",
        "average",
        "labelled",
        "Cosines",
        "Learning curves",
        "recipe",
    ):
        assert part in page
    assert re.search(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", re.sub(r"<[^>]+>", "", page))  # an interval
    drawn, pictures, numbers = (page.count(mark) for mark in ("<figure", '.svg"', '.csv"'))
    assert drawn >= 3 and pictures == drawn and numbers == drawn + 1  # of each its numbers, and those of the table


def test_terminal_table(there: Digits) -> None:
    assert r"\begin{tabular}" in well("report", "run", "--to", "latex")
    assert re.search(r"^\| ties \| \d", well("report", "run", "--to", "markdown"), re.MULTILINE)
    assert well("report", "run", "--to", "csv").splitlines()[0].startswith("method,")
    text = well("report", "run")
    assert "ties" in text and "(b) baseline" in text and text.splitlines()[0] in there.ended.out


def test_compare(there: Digits, tmp_path: Path) -> None:
    other = shutil.copytree(there.folder, tmp_path / "other")
    for seed in (0, 1):
        file = other / f"checkpoints/scores-seed-{seed}.json"
        kept = json.loads(file.read_text())
        for counts in kept["scores"]["accuracy"]["ties"].values():
            counts[0] -= 10 + seed
        file.write_text(json.dumps(kept))
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("density: 0.2", "density: 0.7"))
    told = json.loads(well("compare", "run", other, "--json"))
    (row,) = [r for r in told["rows"] if (r["method"], r["task"]) == ("ties", "average")]
    assert row["differences"][0]["low"] < row["differences"][0]["mean"] < row["differences"][0]["high"] < 0
    assert told["recipes"] == [["-  density: 0.2", "+  density: 0.7"]]
    ledger = json.loads((other / "results.json").read_text())
    ledger["data"]["test"] = "other digits"
    (other / "results.json").write_text(json.dumps(ledger))
    assert "numbers on other data do not compare" in refused("compare", "run", other)


def test_baselines(there: Digits) -> None:
    rows = there.read("results.json")["rows"]
    cheap = {"base", "experts, each on its own", "expert upright", "expert turned", "average", "task_arithmetic"}
    assert {row["method"] for row in rows if row.get("baseline")} == cheap
    from spolia.runs import continual_entries, distill_study, link_schemes, meta_entries

    families: dict[str, tuple[Callable[[Any], list[Any]], set[str]]] = {
        "distill/rkkd-tiny": (distill_study.entries_of, {"labels alone", "kd"}),
        "meta/msd-tiny": (meta_entries.entries_of, {"protonet", "maml"}),
        "continual/refresh-tiny": (continual_entries.entries_of, {"finetune", "joint", "derpp"}),
        "link/llm_sc-tiny": (link_schemes.schemes_of, {"separate", "huffman", "utf8"}),
    }
    for name, (entries_of, beside) in families.items():
        assert beside <= {entry.label for entry in entries_of(load_recipe(name))}


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spolia.runs import sweep_local
    from spolia.runs.sweep_local import Job, Outcome

    class Pretended:
        """Runs that take no time; the second fails at first."""

        started: list[str] = []  # noqa: RUF012
        pause = 0.0

        def __init__(self, at_once: int): ...

        def start(self, job: Job) -> Job:
            self.started.append(job.name)
            return job

        def outcome(self, job: Job) -> Outcome:
            folder, failed = Path(job.folder), len(self.started) == 2
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(load_recipe(job.recipe, job.overrides).to_yaml())
            row = {"method": "task_arithmetic", "task": "average", "metric": "accuracy", "unit": "%", "mean": 50.0}
            (folder / "results.json").write_text(json.dumps({"rows": [row | {"low": None, "high": None, "n": 1}]}))
            state = "failed" if failed else "done"
            (folder / "status.json").write_text(json.dumps({"state": state, "seconds": {}, "message": "oops"}))
            return Outcome("failed", "oops") if failed else Outcome("done")

        def stop(self, job: Job) -> None: ...

        def kill(self, job: Job) -> None: ...

        def close(self) -> None: ...

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_local, "Local", Pretended)
    words = ["sweep", "merge/task_arithmetic-tiny", "--over", "method.scale=0.1,0.3", "--seeds", "2"]
    assert "4 runs" in well(*words, "--dry-run") and not (tmp_path / "runs").exists()
    said = spolia_(*words)
    assert said.code == 1 and "1 of 4 runs failed" in said.err and said.out.index("4 runs") < said.out.index("done")
    Pretended.started = ["", ""]
    assert "4 done" in well(*words) and len(Pretended.started) == 3  # the failed one alone
    for there in ("local", "ray", "slurm"):
        assert there in well("sweep", "--help")


# --- resources -------------------------------------------------------------------------------------------------------


def test_multi_gpu() -> None:
    """Two processes against one are in the tests of what they share."""
    assert "--nproc" in well("run", "--help")
    told = refused("run", "merge/ties-tiny", "--nproc", "0")
    assert "--nproc" in told


def test_memory_dial(place: Path, write_model: Write) -> None:
    """What merges and learners really take is in test_cost.py and test_kill.py; here that size does not decide."""
    assert devices.settled("auto") in ("cpu", "cuda")
    assert load_recipe("distill/kd", ["problem.device=auto"], check_paths=False).problem.device == "auto"
    peaks = []
    for count in (2, 8):
        models = [f"{name}-{count}" for name in ("base", "math", "code")]
        for name in models:
            write_model(place / name, {f"layers.{i}.weight": torch.zeros(256, 256) for i in range(count)})
        pool = [f"pool.base={models[0]}", f"pool.experts=[{models[1]}, {models[2]}]", "output.chunk_memory=20MB"]
        peaks.append(json.loads(well("plan", "merge/ties", *pool, "--json"))["peak_memory_bytes"])
    largest, experts = 4 * 256 * 256, 2
    assert peaks[1] - peaks[0] < largest * (experts + 2)  # and not by six tensors of three models


class Narrow(torch.nn.Linear):
    """Has no memory for more than four inputs at once."""

    most = 4

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(input) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(input)


def test_memory_dial_halves_and_says_so() -> None:
    draws = torch.Generator().manual_seed(0)
    data = torch.randn(32, 5, generator=draws), torch.randint(0, 3, (32,), generator=draws)
    student, teacher = Narrow(5, 3), torch.nn.Linear(5, 3)
    training = {"steps": 4, "batch": 16, "micro_batch": "auto"}
    with pytest.warns(SpoliaWarning) as told:
        made = spolia.distill(student, teacher, data, training=training)
    assert [str(one.message).rpartition("parts of ")[2].split()[0] for one in told] == ["8", "4"]
    student.most = 99
    whole = spolia.distill(student, teacher, data, training=training | {"micro_batch": None})
    for name, tensor in whole.state_dict().items():  # fp32 sums in another order
        torch.testing.assert_close(made.state_dict()[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        spolia.distill(Narrow(5, 3), teacher, data, training=training | {"micro_batch": None})


def test_library_first() -> None:
    called = {"list": "list_methods", "import": "import_model", "eval": "evaluate"}  # what Python keeps for itself
    app: Any = typer.main.get_command(cli.app)
    for verb in app.commands:
        assert callable(getattr(spolia, called.get(verb, verb))), f"`spolia {verb}` is no function"
    assert spolia.show("ties")["name"] == "ties" and spolia.list_methods("slrp")[0]["name"] == "slerp"
    assert str(spolia.new("ties")).startswith("# ties") and spolia.schema()["title"] == "spolia recipe"
    for kind in (spolia.ExpertPool, type(spolia.plan("merge/ties-tiny")), type(spolia.plan("merge/ties-tiny"))):
        assert hasattr(kind, "_repr_html_")


def test_seeds(there: Digits) -> None:
    assert yaml.safe_load((there.folder / "recipe.yaml").read_text())["seeds"] == 2
    ties = [row for row in there.read("results.json")["rows"] if row["method"] == "ties"]
    assert all(row["n"] == 2 and row["low"] <= row["mean"] <= row["high"] for row in ties)
    with devices.repeatable("cuda"), pytest.warns(UserWarning, match="put_.*deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # an operator without a form that repeats itself
    assert not torch.are_deterministic_algorithms_enabled()


def test_environment_check(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2**20)
    found = {finding["name"]: finding for finding in json.loads(well("doctor", "--json"))}
    assert {"torch", "torchvision", "disk", "network"} <= found.keys() and "writes" in found["disk"]["found"]
    for package, extra, unlocks in doctor.EXTRAS:
        told = found[package]
        assert unlocks in told["found"] and (told["state"] == "fine" or f"spolia[{extra}]" in told["cure"])
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get)
    assert "mend: pip uninstall torchvision" in well("doctor")


def test_completion() -> None:
    assert "--install-completion" in well("--help")
    assert "breadcrumbs_ties" in dict(complete.methods("bre")) and "link/llm_sc-tiny" in complete.recipes("link/llm")

    class Context:
        params = {"recipe": "continual/refresh-tiny"}  # noqa: RUF012

    assert "method.loss=" in complete.overrides(Context, "method.l")
    assert complete.overrides(Context, "problem.so") == ["problem.source="]


def test_privacy_and_safety(place: Path) -> None:
    from spolia.parts.api import Budget, BudgetSpent, Contract

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {place / 'ran'}",)

    (place / "evil.pt").write_bytes(pickle.dumps({"w": Evil()}))
    refused("import", "evil.pt", "-o", "out")
    assert not (place / "ran").exists() and not (place / "out").exists()
    asked = Contract(("a", "b"), shape=(2,))
    api = spolia.Api.calling(lambda x: torch.ones(len(x), 2) / 2, asked, name="them", budget=Budget(items=3))
    api(torch.rand(2, 2))
    assert api.spent.items == 2
    with pytest.raises(BudgetSpent):
        api(torch.rand(2, 2))


def test_docs() -> None:
    """That every snippet runs is in test_docs.py."""
    start = (HOUSE / "docs/index.md").read_text()
    for story in ("two models and a laptop", "You have APIs", "experts and no data", "text over a noisy channel"):
        assert re.search(rf"^## .*{story}", start, re.MULTILINE), story
    pages = {page: page.read_text() for page in (HOUSE / "docs/methods").glob("*/*.md")}
    heads = {tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)[:6]) for text in pages.values()}
    assert heads == {("What it does", "For whom", "Formula", "Settings", "Data touched", "Where we depart")}
    for method in catalog.METHODS:
        assert any(page.parent.name == method.family and method.name in text for page, text in pages.items()), (
            method.name
        )


def test_accessibility(there: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (there.folder / "report.html").read_text()
    assert page.count("<svg") == page.count('role="img"') > 0 and 'lang="en"' in page
    from spolia.reports.plots import MARKERS, PALETTE
    from spolia.reports.tables import main_table, to_text

    table = to_text(main_table(json.loads((HOUSE / "docs/results/demo.json").read_text())))
    assert "* best method; (b) baseline" in table  # marks, not colours

    assert {"#0072b2", "#d55e00", "#009e73"} < set(PALETTE) and len(set(MARKERS)) > 3  # Okabe and Ito's
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert progress.RichProgress()._bars.console.no_color
    assert "\x1b" not in well("list") + well("report", "run")


@pytest.fixture
def second_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if recipes had a second form, in which what was called `merge` is called `method`."""
    monkeypatch.setattr(schema, "VERSION", 2)
    changed = lambda raw: {("method" if key == "merge" else key): value for key, value in raw.items()}  # noqa: E731
    monkeypatch.setitem(schema.UPGRADES, 1, changed)
    yield


def test_versioning(place: Path, second_form: None) -> None:
    (place / "old.yaml").write_text(RECIPE.replace("method:", "merge:"))
    with pytest.warns(SpoliaWarning) as told:
        recipe = load_recipe("old.yaml")
    assert recipe.method.name == "task_arithmetic"
    said = str(told[0].message)
    for line in ("old.yaml:1 spolia", "-spolia: 1", "+spolia: 2", "-merge:", "+method:"):
        assert line in said
    (place / "new.yaml").write_text(RECIPE.replace("spolia: 1", "spolia: 3"))
    assert "pip install --upgrade spolia" in refused("plan", "new.yaml")

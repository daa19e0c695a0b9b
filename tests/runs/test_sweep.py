"""Sweeps without their runs: what is gone over and how it is called, what is checked first, what the table says.

Runs are stood in for by a place that writes a run folder at once, with a number that is a known function of the recipe.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml

import spolia
from spolia import cli
from spolia.bench.multitask import paired, t_interval
from spolia.core.journal import Interrupted
from spolia.errors import Problems, SpoliaError
from spolia.runs import sweep_cluster, sweep_local, sweep_search
from spolia.runs.recipe import load_recipe
from spolia.runs.sweep import listed
from spolia.runs.sweep_grid import Point, as_yaml, axes_of, corners, grid, run_name, split
from spolia.runs.sweep_local import Job, Outcome
from spolia.runs.sweep_numbers import number_of, own_line, validated, validation_of
from spolia.runs.sweep_table import SweptRun, points_of

TINY = "merge/task_arithmetic-tiny"


class Pretended:
    """A place where a run takes no time. `score(recipe)` is (on the test, on validation) in per cent, or raises."""

    pause = 0.0

    def __init__(self, score: Callable[[Any], tuple[float, float]]):
        self.score, self.started = score, list[Job]()
        self.after = lambda: None  # called when a run has ended

    def start(self, job: Job) -> Job:
        self.started.append(job)
        return job

    def outcome(self, job: Job) -> Outcome:
        recipe: Any = load_recipe(job.recipe, job.overrides)
        folder, line = Path(job.folder), own_line(recipe)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        try:
            test, validation = self.score(recipe)
        except ValueError as error:
            (folder / "status.json").write_text(json.dumps({"state": "failed", "seconds": {}, "message": str(error)}))
            return Outcome("failed", f"ValueError: {error}")
        row = {"method": line, "task": "average", "metric": "accuracy", "unit": "%", "mean": test, "low": None}
        other = row | {"method": "average", "mean": 1.0, "baseline": True}
        (folder / "results.json").write_text(json.dumps({"rows": [other, row | {"high": None, "n": 600}]}))
        kept = {"validation": {"accuracy": {line: validation}}}
        (folder / "checkpoints" / f"scores-seed-{recipe.seed}.json").write_text(json.dumps(kept))
        (folder / "status.json").write_text(json.dumps({"state": "done", "seconds": {"merge": 2.0}}))
        self.after()
        return Outcome("done")

    def stop(self, job: Job) -> None: ...

    def kill(self, job: Job) -> None: ...

    def close(self) -> None: ...

    @property
    def names(self) -> list[str]:
        found = [job.name for job in self.started]
        self.started.clear()
        return found


def peak(recipe: Any) -> tuple[float, float]:
    """Best at scale 0.4 on validation; the seed makes all of its points easier alike."""
    height = 90 - 50 * (recipe.settings.scale - 0.4) ** 2
    return height - 3 + recipe.seed, height


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    monkeypatch.chdir(tmp_path)
    made = Pretended(peak)
    monkeypatch.setattr(sweep_local, "Local", lambda at_once: made)
    yield made


def command(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


# --- what is gone over -----------------------------------------------------------------------------------------------


def test_the_grid_is_the_product_and_the_last_axis_turns_fastest():
    problems = Problems()
    axes = axes_of(["method.a=1,2", "method.b=x,y,z"], problems)
    assert problems.errors == []
    assert [p.overrides for p in grid(axes)] == [
        [f"method.a={a}", f"method.b={b}"] for a, b in itertools.product("12", "xyz")
    ]
    assert grid([]) == [Point(())]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.1,0.3", ["0.1", "0.3"]),
        ("[1, 2],[3, 4]", ["[1, 2]", "[3, 4]"]),
        ("{name: ties, density: 0.1},{name: awd}", ["{name: ties, density: 0.1}", "{name: awd}"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("null, true", ["null", "true"]),
    ],
)
def test_values_end_at_commas_outside_brackets(text, parts):
    assert split(text) == parts


@hypothesis.given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("aé,'\" :1"),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )
)
def test_values_of_python_read_back_as_themselves(value):
    from spolia.runs import yamlmarks

    text = as_yaml(value)
    assert yamlmarks.load(text).value == value
    assert split(f"{text},{text}") == [text, text] or isinstance(value, str)  # bare words may hold a comma


def test_a_range_has_ends_and_kinds():
    problems = Problems()
    whole, real, log = axes_of({"a": "1..9", "b": "0.1..0.9", "c": "1e-4..1e-1:log"}, problems)
    assert (whole.whole, real.whole, log.log) == (True, False, True)
    assert (whole.ends, real.ends, log.ends) == (("1", "9"), ("0.1", "0.9"), ("0.0001", "0.1"))
    assert [dict(p.values)["b"] for p in corners([whole, real, log])] == ["0.1", "0.9"]
    assert problems.errors == []


@pytest.mark.parametrize(
    ("over", "told"),
    [
        (["method.scale"], "KEY=VALUES"),
        (["method.scale="], "missing"),
        (["method.scale=0.1,,0.3"], "missing"),
        (["method.scale=0.1,0.1"], "twice"),
        (["a..b=1,2"], "not a key"),
        (["a=3..1"], "not below"),
        (["a=0..1:log"], "logarithm"),
    ],
)
def test_what_is_no_axis_is_told(over, told):
    problems = Problems()
    axes_of(over, problems)
    assert [told in problem.what for problem in problems.errors] == [True]


def test_names_are_readable_stable_and_safe():
    assert run_name([("method.scale", "0.3"), ("pool.base", "base")], 1) == "scale=0.3,base=base,seed=1"
    assert run_name([("method.scale", "-1e-3")], None) == "scale=-1e-3"
    assert run_name([("a.scale", "1"), ("b.scale", "2")], None) == "a.scale=1,b.scale=2"
    odd = [run_name([("k", value)], None) for value in ("a/b", "a:b", "../a b", "[1, 2]", "x" * 300, "x" * 301, "é")]
    assert len(set(odd)) == len(odd)
    assert all(len(name) < 256 and "/" not in name and " " not in name for name in odd)
    many = run_name([(f"key_number_{i}", "0.123456789") for i in range(30)], 3)
    assert len(many) <= 200


# --- what is checked first -------------------------------------------------------------------------------------------


def test_every_mistake_of_every_combination_is_told_and_nothing_is_written(capsys, place, tmp_path):
    code, out, err = command(
        capsys, "sweep", TINY, "--over", "method.scale=0.1,high", "--over", "method.weigt=1,2", "sed=3"
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert "3 problems" in err and "`high`" in err and "did you mean `weight`?" in err and "`seed`" in err
    assert place.names == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to go over", "--seeds N"]),
        (["--over", "method.scale=0.1..0.9"], ["a range is searched", "--search N"]),
        (["--over", "seed=1,2"], ["--seeds N"]),
        (["--over", "method.scale=0.1,0.2", "method.scale=1"], ["set by an override too"]),
        (["--over", "method.scale=0.1", "--over", "method.scale=0.2"], ["given twice"]),
        (["--seeds", "2", "--on", "slrm"], ["did you mean `slurm`?"]),
        (["--seeds", "2", "--resources", "num_cpus=2"], ["add --on ray or --on slurm"]),
        (["--seeds", "2", "--on", "ray", "--resources", "num_cpu=2"], ["did you mean `num_cpus`?"]),
        (["--search", "4"], ["nothing to search"]),
        (["--seeds", "0"], ["--seeds"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_mistake_ends_with_2_and_its_cure(capsys, place, tmp_path, arguments, words):
    code, out, err = command(capsys, "sweep", TINY, *arguments)
    assert (code, out) == (2, "")
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in (sweep_cluster, sweep_search):
        monkeypatch.setattr(module, "installed", lambda package: None)
    for more, extra in (({"on": "ray"}, "ray"), ({"on": "slurm"}, "slurm"), ({"search": 3}, "tune")):
        over = {"method.scale": "0.1..0.9" if "search" in more else [0.1]}
        with pytest.raises(SpoliaError, match=rf"pip install 'spolia\[{extra}\]'"):
            spolia.sweep(TINY, over, **more)


def test_a_mergekit_recipe_is_sent_away(tmp_path):
    (tmp_path / "theirs.yml").write_text("merge_method: linear\nmodels: [{model: a}]\n")
    with pytest.raises(SpoliaError, match="mergekit"):
        spolia.sweep(tmp_path / "theirs.yml", seeds=2)


def test_a_dry_run_shows_the_runs_and_writes_nothing(capsys, place, tmp_path):
    code, out, _ = command(capsys, "sweep", TINY, "--over", "method.scale=0.1,0.3", "--seeds", "2", "--dry-run")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  scale=")] == [
        "scale=0.1,seed=0", "scale=0.1,seed=1", "scale=0.3,seed=0", "scale=0.3,seed=1",
    ]  # fmt: skip
    assert place.names == [] and list(tmp_path.iterdir()) == []


# --- runs and their table --------------------------------------------------------------------------------------------


def test_seeds_begin_at_the_recipes_own_and_each_run_has_one(place):
    swept = spolia.sweep(TINY, {"method.scale": [0.1]}, seeds=2, overrides=["seed=5", "seeds=3"])
    assert [run.seed for run in swept.runs] == [5, 6]
    kept = yaml.safe_load((swept.folder / "scale=0.1,seed=6" / "recipe.yaml").read_text())
    assert (kept["seed"], kept["seeds"], kept["method"]["scale"]) == (6, 1, 0.1)


def test_the_table_is_over_seeds_and_paired_by_seed(capsys, place):
    code, out, _ = command(capsys, "sweep", TINY, "--over", "method.scale=0.1,0.4", "--seeds", "3")
    assert code == 0
    swept = listed("runs/task_arithmetic-tiny-sweep")
    first, second = points_of(swept.runs)
    scores = [[90 - 50 * (scale - 0.4) ** 2 - 3 + seed for seed in range(3)] for scale in (0.1, 0.4)]
    own, gap = t_interval(scores[1]), paired(scores[1], scores[0])
    assert second.number is not None and second.difference is not None and first.difference is None
    assert (second.number["mean"], second.number["low"]) == pytest.approx((own.mean, own.low))
    # The seed moves both points alike: their differences are equal, and the interval has no width (but for rounding).
    assert (second.difference["mean"], second.difference["low"]) == pytest.approx((gap.mean, gap.low)) == (4.5, 4.5)
    assert swept.chosen() == second
    assert "Best on validation: method.scale=0.4" in out and "+4.50 [+4.50, +4.50]" in out
    assert command(capsys, "sweep", "runs/task_arithmetic-tiny-sweep", "--list")[1].strip() in out


def test_finished_runs_are_passed_over_and_new_values_are_added(place):
    spolia.sweep(TINY, {"method.scale": [0.1, 0.3]}, seeds=2)
    assert place.names == ["scale=0.1,seed=0", "scale=0.1,seed=1", "scale=0.3,seed=0", "scale=0.3,seed=1"]
    swept = spolia.sweep(TINY, {"method.scale": [0.3, 0.5]}, seeds=2)
    assert place.names == ["scale=0.5,seed=0", "scale=0.5,seed=1"]
    assert [run.name.partition(",")[0] for run in swept.runs] == [f"scale={s}" for s in (0.1, 0.1, 0.3, 0.3, 0.5, 0.5)]
    again = spolia.sweep(TINY, {"method.scale": [0.1, 0.3, 0.5]}, seeds=2)
    assert place.names == [] and again.to_dict() == swept.to_dict()


def test_a_failed_run_is_listed_the_rest_kept_and_tried_again(capsys, place):
    def breaks(recipe: Any) -> tuple[float, float]:
        if recipe.settings.scale == 0.3:
            raise ValueError("the loss is no number")
        return peak(recipe)

    place.score = breaks
    arguments = ["sweep", TINY, "--over", "method.scale=0.1,0.3,0.5"]
    code, out, err = command(capsys, *arguments)
    assert code == 1 and len(place.names) == 3
    assert "failed: scale=0.3" in out and "the loss is no number" in out and "1 of 3 runs failed" in err
    assert [run.state for run in listed("runs/task_arithmetic-tiny-sweep").runs] == ["done", "failed", "done"]
    assert "Best on validation" not in out  # one point is missing
    place.score = peak
    code, out, err = command(capsys, *arguments)
    assert code == 0 and place.names == ["scale=0.3"] and "failed:" not in out and err == ""


def test_another_sweep_in_the_folder_is_refused(place, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("spolia: 1\npool: {source: digits}\nmethod: {name: task_arithmetic}\n")
    spolia.sweep(mine, {"method.scale": [0.1]}, folder="out")
    for change in ({"overrides": ["pool.domains=[upright]"]}, {}):
        if not change:
            mine.write_text(mine.read_text().replace("task_arithmetic", "ties"))
        with pytest.raises(SpoliaError, match=r"holds (another sweep|a run of another recipe)"):
            spolia.sweep(mine, {"method.scale": [0.1]}, folder="out", **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(SpoliaError, match=r"thesis\.tex"):
        spolia.sweep(TINY, seeds=2, folder="full")


def test_comments_make_no_other_recipe(place, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("spolia: 1\npool: {source: digits}\nmethod: {name: task_arithmetic}\n")
    spolia.sweep(mine, {"method.scale": [0.1]})
    mine.write_text("# tried again\n" + mine.read_text())
    spolia.sweep(mine, {"method.scale": [0.1]})
    assert len(place.started) == 1


def test_another_metric_is_read_from_the_runs(place):
    swept = spolia.sweep(TINY, {"method.scale": [0.1, 0.3]})
    file = swept.folder / "scale=0.1" / "results.json"
    rows = json.loads(file.read_text())["rows"]
    file.write_text(json.dumps({"rows": [*rows, rows[1] | {"metric": "ece", "mean": 7.0}]}))
    again = spolia.sweep(TINY, {"method.scale": [0.1, 0.3]}, metric="ece")
    assert [run.number and run.number["mean"] for run in again.runs] == [7.0, None]
    back = spolia.sweep(TINY, {"method.scale": [0.1, 0.3]})
    assert [run.number for run in back.runs] == [run.number for run in swept.runs]


def test_an_interrupted_sweep_keeps_what_is_done_and_goes_on(place):
    def stops() -> None:
        raise KeyboardInterrupt

    place.after = stops
    with pytest.raises(KeyboardInterrupt):
        spolia.sweep(TINY, {"method.scale": [0.1, 0.3]})
    assert place.names == ["scale=0.1"]
    assert [run.state for run in listed("runs/task_arithmetic-tiny-sweep").runs] == ["done", "waiting"]
    place.after = lambda: None
    assert not spolia.sweep(TINY, {"method.scale": [0.1, 0.3]}).failed
    assert place.names == ["scale=0.3"]


def test_runs_go_some_at_a_time(place):
    held = list[int]()
    known = place.outcome
    place.outcome = lambda job: held.append(len(place.started)) or known(job)  # type: ignore[method-assign]
    spolia.sweep(TINY, {"method.scale": [0.1, 0.2, 0.3]}, jobs=2)
    assert held == [2, 2, 3]  # two begin before the first is looked at; the third when one has ended


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "known"),
    [
        ("merge/ties-tiny", "ties", ("accuracy",)),
        ("surgery/surgery-tiny", "surgery", ()),
        ("distill/rkkd-tiny", "kd + rank", ("accuracy", "loss")),
        ("meta/msd-tiny", "msd on maml", ("accuracy",)),
        ("datafree/free-tiny", "free", ("accuracy",)),
        ("continual/refresh-tiny", "er + refresh", ()),
        ("continual/apis-tiny", "DFCL-APIs", ()),
        ("link/llm_sc-tiny", "llm_sc", ()),
    ],
)
def test_each_family_names_its_own_line_and_what_it_validates(name, line, known):
    recipe: Any = load_recipe(name)
    expected = {"meta/msd-tiny": f"msd on {getattr(recipe.settings, 'base', '')}"}.get(name, line)
    if name == "continual/refresh-tiny":
        expected = f"{recipe.settings.host} + refresh"
    assert (own_line(recipe), validated(recipe)) == (expected, known)


def test_the_main_number_is_the_average_of_the_own_line(tmp_path):
    row = {"method": "x", "metric": "loss", "unit": "", "low": None, "high": None, "n": 1}
    rows = [row | {"task": task, "mean": mean} for task, mean in (("a", 1.0), ("b", 2.0))]
    accuracy = row | {"metric": "accuracy", "unit": "%", "task": "average", "mean": 90.0, "low": 80.0, "high": 95.0}
    (tmp_path / "results.json").write_text(
        json.dumps({"rows": [*rows, {"odd": 1}, {**row, "task": "c", "mean": None}]})
    )
    assert number_of(tmp_path, "x", None) == {
        "metric": "loss", "unit": "", "mean": 1.5, "low": None, "high": None, "n": None,
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"rows": [*rows, accuracy]}))
    found = number_of(tmp_path, "x", None)
    assert found is not None and (found["metric"], found["low"]) == ("accuracy", 80.0)
    assert number_of(tmp_path, "y", None) is None and number_of(tmp_path / "none", "x", None) is None


def test_validation_is_read_in_the_form_of_each_family(tmp_path):
    kept = {
        "scores-seed-0.json": {"validation": {"accuracy": {"x": 80.0}}},
        "scores-seed-1.json": {"validation": {"accuracy": {"x": 90.0}}},
        "distill-seed-0.json": {"x": {"validation": {"accuracy": 0.7, "loss": 1.0}}},
        "datafree-seed-0.json": {"points": {"x": [[1, 20.0, 9.0], [2, 30.0, 8.0], [3, None, 7.0]]}},
        "meta-seed-0.json": {"validation": {"x": 60.0, "y": None}},
        "other-seed-0.json": {"x": 1},
    }
    (tmp_path / "checkpoints").mkdir()
    for name, value in kept.items():
        (tmp_path / "checkpoints" / name).write_text(json.dumps(value))
    assert validation_of(tmp_path, "x") == {"accuracy": pytest.approx((80 + 90 + 70 + 30 + 60) / 5), "loss": 1.0}
    assert validation_of(tmp_path, "y") == {}


def test_no_accuracy_lies_beyond_its_ends():
    number = {"metric": "accuracy", "unit": "%", "low": None, "high": None, "n": 1}
    runs = [SweptRun(f"s{s}", {}, s, [], "done", number=number | {"mean": m}) for s, m in enumerate((60.0, 99.0))]
    (point,) = points_of(runs)
    assert point.number is not None and (point.number["low"], point.number["high"]) == (0.0, 100.0)


# --- listing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_listing_opens_one_file_and_imports_nothing_heavy(tmp_path, listed_lightly):
    folder = tmp_path / "big"
    folder.mkdir()
    number = {"metric": "accuracy", "unit": "%", "mean": 90.0, "low": None, "high": None, "n": 1}
    runs = [
        {"name": f"a={i},seed={s}", "values": {"a": str(i)}, "seed": s, "overrides": [], "state": "done", "line": "x",
         "number": number}
        for i in range(40) for s in range(5)
    ]  # fmt: skip
    runs[7]["state"] = "unfinished"
    kept = {"recipe": "r", "digest": 0, "overrides": [], "search": None, "metric": None, "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(kept))
    assert "199 done, 1 waiting" in listed_lightly(folder)


def test_a_lost_table_is_made_again_from_the_runs(place):
    swept = spolia.sweep(TINY, {"method.scale": [0.1, 0.3]}, seeds=2)
    (swept.folder / "sweep.json").unlink()
    again = spolia.sweep(TINY, {"method.scale": [0.1, 0.3]}, seeds=2)
    assert len(place.names) == 4 and again.to_dict() == swept.to_dict()
    assert listed("task_arithmetic-tiny").to_dict() == swept.to_dict()  # by the recipe's name


def test_a_run_without_a_seed_of_its_own_stands_apart(place):
    spolia.sweep(TINY, {"method.scale": [0.1]})
    swept = spolia.sweep(TINY, {"method.scale": [0.1]}, seeds=2)
    assert [(point.done, point.seeds) for point in points_of(swept.runs)] == [(1, []), (2, [0, 1])]


def test_what_is_no_sweep_is_told(tmp_path):
    with pytest.raises(SpoliaError, match="there is no sweep"):
        listed(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": [{"nme": 1}]}')
    with pytest.raises(SpoliaError, match="cannot be read"):
        listed(tmp_path)


# --- search ----------------------------------------------------------------------------------------------------------


def values(swept: Any) -> list[float]:
    return [float(run.values["method.scale"]) for run in swept.runs]


@pytest.mark.slow
def test_a_search_stopped_anywhere_draws_what_one_that_was_not_draws(place, tmp_path):
    pytest.importorskip("optuna")
    over = {"method.scale": "0.0..1.0"}
    whole = spolia.sweep(TINY, over, search=14, folder="whole")
    assert all(0 <= value <= 1 for value in values(whole)) and len(set(values(whole))) == 14

    def stops() -> None:
        if len(place.started) in (3, 7):
            raise Interrupted

    place.names.clear()
    place.after = stops
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            spolia.sweep(TINY, over, search=14, folder="stopped")
        place.started.append(place.started[-1])  # so that the next sitting does not stop at the same run
    place.after = lambda: None
    assert values(spolia.sweep(TINY, over, search=14, folder="stopped")) == values(whole)


@pytest.mark.slow
def test_a_search_goes_by_validation_and_says_so(capsys, place):
    pytest.importorskip("optuna")
    place.score = lambda recipe: (100 * recipe.settings.scale, peak(recipe)[1])  # the test would choose scale 1
    code, out, _ = command(capsys, "sweep", TINY, "--over", "method.scale=0.0..1.0", "--search", "12", "--seeds", "2")
    assert code == 0
    swept = listed("runs/task_arithmetic-tiny-sweep")
    best = swept.chosen()
    assert best is not None and len(swept.runs) == 24
    tried = {run.values["method.scale"]: run.validation["accuracy"] for run in swept.runs}
    assert best.validation["accuracy"] == max(tried.values())
    assert "Best on validation: method.scale=" in out and "The test has not chosen it" in out
    place.names.clear()
    spolia.sweep(TINY, {"method.scale": "0.0..1.0"}, search=13, seeds=2)  # one more is one more
    assert [name.partition(",")[0] for name in place.names] == ["point-012", "point-012"]


@pytest.mark.slow
def test_a_failed_point_is_no_value_and_is_tried_again(place):
    pytest.importorskip("optuna")

    def breaks(recipe: Any) -> tuple[float, float]:
        if recipe.settings.scale > 0.5:
            raise ValueError("too large")
        return peak(recipe)

    place.score = breaks
    over = {"method.scale": "0.0..1.0"}
    swept = spolia.sweep(TINY, over, search=6)
    failed = {run.name for run in swept.failed}
    assert failed == {run.name for run in swept.runs if float(run.values["method.scale"]) > 0.5}
    place.names.clear()
    place.score = peak
    assert not spolia.sweep(TINY, over, search=6).failed
    assert set(place.names) == failed


@pytest.mark.slow
def test_values_and_whole_numbers_are_searched_too(place):
    pytest.importorskip("optuna")
    place.score = lambda recipe: (50.0, 50.0 + recipe.settings.density * 10)
    over = ["method.density=0.2,0.8", "method.scale=1..3"]
    swept = spolia.sweep("merge/ties-tiny", over, search=8, jobs=3)
    assert {run.values["method.density"] for run in swept.runs} <= {"0.2", "0.8"}
    assert {run.values["method.scale"] for run in swept.runs} <= {"1", "2", "3"}


@pytest.mark.slow
def test_a_search_by_the_test_must_be_asked_for_and_is_named(capsys, place):
    pytest.importorskip("optuna")
    arguments = ["sweep", "surgery/surgery-tiny", "--over", "method.lr=1e-4..1e-2:log", "--search", "3"]
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "") and "fools" in err and "--on-test" in err
    place.score = lambda recipe: (100 * recipe.settings.lr, 0.0)
    code, out, _ = command(capsys, *arguments, "--on-test")
    assert code == 0 and "Best on the test" in out and "too good" in out


@pytest.mark.slow
def test_metrics_of_a_search_are_checked(place):
    pytest.importorskip("optuna")
    over = {"method.scale": "0.0..1.0"}
    with pytest.raises(SpoliaError, match="`ece` is not taken on validation data"):
        spolia.sweep(TINY, over, search=2, metric="ece")
    with pytest.raises(SpoliaError, match="is more of `ece` better"):
        spolia.sweep(TINY, over, search=2, metric="ece", on_test=True)
    with pytest.raises(SpoliaError, match="no run measured `ece`"):
        spolia.sweep(TINY, over, search=2, metric="ece", on_test=True, lowest=True)


@pytest.mark.slow
def test_a_grid_and_a_search_keep_folders_of_their_own(place):
    pytest.importorskip("optuna")
    spolia.sweep(TINY, {"method.scale": [0.1]})
    with pytest.raises(SpoliaError, match="another sweep"):
        spolia.sweep(TINY, {"method.scale": "0.0..1.0"}, search=2)


@pytest.mark.parametrize("lowest", [True, False])
def test_a_search_goes_where_the_metric_is_better(lowest: bool, tmp_path: Path) -> None:
    """Of one parabola, upside down for the other direction; the first ten points are drawn at random."""
    pytest.importorskip("optuna")
    apart = []
    for seed in range(3):
        drawn: list[float] = []

        def judge(points: Any, drawn: list[float] = drawn) -> list[float | None]:
            drawn += [float(dict(point.values)["method.scale"]) for _, point in points]
            return [(1 if lowest else -1) * (x - 0.3) ** 2 for x in drawn[-len(points) :]]

        (tmp_path / str(seed)).mkdir()
        axes = axes_of(["method.scale=0.0..1.0"], Problems())
        sweep_search.search(tmp_path / str(seed), axes, 24, judge, lowest=lowest, at_once=1, seed=seed)
        apart.append([abs(x - 0.3) for x in drawn])
    first, last = (sum(sum(one[part]) for one in apart) for part in (slice(0, 10), slice(14, 24)))
    assert last < 0.6 * first  # a search the wrong way ends at the far end, more than twice as far as chance

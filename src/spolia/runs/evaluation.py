"""`spolia eval`: how right a model that is there is on every task of a recipe, beside the base and the experts it names.

Measured as a run measures its own merge: the same data, heads, counts and intervals. Nothing is trained, merged or written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench import multitask
from spolia.bench.multitask import Share
from spolia.errors import SpoliaError
from spolia.parts.expert import Expert, ExpertPool
from spolia.parts.learned import Learned
from spolia.runs.digits_pool import DigitExperts, one_thread
from spolia.runs.folder_ledger import BASE, EXPERTS, METRIC, labels_of, rows_of
from spolia.runs.recipe import Recipe, Source, check_recipe, load_recipe, read_source
from spolia.runs.references import located
from spolia.runs.schema import DigitsPool

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.bottleneck import Adapters
    from spolia.parts.surgered import SurgeredModel
    from spolia.runs.folder_merge import Study

    State = dict[str, Tensor]
    Logits = Callable[[str, Any], Tensor]

_ADAPTERS = Path("adapters") / "adapters.safetensors"  # beside a repaired merge


@dataclass(frozen=True)
class Evaluation:
    """What was counted: rows of a results ledger, the model's own after those that it stands beside."""

    model: str
    data: dict[str, str]
    rows: list[dict[str, Any]]
    notes: str

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "evaluation", **asdict(self)}

    def to_table(self, to: str = "text", width: int | None = None) -> str:
        """The table as text, markdown, latex or csv; text fits into `width` columns of a terminal."""
        from spolia.runs.verbs import tables_of

        return tables_of(self.to_dict(), to, width)

    def to_text(self, width: int | None = None) -> str:
        """For people: the table, what it was tested on, what the numbers mean."""
        seen = [f"{phase}: {what}" for phase, what in self.data.items()]
        return "\n".join([self.to_table("text", width), *seen, self.notes])

    def _repr_html_(self) -> str:
        from spolia.core.shown import html_text

        return html_text(self.to_text(), self.model)


def evaluate(
    model: Any, recipe: str | os.PathLike[str] | None = None, overrides: Sequence[str] = (), *, progress: Any = None
) -> Evaluation:
    """How right `model` is on the tasks of `recipe`, beside the base and the experts that it names.

    `model`: a run's folder, whose result is judged, without `recipe` on the run's own tasks; or a model's folder or file, a
    hub id, a module or a state dict. `recipe`: a file whose pool names tasks, as for a run; its method is left aside, and so
    are inputs to adapt on. Heads are those of the experts; where the pool names none, the model answers by its own head.
    Raises SpoliaError for what does not fit, before anything is counted.
    """
    given = _given(model)
    if recipe is None and given.run is None:
        mend = "name a recipe whose pool has `tasks`: spolia eval MODEL tasks.yaml"
        raise SpoliaError("no tasks are named to judge it on", where=given.label, mend=mend)
    if recipe is None and given.own is not None and isinstance(given.own.pool, DigitsPool):
        if overrides:
            mend = "leave it away, or name a recipe over models on disk"
            raise SpoliaError("the run is judged on its own digits", where=f"override {overrides[0]}", mend=mend)
        return _on_digits(given, given.own)
    source = read_source(os.fspath(recipe) if recipe is not None else f"{given.run}/recipe.yaml")
    asked, alone = _asked(source, given.weights)
    checked = check_recipe(asked, overrides)
    assert isinstance(checked, Recipe)  # `average` is a merge
    return _on_folders(given, checked, alone, progress)


# --- what is given ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """The model: its name, its name with adapters, what holds its weights; and the run whose result it is."""

    label: str
    repaired: str
    weights: Any
    run: Path | None = None
    own: Recipe | None = None  # of that run

    @property
    def told(self) -> str:
        return str(self.run or (self.weights if isinstance(self.weights, str) else self.label))


def _given(model: Any) -> _Given:
    if isinstance(model, Learned):
        model = model.weights
    if not isinstance(model, str | os.PathLike):
        return _Given("model", "model", model)
    path = Path(model)
    if not (path / "status.json").is_file():
        label = path.name if path.name not in ("", BASE) else "model"
        return _Given(label, f"{label} + adapters", str(model))
    result, own = path / "result", load_recipe(path / "recipe.yaml", check_paths=False)
    if not isinstance(own, Recipe):
        mend = f"its table: spolia report {path}; to measure again: spolia run {path / 'recipe.yaml'} -o NEW"
        raise SpoliaError(f"{own.method.name} is no merge, and judged by its own run", where=str(path), mend=mend)
    if not result.is_dir():
        raise SpoliaError("the run has no result yet", where=str(path), mend="run it again to continue, then ask again")
    return _Given(*labels_of(own), str(result), path, own)


def _asked(source: Source, model: Any) -> tuple[Source, bool]:
    """The recipe without what judging has no use for, and whether the model stands for experts that it does not name."""
    raw, where = source.marked.value, source.marked.where(("pool",))
    pool = raw.get("pool") if isinstance(raw, dict) else None
    if isinstance(raw, dict) and ("problem" in raw or (isinstance(pool, dict) and pool.get("source") == "digits")):
        mend = "give a recipe whose pool names models on disk and their `tasks`"
        raise SpoliaError("makes its own experts or data: a run of it is what judges", where=source.name, mend=mend)
    if not isinstance(pool, dict) or not isinstance(pool.get("tasks"), dict) or not pool["tasks"]:
        raise SpoliaError(
            "names no tasks to judge on", where=where, mend="add `tasks: {EXPERT: {test: FILE}}` to `pool`"
        )
    tasks = {
        name: {key: value for key, value in one.items() if key != "unlabelled"} if isinstance(one, dict) else one
        for name, one in pool["tasks"].items()
    }
    pool, alone = {**pool, "tasks": tasks}, pool.get("experts") is None
    if alone:
        if not isinstance(model, str):
            raise SpoliaError("names no experts", where=where, mend="list them: their configs and heads run the model")
        path = os.path.abspath(model) if os.path.exists(model) else model
        pool["experts"] = [{"name": name, "path": path} for name in tasks]
    kept = {key: value for key, value in raw.items() if key not in ("preprocess", "surgery")}
    value = {**kept, "pool": pool, "method": {"name": "average"}}  # the plainest: all pools go with it
    return replace(source, marked=replace(source.marked, value=value)), alone


def _adapters(given: _Given, tasks: Sequence[str], notes: list[str]) -> Adapters | None:
    """What repairs the model, where it is of these tasks."""
    file = Path(given.weights) / _ADAPTERS if isinstance(given.weights, str) else None
    if file is None or not file.is_file():
        return None
    from spolia.parts.bottleneck import Adapters

    found = Adapters.load(file)
    if lacking := [task for task in tasks if task not in found.tasks]:
        notes.append(f"Its adapters are left aside: they are of {', '.join(found.tasks)}, not of {', '.join(lacking)}.")
        return None
    return found


def _repaired(model: SurgeredModel) -> Logits:
    return lambda task, batch: model(batch, task)


# --- models on disk --------------------------------------------------------------------------------------------------


def _on_folders(given: _Given, recipe: Recipe, alone: bool, progress: Any) -> Evaluation:
    from spolia.runs.folder_merge import open_study
    from spolia.runs.folder_study import judged
    from spolia.zoo.hf import beside

    own = None if alone else ExpertPool.of({given.label: given.weights}, None, located).experts[0]  # cheap: headers
    study, notes = open_study(recipe), []
    opened, tasks = study.opened, list(study.test)
    if own is not None:
        model = beside(opened, own)
    elif study.language or opened.heads or study.pool.heads == "merged":
        model = opened.pool.experts[0]
    else:
        mend = "list the experts in the pool, whose heads are taken; or give heads: tasks: {NAME: {head: FILE}}"
        raise SpoliaError("has no head to answer with", where=given.told, mend=mend)
    adapters = _adapters(given, tasks, notes)
    if progress is not None:
        models = 1 + (opened.pool.base is not None) + (adapters is not None) + (not alone)
        progress.start("evaluate", models * len(tasks), "tasks")
    scores: dict[str, dict[str, list[Any]]] = {}
    for label, logits, on in _judged(study, given, model, adapters, alone):
        for task in on:
            scores.setdefault(label, {}).update(judged(study, logits, (task,)))
            if progress is not None:
                progress.advance(1)
    if progress is not None:
        progress.finish()
    if opened.heads:
        notes.append("The head is the model's own." if alone else "Heads are each expert's own.")
    notes.append("Perplexity is per token." if study.language else "Intervals are 95 %, Wilson's over test inputs.")
    data = {"test": ", ".join(f"{name}: {len(examples)} inputs" for name, examples in study.test.items())}
    rows = rows_of(scores, set(scores) & {BASE, EXPERTS}, study.language)
    return Evaluation(given.told, data, rows, " ".join(notes))


def _judged(
    study: Study, given: _Given, model: Expert, adapters: Adapters | None, alone: bool
) -> Iterator[tuple[str, Logits, Sequence[str]]]:
    """What is judged on which tasks: base, every expert at home, the model, and with its adapters. One is held at a time."""
    from spolia.parts.surgered import SurgeredModel, merged_network
    from spolia.runs.folder_study import read_state

    pool, network, tasks = study.opened.pool, study.opened.network, list(study.test)

    def of(weights: State) -> Logits:
        return lambda task, batch: network.logits(task, batch, weights)

    if pool.base is not None:
        yield BASE, of(read_state(pool.base.weights)), tasks
    for expert in pool.experts if not alone else ():
        yield EXPERTS, of(read_state(expert.weights)), [expert.name]
    state = read_state(model.weights)
    yield given.label, of(state), tasks
    if adapters is not None:
        yield given.repaired, _repaired(SurgeredModel(merged_network(network, state), adapters)), tasks


# --- digits ----------------------------------------------------------------------------------------------------------


def _on_digits(given: _Given, recipe: Recipe) -> Evaluation:
    """The first seed's merge, on its test images and beside the experts that the run has kept."""
    from spolia.core.checkpoint import read_tensors
    from spolia.data.digits import SIZES
    from spolia.parts.surgered import SurgeredModel, merged_network
    from spolia.runs.folder_merge import wide

    assert isinstance(recipe.pool, DigitsPool) and given.run is not None
    domains, seed, notes = tuple(recipe.pool.domains), recipe.seed, [f"The result is that of seed {recipe.seed}."]
    pool = DigitExperts(given.run / "checkpoints" / f"seed-{seed}", domains, seed)
    for folder in (pool.base, pool.heads, *pool.experts):
        if not folder.is_dir():
            mend = f"make it again: spolia run {given.run / 'recipe.yaml'} -o NEW"
            raise SpoliaError("is gone, and the result is judged beside it", where=str(folder), mend=mend)
    with one_thread():
        test, state = pool.tasks("test"), wide(read_tensors(given.weights))
        scores: dict[str, dict[str, Share]] = {BASE: multitask.evaluate(pool.outputs(read_tensors(pool.base)), test)}
        homes = [multitask.evaluate(pool.outputs(read_tensors(pool.expert(task.name))), [task]) for task in test]
        scores[EXPERTS] = {name: share for home in homes for name, share in home.items()}
        scores[given.label] = multitask.evaluate(pool.outputs(state), test)
        if (adapters := _adapters(given, domains, notes)) is not None:
            model = SurgeredModel(merged_network(pool.network, state), adapters)
            scores[given.repaired] = multitask.evaluate(_repaired(model), test)
    ledger = {label: [found] for label, found in scores.items()}
    rows = multitask.ledger_rows(ledger, metric=METRIC, baselines={BASE, EXPERTS})
    notes.append("Intervals are 95 %, Wilson's over test images.")
    return Evaluation(given.told, {"test": f"{SIZES['test']} digits in each domain"}, rows, " ".join(notes))

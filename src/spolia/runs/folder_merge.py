"""The models of a folder pool opened under one network, and merged without their heads into result/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Journal
from spolia.errors import Problems, SpoliaError
from spolia.parts.examples import Examples
from spolia.parts.expert import ExpertPool
from spolia.parts.learned import Learned
from spolia.runs import folder_ledger
from spolia.runs.digits_study import needs_base
from spolia.runs.folder_plan import pool_of
from spolia.runs.learned import learn, write_folder
from spolia.runs.recipe import Recipe
from spolia.runs.schema import FoldersPool
from spolia.runs.store import RunFolder
from spolia.runs.surgery_merge import merge_of
from spolia.runs.taskdata import Known, known_of, wants_labels

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.zoo.hf import Opened

    State = dict[str, Tensor]


@dataclass(frozen=True)
class Study:
    """A recipe with its models open and its data read."""

    recipe: Recipe
    opened: Opened
    known: Mapping[str, Known]
    unlabelled: Mapping[str, Examples]
    test: Mapping[str, Examples]

    @property
    def pool(self) -> FoldersPool:
        assert isinstance(self.recipe.pool, FoldersPool)
        return self.recipe.pool

    @property
    def language(self) -> bool:
        return all(known.language for known in self.known.values())


def open_study(recipe: Recipe) -> Study:
    """Data first, for it is cheap and tells most mistakes; then the models; then one input of every task through them.

    SpoliaError where models or data do not fit.
    """
    from spolia.parts.adaptation import check_inputs
    from spolia.parts.combination import fitted
    from spolia.runs.taskload import load_tasks
    from spolia.zoo.hf import open_pool

    assert isinstance(recipe.pool, FoldersPool)
    local, pool = pool_of(recipe)
    tasks = {entry.name: local.tasks[entry.name] for entry in local.experts}
    known = {name: known_of(local, name) for name in tasks}
    unlabelled, test = load_tasks(tasks, known, wants_labels(recipe.settings))
    if recipe.repair[0].family == "surgery" and recipe.repair[1].protocol == "transductive":
        unlabelled = {name: test.get(name, given) for name, given in unlabelled.items()}
    first = next(iter((unlabelled or test).values()))
    files = {name: task.head for name, task in tasks.items() if task.head is not None}
    opened = open_pool(pool, first.batch(range(min(2, len(first)))), local.heads, files, local.network)
    fitted(opened.fresh(), opened.network)
    for given, where in ((unlabelled, "unlabelled"), (test, "test")):
        _check(check_inputs, opened, given, where)
    return Study(recipe, opened, known, unlabelled, test)


def _check(check: Callable[..., None], opened: Opened, given: Mapping[str, Examples], where: str) -> None:
    """One input of every task through the network; places are told as the recipe calls them."""
    try:
        check(opened.network, given)
    except SpoliaError as error:
        problems = Problems()
        for problem in error.problems:
            task = problem.where.removeprefix("unlabelled.")
            place = f"pool.tasks.{task}.{where}" if problem.where != task else problem.where
            problems.add(place, problem.what, problem.mend)
        raise SpoliaError(problems=problems.errors) from None


def merged(study: Study, run: RunFolder, journal: Journal) -> State:
    """The merge, from result/, under the module's names and in fp32."""
    recipe, opened = study.recipe, study.opened
    name, settings = merge_of(recipe)
    method, pool = find(name), opened.fresh()
    pool.steps = recipe.preprocess
    if not run.result.exists():
        learned = _made(study, name, settings, pool, journal)
        _write(study, run, learned, pool, name, settings)
    donor = opened.pool.base if opened.pool.base is not None and keeps_base(method.name, pool) else None
    names = (donor or opened.pool.experts[0]).weights.names  # type: ignore[attr-defined]
    for task, tensors in opened.heads.items():
        folder = run.result / "heads" / task
        if not folder.is_dir():
            write_checkpoint(folder, tensors, opened.configs[task])
    stored = read_tensors(run.result)
    return wide({own: stored[file] for own, file in names.items() if file in stored})


def wide(state: State) -> State:
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def keeps_base(method: str, pool: ExpertPool) -> bool:
    kind = find(method).settings_class()
    return kind.base != "unused" and (bool(find(method).data) or needs_base(method, len(pool.experts)))


def _made(study: Study, name: str, settings: Any, pool: ExpertPool, journal: Journal) -> Learned:
    """The merge in memory, under the module's names."""
    recipe = study.recipe
    if find(name).data:
        return learn(
            pool,
            find(name),
            settings,
            study.opened.network,
            study.unlabelled,
            dtype=recipe.output.dtype,
            seed=recipe.seed,
            journal=journal,
            tested_on=study.test if len(study.test) == len(pool.experts) else None,
        )
    return Learned(plain(study, name, settings), None, {"method": name, "warnings": []})


def plain(study: Study, name: str, settings: Any = None, steps: bool = True) -> State:
    """A merge that sees weights alone."""
    from spolia.runs.verbs import merge

    recipe, pool = study.recipe, study.opened.pool
    with_base = pool.base is not None and needs_base(name, len(pool.experts))
    return merge(
        {expert.name: expert.weights for expert in pool.experts},
        base=pool.base.weights if pool.base is not None and with_base else None,
        method=name,
        settings=settings,
        preprocess=[step.to_dict() for step in recipe.preprocess] if steps else None,
        dtype=recipe.output.dtype,
        seed=recipe.seed,
    )


def _write(study: Study, run: RunFolder, learned: Learned, pool: ExpertPool, name: str, settings: Any) -> None:
    """result/, its tensors called as in the first model's files."""
    recipe = study.recipe
    if pool.base is not None and not keeps_base(name, pool):
        pool.base = None
    names = pool.models[0].weights.names  # type: ignore[attr-defined]
    weights = {names[own]: tensor for own, tensor in learned.weights.items() if own in names}
    factors = learned.coefficients
    if factors is not None:
        factors = {names[own]: values for own, values in factors.items() if own in names}
    local = study.pool
    given = {entry.name: _place(entry.path, entry.lora) for entry in local.experts}
    base = _place(local.base.path, local.base.lora) if local.base is not None else None
    write_folder(
        Learned(weights, factors, learned.facts),
        pool,
        run.result,
        method=find(name),
        settings=settings,
        given=None if study.opened.network.heads else (given, base),
        seed=recipe.seed,
        max_shard_size=recipe.output.max_shard_size,
        overwrite=False,
        render=lambda facts: folder_ledger.card(study, facts, None),
    )


def _place(path: Path, lora: Path | None) -> str:
    return f"{path}+{lora}" if lora is not None else str(path)

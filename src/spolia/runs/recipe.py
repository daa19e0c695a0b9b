"""A recipe: what you ask for. Read from a file or the package, overridden by `key=value`, checked whole.

Every mistake is found at once and told with its line, before any model is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from spolia.catalog import METHODS, Method, find
from spolia.core.settings import PerModel
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.preprocessed import Step
from spolia.runs import yamlmarks
from spolia.runs.complaints import validate
from spolia.runs.overrides import apply_overrides
from spolia.runs.packaged import FOLDER, packaged
from spolia.runs.pools import Starts, Where, check_pool, missing_models, place_of, resolve_paths
from spolia.runs.preprocessing import check_steps, read_steps
from spolia.runs.references import near_recipes, recipes_in
from spolia.runs.schema import VERSION, DigitsPool, FoldersPool, Head, Output, at_home, check_version
from spolia.runs.studies import STUDIES, StudyRecipe, check_study
from spolia.runs.taskdata import check_tasks
from spolia.runs.yamlmarks import Marked

_FIRST = ("merge", "merge_settings")  # settings of surgeries that `method` stands for where both are given


@dataclass(frozen=True)
class Source:
    """A recipe's text, not yet checked. `folder` is what its relative paths are relative to."""

    name: str
    text: str
    marked: Marked
    folder: Path
    packaged: bool = False
    documents: tuple[Marked, ...] = ()  # of a file with several mergekit recipes

    @property
    def is_mergekit(self) -> bool:
        return isinstance(self.marked.value, dict) and "merge_method" in self.marked.value


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `settings` is the method's own Settings; paths in `pool` are absolute."""

    name: str
    text: str
    marked: Marked
    method: Method
    settings: Any
    pool: FoldersPool | DigitsPool
    output: Output
    seed: int = 0
    seeds: int = 1
    preprocess: tuple[Step, ...] = ()
    surgery: tuple[Method, Any] | None = None  # that follows the merge, and its settings

    @property
    def family(self) -> str:
        return self.method.family

    @property
    def short_name(self) -> str:
        """Last part of the name: the run's folder is called after it."""
        return self.name.rpartition("/")[2]

    @property
    def repair(self) -> tuple[Method, Any]:
        """The surgery and its settings: the key's, or the method itself."""
        return self.surgery or (self.method, self.settings)

    def to_yaml(self) -> str:
        """The resolved recipe: every setting written out, overrides and defaults included. Loads back to itself."""
        resolved = {
            "spolia": VERSION,
            "seed": self.seed,
            "seeds": self.seeds,
            "pool": self.pool.model_dump(mode="json"),
            **({"preprocess": [step.to_dict() for step in self.preprocess]} if self.preprocess else {}),
            "method": {"name": self.method.name, **self.settings.model_dump(mode="json")},
            **({"surgery": {"name": self.surgery[0].name, **_own(self.surgery[1])}} if self.surgery else {}),
            "output": self.output.model_dump(mode="json"),
        }
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=100)


def _own(surgery: Any) -> dict[str, Any]:
    return surgery.model_dump(mode="json", exclude=set(_FIRST))


def load_recipe(ref: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe | StudyRecipe:
    """The recipe at `ref`: the name of a packaged one, or a file. Raises SpoliaError with everything that is wrong.

    Relative paths start at the recipe's folder; those in `overrides` and in packaged recipes at the current one.
    """
    return check_recipe(read_source(ref), overrides, check_paths=check_paths)


def read_source(ref: str | Path) -> Source:
    """Finds and parses `ref`. Only the syntax is checked, so that mergekit's recipes pass too."""
    name = str(ref)
    path = at_home(ref)
    if isinstance(ref, str) and name in packaged():
        path = FOLDER / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        return Source(name, text, yamlmarks.load(text, f"{name}.yaml"), Path.cwd(), packaged=True)
    if os.path.exists(path) and path.is_dir():
        raise SpoliaError("this is a folder, not a recipe", where=name or ".", mend=recipes_in(path))
    try:
        text = yamlmarks.text_of(path, name)
    except FileNotFoundError:
        raise SpoliaError("there is no such recipe or file", where=name, mend=near_recipes(name)) from None
    except UnicodeDecodeError:
        raise SpoliaError("this is not a text file", where=name, mend="give a recipe: a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can be called this"
        raise SpoliaError(f"cannot be read: {reason}", where=name, mend="check the path and its rights") from None
    every = yamlmarks.load_all(text, name)
    documents = tuple(document for document in every if document.value is not None)
    several = len(documents) > 1 and all(isinstance(d.value, dict) and "merge_method" in d.value for d in documents)
    marked = documents[0] if several else yamlmarks.only(every, name)
    return Source(path.stem, text, marked, path.resolve().parent, documents=documents if several else ())


def check_recipe(source: Source, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe | StudyRecipe:
    """`source` with `overrides`, checked at every depth."""
    marked, problems = source.marked, Problems()
    if source.is_mergekit:
        mend = f"run it as one: spolia merge {marked.name} OUT"
        raise SpoliaError("this is a mergekit recipe (it has `merge_method`)", where=marked.where(), mend=mend)
    if not isinstance(marked.value, dict) or not marked.value:
        mend = "start from a copy: spolia new ties -o my.yaml"
        raise SpoliaError("a recipe is a mapping with `spolia`, `pool` and `method`", where=marked.where(), mend=mend)
    raw, touched = apply_overrides(marked.value, overrides, problems)
    where = partial(place_of, marked, touched)
    check_version(raw, where, problems)
    method, settings = _check_method(raw.get("method"), "method", where, problems)
    if method is not None and method.family in STUDIES:
        return check_study(source.name, marked, source.text, raw, method, settings, where, problems)
    head = validate(Head, raw, (), where, problems)
    pool = check_pool(raw.get("pool"), where, problems)
    steps = read_steps(raw.get("preprocess"), where, problems)
    surgery = _check_surgery(raw.get("surgery"), method, where, problems)
    if isinstance(pool, FoldersPool):
        pool = resolve_paths(pool, raw["pool"], Starts(source.folder, source.packaged, touched))
        missing = missing_models(pool, source.name, source.packaged, where) if check_paths else []
        for problem in missing:
            problems.add(problem.where, problem.what, problem.mend)
        looking = next((m for m in (method, surgery and surgery[0]) if m and m.data), None)
        if check_paths and not (source.packaged and missing):
            check_tasks(pool, raw["pool"].get("tasks"), looking, settings, where, problems)
    if pool and method:
        _check_fit(pool, method, settings, where, problems)
        count = len(pool.experts) if isinstance(pool, FoldersPool) else len(pool.domains)
        check_steps(steps, method, count, where, problems)
    if head and head.seeds > 1 and isinstance(pool, FoldersPool):
        mend = "write `seeds: 1`, or use `pool: {source: digits}`"
        problems.add(where(("seeds",)), "models on disk are merged once; repeats would be the same", mend)
    problems.raise_if_any()
    assert head and pool and method  # each None has left a problem
    given = (source.name, source.text, marked, method, settings, pool, head.output, head.seed, head.seeds)
    return Recipe(*given, preprocess=steps, surgery=surgery)


def _check_method(raw: Any, key: str, where: Where, problems: Problems) -> tuple[Method | None, Any]:
    if not isinstance(raw, dict):
        return None, None  # told by Head
    fields = dict(raw)
    name = fields.pop("name", None)
    if name is None:
        names = ", ".join(method.name for method in METHODS)
        problems.add(where((key,)), "`name` is missing", f"add `name`, one of {names}")
        return None, None
    try:
        method = find(str(name), where((key, "name")))
    except SpoliaError as error:
        for problem in error.problems:
            problems.add(problem.where, problem.what, problem.mend)
        return None, None
    return method, validate(method.settings_class(), fields, (key,), where, problems)


def _check_surgery(raw: Any, method: Method | None, where: Where, problems: Problems) -> tuple[Method, Any] | None:
    """The repair that follows the merge."""
    if raw is None:
        return None
    repair, settings = _check_method(raw, "surgery", where, problems)
    if repair is not None and repair.family != "surgery":
        known = [m.name for m in METHODS if m.family == "surgery"]
        problems.add(where(("surgery", "name")), f"{repair.name} is no surgery", did_you_mean(repair.name, known))
    if method is not None and method.family != "merge":
        mend = "name the merge under `method`, or leave `surgery` away"
        problems.add(where(("surgery",)), f"{method.name} is no merge that a surgery could follow", mend)
    for name in _FIRST:
        if isinstance(raw, dict) and name in raw:
            problems.add(where(("surgery", name)), "the merge that comes first is `method`", f"leave `{name}` away")
    return (repair, settings) if repair is not None and settings is not None else None


def _check_fit(pool: FoldersPool | DigitsPool, method: Method, settings: Any, where: Where, problems: Problems) -> None:
    """What the method asks of the pool: a base, a number of experts, one value for each expert."""
    cls = method.settings_class()
    folders = isinstance(pool, FoldersPool)
    listed = where(("pool", "experts" if folders else "domains"))
    count = len(pool.experts) if folders else len(pool.domains)
    if folders and pool.base is None and cls.base == "required":
        mend = "add `base: PATH`, the model that the experts started from"
        problems.add(where(("pool",)), f"{method.name} needs a base", mend)
    fewest, most = cls.experts
    if count < fewest or (most is not None and count > most):
        span = f"{fewest}" if fewest == most else f"{fewest} to {most}" if most else f"at least {fewest}"
        problems.add(
            listed, f"{count} experts; {method.name} takes {span}", "list other experts, or choose another method"
        )
    for name, field in cls.model_fields.items() if settings is not None else ():
        value = getattr(settings, name)
        if field.annotation == PerModel and isinstance(value, tuple) and len(value) != count:
            mend = f"give {count} numbers in the order of the experts, or one for all"
            problems.add(where(("method", name)), f"{len(value)} values for {count} experts", mend)

"""A recipe: what you ask for. Read from a file or the package, overridden by `key=value`, checked whole.

Every mistake is found at once and told with its line, before any model is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from spolia.catalog import METHODS, Method, find
from spolia.core.settings import PerModel
from spolia.errors import Problem, Problems, SpoliaError, did_you_mean
from spolia.parts.preprocessed import Step
from spolia.runs import yamlmarks
from spolia.runs.complaints import validate
from spolia.runs.overrides import apply_overrides
from spolia.runs.packaged import FOLDER, example_command, packaged
from spolia.runs.preprocessing import check_steps, read_steps
from spolia.runs.references import is_hub_id, near_model, near_recipes, recipes_in
from spolia.runs.schema import POOLS, VERSION, DigitsPool, FoldersPool, Head, ModelEntry, Output, at_home, check_version
from spolia.runs.yamlmarks import Marked, dotted

Where = Callable[[yamlmarks.Path], str]
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


def load_recipe(ref: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
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


def check_recipe(source: Source, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
    """`source` with `overrides`, checked at every depth."""
    marked, problems = source.marked, Problems()
    if source.is_mergekit:
        mend = f"run it as one: spolia merge {marked.name} OUT"
        raise SpoliaError("this is a mergekit recipe (it has `merge_method`)", where=marked.where(), mend=mend)
    if not isinstance(marked.value, dict) or not marked.value:
        mend = "start from a copy: spolia new ties -o my.yaml"
        raise SpoliaError("a recipe is a mapping with `spolia`, `pool` and `method`", where=marked.where(), mend=mend)
    raw, touched = apply_overrides(marked.value, overrides, problems)
    where = partial(_where, marked, touched)
    check_version(raw, where, problems)
    head = validate(Head, raw, (), where, problems)
    pool = _check_pool(raw.get("pool"), where, problems)
    method, settings = _check_method(raw.get("method"), "method", where, problems)
    steps = read_steps(raw.get("preprocess"), where, problems)
    surgery = _check_surgery(raw.get("surgery"), pool, method, where, problems)
    if isinstance(pool, FoldersPool):
        pool = _resolve_paths(pool, raw["pool"], source, touched)
        if check_paths:
            for problem in _missing_models(pool, source, where):
                problems.add(problem.where, problem.what, problem.mend)
    if pool and method:
        _check_fit(pool, method, settings, where, problems)
        count = len(pool.experts) if isinstance(pool, FoldersPool) else len(pool.domains)
        check_steps(steps, method, count, where, problems)
    if check_paths and method and method.data and isinstance(pool, FoldersPool):
        what = f"{method.name} looks at {method.data}, which a pool of folders does not name"
        problems.add(where(("method", "name")), what, f"call it from Python: {example_command(method)}")
    if head and head.seeds > 1 and isinstance(pool, FoldersPool):
        mend = "write `seeds: 1`, or use `pool: {source: digits}`"
        problems.add(where(("seeds",)), "models on disk are merged once; repeats would be the same", mend)
    problems.raise_if_any()
    assert head and pool and method  # each None has left a problem
    given = (source.name, source.text, marked, method, settings, pool, head.output, head.seed, head.seeds)
    return Recipe(*given, preprocess=steps, surgery=surgery)


def _where(marked: Marked, touched: dict[yamlmarks.Path, str], path: yamlmarks.Path) -> str:
    """File and line of `path`, or the override that wrote it."""
    if any(path[:depth] in touched for depth in range(1, len(path) + 1)):
        return f"override {dotted(path)}"
    inside = next((name for there, name in touched.items() if there[: len(path)] == path), None)
    return inside if inside and path and path not in marked.lines else marked.where(path)


def _check_pool(raw: Any, where: Where, problems: Problems) -> FoldersPool | DigitsPool | None:
    if not isinstance(raw, dict):
        return None  # told by Head
    source = raw.get("source", "folders")
    if not isinstance(source, str) or source not in POOLS:
        problems.add(where(("pool", "source")), f"`{source}` is not a source", did_you_mean(str(source), POOLS))
        return None
    pool = validate(POOLS[source], raw, ("pool",), where, problems)
    if isinstance(pool, FoldersPool):
        names = [entry.name for entry in [pool.base, *pool.experts] if entry]
        for name in sorted({name for name in names if names.count(name) > 1}):
            mend = "give one of them another: {name: …, path: …}"
            problems.add(where(("pool",)), f"two models are called `{name}`", mend)
            return None
    elif pool and len(set(pool.domains)) < len(pool.domains):
        problems.add(where(("pool", "domains")), "a domain is listed twice", "keep one of the two")
    return pool


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


def _check_surgery(
    raw: Any, pool: FoldersPool | DigitsPool | None, method: Method | None, where: Where, problems: Problems
) -> tuple[Method, Any] | None:
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
    if isinstance(pool, FoldersPool):
        what = "surgery looks at unlabelled inputs, which a pool of folders does not name"
        problems.add(where(("surgery",)), what, "call spolia.surgery from Python after the merge")
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


def _resolve_paths(
    pool: FoldersPool, raw: dict[str, Any], source: Source, touched: dict[yamlmarks.Path, str]
) -> FoldersPool:
    """Paths made absolute and `BASE+ADAPTER` parted. A hub's id stays as it is; it is fetched when the model is read."""

    def resolved(entry: ModelEntry, said: Any, at: yamlmarks.Path) -> ModelEntry:
        typed = any(path[: len(at)] == at or at[: len(path)] == path for path in touched)
        folder = Path.cwd() if typed else source.folder

        def absolute(text: str) -> Path:
            if is_hub_id(text, [folder]) and (typed or not source.packaged):
                return Path(text)
            return Path(os.path.abspath(folder / at_home(text)))

        path = str(said.get("path") if isinstance(said, dict) else said)  # a Path has lost the `./` that means here
        lora = str(said["lora"]) if isinstance(said, dict) and said.get("lora") else None
        if lora is None and path.count("+") == 1 and all(path.split("+")) and not os.path.exists(absolute(path)):
            path, _, lora = path.partition("+")
        return entry.model_copy(update={"path": absolute(path), "lora": absolute(lora) if lora else None})

    base = resolved(pool.base, raw["base"], ("pool", "base")) if pool.base else None
    experts = [resolved(e, raw["experts"][i], ("pool", "experts", i)) for i, e in enumerate(pool.experts)]
    return pool.model_copy(update={"base": base, "experts": experts})


def _missing_models(pool: FoldersPool, source: Source, where: Where) -> list[Problem]:
    places: list[tuple[yamlmarks.Path, ModelEntry]] = [(("pool", "experts", i), e) for i, e in enumerate(pool.experts)]
    if pool.base:
        places.insert(0, (("pool", "base"), pool.base))
    wanted = [(at, path) for at, entry in places for path in (entry.path, entry.lora) if path is not None]
    missing = [(at, path) for at, path in wanted if path.is_absolute() and not os.path.exists(path)]
    if source.packaged and missing:
        names = ", ".join(str(path) for _, path in missing)
        mend = f"say where your models are: spolia run {source.name} pool.base=PATH 'pool.experts=[PATH, PATH]'"
        return [Problem(where(("pool",)), f"there is no {names}", mend)]
    return [Problem(where(at), f"there is no {path}", near_model(path)) for at, path in missing]

"""The pool of a recipe: its shape, its paths made absolute, and what of them is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.errors import Problem, Problems, did_you_mean
from spolia.runs import yamlmarks
from spolia.runs.complaints import validate
from spolia.runs.references import is_hub_id, near_model
from spolia.runs.schema import POOLS, DigitsPool, FoldersPool, ModelEntry, TaskData, at_home
from spolia.runs.yamlmarks import dotted

Where = Callable[[yamlmarks.Path], str]


@dataclass(frozen=True)
class Starts:
    """What relative paths start at: the recipe's folder, or the current one for those that an override wrote."""

    folder: Path
    packaged: bool
    touched: Mapping[yamlmarks.Path, str]

    def typed(self, at: yamlmarks.Path) -> bool:
        return any(path[: len(at)] == at or at[: len(path)] == path for path in self.touched)

    def absolute(self, text: str, at: yamlmarks.Path) -> Path:
        """A model's path. A hub's id stays as it is; it is fetched when the model is read."""
        folder = Path.cwd() if self.typed(at) else self.folder
        if is_hub_id(text, [folder]) and (self.typed(at) or not self.packaged):
            return Path(text)
        return Path(os.path.abspath(folder / at_home(text)))

    def file(self, path: Path, at: yamlmarks.Path) -> Path:
        return Path(os.path.abspath((Path.cwd() if self.typed(at) else self.folder) / at_home(path)))


def check_pool(raw: Any, where: Where, problems: Problems) -> FoldersPool | DigitsPool | None:
    """The pool that a recipe names; what is wrong goes to `problems`."""
    if not isinstance(raw, dict):
        return None  # told by Head
    source = raw.get("source", "folders")
    if not isinstance(source, str) or source not in POOLS:
        problems.add(where(("pool", "source")), f"`{source}` is not a source", did_you_mean(str(source), POOLS))
        return None
    listed = raw.get("tasks") if source == "folders" and isinstance(raw.get("tasks"), dict) else {}
    plain = {key: value for key, value in raw.items() if key != "tasks"} if listed else raw
    pool = validate(POOLS[source], plain, ("pool",), where, problems)
    if isinstance(pool, FoldersPool):
        names = [entry.name for entry in [pool.base, *pool.experts] if entry]
        for name in sorted({name for name in names if names.count(name) > 1}):
            mend = "give one of them another: {name: …, path: …}"
            problems.add(where(("pool",)), f"two models are called `{name}`", mend)
            return None
        tasks = {n: validate(TaskData, one, ("pool", "tasks", n), where, problems) for n, one in listed.items()}
        pool = pool.model_copy(update={"tasks": {name: task for name, task in tasks.items() if task is not None}})
    elif pool and len(set(pool.domains)) < len(pool.domains):
        problems.add(where(("pool", "domains")), "a domain is listed twice", "keep one of the two")
    return pool


def resolve_paths(pool: FoldersPool, raw: dict[str, Any], starts: Starts) -> FoldersPool:
    """Paths made absolute and `BASE+ADAPTER` parted."""

    def resolved(entry: ModelEntry, said: Any, at: yamlmarks.Path) -> ModelEntry:
        path = str(said.get("path") if isinstance(said, dict) else said)  # a Path has lost the `./` that means here
        lora = str(said["lora"]) if isinstance(said, dict) and said.get("lora") else None
        pair = lora is None and path.count("+") == 1 and all(path.split("+"))
        if pair and not os.path.exists(starts.absolute(path, at)):
            path, _, lora = path.partition("+")
        found = {"path": starts.absolute(path, at), "lora": starts.absolute(lora, at) if lora else None}
        return entry.model_copy(update=found)

    def of_task(task: TaskData, at: yamlmarks.Path) -> TaskData:
        found: dict[str, Any] = {"head": starts.file(task.head, (*at, "head"))} if task.head else {}
        for name in ("unlabelled", "test"):
            part = getattr(task, name)
            if part is not None and part.path is not None:
                found[name] = part.model_copy(update={"path": starts.file(part.path, (*at, name))})
        return task.model_copy(update=found)

    base = resolved(pool.base, raw["base"], ("pool", "base")) if pool.base else None
    experts = [resolved(e, raw["experts"][i], ("pool", "experts", i)) for i, e in enumerate(pool.experts)]
    tasks = {name: of_task(task, ("pool", "tasks", name)) for name, task in pool.tasks.items()}
    return pool.model_copy(update={"base": base, "experts": experts, "tasks": tasks})


def missing_models(pool: FoldersPool, name: str, packaged: bool, where: Where) -> list[Problem]:
    """Models that are not where the recipe `name` says."""
    places: list[tuple[yamlmarks.Path, ModelEntry]] = [(("pool", "experts", i), e) for i, e in enumerate(pool.experts)]
    if pool.base:
        places.insert(0, (("pool", "base"), pool.base))
    wanted = [(at, path) for at, entry in places for path in (entry.path, entry.lora) if path is not None]
    missing = [(at, path) for at, path in wanted if path.is_absolute() and not os.path.exists(path)]
    if packaged and missing:
        names = ", ".join(str(path) for _, path in missing)
        mend = f"say where your models are: spolia run {name} pool.base=PATH 'pool.experts=[PATH, PATH]'"
        if pool.tasks:
            mend = f"start from a copy: spolia new {name.rpartition('/')[2]} -o my.yaml"
        return [Problem(where(("pool",)), f"there is no {names}", mend)]
    return [Problem(where(at), f"there is no {path}", near_model(path)) for at, path in missing]


def place_of(marked: yamlmarks.Marked, touched: Mapping[yamlmarks.Path, str], path: yamlmarks.Path) -> str:
    """File and line of `path`, or the override that wrote it."""
    if any(path[:depth] in touched for depth in range(1, len(path) + 1)):
        return f"override {dotted(path)}"
    inside = next((name for there, name in touched.items() if there[: len(path)] == path), None)
    return inside if inside and path and path not in marked.lines else marked.where(path)

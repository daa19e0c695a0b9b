"""A pool of CLIP experts in a file: base, an expert and a data set a task, rows to compare; and what is made of it.

Files of this form come with the package (recipes/pools/clip/NAME.yaml). Models are named by path or hub id, data sets as
`datasets` knows them. Every row of a table made from it names the family of its checkpoints: families do not compare.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spolia.catalog import find
from spolia.core.lazy import np
from spolia.core.seeds import generator
from spolia.data.pictures import Look, check_pillow
from spolia.data.prompts import Prompts, class_names, prompts_of, read_prompts
from spolia.data.rows import RowPictures, labels
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.examples import Examples
from spolia.runs import yamlmarks
from spolia.runs.asked import check_settings
from spolia.runs.complaints import validate
from spolia.runs.importing import import_model, preprocessor
from spolia.runs.packaged import FOLDER
from spolia.runs.references import fetched, is_hub_id
from spolia.runs.schema import Shape, check_version

if TYPE_CHECKING:
    from torch import nn

    from spolia.zoo.heads import Cosine

POOLS = FOLDER / "pools" / "clip"
Protocol = Literal["disjoint", "papers"]
Load = Callable[[str, str | None, str], Any]  # name, configuration and split to rows


class Data(Shape):
    """A data set as `datasets` loads it."""

    name: str = Field(description="its hub id, or a folder")
    config: str | None = Field(None, description="its configuration")
    test: str = Field("test", description="split that is judged on")
    unlabelled: str = Field("train", description="split that is adapted on, without its labels")
    image: str = Field("image", description="column of the pictures")
    label: str = Field("label", description="column of the labels")


class Task(Shape):
    """An expert and its task."""

    expert: str = Field(description="folder, file or hub id")
    data: Data = Field(description="the data set")
    head: str | None = Field(None, description="published zero-shot head, in the place of class names and templates")


class Row(Shape):
    """One line of the table: a merge, what is done to the task vectors before, and the surgery after it."""

    label: str = Field(description="what the table calls it", min_length=1)
    method: str = Field(description="a merge")
    settings: dict[str, Any] = Field(default_factory=dict, description="its settings")
    preprocess: list[Any] = Field(default_factory=list, description="what is done to the task vectors first")
    surgery: str | None = Field(None, description="a surgery on top")
    surgery_settings: dict[str, Any] = Field(default_factory=dict, description="its settings")


class ClipPool(Shape):
    """A pool file."""

    spolia: int = Field(description="version of the form")
    name: str = Field(description="what results are called", min_length=1)
    family: str = Field(description="whose checkpoints these are; families do not compare", min_length=1)
    checked: str | None = Field(None, description="when somebody loaded every id in it; null: nobody has yet")
    base: str = Field(description="folder, file or hub id of the CLIP that the experts started from")
    clip: str | None = Field(
        None, description="the whole CLIPModel that makes the heads or lends its projection; null: the base"
    )
    projection: Literal["merged", "frozen"] = Field(
        "merged", description="whether experts have a visual projection of their own, or share the base's"
    )
    prompts: str | None = Field(None, description="file of class names and templates")
    tasks: dict[str, Task] = Field(description="the tasks in the order of the table", min_length=1)
    rows: list[Row] = Field(default_factory=list, description="what is compared")


@dataclass(frozen=True)
class TaskInputs:
    """Pictures of one task: labelled ones to judge on, others to adapt on; class names where the data set has them."""

    test: Examples
    unlabelled: Examples
    names: list[str] | None


def pool_names() -> list[str]:
    """Pools that come with the package."""
    return sorted(file.stem for file in POOLS.glob("*.yaml"))


def read_pool(ref: str | os.PathLike[str]) -> ClipPool:
    """The pool `ref`: the name of one that comes with the package, or a file; its paths made absolute. Fetches nothing.

    Relative paths start at the file's folder, those of a pool of the package at the current one.
    """
    text = os.fspath(ref)
    file = POOLS / f"{text}.yaml" if text in pool_names() else Path(text)
    if not file.is_file():
        raise SpoliaError("is no file and no pool of the package", where=text, mend=did_you_mean(text, pool_names()))
    marked, problems = yamlmarks.load(yamlmarks.text_of(file, file.name), file.name), Problems()
    if not isinstance(marked.value, dict):
        raise SpoliaError("is no mapping", where=text, mend=f"start from {POOLS / (pool_names()[0] + '.yaml')}")
    check_version(marked.value, marked.where, problems)
    given = marked.value.get("tasks")
    listed = dict(given) if isinstance(given, dict) else {}
    plain = {key: value for key, value in marked.value.items() if key not in ("tasks", "rows")}
    tasks = {name: validate(Task, one, ("tasks", name), marked.where, problems) for name, one in listed.items()}
    rows = _rows(marked, len(tasks), problems)
    whole = {"tasks": {name: task for name, task in tasks.items() if task is not None}, "rows": rows}
    pool = validate(ClipPool, plain | whole, (), marked.where, problems)
    problems.raise_if_any()
    assert pool is not None
    return _absolute(pool, Path.cwd() if text in pool_names() else file.resolve().parent)


def _rows(marked: yamlmarks.Marked, experts: int, problems: Problems) -> list[Row]:
    """The rows, their methods and settings checked."""
    given = marked.value.get("rows", [])
    if not isinstance(given, list):
        problems.add(marked.where(("rows",)), "is no list", "write `rows: [{label: …, method: …}]`")
        return []
    found = [validate(Row, one, ("rows", i), marked.where, problems) for i, one in enumerate(given)]
    rows = [(i, row) for i, row in enumerate(found) if row is not None]
    labels_seen = [row.label for _, row in rows]
    for i, row in rows:
        if labels_seen.count(row.label) > 1:
            problems.add(marked.where(("rows", i, "label")), f"`{row.label}` stands twice", "call each row its own")
        for family, name, settings in (
            ("merge", row.method, row.settings),
            ("surgery", row.surgery, row.surgery_settings),
        ):
            if name is None:
                continue
            try:
                method = find(name, family)
                if method.family != family:
                    raise SpoliaError(f"{name} is no {family}")
                check_settings(method, settings, experts)
            except SpoliaError as error:
                for problem in error.problems:
                    problems.add(marked.where(("rows", i)), f"{problem.where}: {problem.what}", problem.mend)
    return [row for _, row in rows]


def _absolute(pool: ClipPool, folder: Path) -> ClipPool:
    def placed(text: str | None) -> str | None:
        if text is None or is_hub_id(text, [folder]):
            return text
        return os.path.abspath(folder / Path(text).expanduser())

    tasks = {
        name: task.model_copy(update={"expert": placed(task.expert), "head": placed(task.head)})
        for name, task in pool.tasks.items()
    }
    own = {name: placed(getattr(pool, name)) for name in ("base", "clip", "prompts")}
    return pool.model_copy(update={"tasks": tasks, **own})


# --- what is made of it ----------------------------------------------------------------------------------------------


def import_models(pool: ClipPool, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Base and experts as folders of one form below `folder`, fetched and imported as far as they are not there yet."""
    wanted = {"base": pool.base, **{f"experts/{name}": task.expert for name, task in pool.tasks.items()}}
    made = {}
    for name, given in wanted.items():
        target = folder / name
        if not (target / "config.json").is_file():
            import_model(given, target, projection=pool.projection == "merged")
        kept = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if pool.projection == "merged" and "projection_dim" not in kept:
            what = "has no visual projection of its own"
            raise SpoliaError(what, where=given, mend="write `projection: frozen`: all share the base's")
        made[name] = target
    return made.pop("base"), {name: made[f"experts/{name}"] for name in pool.tasks}


def inputs_of(
    pool: ClipPool, load: Load, *, size: int, protocol: Protocol, adapt: int | None, limit: int | None, seed: int
) -> dict[str, TaskInputs]:
    """The pictures of every task, decoded when they are looked at.

    `disjoint` adapts on `adapt` pictures of the other split, drawn at random (all where it is None); `papers` on the test
    pictures themselves, as the papers do. `limit` judges on so many test pictures, drawn at random.
    """
    check_pillow("data")
    look, found = Look.of(preprocessor(size), (size, size), 3), {}
    for name, task in pool.tasks.items():
        data = task.data
        test = load(data.name, data.config, data.test)
        other = test if protocol == "papers" else load(data.name, data.config, data.unlabelled)
        judged = _drawn(len(test), limit, seed, name, "test")
        adapted = judged if protocol == "papers" else _drawn(len(other), adapt, seed, name, "unlabelled")
        pictures = RowPictures(test, judged, data.image, look)
        unseen = RowPictures(other, adapted, data.image, look)
        found[name] = TaskInputs(
            Examples(pictures, labels(test, judged, data.label), name=name),
            Examples(unseen, name=name),
            class_names(getattr(test, "features", {data.label: None}), data.label),
        )
    return found


def _drawn(total: int, count: int | None, seed: int, task: str, part: str) -> list[int]:
    if count is None or count >= total:
        return list(range(total))
    return np.sort(generator(seed, "clip pool", task, part).permutation(total)[:count]).tolist()


def heads_of(
    pool: ClipPool, inputs: Mapping[str, TaskInputs], clip: nn.Module | None, tokenizer: Any
) -> tuple[dict[str, Cosine], dict[str, str]]:
    """The frozen head of every task and, in words, what it was made from. `clip` is the CLIPModel that makes them."""
    from spolia.zoo.clip import published_head, text_head
    from spolia.zoo.importers import read_head

    given: dict[str, Prompts] = read_prompts(pool.prompts) if pool.prompts else {}
    heads: dict[str, Cosine] = {}
    told: dict[str, str] = {}
    for name, task in pool.tasks.items():
        if task.head is not None:
            heads[name], told[name] = published_head(read_head(Path(task.head)), name), "published head"
        else:
            assert clip is not None  # only published heads need no CLIPModel
            prompts = prompts_of(name, inputs[name].names, given)
            heads[name] = text_head(clip, tokenizer, prompts.classes, prompts.templates, name)
            told[name] = f"{len(prompts.classes)} classes ({prompts.source}) x {len(prompts.templates)} templates"
        truth = inputs[name].test.labels
        most = int(truth.max()) if truth is not None else 0
        rows = heads[name].weight.shape[0]
        if most >= rows:
            what = f"label {most} in the data set, and a head of {rows} classes"
            raise SpoliaError(what, where=name, mend="give class names in the order of their labels")
    return heads, told


def clip_folder(pool: ClipPool) -> str:
    """The whole CLIPModel that makes the heads, fetched if need be."""
    return fetched(pool.clip or pool.base)

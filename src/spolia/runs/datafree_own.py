"""A recipe on the user's own models: the pool from its description, and real classes from folders where there are some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spolia.bench.datafree import apart
from spolia.runs.classifiers import classifiers
from spolia.runs.datafree_problems import Held, OwnModels

if TYPE_CHECKING:
    from spolia.parts.classes import ClassSet
    from spolia.parts.white import WhitePool


def own_pool(problem: OwnModels) -> tuple[Held, WhitePool, dict[str, str]]:
    """Real classes, the pool, and nobody known to lie. SpoliaError where a test class is one of the models'."""
    assert problem.models is not None
    pool = classifiers(problem.models)
    validation, test = (_folder(path, pool) for path in (problem.validation_folder, problem.test))
    known = [name for expert in pool for name in expert.classes or ()]
    for held in (*validation.values(), *test.values()):
        apart(known, held.names)
    return Held({}, validation, test), pool, {}


def _folder(path: Path | None, pool: WhitePool) -> dict[str, ClassSet]:
    """The classes of a folder at the pool's size; none where there is no folder."""
    if path is None:
        return {}
    from spolia.data.fewshot import folder_classes

    return {path.name: folder_classes(path, size=pool.shape[1], channels=pool.shape[0])}

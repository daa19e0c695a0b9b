"""The one table of methods. Adding a method adds a row here; nothing is registered anywhere else. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from spolia.errors import SpoliaError, did_you_mean


@dataclass(frozen=True)
class Method:
    """One method: what it is for, what it must be given, and where its code stands."""

    name: str
    family: str
    summary: str
    paper: str
    needs: str  # what the user must hold: weights, white box, API; unlabelled inputs, labels, nothing
    cost: str
    entry: str  # "module:function"
    settings: str  # class in the same module
    aliases: tuple[str, ...] = ()  # names other tools use for it

    @property
    def module(self) -> str:
        return self.entry.partition(":")[0]

    def function(self) -> Any:
        return getattr(import_module(self.module), self.entry.partition(":")[2])

    def settings_class(self) -> Any:
        return getattr(import_module(self.module), self.settings)

    def survey(self) -> Any:
        """The function that gathers model-wide statistics before merging, where the module has one."""
        return getattr(import_module(self.module), "survey", None)


_MERGE = "spolia.methods.merge."
_SPARSE = _MERGE + "sparsify:sparsified"

METHODS: tuple[Method, ...] = (
    Method(
        "average", "merge", "weighted mean of the experts' weights", "Wortsman et al. 2022, arXiv 2203.05482",
        "weights", "1 read", _MERGE + "average:average", "Average", aliases=("linear",),
    ),
    Method(
        "task_arithmetic", "merge", "base plus scaled task vectors; negative weights unlearn",
        "Ilharco et al. 2023, arXiv 2212.04089", "weights + base", "1 read",
        _MERGE + "task_arithmetic:task_arithmetic", "TaskArithmetic",
    ),
    Method(
        "slerp", "merge", "spherical interpolation between two models", "Shoemake 1985, doi:10.1145/325165.325242",
        "weights", "2 reads", _MERGE + "slerp:slerp", "Slerp",
    ),
    Method(
        "ties", "merge", "trim small changes, elect a sign, merge what agrees", "Yadav et al. 2023, arXiv 2306.01708",
        "weights + base", "3 to 4 reads", _SPARSE, "Ties",
    ),
    Method(
        "dare", "merge", "drop changes at random, rescale the rest, add", "Yu et al. 2024, arXiv 2311.03099",
        "weights + base", "1 to 2 reads", _SPARSE, "Dare", aliases=("dare_linear",),
    ),
    Method(
        "dare_ties", "merge", "drop at random, then elect signs as TIES does", "Yu et al. 2024, arXiv 2311.03099",
        "weights + base", "1 to 2 reads", _SPARSE, "DareTies",
    ),
    Method(
        "della", "merge", "drop at random, small changes more often, then elect signs",
        "Deep et al. 2024, arXiv 2406.11617", "weights + base", "1 to 2 reads, sorts rows", _SPARSE, "Della",
    ),
    Method(
        "della_linear", "merge", "drop at random, small changes more often, then add",
        "Deep et al. 2024, arXiv 2406.11617", "weights + base", "1 to 2 reads, sorts rows", _SPARSE, "DellaLinear",
    ),
    Method(
        "breadcrumbs", "merge", "drop the largest and the smallest changes, add the middle",
        "Davari & Belilovsky 2024, arXiv 2312.06795", "weights + base", "3 reads", _SPARSE, "Breadcrumbs",
    ),
    Method(
        "breadcrumbs_ties", "merge", "breadcrumbs' middle, then elect signs as TIES does",
        "Davari & Belilovsky 2024, arXiv 2312.06795", "weights + base", "3 reads", _SPARSE, "BreadcrumbsTies",
    ),
)  # fmt: skip

_BY_NAME = {name: method for method in METHODS for name in (method.name, *method.aliases)}


def find(name: str, where: str = "") -> Method:
    """The method called `name` (or by one of its aliases); an unknown name is answered with the nearest."""
    if name not in _BY_NAME:
        raise SpoliaError(f"no method is called `{name}`", where=where, mend=did_you_mean(name, _BY_NAME))
    return _BY_NAME[name]


def search(text: str = "") -> list[Method]:
    """Methods whose name, alias, family, summary or paper contains every word of `text`, else the nearest names."""
    words = text.lower().replace("-", "_").split()
    hits = [
        m
        for m in METHODS
        if all(
            any(word in part.lower().replace("-", "_") for part in (m.name, m.family, m.summary, m.paper, *m.aliases))
            for word in words
        )
    ]
    if hits or not words:
        return hits
    import difflib

    near = difflib.get_close_matches("_".join(words), _BY_NAME, 5, 0.5)
    return list(dict.fromkeys(_BY_NAME[name] for name in near))

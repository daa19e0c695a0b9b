"""Pools and lines of the data-free tables: see datafree.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spolia.catalog import find
from spolia.runs.datafree_entries import limited
from spolia.runs.datafree_problems import PackedModels

BUDGET = [1.0]  # factor of all outer steps, from the command line
STEPS = 300  # outer steps of a line, at budget 1
FREE_LINES, ORACLE = "what costs nothing", "real data"


@dataclass(frozen=True)
class Line:
    """One training: a method with some of its words changed. `against`: the line that its difference is taken from."""

    method: str
    settings: dict[str, Any]
    against: str = ""


LINES = {
    "free": Line("free", {}, "inversion"),
    "inversion": Line("free", {"recovery": "fresh", "recovery_steps": 200, "warm_up": 0}),
    "free, fresh generator": Line("free", {"recovery": "fresh", "warm_up": 0}),
    "groupings": Line("groupings", {"selection": "grouped"}, "no groups"),
    "no groups": Line("groupings", {"selection": "uniform", "align": "mean"}),
    "random groups": Line("groupings", {"grouping": "random"}, "no groups"),
    "spectral groups": Line("groupings", {"grouping": "spectral"}, "no groups"),
    "robust": Line("robust", {"suspects": "keep"}, "unprotected"),
    "robust, audited": Line("robust", {"suspects": "drop"}, "unprotected"),
    "unprotected": Line("robust", {"selection": "uniform", "interpolate": 0.0, "suspects": "keep"}),
    "in turn": Line("robust", {"selection": "in_turn", "suspects": "keep"}, "in turn, forgetting"),
    "in turn, forgetting": Line("robust", {"selection": "in_turn", "remember": False, "suspects": "keep"}),
}
_PLAIN = ["free", "inversion", "free, fresh generator", "unprotected", "robust", "in turn", "in turn, forgetting"]
_CORRUPT = ["robust", "robust, audited", "unprotected"]
_GROUPS = ["groupings", "no groups", "random groups", "spectral groups", "free"]


@dataclass(frozen=True)
class Row:
    """One pool, and the lines that are made of it."""

    name: str
    problem: PackedModels
    lines: tuple[str, ...]


def pool_of(data: list[str], experts: int = 20, archs: tuple[str, ...] = ("conv4",), **more: Any) -> PackedModels:
    grey = data == ["omniglot"]
    size = {"size": 28, "channels": 1} if grey else {"size": 32, "channels": 3}
    width = {"width": 32 if archs == ("conv4",) else 16}
    return PackedModels(source="packed", data=data, experts=experts, archs=list(archs), **size, **width, **more)


def _rows() -> dict[str, Row]:
    mixed = ["tiny_imagenet100", "gtsrb", "eurosat", "omniglot"]
    made = {
        "tiny": Row("Tiny-ImageNet-100, Conv4", pool_of(["tiny_imagenet100"]), tuple(_PLAIN)),
        "omniglot": Row("Omniglot, Conv4", pool_of(["omniglot"]), tuple(_PLAIN)),
        "tiny_resnet": Row(
            "Tiny-ImageNet-100, ResNet-10", pool_of(["tiny_imagenet100"], archs=("resnet10",)), ("free", "inversion")
        ),
        "omniglot_resnet": Row(
            "Omniglot, ResNet-10", pool_of(["omniglot"], archs=("resnet10",)), ("free", "inversion")
        ),
        "mixed": Row("mixed", pool_of(mixed, 32, ("conv4", "resnet10")), tuple(_GROUPS)),
    }
    for name, data in (("tiny", "tiny_imagenet100"), ("omniglot", "omniglot")):
        title = made[name].name
        for share in (20, 40, 60):
            problem = pool_of([data], corrupted=share / 100)
            made[f"{name}_{share}"] = Row(f"{title}, {share} % lie", problem, tuple(_CORRUPT))
    return made


ROWS = _rows()


def problem_of(key: str, quick: bool) -> PackedModels:
    steps = max(4, round(STEPS * BUDGET[0]))
    changed: dict[str, Any] = {"most_steps": steps, "checks": 5, "episodes": 600}
    if quick:
        experts = 8 if key == "mixed" else 4
        changed |= {
            "most_steps": 4,
            "checks": 1,
            "episodes": 4,
            "looks": 2,
            "experts": experts,
            "epochs": 1,
            "width": 8,
        }
    return ROWS[key].problem.model_copy(update=changed)


def settings_of(name: str, problem: PackedModels, quick: bool) -> Any:
    line = LINES[name]
    settings = find(line.method).settings_class()(**line.settings)
    small = {"generator_width": 8, "per_class": 8, "replays": 1, "shots": 2, "queries": 3} if quick else {}
    if quick and settings.recovery_steps > 5:
        small["recovery_steps"] = 6
    return limited(settings.model_copy(update=small), problem)

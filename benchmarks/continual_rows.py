"""What continual_tables.py compares: streams, learners, and the settings of each learner on each stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spolia.catalog import find
from spolia.runs.continual_problems import PackedStream

MEMORIES = (200, 500)
WITHOUT = ("finetune", "joint", "ewc", "lwf")
WITH = ("er", "derpp", "icarl", "er + refresh", "derpp + refresh")
LEARNERS = (*WITHOUT, *WITH)
AGAINST = {"joint": "finetune", "ewc": "finetune", "lwf": "finetune", "er": "finetune", "derpp": "er", "icarl": "er"}
STRENGTH = 10.0  # of EWC with the true Fisher, here by sampled labels: best on permuted digits among 10, 100, 1000


@dataclass(frozen=True)
class Row:
    """One stream, with the settings of each learner; those that differ by memory are a mapping of its sizes."""

    name: str
    problem: PackedStream
    replay: int
    lr: float
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # learners that the stream is not for

    @property
    def judged(self) -> str:
        return self.problem.scenario


def packed(data: str, **more: Any) -> PackedStream:
    return PackedStream(source="packed", data=data, **more)


_GREY: dict[str, Any] = {"channels": 1, "network": "mlp", "epochs": 1, "batch": 10}
_MNIST: dict[str, dict[str, Any]] = {
    "lwf": {"lr": 0.03, "alpha": 1.0, "weight_decay": 0.0},
    "er": {"lr": {200: 0.01, 500: 0.1}},
    "derpp": {"lr": 0.03, "alpha": {200: 0.2, 500: 1.0}, "beta": {200: 1.0, 500: 0.5}},
    "icarl": {"lr": 0.1, "weight_decay": 0.0},
}
ROWS = {
    "mnist": Row("Split-MNIST", packed("mnist", **_GREY), 10, 0.03, _MNIST),
    "fashion": Row("Split-Fashion", packed("fashion_mnist", **_GREY), 10, 0.03, _MNIST),
    "rotated": Row(
        "Rotated-MNIST",
        packed("mnist", **{**_GREY, "batch": 128}, scenario="domain", domains="rotated", tasks=20),
        128,
        0.2,
        {
            "ewc": {"lr": 0.1},
            "derpp": {"lr": {200: 0.1, 500: 0.2}, "alpha": {200: 1.0, 500: 0.5}, "beta": {200: 0.5, 500: 1.0}},
        },
        without=("lwf", "icarl"),
    ),
    "cifar10": Row(
        "Split-CIFAR-10",
        packed("cifar10_full_jpeg75", network="resnet8", epochs=5, batch=32, augment="crops", most=10_000),
        32,
        0.1,
        {
            "ewc": {"lr": 0.03},
            "lwf": {"lr": 0.01, "alpha": 3.0},
            "er": {"weight": {200: 0.5, 500: 1.0}},
            "derpp": {"lr": 0.03, "alpha": 0.1, "beta": 0.5},
        },
    ),
    "tiny": Row(
        "Split-Tiny-ImageNet-100",
        packed("tiny_imagenet100", size=32, network="resnet8", tasks=10, epochs=10, batch=32, augment="crops"),
        32,
        0.03,
        {
            "lwf": {"lr": 0.01, "alpha": 1.0},
            "er": {"lr": {200: 0.1, 500: 0.03}},
            "derpp": {"lr": 0.03, "alpha": {200: 0.1, 500: 0.2}, "beta": {200: 1.0, 500: 0.5}},
        },
    ),
}


def settings_of(row: Row, learner: str, memory: int | None) -> tuple[str, Any]:
    """Method and settings of a learner; of `er + refresh` those of refresh around er's."""
    host, _, around = learner.partition(" + ")
    given = {"lr": row.lr} | row.settings.get(host, {})
    given = {name: _at(memory, value) if isinstance(value, dict) else value for name, value in given.items()}
    if memory is not None:
        given |= {"items": memory, "replay": row.replay}
    if host == "ewc":
        given |= {"strength": STRENGTH, "fisher": "sampled"}
    settings = find(host).settings_class()(**given)
    if not around:
        return host, settings
    more = {"host": host, "host_settings": settings.model_dump(mode="json"), "fisher": "sampled"}
    return around, find(around).settings_class()(**more)


def _at(memory: int | None, values: dict[int, Any]) -> Any:
    """The value of the nearest memory that the tables have."""
    return values[min(values, key=lambda size: abs(size - (memory or 0)))]


def label_of(learner: str, memory: int | None) -> str:
    return learner if memory is None else f"{learner}, {memory}"


def lines(row: Row, learners: list[str], memories: list[int]) -> list[tuple[str, int | None]]:
    """Learners and memories of a stream."""
    asked = [name for name in learners if name not in row.without]
    found: list[tuple[str, int | None]] = [(name, None) for name in asked if name in WITHOUT]
    return found + [(name, memory) for memory in memories for name in asked if name in WITH]


def against_of(labels: list[str]) -> dict[str, str]:
    """What each line's differences are taken from: refresh from its host, of the same memory."""
    found = {}
    for label in labels:
        learner, _, memory = label.partition(", ")
        base = learner.removesuffix(" + refresh") if learner.endswith(" + refresh") else AGAINST.get(learner, "")
        for other in (f"{base}, {memory}", base):
            if other in labels and other != label:
                found[label] = other
                break
    return found

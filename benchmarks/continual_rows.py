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
    cut: str = ""  # what published tables have more of
    tests: int | None = None  # inputs of each test; None: all
    halved: bool = False  # images once more than `problem.size` says
    memories: tuple[int, ...] = MEMORIES
    sweep: tuple[str, ...] = ()  # learners of this row alone, whichever are asked for
    also: tuple[str, ...] = ()  # and beside those that are asked for

    @property
    def judged(self) -> str:
        return self.problem.scenario


def packed(data: str, **more: Any) -> PackedStream:
    return PackedStream(source="packed", data=data, **more)


_GREY: dict[str, Any] = {"channels": 1, "network": "mlp", "epochs": 2, "batch": 10}
_SMALL: dict[str, Any] = {"size": 16, "network": "resnet8", "width": 8, "epochs": 2, "batch": 32, "augment": "crops"}
_MNIST: dict[str, dict[str, Any]] = {
    "lwf": {"alpha": 1.0, "weight_decay": 0.0},
    "derpp": {"alpha": {200: 0.2, 500: 1.0}, "beta": {200: 1.0, 500: 0.5}},
    "icarl": {"lr": 0.1, "weight_decay": 0.0},  # its loss is a mean over classes
}
_SIXTY = "Published tables have 60,000 training images and read them once."
_SLOWER = "derpp at 0.3 lr"  # the rate that published tables have for DER++ on CIFAR-10, 0.03
_AS_MUCH = "derpp with beta 1"  # its labels weigh as much as ER's
_STRENGTHS = ("at 0.7 lr", *(f"+ refresh {how}" for how in ("0.03", "0.1", "0.3", "0.1 full", "0.3 full", "released")))


def _trained_longer(name: str, cut: str, changed: dict[str, Any] | None = None, **more: Any) -> Row:
    """Split-CIFAR-10 at ten times the steps, 500 samples kept; `changed`: of the problem."""
    problem = packed("cifar10_full_jpeg75", **{**_SMALL, "most": 10_000, "epochs": 20} | (changed or {}))
    weights = {"derpp": {"alpha": 0.1, "beta": 0.5}}
    return Row(name, problem, 32, 0.1, weights, cut=cut, tests=1000, memories=(500,), **more)


ROWS = {
    "mnist": Row("Split-MNIST", packed("mnist", **_GREY), 10, 0.03, _MNIST, cut=_SIXTY),
    "fashion": Row("Split-Fashion", packed("fashion_mnist", **_GREY), 10, 0.03, _MNIST, cut=_SIXTY),
    "cifar10": Row(
        "Split-CIFAR-10",
        packed("cifar10_full_jpeg75", most=10_000, **_SMALL),
        32,
        0.1,
        {
            "lwf": {"alpha": 3.0},
            "er": {"weight": {200: 0.5, 500: 1.0}},
            "derpp": {"alpha": 0.1, "beta": 0.5},
        },
        cut="Published tables have ResNet-18, 32 pixels, 50,000 images and 50 readings.",
        tests=1000,
    ),
    "longer": _trained_longer(
        "Split-CIFAR-10, twenty readings",
        "Published tables have ResNet-18, 32 pixels, 50,000 images and 50 readings; a memory of 200 was left out."
        " At 0.3 lr: the rate that they have for DER++, 0.03.",
        without=("finetune", "ewc", "lwf", "icarl", "er + refresh", "derpp + refresh"),
        also=(_SLOWER, _AS_MUCH),
    ),
    "images": _trained_longer(
        "Split-CIFAR-10, all images",
        "Published tables have ResNet-18, 32 pixels and 50 readings. As many steps as twenty readings of 10,000 images.",
        {"most": None, "epochs": 4},
        sweep=("er", "derpp"),
    ),
    "pixels": _trained_longer(
        "Split-CIFAR-10, 32 pixels",
        "Published tables have ResNet-18, 50,000 images and 50 readings.",
        {"size": 32},
        sweep=("er", "derpp"),
    ),
    "strength": Row(
        "Split-MNIST, one reading",
        packed("mnist", **{**_GREY, "epochs": 1}),
        10,
        0.1,
        {"derpp": {"alpha": 0.2, "beta": 1.0}},
        cut="Behind refresh stands its gamma; full: the whole loss is unlearned, not the batch's; at 0.7 lr: the host alone.",
        memories=(200,),
        sweep=tuple(line for host in ("er", "derpp") for line in (host, *(f"{host} {how}" for how in _STRENGTHS))),
    ),
    "rotated": Row(
        "Rotated-MNIST",
        packed("mnist", **{**_GREY, "epochs": 1, "batch": 128}, scenario="domain", domains="rotated", tasks=10),
        128,
        0.2,
        {"derpp": {"alpha": {200: 1.0, 500: 0.5}, "beta": {200: 0.5, 500: 1.0}}},
        without=("lwf", "icarl"),
        cut="Published tables have 20 angles and 60,000 training images.",
        tests=1000,
    ),
    "tiny": Row(
        "Split-Tiny-ImageNet-100",
        packed("tiny_imagenet100", tasks=10, **{**_SMALL, "size": 32}),
        32,
        0.1,
        {"derpp": {"alpha": 0.2, "beta": 0.5}},
        without=("ewc", "lwf"),
        halved=True,
        cut="Published tables have 200 classes, 500 images of each at 64 pixels, ResNet-18 and 50 to 100 readings; EWC, LwF and"
        " a memory of 200 were left out.",
        memories=(500,),
    ),
}


def settings_of(row: Row, learner: str, memory: int | None) -> tuple[str, Any]:
    """Method and settings of a learner; of `er + refresh 0.1 full` those of refresh around er's, of `er at 0.7 lr` er's.

    `derpp with beta 1` is derpp with that setting.
    """
    host, _, around = learner.partition(" + ")
    host, _, factor = host.partition(" at ")
    host, _, changed = host.partition(" with ")
    given = {"lr": row.lr} | row.settings.get(host, {})
    given = {name: _at(memory, value) if isinstance(value, dict) else value for name, value in given.items()}
    given["lr"] *= float(factor.removesuffix(" lr") or 1)
    if changed:
        name, value = changed.split()
        given[name] = float(value)
    if memory is not None:
        given |= {"items": memory, "replay": row.replay}
    if host == "ewc":
        given |= {"strength": STRENGTH, "fisher": "sampled"}
    settings = find(host).settings_class()(**given)
    if not around:
        return host, settings
    name, *words = around.split()
    more = {"host": host, "host_settings": settings.model_dump(mode="json"), "fisher": "sampled"} | _said(words)
    return name, find(name).settings_class()(**more)


def _said(words: list[str]) -> dict[str, Any]:
    """Settings of refresh that stand in a line's name: its strength, the loss, the form."""
    if "released" in words:
        return {"form": "released"}
    full = {"loss": "full"} if "full" in words else {}
    return full | ({"gamma": float(words[0])} if words else {})


def _at(memory: int | None, values: dict[int, Any]) -> Any:
    """The value of the nearest memory that the tables have."""
    return values[min(values, key=lambda size: abs(size - (memory or 0)))]


def label_of(learner: str, memory: int | None) -> str:
    return learner if memory is None else f"{learner}, {memory}"


def lines(row: Row, learners: list[str], memories: list[int]) -> list[tuple[str, int | None]]:
    """Learners and memories of a stream."""
    if row.sweep:
        return [(name, memory) for memory in row.memories for name in row.sweep]
    asked = [name for name in learners if name not in row.without]
    found: list[tuple[str, int | None]] = [(name, None) for name in asked if name in WITHOUT]
    with_ = [name for name in asked if name in WITH] + list(row.also)
    return found + [(name, memory) for memory in memories if memory in row.memories for name in with_]


def against_of(labels: list[str]) -> dict[str, str]:
    """What each line's differences are taken from: refresh, or a lower learning rate, from its host, of the same memory."""
    found = {}
    for label in labels:
        learner, _, memory = label.partition(", ")
        host = learner.partition(" + ")[0].partition(" at ")[0].partition(" with ")[0]
        bases = [AGAINST.get(host, "")] if host == learner else [host, AGAINST.get(host, "")]
        for other in [name for base in bases for name in (f"{base}, {memory}", base)]:
            if other in labels and other != label:
                found[label] = other
                break
    return found

"""What data-free recipes are about: a pool of classifiers, made here or the user's own, and unseen classes to judge by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spolia.core.lazy import torch
from spolia.core.seeds import entropy, generator
from spolia.errors import SpoliaError
from spolia.parts.episode import EpisodeSampler
from spolia.runs.schema import Shape

if TYPE_CHECKING:
    from torch import nn

    from spolia.parts.classes import ClassSet

Domain = Literal["upright", "turned", "inverted", "mirrored"]
Arch = Literal["conv2", "conv4", "resnet10"]
SHARES = (0.64, 0.16, 0.2)  # base, validation and test classes of a packed set: as mini-ImageNet's
OMNIGLOT = "omniglot"


class DataFree(Shape):
    """What all problems say."""

    ways: int = Field(5, description="classes of a test episode", ge=2)
    shots: list[int] = Field(default_factory=lambda: [1, 5], description="labelled inputs of each class, a test each")
    queries: int = Field(15, description="inputs of each class that an episode is judged by", ge=1)
    episodes: int = Field(600, description="test episodes, the same for all methods and seeds", ge=2)
    validation: Literal["pseudo", "real"] = Field(
        "pseudo",
        description="what chooses a model: recovered images alone, or a few real classes, of which it then knows",
    )
    looks: int = Field(60, description="episodes of a look that chooses", ge=2)
    checks: int = Field(4, description="looks along a training", ge=1)
    most_steps: int | None = Field(None, description="outer steps of a training, at most; null: the method's own", ge=1)
    quick: bool = Field(False, description="a small generator, few images and replays, whatever the method says")
    baselines: list[Literal["random", "average", "best", "plain", "real"]] = Field(
        default_factory=lambda: ["random", "average", "best", "plain", "real"],
        description="lines beside: random features, averaged models, the best model's features, plain inversion, real data",
    )


class _Made(DataFree):
    experts: int = Field(20, description="models of the pool", ge=1)
    expert_ways: int = Field(5, description="classes of each", ge=2)
    epochs: int = Field(30, description="passes of each model's training", ge=1)
    archs: list[Arch] = Field(
        default_factory=lambda: ["conv4"], description="networks of the pool, in turn", min_length=1
    )
    width: int = Field(32, description="channels of the first layer, of pool and learner", ge=2)
    corrupted: float = Field(0.0, description="share of the models that lie", ge=0, le=1)
    attack: Literal["mislabelled", "untrained", "random", "poisoned", "all"] = Field(
        "all", description="how they lie; all: in turn"
    )


class DigitsModels(_Made):
    """Small classifiers of some of seven digits, trained at run time; the other three digits are the test."""

    source: Literal["digits"] = Field("digits", description="real scans that come inside scikit-learn; no download")
    domains: list[Domain] = Field(
        default_factory=lambda: ["upright"], description="how the scans are shown, models in turn", min_length=1
    )
    ways: int = Field(3, description="classes of a test episode", ge=2, le=3)
    queries: int = Field(5, description="inputs of each class that an episode is judged by", ge=1)
    episodes: int = Field(50, description="test episodes, the same for all methods and seeds", ge=2)
    looks: int = Field(15, description="episodes of a look that chooses", ge=2)
    checks: int = Field(2, description="looks along a training", ge=1)
    most_steps: int | None = Field(16, description="outer steps of a training, at most; null: the method's own", ge=1)
    quick: bool = Field(True, description="a small generator, few images and replays, whatever the method says")
    experts: int = Field(8, description="models of the pool", ge=1)
    expert_ways: int = Field(3, description="classes of each", ge=2, le=7)
    epochs: int = Field(10, description="passes of each model's training", ge=1)
    archs: list[Arch] = Field(
        default_factory=lambda: ["conv2"], description="networks of the pool, in turn: conv2, resnet10", min_length=1
    )
    width: int = Field(16, description="channels of the first layer, of pool and learner", ge=2)


class TextureModels(_Made):
    """Small classifiers of sixteen kinds of stripes; eight others are the test: features matter, pixels do not."""

    source: Literal["textures"] = Field(description="stripes made on the spot")
    episodes: int = Field(200, description="test episodes, the same for all methods and seeds", ge=2)
    experts: int = Field(16, description="models of the pool", ge=1)
    epochs: int = Field(12, description="passes of each model's training", ge=1)
    archs: list[Arch] = Field(
        default_factory=lambda: ["conv2"], description="networks of the pool, in turn: conv2, resnet10", min_length=1
    )
    width: int = Field(24, description="channels of the first layer, of pool and learner", ge=2)


class PackedModels(_Made):
    """Classifiers of base classes of packed sets, one set or several; their other classes are the test."""

    source: Literal["packed"] = Field(description="npz files with a train and a test part, or omniglot")
    data: list[str] = Field(
        default_factory=lambda: ["tiny_imagenet100"],
        description="the files' names without .npz, or omniglot; models in turn",
        min_length=1,
    )
    folder: Path | None = Field(None, description="where the data lie; by default the folder that SPOLIA_DATA names")
    size: int = Field(32, description="pixels of a side", ge=16, multiple_of=4)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")


class OwnModels(DataFree):
    """Your own models, by a description; judged on a folder of images by class, if you have one."""

    source: Literal["models"] = Field(description="a description of your models")
    models: Path | None = Field(None, description="the description, a YAML file: see docs/datafree.md")
    test: Path | None = Field(None, description="a folder that holds one folder of images a class, none of the models'")
    validation_folder: Path | None = Field(None, description="the same, of still other classes, for validation: real")
    width: int = Field(32, description="channels of the learner, a Conv4", ge=2)


PROBLEMS: dict[str, type[DataFree]] = {
    "digits": DigitsModels,
    "textures": TextureModels,
    "packed": PackedModels,
    "models": OwnModels,
}


@dataclass(frozen=True)
class Held:
    """Real classes by domain: `base` trains a pool made on the spot, `validation` may choose, `test` judges.

    No test class is a base class. A domain with too few classes for an episode has no test.
    """

    base: Mapping[str, ClassSet]
    validation: Mapping[str, ClassSet]
    test: Mapping[str, ClassSet]

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter([*self.base.values(), *self.test.values()])).shape


def classes_of(problem: DataFree, seed: int) -> Held:
    """The classes of a problem; the recipe's seed says which are which."""
    if isinstance(problem, DigitsModels):
        return _digits(problem, seed)
    if isinstance(problem, TextureModels):
        from spolia.data.textures import texture_classes

        order = generator(seed, "textures", "split").permutation(24)
        held, again = texture_classes(200, 0), texture_classes(60, 1)
        base, test = (held.pick(part) for part in (order[:16], order[16:]))
        return Held({"": base}, {"": again.pick(order[:16])}, {"": test})
    if isinstance(problem, PackedModels):
        return _packed(problem, seed)
    assert isinstance(problem, OwnModels)
    return Held({}, {}, {})


def _digits(problem: DigitsModels, seed: int) -> Held:
    from spolia.data.fewshot import digit_classes

    order = generator(seed, "digits", "few-shot").permutation(10)
    held: dict[str, ClassSet] = {domain: digit_classes(domain) for domain in problem.domains}
    other = digit_classes("noisy")
    base = {domain: one.pick(order[:7]) for domain, one in held.items()}
    test = {domain: one.pick(order[7:]) for domain, one in held.items()}
    return Held(base, {"noisy": other.pick(order[:7])}, test)


def _packed(problem: PackedModels, seed: int) -> Held:
    from spolia.data import fewshot

    base, validation, test = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name in problem.data:
        if name == OMNIGLOT:
            more: dict[str, Any] = {"size": problem.size, "channels": problem.channels, "folder": problem.folder}
            base[name], validation[name] = fewshot.omniglot("background", **more).split((0.85, 0.15), seed)
            test[name] = fewshot.omniglot("evaluation", **more)
            continue
        held = fewshot.packed(name, folder=problem.folder, size=problem.size, channels=problem.channels)
        parts = held.split(SHARES, seed)
        if len(parts[2]) < problem.ways:  # too few to be asked about: all of them are the pool's
            base[name] = held
            continue
        base[name], test[name] = parts[0], parts[2]
        if len(parts[1]) >= problem.ways:
            validation[name] = parts[1]
    if not test:
        what = f"{', '.join(problem.data)} leave no {problem.ways} unseen classes"
        raise SpoliaError(what, where="problem.data", mend="add a set with more classes, or lower problem.ways")
    return Held(base, validation, test)


def check_files(problem: DataFree) -> None:
    """SpoliaError where files are not there; nothing is read."""
    from spolia.data.images import packed_file

    if isinstance(problem, PackedModels):
        for name in problem.data:
            packed_file("omniglot28" if name == OMNIGLOT else name, problem.folder)
    elif isinstance(problem, OwnModels):
        if problem.models is None or not problem.models.is_file():
            raise SpoliaError("is no file", where=f"problem.models {problem.models}", mend="models: DESCRIPTION.yaml")
        for name in ("test", "validation_folder"):
            folder = getattr(problem, name)
            if folder is not None and not folder.is_dir():
                raise SpoliaError("is no folder", where=f"problem.{name} {folder}", mend=f"{name}: PATH")


def sampler(problem: DataFree, held: ClassSet | list[ClassSet], shots: int, seed: int) -> EpisodeSampler:
    return EpisodeSampler(held, ways=problem.ways, shots=shots, queries=problem.queries, seed=seed)


def network_of(problem: DataFree, arch: Arch, shape: tuple[int, ...], ways: int, *names: object) -> nn.Module:
    """A network for images of `shape`; the names say which weights it begins with."""
    width = getattr(problem, "width", 32)
    draws = torch.Generator().manual_seed(entropy(0, "datafree network", *names) % 2**63)
    if arch == "conv2":
        from spolia.zoo.conv2 import Conv2

        return Conv2(ways, channels=shape[0], width=width, size=shape[-1], generator=draws)
    if arch == "conv4":
        from spolia.zoo.conv4 import Conv4

        return Conv4(ways, channels=shape[0], width=width, size=shape[-1], generator=draws)
    from spolia.zoo.resnet10 import SmallResNet

    return SmallResNet(10, width, ways, channels=shape[0], generator=draws)


def features(network: Any, x: Any) -> Any:
    """What the head sees."""
    return network.features(x)

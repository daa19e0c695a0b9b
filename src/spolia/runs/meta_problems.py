"""What few-shot recipes are about: classes to train on, to choose by and to test on, and the network that learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spolia.core.lazy import torch
from spolia.core.seeds import entropy, generator
from spolia.data.augment import PAPER, Augment, scenario
from spolia.errors import SpoliaError
from spolia.parts.episode import EpisodeSampler
from spolia.runs.schema import Shape

if TYPE_CHECKING:
    from torch import nn

    from spolia.parts.classes import ClassSet

Scenario = Literal["corrupted", "cropped", "recoloured", "mixed", "shaken"]
Strength = Literal["weak", "strong"]
WIDTH = 64  # of the network for digits


class FewShot(Shape):
    """What all problems say."""

    ways: int = Field(5, description="classes of an episode", ge=2)
    shots: int = Field(1, description="labelled inputs of each class", ge=1)
    queries: int = Field(15, description="inputs of each class that an episode is judged by", ge=1)
    train_queries: int | None = Field(None, description="the same in training; null: as at test", ge=1)
    episodes: int = Field(600, description="test episodes, the same for all methods and seeds", ge=2)
    validation: int = Field(200, description="episodes of a look that selects a model", ge=2)
    views: Literal["shaken", "paper"] | Augment = Field(
        "paper", description="how views of a support differ: shaken suits written characters; or changes by name"
    )
    scenarios: list[Scenario] = Field(
        default_factory=lambda: ["mixed"], description="what is done to the support beside the standard test"
    )
    strength: Strength = Field("strong", description="of shaken views and of scenarios")
    most_steps: int | None = Field(None, description="outer steps of a training, at most; null: the method's own", ge=1)


class DigitsEpisodes(FewShot):
    """scikit-learn's digits: seven of them to train on; the other three are the test."""

    source: Literal["digits"] = Field("digits", description="real scans that come inside scikit-learn; no download")
    ways: int = Field(3, description="classes of an episode", ge=2, le=3)
    queries: int = Field(5, description="inputs of each class that an episode is judged by", ge=1)
    episodes: int = Field(200, description="test episodes, the same for all methods and seeds", ge=2)
    validation: int = Field(50, description="episodes of a look that selects a model", ge=2)
    views: Literal["shaken", "paper"] | Augment = Field(
        "shaken", description="how views of a support differ: shaken suits written characters; or changes by name"
    )
    scenarios: list[Scenario] = Field(
        default_factory=lambda: ["shaken"], description="what is done to the support beside the standard test"
    )
    strength: Strength = Field("weak", description="of shaken views and of scenarios")
    most_steps: int | None = Field(100, description="outer steps of a training, at most; null: the method's own", ge=1)


class _Images(FewShot):
    folder: Path | None = Field(None, description="where the data lie; by default the folder that SPOLIA_DATA names")
    width: int = Field(64, description="channels of Conv4", ge=1)
    norm: Literal["batch", "group", "layer", "instance", "none"] = Field("batch", description="norm of Conv4")


class OmniglotEpisodes(_Images):
    """Omniglot: trained on the background characters and their turns, tested on the evaluation characters."""

    source: Literal["omniglot"] = Field(description="omniglot28.npz")
    turned: bool = Field(True, description="quarter turns of a training character are classes too")
    views: Literal["shaken", "paper"] | Augment = Field(
        "shaken", description="how views of a support differ: shaken suits written characters; or changes by name"
    )
    scenarios: list[Scenario] = Field(
        default_factory=lambda: ["shaken"], description="what is done to the support beside the standard test"
    )


class PackedEpisodes(_Images):
    """A packed set of images split by classes; tested on its other classes, or on another set."""

    source: Literal["packed"] = Field(description="an npz file with a train and a test part")
    data: str = Field("tiny_imagenet100", description="the file's name without .npz")
    test: str | None = Field(None, description="another file, all of whose classes are the test: another domain")
    size: int = Field(32, description="pixels of a side", ge=16)


class FolderEpisodes(_Images):
    """A folder with a folder of images for each class, split by classes."""

    source: Literal["folder"] = Field(description="folders of images")
    folder: Path | None = Field(None, description="the folder that holds one folder a class")
    size: int = Field(84, description="pixels of a side", ge=16)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")


PROBLEMS: dict[str, type[FewShot]] = {
    "digits": DigitsEpisodes,
    "omniglot": OmniglotEpisodes,
    "packed": PackedEpisodes,
    "folder": FolderEpisodes,
}
SHARES = (0.64, 0.16, 0.2)  # training, validation and test classes where one set is split: as mini-ImageNet's


@dataclass(frozen=True)
class Classes:
    """Sets that share no class."""

    train: ClassSet
    validation: ClassSet
    test: ClassSet


def classes_of(problem: FewShot, seed: int) -> Classes:
    """The classes of a problem; the recipe's seed says which are which."""
    from spolia.data import fewshot

    if isinstance(problem, DigitsEpisodes):
        order = generator(seed, "digits", "few-shot").permutation(10)
        upright, mirrored = fewshot.digit_classes(), fewshot.digit_classes("mirrored")
        return Classes(upright.pick(order[:7]), mirrored.pick(order[:7]), upright.pick(order[7:]))
    assert isinstance(problem, _Images)
    if isinstance(problem, OmniglotEpisodes):
        train, validation = fewshot.omniglot("background", folder=problem.folder).split((0.85, 0.15), seed)
        test = fewshot.omniglot("evaluation", folder=problem.folder)
        return Classes(train.turned() if problem.turned else train, validation, test)
    if isinstance(problem, PackedEpisodes):
        parts = fewshot.packed(problem.data, folder=problem.folder, size=problem.size).split(SHARES, seed)
        train, validation, test = parts
        if problem.test is not None:
            test = fewshot.packed(problem.test, folder=problem.folder, size=problem.size)
        return Classes(train, validation, test)
    assert isinstance(problem, FolderEpisodes)
    if problem.folder is None:
        raise SpoliaError("no folder is named", where="problem.folder", mend="folder: PATH")
    held = fewshot.folder_classes(problem.folder, size=problem.size, channels=problem.channels)
    return Classes(*held.split(SHARES, seed))


def check_files(problem: FewShot) -> None:
    """SpoliaError where the data are not there; nothing is read."""
    from spolia.data.images import packed_file

    if isinstance(problem, OmniglotEpisodes):
        packed_file("omniglot28", problem.folder)
    elif isinstance(problem, PackedEpisodes):
        for name in (problem.data, problem.test):
            if name is not None:
                packed_file(name, problem.folder)
    elif isinstance(problem, FolderEpisodes) and (problem.folder is None or not problem.folder.is_dir()):
        raise SpoliaError("is no folder", where=f"problem.folder {problem.folder}", mend="folder: PATH")


def sampler(problem: FewShot, held: ClassSet, seed: int, queries: int | None = None) -> EpisodeSampler:
    queries = problem.queries if queries is None else queries
    return EpisodeSampler(held, ways=problem.ways, shots=problem.shots, queries=queries, seed=seed)


def views_of(problem: FewShot) -> Augment:
    """How views of a support differ."""
    if isinstance(problem.views, Augment):
        return problem.views
    return scenario("shaken", problem.strength) if problem.views == "shaken" else PAPER


def scenarios_of(problem: FewShot) -> dict[str, Augment | None]:
    """Tests by name, and what is done to the support."""
    return {"standard": None, **{f"{name} support": scenario(name, problem.strength) for name in problem.scenarios}}


def network_of(problem: FewShot, shape: Sequence[int], seed: int) -> nn.Module:
    """A network for inputs of `shape` with one output a way: a hidden layer for digits, Conv4 for images."""
    draws = torch.Generator().manual_seed(entropy(seed, "network") % 2**63)
    if isinstance(problem, _Images):
        from spolia.zoo.conv4 import Conv4

        sizes: dict[str, Any] = {"channels": shape[0], "width": problem.width, "size": shape[-1], "norm": problem.norm}
        return Conv4(problem.ways, **sizes, generator=draws)
    from spolia.zoo.mlp import linear

    first, head = linear(shape[-1] * shape[-2], WIDTH, draws), linear(WIDTH, problem.ways, draws)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.LayerNorm(WIDTH), torch.nn.ReLU(), head)


def features(network: Any, x: Any) -> Any:
    """What the head sees."""
    return network[:-1](x) if isinstance(network, torch.nn.Sequential) else network.features(x)

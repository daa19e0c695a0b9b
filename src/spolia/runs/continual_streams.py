"""The stream of a continual problem, and networks for it. The same problem and seed give the same bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy
from spolia.data import images as sets
from spolia.data.labelled import (
    Labelled,
    cropped,
    labelled_arrays,
    labelled_dataset,
    labelled_digits,
    labelled_folder,
    labelled_packed,
)
from spolia.errors import SpoliaError
from spolia.methods.continual.learner import Model, as_floats
from spolia.parts.domains import permutations, rotations
from spolia.parts.stream import Part, Stream, class_incremental, domain_incremental
from spolia.runs.continual_problems import (
    ArraysStream,
    Continual,
    DatasetStream,
    DigitsStream,
    FolderStream,
    PackedStream,
    check_files,
    width_of,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


def labelled_of(problem: Continual, seed: int) -> Labelled:
    """The data. The seed says which of them are the test where a set does not come in two parts."""
    match problem:
        case PackedStream():
            more: dict[str, Any] = {"size": problem.size, "channels": problem.channels, "most": problem.most}
            return labelled_packed(problem.data, folder=problem.folder, **more)
        case ArraysStream():
            check_files(problem)
            assert problem.file is not None
            return labelled_arrays(problem.file.expanduser(), most=problem.most, seed=seed)
        case FolderStream():
            check_files(problem)
            assert problem.folder is not None
            return labelled_folder(problem.folder.expanduser(), size=problem.size, channels=problem.channels, seed=seed)
        case DatasetStream():
            check_files(problem)
            columns = {"image": problem.image, "label": problem.label, "most": problem.most}
            parts = (problem.train, problem.test)
            shown: dict[str, Any] = {"size": problem.size, "channels": problem.channels, **columns}
            return labelled_dataset(problem.data, config=problem.config, parts=parts, **shown)
    return labelled_digits(seed)


def stream_of(problem: Continual, held: Labelled, seed: int) -> Stream:
    """The data as a stream. Class order, permutations, angles and overlaps follow from the seed."""
    if problem.scenario == "domain":
        count, size = problem.count, int(np.prod(held.shape))
        changes = permutations(count, size, seed=seed)
        if problem.domains == "rotated":
            changes = rotations(count, most=problem.turn, seed=seed)
        stream = domain_incremental(held.train, held.test, changes, seed=seed)
        return replace(stream, tests=tuple(replace(test, examples=_shown(test.examples)) for test in stream.tests))
    stream = class_incremental(held.train, held.test, problem.tasks, shuffle=problem.shuffle, seed=seed)
    return stream.without_boundaries(problem.blur) if problem.scenario == "online" else stream


def model_of(problem: Any, held: Labelled, seed: int) -> Model:
    """A network with one output a class, drawn from the seed, and how it sees its inputs."""
    draws = torch.Generator().manual_seed(entropy(seed, "continual", "network") % 2**63)
    network = _network(problem, held.shape, len(held.classes), draws)
    if isinstance(problem, DigitsStream):
        return Model(network)
    colours = len(held.shape) == 3 and held.shape[0] == 3 and held.train[0].dtype == torch.uint8
    show = sets.normalised if colours else as_floats
    view = partial(_cropped, show) if problem.augment == "crops" else None
    return Model(network.to(problem.device), view=view, show=show)


def _shown(part: Part) -> Part:
    """With its change made once: a test is looked at after every task."""
    batch = part.batch(slice(None))
    return Part(batch.x, batch.y, np.arange(len(batch.y)))


def config_of(problem: Any, held: Labelled) -> dict[str, Any]:
    """What config.json says beside the weights."""
    about = {"model_type": "spolia_continual", "network": problem.network, "width": width_of(problem)}
    return about | {"input": list(held.shape), "num_labels": len(held.classes), "classes": list(held.classes)}


def _cropped(show: Any, x: Tensor, draws: np.random.Generator) -> Tensor:
    return show(cropped(x, draws))


def _network(problem: Any, shape: tuple[int, ...], classes: int, draws: Generator) -> nn.Module:
    width, name = width_of(problem), problem.network
    images = len(shape) == 3 and shape[-1] == shape[-2]
    if (name != "mlp" or (problem.scenario == "domain" and problem.domains == "rotated")) and len(shape) < 2:
        what = f"inputs {list(shape)} are no images"
        raise SpoliaError(what, where="problem.network", mend="write `network: mlp`, and no rotation")
    if name == "mlp":
        return mlp(int(np.prod(shape)), width, classes, draws)
    if name == "conv":
        from spolia.zoo.small import SmallNet

        return SmallNet("conv", width, classes, generator=draws)
    if not images or (name.startswith("resnet") and shape[0] != 3):
        what = f"`{name}` for inputs {list(shape)}"
        mend = "give square images, to a ResNet in colour (`channels: 3`), or write `network: mlp`"
        raise SpoliaError(what, where="problem.network", mend=mend)
    if name == "conv4":
        from spolia.zoo.conv4 import Conv4

        return Conv4(classes, channels=shape[0], width=width, size=shape[-1], generator=draws)
    from spolia.zoo.resnet import ResNet

    return ResNet(int(name.removeprefix("resnet")), width, classes, generator=draws)


def mlp(inputs: int, width: int, classes: int, draws: Generator) -> nn.Module:
    """Two hidden layers of `width` with relu, inputs of any shape flattened."""
    from spolia.zoo.mlp import linear

    sizes = ((inputs, width), (width, width))
    layers = [layer for i, o in sizes for layer in (linear(i, o, draws), torch.nn.ReLU())]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers, linear(width, classes, draws))

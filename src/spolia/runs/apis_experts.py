"""Experts to query: networks of a few classes, trained on the spot, as APIs of this process or as what a server serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.seeds import entropy, generator
from spolia.methods.continual.learner import as_floats
from spolia.parts.api_answers import Contract

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from spolia.parts.stream import Part

_LR, _BATCH = 1e-3, 64  # Adam
_DIGITS_STEPS = 200
_WIDTHS = {"mlp": 64, "conv": 8, "conv2": 32, "conv4": 32}
_RESNET_WIDTH = 16
_LOT = 512  # inputs of a forward pass when judging


@dataclass(frozen=True)
class Trained:
    """An expert of some classes: its logits of inputs in 0 … 1, and its accuracy in per cent on test inputs."""

    logits: Callable[[Tensor], Tensor]
    accuracy: float


def network_of(kind: str, shape: Sequence[int], classes: int, draws: Generator, width: int | None = None) -> nn.Module:
    """A network of this kind for inputs of `shape`, weights drawn from `draws`."""
    import math

    from spolia.runs.continual_streams import mlp

    width = width or _WIDTHS.get(kind, _RESNET_WIDTH)
    if kind == "linear":
        from spolia.zoo.mlp import linear

        return torch.nn.Sequential(torch.nn.Flatten(), linear(math.prod(shape), classes, draws))
    if kind == "mlp":
        return mlp(math.prod(shape), width, classes, draws)
    if kind == "conv":
        from spolia.zoo.small import SmallNet

        return SmallNet("conv", width, classes, generator=draws)
    if kind == "conv2":
        from spolia.zoo.conv2 import Conv2

        return Conv2(classes, channels=shape[0], width=width, size=shape[-1], generator=draws)
    if kind == "conv4":
        from spolia.zoo.conv4 import Conv4

        return Conv4(classes, channels=shape[0], width=width, size=shape[-1], generator=draws)
    from spolia.zoo.resnet import ResNet

    return ResNet(int(kind.removeprefix("resnet")), width, classes, generator=draws)


def train_expert(
    kind: str,
    shape: Sequence[int],
    classes: Sequence[int],
    train: Part,
    test: Part,
    seed: int,
    *,
    width: int | None = None,
    epochs: float | None = None,
    device: str = "cpu",
) -> Trained:
    """An expert of `classes`, in their order, from the examples of `train`; by default so many steps as suit digits."""
    names = ("api expert", kind, *classes)
    drawn = torch.Generator().manual_seed(entropy(seed, *names) % 2**63)
    network = network_of(kind, shape, len(classes), drawn, width).to(device)
    draws = generator(seed, *names, "batches")
    own = {label: place for place, label in enumerate(classes)}
    steps = _DIGITS_STEPS if epochs is None else max(1, round(epochs * len(train) / _BATCH))
    optimizer = torch.optim.Adam(network.parameters(), lr=_LR)
    for _ in range(steps):
        batch = train.batch(draws.choice(len(train), min(_BATCH, len(train)), replace=False))
        labels = torch.tensor([own[label] for label in batch.y.tolist()], device=device)
        loss = torch.nn.functional.cross_entropy(network(as_floats(batch.x).to(device)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval().requires_grad_(False)

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x.to(device)).cpu()

    right = 0
    for start in range(0, len(test), _LOT):
        batch = test.batch(slice(start, start + _LOT))
        chosen = logits(as_floats(batch.x)).argmax(1).tolist()
        right += sum(own[label] == place for label, place in zip(batch.y.tolist(), chosen, strict=True))
    return Trained(logits, 100 * right / max(1, len(test)))


def digit_expert(digits: Sequence[int], kind: str, seed: int) -> Trained:
    """An expert of some of scikit-learn's digits: the same that a recipe of the same seed asks."""
    from spolia.data.labelled import labelled_digits

    held = labelled_digits(seed)
    train, test = (_some(pair, digits) for pair in (held.train, held.test))
    return train_expert(kind, held.shape, digits, train, test, seed)


def contract_of(problem: Any, names: Sequence[str], shape: Sequence[int]) -> Contract:
    """What an expert of these classes promises in this problem."""
    return Contract(
        tuple(names),
        tuple(shape),
        problem.answers,
        top=min(problem.top, len(names)),
        resolution=0.0 if problem.decimals is None else 10.0**-problem.decimals,
    )


def _some(pair: tuple[Tensor, Tensor], labels: Sequence[int]) -> Part:
    """The examples of these labels."""
    from spolia.core.lazy import np
    from spolia.parts.stream import Part

    return Part(*pair, np.flatnonzero(np.isin(pair[1].numpy(), list(labels))))

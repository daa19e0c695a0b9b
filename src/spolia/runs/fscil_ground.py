"""The ground of a few-shot stream: data, sessions, and a frozen encoder. The same problem and seed give the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy, generator
from spolia.data.images import MEAN, STD
from spolia.data.labelled import Labelled, cropped, labelled_arrays, labelled_digits, labelled_folder, labelled_packed
from spolia.errors import SpoliaError
from spolia.parts.stream import Stream, class_incremental
from spolia.runs.fscil_problems import (
    ArraysSessions,
    DataSessions,
    FolderSessions,
    PackedSessions,
    Sessions,
    check_files,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Part

TURNS = 4  # quarters of a turn; turned classes are classes of their own in pretraining
_BATCH, _LR, _DECAY, _WARM = 64, 1e-3, 0.05, 0.1  # AdamW, a tenth of the steps up, the rest down a cosine


@dataclass(frozen=True)
class Ground:
    """`show`: images as the encoder takes them; `view`: the same in training; None: inputs are so already. `classes`: names
    by id."""

    stream: Stream
    classes: tuple[str, ...]
    show: Any
    view: Any


@dataclass(frozen=True)
class Shown:
    """Stored images [n, c, h, w], uint8 or 0 … 1, as an encoder takes them: three colours, its side, its norm."""

    pixels: int | None
    norm: str

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if self.pixels is not None and x.shape[-1] != self.pixels:
            size = (self.pixels, self.pixels)
            x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(
                0, 1
            )
        if self.norm == "half":
            return 2 * x - 1
        if self.norm == "none":
            return x
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return (x - mean) / std


def labelled_of(problem: Sessions, seed: int) -> Labelled:
    """The data. The seed says which of them are the test where a set does not come in two parts."""
    check_files(problem)
    match problem:
        case PackedSessions():
            return labelled_packed(problem.data, folder=problem.folder)
        case ArraysSessions():
            assert problem.file is not None
            return labelled_arrays(problem.file.expanduser(), seed=seed)
        case FolderSessions():
            assert problem.folder is not None
            return labelled_folder(problem.folder.expanduser(), size=problem.side, seed=seed)
    return labelled_digits(seed)


def ground_of(problem: Any, seed: int) -> Ground:
    """Sessions and views. Class order and shots follow from the seed."""
    if isinstance(problem, DataSessions):
        return _shown_already(problem, seed)
    held = labelled_of(problem, seed)
    if len(held.shape) != 3:
        raise SpoliaError(f"inputs {list(held.shape)} are no images", where="problem", mend="give images [n, h, w, 3]")
    sizes = sizes_of(problem, len(held.classes))
    stream = class_incremental(held.train, held.test, sizes, shuffle=problem.shuffle, shots=problem.shots, seed=seed)
    show = Shown(getattr(problem, "pixels", None), getattr(problem, "norm", "half"))
    crops = getattr(problem, "augment", "none") == "crops"
    names = tuple(held.classes[raw] for raw in stream.order)
    return Ground(stream, names, show, partial(_cropped, show) if crops else None)


def _shown_already(problem: DataSessions, seed: int) -> Ground:
    """Of inputs that have been read as the encoder takes them."""
    from spolia.runs.fscil_data import examples_of

    train, test, names = examples_of(problem)
    assert train.labels is not None
    sizes = sizes_of(problem, len(train.labels.unique()))
    stream = class_incremental(train, test, sizes, shuffle=problem.shuffle, shots=problem.shots, seed=seed)
    return Ground(stream, tuple(names[label] if names else str(label) for label in stream.order), None, None)


def sizes_of(problem: Sessions, classes: int) -> list[int]:
    """Classes of every session."""
    new = classes - problem.base
    if new < problem.ways or new % problem.ways:
        what = f"{classes} classes: {problem.base} and sessions of {problem.ways}"
        raise SpoliaError(what, where="problem.base", mend="let base + sessions * ways be the number of classes")
    return [problem.base, *[problem.ways] * (new // problem.ways)]


def encoder_for(problem: Any, ground: Ground, seed: int, journal: Journal) -> Encoder:
    """The frozen encoder: the one that is named, or a ViT trained on the base session alone."""
    from spolia.zoo.encoders import encoder_of

    device = getattr(problem, "device", "cpu")
    if problem.encoder:
        return encoder_of(problem.encoder, pool=getattr(problem, "pool", "first"), device=device)
    from spolia.zoo.vit import ViT

    draws = torch.Generator().manual_seed(entropy(seed, "fscil", "encoder") % 2**63)
    base = ground.stream.experiences[0].train
    side = getattr(problem, "pixels", None) or base.inputs.shape[-1]
    vit = ViT(side, problem.patch, problem.width, problem.depth, problem.heads, generator=draws).to(device)
    pretrained(vit, base, problem.base, problem.pretraining, ground, seed, journal)
    return encoder_of(vit)


def pretrained(
    vit: nn.Module,
    base: Part,
    classes: int,
    steps: int,
    ground: Ground,
    seed: int,
    journal: Journal,
    others: Sequence[tuple[Part, int]] = (),
) -> None:
    """Train `vit` in place to tell the classes of `base` apart, and by which quarter an image is turned.

    `others`: further labelled images with their number of classes; every other step is one of theirs, in turn.
    """
    device = next(vit.parameters()).device
    width = vit.norm.normalized_shape[0]  # type: ignore[union-attr]
    counts = [TURNS * classes, *(count for _, count in others)]
    start = generator(seed, "fscil", "pretraining head").standard_normal((sum(counts), width), dtype="float32")
    weight = torch.nn.Parameter(torch.from_numpy(start / math.sqrt(width)).to(device))
    optimizer = torch.optim.AdamW([*vit.parameters(), weight], lr=_LR, weight_decay=_DECAY)
    keep = {"vit": vit, "weight": weight, "optimizer": optimizer}
    with journal.phase(f"seed {seed} train the encoder"):
        for step in journal.steps(steps, None if journal.folder is None else keep):
            share = (step + 1) / steps
            rise = min(1.0, share / _WARM) * (1 + math.cos(math.pi * max(0.0, share - _WARM) / (1 - _WARM))) / 2
            optimizer.param_groups[0]["lr"] = _LR * rise
            place = 1 + step // 2 % len(others) if others and step % 2 else 0
            part = others[place - 1][0] if place else base
            x, y = _turned(part, ground, generator(seed, "fscil", "pretraining", step), device, place == 0)
            loss = torch.nn.functional.cross_entropy(vit(x) @ weight.split(counts)[place].T, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                journal.log(loss=loss.detach())


def _turned(
    part: Part, ground: Ground, draws: np.random.Generator, device: torch.device, turned: bool
) -> tuple[Tensor, Tensor]:
    """A batch of images with their classes; `turned`: by 0 to 3 quarters, classes times four and the quarters."""
    batch = part.batch(draws.choice(len(part), min(_BATCH, len(part)), replace=False))
    stored = batch.x.to(device)
    x = ground.show(stored) if ground.view is None else ground.view(stored, draws)
    if not turned:
        return x, batch.y.to(device)
    quarters = torch.from_numpy(draws.integers(0, TURNS, len(batch.y)))
    x = torch.stack([torch.rot90(one, int(q), (1, 2)) for one, q in zip(x, quarters, strict=True)])
    return x, (TURNS * batch.y + quarters).to(device)


def _cropped(show: Any, x: Tensor, draws: np.random.Generator) -> Tensor:
    return show(cropped(x, draws))

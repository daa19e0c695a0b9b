"""Experts: trained models with a name, a task and the rights we have over them; and the pool they form.

`Weights` is the right to read tensors, nothing more: no forward pass, no data. It streams from files (parts/inputs.py
says which) or from tensors already in memory; the base and the experts of a pool may come from either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import Checkpoint, Dtype, read_config, storage
from spolia.core.files import open_regular
from spolia.core.pickled import read_state_dict
from spolia.core.stream import FilePlane, Plane, TensorPlane
from spolia.errors import Problems, SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.inputs import Inputs
    from spolia.parts.preprocessed import Step


@dataclass(frozen=True)
class Entry:
    """A tensor as its owner describes it. Entries with the same `storage` share memory (tied weights)."""

    dtype: Dtype
    shape: tuple[int, ...]
    storage: object = None

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.size


class Weights:
    """The right to read a model's tensors. `entries` is known without reading any of them."""

    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any] | None = None):
        self.entries = dict(entries)
        self.config = dict(config) if config is not None else None
        self.checkpoint: Checkpoint | None = None  # where they lie, if on disk

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def plane(self, name: str, model: str) -> Plane:
        """Tensor `name` for reading; `model` is what errors call its owner."""
        raise AssertionError("a Weights comes from files or from memory")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keeps what `plane` needs open; checks on leaving that nothing changed meanwhile."""
        yield


class MemoryWeights(Weights):
    """A state dict in memory. Tensors that share storage, shape and strides are tied."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        for name, tensor in tensors.items():
            if not hasattr(tensor, "untyped_storage"):
                raise SpoliaError(
                    f"`{name}` is a {type(tensor).__name__}, not a tensor", mend="pass a plain state dict"
                )
            if str(tensor.layout) != "torch.strided" or tensor.device.type == "meta":
                kind = "meta" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")
                raise SpoliaError(f"`{name}` is a {kind} tensor: it has no plain numbers", mend="make it dense first")
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        entries = {}
        for name, tensor in self.tensors.items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else None
            entries[name] = Entry(storage(tensor), tuple(tensor.shape), place)
        super().__init__(entries)

    def plane(self, name: str, model: str) -> Plane:
        tensor = self.tensors[name]
        return TensorPlane(model, self.entries[name].dtype, tensor.cpu().contiguous().reshape(-1))


class FileWeights(Weights):
    """A checkpoint on disk, read with positional reads: safe from several threads, nothing mapped."""

    def __init__(self, checkpoint: Checkpoint):
        entries = {name: Entry(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        super().__init__(entries, checkpoint.config)
        self.checkpoint = self._checkpoint = checkpoint
        self._fds: dict[Path, int] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FileWeights:
        return cls(Checkpoint.open(path))

    def plane(self, name: str, model: str) -> Plane:
        info = self._checkpoint.tensors[name]
        return FilePlane(model, info, self._fds[info.file])

    @contextmanager
    def opened(self) -> Iterator[None]:
        if self._fds:  # by another member that stands on the same files
            yield
            return
        try:
            for file in self._checkpoint.files:
                check_unchanged(file, self._checkpoint)
                self._fds[file] = open_regular(file)
            self._unchanged()
            yield
            self._unchanged()
        finally:
            for fd in self._fds.values():
                os.close(fd)
            self._fds = {}

    def _unchanged(self) -> None:
        for file, fd in self._fds.items():
            check_unchanged(file, self._checkpoint, fd)


def check_unchanged(file: Path, checkpoint: Checkpoint, fd: int | None = None) -> None:
    """SpoliaError when `file`, or what is open as `fd`, is not what it was when the checkpoint was opened."""
    seen = {name: (size, mtime, checkpoint.inodes[name]) for name, size, mtime, _ in checkpoint.fingerprint}
    try:
        stats = [file.stat(), *([os.fstat(fd)] if fd is not None else [])]
    except OSError as error:
        what = f"cannot be read any more: {error.strerror}"
        raise SpoliaError(what, where=str(file), mend="restore it and run the command again") from None
    if any((stat.st_size, stat.st_mtime_ns, stat.st_ino) != seen[file.name] for stat in stats):
        raise SpoliaError("changed while it was read", where=str(file), mend="run the command again")


class PickledWeights(MemoryWeights):
    """A pickled state dict on disk, mapped where its form allows: pages are fetched when they are read."""

    def __init__(self, path: Path):
        tensors, stats = read_state_dict(path)
        self.files = list(stats)
        super().__init__(tensors)
        self.config = read_config(path)
        names = json.dumps([[n, e.dtype.code, e.shape] for n, e in self.entries.items()])
        digest = hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()
        prints = [(file.name, stat.st_size, stat.st_mtime_ns, digest) for file, stat in stats.items()]
        inodes = {file.name: stat.st_ino for file, stat in stats.items()}
        self.checkpoint = Checkpoint(path, {}, self.config, prints, inodes=inodes)

    def plane(self, name: str, model: str) -> Plane:
        self._unchanged()  # a mapped file that was cut must not be touched
        return super().plane(name, model)

    @contextmanager
    def opened(self) -> Iterator[None]:
        self._unchanged()
        yield
        self._unchanged()

    def _unchanged(self) -> None:
        assert self.checkpoint is not None
        for file in self.files:
            check_unchanged(file, self.checkpoint)


@dataclass(frozen=True)
class Expert:
    """One trained model we are given."""

    name: str
    weights: Weights
    task: str = ""


@dataclass
class ExpertPool:
    """The experts of a problem in a fixed order, optionally with the base they started from."""

    experts: list[Expert]
    base: Expert | None = None
    config: dict[str, Any] | None = field(default=None)
    steps: tuple[Step, ...] = ()  # what is done to the task vectors before they are merged, in this order

    @property
    def models(self) -> list[Expert]:
        """The base first, if there is one, then the experts."""
        return ([self.base] if self.base is not None else []) + self.experts

    @classmethod
    def of(
        cls, experts: Mapping[str, Any] | list[Any], base: Any = None, locate: Callable[[str], str] = str
    ) -> ExpertPool:
        """From paths, modules or state dicts (a mapping names them). Every bad member is reported at once.

        A path may be `BASE+ADAPTER`, or a LoRA adapter alone: it then stands on `base`. `locate` turns what is no path
        (a hub's id) into one.
        """
        from spolia.parts.inputs import Inputs

        named = (
            experts.items()
            if isinstance(experts, Mapping)
            else [(_name(e, f"expert {i}"), e) for i, e in enumerate(experts)]
        )
        problems, pool, inputs = Problems(), cls([]), Inputs()
        if base is not None and (weights := _weights(base, "base", problems, inputs, locate)) is not None:
            pool.base = Expert(_name(base, "base"), weights)
        start = pool.base.weights if pool.base is not None else None
        for name, given in named:
            if (weights := _weights(given, name, problems, inputs, locate, start)) is not None:
                pool.experts.append(Expert(name, weights))
        problems.raise_if_any()
        return pool

    @contextmanager
    def opened(self) -> Iterator[None]:
        from contextlib import ExitStack

        with ExitStack() as stack:
            for weights in {id(m.weights): m.weights for m in self.models}.values():
                stack.enter_context(weights.opened())
            yield

    def _repr_html_(self) -> str:
        from spolia.core.shown import html_table

        rows = [
            (
                "base" if m is self.base else "expert",
                m.name,
                m.task or "–",
                len(m.weights.entries),
                f"{m.weights.nbytes:,}",
            )
            for m in self.models
        ]
        return html_table(("role", "name", "task", "tensors", "bytes"), rows, "Pool of experts")


def _name(given: Any, otherwise: str) -> str:
    return Path(given).name or str(given) if isinstance(given, str | os.PathLike) else otherwise


def _weights(
    given: Any, name: str, problems: Problems, inputs: Inputs, locate: Callable[[str], str], base: Weights | None = None
) -> Weights | None:
    from spolia.parts.inputs import parted

    try:
        if isinstance(given, Weights):
            return given
        if isinstance(given, str | os.PathLike):
            path, lora = parted(locate(os.fspath(given)))
            return inputs.open(path, lora, base)
        if isinstance(given, Mapping):
            return MemoryWeights(given)
        if hasattr(given, "state_dict"):
            return MemoryWeights(given.state_dict())
        problems.add(name, f"a {type(given).__name__} is no model", "pass a folder, a module or a state dict")
    except SpoliaError as error:
        for problem in error.problems:
            problems.add(problem.where or name, problem.what, problem.mend)
    return None

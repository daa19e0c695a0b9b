"""Teachers: models that are asked for logits and never changed. One, several as one, or their answers kept on disk.

    teachers = Teachers([large, larger], weights=(1, 2))
    teachers = cached(teachers, inputs, "answers", top=32)      # asks once; goes on after a kill
    with teachers.at_rest():
        logits = teachers(batch)

Several are one distribution: the weighted mean of their probabilities, sum_k w_k softmax(z_k), given as its logarithm; or of
their logits, sum_k w_k z_k, which is the normalised geometric mean of the probabilities.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import joined, summed
from spolia.core.lazy import np, torch
from spolia.core.logitcache import Shards, as_class, compress, spread
from spolia.errors import SpoliaError
from spolia.parts.examples import Examples
from spolia.parts.network import moved, outputs_of

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.network import Outputs

_SHARD = 1 << 26  # bytes of a file of the cache, about
_LOOKED_AT = 64  # inputs compared with the cache's before any work


class Teachers:
    """Models (modules, or any functions of a batch) that answer as one.

    `outputs(model, batch)` gives the logits [batch, ..., classes] of one; by default a tensor as it is, or `.logits`.
    """

    def __init__(
        self,
        models: Any,
        *,
        weights: Sequence[float] | None = None,
        mean: Literal["probabilities", "logits"] = "probabilities",
        outputs: Outputs = outputs_of,
    ):
        self.models = list(models) if isinstance(models, list | tuple) else [models]
        given = [1.0] * len(self.models) if weights is None else [float(w) for w in weights]
        self.mean, self.outputs = mean, outputs
        if not self.models:
            raise SpoliaError("no teacher is given", where="teacher", mend="give a model, or a list of them")
        for model in self.models:
            if not callable(model):
                what = f"a {type(model).__name__} gives no logits"
                raise SpoliaError(what, where="teacher", mend="give a module or a function")
        if len(given) != len(self.models) or not all(w >= 0 and math.isfinite(w) for w in given) or not sum(given):
            what = f"{given} for {len(self.models)} teachers"
            raise SpoliaError(what, where="teacher.weights", mend="give each a number, 0 or more, not all 0")
        self.weights = [w / sum(given) for w in given]

    @classmethod
    def of(cls, given: Any, outputs: Outputs = outputs_of) -> Teachers | CachedTeacher:
        """`given` as it is if it already is one of both."""
        return given if isinstance(given, cls | CachedTeacher) else cls(given, outputs=outputs)

    @contextmanager
    def at_rest(self) -> Iterator[Teachers]:
        """All modules in eval mode; afterwards each part is in the mode it was in."""
        parts = [p for model in self.models if isinstance(model, torch.nn.Module) for p in model.modules()]
        modes = [part.training for part in parts]
        try:
            for part in parts:
                part.training = False
            yield self
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode

    def __call__(self, batch: Any) -> Tensor:
        """Logits [batch, ..., classes], without gradient. Of several: on the device of the first one's."""
        with torch.no_grad():
            found = [self._one(model, batch) for model in self.models]
            if len(found) == 1:
                return found[0]
            for logits in found[1:]:
                if logits.shape != found[0].shape:
                    what = f"one gives {list(found[0].shape)}, another {list(logits.shape)}"
                    raise SpoliaError(what, where="teacher", mend="give teachers of the same classes")
            return self._together(torch.stack([logits.float().to(found[0].device) for logits in found]))

    def _one(self, model: Any, batch: Any) -> Tensor:
        if isinstance(model, torch.nn.Module):
            batch = moved(batch, next((p.device for p in model.parameters()), None))
        return self.outputs(model, batch)

    def _together(self, logits: Tensor) -> Tensor:
        weights = logits.new_tensor(self.weights).view(-1, *[1] * (logits.dim() - 1))
        if self.mean == "logits":
            return (weights * logits).sum(0)
        return (logits.log_softmax(-1) + weights.log()).logsumexp(0)

    def identity(self) -> dict[str, Any]:
        """What the answers follow from, as JSON: classes and weights of the models, and how they are joined."""
        made: dict[str, Any] = {"teacher": [_digest(model) for model in self.models]}
        if len(self.models) > 1:
            made |= {"teacher weights": self.weights, "mean": self.mean}
        return made


class CachedTeacher:
    """Answers that were kept, found again by the inputs themselves. Made by `cached`.

    An input that the teachers were not asked about, an augmented one for instance, is refused, never guessed.
    """

    def __init__(self, shards: Shards, classes: int):
        self.shards, self.classes = shards, classes
        prints = shards.read(np.arange(shards.count), ("prints",))["prints"].numpy()
        self._order = np.argsort(prints, kind="stable")
        self._prints = prints[self._order]

    @contextmanager
    def at_rest(self) -> Iterator[CachedTeacher]:
        """There is no model to be put to rest."""
        yield self

    def __call__(self, batch: Any) -> Tensor:
        """Logits [batch, ..., classes] in fp32; classes that were not kept share the rest evenly."""
        return spread(self._found(batch), self.classes)

    def beside(self, batch: Any, student: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits [batch, ..., k + 1], the last one for all classes that were not kept."""
        parts = {name: part.to(student.device) for name, part in self._found(batch).items()}
        return as_class(parts, student)

    def identity(self) -> dict[str, Any]:
        return {"cache": str(self.shards.folder)}

    def _found(self, batch: Any) -> dict[str, Tensor]:
        asked = prints(batch)
        at = np.searchsorted(self._prints, asked).clip(max=len(self._prints) - 1)
        strange = int((self._prints[at] != asked).sum())
        if strange:
            what = f"{strange} of {len(asked)} inputs are not those the teacher was asked about"
            mend = "give the inputs as they were kept, without augmentation or other padding, or make another cache"
            raise SpoliaError(what, where=str(self.shards.folder), mend=mend)
        parts = self.shards.read(self._order[at])
        return {name: part for name, part in parts.items() if name != "prints"}


def cached(
    teacher: Any,
    inputs: Any,
    folder: str | os.PathLike[str],
    *,
    top: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> CachedTeacher:
    """Ask the teacher about all `inputs` once and keep the `top` largest logits of each (None: all).

    `inputs`: Examples, a tensor, a mapping or tuple of tensors, or a map-style data set. Killed and called again, it goes
    on; called again when all is there, it asks nothing. SpoliaError where the folder holds the answers of another teacher
    or about other inputs. Under torchrun the processes share the work. `progress` is told shards done and in all.
    """
    teachers, examples = Teachers.of(teacher), Examples.of(inputs, "")
    if isinstance(teachers, CachedTeacher):
        raise SpoliaError("is a cache already", where="teacher", mend="give the teacher itself")
    if not len(examples):
        raise SpoliaError("no inputs are given", where="inputs", mend="give what the student will be trained on")
    with joined() as (rank, ranks), teachers.at_rest():
        one = teachers(examples.batch([0]))
        classes = one.shape[-1]
        if top is not None and not 1 <= top <= classes:
            raise SpoliaError(f"is {top}, of {classes} classes", where="top", mend=f"choose 1 to {classes}")
        kept = classes if top is None else top
        places = one[0].numel() // classes
        size = max(1, _SHARD // (places * (kept * (8 if top else 4) + 4)))
        key = teachers.identity() | {"inputs": len(examples), "logits": list(one.shape[1:]), "top": kept, "type": dtype}
        if rank:
            summed(torch.zeros(1))  # the others look when the folder is there
        shards = Shards(folder, key, len(examples), size)
        if not rank:
            summed(torch.zeros(1))
        missing = shards.missing()
        _compare(shards, examples, set(missing))
        summed(torch.zeros(1))  # nobody writes before all have looked
        for shard in missing[rank::ranks]:
            span = np.asarray(shards.span(shard))
            found = [
                _asked(teachers, examples.batch(p), kept, dtype) for p in np.split(span, range(batch, len(span), batch))
            ]
            shards.write(shard, {name: torch.cat([part[name] for part in found]) for name in found[0]})
            if progress is not None:
                progress(shards.total - len(shards.missing()), shards.total)
        summed(torch.zeros(1))  # nobody reads before all have written
    return CachedTeacher(shards, classes)


def _asked(teachers: Teachers, batch: Any, top: int, dtype: str) -> dict[str, Tensor]:
    parts = compress(teachers(batch), top, getattr(torch, dtype))
    return {name: part.cpu() for name, part in parts.items()} | {"prints": torch.from_numpy(prints(batch))}


def _compare(shards: Shards, examples: Examples, missing: set[int]) -> None:
    """Some inputs, spread over all, with those of the shards that are there."""
    places = np.unique(np.linspace(0, len(examples) - 1, _LOOKED_AT).astype(np.int64))
    places = np.array([p for p in places if p // shards.size not in missing], dtype=np.int64)
    if not len(places):
        return
    theirs = shards.read(places, ("prints",))["prints"].numpy()
    different = int((theirs != prints(examples.batch(places))).sum())
    if different:
        what = f"holds answers about other inputs: {different} of {len(places)} looked at differ"
        mend = "choose another folder, or delete this one to ask the teacher anew"
        raise SpoliaError(what, where=str(shards.folder), mend=mend)


def prints(batch: Any) -> np.ndarray:
    """A digest of every input of a batch, int64 [batch]: equal for equal bits, type and shape."""
    parts = [batch[name] for name in sorted(batch)] if isinstance(batch, Mapping) else batch
    rows = [_rows(part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    made = [hashlib.blake2b(b"".join(row), digest_size=8).digest() for row in zip(*rows, strict=True)]
    return np.frombuffer(bytearray().join(made), dtype="<i8")  # torch wants memory it may write to


def _rows(part: Tensor) -> list[bytes]:
    head = f"{part.dtype}{list(part.shape[1:])}".encode()
    raw = part.detach().cpu().contiguous().reshape(len(part), -1).view(torch.uint8).numpy()
    return [head + row.tobytes() for row in raw]


def _digest(model: Any) -> str:
    """Class and weights of a module, its buffers included; a function has its name alone."""
    name = getattr(model, "__qualname__", type(model).__qualname__)
    if not isinstance(model, torch.nn.Module):
        return name
    total = hashlib.blake2b(digest_size=16)
    for key, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(flat.view(torch.uint8).numpy().data)
    return f"{name} {total.hexdigest()}"

"""Logits of many inputs on disk: the k largest and the mass of the rest, in shards that exist only when they are whole.

    values [..., k]   the k largest logits as they were, largest first       indices [..., k]   their classes
    rest [...]        log of the sum of exp over all other logits, fp32

From these softmax at temperature 1 is known exactly for the k classes and for the others together. Two readings:

- `spread`: the others share their mass evenly, each gets the logit rest - log(C - k). Logits of all C classes again.
- `as_class`: the others are one class more, for teacher and student alike: k + 1 logits. By the data processing inequality
  the KL divergence at temperature 1 is then never above the full one.

At another temperature both are approximations, for the rest's own shape is gone. With k = C all logits are kept in class
order, and nothing is lost but the rounding to the type they are kept in.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core import tensorfile
from spolia.core.files import read_json
from spolia.core.lazy import np, torch
from spolia.core.staging import disk_error
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "spolia logits 1"
_NOTE = "cache.json"


def compress(logits: Tensor, top: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits [..., C] as `values`, `indices`, `rest`; `values` alone where top is C. SpoliaError where `dtype` overflows."""
    logits = logits.float()
    parts = {"values": logits}
    if top < logits.shape[-1]:
        values, indices = logits.topk(top)
        others = logits.scatter(-1, indices, -math.inf)
        parts = {"values": values, "indices": indices.int(), "rest": others.logsumexp(-1)}
    small = parts["values"].to(dtype)
    if not torch.isfinite(small).all():
        if torch.isfinite(logits).all():
            raise SpoliaError("logits above 65,504 do not fit in float16", where="cache", mend="keep them in float32")
        raise SpoliaError("the teacher's outputs are not finite", where="cache", mend="look at its inputs and weights")
    return parts | {"values": small}


def spread(parts: dict[str, Tensor], classes: int) -> Tensor:
    """Logits [..., classes] in fp32; those that were not kept share the rest evenly."""
    values = parts["values"].float()
    if "indices" not in parts:
        return values
    even = parts["rest"] - math.log(classes - values.shape[-1])
    dense = even.unsqueeze(-1).expand(*even.shape, classes)
    return dense.scatter(-1, parts["indices"].long(), values)


def as_class(parts: dict[str, Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits [..., k + 1], the last one standing for all classes that were not kept."""
    values = parts["values"].float()
    if "indices" not in parts:
        return student, values
    indices = parts["indices"].long()
    others = student.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    ours = torch.cat([student.gather(-1, indices), others], -1)
    return ours, torch.cat([values, parts["rest"].unsqueeze(-1)], -1)


class Shards:
    """A folder of `count` entries, `size` in a file, made under `key`; another key is refused.

    Files are mapped, not read: an entry costs its own bytes. Safe for several processes that write different shards.
    """

    def __init__(self, folder: str | os.PathLike[str], key: dict[str, Any], count: int, size: int):
        self.folder, self.count, self.size = Path(folder), count, size
        self._open: dict[int, dict[str, Tensor]] = {}
        note = {"format": _FORMAT, "key": key, "count": count, "size": size}
        file = self.folder / _NOTE
        if file.exists():
            self._compare(read_json(file, "delete the folder to make it anew"), note)
        else:
            self._begin(file, note)

    def _begin(self, file: Path, note: dict[str, Any]) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.glob("[!.]*"))):
            raise SpoliaError("holds something else", where=str(self.folder), mend="choose an empty folder")
        part = file.with_name(f"{_NOTE}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(note, indent=1), encoding="utf-8")
            part.replace(file)
        except OSError as error:
            raise disk_error(error, self.folder) from None

    def _compare(self, found: Any, note: dict[str, Any]) -> None:
        then, now = (_flat(n) for n in (found if isinstance(found, dict) else {}, note))
        names = [name for name in now | then if then.get(name) != now.get(name)]
        if names:
            told = "; ".join(
                f"{name}: then {then.get(name, 'nothing')}, now {now.get(name, 'nothing')}" for name in names
            )
            mend = "choose another folder, or delete this one to ask the teacher anew"
            raise SpoliaError(f"holds other logits: {told}", where=str(self.folder), mend=mend)

    @property
    def total(self) -> int:
        """Files in all."""
        return -(-self.count // self.size)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(self.total) if not self._file(i).is_file()]

    def span(self, shard: int) -> range:
        """The entries of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def write(self, shard: int, parts: dict[str, Tensor]) -> None:
        """The entries of `span(shard)`, [entries, ...] each: there whole, or not at all."""
        tensorfile.write(self._file(shard), parts)

    def read(self, places: np.ndarray, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Entries at `places`, in that order."""
        made: dict[str, Tensor] = {}
        for shard in np.unique(places // self.size):
            at = np.flatnonzero(places // self.size == shard)
            rows, slots = torch.from_numpy(places[at] - shard * self.size), torch.from_numpy(at)
            for name, tensor in self._mapped(int(shard)).items():
                if names is None or name in names:
                    if name not in made:
                        made[name] = tensor.new_empty(len(places), *tensor.shape[1:])
                    made[name][slots] = tensor[rows]
        return made

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._open:
            file = self._file(shard)
            _, parts = tensorfile.read(file, "delete this file and make the cache again: it goes on")
            if any(len(tensor) != len(self.span(shard)) for tensor in parts.values()):
                raise SpoliaError("holds another number of entries", where=str(file), mend="delete this file")
            self._open[shard] = parts
        return self._open[shard]

    def _file(self, shard: int) -> Path:
        return self.folder / f"logits-{shard:05d}.safetensors"


def _flat(note: dict[str, Any]) -> dict[str, Any]:
    """The key's entries beside the others, as JSON would give them back."""
    rest = {name: value for name, value in note.items() if name != "key"}
    key = note.get("key")
    return json.loads(json.dumps(rest | (key if isinstance(key, dict) else {"key": key})))

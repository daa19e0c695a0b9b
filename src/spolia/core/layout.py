"""Where every output byte goes, known before any arithmetic; and the folder that appears only when it is whole.

Shards are laid out and their headers written first, so workers may write tensors in any order and in parts. All of it
stands in `NAME.partial` beside the destination; a log of finished parts lets the same command go on after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from spolia.core.checkpoint import Dtype, natural
from spolia.errors import SpoliaError

LOG = ".spolia-progress"
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors$")


@dataclass(frozen=True)
class Slot:
    """One output tensor before it has a place."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.size
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Place:
    """A slot's file and the byte where its data begin."""

    slot: Slot
    file: str
    start: int


@dataclass(frozen=True)
class Layout:
    """Shard files with their headers, and every tensor's place in them."""

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    index: str | None  # text of model.safetensors.index.json when there are several shards

    @classmethod
    def of(cls, slots: Iterable[Slot], max_shard_size: int, metadata: dict[str, str] | None = None) -> Layout:
        """Cut the slots, in natural order, into shards of at most `max_shard_size` bytes (one tensor at least)."""
        shards: list[list[Slot]] = [[]]
        filled = 0
        for slot in sorted(slots, key=lambda s: natural(s.name)):
            if shards[-1] and filled + slot.nbytes > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(slot)
            filled += slot.nbytes
        single = len(shards) == 1
        places, headers, sizes = {}, {}, {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            headers[file], offsets = _header(shard, metadata or {"format": "pt"})
            base = len(headers[file])
            for slot in shard:
                places[slot.name] = Place(slot, file, base + offsets[slot.name])
            sizes[file] = base + sum(slot.nbytes for slot in shard)
        total = sum(place.slot.nbytes for place in places.values())
        weight_map = {name: places[name].file for name in places}
        index = (
            None
            if single
            else json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        )
        return cls(places, headers, sizes, index)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def _header(shard: list[Slot], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    offsets, at = {}, 0
    if any(slot.name == "__metadata__" for slot in shard):
        raise SpoliaError(
            "is no name for a tensor: safetensors reserves it", where="__metadata__", mend="rename the tensor"
        )
    for slot in sorted(shard, key=lambda s: -s.dtype.size):  # wide types first: every tensor stays aligned
        offsets[slot.name] = at
        at += slot.nbytes
    entries: dict[str, object] = {"__metadata__": metadata}
    for slot in shard:
        start = offsets[slot.name]
        entries[slot.name] = {
            "dtype": slot.dtype.code,
            "shape": list(slot.shape),
            "data_offsets": [start, start + slot.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


class Staging:
    """The folder beside the destination. `key` says what is being made: only the same work is gone on with.

    Finished parts are logged after their bytes are written. Bytes written before a kill survive in the page cache; after
    a restart of the machine (another boot id) nothing is taken for granted and the work starts anew.
    """

    def __init__(self, target: Path, layout: Layout, key: str, *, overwrite: bool = False):
        self.target, self.layout, self.overwrite = Path(os.path.abspath(target)), layout, overwrite
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.done: set[str] = set()
        headers = hashlib.sha256(b"".join(layout.headers.values())).hexdigest()
        self._key = json.dumps({"key": key, "headers": headers, "boot": _boot_id()})
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        self._log = -1

    def __enter__(self) -> Staging:
        self._check_target()
        try:
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = os.open(self.folder / LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._take_lock()
            if not self._resume():
                self._begin()
            for file in self.layout.sizes:
                self._fds[file] = os.open(self.folder / file, os.O_WRONLY)
        except OSError as error:
            self._close()
            raise disk_error(error, self.folder) from None
        return self

    def _check_target(self) -> None:
        """A target that stands already is replaced only on demand. An empty folder counts as nothing."""
        if os.path.isfile(
            self.target / LOG
        ):  # a kill came right after the rename: it is whole, only its log is left over
            with _told(self.target):
                (self.target / LOG).unlink()
        if self.overwrite or not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir() or any(self.target.iterdir()):
            raise SpoliaError(
                "exists already", where=str(self.target), mend="choose another folder, or allow --overwrite"
            )

    def _check_folder(self) -> None:
        """The staging folder must be ours: with our log, or with nothing but shards whose log was lost."""
        if not os.path.lexists(self.folder) or (self.folder / LOG).exists():
            return
        strange = (
            [f.name for f in self.folder.iterdir() if not _SHARD.match(f.name)] if self.folder.is_dir() else ["a file"]
        )
        if strange:
            what = f"stands where the merge would be prepared, and holds {strange[0]}"
            raise SpoliaError(
                what, where=str(self.folder), mend="move it away, or choose another folder for the result"
            )

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise SpoliaError(
                "another process is writing here", where=str(self.folder), mend="wait for it to end"
            ) from None

    def _resume(self) -> bool:
        text = (self.folder / LOG).read_bytes()
        text = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        lines = text.decode(errors="replace").splitlines()
        if not lines or lines[0] != self._key:
            return False
        if any(
            not (self.folder / f).is_file() or (self.folder / f).stat().st_size != s
            for f, s in self.layout.sizes.items()
        ):
            return False
        os.ftruncate(self._log, len(text))
        self._clear(self.layout.sizes)
        self.done = set(lines[1:])
        return True

    def _begin(self) -> None:
        os.ftruncate(self._log, 0)
        self._clear(())
        for file, size in self.layout.sizes.items():
            fd = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                allocate(fd, size)
                os.pwrite(fd, self.layout.headers[file], 0)
            finally:
                os.close(fd)
        os.write(self._log, (self._key + "\n").encode())

    def _clear(self, keep: Collection[str]) -> None:
        """Remove what an earlier attempt left, except the shards to keep."""
        for entry in self.folder.iterdir():
            if entry.name != LOG and entry.name not in keep:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of tensor `name`. Safe from several threads."""
        place = self.layout.places[name]
        fd, at = self._fds[place.file], place.start + offset
        with _told(self.folder):
            begin = at
            while data:
                wrote = os.pwrite(fd, data, at)
                data, at = data[wrote:], at + wrote
            if hasattr(os, "posix_fadvise"):  # the disk begins to write now, not at the last sync
                os.posix_fadvise(fd, begin, at - begin, os.POSIX_FADV_DONTNEED)

    def mark(self, part: str) -> None:
        """Log that every byte of `part` is written."""
        with self._lock, _told(self.folder):
            os.write(self._log, (part + "\n").encode())
            self.done.add(part)

    def write_text(self, name: str, text: str) -> None:
        with _told(self.folder):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")

    def copy(self, file: Path) -> None:
        with _told(self.folder):
            shutil.copyfile(file, self.folder / file.name)

    def finish(self) -> None:
        """Index, sync, and the rename that makes it exist."""
        if self.layout.index is not None:
            self.write_text("model.safetensors.index.json", self.layout.index)
        with _told(self.folder):
            for fd in self._fds.values():
                os.fsync(fd)
            for entry in self.folder.rglob("*"):
                if entry.is_file() and str(entry.relative_to(self.folder)) not in self._fds:
                    with entry.open("rb") as stream:
                        os.fsync(stream.fileno())
            self._rename()

    def _rename(self) -> None:
        self._check_target()
        old = None
        if os.path.lexists(self.target):
            if self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir()):
                self.target.rmdir()
            else:
                old = self.target.with_name(f"{self.target.name}.replaced-{os.getpid()}")
                os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if old is not None:
                os.rename(old, self.target)
            raise
        (self.target / LOG).unlink()
        parent = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        if old is not None:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()

    def _close(self) -> None:
        for fd in (*self._fds.values(), self._log):
            if fd >= 0:
                os.close(fd)
        self._fds, self._log = {}, -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, folder) from None


def allocate(fd: int, size: int) -> None:
    """Reserve the bytes now, so that a full disk is met before the work."""
    if not hasattr(os, "posix_fallocate"):
        return os.ftruncate(fd, size)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def disk_error(error: OSError, folder: Path) -> SpoliaError:
    cure = {
        errno.ENOSPC: "free some space or choose another disk, then run the same command again: it goes on",
        errno.EDQUOT: "free some space or choose another disk, then run the same command again: it goes on",
        errno.EACCES: "choose a folder you may write to",
        errno.EROFS: "the disk is read-only: choose another folder",
    }.get(error.errno or 0, "check the disk, then run the same command again: it goes on")
    return SpoliaError(f"cannot be written: {error.strerror}", where=str(error.filename or folder), mend=cure)


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def free_bytes(path: Path) -> int:
    """Free space on the disk that would hold `path`."""
    whole = Path(os.path.abspath(path))
    return next((shutil.disk_usage(parent).free for parent in (whole, *whole.parents) if os.path.exists(parent)), 0)

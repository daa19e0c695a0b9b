"""The folder that appears only when it is whole.

A result is prepared in `NAME.partial` beside its destination; a log of finished parts lets the same command go on after a
kill. The log is the mark of a folder as ours: nothing is emptied, replaced or deleted without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from spolia.core.files import shown
from spolia.core.layout import Layout
from spolia.errors import SpoliaError

LOG = ".spolia-progress"
SHARE = ".spolia-share"  # where the processes of one merge agree (core/shared.py)
PROBE = 64  # bytes that are compared with the file before it counts: at both ends of a tensor, and
GRID = 2**20  # at every so manieth byte of the file
_REPLACED = ".spolia-replaced"  # names what is being replaced, from before it is moved until after it is deleted


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
        self._probes: dict[tuple[str, int], bytes] = {}  # by file and place in it
        self._log = -1

    def __enter__(self) -> Staging:
        try:
            self._recover()
            self._check_target()
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = os.open(self.folder / LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            self._take_lock()
            if not self._resume():
                self._begin()
            for file in self.layout.sizes:
                self._fds[file] = os.open(self.folder / file, os.O_WRONLY | os.O_NOFOLLOW)
        except (OSError, ValueError) as error:
            self._close()
            raise disk_error(error, self.folder) from None
        return self

    def _recover(self) -> None:
        """Put right what a kill inside `finish` left. Before the last rename the old result is put back; after it the new
        one is whole, and what it replaced and our marks go.
        """
        for folder, moved in ((self.target, True), (self.folder, False)):
            if folder.is_symlink() or not os.path.isfile(folder / LOG) or not _idle(folder / LOG):
                continue
            if os.path.isfile(folder / _REPLACED):
                name = (folder / _REPLACED).read_text(errors="replace")
                if re.fullmatch(rf"{re.escape(self.target.name)}\.replaced-[0-9]{{1,20}}", name):  # whoever wrote it
                    old = self.target.with_name(name)
                    if moved:
                        _remove(old)
                    elif os.path.lexists(old) and not os.path.lexists(self.target):
                        os.rename(old, self.target)
                (folder / _REPLACED).unlink()
            if moved:
                (folder / LOG).unlink()

    def _check_target(self) -> None:
        """A target that stands already is replaced only on demand. An empty folder counts as nothing."""
        if self.overwrite or not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir() or any(self.target.iterdir()):
            raise SpoliaError(
                "exists already", where=str(self.target), mend="choose another folder, or allow --overwrite"
            )

    def _check_folder(self) -> None:
        """The staging folder must be ours, known by our log, or empty."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            strange = "is no folder"
        elif not os.path.lexists(self.folder / LOG):
            strange = next((f"holds {entry.name}" for entry in sorted(self.folder.iterdir())), "")
        else:
            strange = "" if os.path.isfile(self.folder / LOG) else f"holds {LOG}, which is no file"
        if strange:
            what = f"stands where the merge would be prepared, and {strange}"
            raise SpoliaError(what, where=str(self.folder), mend="move it away, or choose another folder")

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
                _remove(entry)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of tensor `name`. Safe from several threads."""
        place = self.layout.places[name]
        fd, at = self._fds[place.file], place.start + offset
        ends = [0] * (offset == 0) + [max(0, len(data) - PROBE)] * (offset + len(data) == place.slot.nbytes)
        for start in (*ends, *range(-at % GRID, len(data), GRID)):
            self._probes[place.file, at + start] = bytes(data[start : start + PROBE])
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
        """Index, sync, a look at what was written, and the rename that makes it exist."""
        if self.layout.index is not None:
            self.write_text("model.safetensors.index.json", self.layout.index)
        with _told(self.folder):
            for fd in self._fds.values():
                os.fsync(fd)
            for entry in self.folder.rglob("*"):
                if entry.is_file() and str(entry.relative_to(self.folder)) not in self._fds:
                    with entry.open("rb") as stream:
                        os.fsync(stream.fileno())
            self._compare()
            self._rename()

    def _compare(self) -> None:
        """What this process wrote, looked at in places: a disk may take bytes and not keep them."""
        for file, held in itertools.groupby(sorted(self._probes.items()), lambda item: item[0][0]):
            with (self.folder / file).open("rb", buffering=0) as stream:
                for (_, at), wrote in held:
                    if os.pread(stream.fileno(), len(wrote), at) != wrote:
                        os.ftruncate(self._log, 0)  # nothing of it is gone on with
                        mend = f"check the disk, delete {shown(self.folder)}, and run the same command again"
                        what = f"holds other bytes at {at} than were written there"
                        raise SpoliaError(what, where=shown(self.folder / file), mend=mend)

    def _rename(self) -> None:
        self._check_target()
        old, note = None, self.folder / _REPLACED
        if os.path.lexists(self.target):
            if self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir()):
                self.target.rmdir()
            else:
                old = self.target.with_name(f"{self.target.name}.replaced-{os.getpid()}")
                note.write_text(old.name)
                os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if old is not None:
                os.rename(old, self.target)
                note.unlink()
            raise
        parent = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        if old is not None:
            _remove(old)
        for mark in (_REPLACED, LOG):
            (self.target / mark).unlink(missing_ok=True)

    def _close(self) -> None:
        for fd in (*self._fds.values(), self._log):
            if fd >= 0:
                os.close(fd)
        self._fds, self._log = {}, -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _remove(path: Path) -> None:
    """A file, link or folder. What is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _idle(log: Path) -> bool:
    """Whether no living process holds the lock on this log."""
    fd = os.open(log, os.O_RDWR | os.O_NOFOLLOW)  # network folders lock only what may be written
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


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


def disk_error(error: OSError | ValueError, folder: Path) -> SpoliaError:
    """Says why `folder` cannot be written and what to do. A ValueError is of a name that the system cannot hold."""
    if not isinstance(error, OSError):
        mend = "choose a plain name for the result"
        return SpoliaError("is no name that this system can hold", where=shown(folder), mend=mend)
    cure = {
        errno.ENOSPC: "free some space or choose another disk, then run the same command again: it goes on",
        errno.EDQUOT: "free some space or choose another disk, then run the same command again: it goes on",
        errno.EACCES: "choose a folder you may write to",
        errno.EROFS: "the disk is read-only: choose another folder",
    }.get(error.errno or 0, "check the disk, then run the same command again: it goes on")
    return SpoliaError(f"cannot be written: {error.strerror}", where=shown(error.filename or folder), mend=cure)


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def free_bytes(path: Path) -> int:
    """Free space on the disk that would hold `path`."""
    whole = Path(os.path.abspath(path))
    return next((shutil.disk_usage(parent).free for parent in (whole, *whole.parents) if os.path.exists(parent)), 0)

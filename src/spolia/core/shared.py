"""The staging folder of a merge that several processes write together.

All make the same files: sizes and headers are known beforehand, so who comes first does not matter. Shards are opened for
writing only and never read back before the end; a unit is called done once its bytes are on the disk, so that a machine
that fails takes none of them along. The last step is one process's: the first to claim it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from spolia.core.claims import Claims
from spolia.core.layout import Layout
from spolia.core.staging import LOG, SHARE, Staging, disk_error
from spolia.errors import SpoliaError

WAIT = 0.5  # seconds between looks at what the others do


class SharedStaging(Staging):
    """`work` says what is being made, in words that an error can repeat: processes that disagree are refused."""

    def __init__(self, target: Path, layout: Layout, work: Mapping[str, str], *, overwrite: bool = False):
        super().__init__(target, layout, "", overwrite=overwrite)
        self.claims = Claims(self.folder / SHARE)
        self._work = work
        self._written = threading.local()  # `files` that this thread has written to since its last mark()

    def __enter__(self) -> SharedStaging:
        try:
            self._recover()
            self._check_target()
            self._check_folder()
            self.claims.__enter__()
            try:
                self.claims.agree(self._work)
                for file, size in self.layout.sizes.items():
                    fd = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                    self._fds[file] = fd
                    if os.fstat(fd).st_size != size:
                        os.ftruncate(fd, size)  # what others have written stays
                    os.pwrite(fd, self.layout.headers[file], 0)
            except BaseException:
                self.__exit__(None, None, None)
                raise
        except (OSError, ValueError) as error:
            raise disk_error(error, self.folder) from None
        return self

    def _check_target(self) -> None:
        if (self.target / SHARE).is_dir():  # a kill came right after the rename
            self.tidy()
        super()._check_target()

    def _check_folder(self) -> None:
        if (self.folder / SHARE).is_dir() and not self.folder.is_symlink():
            return
        if os.path.lexists(self.folder / LOG):
            what, mend = "was begun by one process alone", "go on without --share, or delete that folder"
            raise SpoliaError(what, where=str(self.folder), mend=mend)
        super()._check_folder()

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self._written.__dict__.setdefault("files", set()).add(self.layout.places[name].file)
        super().write(name, offset, data)

    def mark(self, part: str) -> None:
        """What this thread has written is on the disk when this returns."""
        try:
            for file in self._written.__dict__.pop("files", ()):
                os.fsync(self._fds[file])
        except OSError as error:
            raise disk_error(error, self.folder) from None

    def lead(self) -> None:
        """Returns in one process, which is to finish; in the others it waits, and raises Gone once that is done."""
        while not self.claims.claim("finish"):
            time.sleep(WAIT)
        self._recover()  # of one who died finishing
        self._log = os.open(self.folder / LOG, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._take_lock()

    def finish(self) -> None:
        super().finish()
        self.tidy()

    def tidy(self) -> None:
        """Take our marks out of a target that is whole."""
        self._recover()
        shutil.rmtree(self.target / SHARE, ignore_errors=True)

    def withdraw(self) -> None:
        """Remove the folder: the others finished between our look at the target and our making it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.claims.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

"""One safetensors file written whole or not at all, and read whole: tensors with what they say about themselves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spolia.core.staging import disk_error
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


def write(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A temporary neighbour, flushed to the disk, then renamed over `file`. SpoliaError where the disk cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=file.parent)
        os.close(handle)
        try:
            save_file(held, name, metadata)
            Path(name).chmod(0o644)  # as other files; a temporary one is its owner's alone
            flush(Path(name))
            Path(name).replace(file)
            flush(file.parent)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, file) from None
    except SafetensorError as error:  # as it calls a full disk
        mend = "free some space or check the disk, then run the same command again: it goes on"
        raise SpoliaError(f"cannot be written: {error}", where=str(file), mend=mend) from None
    return file


def read(file: str | os.PathLike[str], mend: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. SpoliaError, with `mend`, for what is no such file."""
    from safetensors import SafetensorError, safe_open

    if os.path.exists(file) and not os.path.isfile(file):  # to open a pipe would wait for ever
        raise SpoliaError("cannot be read: is no regular file", where=str(file), mend=mend)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return opened.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise SpoliaError(f"cannot be read: {error}", where=str(file), mend=mend) from None


def flush(path: Path) -> None:
    """Have the disk hold what was written to `path`, a file or a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

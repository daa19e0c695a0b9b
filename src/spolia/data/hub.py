"""Models of the Hugging Face hub, fetched into its cache by huggingface_hub: `owner/name`, `owner/name@revision`.

Only safetensors, JSON and tokenizer files are asked for: no code, no pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

from spolia.errors import SpoliaError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "README.md",
]
NOT_FILES = ["*/*", "consolidated*"]


def split_id(text: str) -> tuple[str, str | None] | None:
    """`owner/name@revision` as its two parts; None for what is no hub id."""
    name, at, revision = text.partition("@")
    if not _ID.fullmatch(name) or "@" in revision or bool(at) != bool(revision):
        return None
    return name, revision or None


def fetch(text: str) -> Path:
    """The folder of `owner/name` or `owner/name@revision` in the cache, downloaded as far as it is not there yet.

    Raises SpoliaError when huggingface_hub is missing, the hub cannot be reached or has no such model.
    """
    found = split_id(text)
    if found is None:
        raise SpoliaError("is no hub id", where=text, mend="write owner/name or owner/name@revision")
    name, revision = found
    folder = name.partition("/")[2]
    command = f"hf download {name}{f' --revision {revision}' if revision else ''} --local-dir {folder}"
    by_hand = f"download the folder first: `{command}`, then write `{folder}`"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        what = f"`{text}` is no folder here, and huggingface_hub, which would fetch it, is not installed"
        raise SpoliaError(what, where=text, mend=f"pip install 'spolia[hub]'; or {by_hand}") from None
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=NOT_FILES))
    except Exception as error:  # its own errors, those of its transport, and those of the disk
        raise SpoliaError(_reason(text, error), where=text, mend=_cure(error, by_hand)) from None
    if not any(path.glob("*.safetensors")):
        what = f"`{text}` has no *.safetensors on the hub"
        raise SpoliaError(
            what, where=text, mend="choose a release with safetensors, or download its .bin files yourself"
        )
    return path


def _reason(text: str, error: Exception) -> str:
    kind = type(error).__name__
    told = {
        "GatedRepoError": "is gated: its owner must grant you access",
        "RepositoryNotFoundError": "is no folder here and no model that the hub shows you",
        "RevisionNotFoundError": "is on the hub, but not in this revision",
        "HFValidationError": "is no folder here and no name that the hub knows",
    }
    if kind in told:
        return f"`{text}` {told[kind]}"
    if unreachable(error):
        return f"`{text}` is no folder here, not in the cache, and the hub cannot be reached"
    return f"`{text}` could not be fetched: {' '.join(str(error).split())[:160] or kind}"


def _cure(error: Exception, by_hand: str) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return "ask for access on its page, then `hf auth login`"
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"):
        return "check owner, name and revision; for a private model `hf auth login`; for a folder, its path"
    return by_hand if unreachable(error) else f"try again; or {by_hand}"


def unreachable(error: Exception) -> bool:
    """Whether nobody was there to answer; by name, for the library's transport may be requests or httpx."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError", "Timeout"}
    )

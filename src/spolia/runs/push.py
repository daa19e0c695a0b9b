"""`spolia push`: the model of a finished run, file by file, to a repository of the Hugging Face hub.

    upload = prepare("runs/ties-tiny", "owner/name", private=True)      # reads this disk alone
    print(upload)
    address = upload.send()                                             # the only line that sends

| file | |
|---|---|
| weights as safetensors, config, tokenizer, code that a config names, card, recipe, manifest, pictures, licence | sent |
| pickles, checkpoints, logs, links that lead out, whatever else | refused, all at once |
| names that begin with a dot | left out, and told |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spolia.data.hub import split_id, unreachable
from spolia.errors import SpoliaError
from spolia.runs.artefact import files_of, model_of
from spolia.runs.describe import columns
from spolia.runs.sizes import show_size
from spolia.runs.telling import plain

CARD = "README.md"
MOST_LINES = 200  # of a card, in the text form
_READ = 1_000_000  # bytes of a text that is looked through
_PATH = re.compile(r"(?<![\w.:/~-])/[^\s\"',:;\])}>]+")
_SECRET = re.compile(r"\bhf_\w+")


@dataclass(frozen=True)
class Upload:
    """What would be sent. `files` are paths inside `folder` with their bytes, `notes` what a reader should know."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    card: str  # empty where there is none
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        told = {"folder": str(self.folder), "repo": self.repo, "private": self.private, "files": self.files}
        return told | {"bytes": sum(self.files.values()), "card": self.card, "notes": self.notes}

    def to_text(self, width: int | None = None) -> str:
        seen = "private" if self.private else "public, unless your organisation's are private"
        total = f"{len(self.files)}, {show_size(sum(self.files.values()))}"
        rows = [(name, show_size(size)) for name, size in self.files.items()]
        card = self.card.rstrip().split("\n")
        more = [f"… {len(card) - MOST_LINES} more lines"] if len(card) > MOST_LINES else []
        shown = ["", f"card ({CARD})", *(f"  {line}".rstrip() for line in card[:MOST_LINES] + more)]
        head = [f"from   {self.folder}", f"to     {self.repo} ({seen})", f"files  {total}", ""]
        notes = ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return plain("\n".join([*head, columns(("file", "size"), rows, width), *(shown if self.card else []), *notes]))

    def __str__(self) -> str:
        return self.to_text()

    def _card(self) -> dict[str, Any]:
        return {CARD: self.card.encode()} if self.card else {}

    def send(self) -> str:
        """Make the repository where there is none, and send the files as one commit. Returns the address.

        SpoliaError where that cannot be; the same call may be made again.
        """
        hub = library()
        api = hub.HfApi()  # it looks for the token itself
        try:
            address = str(api.create_repo(self.repo, private=self.private or None, exist_ok=True))
            open_to_all = self.private and not api.repo_info(self.repo).private
            if not open_to_all:
                what = {name: str(self.folder / name) for name in self.files} | self._card()
                added = [hub.CommitOperationAdd(name, content) for name, content in what.items()]
                api.create_commit(self.repo, added, commit_message="Upload with spolia push")
        except Exception as error:  # its own errors, those of its transport, and those of the disk
            raise _refusal(error, self.repo) from None
        if open_to_all:
            mend = "make it private on its page, choose another name, or leave --private away; nothing was sent"
            raise SpoliaError("exists, and is public", where=self.repo, mend=mend)
        return address


def push(run: str | os.PathLike[str], repo: str, *, private: bool = False, dry_run: bool = False) -> str | Upload:
    """Send the model of a run folder, or a merged folder, to `repo` (`owner/name`). Returns the repository's address.

    With `dry_run` returns the Upload, and nothing leaves this machine. Nobody is asked: the call is the yes.
    """
    upload = prepare(run, repo, private=private)
    return upload if dry_run else upload.send()


def prepare(run: str | os.PathLike[str], repo: str, *, private: bool = False) -> Upload:
    """The files that make the model, checked. SpoliaError with everything that must not be sent."""
    if (split_id(repo) or ("", "?"))[1] is not None:
        raise SpoliaError(f"`{repo}` names no repository", where="push", mend="write owner/name, as on the hub")
    folder = model_of(Path(run))
    files, aside = files_of(folder)
    card = ""
    if CARD in files:
        card = _named((folder / CARD).read_text(encoding="utf-8", errors="replace"), folder.name, repo)
        files[CARD] = len(card.encode())
    return Upload(folder, repo, private, files, card, _notes(folder, files, card, aside))


def _named(card: str, folder: str, repo: str) -> str:
    """The card, with the model called as on the hub where it went by its folder's name. The file stays as it is."""
    card = card.replace(f"\n# {folder}\n", f"\n# {repo.partition('/')[2]}\n", 1)
    return card.replace(f'.from_pretrained("{folder}")', f'.from_pretrained("{repo}")')


def library() -> Any:
    """huggingface_hub. SpoliaError where it is not there."""
    try:
        import huggingface_hub
    except ImportError:
        raise SpoliaError("huggingface_hub is not installed", where="push", mend="pip install 'spolia[hub]'") from None
    return huggingface_hub


# --- what a reader should know ---------------------------------------------------------------------------------------


def _notes(folder: Path, files: dict[str, int], card: str, aside: list[str]) -> list[str]:
    notes = []
    front = _front(card)
    if not card:
        what = "what the model is made of, the data it saw, its limits and its licence"
        notes.append(f"there is no card: {CARD} in {folder} would say {what}")
    elif "license" not in front:
        notes.append("the card names no licence, and nobody may use a model without: write `license:` between its ---")
    named = front.get("base_model")
    ownerless = [str(name) for name in (named if isinstance(named, list) else [named]) if name and "/" not in str(name)]
    if ownerless:
        told = f"base_model names {', '.join(ownerless)}: on the hub these are other models"
        notes.append(f"{told}; write OWNER/NAME, or take them away")
    code = [name for name in files if name.endswith(".py")]
    if code:
        notes.append(f"{', '.join(code)}: code, which whoever loads the model is asked to trust")
    for name in files:
        told = _paths(folder / name)
        if told:
            notes.append(f"{name} names {'a path' if len(told) == 1 else 'paths'} of this machine: {', '.join(told)}")
    if aside:
        notes.append(f"left out: {', '.join(sorted(aside))}")
    return notes


def _front(card: str) -> dict[str, Any]:
    """What stands between the first two --- of a card; empty where that is no mapping."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}


def _paths(file: Path) -> list[str]:
    """The first absolute paths in a small text file that exist here."""
    if file.suffix not in (".json", ".yaml", ".yml", ".md") or file.stat().st_size > _READ:
        return []
    found = dict.fromkeys(_PATH.findall(file.read_text(encoding="utf-8", errors="replace")))
    return [path for path in found if path.count("/") > 1 and len(path) < 1000 and os.path.lexists(path)][:3]


def _refusal(error: Exception, repo: str) -> SpoliaError:
    """What the hub, its library or the way there said, and what to do. Published are all files or none."""
    kind, said = type(error).__name__, _SECRET.sub("hf_…", " ".join(str(error).split()))[:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = "then give the same command again: what has arrived is not sent twice"
    if kind == "OfflineModeIsEnabled":
        what, mend = "huggingface_hub was told to stay offline", f"unset HF_HUB_OFFLINE, {again}"
    elif unreachable(error):
        what, mend = "the hub cannot be reached", f"check the network, {again}"
    elif kind == "LocalTokenNotFoundError" or status == 401:
        what, mend = "the hub does not know who you are", f"`hf auth login`, or set HF_TOKEN, {again}"
    elif status == 403:
        what, mend = "the hub does not let you write there", "use a token that may write, and a name of your own"
    elif kind == "HFValidationError":
        what, mend = "is no name that the hub takes", "letters, digits, `-`, `_` and `.`: owner/name"
    elif "metadata in README.md" in said:
        what, mend = f"the hub does not take the card: {said}", f"mend the lines between its ---, {again}"
    else:
        what, mend = f"was not sent: {said or kind}", f"wait a little, {again}"
    return SpoliaError(what, where=repo, mend=mend)

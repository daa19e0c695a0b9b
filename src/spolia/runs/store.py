"""The folder of a run: made or taken up again, locked while written, every file whole or absent.

with RunFolder("runs/ties-tiny") as folder:
    resumed = folder.begin(recipe.to_yaml())
    folder.write_json("plan.json", plan.to_dict())
    folder.set_status("running", phase="merge")
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from spolia.core.dist import world
from spolia.core.journal import Journal, Progress
from spolia.errors import SpoliaError
from spolia.runs.environment import environment
from spolia.runs.lock import Lock

State = Literal["running", "done", "interrupted", "failed"]
OWN_FILES = (
    "recipe.yaml", "plan.json", "env.json", "status.json", "metrics.jsonl", "results.json", "figures.json",
    "summary.txt", "report.html", "log.txt",
)  # fmt: skip
OWN_FOLDERS = ("checkpoints", "result")
DIFF_LINES = 30


class RunFolder:
    """A run's folder. Making the object touches nothing; `with` makes the folder and locks it."""

    leads = True  # whether what is written here is what a person will see

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / "result"
        self.most_steps: int | None = None  # of a trial, which then stops
        self._lock = Lock(self.path / ".lock")

    @classmethod
    def default(cls, recipe_name: str) -> RunFolder:
        """`runs/<recipe>` under the current folder: the same command finds the same folder again."""
        return cls(Path("runs") / recipe_name.rpartition("/")[2])

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpoliaError(
                f"cannot be made: {error.strerror}", where=str(self.path), mend="choose another -o"
            ) from None
        self._lock.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def begin(self, recipe: str, *, fresh: bool = False) -> bool:
        """Makes this the folder of `recipe` (resolved text); True when it already was and the run goes on.

        Raises SpoliaError when it holds another recipe (with the difference) or files that are no run's.
        """
        self._lock.check()
        kept = self.path / "recipe.yaml"
        if kept.exists() and not fresh:
            before = kept.read_text(encoding="utf-8")
            if before != recipe:
                mend = "choose another folder with -o, or start over with --fresh (it deletes the run in this folder)"
                raise SpoliaError(_difference(before, recipe), where=str(kept), mend=mend)
            return True
        if not kept.exists():
            strange = sorted(p.name for p in self.path.iterdir() if p.name != ".lock" and p.suffix != ".part")
            if strange:
                what = f"the folder holds other files ({', '.join(strange[:5])}) and no recipe.yaml"
                raise SpoliaError(what, where=str(self.path), mend="choose an empty or new folder with -o")
        self._clear()
        self.write_text("recipe.yaml", recipe)
        return False

    def _clear(self) -> None:
        """Deletes what a run writes, and nothing else. The recipe goes last: a half-cleared folder is still ours."""
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in reversed(OWN_FILES):
            (self.path / name).unlink(missing_ok=True)

    def journal(self, progress: Progress | None = None) -> Journal:
        """Where the loops of this run report."""
        journal = Journal(self.path, progress=progress, together=world()[1] > 1)
        journal.most_steps = self.most_steps
        return journal

    def write_text(self, name: str, text: str) -> Path:
        return write_whole(self.path / name, text)

    def write_json(self, name: str, value: Any) -> Path:
        return write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """The value in `name`, None where it does not exist."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write_env(self, *, seed: int, seeds: list[int], command: str = "", device: str = "cpu") -> Path:
        return self.write_json("env.json", environment(seed=seed, seeds=seeds, command=command, device=device))

    def set_status(self, state: State, *, phase: str = "", message: str = "", **more: Any) -> dict[str, Any]:
        """Writes status.json. `more` may hold `seconds` (per phase, added to those known) and `peak_memory_bytes`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        known = self.read_json("status.json") or {"started": now, "seconds": {}, "peak_memory_bytes": None, "phase": ""}
        status = {
            "state": state,
            "phase": phase or known["phase"],
            "started": known["started"],
            "finished": None if state == "running" else now,
            "seconds": known["seconds"] | more.pop("seconds", {}),
            "peak_memory_bytes": more.pop("peak_memory_bytes", known["peak_memory_bytes"]),
            "message": message,
        }
        assert not more, f"status.json has no {sorted(more)}"
        self.write_json("status.json", status)
        self.log(" ".join(part for part in (state, phase, message) if part))
        return status

    def ledger(
        self,
        name: str,
        *,
        data: dict[str, str],
        seeds: list[int],
        rows: list[dict[str, Any]],
        notes: str,
        average: bool = True,
    ) -> dict[str, Any]:
        """What results.json holds: what was found, by which command, when and where. `average`: tasks have a mean."""
        env = self.read_json("env.json") or {}
        return ({} if average else {"average": False}) | {
            "name": name,
            "command": env.get("command", ""),
            "commit": (env.get("git") or {}).get("commit"),
            "date": self.read_json("status.json")["started"][:10],
            "machine": env.get("machine", {}),
            "versions": env.get("versions", {}),
            "data": data,
            "seeds": seeds,
            "rows": rows,
            "notes": notes,
        }

    def append_metrics(self, **row: Any) -> None:
        """One line of metrics.jsonl, for what is measured outside a loop. A half-written last line is cut off first."""
        file = self.path / "metrics.jsonl"
        raw = file.read_bytes() if file.exists() else b""
        if raw and not raw.endswith(b"\n"):
            os.truncate(file, raw.rfind(b"\n") + 1)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")

    def log(self, line: str) -> None:
        """One dated line of log.txt, which says what was done and warned of, in every sitting."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")


def write_json(file: Path, value: Any) -> Path:
    return write_whole(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(file: Path, text: str) -> Path:
    """Writes `file` whole or not at all: a neighbour, flushed to the disk, then renamed over it."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def _difference(before: str, after: str) -> str:
    lines = list(
        difflib.unified_diff(before.splitlines(), after.splitlines(), "the run here", "this recipe", n=1, lineterm="")
    )
    more = [f"… {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else []
    return "\n".join(["holds a run of another recipe", *("    " + line for line in lines[:DIFF_LINES] + more)])

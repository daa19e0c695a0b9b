"""Several mergekit recipes in one file: each document with a `name` is a model that the others may use.

    name: mild                      # first document
    merge_method: slerp
    ...
    ---
    merge_method: ties              # the document without a name is the result
    models: [{model: mild}, {model: ./code}]

Documents run in the order in which they need each other. All are checked before the first is merged: what is not there
yet is stood in for by headers alone. Models in between go to `OUT.parts`; the same command goes on after a kill and
leaves out what is finished. The folder is removed at the end unless `x-spolia: {keep_intermediate: true}`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError
from spolia.runs.mergekit import read_mergekit
from spolia.runs.merging import Prepared, describe, key_of, prepare, run_merge
from spolia.runs.plan import Plan
from spolia.runs.request import MergeRequest
from spolia.runs.yamlmarks import Marked

_REFERENCES = {"model", "base_model", "path", "source", "tokenizer_source"}  # keys whose value names a model
PARTS = ".parts"
_NAME = re.compile(r"[^+\x00-\x1f]{1,60}")  # names of folders; letters of any alphabet
_MOST = 100  # documents


@dataclass(frozen=True)
class Document:
    """One recipe of the file. The result's name is empty."""

    name: str
    marked: Marked
    uses: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """The documents of a file in the order of work, the result last, and how to merge them."""

    documents: tuple[Document, ...]
    folder: Path
    text: str
    seed: int | None = None
    max_shard_size: int = 5_000_000_000
    chunk_memory: int = 1_000_000_000
    threads: int | None = None

    def request(self, document: Document, models: dict[str, Path]) -> MergeRequest:
        """What the document asks for; `models` are those of the documents before it."""
        request = read_mergekit(document.marked, folder=self.folder, named=models)
        if not document.name:
            request.recipe = self.text
        return request if self.seed is None else replace(request, seed=self.seed)

    def plan(self, out: Path) -> Plan:
        """All documents as one plan, from headers alone."""
        with tempfile.TemporaryDirectory(prefix="spolia-") as scratch:
            plans = []
            for document, prepared, target in self._rehearse(Path(scratch), out):
                plan = describe(prepared, target, self.chunk_memory, self.threads)
                for phase in plan.phases:
                    phase.name = f"{phase.name} {document.name or out.name}"
                plan.inputs = [given for given in plan.inputs if Path(scratch) not in Path(given.path).parents]
                plans.append(plan)
        last = plans[-1]
        return replace(
            last,
            title=f"{len(plans)} merges, one from the other: {last.title}",
            phases=[phase for plan in plans for phase in plan.phases],
            inputs=[given for plan in plans for given in plan.inputs],
            bytes_in=sum(plan.bytes_in for plan in plans),
            bytes_out=sum(plan.bytes_out for plan in plans),
            disk_needed_bytes=sum(plan.disk_needed_bytes for plan in plans),
            peak_memory_bytes=max(plan.peak_memory_bytes for plan in plans),
            seconds=round(sum(plan.seconds for plan in plans), 1),
            warnings=list(dict.fromkeys(warning for plan in plans for warning in plan.warnings)),
            notes=[*last.notes, f"models in between go to `{out.name}{PARTS}`, which is removed at the end"],
        )

    def run(self, out: Path, *, overwrite: bool, progress: Any, card: Callable[[Prepared, str], str] | None) -> Path:
        """Merge every document; the result goes to `out`."""
        with tempfile.TemporaryDirectory(prefix="spolia-") as scratch:
            for _ in self._rehearse(Path(scratch), out):
                pass
        work, models = out.with_name(out.name + PARTS), dict[str, Path]()
        options: dict[str, Any] = {
            "max_shard_size": self.max_shard_size, "chunk_memory": self.chunk_memory, "threads": self.threads,
            "progress": progress, "card": card,
        }  # fmt: skip
        for document in self.documents[:-1]:
            request, target = self.request(document, models), work / document.name
            models[document.name] = target
            seal, key = work / f"{document.name}.key", key_of(prepare(request, max_shard_size=self.max_shard_size))
            if target.is_dir() and seal.is_file() and seal.read_text() == key:
                continue
            run_merge(request, target, overwrite=True, **options)
            seal.write_text(key)
        last = self.documents[-1]
        run_merge(self.request(last, models), out, overwrite=overwrite, **options)
        if work.is_dir() and not (last.marked.value.get("x-spolia") or {}).get("keep_intermediate"):
            shutil.rmtree(work)
        return out

    def _rehearse(self, scratch: Path, out: Path) -> Iterator[tuple[Document, Prepared, Path]]:
        """Every document, checked, with stand-ins in `scratch` for those before it."""
        models: dict[str, Path] = {}
        for document in self.documents:
            target = out.with_name(out.name + PARTS) / document.name if document.name else out
            prepared = prepare(self.request(document, models), target, self.max_shard_size)
            yield document, prepared, target
            if document.name:
                models[document.name] = _stand_in(prepared, scratch / document.name)


def _stand_in(prepared: Prepared, folder: Path) -> Path:
    """A model folder with headers, config and tokenizer, whose weights are holes that take no space."""
    folder.mkdir()
    for file, header in prepared.layout.headers.items():
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(prepared.layout.sizes[file])
    if prepared.layout.index is not None:
        (folder / "model.safetensors.index.json").write_text(prepared.layout.index)
    for file in prepared.beside.copied:
        shutil.copyfile(file, folder / file.name)
    for name, text in prepared.beside.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def arrange(documents: list[Marked]) -> tuple[Document, ...]:
    """The documents in the order of work, the result last. SpoliaError with every name that is wrong, and for circles."""
    if len(documents) > _MOST:
        mend = f"at most {_MOST}: merge in several steps"
        raise SpoliaError(f"{len(documents)} documents in one file", where=documents[0].name, mend=mend)
    problems, named = Problems(), dict[str, Marked]()
    unnamed: list[Marked] = []
    for marked in documents:
        name = marked.value.get("name")
        if name is None:
            unnamed.append(marked)
        elif not isinstance(name, str) or Path(name).name != name or name in ("", "..") or not _NAME.fullmatch(name):
            what = f"`{str(name)[:60]}` cannot be a name"
            problems.add(marked.where(("name",)), what, "use letters, digits, `-` and `_`")
        elif name in named:
            first = named[name].where(("name",)).rpartition(" ")[0]
            problems.add(marked.where(("name",)), f"two documents are called `{name}`, first in {first}", "rename one")
        else:
            named[name] = marked
    uses = {name: _uses(marked.value, named) for name, marked in named.items()}
    result = _result(unnamed, named, uses, problems)
    problems.raise_if_any()
    done: dict[str, Document] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join(f"`{step}`" for step in (*path[path.index(name) :], name))
            where = named[name].where(("name",))
            raise SpoliaError(f"the documents need each other in a circle: {circle}", where=where, mend="break it")
        if name in done:
            return
        for other in uses[name]:
            visit(other, (*path, name))
        done[name] = Document(name, named[name], uses[name])

    last = _uses(result.value, named)
    for name in last:
        visit(name, ())
    return (*done.values(), Document("", result, last))


def _result(
    unnamed: list[Marked], named: dict[str, Marked], uses: dict[str, tuple[str, ...]], problems: Problems
) -> Marked:
    """The document without a name; else the only one that no other uses."""
    if len(unnamed) > 1:
        where = unnamed[1].where()
        problems.add(where, f"{len(unnamed)} documents have no name", "one may: the result. Give the others a `name:`")
    if unnamed:
        return unnamed[0]
    used = {other for name, others in uses.items() for other in others if other != name}
    free = [marked for name, marked in named.items() if name not in used]
    if len(free) != 1:
        names = ", ".join(f"`{name}`" for name in named if name not in used)
        what = f"which of {names} is the result?" if free else "the documents need each other in a circle"
        problems.add(next(iter(named.values())).where(("name",)), what, "leave out the `name` of the result")
    return free[0] if free else next(iter(named.values()))


def _uses(value: Any, named: dict[str, Marked]) -> tuple[str, ...]:
    """Names of documents that stand where a model does, in the order of the file."""
    found: dict[str, None] = {}

    def walk(item: Any, key: str = "") -> None:
        if isinstance(item, dict):
            for inner, below in item.items():
                walk(below, inner)
        elif isinstance(item, list):
            for below in item:
                walk(below)
        elif key in _REFERENCES and isinstance(item, str):
            name = item.partition("+")[0]
            if name in named:
                found[name] = None

    walk(value)
    return tuple(found)

"""The hostile corpus: folders, indexes, links, pipes, devices, names, paths, disks, and files that change while read.

Every case spoils a sound world of two models and merges them through the public door. `REFUSED` ends with place, fault
and cure, and leaves nothing that looks whole; `HARMLESS` gives the average as if nothing were. Neither hangs, runs
anything or touches what was there before.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spolia

Spoil = Callable[[Path], Any]  # changes the world; may return the call to make in place of a plain merge
EMBED, SHARDS = "model.embed_tokens.weight", [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
INDEX, LOG = "model.safetensors.index.json", ".spolia-progress"
PLACES = {EMBED: SHARDS[0], "model.layers.0.w.weight": SHARDS[1], "n": SHARDS[1]}


def put(path: str, content: str | bytes) -> Spoil:
    return lambda w: (w / path).write_bytes(content.encode() if isinstance(content, str) else content) and None


def link(path: str, to: str) -> Spoil:
    def spoil(w: Path) -> None:
        shutil.rmtree(w / path) if (w / path).is_dir() else (w / path).unlink(missing_ok=True)
        (w / path).symlink_to(to)

    return spoil


def special(path: str, kind: str) -> Spoil:
    def spoil(w: Path) -> None:
        (w / path).parent.mkdir(exist_ok=True)
        (w / path).unlink(missing_ok=True)
        if kind == "folder":
            (w / path).mkdir()
        else:
            os.mknod(w / path, stat.S_IFIFO if kind == "pipe" else stat.S_IFSOCK)

    return spoil


def both(*acts: Spoil) -> Spoil:
    return lambda w: [act(w) for act in acts][-1]


def without(*names: str) -> Spoil:
    return lambda w: [(w / "b" / name).unlink() for name in names] and None


def index(places: Any) -> Spoil:
    return put(f"b/{INDEX}", json.dumps({"weight_map": places}))


def renamed(old: str, new: str) -> Spoil:
    return lambda w: (w / old).rename(w / new) and None


def copied(old: str, new: str) -> Spoil:
    def spoil(w: Path) -> None:
        (w / new).parent.mkdir(exist_ok=True)
        shutil.copy(w / old, w / new)

    return spoil


def merge(experts: Callable[[Path], Any], **options: Any) -> Spoil:
    return lambda w: lambda: spolia.merge(experts(w), **({"out": w / "out", "threads": 1} | options))


def called(name: str) -> Spoil:
    """Expert b under another name."""
    return both(renamed("b", name), merge(lambda w: [w / "a", w / name]))


def target(name: str, **options: Any) -> Spoil:
    return lambda w: lambda: spolia.merge([w / "a", w / "b"], out=w / name, threads=1, **options)


def nested(w: Path) -> Callable[[], Any]:
    """A path near the system's limit."""
    deep = w
    while len(str(deep)) < 3700:
        deep = deep / ("d" * 200)
    shutil.copytree(w / "b", deep / "b")
    return lambda: spolia.merge([w / "a", deep / "b"], out=w / "out", threads=1)


class Meddler:
    """A progress bar that changes the world in the middle of the work."""

    def __init__(self, act: Callable[[], object]):
        self.act, self.calls = act, 0

    def start(self, *_: object) -> None: ...
    def finish(self) -> None: ...
    def advance(self, *_: object, **__: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.act()


def meanwhile(act: Spoil) -> Spoil:
    return lambda w: (
        lambda: spolia.merge([w / "a", w / "b"], out=w / "out", threads=1, progress=Meddler(lambda: act(w)))
    )


def twin(w: Path) -> None:
    """A shard makes way for one of the same size and time."""
    shard, other = w / "b" / SHARDS[0], w / "twin"
    shutil.copy(w / "a" / SHARDS[0], other)
    os.utime(other, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
    other.replace(shard)


def failing(name: str, number: int, only: str = "") -> Spoil:
    """A system call that fails: for paths that contain `only`, where it is said."""

    def spoil(w: Path) -> Callable[[], Any]:
        def call() -> Any:
            real = getattr(os, name)

            def fail(*args: Any, **others: Any) -> Any:
                if only and only not in str(args[0]):
                    return real(*args, **others)
                raise OSError(number, os.strerror(number), *([str(args[0])] if only else []))

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(os, name, fail)
                return spolia.merge([w / "a", w / "b"], out=w / "out", threads=1)

        return call

    return spoil


def no_space(w: Path) -> Callable[[], Any]:
    def call() -> Any:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            return spolia.merge([w / "a", w / "b"], out=w / "out", threads=1)

    return call


# fmt: off
INDEXES: dict[str, Spoil] = {
    **{f"index {text[:16]!r}": put(f"b/{INDEX}", text) for text in (
        b"", b"{", b"null", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"weight_map":' + b"9" * 5000 + b"}", b"{}")},
    **{f"index map {str(m)[:40]}": index(m) for m in (
        None, 5, [], "x", {}, {EMBED: None}, {EMBED: [SHARDS[0]]}, {EMBED: {}})},
    **{f"index to {to[:20]!r}, {len(to)} long": index(PLACES | {EMBED: to}) for to in (
        "", ".", "..", "/etc/passwd", "../a/" + SHARDS[0], "./" + SHARDS[0], "x/../" + SHARDS[0], "gone.safetensors",
        INDEX, "a\0b", "\ud800", "x" * 300, "x" * 5000, "~", "*.safetensors", "config.json", "/dev/zero", "//host/x",
        SHARDS[1])},
    "index without a tensor": index({EMBED: SHARDS[0]}),
    "index with one more": index(PLACES | {"x": SHARDS[0]}),
    "two indexes, neither the usual": both(renamed(f"b/{INDEX}", "b/x.safetensors.index.json"), put(
        "b/y.safetensors.index.json", "{}")),
    "index by its own path": merge(lambda w: [w / "a", w / "b" / INDEX]),
}
SHARDED: dict[str, Spoil] = {
    "a tensor in two shards": both(without(INDEX), copied(f"b/{SHARDS[0]}", "b/x.safetensors")),
    "one part of two": without(INDEX, SHARDS[1]),
    "two parts, the index says three": both(
        index(PLACES | {EMBED: "model-00003-of-00003.safetensors"}), renamed(f"b/{SHARDS[0]}", "b/x.safetensors")),
    **{f"part {part} alone": both(without(INDEX, SHARDS[1]), renamed(f"b/{SHARDS[0]}", f"b/model-{part}.safetensors"))
       for part in ("00001-of-00003", "00003-of-00003", "1-of-999999999")},
    "part 0 of 2": both(without(INDEX), renamed(f"b/{SHARDS[0]}", "b/model-00000-of-00002.safetensors")),
    "a part as a file": merge(lambda w: [w / "a", w / "b" / SHARDS[0]]),
    "a pickled part alone": both(without(INDEX, *SHARDS), put("b/pytorch_model-00001-of-00002.bin", "x")),
    "shards exchanged": both(
        renamed(f"b/{SHARDS[0]}", "x"), renamed(f"b/{SHARDS[1]}", f"b/{SHARDS[0]}"), renamed("x", f"b/{SHARDS[1]}")),
    "a shard of the other model": copied(f"a/{SHARDS[0]}", f"b/{SHARDS[1]}"),
    "nothing in it": lambda w: (shutil.rmtree(w / "b"), (w / "b").mkdir())[-1],
    "no folder": lambda w: shutil.rmtree(w / "b"),
}
KINDS: dict[str, Spoil] = {
    **{f"{kind} as {name}": special(f"b/{name}", kind) for kind in ("folder", "pipe", "socket")
       for name in (SHARDS[0], INDEX, "model.safetensors", "config.json")},
    **{f"link {name} to {told}": link(f"b/{name}", to or name) for name in (SHARDS[0], INDEX, "config.json")
       for told, to in (("itself", ""), ("a null device", "/dev/null"), ("an endless device", "/dev/zero"),
                        ("a terminal", "/dev/tty"), ("memory", "/proc/self/mem"), ("nothing", "gone"))},
    **{f"link model.safetensors to {told}": link("b/model.safetensors", to) for told, to in (
        ("itself", "model.safetensors"), ("an endless device", "/dev/zero"), ("memory", "/proc/self/mem"))},
    **{f"{kind} as the expert x{end}": both(special(f"x{end}", kind), merge(lambda w, end=end: [w / "a", w / f"x{end}"]))
       for kind, end in (("pipe", ".safetensors"), ("socket", ".safetensors"), ("pipe", ".bin"), ("pipe", ""))},
    "two links that chase each other": both(link(f"b/{SHARDS[0]}", "x"), link("b/x", SHARDS[0])),
    "the folder a link to itself": link("b", "b"),
    "the folder a link to nothing": link("b", "a/../b2"),
    "a chain of fifty links": lambda w: [link(f"b/{SHARDS[0] if k == 0 else k}", str(k + 1))(w) for k in range(50)][-1],
}
PATHS: dict[str, Spoil] = {
    **{f"expert at {p[:20]!r}": merge(lambda w, p=p: [w / "a", p]) for p in (
        "", ".", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "a\0b", "\ud800", "x" * 300, "x/" * 2500,
        "o/" + "x" * 300, "p/" + "x" * 5000, "~nobody-of-this-name/x", "+", "a+b+c", "+x", "x+", "o/n@", "o/n@m@k",
        "http://127.0.0.1:9/x", "file:///etc", "o\\n", "\x1b[2J", "\u202egnp", "*", "$HOME", "C:\\x")},
    **{f"result at {n[:12]!r}": target(n) for n in ("\0", "x\0y", "\ud800", "x" * 300, "x/" * 2500, "a", ".", "..")},
    "result under a link to itself": both(link("loop", "loop"), target("loop/x")),
    "result a link to itself": both(link("loop", "loop"), target("loop")),
    "result under a file": target("a/config.json/x"),
    "result where a pipe stands": both(special("p", "pipe"), target("p")),
    "result in the place of an input": target("b", overwrite=True),
    "result above the inputs": target(".", overwrite=True),
}
STAGING: dict[str, Spoil] = {
    "staging is a link to an input": both(link("out.partial", "a"), target("out")),
    "staging is a link to nothing": both(link("out.partial", "gone"), target("out")),
    "staging is a pipe": both(special("out.partial", "pipe"), target("out")),
    "staging is a file": both(put("out.partial", "x"), target("out")),
    "staging is the user's folder of weights": copied(f"a/{SHARDS[0]}", "out.partial/model.safetensors"),
    "staging is the user's shards": copied(f"a/{SHARDS[0]}", f"out.partial/{SHARDS[0]}"),
    "our log a link to a file": both(special("out.partial", "folder"), link(f"out.partial/{LOG}", "../a/config.json")),
    "our log a pipe": special(f"out.partial/{LOG}", "pipe"),
    "our log a folder": both(special("out.partial", "folder"), special(f"out.partial/{LOG}", "folder")),
    "staging a link to a folder with our log": both(put(f"a/{LOG}", "x\n"), link("out.partial", "a")),
}
DISKS: dict[str, Spoil] = {
    **{f"{name} fails with {errno.errorcode[n]}": failing(name, n) for name, n in (
        ("posix_fallocate", errno.ENOSPC), ("posix_fallocate", errno.EFBIG), ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EDQUOT), ("pwrite", errno.EIO), ("pwrite", errno.EROFS), ("write", errno.ENOSPC),
        ("fsync", errno.EIO), ("rename", errno.EXDEV), ("rename", errno.EACCES), ("mkdir", errno.EACCES),
        ("mkdir", errno.EROFS), ("preadv", errno.EIO), ("preadv", errno.ESTALE))},
    **{f"open of {what} fails with {errno.errorcode[n]}": failing("open", n, only) for what, only, n in (
        ("an input", f"b/{SHARDS[0]}", errno.EACCES), ("an input", f"b/{SHARDS[0]}", errno.EIO),
        ("an input", f"b/{SHARDS[0]}", errno.EMFILE), ("a config", "b/config.json", errno.EACCES),
        ("an index", f"b/{INDEX}", errno.EIO), ("the result", "out.partial", errno.EACCES),
        ("the result", "out.partial", errno.EROFS), ("the result", "out.partial", errno.ENOSPC))},
    "no space left": no_space,
}
MEANWHILE: dict[str, Spoil] = {f"meanwhile {what}": meanwhile(act) for what, act in {
    "a shard is cut": lambda w: os.truncate(w / "b" / SHARDS[0], 50),
    "a shard is emptied": lambda w: os.truncate(w / "b" / SHARDS[1], 0),
    "a shard grows": lambda w: os.truncate(w / "b" / SHARDS[0], 5000),
    "a shard is deleted": lambda w: (w / "b" / SHARDS[1]).unlink(),
    "a shard is replaced": lambda w: (shutil.copy(w / "a" / SHARDS[0], w / "x"),
                                      (w / "x").replace(w / "b" / SHARDS[0])),
    "a shard is replaced by its twin": twin,
    "a shard is touched": lambda w: os.utime(w / "a" / SHARDS[0], ns=(1, 1)),
    "a shard becomes a link": link(f"b/{SHARDS[0]}", SHARDS[0]),
    "a shard becomes a pipe": special(f"b/{SHARDS[0]}", "pipe"),
    "the folder is deleted": lambda w: shutil.rmtree(w / "b"),
    "the result appears": lambda w: shutil.copytree(w / "base", w / "out"),
    "the staging folder goes": lambda w: shutil.rmtree(w / "out.partial"),
    "the staged shard goes": lambda w: (w / "out.partial/model.safetensors").unlink(),
}.items()}
REFUSED = INDEXES | SHARDED | KINDS | PATHS | STAGING | DISKS | MEANWHILE

NAMES = (" ", "a b", "-rf", "b+c", "b@main", "b\nc", "b\x1b[2J", "\u0431\u0430\u0437\u0430", "\U0001f4a0",
         "\u202egnp", "e\u0301", "x" * 255, "%s{0}`|*", "b.safetensors", "b.bin", "\udcff")
HARMLESS: dict[str, Spoil] = {
    "a second index": put("b/other.safetensors.index.json", "{}"),
    "a stray shard": copied(f"b/{SHARDS[0]}", "b/x.safetensors"),
    "no index": without(INDEX),
    "a shard that is a link": both(renamed(f"b/{SHARDS[0]}", "b/blob"), link(f"b/{SHARDS[0]}", "blob")),
    "a link into its own parent": link("b/up", ".."),
    **{f"{kind} as {name}": special(f"b/{name}", kind) for kind in ("folder", "pipe")
       for name in ("tokenizer.json", "adapter_config.json", "README.md")},
    **{f"expert called {n[:12]!r}": called(n) for n in NAMES},
    **{f"result at {n!r}": target(n) for n in ("\n", "\u0431", "deep/er/out", "a/x")},
    "nested folders of 4 kB": nested,
    "an empty staging folder": special("out.partial", "folder"),
    "seed 2^70": target("out", seed=2**70), "seed below zero": target("out", seed=-1),
    **{f"meanwhile {what}": meanwhile(act) for what, act in {
        "the config turns into junk": put("a/config.json", "{"),
        "the config turns into a list": put("a/config.json", "[]"),
    }.items()},
}
# fmt: on


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_spoilt_worlds_are_refused(case: str, world: Path, judge: Callable[..., None], monkeypatch: Any) -> None:
    monkeypatch.chdir(world)
    judge(REFUSED[case], world, fine=False, meddled=case in MEANWHILE)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_odd_worlds_are_merged(case: str, world: Path, judge: Callable[..., None]) -> None:
    judge(HARMLESS[case], world, fine=True, meddled=case.startswith("meanwhile"))


def test_there_are_enough() -> None:
    tables = (INDEXES, SHARDED, KINDS, PATHS, STAGING, DISKS, MEANWHILE)
    assert len(REFUSED) == sum(map(len, tables)) >= 140 and len(HARMLESS) >= 30

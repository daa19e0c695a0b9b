"""What the hostile corpus shares: a sound world to spoil, and a call that may be refused, and only that, in time."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spolia
from spolia.errors import SpoliaError

SECONDS = 10
EMBED, BLOCK = "model.embed_tokens.weight", "model.layers.0.w.weight"
TOKENIZER = {
    "added_tokens": [{"id": 3, "content": "<x>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4, "eos_token_id": 1, "num_hidden_layers": 1,
}  # fmt: skip


def tensors(k: int) -> dict[str, torch.Tensor]:
    """Numbers whose halves are exact."""
    return {EMBED: torch.arange(8.0).reshape(4, 2) + 4 * k, BLOCK: torch.ones(3, 2) * k, "n": torch.tensor(3)}


def model(folder: Path, k: int) -> None:
    """Two shards with an index, config and tokenizer."""
    folder.mkdir()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {EMBED: files[0], BLOCK: files[1], "n": files[1]}
    for file in files:
        save_file({n: t for n, t in tensors(k).items() if places[n] == file}, folder / file)
    beside = {"model.safetensors.index": {"weight_map": places}, "config": CONFIG, "tokenizer": TOKENIZER}
    for name, value in (beside | {"tokenizer_config": {}, "generation_config": {"eos_token_id": 1}}).items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a and b; and `merged`, an emr merge with masks of a and b. Not to be changed."""
    root = tmp_path_factory.mktemp("sound")
    for k, name in enumerate(("base", "a", "b")):
        model(root / name, k)
    spolia.merge({"a": root / "a", "b": root / "b"}, base=root / "base", method="emr", out=root / "merged", threads=1)
    return root


@pytest.fixture
def world(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound` to spoil."""
    return shutil.copytree(sound, tmp_path / "world")


@pytest.fixture(scope="session")
def judge(told: Callable[..., str | None]) -> Callable[..., None]:
    """judge(spoil, world, fine): spoils the world and merges, by the call that `spoil` returns or a plain one.

    If `fine`, the result must be the average of a and b; else a refusal and no new model anywhere. Nothing may have run,
    and what stood there must be as it was, unless the case itself changes it on the way (`meddled`).
    """
    expected = {n: (t + tensors(2)[n]) / 2 if t.is_floating_point() else t for n, t in tensors(1).items()}

    def models(world: Path) -> set[Path]:
        return {f.parent for f in world.rglob("spolia.json") if not f.parent.name.endswith(".partial")}

    def files(world: Path) -> dict[Path, tuple[int, int, int]]:
        found = {f: f.lstat() for f in world.rglob("*") if not f.is_dir() and not f.parent.name.startswith("out")}
        return {f: (s.st_mode, s.st_size, s.st_mtime_ns) for f, s in found.items()}

    def judge(spoil: Callable[[Path], Any], world: Path, fine: bool, meddled: bool = False) -> None:
        call, made, before = spoil(world), list[Path](), models(world)
        old = {} if meddled else files(world)
        if not callable(call):
            call = lambda: spolia.merge([world / "a", world / "b"], out=world / "out", threads=1)  # noqa: E731
        message = told(lambda: made.append(Path(call())))
        assert not (world / "ran").exists() and old.items() <= files(world).items()
        assert (message is None) == fine, message or "went through"
        if message is None:
            found = {name: t for file in made[0].glob("*.safetensors") for name, t in load_file(file).items()}
            assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())
        else:
            assert models(world) == before

    return judge


class Hung(BaseException):
    """Not an Exception, so that no handler in the code takes it for a fault of the input."""


@pytest.fixture(scope="session")
def told() -> Callable[..., str | None]:
    """told(call) -> the refusal of `call`, which must name place, fault and cure; None when it went through."""

    def ring(*_: object) -> None:
        raise Hung(f"no answer after {SECONDS} s")

    def told(call: Callable[[], Any]) -> str | None:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            call()
        except SpoliaError as error:
            assert error.problems and all(p.where and p.what and p.mend for p in error.problems), error.problems
            assert str(error).replace("\n", "").isprintable() and len(str(error)) < 20_000
            return str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return None

    return told

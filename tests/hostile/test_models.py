"""The hostile corpus: pickles that would run code, and adapters whose config or tensors lie.

Whatever a pickle tries, it tries to make the file `ran`: none may stand there afterwards.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

import spolia

UNSEEN = {"NaN", "A not a number"}  # faults of the numbers, which `inspect` tells as findings
Told = Callable[..., str | None]


def ran(marker: Path) -> str:
    return f"open({str(marker)!r},'w')"


def archive(pkl: bytes, name: str = "archive/data.pkl", how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as file:
        file.writestr(name, pkl)
        file.writestr("archive/version", b"3\n")
    return out.getvalue()


def saved(value: object, old: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=not old)
    return out.getvalue()


class Runs:
    """Runs `call(*args)` when it is unpickled without care."""

    def __init__(self, call: Any, *args: Any):
        self.act = call, args

    def __reduce__(self) -> Any:
        return self.act


def _text(marker: Path, protocol: bytes) -> bytes:
    return b"%s(S'%s'\n" % (protocol, ran(marker).encode().replace(b"'", b'"'))


# fmt: off
PICKLES: dict[str, Callable[[Path], bytes]] = {
    "exec": lambda m: saved({"w": Runs(exec, ran(m))}),
    "eval": lambda m: saved({"w": Runs(eval, ran(m))}),
    "system": lambda m: saved(Runs(os.system, f"touch {m}")),
    "popen": lambda m: saved([Runs(subprocess.Popen, ["touch", str(m)])]),
    "open": lambda m: saved({"w": Runs(open, str(m), "w")}),
    "mkdir": lambda m: saved({"w": Runs(os.mkdir, str(m))}),
    "import": lambda m: saved({"w": Runs(__import__, "antigravity")}),
    "getattr": lambda m: saved({"w": Runs(getattr, "x", "upper")}),
    "as a key": lambda m: saved({"w": torch.ones(1), ("k", Runs(exec, ran(m))): 1}),
    "below state_dict": lambda m: saved({"state_dict": {"w": torch.ones(1), "x": Runs(exec, ran(m))}}),
    "in the old form": lambda m: saved({"w": Runs(exec, ran(m))}, old=True),
    "a bare pickle": lambda m: pickle.dumps(Runs(exec, ran(m))),
    **{f"protocol {n}": lambda m, n=n: pickle.dumps(Runs(exec, ran(m)), n) for n in range(6)},
    "protocol 0 in an archive": lambda m: archive(_text(m, b"cbuiltins\nexec\n") + b"tR."),
    "opcode INST": lambda m: archive(_text(m, b"") + b"ibuiltins\nexec\n."),
    "opcode OBJ": lambda m: archive(b"(cbuiltins\nexec\n" + _text(m, b"")[1:] + b"o."),
    "opcode EXT1": lambda m: archive(b"\x80\x02\x82\x01."),
    "opcode PERSID": lambda m: archive(b"Pfoo\n."),
    "opcode BUILD": lambda m: archive(b"\x80\x02ccollections\nOrderedDict\n)R}X\x08\x00\x00\x00__class__K\x01sb."),
    "torch's own load": lambda m: archive(b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR."),
    "a module": lambda m: saved(torch.nn.Linear(1, 1)),
    "an empty stack": lambda m: archive(b"."),
    "no end": lambda m: archive(b"\x80\x02}"),
    "a text of 2^63 bytes": lambda m: archive(b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x."),
    "a number of 2^31 bytes": lambda m: archive(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a memo of 2^31 places": lambda m: archive(b"\x80\x02}r\xff\xff\xff\x7f."),
    "20 000 lists deep": lambda m: archive(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."),
    "a list in itself": lambda m: archive(b"\x80\x02]q\x00h\x00a."),
    "a mapping in itself": lambda m: archive(b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."),
    "squeezed 1000 times": lambda m: archive(b"\0" * 10**6, how=zipfile.ZIP_DEFLATED),
    "no pickle in the archive": lambda m: archive(b"", "archive/x"),
    "a path out of the archive": lambda m: archive(b"}.", "../data.pkl"),
    "complex numbers": lambda m: saved({"w": torch.ones(2, dtype=torch.complex64)}),
    "2^33 numbers in one": lambda m: saved({"w": torch.ones(1).expand(2**33)}),
    "a sparse one": lambda m: saved({"w": torch.eye(2).to_sparse()}),
    "a quantised one": lambda m: saved({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
    "on no device": lambda m: saved({"w": torch.ones(2, device="meta")}),
    "numbers for names": lambda m: saved({1: torch.ones(2)}),
    "no tensors": lambda m: saved({}),
    "a tensor alone": lambda m: saved(torch.ones(2)),
    "text among tensors": lambda m: saved({"w": torch.ones(2), "epoch": "x"}),
    "NaN": lambda m: saved({"w": torch.tensor([1.0, float("nan")])}),
    **{f"cut to {n} of 8 parts": lambda m, n=n: (r := saved({"w": torch.ones(2, 3)}))[: len(r) * n // 8]
       for n in range(8)},
    **{f"the old form cut to {n} of 8 parts": lambda m, n=n: (r := saved({"w": torch.ones(2, 3)}, old=True))[
        : len(r) * n // 8] for n in range(8)},
}
# fmt: on


def adapter(
    changes: dict[str, Any] | None = None, a: Any = None, b: Any = None, **tensors: Any
) -> Callable[[Path], None]:
    """A LoRA on `layer.w` [2, 3], rank 1, its config or tensors changed."""

    def write(folder: Path) -> None:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2} | (changes or {})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        pair = {"lora_A": torch.ones(1, 3) if a is None else a, "lora_B": torch.ones(2, 1) if b is None else b}
        named = {f"base_model.model.layer.{half}.weight": t for half, t in pair.items()} | tensors
        save_file(named, folder / "adapter_model.safetensors")

    return write


def written(config: bytes, weights: bytes | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        adapter()(folder)
        (folder / "adapter_config.json").write_bytes(config)
        if weights is not None:
            (folder / "adapter_model.safetensors").write_bytes(weights)

    return write


WHOLE = save({"w": torch.ones(2)})
LORA = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}).encode()
# fmt: off
ADAPTERS: dict[str, Callable[[Path], None]] = {
    **{f"rank {str(r)[:12]}": adapter({"r": r}) for r in (0, -1, 2, 2**63, 10**400, True, 1.0, "1", None, [1], {})},
    **{f"alpha {str(x)[:12]}": adapter({"lora_alpha": x})
       for x in (None, True, "2", [], float("nan"), float("inf"), -float("inf"), 1e308, 10**400, -(10**400))},
    **{f"{key} {str(p)[:20]}": adapter({key: p}) for key in ("rank_pattern", "alpha_pattern") for p in (
        [1], "x", 3, {"(": 1}, {"(a+)+$": 1}, {"(?P<x": 1}, {"layer": None}, {"layer": "2"}, {"(" * 5000: 1},
        {"a{99999999999}": 1}, {"[": 1}, {"*": 1}, {"\\": 1}, {"layer": 10**400}, {r"(a)\1": 1}, {"(?=(a+))a*b": 1})},
    "more patterns than can be tried": adapter({"rank_pattern": {f"({n}|{n})": 1 for n in range(9999)}}, **{
        f"base_model.model.{n}.{'a' * 99}.lora_{half}.weight": torch.ones(1, 1) for half in "AB" for n in range(9)}),
    **{f"kind {str(k)[:12]}": adapter({"peft_type": k}) for k in (None, 5, {}, "IA3", "LORA\0")},
    **{f"config {c[:12]!r}": written(c) for c in (
        b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"r":' + b"9" * 5000 + b"}", b"\0" * 64)},
    "config a pipe": lambda f: (adapter()(f), (f / "adapter_config.json").unlink(),
                                os.mkfifo(f / "adapter_config.json"))[-1],
    "weights a pipe": lambda f: (adapter()(f), (f / "adapter_model.safetensors").unlink(),
                                 os.mkfifo(f / "adapter_model.safetensors"))[-1],
    "config a link to an endless device": lambda f: (adapter()(f), (f / "adapter_config.json").unlink(),
                                                     (f / "adapter_config.json").symlink_to("/dev/zero"))[-1],
    "DoRA": adapter({"use_dora": True}),
    "A a scalar": adapter(a=torch.tensor(1.0)), "B a scalar": adapter(b=torch.tensor(1.0)),
    "A empty": adapter(a=torch.ones(0, 3)),
    "both empty": adapter({"r": 0}, torch.ones(0, 3), torch.ones(2, 0)),
    "A of five dimensions": adapter(a=torch.ones(1, 3, 1, 1, 1)),
    "A too wide": adapter(a=torch.ones(1, 4)), "B too long": adapter(b=torch.ones(3, 1)),
    "A of whole numbers": adapter(a=torch.ones(1, 3).int()),
    "A not a number": adapter(a=torch.full((1, 3), float("nan"))),
    "a third half": adapter(**{"layer.lora_C.weight": torch.ones(1)}),
    "a tensor of no module": adapter(strange=torch.ones(1)), "an empty name": adapter(**{"": torch.ones(1)}),
    "a name that steers terminals": adapter(**{"\x1b[2J\u202e": torch.ones(1)}),
    "only the prefix": adapter(**{"base_model.model.": torch.ones(1)}),
    "a bias alone": adapter(**{"x.lora_B.bias": torch.ones(2)}),
    "weights cut": written(LORA, WHOLE[:-1]), "weights empty": written(LORA, b""),
    "weights of a whole model": written(LORA, WHOLE),
}
# fmt: on


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A sound model, and an empty folder for what is not."""
    for name in ("sound", "odd"):
        (tmp_path / name).mkdir()
    save_file({"layer.weight": torch.ones(2, 3)}, tmp_path / "sound" / "model.safetensors")
    return tmp_path / "sound", tmp_path / "odd"


def refused(told: Told, models: list[Any], out: Path, inspected: bool) -> None:
    """By both doors, with nothing left at `out` and nothing run."""
    assert told(lambda: spolia.merge(models, out=out, threads=1)) is not None
    seen = told(lambda: spolia.inspect(models[0], models[1:], threads=1))
    assert seen is not None or not inspected
    assert not os.path.lexists(out) and not (out.parent / "ran").exists()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.filterwarnings("ignore")
def test_pickles_run_nothing(case: str, pair: tuple[Path, Path], tmp_path: Path, told: Told) -> None:
    (pair[1] / "pytorch_model.bin").write_bytes(PICKLES[case](tmp_path / "ran"))
    refused(told, [pair[1], pair[1]], tmp_path / "out", case not in UNSEEN)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", ADAPTERS)
def test_odd_adapters_are_refused(case: str, pair: tuple[Path, Path], tmp_path: Path, told: Told) -> None:
    ADAPTERS[case](pair[1])
    refused(told, [pair[0], f"{pair[0]}+{pair[1]}"], tmp_path / "out", case not in UNSEEN)


def test_a_pattern_with_countless_ways_is_answered(pair: tuple[Path, Path], told: Told) -> None:
    """It fits no module, so the adapter is sound; Python's `re` would try some 10^14 ways."""
    adapter({"alpha_pattern": {".*" * 16 + "x": 1}})(pair[1])
    assert told(lambda: spolia.merge([pair[0], f"{pair[0]}+{pair[1]}"], threads=1)) is None


def test_a_sound_adapter_and_a_sound_pickle_pass(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Else the two tests above would show nothing."""
    adapter()(pair[1])
    merged = spolia.merge([pair[0], f"{pair[0]}+{pair[1]}"], threads=1)
    assert merged["layer.weight"].tolist() == [[2.0] * 3] * 2  # half of 1 and 1 + 2
    (tmp_path / "x.bin").write_bytes(saved({"w": torch.ones(2)}))
    assert spolia.merge([tmp_path / "x.bin"] * 2)["w"].tolist() == [1, 1]


def test_there_are_enough() -> None:
    assert len(PICKLES.keys() | ADAPTERS.keys()) == len(PICKLES) + len(ADAPTERS) >= 115

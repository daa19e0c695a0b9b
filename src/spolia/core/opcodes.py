"""A pickle's opcodes run over plain data: no class is imported, nothing is called. core/inert.py reads files with it.

A class, function or extension becomes a name (`Named`), what it would have built a `Record`, and a tensor a `View` of a
`Storage`. `pickletools.genops` decodes the opcodes, which is all that it does.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spolia.core.checkpoint import BY_TORCH_NAME

MOST_OPCODES = 5_000_000  # a module of ViT-L size takes some twenty thousand
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict, "EMPTY_SET": list,
}  # fmt: skip
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
_SETS = ("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset")


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function that the pickle names. Only its name."""

    name: str


@dataclass(eq=False)
class Record:
    """What would have been built by `kind` from `arguments`; its state, and its items if it is a mapping or a list."""

    kind: Any
    arguments: Any = ()
    state: Any = None
    items: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """Numbers in the file: `data` where they are at hand, else the entry `key` of the archive."""

    key: str
    dtype: str
    numel: int
    data: memoryview | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * BY_TORCH_NAME[self.dtype].size


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: shape, strides and offset, in numbers, in a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Machine:
    """Runs the opcodes of one pickle over a stack of plain data."""

    def __init__(self, storage: Callable[[Any], Storage | Named], loaded: Callable[[bytes], Storage] | None = None):
        """`storage` makes one of a persistent id, `loaded` of the bytes that a plain pickle keeps it in."""
        self._storage, self._loaded = storage, loaded
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The object; the stream stands behind it afterwards."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_OPCODES:
                raise ValueError(f"more than {MOST_OPCODES} opcodes")
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("POP", "DUP"):
            stack.pop() if name == "POP" else stack.append(stack[-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "SETITEM"):
            given = [stack.pop() for _ in range(1 if name == "APPEND" else 2)][::-1]
            _add(self._stack[-1], given, pairs=name == "SETITEM")
        elif name in (
            "APPENDS",
            "ADDITEMS",
            "SETITEMS",
            "LIST",
            "TUPLE",
            "DICT",
            "FROZENSET",
            "POP_MARK",
            "INST",
            "OBJ",
        ):
            self._marked(name, argument, self._unmark())
        elif name in ("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            stack.append(self._named(name, argument))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()  # arguments by keyword
            arguments, kind = stack.pop(), stack.pop()
            stack.append(self._built(kind, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Record):
                stack[-1].state = state
        elif name in ("PERSID", "BINPERSID"):
            stack.append(self._storage(argument if name == "PERSID" else stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name} has no place in a file of weights")

    def _unmark(self) -> list[Any]:
        """What lies above the last mark."""
        above, self._stack = self._stack, self._marks.pop()
        return above

    def _marked(self, name: str, argument: Any, above: list[Any]) -> None:
        stack = self._stack
        if name in ("APPENDS", "ADDITEMS", "SETITEMS"):
            _add(stack[-1], above, pairs=name == "SETITEMS")
        elif name in ("LIST", "FROZENSET"):
            stack.append(above)
        elif name == "TUPLE":
            stack.append(tuple(above))
        elif name == "DICT":
            stack.append({})
            _add(stack[-1], above, pairs=True)
        elif name == "INST":
            stack.append(self._built(Named(argument.replace(" ", ".")), tuple(above)))
        elif name == "OBJ":
            stack.append(self._built(above[0], tuple(above[1:])))

    def _named(self, name: str, argument: Any) -> Named:
        if name == "GLOBAL":
            return Named(argument.replace(" ", "."))
        if name == "STACK_GLOBAL":
            last, module = self._stack.pop(), self._stack.pop()
            if not isinstance(last, str) or not isinstance(module, str):
                raise ValueError("a class has no name")
            return Named(f"{module}.{last}")
        return Named(f"extension.{argument}")

    def _built(self, kind: Any, arguments: Any) -> Any:
        """Tensors, parameters and mappings are understood; all else becomes a record."""
        name = kind.name if isinstance(kind, Named) else ""
        given = arguments if isinstance(arguments, tuple) else ()
        if name in _TENSORS and len(given) >= 4:
            return _view(*given[:4])
        if name in _PARAMETERS and given and isinstance(given[0], View):
            return given[0]
        if name in _MAPPINGS:
            return {}
        if name in _SETS:
            return list(given[0]) if given and isinstance(given[0], list) else []
        if name == "torch.storage._load_from_bytes" and self._loaded and given and isinstance(given[0], bytes):
            return self._loaded(given[0])
        return Record(kind, arguments)


def _add(target: Any, given: list[Any], *, pairs: bool) -> None:
    """Items into a list or a mapping. Keys that are no text name no tensor and are left out."""
    if isinstance(target, list) and not pairs:
        target.extend(given)
    elif isinstance(target, dict | Record) and pairs:
        into = target if isinstance(target, dict) else target.items
        for key, value in zip(given[::2], given[1::2], strict=True):
            if isinstance(key, str):
                into[key] = value


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """A view that lies inside its storage."""
    whole = [n for part in (shape, strides) if isinstance(part, tuple) for n in part] + [offset]
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without a storage or a shape")
    if any(type(n) is not int or n < 0 for n in whole) or len(shape) != len(strides) or len(shape) > 16:
        raise ValueError("a tensor of an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its {storage.numel} numbers")
    return View(storage, offset, shape, strides)

"""The house stands: imports go down the floors, and importing has no effects.

    7  __main__             `python -m spolia`
    6  cli
    5  runs   reports       neither imports the other
    4  bench
    3  methods zoo data     none imports another; a method imports methods of its own room only
    2  parts
    1  core
    0  catalog, errors      anyone may read them

Every import counts, also one inside a function or under TYPE_CHECKING. One crossing is meant, and stands in GLUE.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spolia
from spolia.catalog import METHODS

SRC = Path(spolia.__file__).parents[1]
FILES = sorted(SRC.glob("spolia/**/*.py"))
ROOMS = (
    "catalog errors",
    "core",
    "parts",
    "methods zoo data",
    "bench",
    "runs reports",
    "cli",
    "__main__",
)  # from the ground up
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
# The verbs are the whole command as functions, so what `spolia report` and the card of a merged model do is among them.
# Lazily: planning must not pay for plots.
GLUE = {("spolia.runs.verbs", "spolia.reports")}
# Modules that import by name: the doors, the catalog's entries, a method's page, a family's study, and torch and numpy
# on first use. Their names are literal tables, each with a test of its own.
NAMED_IMPORTS = {"spolia", "spolia.catalog", "spolia.core.lazy", "spolia.runs.describe", "spolia.runs.studies"}

# Calls that change the process, the machine or the terminal. None may run while a module is imported.
CALLS = """
    torch.manual_seed torch.seed torch.set_num_threads torch.set_num_interop_threads torch.set_default_dtype
    torch.set_default_device torch.set_grad_enabled torch.use_deterministic_algorithms torch.set_printoptions
    torch.set_float32_matmul_precision random.seed np.random.seed numpy.random.seed matplotlib.use
    logging.basicConfig logging.disable warnings.simplefilter warnings.filterwarnings signal.signal atexit.register
    os.chdir os.umask os.putenv os.unsetenv os.mkdir os.makedirs os.nice os.system sys.setrecursionlimit
    subprocess.run subprocess.Popen urllib.request.urlopen threading.Thread multiprocessing.set_start_method
    faulthandler.enable locale.setlocale open print exec
"""
EFFECTS = set(CALLS.split())
PLACES = (
    "os.environ",
    "sys.path",
    "sys.modules",
    "sys.stdout",
    "sys.stderr",
    "matplotlib.rcParams",
    "warnings.filters",
)
CHANGES = ("update", "setdefault", "pop", "popitem", "clear", "append", "insert", "extend", "remove", "write")
PATH_WRITES = ("mkdir", "touch", "unlink", "write_text", "write_bytes", "rmdir")


def module_name(file: Path) -> str:
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = SRC.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of ours that is imported; `*dynamic*` where the name is computed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                here = module.split(".")
                here = here[: len(here) - node.level + package]
                start = ".".join([*here, start] if start else here)
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                if start == "spolia" and alias.name in spolia._DOORS:  # a door leads to another floor
                    yield node.lineno, spolia._DOORS[alias.name]
                else:
                    yield node.lineno, inner if exists(inner) and inner.startswith("spolia.") else start
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("spolia."):
            name = dotted(node).split(".")[1]
            if name in spolia._DOORS:
                yield node.lineno, spolia._DOORS[name]
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            given = node.args[0] if node.args else None
            literal = isinstance(given, ast.Constant) and isinstance(given.value, str)
            yield node.lineno, given.value if literal else "*dynamic*"


def crossings(source: str, module: str, where: str, *, package: bool = False) -> list[str]:
    """A sentence for every import in `source` that the floors do not allow."""
    own = module.split(".")[1:]
    if not own:  # the package itself is the doorway: it names every floor and imports none of them before use
        return []
    if own[0] not in FLOORS:
        return [f"{where}: `{own[0]}` has no floor; give it one in tests/test_floors.py, and say why in the commit."]
    found = []
    for line, target in imports(ast.parse(source), module, package):
        there = target.split(".")
        at = f"{where}:{line}"
        if target == "*dynamic*":
            if module not in NAMED_IMPORTS:
                found.append(f"{at}: imports a module by a computed name; write the import out.")
            continue
        if there[0] != "spolia" or len(there) == 1:
            continue
        room = there[1]
        if room not in FLOORS:
            found.append(f"{at}: imports {target}, which has no floor; does it exist?")
        elif room == own[0]:
            if room == "methods" and len(own) > 2 and there[2:3] != own[1:2]:
                found.append(
                    f"{at}: the {own[1]} method {module} imports {target} of another room; "
                    "move what both need down to parts or core."
                )
        elif FLOORS[room] > FLOORS[own[0]]:
            found.append(
                f"{at}: {module} (floor {FLOORS[own[0]]}) imports {target} (floor {FLOORS[room]}); imports go down only: "
                f"move the shared part to floor {FLOORS[own[0]]} or below, or hand the value in as an argument."
            )
        elif FLOORS[room] == FLOORS[own[0]] > 0 and (module, f"spolia.{room}") not in GLUE:
            found.append(
                f"{at}: {module} imports {target}, a sibling on floor {FLOORS[room]}; siblings do not know each other: "
                "let a higher floor bring the two together."
            )
    return found


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: everything outside functions, and neither of the guarded blocks."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__":
            todo += node.orelse
        elif not isinstance(node, ast.Lambda):
            yield node
            todo += ast.iter_child_nodes(node)


def effects(source: str, where: str) -> list[str]:
    """A sentence for every effect that importing `source` would have."""

    def told(node: ast.AST, what: str) -> str:
        return f"{where}:{node.lineno}: importing {what}; move it into the function that needs it."

    found = []
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            place, _, verb = name.rpartition(".")
            if name in EFFECTS or (place in PLACES and verb in CHANGES):
                found.append(told(node, f"calls {name}"))
            elif isinstance(node.func, ast.Attribute) and node.func.attr in PATH_WRITES:
                found.append(told(node, f"calls .{node.func.attr}, which writes to disk"))
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        for target in targets:
            held = target.value if isinstance(target, ast.Subscript) else target
            if dotted(held) in PLACES or (isinstance(target, ast.Attribute) and dotted(target).startswith("torch.")):
                found.append(told(node, f"changes {dotted(held)}"))
    return found


def test_imports_go_down() -> None:
    found = []
    for file in FILES:
        where, package = str(file.relative_to(SRC.parent)), file.name == "__init__.py"
        found += crossings(file.read_text(encoding="utf-8"), module_name(file), where, package=package)
    assert not found, "\n".join(found)


def test_importing_has_no_effects() -> None:
    found = [f for file in FILES for f in effects(file.read_text(encoding="utf-8"), str(file.relative_to(SRC.parent)))]
    assert not found, "\n".join(found)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    """One process imports the doors one after the other and says which brought torch in."""
    light = ["spolia", "spolia.catalog", "spolia.errors", "spolia.cli", "spolia.runs.recipe", "spolia.runs.describe"]
    light += sorted(
        {m.module for m in METHODS}
        | {module_name(f) for f in FILES if "methods" in f.parts and f.name != "__init__.py"}
    )
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = sorted({'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules))\n"
        "    if heavy: sys.exit(f'importing {name} brings in {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True, check=False)
    cure = "use `from spolia.core.lazy import torch`, or import it inside the function that needs it."
    assert done.returncode == 0, f"{done.stderr.strip()}; {cure}"


def test_doors_open() -> None:
    for name in spolia.__all__:
        assert getattr(spolia, name) is not None, f"src/spolia/__init__.py offers `{name}`, which is not there."


BAD_IMPORTS = [
    ("spolia.core.x", "import spolia.parts.expert"),
    ("spolia.core.x", "from spolia.parts import expert"),
    ("spolia.core.x", "from spolia import parts"),
    ("spolia.core.x", "from spolia import merge"),
    ("spolia.core.x", "import spolia\nspolia.merge"),
    ("spolia.core.x", "from ..parts.expert import Expert"),
    ("spolia.core.x", "def f():\n    from spolia.runs import verbs"),
    (
        "spolia.core.x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spolia.parts.expert import Expert",
    ),
    ("spolia.core.x", "from importlib import import_module\nimport_module('spolia.runs.verbs')"),
    ("spolia.core.x", "import importlib\nimportlib.import_module(name)"),
    ("spolia.data.x", "from spolia.zoo import mlp"),
    ("spolia.zoo.x", "from spolia.methods.merge import average"),
    ("spolia.methods.surgery.x", "from spolia.methods.merge import average"),
    ("spolia.methods.merge.x", "from spolia.data import digits"),
    ("spolia.reports.x", "from spolia.runs.store import RunFolder"),
    ("spolia.runs.x", "from spolia.reports import tables"),
    ("spolia.runs.x", "from spolia import cli"),
    ("spolia.cellar.x", "import os"),
    ("spolia.errors", "from spolia.core import lazy"),
]


@pytest.mark.parametrize(("module", "source"), BAD_IMPORTS)
def test_a_crossing_is_seen(module: str, source: str) -> None:
    assert len(crossings(source, module, "x.py")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "spolia.cli",
            "from spolia.runs import verbs\nfrom spolia.reports import tables\nfrom spolia import __version__",
        ),
        ("spolia.runs.verbs", "def f():\n    from spolia.reports.html import write_report"),
        ("spolia.methods.merge.x", "from spolia.methods.merge import average\nfrom spolia.core.lazy import torch"),
        ("spolia.methods.merge.x", "from . import average\nfrom ...parts import expert"),
        ("spolia.catalog", "from spolia.errors import SpoliaError\nimport importlib\nimportlib.import_module(name)"),
        ("spolia", "from spolia.runs.verbs import merge"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert crossings(source, module, "x.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(0)",
        "if True:\n    torch.set_num_threads(1)",
        "class A:\n    logging.basicConfig()",
        "def f(x=print('hello')): ...",
        "os.environ['A'] = '1'",
        "del os.environ['A']",
        "os.environ.setdefault('A', '1')",
        "os.chdir('/')",
        "sys.path.insert(0, '.')",
        "sys.path += ['.']",
        "Path('runs').mkdir()",
        "torch.backends.cudnn.benchmark = True",
    ],
)
def test_an_effect_is_seen(source: str) -> None:
    assert len(effects(source, "x.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    torch.manual_seed(0)",
        "f = lambda: print('later')",
        "if __name__ == '__main__':\n    print('asked')",
        "COLOUR = os.environ.get('NO_COLOR')",
        "NAMES = {k: v for k, v in TABLE.items()}",
    ],
)
def test_what_has_no_effect_passes(source: str) -> None:
    assert effects(source, "x.py") == []

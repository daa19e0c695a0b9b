"""The text of `list`, `show`, `plan` and `inspect`: plain columns, wrapped to the terminal, whole where there is none."""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

from spolia.catalog import Method
from spolia.runs.telling import plain

FAMILIES = {
    "merge": "several fine-tunes of one base become one model",
    "surgery": "a merged model gets back what its experts knew",
    "distill": "a small model learns from a large one's outputs",
    "meta": "a model that adapts to a new task in a few steps",
    "datafree": "the same, from trained classifiers and no data",
    "continual": "a stream of tasks, and nothing forgotten",
    "link": "text through noise, a language model at the receiver",
}
FIRST_LOOKS = {
    "merge": "awd",
    "surgery": "surgery",
    "distill": "rkkd",
    "meta": "msd",
    "datafree": "free",
    "continual": "refresh",
    "link": "llm_sc",
}
_MEASURES = ("norm", "relative", "untouched", "effective_rank")
_LEAST = 16  # a column is not wrapped narrower than this


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None, indent: int = 2) -> str:
    """A table without lines. Beyond `width` the widest columns are wrapped; None never wraps."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    while width and sum(widths) + 2 * len(widths) + indent > width and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            parts = [(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(wrapped, widths, strict=True)]
            lines.append((" " * indent + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def screen_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, and is not to be wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def list_text(methods: Sequence[Method]) -> str:
    blocks = []
    for family in dict.fromkeys(method.family for method in methods):
        rows = [(m.name, m.needs, m.cost, m.summary, m.paper) for m in methods if m.family == family]
        title = f"{family}: {FAMILIES[family]}" if family in FAMILIES else family
        blocks.append(title + "\n" + columns(("name", "needs", "cost", "what it does", "paper"), rows, screen_width()))
    more = "spolia show METHOD tells more; spolia new METHOD -o my.yaml starts a recipe"
    return "\n\n".join([*blocks, more])


def list_data(methods: Sequence[Method]) -> list[dict[str, Any]]:
    keep = ("name", "family", "summary", "paper", "needs", "cost", "aliases")
    return [{key: value for key, value in asdict(method).items() if key in keep} for method in methods]


def first_looks() -> str:
    """One tiny recipe of each family."""
    rows = [(f"spolia run {family}/{name}-tiny", FAMILIES[family]) for family, name in FIRST_LOOKS.items()]
    return "a first look at each family\n" + columns(("", ""), rows, screen_width()).lstrip("\n")


def show_text(method: Method) -> str:
    """Everything about one method: what it needs, its settings, its page, how to run it."""
    from spolia.runs.fields import describe
    from spolia.runs.packaged import example_command

    cls = method.settings_class()
    facts = [("paper", method.paper), ("needs", method.needs + _pool_needs(cls))]
    facts += [("cost", method.cost), ("recipes", ", ".join(recipe_names(method)))]
    if method.aliases:
        facts.append(("also", f"called {', '.join(method.aliases)} elsewhere"))
    fields = [(f.name, f.default or "none: must be given", f.wants, f.help, f.source) for f in describe(cls)]
    table = columns(("setting", "default", "may be", "what it is", "source"), fields, screen_width())
    page = inspect.cleandoc(import_module(method.module).__doc__ or "")
    tries = [example_command(method, tiny=True), example_command(method), f"spolia new {method.name} -o my.yaml"]
    return "\n".join(
        [
            f"{method.name} ({method.family}): {method.summary}",
            "",
            columns(("", ""), facts).lstrip("\n"),
            "",
            "settings",
        ]
        + [table, "", "method", textwrap.indent(page, "  "), "", "try"]
        + ["  " + line for line in dict.fromkeys(tries)]
    )


def _pool_needs(settings: Any) -> str:
    """What a merge asks of its pool; nothing for a method that takes none."""
    if not hasattr(settings, "experts"):
        return ""
    fewest, most = settings.experts
    experts = f"{fewest} or more" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"; base {settings.base}; experts {experts}"


def show_data(method: Method) -> dict[str, Any]:
    from spolia.runs.fields import describe

    data = list_data([method])[0]
    data["settings"] = [asdict(field) for field in describe(method.settings_class())]
    return data | {
        "recipes": recipe_names(method),
        "page": inspect.cleandoc(import_module(method.module).__doc__ or ""),
    }


def recipe_names(method: Method) -> list[str]:
    from spolia.runs.packaged import packaged

    names = (f"{method.family}/{method.name}", f"{method.family}/{method.name}-tiny")
    return [name for name in packaged() if name in names]


def plan_text(plan: dict[str, Any]) -> str:
    """A plan for people. `plan` is Plan.to_dict()."""
    from spolia.runs.sizes import show_size

    width = screen_width()
    phases = [
        [str(p.get(k) or "-") for k in ("name", "does", "data", "trained", "frozen", "writes")] for p in plan["phases"]
    ]
    inputs = [
        (i["name"], i["role"], str(i["tensors"]), show_size(i["bytes"]), ", ".join(i["dtypes"]), str(i["path"]))
        for i in plan["inputs"]
    ]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in plan["dtypes"].items())
    free = f", {show_size(plan['disk_free_bytes'])} free" if plan["disk_free_bytes"] else ""
    facts = [
        ("tensors", f"{plan['tensors']} ({dtypes})"),
        ("reads", show_size(plan["bytes_in"])),
        ("writes", show_size(plan["bytes_out"])),
    ]
    facts = [fact for fact in facts if plan["inputs"]]  # of models that are yet to be trained nothing is known
    facts += [
        ("memory", f"{show_size(plan['peak_memory_bytes'])} at most"),
        ("disk", f"{show_size(plan['disk_needed_bytes'])} needed{free}"),
        ("time", f"{_duration(plan['seconds'])} ({plan['time_basis']})"),
        ("seeds", ", ".join(map(str, plan["seeds"]))),
    ]
    parts = [plan["title"], "", "phases"]
    parts += [columns(("phase", "does", "data", "trained", "frozen", "writes"), phases, width)]
    if inputs:
        parts += ["", "inputs", columns(("name", "role", "tensors", "size", "types", "path"), inputs, width)]
    parts += ["", "totals", *(f"  {name:9}{value}" for name, value in facts)]
    parts += ["", "files", *("  " + str(file) for file in plan["files"])]
    if plan.get("notes"):
        parts += ["", "notes", *("  " + str(line) for line in plan["notes"])]
    if plan["warnings"]:
        parts += ["", "warnings", *("  " + str(line) for line in plan["warnings"])]
    return plain("\n".join(parts))


def inspection_text(seen: dict[str, Any]) -> str:
    """An inspection for people. `seen` is Inspection.to_dict()."""
    width, experts = screen_width(), seen["experts"]
    rows = [
        (e["name"], *(_number(e[key], form) for key, form in zip(_MEASURES, (".4g", ".1%", ".1%", ".1f"), strict=True)))
        for e in experts
    ]
    heads = ("expert", "task vector", "of the base", "untouched", "effective rank")
    parts = [
        f"{len(experts)} experts of {seen['base']['name']}: {seen['tensors']} tensors, {seen['elements']:,} elements"
    ]
    parts += ["", columns(heads, rows, width)]
    names = [e["name"] for e in experts]
    for title, key in (("cosines between task vectors", "cosines"), ("signs in conflict (50% is chance)", "conflict")):
        form = ".2f" if key == "cosines" else ".0%"
        matrix = zip(names, seen[key], strict=True)
        if len(names) > 1:
            parts += ["", title]
            parts += [columns(("", *names), [(n, *(_number(v, form) for v in row)) for n, row in matrix], width)]
    layers = [
        (
            item["layer"],
            *(_number(v, ".1%") for v in item["relative"]),
            _number(item["cosine"], ".2f"),
            _number(item["conflict"], ".0%"),
        )
        for item in seen["layers"]
    ]
    parts += ["", "task vector over base, by layer; cosine and conflict are means over pairs"]
    parts += [columns(("layer", *names, "cosine", "conflict"), layers, width)]
    parts += _words_text(seen, width)
    parts += ["", "findings", *("  " + f["text"] for f in seen["findings"])] if seen["findings"] else []
    parts += ["", "warnings", *("  " + line for line in seen["warnings"])] if seen["warnings"] else []
    parts += ["", *seen["notes"], "", "verdict", "  " + seen["verdict"]]
    if seen["recipe"]:
        parts += ["", "recipe to begin with", "", seen["recipe"].rstrip()]
    return plain("\n".join(parts))


def _words_text(seen: dict[str, Any], width: int | None) -> list[str]:
    """Tokenizers and configs, where there are any."""
    parts = []
    told = [v for v in seen["vocabularies"] if v["tokens"] is not None or v["config_vocab_size"] is not None]
    if told or any(v["against_base"] not in ("", "no tokenizer") for v in seen["vocabularies"]):
        keys = ("tokens", "added_tokens", "config_vocab_size")
        rows = [
            (v["model"], *("-" if v[k] is None else str(v[k]) for k in keys), v["against_base"])
            for v in seen["vocabularies"]
        ]
        heads = ("model", "tokens", "of them added", "config says", "against the base")
        parts += ["", "vocabularies", columns(heads, rows, width)]
    if seen["config_differences"]:
        names = list(seen["config_differences"][0]["values"])
        rows = [(d["key"], *(str(d["values"][n]) for n in names)) for d in seen["config_differences"]]
        parts += ["", "configs differ", columns(("entry", *names), rows, width)]
    return parts


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

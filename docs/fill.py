"""Fills the generated parts of the pages: settings and public names from the code, numbers from docs/results.

    python docs/fill.py            rewrites them in README.md, docs and benchmarks (also: make docs)
    python docs/fill.py --check    names what is stale; exit code 1 if anything is

What may stand in a page is told in docs/results/README.md; `api NAME; NAME` stands for public names of `spolia` (docs/api.md).
Code blocks are left alone.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spolia
from spolia.catalog import find
from spolia.reports.figures import task_bars
from spolia.reports.ledger import main_table
from spolia.reports.plots import draw, standalone
from spolia.reports.tables import escape_markdown, to_markdown
from spolia.runs.fields import FieldText, describe

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
_PART = re.compile(r"(<!-- (table|value|settings|api) ([^>]*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- (?:table|value|settings|api) ")
_CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_FIRST = re.compile(r"(?<=\S)\n( *)(<!-- value [^>]*? -->[^<]*<!-- end -->\S*)(?:( )|(?=\n))")
_FIELDS = ("mean", "low", "high", "n")
WIDTH, LINE = 80, 128  # characters of a signature on one line, and of a line of prose


def pages() -> list[Path]:
    """Every page whose generated parts are kept up to date."""
    house = DOCS.parent
    found = [house / "README.md", *DOCS.rglob("*.md"), *(house / "benchmarks").glob("*.md")]
    return sorted(page for page in found if page.is_file())


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every generated part made anew. A ValueError says what a part asks for in vain."""
    parts = _CODE.split(text)
    parts[::2] = [_fill(part, results) for part in parts[::2]]
    return "".join(parts)


def _fill(text: str, results: Path) -> str:
    opened, closed = len(_OPENING.findall(text)), len(_PART.findall(text))
    if opened != closed:
        raise ValueError(f"{opened} generated parts begin and {closed} of them end; close each with <!-- end -->")

    def made(match: re.Match[str]) -> str:
        start, kind, asked, old, end = match.groups()
        words = [word.strip() for word in asked.split(";")]
        if kind == "value":
            return start + _value(_ledger(words[0], results), words, old) + end
        if kind == "api":
            return f"{start}\n\n{public_names(words)}\n\n{end}"
        table = settings_table(words) if kind == "settings" else _table(_ledger(words[0], results), words)
        return f"{start}\n{table.strip()}\n{end}"

    return _led(_PART.sub(made, text))


def _led(text: str) -> str:
    """`text` with no number first in a line of a paragraph: builders of sites take a comment there for a block."""
    moved = _FIRST.sub(lambda m: f" {m[2]}" + (f"\n{m[1]}" if m[3] else ""), text)
    return moved if moved == text else _led(moved)


def _ledger(name: str, results: Path) -> dict[str, Any]:
    file = results / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in results.glob("*.json"))) or "none yet"
        raise ValueError(f"there is no docs/results/{name}.json; known: {known}")
    return json.loads(file.read_text(encoding="utf-8"))


def _row(ledger: dict[str, Any], method: str, task: str, metric: str) -> dict[str, Any]:
    keys = {"method": method, "task": task, "metric": metric}
    for row in ledger["rows"]:
        if all(row[key] == value for key, value in keys.items()):
            return row
    for key, value in keys.items():
        known = dict.fromkeys(row[key] for row in ledger["rows"])
        if value not in known:
            raise ValueError(f"{ledger['name']} has no {key} `{value}`; known: {'; '.join(known)}")
    raise ValueError(f"{ledger['name']} has no row `{method}; {task}; {metric}`")


def _value(ledger: dict[str, Any], words: list[str], old: str) -> str:
    """One number, with as many decimals as the page has chosen."""
    if len(words) not in (4, 5) or words[4:] not in ([], *([field] for field in _FIELDS)):
        raise ValueError(f"`value {'; '.join(words)}` is not of the form NAME; method; task; metric[; mean|low|high|n]")
    field = words[4] if len(words) == 5 else "mean"
    number = _row(ledger, *words[1:4])[field]
    shown = re.fullmatch(r"[-+]?\d+(?:\.(\d+))?", old.strip())
    return f"{number:.{len(shown[1] or '') if shown else 1}f}"


def _table(ledger: dict[str, Any], words: list[str]) -> str:
    """Methods against the tasks of one metric; or tasks against `method: metric` columns."""
    if words[1:2] != ["tasks"]:
        metric = words[1] if len(words) > 1 else None
        table = main_table(ledger, metric)
        if not table.lines:
            known = "; ".join(dict.fromkeys(row["metric"] for row in ledger["rows"]))
            raise ValueError(f"{ledger['name']} has no metric `{metric}`; known: {known}")
        return to_markdown(table)
    columns = [[part.strip() for part in word.rsplit(":", 1)] for word in words[2:]]
    if not columns or any(len(column) != 2 for column in columns):
        raise ValueError(f"`{'; '.join(words)}` is not of the form NAME; tasks; method: metric; method: metric …")
    tasks = dict.fromkeys(r["task"] for r in ledger["rows"] if [r["method"], r["metric"]] in columns)
    found = {(r["task"], r["method"], r["metric"]): r for r in ledger["rows"]}
    units = [_row(ledger, method, _task_of(ledger, method, metric), metric)["unit"] for method, metric in columns]
    heads = [f"{m}, {q}" + (f" ({u})" if u not in ("", "1") else "") for (m, q), u in zip(columns, units, strict=True)]
    body = [[task, *(_short(found.get((task, m, q))) for m, q in columns)] for task in tasks]
    return _markdown(["", *heads], body, numbers=True)


def _task_of(ledger: dict[str, Any], method: str, metric: str) -> str:
    return next((r["task"] for r in ledger["rows"] if [r["method"], r["metric"]] == [method, metric]), "")


def _short(row: dict[str, Any] | None) -> str:
    """Three digits, as far as they stand before the point or just behind it."""
    if row is None:
        return "–"
    return f"{row['mean']:.{0 if abs(row['mean']) >= 100 else 1 if abs(row['mean']) >= 10 else 2}f}"


def settings_table(methods: list[str]) -> str:
    """Names, defaults and sources of one method's settings; of several, the defaults side by side."""
    fields = {name: {f.name: f for f in describe(find(name).settings_class())} for name in methods}
    if len(methods) == 1:
        rows = [[f"`{f.name}`", f"`{f.default}`", f.wants, f.help, f.source] for f in fields[methods[0]].values()]
        return _markdown(["setting", "default", "may be", "what it is", "source"], rows)
    rows = []
    for setting in dict.fromkeys(name for one in fields.values() for name in one):
        held = {name: one[setting] for name, one in fields.items() if setting in one}
        first = next(iter(held.values()))
        defaults = [f"`{held[name].default}`" if name in held else "" for name in methods]
        rows.append([f"`{setting}`", first.help, *defaults, _grouped(held, lambda field: field.source)])
    return _markdown(["setting", "what it is", *(f"`{name}`" for name in methods), "source"], rows)


def _grouped(held: dict[str, FieldText], of: Callable[[FieldText], str]) -> str:
    """`A (x, y); B (z)`, or just `A` where all say the same."""
    groups: dict[str, list[str]] = {}
    for name, field in held.items():
        groups.setdefault(of(field), []).append(name)
    return "; ".join(text if len(groups) == 1 else f"{text} ({', '.join(names)})" for text, names in groups.items())


def public_names(names: list[str]) -> str:
    """Names of `spolia`: for each its signature, what it is, and of a class what it can do."""
    return "\n\n".join(part for name in names for part in _public(name))


def _public(name: str) -> list[str]:
    if name not in spolia.__all__:
        raise ValueError(f"spolia has no `{name}`; known: {', '.join(spolia.__all__)}")
    held = getattr(spolia, name)
    # indented: generated parts hold no fences, for these are left alone
    shown = textwrap.indent(_signature(name, held, WIDTH), "    ")
    parts = [f"### {name}", shown, _wrapped(_told(held))]
    if inspect.isclass(held):
        own = [(n, m) for n, m in vars(held).items() if _offered(held, n, m)]
        parts.append("\n".join(_member(held, n, m) for n, m in own))
    return [part for part in parts if part]


def _offered(owner: type, name: str, member: Any) -> bool:
    """Whether it is a method or property; the default of a field may be a function too."""
    if name.startswith("_") or name in getattr(owner, "__dataclass_fields__", ()):
        return False
    return isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)


def _member(owner: type, name: str, member: Any) -> str:
    """A line of the list of what a class can do."""
    if isinstance(member, property):
        shown = f"{name}{_typed(inspect.signature(member.fget).return_annotation, ' -> ')}"  # type: ignore[arg-type]
    elif inspect.isfunction(member):
        shown = _signature(name, member, None).replace("(self, ", "(").replace("(self)", "()")
    else:
        shown = _signature(f"{owner.__name__}.{name}", getattr(owner, name), None)
    told = _told(member)
    return _wrapped(f"- `{shown}`" + (f": {told}" if told else ""), "  ")


def _told(held: Any) -> str:
    """The first paragraph of its documentation, on one line."""
    text = inspect.getdoc(held) or ""
    return " ".join(text.split("\n\n")[0].split())


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _signature(name: str, held: Any, width: int | None) -> str:
    """`name(…) -> …` as it stands in the code: on one line where that fits, else a parameter a line."""
    shown = inspect.signature(held)
    words: list[str] = []
    for parameter in shown.parameters.values():
        kind = parameter.kind
        if kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        typed = _typed(parameter.annotation, ": ")
        words.append(f"{star}{parameter.name}{typed}{_default(parameter.default, ' = ' if typed else '=')}")
    end = ")" if inspect.isclass(held) else f"){_typed(shown.return_annotation, ' -> ')}"
    line = f"{name}({', '.join(words)}{end}"
    if width is None or len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + end


def _typed(annotation: Any, before: str) -> str:
    if annotation is inspect.Signature.empty:
        return ""
    return before + (annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation)))


def _default(value: Any, before: str) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if isinstance(value, str):
        return f'{before}"{value}"'
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{before}{value:_}"
    if inspect.isfunction(value) or inspect.isclass(value):
        return before + value.__name__
    return before + repr(value).replace("<factory>", "…")


def _markdown(heads: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    rule = ["---", *(["---:"] if numbers else ["---"]) * (len(heads) - 1)]
    cells = [[_cell(text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([_cell(h) for h in heads], rule, *cells))


def _cell(text: str) -> str:
    if text.startswith("`") and "|" in text:  # within code a table knows no escape that all readers share
        return f"<code>{html.escape(text.strip('`'), quote=False).replace('|', '&#124;')}</code>"
    return text if text.startswith("`") else escape_markdown(text)


def picture(name: str) -> None:
    """docs/results/NAME.svg: the bars of NAME.json. Lengths depend on the fonts here, so pictures are not compared."""
    table = main_table(_ledger(name, RESULTS))
    drawn = standalone(draw(task_bars(table), name))
    (RESULTS / f"{name}.svg").write_text(drawn, encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> int:
    check, stale = arguments == ["--check"], 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text)
        except ValueError as error:
            raise SystemExit(f"{page.relative_to(DOCS.parent)}: {error}") from None
        if new != text:
            stale += 1
            print(f"{page.relative_to(DOCS.parent)}: {'stale' if check else 'filled'}")
            if not check:
                page.write_text(new, encoding="utf-8", newline="\n")
    if not check and (RESULTS / "demo.json").is_file():
        picture("demo")
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

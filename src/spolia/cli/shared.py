"""What verbs share: the arguments that several of them take, and how a plan, a run and JSON are printed."""

from __future__ import annotations

import json as jsons
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spolia.runs import complete

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or a packaged name as merge/ties-tiny.", autocompletion=complete.recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="As method.density=0.3.", autocompletion=complete.overrides),
]
MethodName = Annotated[
    str, typer.Argument(metavar="METHOD", help="A name from `spolia list`.", autocompletion=complete.methods)
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan, write no result.")]


def print_plan(plan: Any, json: bool) -> None:
    from spolia.runs.describe import plan_text

    print(as_json(plan.to_dict()) if json else plan_text(plan.to_dict()))


def print_run(folder: Path, quiet: bool, json: bool) -> None:
    results, summary = folder / "results.json", folder / "summary.txt"
    if json:
        print(
            as_json(
                {
                    "folder": str(folder),
                    "results": jsons.loads(results.read_text(encoding="utf-8")) if results.exists() else None,
                }
            )
        )
    elif not quiet:
        from spolia.reports import tables

        if results.exists():
            print(tables.render(folder, to="text", width=screen_width()))
        if summary.exists():
            print(summary.read_text(encoding="utf-8").rstrip() + "\n")
        print(f"run     {folder}\nreport  {folder / 'report.html'}")


def screen_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def as_json(value: Any) -> str:
    return jsons.dumps(value, indent=1, ensure_ascii=False)

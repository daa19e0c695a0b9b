"""Verbs that look around: list, show, new, schema, doctor. None reads a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spolia import catalog
from spolia.cli.shared import Json, MethodName, as_json
from spolia.errors import SpoliaError


def list_methods(
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Words to look for.")] = None,
    json: Json = False,
) -> None:
    """List the methods, by family."""
    from spolia.runs import describe

    words = " ".join(text or [])
    found = catalog.search(words)
    if not found:
        raise SpoliaError(f"nothing is like `{words}`", where="list", mend="spolia list shows all methods")
    print(as_json(describe.list_data(found)) if json else describe.list_text(found))


def show(method: MethodName, json: Json = False) -> None:
    """Show one method: settings, sources, equations."""
    from spolia.runs import describe

    found = catalog.find(method, "show")
    print(as_json(describe.show_data(found)) if json else describe.show_text(found))


def new(
    method: MethodName,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; default: the screen.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="On real digits, for a first look.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from spolia.runs import looking

    made = looking.new(method, out, tiny=tiny)
    if out is None:
        print(made, end="")
    else:
        print(f"{out}: edit it, then  spolia plan {shlex.quote(str(out))}")


def schema() -> None:
    """Print the JSON Schema of recipes for editors."""
    from spolia.runs import looking

    print(as_json(looking.schema()))


def doctor(
    json: Json = False, deep: Annotated[bool, typer.Option("--deep", help="Import torch too; takes seconds.")] = False
) -> None:
    """Examine this machine and say what to mend."""
    from spolia.runs import doctor

    findings = doctor.examine(deep=deep)
    print(as_json(doctor.findings_data(findings)) if json else doctor.findings_text(findings))

"""Verb of looking at runs in a browser: `spolia ui`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def ui(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, open nothing.")] = False,
) -> None:
    """Show runs in the browser: follow and compare them.

    Until Ctrl-C; for this machine alone, and who has the printed address. Nothing in the folder is changed.
    """
    import webbrowser

    from spolia.runs import verbs

    def ready(address: str) -> None:
        print(address, flush=True)
        print("stop with Ctrl-C", file=sys.stderr, flush=True)
        if not no_browser and sys.stdout.isatty():
            webbrowser.open(address)

    verbs.ui(folder, port=port, ready=ready)

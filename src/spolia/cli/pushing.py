"""Verb of sharing: `spolia push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.shared import Json, as_json, screen_width
from spolia.errors import SpoliaError


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a merged folder.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, send nothing.")] = False,
    json: Json = False,
) -> None:
    """Send a model to the hub, after a look at it.

    Files and card are shown, and a yes is asked for. huggingface_hub finds the token: `hf auth login`, or HF_TOKEN.
    """
    from spolia.runs.push import library, prepare

    upload = prepare(run, repo, private=private)
    if not json:
        print(upload.to_text(screen_width()), flush=True)
    if dry_run:
        if json:
            print(as_json(upload.to_dict()))
        return
    library()  # before anyone is asked
    if not yes:
        if not sys.stdin.isatty():
            mend = "look at it with --dry-run, then send it with --yes"
            raise SpoliaError("there is no terminal to ask on", where="push", mend=mend)
        if not typer.confirm(f"\nSend this to {repo}?", err=True):
            print("nothing was sent", file=sys.stderr)
            return
    address = upload.send()
    print(as_json(upload.to_dict() | {"address": address}) if json else f"\nsent to {address}")

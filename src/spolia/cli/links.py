"""Verbs of links: `spolia link demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.shared import Json, as_json

app = typer.Typer(help="Text through noise.", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def _link() -> None: ...  # keeps `demo` a word of its own


@app.command()
def demo(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A sentence; at most 256 tokens.")],
    esn0: Annotated[float, typer.Option(help="Energy of a channel use over the noise, in dB.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of noise and labels.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Send a sentence through noise and print what each receiver reads."""
    from dataclasses import asdict

    from spolia.runs.link_demo import demo as send

    shown = send(text, esn0, seed)
    print(as_json(asdict(shown)) if json else shown)

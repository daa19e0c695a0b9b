"""Verbs of models on disk: import, inspect, compare, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spolia.cli.shared import Json, Overrides, as_json, screen_width
from spolia.errors import SpoliaError, did_you_mean
from spolia.runs import telling

SOME = 3  # names shown of many


def import_(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A pickle, safetensors, a folder, a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model.")],
    text: Annotated[bool, typer.Option("--text", help="Keep the text tower too.")] = False,
    projection: Annotated[
        bool, typer.Option(help="Keep the image tower's; without, for experts that have none.")
    ] = True,
    quick_gelu: Annotated[bool | None, typer.Option(help="Default: what the file tells, else QuickGELU.")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Of attention, in the image tower; default: what the file tells.", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that stands in the folder.")] = False,
    json: Json = False,
) -> None:
    """Make a folder of transformers out of a published CLIP.

    Nothing in a pickle is run.
    """
    from spolia.runs.importing import import_model

    told = import_model(
        path, out, text=text, projection=projection, quick_gelu=quick_gelu, heads=heads, overwrite=overwrite
    )
    print(as_json(told) if json else _imported_text(told))


def inspect(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the experts started from.")],
    experts: Annotated[list[str], typer.Argument(metavar="EXPERT...", help="Folders, files, hub ids, BASE+ADAPTER.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with figures too.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    json: Json = False,
) -> None:
    """Say whether models will merge well, and how."""
    from spolia.runs import describe, inspection

    if html is not None and not html.parent.is_dir():
        raise SpoliaError(
            f"there is no folder {html.parent}", where="--html", mend="name a file in a folder that exists"
        )
    seen = inspection.inspect(base, experts, threads=threads).to_dict()
    if html is not None:
        from spolia.reports.inspection import render
        from spolia.runs.environment import environment
        from spolia.runs.store import write_whole

        write_whole(html, render(seen, environment(seed=0, seeds=[])))
    print(as_json(seen) if json else describe.inspection_text(seen))
    if html is not None and not json:
        print(f"\npage  {html}")


def compare(
    these: Annotated[list[str], typer.Argument(metavar="A B...", help="Two models, or two run folders or more.")],
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    json: Json = False,
) -> None:
    """Compare two models, or runs, with each other."""
    from spolia.runs import comparison

    found = comparison.compare(*these, threads=threads)
    print(as_json(found.to_dict()) if json else found.to_text(screen_width()))


def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's folder, a model's folder or file, a hub id.")],
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file whose pool names tasks; of a run, by default its own."),
    ] = None,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="text, markdown, latex or csv.")] = "text",
    json: Json = False,
) -> None:
    """Judge a model on a recipe's tasks, beside base and experts.

    Nothing is trained or written. The recipe's method is left aside; a run is judged again on its own tasks.
    """
    from spolia.runs import evaluation, progress

    forms = ("text", "markdown", "latex", "csv")
    if to not in forms:
        raise SpoliaError(f"there is no form `{to}`", where="--to", mend=did_you_mean(to, forms))
    if recipe is not None and "=" in recipe and not Path(recipe).exists():  # the first override of a run's own recipe
        recipe, overrides = None, [recipe, *(overrides or [])]
    found = evaluation.evaluate(model, recipe, overrides or (), progress=progress.choose(json=json))
    if json:
        print(as_json(found.to_dict()))
    else:
        print(found.to_text(screen_width()) if to == "text" else found.to_table(to))


def _imported_text(told: dict[str, Any]) -> str:
    """What was written and what was left out: of many names the first few. What was assumed has been a warning."""
    left = told["left out"]
    names = telling.plain(", ".join(left[:SOME])) + (", …" if len(left) > SOME else "")
    lines = [f"imported model: {told['folder']}", f"  {told['architecture']}, {told['tensors']} tensors"]
    return "\n".join(lines + ([f"  left out: {len(left)}, as {names}"] if left else []))

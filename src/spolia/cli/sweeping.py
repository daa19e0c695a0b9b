"""Verb of many runs: `spolia sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.shared import DryRun, Json, Overrides, Quiet, as_json, screen_width
from spolia.runs import complete
from spolia.runs.telling import plain


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="As of `spolia run`; with --list, a folder too.", autocompletion=complete.recipes
        ),
    ],
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(help="KEY=A,B,C; with --search KEY=LOW..HIGH, or LOW..HIGH:log. Several times: all combinations."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each point, from the recipe's seed on.", min=1)] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; default: runs/RECIPE-sweep.")] = None,
    on: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    resources: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of a run there: num_cpus=4, slurm_partition=gpu.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: 1, on clusters all.", min=1)] = None,
    search: Annotated[int | None, typer.Option(help="Points that Optuna draws, in place of a grid.", min=1)] = None,
    metric: Annotated[str | None, typer.Option(help="What the table shows, and a search goes by.")] = None,
    lowest: Annotated[bool | None, typer.Option("--lowest/--highest", help="Which end of it is best.")] = None,
    on_test: Annotated[bool, typer.Option("--on-test", help="Let a search go by the test, and say so.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show a sweep as it stands; run nothing.")] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run a recipe many times, over values and seeds.

    Everything is checked and shown first. Finished runs are passed over when the command is given again, interrupted ones
    go on. Ctrl-C lets the runs at hand save.
    """
    from spolia.runs import sweep as sweeping

    if list_:
        swept = sweeping.listed(out or recipe)
    else:
        swept = sweeping.sweep(
            recipe,
            over or (),
            seeds=seeds,
            folder=out,
            overrides=overrides or (),
            on=on,
            resources=resources or (),
            jobs=jobs,
            search=search,
            metric=metric,
            lowest=lowest,
            on_test=on_test,
            dry_run=dry_run,
            tell=None if quiet or json else lambda line: print(plain(line), flush=True),
        )
    if json:
        print(as_json(swept.to_dict()))
    elif not quiet and not dry_run:
        print(plain(("" if list_ else "\n") + swept.to_text(screen_width())))
    if swept.failed and not list_ and not dry_run:
        count = len(swept.failed)
        print(f"{count} of {len(swept.runs)} runs failed; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)

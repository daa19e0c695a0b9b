"""Verbs of recipes and runs: plan, run, merge, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.shared import (
    DryRun,
    Json,
    Overrides,
    Quiet,
    RecipeName,
    as_json,
    print_plan,
    print_run,
    screen_width,
)
from spolia.errors import SpoliaError, did_you_mean


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    read_rate: Annotated[str | None, typer.Option(help="Of the disk, a second, as 3GB; default: a guess.")] = None,
    write_rate: Annotated[str, typer.Option(help="Of the disk, a second.")] = "1GB",
    threads: Annotated[int | None, typer.Option(help="Of a process; default: all cores.", min=1)] = None,
    processes: Annotated[int, typer.Option(help="That share the merge.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Show what a run would do, and what it costs: here, or on the disks and cores you name."""
    from dataclasses import replace

    from spolia.runs import verbs
    from spolia.runs.cost import Machine
    from spolia.runs.sizes import size_option

    rates = {"read_rate": size_option("--read-rate", read_rate)} if read_rate is not None else {}
    rates["write_rate"] = size_option("--write-rate", write_rate)
    machine = replace(Machine.here(threads), processes=processes, **rates)
    print_plan(verbs.plan(recipe, overrides or (), machine=machine), json)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default: runs/RECIPE.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in that folder and start over.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Repeats, each with its own seed: seeds=N.", min=1)] = None,
    nproc: Annotated[
        int, typer.Option(help="Processes of this machine that share the work; several machines: torchrun.", min=1)
    ] = 1,
    quiet: Quiet = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe, or go on where it stopped.

    A folder that already holds a run of the same recipe is taken up again; one of another recipe is refused, with the
    difference. Ctrl-C finishes the step and saves; twice stops at once.
    """
    from spolia.core.dist import asked
    from spolia.runs import progress, verbs

    quiet, json = quiet or asked()[0] > 0, json and asked()[0] == 0  # of several processes the first speaks
    reporter = progress.choose(quiet, json)
    overrides = [*(overrides or ()), *([f"seeds={seeds}"] if seeds else ())]
    done = verbs.run(recipe, out, overrides=overrides, fresh=fresh, dry_run=dry_run, nproc=nproc, progress=reporter)
    if isinstance(done, Path):
        print_run(done, quiet, json)
    elif not quiet:
        print_plan(done, json)


def merge(
    recipe: RecipeName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the result.")] = "5GB",
    chunk_memory: Annotated[str, typer.Option(help="Most memory for tensors in flight.")] = "1GB",
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that stands in OUT.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Give the same command several times, here or on machines that see OUT.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=0)] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge models on disk, mergekit's recipes too."""
    from spolia.runs import progress, verbs
    from spolia.runs.sizes import size_option

    done = verbs.merge_recipe(
        recipe,
        out,
        max_shard_size=size_option("--max-shard-size", max_shard_size),
        chunk_memory=size_option("--chunk-memory", chunk_memory),
        threads=threads,
        overwrite=overwrite,
        share=share,
        seed=seed,
        dry_run=dry_run,
        progress=progress.choose(quiet, json),
    )
    if not isinstance(done, Path):
        print_plan(done, json)
    elif json:
        print(as_json({"out": str(done)}))
    elif not quiet:
        print(f"merged model: {done}")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    to: Annotated[str, typer.Option(help="text, markdown, latex, csv, or html to write report.html again.")] = "text",
    json: Json = False,
) -> None:
    """Print the main table of a run."""
    forms = ("text", "markdown", "latex", "csv", "html")
    if to not in forms:
        raise SpoliaError(f"there is no form `{to}`", where="--to", mend=did_you_mean(to, forms))
    if json:
        print_run(run, quiet=False, json=True)
    elif to == "html":
        from spolia.reports.html import write_report

        print(write_report(run))
    else:
        from spolia.reports import tables

        print(tables.render(run, to=to, width=screen_width()))


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("spolia-demo"),
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge experts on real digits, in a minute."""
    import sys
    import webbrowser

    from spolia.runs.demo import demo as run_demo
    from spolia.runs.describe import first_looks

    done = run_demo(out, quiet=quiet)
    print_run(done, quiet, json=False)
    if not quiet:
        print(f"\n{first_looks()}")
        if not no_browser and sys.stdout.isatty():
            webbrowser.open((done / "report.html").resolve().as_uri())

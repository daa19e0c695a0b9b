"""The command: reads arguments, calls the public functions, prints, turns errors into exit codes.

Exit codes: 2 what you gave cannot be used, 1 our fault, 130 interrupted. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import gc
import json as jsons
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from spolia import __version__, catalog
from spolia.errors import SpoliaError, did_you_mean
from spolia.runs import complete, telling

app = typer.Typer(
    help="New ability out of trained models instead of raw data.",
    epilog="First look: spolia demo. Find a method: spolia list, spolia show METHOD.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: the same on a terminal, in a pipe and under NO_COLOR, and no import of rich
    pretty_exceptions_enable=False,
)

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


def _version(asked: bool) -> None:
    if asked:
        print(f"spolia {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces; may stand anywhere.")] = False,
) -> None: ...  # main() has already taken --debug out


@app.command("list")
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
    print(_json(describe.list_data(found)) if json else describe.list_text(found))


@app.command()
def show(method: MethodName, json: Json = False) -> None:
    """Show one method: settings, sources, equations."""
    from spolia.runs import describe

    found = catalog.find(method, "show")
    print(_json(describe.show_data(found)) if json else describe.show_text(found))


@app.command()
def new(
    method: MethodName,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; default: the screen.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="On real digits, for a first look.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from spolia.runs.new import recipe_text, write_recipe

    found = catalog.find(method, "new")
    if out is None:
        print(recipe_text(found, tiny=tiny, file="my.yaml"), end="")
    else:
        write_recipe(found, out, tiny=tiny)
        print(f"{out}: edit it, then  spolia plan {shlex.quote(str(out))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes for editors."""
    from spolia.runs.schema import json_schema

    print(_json(json_schema()))


@app.command()
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
    _print_plan(verbs.plan(recipe, overrides or (), machine=machine), json)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default: runs/RECIPE.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in that folder and start over.")] = False,
    quiet: Quiet = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe, or go on where it stopped.

    A folder that already holds a run of the same recipe is taken up again; one of another recipe is refused, with the
    difference. Ctrl-C finishes the step and saves; twice stops at once.
    """
    from spolia.runs import progress, verbs

    reporter = progress.choose(quiet, json)
    done = verbs.run(recipe, out, overrides=overrides or (), fresh=fresh, dry_run=dry_run, progress=reporter)
    if isinstance(done, Path):
        _print_run(done, quiet, json)
    elif not quiet:
        _print_plan(done, json)


@app.command()
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
        _print_plan(done, json)
    elif json:
        print(_json({"out": str(done)}))
    elif not quiet:
        print(f"merged model: {done}")


@app.command()
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
    print(_json(seen) if json else describe.inspection_text(seen))
    if html is not None and not json:
        print(f"\npage  {html}")


@app.command()
def compare(
    these: Annotated[list[str], typer.Argument(metavar="A B...", help="Two models, or two run folders or more.")],
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    json: Json = False,
) -> None:
    """Compare two models, or runs, with each other."""
    from spolia.runs import comparison

    found = comparison.compare(*these, threads=threads)
    print(_json(found.to_dict()) if json else found.to_text(_width()))


@app.command()
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
        _print_run(run, quiet=False, json=True)
    elif to == "html":
        from spolia.reports.html import write_report

        print(write_report(run))
    else:
        from spolia.reports import tables

        print(tables.render(run, to=to, width=_width()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("spolia-demo"),
    quiet: Quiet = False,
) -> None:
    """Merge experts on real digits, in a minute."""
    from spolia.runs.demo import demo as run_demo

    _print_run(run_demo(out, quiet=quiet), quiet, json=False)


@app.command()
def doctor(
    json: Json = False, deep: Annotated[bool, typer.Option("--deep", help="Import torch too; takes seconds.")] = False
) -> None:
    """Examine this machine and say what to mend."""
    from spolia.runs import doctor

    findings = doctor.examine(deep=deep)
    print(_json(doctor.findings_data(findings)) if json else doctor.findings_text(findings))


def _print_plan(plan: Any, json: bool) -> None:
    from spolia.runs.describe import plan_text

    print(_json(plan.to_dict()) if json else plan_text(plan.to_dict()))


def _print_run(folder: Path, quiet: bool, json: bool) -> None:
    results, summary = folder / "results.json", folder / "summary.txt"
    if json:
        print(
            _json(
                {
                    "folder": str(folder),
                    "results": jsons.loads(results.read_text(encoding="utf-8")) if results.exists() else None,
                }
            )
        )
    elif not quiet:
        from spolia.reports import tables

        if results.exists():
            print(tables.render(folder, to="text", width=_width()))
        if summary.exists():
            print(summary.read_text(encoding="utf-8").rstrip() + "\n")
        print(f"run     {folder}\nreport  {folder / 'report.html'}")


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _json(value: Any) -> str:
    return jsons.dumps(value, indent=1, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Ends with SystemExit whose code says whose fault it was."""
    gc.set_threshold(50_000, 20, 20)  # imports make objects that stay; looking through them costs a tenth of the start
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"] or ["--help"]
    warnings.showwarning = telling.show_warning  # type: ignore[assignment]
    try:
        typer.main.get_command(app).main(given, prog_name="spolia")
    except SystemExit as end:
        if end.code == 130:
            again = shlex.join(["spolia", *(word for word in given if word != "--fresh")])
            print(f"\ninterrupted; what was finished is kept. Go on with:\n  {again}", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        raise SystemExit(telling.explain(error)) from None
    finally:
        if arguments is None:
            gc.freeze()  # the process ends here: looking through torch's objects once more costs a third of a second

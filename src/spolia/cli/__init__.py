"""The command: reads arguments, calls the public functions, prints, turns errors into exit codes.

Exit codes: 2 what you gave cannot be used, 1 our fault, 130 interrupted. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
import warnings
from typing import Annotated

import typer

from spolia import __version__
from spolia.cli import links, looking, models, pushing, recipes, serving, sweeping, watching
from spolia.core.dist import asked
from spolia.runs import telling

app = typer.Typer(
    help="New ability out of trained models instead of raw data.",
    epilog="First look: spolia demo. Find a method: spolia list, spolia show METHOD.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: the same on a terminal, in a pipe and under NO_COLOR, and no import of rich
    pretty_exceptions_enable=False,
)


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


# In the order of `spolia --help`; named where Python keeps the word for itself.
app.command("list")(looking.list_methods)
app.command()(looking.show)
app.command()(looking.new)
app.command()(looking.schema)
app.command()(recipes.plan)
app.command()(recipes.run)
app.command()(sweeping.sweep)
app.command()(recipes.merge)
app.command("import")(models.import_)
app.command()(models.inspect)
app.command()(models.compare)
app.command("eval")(models.eval_)
app.command()(recipes.report)
app.command()(watching.ui)
app.command()(pushing.push)
app.command()(recipes.demo)
app.command()(serving.serve)
app.command()(looking.doctor)
app.add_typer(links.app, name="link")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Ends with SystemExit whose code says whose fault it was; without `arguments` the process ends."""
    gc.set_threshold(50_000, 20, 20)  # imports make objects that stay; looking through them costs a tenth of the start
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"] or ["--help"]
    warnings.showwarning = telling.show_warning  # type: ignore[assignment]
    try:
        typer.main.get_command(app).main(given, prog_name="spolia")
    except SystemExit as end:
        if end.code == 130 and asked()[0] == 0:
            again = shlex.join(["spolia", *(word for word in given if word != "--fresh")])
            print(f"\ninterrupted; what was finished is kept. Go on with:\n  {again}", file=sys.stderr)
        if arguments is None:
            _leave(end.code)
        raise
    except Exception as error:
        if debug:
            raise
        raise SystemExit(telling.explain(error)) from None


def _leave(code: object) -> None:
    """End the process at once: to take torch apart object by object costs half a second. Returns where that is unsafe."""
    if not isinstance(code, int | None):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads on; Python says it in its own way
        return
    atexit._run_exitfuncs()
    os._exit(code or 0)

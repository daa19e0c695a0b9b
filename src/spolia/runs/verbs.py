"""The verbs as functions: everything the command does, for programs and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.settings import Settings
from spolia.errors import SpoliaError
from spolia.runs import measuring
from spolia.runs.asked import check_settings, checked_dtype, read_request, request_from

if TYPE_CHECKING:
    from spolia.catalog import Method
    from spolia.core.journal import Journal
    from spolia.parts.network import Network
    from spolia.parts.preprocessed import Step
    from spolia.runs.cost import Machine
    from spolia.runs.merging import Prepared
    from spolia.runs.plan import Plan
    from spolia.runs.recipe import Recipe
    from spolia.runs.studies import StudyRecipe

GB = 1_000_000_000
_PATH: Any = type(Path())  # Path itself has children from Python 3.12 on


def merge(
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    base: Any = None,
    method: str = "average",
    settings: Mapping[str, Any] | Settings | None = None,
    preprocess: Sequence[str | Mapping[str, Any]] | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    chunk_memory: int = GB,
    max_shard_size: int = 5 * GB,
    overwrite: bool = False,
    share: bool = False,
    evaluate: Callable[[Path], Mapping[str, float]] | None = None,
    network: Network | None = None,
    unlabelled: Mapping[str, Any] | None = None,
    tested_on: Mapping[str, Any] | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    progress: Any = None,
) -> Any:
    """Merge fine-tuned models into one.

    `experts` and `base` are model folders or files, hub ids, modules or state dicts (experts as a list, or a mapping that
    names them); a LoRA adapter is `BASE+ADAPTER`, or its folder alone where `base` is given. Returns the merged state
    dict, in `dtype` or each tensor's own type; or, with `out`, writes a model folder there and returns its path (then all
    models must be on disk). `preprocess` lists what is done to the task vectors first, in order: `[{"name": "ties",
    "density": 0.2}, "awd"]`. `share` lets several processes that make the same call work on it together (docs/scale.md).
    `evaluate` is called with the finished folder and returns a number for each task, higher is better;
    they stand in its card and in results.json.
    Methods that look at inputs (adamerging, fisher, regmean) take `network`, which runs the experts, and `unlabelled`,
    inputs by task (an expert's name); they return Learned: weights, coefficients and what was seen. `tested_on`, inputs by
    task, are compared with what was adapted on. `journal`, a folder, keeps their state, so that the same call goes on
    after a kill.
    Nothing given is changed. Raises SpoliaError with everything that does not fit, before any tensor is merged.
    """
    if isinstance(experts, str | os.PathLike):
        raise SpoliaError("one path is given", where="experts", mend="give a list of models: [PATH, PATH]")
    chosen = find(method, "method")
    if chosen.family != "merge":
        raise SpoliaError(
            f"{method} is no merge", where="method", mend=f"call spolia.{chosen.family}, or choose another"
        )
    checked = check_settings(chosen, settings, len(experts))
    steps = _steps(preprocess, chosen, len(experts))
    if share and out is None:
        raise SpoliaError("needs a folder that all processes see", where="share", mend="give `out`")
    if evaluate is not None:
        measuring.check(evaluate, out, share)
    if chosen.data or any(given is not None for given in (network, unlabelled, tested_on, journal)):
        from spolia.reports.card import render_card
        from spolia.runs.learned import check_call, merge_learned

        check_call(chosen, network, unlabelled, tested_on, journal)
        learned, facts = merge_learned(
            experts,
            base,
            chosen,
            checked,
            network,
            unlabelled,
            out=None if out is None else Path(out),
            dtype=checked_dtype(dtype),
            seed=seed,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            tested_on=tested_on,
            journal=journal,
            progress=progress,
            render=render_card,
            steps=steps,
        )
        if out is None:
            return learned
        if evaluate is not None and facts:  # of several processes one has written it
            measuring.measure(Path(out), evaluate, facts, render_card)
        return Path(out)
    if out is None:
        from spolia.runs.memory import merge_in_memory

        return merge_in_memory(experts, base, chosen, checked, dtype, seed, threads, chunk_memory, progress, steps)
    from spolia.runs.merging import run_merge

    request = request_from(experts, base, chosen, checked, dtype, seed, steps)
    facts: dict[str, Any] = {}
    folder = run_merge(
        request,
        Path(out),
        max_shard_size=max_shard_size,
        chunk_memory=chunk_memory,
        threads=threads,
        overwrite=overwrite,
        share=share,
        progress=progress,
        card=lambda prepared, name: card_of(prepared, name, facts),
    )
    if evaluate is not None:
        from spolia.reports.card import render_card

        measuring.measure(folder, evaluate, facts, render_card)
    return folder


def _steps(given: Any, chosen: Method, experts: int) -> tuple[Step, ...]:
    if given is None:
        return ()
    from spolia.runs.preprocessing import asked_steps

    return asked_steps(given, chosen, experts)


def card_of(prepared: Prepared, name: str, facts: dict[str, Any] | None = None) -> str:
    """The model card of the merged folder `name`; what it is made of goes to `facts` too."""
    from spolia.runs.documents import card_facts

    told = card_facts(prepared, name)
    if facts is not None:
        facts.update(told)
    return rendered(told)


def rendered(facts: dict[str, Any]) -> str:
    """The text of a model card."""
    from spolia.reports.card import render_card

    return render_card(facts)


def tables_of(results: Mapping[str, Any], to: str, width: int | None = None) -> str:
    """The tables of a ledger, as `spolia report` prints them."""
    from spolia.reports.tables import all_tables, written

    return written(all_tables(dict(results)), to, width)


def merge_recipe(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
    overwrite: bool = False,
    share: bool = False,
    seed: int | None = None,
    dry_run: bool = False,
    progress: Any = None,
) -> Path | Plan:
    """Merge what a recipe file (mergekit's form or ours, with a pool of folders) describes into the folder `out`."""
    from dataclasses import replace

    from spolia.runs.merging import plan_merge, run_merge
    from spolia.runs.recipe import read_source

    source = read_source(str(path))
    if source.documents:
        from spolia.runs.mergekit_multi import Job, arrange

        if share:
            mend = "give each document a file of its own, and share one merge after the other"
            raise SpoliaError("several documents cannot be shared", where=str(path), mend=mend)

        job = Job(
            arrange(list(source.documents)), source.folder, source.text, seed, max_shard_size, chunk_memory, threads
        )
        return (
            job.plan(Path(out)) if dry_run else job.run(Path(out), overwrite=overwrite, progress=progress, card=card_of)
        )
    request = read_request(path)
    if seed is not None:
        request = replace(request, seed=seed)
    if dry_run:
        return plan_merge(request, Path(out), max_shard_size=max_shard_size, chunk_memory=chunk_memory, threads=threads)
    return run_merge(
        request,
        Path(out),
        max_shard_size=max_shard_size,
        chunk_memory=chunk_memory,
        threads=threads,
        overwrite=overwrite,
        share=share,
        progress=progress,
        card=card_of,
    )


def plan(
    recipe: str | os.PathLike[str] | Recipe | StudyRecipe,
    overrides: Sequence[str] = (),
    *,
    machine: Machine | None = None,
) -> Plan:
    """What running `recipe` would do, from headers alone: nothing is trained, read or written.

    `machine` (a `spolia.runs.cost.Machine`) is where it is to run; by default here.
    """
    from spolia.runs.engine import plan_recipe
    from spolia.runs.recipe import Recipe, check_recipe, read_source
    from spolia.runs.studies import StudyRecipe

    if isinstance(recipe, Recipe | StudyRecipe):
        return plan_recipe(recipe, machine=machine)
    source = read_source(str(recipe))
    if source.is_mergekit:
        from spolia.runs.merging import plan_merge

        _no_overrides(overrides)
        return plan_merge(read_request(recipe), machine=machine)
    return plan_recipe(check_recipe(source, overrides), machine=machine)


def _no_overrides(overrides: Sequence[str]) -> None:
    if overrides:
        raise SpoliaError(
            "mergekit files take no overrides", where=overrides[0], mend="edit the file, or use a recipe of our form"
        )


def run(
    recipe: str | os.PathLike[str] | Recipe | StudyRecipe,
    folder: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    dry_run: bool = False,
    nproc: int = 1,
    progress: Any = None,
) -> Path | Plan:
    """Run a recipe into a folder (default `runs/NAME`), going on where it stopped. Returns the folder.

    With `dry_run` returns the plan: the first two steps, if it takes any, are tried in a folder that is gone again.
    `nproc` processes of this machine share the work; under torchrun those that it started do (docs/scale.md).
    """
    from spolia.runs.engine import run_recipe
    from spolia.runs.launch import launched
    from spolia.runs.ranks import as_one
    from spolia.runs.recipe import Recipe, check_recipe, read_source
    from spolia.runs.store import RunFolder
    from spolia.runs.studies import StudyRecipe

    with as_one(nproc, dry_run) as rank:
        given = recipe
        if not isinstance(recipe, Recipe | StudyRecipe):
            source = read_source(str(recipe))
            if source.is_mergekit:
                raise SpoliaError("is a mergekit recipe", where=str(recipe), mend=f"spolia merge {recipe} OUT")
            recipe = check_recipe(source, overrides)
        target = RunFolder(Path(folder) if folder is not None else Path("runs") / recipe.short_name)
        if nproc > 1 and not dry_run:
            launched(nproc, recipe, target, given, overrides, fresh, progress)
            return RunPath(target.path)
        done = run_recipe(recipe, target, fresh=fresh, dry_run=dry_run, progress=None if rank else progress)
        return RunPath(done) if isinstance(done, Path) else done


class RunPath(_PATH):
    """The path of a run folder, of which a notebook shows the tables."""

    def _repr_html_(self) -> str:
        from spolia.core.shown import html_text
        from spolia.reports.tables import render

        try:
            return html_text(render(self), str(self))
        except SpoliaError as error:
            return html_text(str(error), str(self))


def report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` of a run folder, finished or not, and return its path."""
    from spolia.reports.html import write_report

    return write_report(Path(folder))


def ui(folder: str | os.PathLike[str] = "runs", *, port: int = 0, ready: Callable[[str], None] | None = None) -> None:
    """Serve pages that show the runs under `folder` to this machine's browser, until interrupted.

    `ready` is told the address, which holds the token that lets its reader in; without, it is printed. Port 0: a free one.
    """
    import secrets

    from spolia.reports.pages import render
    from spolia.runs.serve import serve
    from spolia.runs.ui import HOST, application

    token, told = secrets.token_urlsafe(24), ready or print
    serve(application(Path(folder), token, render), HOST, port, lambda url: told(f"{url}/{token}/"))

"""Recipes of links: the recipe's receiver and those beside it, each at every level of noise, on the same text.

What was measured is kept: a stopped run goes on where it was, a finished seed stays in checkpoints/. Results grow while
the sweep goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core import tensorfile
from spolia.errors import Problems, SpoliaError
from spolia.methods.link.deepsc import DeepSC, DeepSCLink
from spolia.runs import link_figures, link_ledger
from spolia.runs.digits_pool import one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.link_ends import SMALL
from spolia.runs.link_measuring import measured
from spolia.runs.link_problems import PROBLEMS as PROBLEMS
from spolia.runs.link_problems import LinkProblem, check_files
from spolia.runs.link_schemes import Scheme, schemes_of
from spolia.runs.link_text import data_of
from spolia.runs.link_text import problem_text as problem_text
from spolia.runs.link_text import told as told
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder, write_whole
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.parts.link import Link
    from spolia.runs.link_ends import Ends

_EVERY, _SHARE = 20.0, 0.05  # seconds between tables of a sweep that goes on, and the part of all time they may take
_START, _CUT = 6.0, 2.0  # seconds on one core: imports; tokenizer and n-grams of a seed
_READ, _FRAME = 2e-5, 0.002  # of a hypothesis and token; of a frame that is coded
_STEP = 1e-10  # of a multiplication in training


def check_study(
    method: Method,
    settings: Any,
    problem: LinkProblem,
    where: Callable[[tuple[Any, ...]], str],
    problems: Problems,
) -> None:
    """What method and problem ask of each other."""
    try:
        problem.channel.channel()
    except SpoliaError as error:
        for one in error.problems:
            problems.add(where(("problem", *one.where.split("."))), one.what, one.mend)
    counted = problem.prior in ("ngram", "unigram")
    if getattr(settings, "search", "") == "viterbi" and not counted:
        problems.add(where(("method", "search")), "viterbi needs counts of n-grams", "write `prior: ngram`, or beam")
    if getattr(settings, "metric", "") == "symbol" and problem.interleave:
        mend = "leave out `interleave`, or write `metric: bit`"
        problems.add(where(("method", "metric")), "symbols are not whole once bits are interleaved", mend)
    if problem.labels == "aware" and problem.prior == "uniform":
        problems.add(
            where(("problem", "labels")), "a uniform model likes no labels", "write permuted, or another prior"
        )
    if any(beam < 1 for beam in problem.beams):
        problems.add(where(("problem", "beams")), "a beam below 1", "whole numbers from 1 on")
    if problem.prior == "ngram" and (problem.vocabulary + 1) ** max(problem.order - 1, 1) >= 1 << 63:
        problems.add(where(("problem", "order")), "too many histories", "a lower order, or a smaller vocabulary")


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do. SpoliaError for files that are not there."""
    problem, schemes = recipe.problem, schemes_of(recipe)
    check_files(problem, recipe.settings)
    touched, own = data_of(problem, recipe.method.name), schemes[-1].label
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    learn = [s.label for s in schemes if s.kind == "deepsc"] + ["tiny_lm"] * (problem.prior == "tiny_lm")
    names = ", ".join(scheme.label for scheme in schemes)
    levels = f"{len(problem.snr)} levels of noise"
    return Plan(
        title=f"{own} and {len(schemes) - 1} beside it over {problem.source}, {levels}{each}",
        method=recipe.method.name,
        phases=[
            Phase("learn", "tokenizer, counts of the source codes, the receiver's model", touched["training"], "model"),
            *([Phase("train", f"networks of {', '.join(learn)}", touched["training"], "networks")] if learn else []),
            Phase("choose", "labels and constellations", touched["choice"]),
            Phase("sweep", f"{names} at {levels}", touched["test"], writes="checkpoints/, result/"),
        ],
        peak_memory_bytes=700_000_000 if not _theirs(problem) else 3_000_000_000,
        disk_needed_bytes=recipe.seeds * (2_000_000 + 200 * problem.sentences * len(schemes) * len(problem.snr)),
        seconds=round(_START + recipe.seeds * _seconds(problem, schemes), 1),
        time_basis=f"{_START:g} s to start, then by frame, hypothesis and step: measured on one core with n-grams",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=["receivers are told how many tokens a frame has", f"a point ends after {problem.errors} wrong frames"],
    )


def _theirs(problem: LinkProblem) -> bool:
    return not isinstance(problem.prior, str)


def _length(problem: LinkProblem) -> int:
    """Tokens of a frame, about."""
    return problem.length or 24


def _seconds(problem: LinkProblem, schemes: list[Scheme]) -> float:
    """Of one seed."""
    frames, length = problem.sentences * len(problem.snr), _length(problem)
    slow = 60 if _theirs(problem) or problem.prior == "tiny_lm" else 1
    reads = sum(getattr(s.settings, "beam", 1) for s in schemes if s.kind in ("llm_sc", "published", "separate"))
    learned = sum(_training(s.settings, length) for s in schemes if s.kind == "deepsc")
    if problem.prior == "tiny_lm":
        size = SMALL if problem.small else {"width": problem.width, "depth": problem.depth, "steps": problem.steps}
        learned += size["steps"] * 32 * length * 72 * size["width"] ** 2 * size["depth"] * _STEP
    return _CUT + frames * (length * reads * slow * _READ + len(schemes) * _FRAME) + learned


def _training(s: DeepSC, length: int) -> float:
    parameters = s.depth * (12 * s.width**2 + 4 * s.width * s.inner) + 1000 * s.width
    return s.steps * (0.005 + s.batch * length * 6 * parameters * _STEP)


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's ends in result/."""
    check_files(recipe.problem, recipe.settings)
    left = [seed for seed in recipe.every_seed if not (run.path / _kept(seed)).exists()]
    total = len(left) * _steps(recipe)
    journal, found = run.journal(follow(progress, total)), list[dict[str, Any]]()
    with recorded(run, journal, progress, total), one_thread():
        for seed in recipe.every_seed:
            one = run.read_json(_kept(seed))
            if one is None:
                run.set_status("running", phase=f"seed {seed}")
                told = _Live(recipe, run, found)
                one, ends, links = measured(recipe, seed, run.checkpoints, journal, told)
                if seed == recipe.seed:
                    _leave(run, ends, links)
                run.write_json(_kept(seed), one)
            found.append(one)
            write(recipe, run, found)
        run.write_text("summary.txt", link_ledger.summary(recipe, found) + "\n")


def _kept(seed: int) -> str:
    return f"checkpoints/link-seed-{seed}.json"


def _steps(recipe: StudyRecipe) -> int:
    """Steps of all loops of a seed, about."""
    problem: LinkProblem = recipe.problem
    learned = sum(s.settings.steps for s in schemes_of(recipe) if s.kind == "deepsc")
    if problem.prior == "tiny_lm":
        learned += SMALL["steps"] if problem.small else problem.steps
    return learned + -(-problem.sentences // problem.batch)


def write(recipe: StudyRecipe, run: RunFolder, found: list[dict[str, Any]]) -> None:
    """Table and figures of what has been measured."""
    data = data_of(recipe.problem, recipe.method.name)
    run.write_json("results.json", link_ledger.ledger(run, recipe, found, data))
    run.write_json("figures.json", link_figures.figures(recipe, found))


class _Live:
    """Writes the table now and then while a sweep goes on."""

    def __init__(self, recipe: StudyRecipe, run: RunFolder, before: list[dict[str, Any]]):
        self._recipe, self._run, self._before, self._said = recipe, run, before, time.monotonic()
        self._pause = _EVERY

    def __call__(self, now: dict[str, Any]) -> None:
        start = time.monotonic()
        if start - self._said >= self._pause:
            write(self._recipe, self._run, [*self._before, now])
            self._said = time.monotonic()
            self._pause = max(_EVERY, (self._said - start) / _SHARE)


def _leave(run: RunFolder, ends: Ends, links: dict[str, Link]) -> None:
    """What both ends must have in common, and the recipe's own networks."""
    run.result.mkdir(exist_ok=True)
    run.write_json("result/code.json", ends.code.config | {"fingerprint": ends.code.fingerprint})
    tensorfile.write(run.result / "labels.safetensors", {"codes": ends.code.labels.codes})
    if hasattr(ends.tokenizer, "to_json"):
        write_whole(run.result / "tokenizer.json", ends.tokenizer.to_json())
    own = next(reversed(links.values()))
    if isinstance(own, DeepSCLink):
        tensors = {name: tensor.detach().clone() for name, tensor in own.network.state_dict().items()}
        tensorfile.write(run.result / "deepsc.safetensors", tensors)


__all__ = ["PROBLEMS", "check_study", "plan_study", "problem_text", "run_study", "told"]

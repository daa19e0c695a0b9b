"""Merges compared on digits experts made in the run: what `spolia demo` and recipes with a digits pool have in common.

Each seed draws its own splits, trains its own pool, merges, chooses scales on validation images and counts on test
images. A finished seed is kept in checkpoints/, so a run goes on with the next one; the results grow seed by seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import Task, choose, evaluate, mean_percent
from spolia.catalog import find
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Journal
from spolia.errors import SpoliaWarning
from spolia.parts.taskvector import TaskVector
from spolia.runs import digits_ledger
from spolia.runs.digits_ledger import BASE, EXPERTS, METRIC
from spolia.runs.digits_pool import BASE_STEPS, EXPERT_STEPS, DigitExperts, make_pool, one_thread
from spolia.runs.store import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method and its settings. With `scales`, the best of them on validation is taken.

    `known`: each task is judged with the mask of its own expert put on, so it is no single model for all tasks.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = ()
    baseline: bool = False
    metric: str = METRIC
    domains: tuple[str, ...] = ()  # whose experts are merged and judged; empty: all
    known: bool = False
    preprocess: tuple[Mapping[str, Any], ...] = ()  # what is done to the task vectors first, as in a recipe


@dataclass(frozen=True)
class Study:
    """What is compared: entries over domains and seeds. `dtype` is what merged weights are stored in, None for fp32."""

    name: str
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        for entry in self.entries:
            assert not entry.scales or find(entry.method).settings_class().base == "required", "no line to walk along"

    def steps_left(self, run: RunFolder) -> int:
        """Steps of the loops of unfinished seeds, for a progress bar."""
        left = sum(not (run.path / _scores(seed)).exists() for seed in self.seeds)
        return left * (BASE_STEPS + EXPERT_STEPS * len(self.domains) + len(self.entries))


def pool_of(run: RunFolder, study: Study, seed: int, journal: Journal) -> DigitExperts:
    """The pool of one seed, trained where it is not there yet."""
    return make_pool(run.checkpoints / f"seed-{seed}", study.domains, seed, journal)


def _scores(seed: int) -> str:
    return f"checkpoints/scores-seed-{seed}.json"


def run_study(run: RunFolder, study: Study, journal: Journal) -> dict[str, Any]:
    """Runs or finishes the study in `run`; results.json and figures.json grow with every seed. The last ledger."""
    found: list[dict[str, Any]] = []
    ledger: dict[str, Any] = {}
    with one_thread():
        for seed in study.seeds:
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                pool = pool_of(run, study, seed, journal)
                scored = _score(pool, study, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            ledger = digits_ledger.ledger(run, study, found)
            run.write_json("results.json", ledger)
            run.write_json("figures.json", digits_ledger.figures(study, found))
    run.write_text("summary.txt", digits_ledger.summary(study, found, ledger) + "\n")
    return ledger


# --- one seed --------------------------------------------------------------------------------------------------------


def _score(pool: DigitExperts, study: Study, journal: Journal) -> dict[str, Any]:
    """Counts on test images and choices on validation images, as JSON."""
    base = read_tensors(pool.base)
    experts = {domain: read_tensors(pool.expert(domain)) for domain in pool.domains}
    validation, test = pool.tasks("validation"), pool.tasks("test")
    scores: dict[str, dict[str, Any]] = {}
    seen: dict[str, dict[str, float]] = {}
    chosen: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for entry in study.entries:
        group = entry.domains or study.domains
        if entry.metric not in scores:
            scores[entry.metric] = _references(pool, base, experts, group, test)
            seen[entry.metric] = {}
    with journal.phase(f"seed {pool.seed} merge"):
        for i in journal.steps(len(study.entries)):
            entry = study.entries[i]
            group = entry.domains or study.domains
            tried = [task for task in validation if task.name in group]
            given = {domain: experts[domain] for domain in group}
            merged = _merged(pool, entry, base, given, study.dtype)
            if entry.scales:
                scale, curve = _best_scale(pool, entry, base, merged, tried)
                chosen[entry.label], curves[entry.label] = scale, curve
                settings = {**entry.settings, "scale": scale}
                merged = _merged(pool, entry, base, given, study.dtype, settings)
            outputs = _with_masks(pool, entry, base, given, merged) if entry.known else pool.outputs(merged)
            seen[entry.metric][entry.label] = mean_percent(evaluate(outputs, tried))
            scores[entry.metric][entry.label] = _counts(outputs, [task for task in test if task.name in group])
    vectors = [TaskVector.between(base, expert) for expert in experts.values()]
    cosines = [[a.cosine(b) for b in vectors] for a in vectors]
    return {"scores": scores, "validation": seen, "chosen": chosen, "curves": curves, "cosines": cosines}


def _merged(
    pool: DigitExperts,
    entry: Entry,
    base: State,
    experts: Mapping[str, State],
    dtype: str | None,
    settings: Mapping[str, Any] | None = None,
) -> State:
    from spolia.runs.verbs import merge

    start = base if needs_base(entry.method, len(experts)) else None
    given = entry.settings if settings is None else settings
    method, seed = entry.method, pool.seed
    if not find(method).data:
        return merge(
            list(experts.values()),
            base=start,
            method=method,
            settings=given,
            preprocess=entry.preprocess,
            dtype=dtype,
            seed=seed,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpoliaWarning)  # that entropy misleads is for the page to say, once
        learned = merge(
            experts,
            base=start,
            method=method,
            settings=given,
            preprocess=entry.preprocess,
            dtype=dtype,
            seed=seed,
            network=pool.network,
            unlabelled=pool.unlabelled(tuple(experts)),
        )
    return learned.weights


def _with_masks(
    pool: DigitExperts, entry: Entry, base: State, experts: Mapping[str, State], merged: State
) -> Callable[[str, Tensor], Tensor]:
    """outputs(task, x) of the merged model with the mask of the task's expert put on."""
    from spolia.runs.masking import attach, masks

    found = masks(experts, base=base, method=entry.method, settings=entry.settings)
    own = {name: pool.outputs(attach(merged, mask, base=base)) for name, mask in found.items()}
    return lambda task, x: own[task](task, x)


def needs_base(method: str, experts: int) -> bool:
    """Whether the base goes into a merge of so many experts: slerp walks from it to a single one."""
    asked = find(method).settings_class().base
    return asked == "required" or (asked == "optional" and experts == 1)


def _best_scale(
    pool: DigitExperts, entry: Entry, base: State, merged: State, tasks: list[Task]
) -> tuple[float, list[float]]:
    """The scale that is best on `tasks`, and the accuracy at each of the entry's scales, in per cent.

    Every method with a scale gives base + scale * change, so one merge shows the whole line.
    """
    default = find(entry.method).settings_class()(**entry.settings).scale

    def accuracy(scale: float) -> float:
        state = {name: start + (merged[name] - start) * (scale / default) for name, start in base.items()}
        return mean_percent(evaluate(pool.outputs(state), tasks))

    return choose(entry.scales, accuracy)


def _references(
    pool: DigitExperts, base: State, experts: dict[str, State], group: Sequence[str], test: list[Task]
) -> dict[str, Any]:
    """Base, experts at home, and every expert everywhere."""
    tasks = [task for task in test if task.name in group]
    rows = {BASE: _counts(pool.outputs(base), tasks), EXPERTS: {}}
    for domain in group:
        rows[f"expert {domain}"] = counts = _counts(pool.outputs(experts[domain]), tasks)
        rows[EXPERTS][domain] = counts[domain]
    return rows


def _counts(outputs: Callable[[str, Tensor], Tensor], tasks: list[Task]) -> dict[str, list[int]]:
    return {task: [share.correct, share.total] for task, share in evaluate(outputs, tasks).items()}

"""Data-free recipes: a pool of classifiers, learners made from it without data, and the lines that they must beat.

The pool is one for all seeds; a finished seed is kept in checkpoints/, and the results grow seed by seed. The table's line
of the method is the learner at the end of its training; `selected` is the one that validation chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spolia.catalog import Method
from spolia.core.journal import Journal
from spolia.errors import Problems
from spolia.runs import datafree_ledger as ledgers
from spolia.runs.datafree_entries import (
    REAL,
    SELECTED,
    Entry,
    entries_of,
    free_lines,
    learner_network,
    on_real_data,
    real_steps,
)
from spolia.runs.datafree_judging import (
    along,
    judge_of,
    kept_along,
    kinds_told,
    points_told,
    real_episodes,
    scores_told,
    selection_told,
    sheet_told,
)
from spolia.runs.datafree_problems import (
    PROBLEMS,
    DataFree,
    DigitsModels,
    Held,
    OwnModels,
    PackedModels,
    TextureModels,
    _Made,
    check_files,
    classes_of,
    features,
)
from spolia.runs.datafree_words import data_of, problem_text, told
from spolia.runs.digits_pool import one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

__all__ = ["PROBLEMS", "check_study", "plan_study", "problem_text", "run_study", "told"]

_START = 8.0  # seconds on one core: imports
_PER_IMAGE = {DigitsModels: 1.2e-5, TextureModels: 2.5e-5, PackedModels: 4e-4, OwnModels: 4e-4}  # a pass and back
_MEMORY = {DigitsModels: 700_000_000, TextureModels: 900_000_000}


def check_study(
    method: Method, settings: Any, problem: DataFree, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    if isinstance(problem, OwnModels) and problem.models is None:
        problems.add(where(("problem", "models")), "no models are named", "add `models: DESCRIPTION.yaml`")
    if isinstance(problem, DigitsModels | TextureModels) and "conv4" in problem.archs:
        what = "Conv4 halves four times, and these images have fewer than 16 pixels a side"
        problems.add(where(("problem", "archs")), what, "write conv2, resnet10, or both")
    if settings.embedding == "probe":
        mend = "write student or cka; a probe is given in Python: spolia.datafree(..., probe=…)"
        problems.add(where(("method", "embedding")), "a recipe names no probe", mend)
    if settings.reward == "real" and problem.validation != "real":
        mend = "write held_out, or problem.validation: real"
        problems.add(where(("method", "reward")), "there are no real episodes to be rewarded by", mend)
    if settings.head == "linear" and isinstance(problem, _Made) and problem.expert_ways != problem.ways:
        what = f"models of {problem.expert_ways} classes and tasks of {problem.ways} do not share one linear head"
        problems.add(where(("method", "head")), what, "write prototypes, or equal expert_ways and ways")
    asked = settings.shots + settings.queries
    if settings.tasks == "within" and asked > settings.per_class_kept:
        problems.add(
            where(("method", "per_class_kept")), f"keeps too few for tasks of {asked}", f"keep {asked} or more"
        )


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do."""
    problem, entries = recipe.problem, entries_of(recipe)
    check_files(problem)
    data = data_of(problem)
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    pool = Phase("pool", "reads the models", "none", writes="nothing")
    if isinstance(problem, _Made):
        pool = Phase("pool", f"trains {problem.experts} models", data["pool"], "each model", writes="checkpoints/pool/")
    return Plan(
        title=f"{recipe.method.name} from a pool of {problem.source} models{each}",
        method=recipe.method.name,
        phases=[
            pool,
            Phase("train", f"trains {', '.join(e.label for e in entries)}", data["training"], "network, generator"),
            Phase("select", f"looks {problem.checks} times at {problem.looks} episodes", data["selection"]),
            Phase("real data", "trains the learner that has the data", data["oracle"], "network"),
            Phase("test", "asks all of them about unseen classes", data["test"], writes="result/"),
        ],
        peak_memory_bytes=_MEMORY.get(type(problem), 4_000_000_000),
        disk_needed_bytes=100_000_000,
        seconds=_seconds(recipe, entries),
        time_basis=f"{_START:g} s to start, then by image seen: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=["the line of the method is its end; what validation selected and the peak on test stand apart"],
    )


def _seconds(recipe: StudyRecipe, entries: list[Entry]) -> float:
    """Images seen by networks, times what one costs."""
    problem, seen = recipe.problem, 0.0
    for entry in entries:
        s = entry.settings
        ways = getattr(problem, "expert_ways", problem.ways)
        recovery = s.steps / s.every * s.experts * ways * s.per_class * (4 * s.recovery_steps + 4)
        replay = (s.steps - s.warm_up) * s.replays * s.replay_tasks * s.ways * (s.shots + s.queries)
        seen += recovery + replay * (2 if s.interpolate else 1)
    seen += entries[-1].settings.steps * 10 * 4 * problem.ways * 15 if "real" in problem.baselines else 0
    asked = problem.episodes * problem.ways * (problem.queries + max(problem.shots)) * len(problem.shots)
    seen += asked * (len(entries) + 4) / 3
    pool = problem.experts * problem.epochs * problem.expert_ways * 150 if isinstance(problem, _Made) else 0
    return round(_START + _PER_IMAGE[type(problem)] * (recipe.seeds * seen + pool), 1)


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """The pool, every seed, the table and figures, and the first seed's learner in result/."""
    check_files(recipe.problem)
    entries = entries_of(recipe)
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * (
        sum(entry.settings.steps for entry in entries) + real_steps(recipe.problem, entries[-1].settings)
    )
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread():
        held, pool, attacks = _ground(recipe, run, journal) if left else (None, None, {})
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                assert held is not None
                run.set_status("running", phase=f"seed {seed}")
                scored = _seed(recipe, run, entries, (held, pool, attacks), seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            ledger = ledgers.ledger(run, recipe, found, data_of(recipe.problem))
            run.write_json("results.json", ledger)
            run.write_json("figures.json", ledgers.figures(recipe, found))
        run.write_text("summary.txt", ledgers.summary(recipe, ledger) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/datafree-seed-{seed}.json"


def _ground(recipe: StudyRecipe, run: RunFolder, journal: Journal) -> tuple[Held, Any, dict[str, str]]:
    """Real classes, the pool, and by name what is wrong with a model that lies."""
    problem = recipe.problem
    run.set_status("running", phase="pool")
    run.checkpoints.mkdir(exist_ok=True)
    if isinstance(problem, OwnModels):
        from spolia.runs.datafree_own import own_pool

        return own_pool(problem)
    from spolia.runs.datafree_pool import make_pool

    held = classes_of(problem, recipe.seed)
    with journal.phase("pool"):  # a journal of its own: the bar is for what comes after
        pool, attacks = make_pool(problem, held, recipe.seed, run.checkpoints / "pool", run.journal())
    return held, pool, {expert.name: attack for expert, attack in zip(pool, attacks, strict=True) if attack}


def _seed(
    recipe: StudyRecipe,
    run: RunFolder,
    entries: list[Entry],
    ground: tuple[Held, Any, Any],
    seed: int,
    journal: Journal,
) -> dict[str, Any]:
    """One seed's scores by line, and what its trainings left to look at, as JSON."""
    from spolia.methods.datafree.combination import combined, selection_of
    from spolia.methods.datafree.training import audited

    (held, pool, attacks), problem = ground, recipe.problem
    judge, real = judge_of(problem, held, recipe.seed), real_episodes(problem, held, recipe.seed)
    scored: dict[str, Any] = {"scores": {}, "points": {}, "seconds": {}, "audit": []}
    audit = pool.audit()
    scored["audit"] = [[f.expert, f.level, f.what] for f in audit.findings]

    def keep(label: str, learner: Any) -> None:
        if judge.tests:
            scored["scores"][label] = scores_told(judge.scores(learner.predict))

    for label, learner in free_lines(problem, pool, entries[-1].settings, seed, audit.suspects).items():
        keep(label, learner)
    if "real" in problem.baselines and held.base:
        with journal.phase(f"seed {seed} real data"):
            keep(REAL, on_real_data(problem, pool, held, entries[-1].settings, seed, journal))
    for entry in entries:
        own, watched = entry is entries[-1], along(problem, pool, real, judge, recipe.seed)
        sound = audited(pool, entry.settings)
        chosen = selection_of(sound, entry.settings, seed, embed=features, validation=real)
        network = learner_network(problem, sound, seed)
        with journal.phase(f"seed {seed} train {entry.label}"):
            watch = kept_along(run, f"checkpoints/looks-{seed}-{entries.index(entry)}.json", watched)
            learner = combined(
                sound, network, entry.settings, journal, seed=seed, embed=features, selection=chosen, watch=watch
            )
        keep(entry.label, learner)
        scored["points"][entry.label] = points_told(watched.points)
        times = [told["seconds"] for told in learner.recovered.values()]
        scored["seconds"][entry.label] = sum(times) / max(1, len(times))
        if own:
            keep(f"{entry.label}{SELECTED}", learner.chosen())
            scored |= {"selection": selection_told(chosen, sound), "kinds": kinds_told(problem, sound, attacks)}
            scored["recovered"] = {sound[place].name: told for place, told in learner.recovered.items()}
            scored |= {"attacks": attacks, "sheet": sheet_told(learner, sound, seed) if seed == recipe.seed else None}
            if seed == recipe.seed:
                run.result.mkdir(exist_ok=True)
                learner.save(run.result / "learner.safetensors")
    return scored

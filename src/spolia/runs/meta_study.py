"""Few-shot recipes: a learner meta-trained for every seed beside its baselines, all judged on the same episodes.

A finished seed is kept in checkpoints/; the results grow seed by seed. The table is of the weights that validation chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spolia.catalog import Method
from spolia.core import tensorfile
from spolia.core.journal import Journal
from spolia.errors import Problems
from spolia.runs import meta_ledger
from spolia.runs.digits_pool import one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.meta_entries import (
    UNADAPTED,
    UNTRAINED,
    Entry,
    entries_of,
    label_of,
    trained,
    untrained,
)
from spolia.runs.meta_judging import VIEWS, along, judged
from spolia.runs.meta_problems import (
    PROBLEMS,
    SHARES,
    Classes,
    DigitsEpisodes,
    FewShot,
    FolderEpisodes,
    OmniglotEpisodes,
    PackedEpisodes,
    check_files,
    classes_of,
)
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

__all__ = ["PROBLEMS", "check_study", "plan_study", "problem_text", "run_study", "told"]

_START, _PER_EPISODE, _SLOW = 6.0, 0.0015, 25  # seconds on one core: imports; a test episode of digits; Conv4 to that
_PER_STEP = {
    "protonet": 0.004,
    "maml": 0.02,
    "anil": 0.03,
    "boil": 0.01,
    "unicorn": 0.012,
    "reptile": 0.03,
    "msd": 0.02,
}


def check_study(
    method: Method, settings: Any, problem: FewShot, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    if isinstance(problem, FolderEpisodes) and problem.folder is None:
        problems.add(where(("problem", "folder")), "no folder is named", "add `folder: PATH`")
    basis = settings.basis() if hasattr(settings, "basis") else settings
    if getattr(basis, "loss", "cross_entropy") == "squared":
        problems.add(where(("method", "loss")), "episodes of classes have labels, not numbers", "write cross_entropy")
    if isinstance(problem, DigitsEpisodes) and getattr(basis, "bn", "batch") == "frozen":
        problems.add(where(("method", "bn")), "the network for digits has no batch norm", "write batch")


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do."""
    problem, entries = recipe.problem, entries_of(recipe)
    check_files(problem)
    touched, slow = data_of(problem), 1 if isinstance(problem, DigitsEpisodes) else _SLOW
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    steps = sum(entry.steps * _PER_STEP[entry.method] for entry in entries)
    asked = (len(entries) + 2) * problem.episodes * (2 + VIEWS) * _PER_EPISODE
    return Plan(
        title=f"{label_of(recipe)} on {problem.source} episodes, {problem.ways}-way {problem.shots}-shot{each}",
        method=recipe.method.name,
        phases=[
            Phase("train", f"meta-trains {', '.join(e.label for e in entries)}", touched["training"], "network"),
            Phase("select", "looks at validation episodes on the way", touched["selection"]),
            Phase("test", "standard and changed supports, consistency of views", touched["test"], writes="result/"),
        ],
        peak_memory_bytes=700_000_000 if slow == 1 else 3_000_000_000,
        disk_needed_bytes=recipe.seeds * len(entries) * 3_000_000,
        seconds=round(_START + slow * recipe.seeds * (steps + asked), 1),
        time_basis=f"{_START:g} s to start, then by step and episode: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=["the weights that validation chose are judged; the last ones stand beside them"],
    )


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's learner in result/."""
    check_files(recipe.problem)
    entries = entries_of(recipe)
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * sum(entry.steps for entry in entries)
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread():
        classes = classes_of(recipe.problem, recipe.seed) if left else None
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                assert classes is not None
                run.set_status("running", phase=f"seed {seed}")
                scored = _seed(recipe, run, entries, classes, seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            ledger = meta_ledger.ledger(run, recipe, found, data_of(recipe.problem))
            run.write_json("results.json", ledger)
            run.write_json("figures.json", meta_ledger.figures(recipe, found))
        run.write_text("summary.txt", meta_ledger.summary(recipe, ledger) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/meta-seed-{seed}.json"


def _seed(
    recipe: StudyRecipe, run: RunFolder, entries: list[Entry], classes: Classes, seed: int, journal: Journal
) -> dict[str, Any]:
    """One seed's scores by line and test, and accuracy along the inner steps, as JSON."""
    problem = recipe.problem
    scored: dict[str, Any] = {"scores": {}, "along": {}, "selected": {}, "validation": {}}

    def keep(label: str, learner: Any, **more: Any) -> None:
        scored["scores"][label] = judged(recipe.problem, learner, classes.test, recipe.seed, **more)

    for entry in entries:
        with journal.phase(f"seed {seed} train {entry.label}"):
            last = trained(entry, problem, classes, seed, journal)
        learner = last.chosen()
        own = entry is entries[-1]
        best = last.selection.best_step
        scored["selected"][entry.label] = best
        scored["validation"][entry.label] = dict(last.selection.scores).get(best)
        with journal.phase(f"seed {seed} test {entry.label}"):
            if own and entry.method == "protonet":
                keep(f"protonet{UNTRAINED}", untrained(entry, problem, classes, seed))
            if own and entry.method != "protonet":
                keep(f"{entry.label}{UNADAPTED}", learner, steps=0)
            keep(entry.label, learner)
            if own and best == entry.basis.steps:
                scored["scores"][f"{entry.label}, last"] = scored["scores"][entry.label]
            elif own:
                keep(f"{entry.label}, last", last)
            if entry.method != "protonet":
                scored["along"][entry.label] = along(problem, learner, classes.test, recipe.seed)
        if own and seed == recipe.seed:
            _write(run, learner)
    return scored


def _write(run: RunFolder, learner: Any) -> None:
    """The learner in result/."""
    run.result.mkdir(exist_ok=True)
    if hasattr(learner, "save"):
        learner.save(run.result / "learner.safetensors")
        return
    tensors = {name: t.detach().clone() for name, t in learner.state_dict().items()}
    tensorfile.write(run.result / "learner.safetensors", tensors)


# --- words -----------------------------------------------------------------------------------------------------------


def data_of(problem: FewShot) -> dict[str, str]:
    """What each phase touches."""
    if isinstance(problem, DigitsEpisodes):
        return {
            "training": "scans of seven digits with labels",
            "selection": f"{problem.validation} episodes of the same digits mirrored, a look",
            "test": f"{problem.episodes} episodes of the three other digits",
        }
    if isinstance(problem, OmniglotEpisodes):
        return {
            "training": f"85 % of the background characters{', and their turns' if problem.turned else ''}",
            "selection": f"{problem.validation} episodes of the other background characters, a look",
            "test": f"{problem.episodes} episodes of the evaluation characters",
        }
    name = problem.data if isinstance(problem, PackedEpisodes) else "the folder"
    share, looked, left = (f"{100 * part:g} %" for part in SHARES)
    other = problem.test if isinstance(problem, PackedEpisodes) else None
    return {
        "training": f"{share} of the classes of {name}",
        "selection": f"{problem.validation} episodes of {looked} of its classes, a look",
        "test": f"{problem.episodes} episodes of {other or f'the other {left} of its classes'}",
    }


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    if tiny:
        return "\n".join(
            [
                "",
                "problem:",
                "  source: digits  # real scans that come inside scikit-learn; no download",
                "  ways: 3  # classes of an episode; three digits are left for the test",
                "  shots: 1  # labelled inputs of each class",
                "  most_steps: 100  # outer steps of a training, at most; null: the method's own",
            ]
        )
    return "\n".join(
        [
            "",
            "problem:",
            "  source: omniglot  # omniglot28.npz in the folder SPOLIA_DATA; also: packed, folder, digits",
            "  ways: 5  # classes of an episode",
            "  shots: 1  # labelled inputs of each class",
            "  views: shaken  # how views of a support differ: shaken, paper, or {rotate: 0.3, …}",
            "  scenarios: [shaken]  # also: corrupted, cropped, recoloured, mixed",
        ]
    )


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    score = "accuracy over test episodes, beside ProtoNet and the learner before it adapts"
    if method.name == "msd":
        score = "consistency of views above its base's; accuracy beside the base, ProtoNet and no adaptation"
    data = data_of(DigitsEpisodes() if tiny else OmniglotEpisodes(source="omniglot"))
    time = "under a minute on one core" if tiny else "hours on a processor; `spolia plan` estimates it"
    return time, score, "; ".join(data.values())

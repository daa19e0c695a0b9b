"""How data-free learners of a run are judged, and what is kept of a training for its report."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spolia.bench.datafree import Along, Judge
from spolia.bench.fewshot_scores import Point
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.parts.imagestore import StoreEpisodes
from spolia.runs.datafree_problems import DataFree, Held, OwnModels, sampler

if TYPE_CHECKING:
    from spolia.bench.fewshot_scores import Scores
    from spolia.parts.episode import EpisodeSampler
    from spolia.parts.white import WhitePool
    from spolia.runs.store import RunFolder

SHEET_ROWS, SHEET_COLUMNS = 12, 10
MOST_SHOWN = 40  # models in a matrix


def judge_of(problem: DataFree, held: Held, seed: int) -> Judge:
    """Tests by set and number of shots."""
    tests = {}
    for name, classes in held.test.items():
        for shots in problem.shots:
            task = f"{problem.ways}-way {shots}-shot"
            tests[f"{name}, {task}" if len(held.test) > 1 else task] = sampler(problem, classes, shots, seed)
    return Judge(tests, problem.episodes, problem.looks)


def real_episodes(problem: DataFree, held: Held, seed: int) -> EpisodeSampler | None:
    """Real validation episodes, where the recipe says that there are some."""
    if problem.validation != "real" or not held.validation:
        return None
    sets = [one for one in held.validation.values() if len(one) >= problem.ways]
    return sampler(problem, sets, problem.shots[0], seed)


def along(problem: DataFree, pool: WhitePool, real: EpisodeSampler | None, judge: Judge, seed: int) -> Along:
    """What watches a training: real episodes where there are some, else pseudo-tasks of what was recovered so far."""
    if real is not None:
        from spolia.bench.fewshot import evaluate

        return Along(lambda step, learner: evaluate(learner.predict, real, problem.looks).mean(), judge)

    def pseudo(step: int, learner: Any) -> float:
        sizes = {"ways": problem.ways, "shots": problem.shots[0], "queries": learner.settings.queries}
        episodes = StoreEpisodes(learner.store, **sizes, seed=seed + 1, shared=pool.shared)
        return pseudo_accuracy(learner, episodes, problem.looks) if episodes.ready else math.nan

    return Along(pseudo, judge)


def pseudo_accuracy(learner: Any, episodes: StoreEpisodes, count: int) -> float:
    """Mean accuracy on the store's episodes 0 … count - 1, in per cent."""
    right = []
    for start in range(0, count, 10):
        for one in episodes.batch(range(start, min(start + 10, count))).floats():
            logits = learner.predict(one.support_x, one.support_y, one.query_x)
            right.append(float((logits.argmax(1) == one.query_y).double().mean()))
    return 100 * sum(right) / len(right)


# --- as JSON ---------------------------------------------------------------------------------------------------------


def scores_told(scores: dict[str, Scores]) -> dict[str, Any]:
    return {
        task: {
            "episodes": one.episodes,
            "scenario": one.scenario,
            "values": {m: list(v) for m, v in one.values.items()},
        }
        for task, one in scores.items()
    }


def points_told(points: dict[int, Point]) -> list[list[float | None]]:
    """[step, validation, test] by step; None for what was not measured."""
    ordered = [points[step] for step in sorted(points)]
    return [[p.step, *(None if math.isnan(v) else round(v, 3) for v in (p.validation, p.test))] for p in ordered]


def sheet_told(learner: Any, pool: WhitePool, seed: int) -> dict[str, Any] | None:
    """Recovered images of some classes, for a figure; None where the store is empty."""
    keys, images = learner.store.sheet(SHEET_COLUMNS)
    if not keys:
        return None
    rows = sorted(generator(seed, "sheet").permutation(len(keys))[:SHEET_ROWS].tolist())
    shown = images[torch.tensor(rows)].contiguous()
    return {
        "rows": [pool.names[keys[row]] for row in rows],
        "columns": [str(i + 1) for i in range(SHEET_COLUMNS)],
        "shape": list(pool.shape),
        "pixels": base64.b64encode(shown.numpy().tobytes()).decode(),
    }


def selection_told(selection: Any, pool: WhitePool) -> dict[str, Any]:
    """What was found out about the models: groups and how unlike they are, or how far they are trusted."""
    names = [expert.name for expert in pool]
    told: dict[str, Any] = {"models": names}
    groups = getattr(selection, "groups", None)
    if groups:
        order = [place for group in groups for place in group][:MOST_SHOWN]
        matrix = selection.dissimilarity[order][:, order]
        told |= {"groups": groups, "gain": selection.gain, "order": order}
        told["dissimilarity"] = [[round(float(v), 5) for v in row] for row in matrix]
    policy = getattr(selection, "policy", None)
    if policy is not None:
        told["trust"] = [round(float(p), 5) for p in policy.scores.detach().softmax(0)]
        told["rewards"] = [round(r, 4) for r in selection.rewards]
        told["evicted"] = {names[place]: step for place, step in selection.evicted.items()}
    return told


def kinds_told(problem: DataFree, pool: WhitePool, attacks: dict[str, str]) -> list[str]:
    """Each model in a few words: its domain, network and what is wrong with it."""
    own = isinstance(problem, OwnModels)
    made = []
    for expert in pool:
        parts = [expert.name.removeprefix("expert-") if not own else expert.name, expert.domain]
        parts.append(attacks.get(expert.name, ""))
        made.append(" ".join(part for part in parts if part))
    return made


def kept_along(run: RunFolder, name: str, watched: Along) -> Callable[[int, Any], float]:
    """`watched` with its points in a file of the run, so that one that goes on after a kill has the earlier ones."""
    for step, validation, test in run.read_json(name) or []:
        values = (math.nan if value is None else value for value in (validation, test))
        watched.points[step] = Point(step, *values)

    def watch(step: int, learner: Any) -> float:
        score = watched(step, learner)
        run.write_json(name, points_told(watched.points))
        return score

    return watch

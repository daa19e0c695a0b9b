"""How few-shot learners of a run are judged: every test of the problem, on the same episodes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from spolia.runs.meta_problems import FewShot, sampler, scenarios_of, views_of

if TYPE_CHECKING:
    from spolia.bench.fewshot_scores import Scores
    from spolia.parts.classes import ClassSet

VIEWS = 2  # compared by the consistency metrics
MOST_POINTS = 6  # of accuracy along the inner steps


def judged(problem: FewShot, learner: Any, test: ClassSet, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Scores of one learner in every test, as JSON; in the standard one its consistency too."""
    from spolia.bench.fewshot import evaluate

    predict = learner.predict if steps is None else partial(learner.predict, steps=steps)
    judge, found = sampler(problem, test, seed), {}
    for name, change in scenarios_of(problem).items():
        more: dict[str, Any] = {} if change is not None else {"views": VIEWS, "view": views_of(problem)}
        scores = evaluate(predict, judge, problem.episodes, augment=change, together=together(learner), **more)
        found[name] = _told(scores)
    return found


def along(problem: FewShot, learner: Any, test: ClassSet, seed: int) -> dict[str, list[float]]:
    """Accuracy after so many inner steps, on a fourth of the test episodes."""
    from spolia.bench.fewshot import evaluate

    basis, judge = learner.basis, sampler(problem, test, seed)
    own = basis.steps_at_test
    most = own if getattr(basis, "rates_per_step", False) else max(MOST_POINTS - 1, 2 * own)
    points = sorted({own, *(round(most * i / (MOST_POINTS - 1)) for i in range(MOST_POINTS))})
    reached = []
    for k in points:
        predict = partial(learner.predict, steps=k)
        reached.append(evaluate(predict, judge, max(2, problem.episodes // 4), together=together(learner)).mean())
    return {"steps": [float(k) for k in points], "accuracy": [round(value, 4) for value in reached]}


def together(learner: Any) -> int:
    """Episodes that a learner is asked at once: small networks are quicker so."""
    size = sum(parameter.numel() for parameter in learner.network.parameters())
    return max(1, min(50, 500_000 // max(1, size)))


def _told(scores: Scores) -> dict[str, Any]:
    values = {metric: [round(value, 6) for value in each] for metric, each in scores.values.items()}
    return {"episodes": scores.episodes, "scenario": scores.scenario, "values": values}

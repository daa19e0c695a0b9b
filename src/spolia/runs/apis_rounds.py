"""How many rounds a budget pays for."""

from __future__ import annotations

from typing import Any

from spolia.runs.apis_problems import ApiProblem

_PROBES = 384  # items, at most, by which a radius is found for rounded answers: 32 a try


def rounds_of(problem: ApiProblem, settings: Any) -> tuple[int, int, int]:
    """Rounds of each API, items asked once and items of a round. The same for every API: that of the most classes decides."""
    from spolia.methods.continual.apis import queries

    most = max(_sizes(problem))
    each, once = queries(settings, problem.few * most)
    once += _PROBES if problem.decimals is not None else 0
    return max(0, (problem.budget - once) // each), once, each


def _sizes(problem: ApiProblem) -> list[int]:
    """Classes of each API; of sets whose classes are not known here, as if there were ten."""
    return [max(2, 10 // problem.tasks)] if isinstance(problem.tasks, int) else list(problem.tasks)

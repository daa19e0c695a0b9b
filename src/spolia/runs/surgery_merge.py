"""The merge that surgery on digits stands on: a setting of the surgery, or the recipe's method with its preprocessing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.errors import Problems, SpoliaError, SpoliaWarning
from spolia.runs.digits_pool import DigitExperts
from spolia.runs.digits_study import needs_base
from spolia.runs.measuring import Measured
from spolia.runs.recipe import Recipe
from spolia.runs.schema import DigitsPool
from spolia.runs.store import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.journal import Journal
    from spolia.core.settings import Settings

    State = dict[str, Tensor]


def merge_of(recipe: Recipe) -> tuple[str, Settings]:
    """The merge that comes first. SpoliaError before any work where it does not fit."""
    from spolia.runs.verbs import check_settings

    if recipe.surgery is not None or recipe.family == "merge":
        return recipe.method.name, recipe.settings
    chosen = find(recipe.settings.merge, "method.merge")
    fewest, most = chosen.settings_class().experts
    count = len(recipe.pool.domains if isinstance(recipe.pool, DigitsPool) else recipe.pool.experts)
    if chosen.family != "merge":
        raise SpoliaError(f"{chosen.name} is no merge", where="method.merge", mend="choose one: spolia list merge")
    if count < fewest or (most is not None and count > most):
        raise SpoliaError(f"{chosen.name} does not take {count} experts", where="method.merge", mend="choose another")
    try:
        return chosen.name, check_settings(chosen, recipe.settings.merge_settings, count)
    except SpoliaError as error:
        told = Problems()
        for problem in error.problems:
            told.add(problem.where.replace("settings", "method.merge_settings", 1), problem.what, problem.mend)
        raise SpoliaError(problems=told.errors) from None


def learns(recipe: Recipe) -> int:
    """Steps in which the merge learns coefficients; 0: it learns none."""
    return getattr(merge_of(recipe)[1], "schedule", (0, 0.0))[0]


def merged(recipe: Recipe, pool: DigitExperts, seed: int, journal: Journal) -> State:
    """The merged tensors, in fp32."""
    made = _made(recipe, pool, seed, journal)
    return {name: tensor.float() for name, tensor in made.items()}


def write_merge(recipe: Recipe, run: RunFolder, pool: DigitExperts, measured: Measured) -> None:
    """The first seed's merge into result/, which appears when it is whole."""
    if not run.result.exists():
        again = run.journal()  # of its own: to it this merge is the one that was made, and what was learned is kept
        _made(recipe, pool, recipe.seed, again, run.result, measured)


def beside(recipe: Recipe, pool: DigitExperts, seed: int) -> dict[str, State]:
    """The cheap merges that a merge of the recipe's own is compared with."""
    from spolia.runs.verbs import merge

    found: dict[str, State] = {}
    for name in ("average", "task_arithmetic") if recipe.surgery is not None else ():
        if recipe.preprocess or name != recipe.method.name:
            base = pool.base if needs_base(name, len(pool.domains)) else None
            found[name] = merge(pool.experts, base=base, method=name, seed=seed)
    return found


def _made(
    recipe: Recipe,
    pool: DigitExperts,
    seed: int,
    journal: Journal,
    out: Path | None = None,
    measured: Measured | None = None,
) -> Any:
    from spolia.runs.verbs import merge

    name, settings = merge_of(recipe)
    looks = bool(find(name).data)
    evaluate: Any = (lambda _: measured) if measured is not None else None
    with warnings.catch_warnings(), journal.phase(f"seed {seed} merge"):
        warnings.simplefilter("ignore", SpoliaWarning)  # that entropy misleads is for the method's page to say
        made = merge(
            {domain: pool.expert(domain) for domain in pool.domains},
            base=pool.base if needs_base(name, len(pool.domains)) else None,
            method=name,
            settings=settings,
            preprocess=[step.to_dict() for step in recipe.preprocess],
            seed=seed,
            out=out,
            dtype=recipe.output.dtype or "float32",
            network=pool.network if looks else None,
            unlabelled=pool.unlabelled(pool.domains) if looks else None,
            journal=journal if looks else None,
            evaluate=evaluate,
        )
    return made.weights if looks and out is None else made

"""Surgery on digits experts made in the run: what recipes of the family with a digits pool do.

Each seed draws its own splits, trains its own pool, merges it, repairs the merge in every way and counts on test images. A
finished seed is kept in checkpoints/; the results grow seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import Share, Task, evaluate
from spolia.catalog import find
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.data.digits import SIZES
from spolia.runs import surgery_ledger
from spolia.runs.digits_pool import BASE_STEPS, DATA_TOUCHED, EXPERT_STEPS, DigitExperts, make_pool, one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.preprocessing import chained, went_through
from spolia.runs.recipe import Recipe
from spolia.runs.schema import DigitsPool
from spolia.runs.store import RunFolder
from spolia.runs.surgery_ledger import EXPERTS, ROUTED
from spolia.runs.surgery_merge import beside, learns, merge_of, merged, write_merge

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.surgery.fitting import SurgerySettings
    from spolia.parts.expert import ExpertPool
    from spolia.parts.surgered import SurgeredModel

    State = dict[str, Tensor]

_WAYS = ("adam_l1", "closed_form")
_SHORT = 300  # steps of what is shown beside the recipe's own, at most
_SHOWN = 120  # images of the projection
_START, _PER_POOL, _PER_STEP, _PER_FIT = 5.0, 4.0, 0.004, 1.0  # seconds on one core; a step of one task of deep


@dataclass(frozen=True)
class Repair:
    """One line of the table."""

    label: str
    method: str
    settings: SurgerySettings
    own: bool = False

    @property
    def steps(self) -> int:
        return 0 if self.settings.solver == "closed_form" else self.settings.steps


def repairs_of(recipe: Recipe) -> list[Repair]:
    """The recipe's own repair; where that is the recipe's method, beside it both methods by both solvers."""
    method, settings = recipe.repair
    own = Repair(surgery_ledger.labels(recipe)[1], method.name, settings, own=True)
    if recipe.surgery is not None:
        return [own]
    beside = []
    for name in ("surgery", "deep"):
        kind = find(name).settings_class()
        shared = settings.model_dump(include=set(kind.model_fields))
        for solver in _WAYS:
            if (name, solver) == (own.method, own.settings.solver):
                continue
            changed = {"solver": solver, "steps": min(_SHORT, settings.steps), "online": False}
            other = kind(**(shared | changed))
            how = "closed form" if solver == "closed_form" else f"{other.steps} steps"
            beside.append(Repair(f"{name}, {how}", name, other))
    return [own, *beside]


def plan_surgery(recipe: Recipe) -> Plan:
    """What running the recipe would do."""
    assert isinstance(recipe.pool, DigitsPool)
    (merge, _), (repair, settings) = merge_of(recipe), recipe.repair
    domains, repairs = len(recipe.pool.domains), repairs_of(recipe)
    steps = _steps(recipe, repairs)
    seconds = _START + recipe.seeds * (_PER_POOL + _PER_STEP * steps + _PER_FIT * len(repairs))
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    what = find(merge).summary + went_through(recipe.preprocess)
    trained = "coefficients" if learns(recipe) else "nothing"
    return Plan(
        title=f"{repair.name} on a {chained(recipe.preprocess, merge)} merge of {domains} digits experts{each}",
        method=recipe.method.name,
        phases=[
            Phase("base", "fits the base and one head a domain", DATA_TOUCHED["base and heads"], "encoder and heads"),
            Phase("fine-tune", "fine-tunes an encoder a domain", DATA_TOUCHED["experts"], "encoder", "heads"),
            Phase("merge", what, surgery_ledger.sees(merge), trained, writes="result/ (first seed)"),
            Phase(
                "surgery",
                repair.summary,
                surgery_ledger.seen(settings),
                "adapters",
                "encoder, heads",
                "result/adapters/",
            ),
            Phase("test", "counts right answers of experts, merge and repairs", f"{SIZES['test']} digits"),
        ],
        peak_memory_bytes=450_000_000,
        disk_needed_bytes=recipe.seeds * (domains + 2) * 500_000,
        seconds=round(seconds, 1),
        time_basis=f"{_START:g} s to start, {_PER_STEP * 1000:g} ms a step: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=_seeds(recipe),
    )


def run_surgery(recipe: Recipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's merge with its adapters in result/."""
    assert isinstance(recipe.pool, DigitsPool)
    repairs, domains = repairs_of(recipe), len(recipe.pool.domains)
    left = [seed for seed in _seeds(recipe) if not (run.path / _scores(seed)).exists()]
    total = len(left) * (BASE_STEPS + EXPERT_STEPS * domains + _steps(recipe, repairs))
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread():
        for seed in _seeds(recipe):
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                scored = _score(recipe, run, repairs, seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            ledger = surgery_ledger.ledger(run, recipe, found)
            run.write_json("results.json", ledger)
            run.write_json("figures.json", surgery_ledger.figures(recipe, found))
        run.write_text("summary.txt", surgery_ledger.summary(recipe, ledger) + "\n")


def _steps(recipe: Recipe, repairs: list[Repair]) -> int:
    """Steps of a seed's loops, those of the pool aside."""
    assert isinstance(recipe.pool, DigitsPool)
    domains = len(recipe.pool.domains)
    learned = learns(recipe) if recipe.surgery is not None else 0
    return learned + sum(repair.steps * (domains if repair.method == "deep" else 1) for repair in repairs)


def _seeds(recipe: Recipe) -> list[int]:
    return list(range(recipe.seed, recipe.seed + recipe.seeds))


def _scores(seed: int) -> str:
    return f"checkpoints/surgery-seed-{seed}.json"


def _adapters(run: RunFolder) -> Any:
    return run.result / "adapters" / "adapters.safetensors"


def _score(recipe: Recipe, run: RunFolder, repairs: list[Repair], seed: int, journal: Journal) -> dict[str, Any]:
    """One seed: counts on test images, bias and projections there, as JSON."""
    from spolia.methods.surgery.fitting import measure_bias
    from spolia.parts.expert import ExpertPool

    assert isinstance(recipe.pool, DigitsPool)
    pool = make_pool(run.checkpoints / f"seed-{seed}", recipe.pool.domains, seed, journal)
    experts = {domain: read_tensors(pool.expert(domain)) for domain in pool.domains}
    first, test = merged(recipe, pool, seed, journal), pool.tasks("test")
    name, own = surgery_ledger.labels(recipe)
    told: dict[str, dict[str, Any]] = {EXPERTS: {}}
    for label, state in {**beside(recipe, pool, seed), name: first}.items():
        told[label] = _counts(evaluate(pool.outputs(state), test))
    for task in test:
        told[EXPERTS] |= _counts(evaluate(pool.outputs(experts[task.name]), [task]))
    scored: dict[str, Any] = {"scores": told, "bias": {}, "facts": {}, "points": {}}
    held = ExpertPool.of(experts)
    models: dict[str, SurgeredModel] = {}
    for repair in repairs:
        with journal.phase(f"seed {seed} surgery {repair.label}"):
            model = models[repair.label] = _repaired(repair, first, held, pool, test, seed, journal)
        told[repair.label] = _counts(evaluate(lambda name, x, model=model: model(x, name), test))
        scored["bias"][repair.label] = measure_bias(model, held, {task.name: task.x for task in test})
        if repair.own:
            told[repair.label + ROUTED] = {task.name: _routed(model, task) for task in test}
            scored["facts"] = model.facts
    if seed == recipe.seed:
        scored["points"] = _projected(pool, experts, (name, first), (own, models[own]), test)
        write_merge(recipe, run, pool, surgery_ledger.of_merge(run, recipe, scored))
        models[own].adapters.save(_adapters(run))
    return scored


def _repaired(
    repair: Repair, merged: State, held: ExpertPool, pool: DigitExperts, test: list[Task], seed: int, journal: Journal
) -> SurgeredModel:
    transductive = repair.settings.protocol == "transductive"
    unlabelled = {task.name: task.x for task in test} if transductive else pool.unlabelled(pool.domains)
    by_name = {task.name: task for task in test}

    def watch(name: str, share: float, model: SurgeredModel) -> dict[str, float]:
        counted = evaluate(lambda task, x: model(x, task), [by_name[name]])
        return {"accuracy": counted[name].percent}

    fit = find(repair.method).function()
    return fit(merged, held, pool.network, unlabelled, repair.settings, journal=journal, seed=seed, watch=watch)


def _routed(model: SurgeredModel, task: Task) -> list[int]:
    """Right answers where nobody says which task an input is of, and the model goes by its feature."""
    routes, correct = model.route(task.x), 0
    for name in set(routes):
        rows = torch.tensor([i for i, route in enumerate(routes) if route == name])
        with torch.no_grad():
            correct += int((model(task.x[rows], name).argmax(1) == task.y[rows]).sum())
    return [correct, len(task.y)]


def _counts(shares: Mapping[str, Share]) -> dict[str, list[int]]:
    return {name: [share.correct, share.total] for name, share in shares.items()}


def _projected(
    pool: DigitExperts,
    experts: dict[str, State],
    merged: tuple[str, State],
    repaired: tuple[str, SurgeredModel],
    test: list[Task],
) -> dict[str, Any]:
    """Final features of one domain's test images, in the plane in which the expert's vary most."""
    task = test[-1]
    x = task.x[:_SHOWN]
    with torch.no_grad():
        network = pool.network
        rows: dict[str, Callable[[], Tensor]] = {
            f"expert {task.name}": lambda: network.features(x, experts[task.name]),
            merged[0]: lambda: network.features(x, merged[1]),
            repaired[0]: lambda: repaired[1].features(x, task.name),
        }
        features = {name: compute() for name, compute in rows.items()}
        expert = features[f"expert {task.name}"]
        plane = torch.linalg.svd(expert - expert.mean(0), full_matrices=False).Vh[:2]
        flat = {name: ((f - expert.mean(0)) @ plane.T).T for name, f in features.items()}
    series = [{"name": name, "x": _list(f[0]), "y": _list(f[1])} for name, f in flat.items()]
    return {"task": task.name, "series": series}


def _list(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]

"""What a recipe over folders with data would do, from headers and configs alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.staging import free_bytes
from spolia.data import tables
from spolia.errors import Problems
from spolia.parts.expert import Expert, ExpertPool, Weights
from spolia.runs.folder_ledger import seen, sees
from spolia.runs.plan import Input, Phase, Plan
from spolia.runs.preprocessing import chained, went_through
from spolia.runs.recipe import Recipe
from spolia.runs.references import fetched, located
from spolia.runs.schema import DataPart, FoldersPool, ModelEntry
from spolia.runs.surgery_merge import merge_of
from spolia.runs.taskdata import known_of

if TYPE_CHECKING:
    from spolia.runs.store import RunFolder

_RATE = 2e10  # fp32 operations a second of one core
_START = 6.0  # seconds, imports of torch and transformers included
_UNKNOWN = 1000  # inputs of a part that only reading would count


def pool_of(recipe: Recipe) -> tuple[FoldersPool, ExpertPool]:
    """The recipe's pool with models of the hub fetched, and its weights, known by headers."""
    assert isinstance(recipe.pool, FoldersPool)

    def local(entry: ModelEntry) -> ModelEntry:
        found = {"path": Path(fetched(str(entry.path))), "lora": entry.lora and Path(fetched(str(entry.lora)))}
        return entry.model_copy(update=found)

    def text(entry: ModelEntry) -> str:
        return f"{entry.path}+{entry.lora}" if entry.lora else str(entry.path)

    base = local(recipe.pool.base) if recipe.pool.base is not None else None
    experts = [local(entry) for entry in recipe.pool.experts]
    pool = ExpertPool.of(
        {entry.name: text(entry) for entry in experts}, text(base) if base is not None else None, located
    )
    if base is not None and pool.base is not None:
        pool.base = Expert(base.name, pool.base.weights)
    return recipe.pool.model_copy(update={"base": base, "experts": experts}), pool


def steps_of(recipe: Recipe) -> int:
    """Steps of the loops that learn, as far as the settings say."""
    (_, settings), repair = merge_of(recipe), recipe.repair
    count = len(recipe.pool.experts) if isinstance(recipe.pool, FoldersPool) else 0
    steps = getattr(settings, "schedule", (0, 0.0))[0]
    if repair[0].family == "surgery" and repair[1].solver != "closed_form":
        steps += repair[1].steps * (count if repair[0].name == "deep" else 1)
    return steps


def plan_study(recipe: Recipe, folder: RunFolder | None = None) -> Plan:
    """SpoliaError where headers show that the models do not fit."""
    from spolia.runs.merging import fit_pool

    local, pool = pool_of(recipe)
    (name, settings), repair = merge_of(recipe), recipe.repair
    method, problems = find(name), Problems()
    fit_pool(method, ExpertPool(list(pool.experts), pool.base), problems)
    if pool.base is None and method.settings_class().base == "required":
        problems.add(method.name, "needs the base model the experts grew from", "add `base: PATH` to `pool`")
    problems.raise_if_any()
    first, size = pool.experts[0].weights, sum(e.numel for e in pool.experts[0].weights.entries.values())
    out = str(folder.result) if folder is not None else "result/"
    learns = "coefficients" if hasattr(settings, "schedule") else "nothing"
    what = method.summary + went_through(recipe.preprocess)
    phases = [Phase("merge", what, sees(local, method, count_of), learns, "heads", writes=out)]
    if repair[0].family == "surgery":
        phases.append(Phase("surgery", repair[0].summary, seen(local, repair[1], count_of), "adapters", "all weights"))
    tested = ", ".join(f"{n}: {count_of(t.test)} inputs" for n, t in local.tasks.items() if t.test is not None)
    if tested:
        phases.append(Phase("test", "judges merge, base, experts and baselines", f"with labels; {tested}"))
    count = len(pool.experts)
    seconds = _START + 2 * size * _tokens(local) * _passes(recipe, local) / _RATE
    held = 4 * size * (count + 4 if hasattr(settings, "schedule") else 5)
    title = f"{chained(recipe.preprocess, name)} merge of {count} experts"
    return Plan(
        title=f"{repair[0].name} on a {title}" if repair[0].family == "surgery" else title,
        method=recipe.method.name,
        phases=phases,
        inputs=[_input(model, "base" if model is pool.base else "expert") for model in pool.models],
        tensors=len(first.entries),
        dtypes={recipe.output.dtype: len(first.entries)} if recipe.output.dtype else _kinds(first),
        bytes_in=sum(model.weights.nbytes for model in pool.models),
        bytes_out=first.nbytes,
        peak_memory_bytes=held + 400_000_000,
        disk_needed_bytes=3 * first.nbytes,
        disk_free_bytes=free_bytes(folder.path if folder is not None else Path.cwd()),
        seconds=round(seconds, 1),
        time_basis="2 operations a weight, token and pass at 20 GFLOP/s, one core; a backward pass counts twice",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=[recipe.seed],
        warnings=[
            f"{name}: what it is tested on is what is adapted on; say so beside the numbers"
            for name, task in local.tasks.items()
            if task.test is not None and task.test == task.unlabelled and method.data
        ],
        notes=["heads are each expert's own; which tensors they are is found when the models are opened"]
        if local.heads is None
        else [],
    )


def _input(model: Expert, role: str) -> Input:
    weights = model.weights
    path = str(weights.checkpoint.path) if weights.checkpoint is not None else ""
    return Input(model.name, path, role, len(weights.entries), weights.nbytes, _kinds(weights))


def _kinds(weights: Weights) -> dict[str, int]:
    return dict(Counter(entry.dtype.torch_name for entry in weights.entries.values()))


def count_of(part: DataPart | None) -> int | str:
    """Inputs of a part, as far as headers tell; else a word."""
    if part is None:
        return 0
    if part.path is not None and tables.kind_of(part.path) == "arrays":
        heads = tables.array_heads(part.path)
        end = f"_{part.split}" if part.split else ""
        shapes = [shape for name, (shape, _) in heads.items() if shape and name.endswith(end)]
        most = max((shape[0] for shape in shapes), default=0)
        return min(most, part.most) if part.most else most
    return f"up to {part.most}" if part.most else "all"


def _number(part: DataPart | None) -> int:
    found = count_of(part)
    return found if isinstance(found, int) else (part.most or _UNKNOWN) if part is not None else 0


def _tokens(pool: FoldersPool) -> float:
    """Tokens of an input of the first task, by its config."""
    known = known_of(pool, pool.experts[0].name)
    sight = known.config.get("vision_config") or known.config
    patch = sight.get("patch_size") if isinstance(sight, dict) else None
    if known.extent is not None:
        return math.prod(known.extent) / (patch if isinstance(patch, int) else 16) ** 2 + 1
    return pool.tasks[pool.experts[0].name].length if "vocab_size" in known.config else 1


def _passes(recipe: Recipe, pool: FoldersPool) -> float:
    """Inputs that go through a model, backward passes counted twice."""
    (name, settings), repair = merge_of(recipe), recipe.repair
    count, total = len(pool.experts), 0.0
    if hasattr(settings, "schedule"):
        each: Any = settings
        total += 3 * each.schedule[0] * count * each.batch * each.batches_per_step
    elif find(name).data:
        total += 3 * count * getattr(settings, "examples", _UNKNOWN)
    tests = sum(_number(task.test) for task in pool.tasks.values())
    if repair[0].family == "surgery":
        total += 4 * sum(_number(task.unlabelled) for task in pool.tasks.values()) + tests
        if repair[0].name == "deep" and repair[1].solver != "closed_form":
            total += 3 * count * repair[1].steps * repair[1].batch
    return total + 5 * tests

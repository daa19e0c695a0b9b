"""Merges that look at inputs: from what a caller gives to a learned merge, its folder, and the recipe that repeats it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, SpoliaWarning
from spolia.parts.examples import by_task
from spolia.parts.expert import Expert, ExpertPool
from spolia.parts.learned import Learned
from spolia.parts.network import Network
from spolia.parts.preprocessed import Step
from spolia.parts.watch import seen_before
from spolia.runs.coefficients import recipe_of
from spolia.runs.preprocessing import went_through

if TYPE_CHECKING:
    from torch import Tensor

COEFFICIENTS, FACTS, RECIPE = "coefficients.json", "learned.json", "mergekit_recipe.yml"


def check_call(method: Method, network: Any, unlabelled: Any, tested_on: Any = None, journal: Any = None) -> None:
    """SpoliaError unless a call gives what `method` looks at, and nothing that it does not."""
    if not method.data:
        given = {"network": network, "unlabelled": unlabelled, "tested_on": tested_on, "journal": journal}
        for name, value in given.items():
            if value is not None:
                raise SpoliaError(f"{method.name} looks at weights alone", where=name, mend=f"leave `{name}` away")
        return
    problems = Problems()
    if network is None:
        mend = "give spolia.Network(module, heads): what runs the experts, and the frozen head of each task"
        problems.add("network", f"{method.name} runs the experts, and there is no network", mend)
    elif not isinstance(network, Network):
        problems.add("network", f"a {type(network).__name__} is no Network", "wrap it: spolia.Network(module, heads)")
    if not isinstance(unlabelled, Mapping):
        mend = "give `unlabelled={task: inputs}`, one entry an expert, called as it is"
        problems.add("unlabelled", f"{method.name} looks at {method.data} of every task, and there are none", mend)
    problems.raise_if_any()


def merge_learned(
    experts: Mapping[str, Any] | Sequence[Any],
    base: Any,
    method: Method,
    settings: Settings,
    network: Any,
    unlabelled: Any,
    *,
    out: Path | None,
    dtype: str | None,
    seed: int,
    max_shard_size: int,
    overwrite: bool,
    tested_on: Mapping[str, Any] | None,
    journal: Journal | str | os.PathLike[str] | None,
    progress: Any,
    render: Callable[[dict[str, Any]], str],
    steps: tuple[Step, ...] = (),
) -> tuple[Learned, dict[str, Any]]:
    """The learned merge and, with `out`, the facts of the card in the folder that was written."""
    from spolia.runs.references import located

    pool = ExpertPool.of(experts if isinstance(experts, Mapping) else list(experts), base, located)
    pool.steps = steps
    if out is not None:
        _check_out(out, pool, method, settings, overwrite)
    learned = learn(
        pool,
        method,
        settings,
        network,
        unlabelled,
        dtype=dtype,
        seed=seed,
        journal=journal,
        tested_on=tested_on,
        progress=progress,
    )
    facts: dict[str, Any] = {}
    if out is not None and _writes(out):
        values = list(experts.values() if isinstance(experts, Mapping) else experts)
        named = {expert.name: given for expert, given in zip(pool.experts, values, strict=True)}
        facts = write_folder(
            learned,
            pool,
            out,
            method=method,
            settings=settings,
            given=(named, base),
            seed=seed,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            render=render,
        )
    return learned, facts


def learn(
    pool: ExpertPool,
    method: Method,
    settings: Settings,
    network: Network,
    unlabelled: Mapping[str, Any],
    *,
    dtype: str | None = None,
    seed: int = 0,
    journal: Journal | str | os.PathLike[str] | None = None,
    tested_on: Mapping[str, Any] | None = None,
    progress: Any = None,
) -> Learned:
    """The learned merge of a pool. Under torchrun all processes make the same call and get the same result."""
    from spolia.runs.merging import fit_pool

    problems, tasks = Problems(), [expert.name for expert in pool.experts]
    fit_pool(method, pool, problems)
    for name in sorted({name for name in tasks if tasks.count(name) > 1}):
        problems.add(name, "is the name of two experts; inputs and heads go by it", "give each a name of its own")
    problems.raise_if_any()
    for problem in problems.warnings:
        warnings.warn(str(problem), SpoliaWarning, stacklevel=3)
    inputs = by_task(unlabelled, tasks)
    tests = {} if tested_on is None else by_task(tested_on, tasks, "tested_on")
    with joined() as (rank, _):
        if not isinstance(journal, Journal):
            told = _told(progress) if progress is not None and rank == 0 else None
            journal = Journal(journal, progress=told, follow=rank > 0)
        learned = method.function()(pool, network, inputs, settings, journal=journal, seed=seed)
        if progress is not None and rank == 0:
            progress.finish()
    facts = dict(learned.facts)
    if tests:
        facts["tested on"] = {
            t: {"inputs": len(e), "adapted on too": seen_before(e, [inputs[t]])} for t, e in tests.items()
        }
        shared = [t for t, told in facts["tested on"].items() if told["adapted on too"]]
        if shared:
            said = f"{', '.join(shared)}: inputs to be tested on were adapted on; say so beside the numbers"
            facts["warnings"] = [*facts.get("warnings", []), said]
    for warning in facts.get("warnings", []):
        warnings.warn(warning, SpoliaWarning, stacklevel=3)
    weights = learned.weights
    if dtype is not None:
        kind = getattr(torch, dtype)
        weights = {name: t.to(kind) if t.is_floating_point() else t for name, t in weights.items()}
    return Learned(weights, learned.coefficients, facts)


def _told(progress: Any) -> Callable[[str, int, int, Mapping[str, float]], None]:
    """A journal's `progress=` that opens a bar for each loop."""
    counted: dict[str, int] = {}

    def told(phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if phase not in counted:
            progress.start(phase, total)
        progress.advance(done - counted.get(phase, 0), **{k: v for k, v in numbers.items() if k == "loss"})
        counted[phase] = done

    return told


# --- the folder ------------------------------------------------------------------------------------------------------


def write_folder(
    learned: Learned,
    pool: ExpertPool,
    out: Path,
    *,
    method: Method,
    settings: Settings,
    given: tuple[Mapping[str, Any], Any] | None,
    seed: int,
    max_shard_size: int,
    overwrite: bool,
    render: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """The merged model as a folder, with its coefficients, what was seen, and the recipe where there is one.

    `given`: experts and base as the caller named them; None where no recipe of their files makes the weights again.
    Returns the facts of the card.
    """
    from spolia.core.checkpoint import storage
    from spolia.core.layout import Layout, Slot
    from spolia.core.staging import Staging

    layout = Layout.of([Slot(n, storage(t), tuple(t.shape)) for n, t in learned.weights.items()], max_shard_size)
    facts = card_facts(learned, pool, method, out.name, seed, settings)
    with Staging(out, layout, key=f"{method.name} {seed}", overwrite=overwrite) as staging:
        for name, tensor in learned.weights.items():
            staging.write(name, 0, _bytes(tensor))
        for file in _beside(pool, method, settings):
            staging.copy(file)
        if (config := pool.models[0].weights.config) is not None:
            staging.write_text("config.json", json.dumps(config, indent=2) + "\n")
        staging.write_text(FACTS, json.dumps(learned.facts, indent=1) + "\n")
        if learned.coefficients is not None:
            kept = {"experts": [e.name for e in pool.experts], "tensors": dict(learned.coefficients)}
            staging.write_text(COEFFICIENTS, json.dumps(kept, indent=1) + "\n")
            if given is not None and not learned.facts.get("preprocess"):
                staging.write_text(RECIPE, recipe_of(learned, *given, folder=out))
        staging.write_text("README.md", render(facts))
        staging.finish()
    return facts


def _writes(out: Path) -> bool:
    """Whether this process writes the folder: the first one does, and any other that has another folder."""
    from spolia.core.dist import told, world

    own = str(out.resolve())
    return told(own) != own or world()[0] == 0


def _check_out(out: Path, pool: ExpertPool, method: Method, settings: Any, overwrite: bool) -> None:
    """SpoliaError where the folder could not be written, before anything is learned."""
    from spolia.runs.request import MergeRequest, ModelRef
    from spolia.runs.target import check_target

    problems = Problems()
    held = [(model.name, model.weights.checkpoint) for model in pool.models]
    refs = [ModelRef(name, checkpoint.path) for name, checkpoint in held if checkpoint is not None]
    check_target(out, pool.models[0].weights.nbytes, MergeRequest(method, refs, lambda name: settings), problems)
    if not overwrite and os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        problems.add(str(out), "exists already", "choose another folder, or allow `overwrite`")
    problems.raise_if_any()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _beside(pool: ExpertPool, method: Method, settings: Any) -> list[Path]:
    """Tokenizer and preprocessor files of the base, where it stands in a folder."""
    from spolia.runs.along import copied
    from spolia.runs.request import MergeRequest, ModelRef

    first = pool.models[0]
    if first.weights.checkpoint is None:
        return []
    request = MergeRequest(method, [], lambda name: settings, ModelRef(first.name, first.weights.checkpoint.folder))
    return [file for file in copied(request, {}) if file.name != "config.json"]


def card_facts(
    learned: Learned, pool: ExpertPool, method: Method, name: str, seed: int, settings: Settings
) -> dict[str, Any]:
    """What the model card says; see report/card.py."""
    from spolia.runs.documents import described

    def one(expert: Expert) -> dict[str, Any]:
        return described(expert) if expert.weights.checkpoint is not None else {"name": expert.name, "license": None}

    inputs, labels = learned.facts.get("inputs", {}), learned.facts.get("labels used", False)
    said = "; ".join(f"{task}: {', '.join(f'{v} {k}' for k, v in part.items())}" for task, part in inputs.items())
    recipe: dict[str, Any] = {"preprocess": [step.to_dict() for step in pool.steps]} if pool.steps else {}
    recipe |= {"method": {"name": method.name, **settings.model_dump(mode="json")}, "seed": seed}
    return {
        "name": name,
        "method": method.name,
        "summary": method.summary + went_through(pool.steps),
        "paper": method.paper,
        "base": one(pool.base) if pool.base is not None else None,
        "experts": [one(expert) for expert in pool.experts],
        "parameters": sum(t.numel() for t in learned.weights.values() if t.is_floating_point()),
        "tensors": len(learned.weights),
        "recipe": json.dumps(recipe, indent=2) + "\n",
        "data": {"merge": f"inputs {'with' if labels else 'without'} labels ({said}); no training data"},
        "config": pool.models[0].weights.config,
        "results": None,
        "seed": seed,
        "versions": {"spolia": version("spolia"), "torch": version("torch")},
        "warnings": list(learned.facts.get("warnings", [])),
        "limits": ["Not evaluated: a merge can be worse than every model that went into it. Test it on your tasks."],
    }

"""Merges and surgery over models on disk whose tasks come with data: what recipes do whose folder pool names `tasks`.

The pool is opened under one network, merged without its heads, repaired where the recipe asks for it, and counted on test
inputs beside the base, every expert at home and the cheap merges. What is finished is kept, so a run goes on behind it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import accuracy
from spolia.catalog import find
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.errors import SpoliaWarning
from spolia.parts.examples import Examples
from spolia.parts.learned import Learned
from spolia.runs import folder_ledger
from spolia.runs.folder_ledger import BASE, EXPERTS, labels_of
from spolia.runs.folder_merge import Study, keeps_base, merged, plain, wide
from spolia.runs.folder_plan import steps_of
from spolia.runs.learned import FACTS, card_facts
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.store import RunFolder, write_whole
from spolia.runs.surgery_merge import merge_of

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.surgered import SurgeredModel

    State = dict[str, Tensor]

SCORES = "checkpoints/folder-scores.json"
_BESIDE = ("average", "task_arithmetic")
_BATCH = 32  # inputs of a forward pass on test inputs


def adapters_in(run: RunFolder) -> Path:
    return run.result / "adapters" / "adapters.safetensors"


def run_study(study: Study, run: RunFolder, progress: Any) -> None:
    """Runs or finishes the recipe of `study` in `run`."""
    recipe = study.recipe
    steps = 0 if run.result.exists() else steps_of(recipe)
    journal = run.journal(follow(progress, steps))
    with recorded(run, journal, progress, steps):
        run.set_status("running", phase="merge")
        with journal.phase("merge"):
            state = merged(study, run, journal)
        models: dict[str, SurgeredModel] = {}
        if recipe.repair[0].family == "surgery":
            run.set_status("running", phase="surgery")
            with journal.phase("surgery"):
                models[labels_of(recipe)[1]] = _repaired(study, run, state, journal)
        run.set_status("running", phase="test")
        with journal.phase("test"):
            _judge_all(study, run, state, models)


def _repaired(study: Study, run: RunFolder, state: State, journal: Journal) -> SurgeredModel:
    """The merged model with its adapters, from result/adapters where they stand there already."""
    from spolia.parts.bottleneck import Adapters
    from spolia.parts.surgered import SurgeredModel, merged_network
    from spolia.runs.surgery import surgery

    opened, (method, settings) = study.opened, study.recipe.repair
    if adapters_in(run).exists():
        return SurgeredModel(merged_network(opened.network, state), Adapters.load(adapters_in(run)))
    if settings.last is None and opened.slot:
        settings = settings.model_copy(update={"last": opened.slot})
    model = surgery(
        state,
        {expert.name: expert.weights for expert in opened.pool.experts},
        network=opened.network,
        unlabelled=study.unlabelled,
        method=method.name,
        settings=settings,
        tested_on=study.test if len(study.test) == len(opened.pool.experts) else None,
        journal=journal,
        seed=study.recipe.seed,
    )
    model.adapters.facts["heads"] = sorted({name for tensors in opened.heads.values() for name in tensors})
    model.adapters.save(adapters_in(run))
    return model


# --- judging ---------------------------------------------------------------------------------------------------------


def _judge_all(study: Study, run: RunFolder, state: State, models: Mapping[str, SurgeredModel]) -> None:
    """Counts of every model, each kept when it is made; results.json grows with them."""
    run.checkpoints.mkdir(exist_ok=True)
    scores: dict[str, dict[str, list[Any]]] = run.read_json(SCORES) or {}
    own, network = labels_of(study.recipe)[0], study.opened.network

    def of(weights: State) -> Callable[[str, Any], Tensor]:
        return lambda task, batch: network.logits(task, batch, weights)

    def keep(label: str, found: dict[str, list[Any]]) -> None:
        scores[label] = found
        run.write_json(SCORES, scores)
        _tell(study, run, scores, models)

    pool, test = study.opened.pool, study.test
    if pool.base is not None and test and BASE not in scores:
        keep(BASE, judged(study, of(read_state(pool.base.weights))))
    for expert in pool.experts if EXPERTS not in scores and test else ():
        home = judged(study, of(read_state(expert.weights)), (expert.name,))
        scores[EXPERTS] = scores.get(EXPERTS, {}) | home
    if test:
        keep(EXPERTS, scores[EXPERTS])
    for name in _BESIDE if test else ():
        lacking = name == "task_arithmetic" and pool.base is None
        if name not in scores and not lacking and name != own:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SpoliaWarning)  # told once, by the recipe's own merge
                cheap = plain(study, name, steps=False)
            keep(name, judged(study, of(wide(cheap))))
    if test and own not in scores:
        keep(own, judged(study, of(state)))
    for label, model in models.items():
        if test and label not in scores:
            keep(label, judged(study, lambda task, batch, model=model: model(batch, task)))
    _tell(study, run, scores, models)


def judged(study: Study, logits: Callable[[str, Any], Tensor], tasks: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """[right, all] of each task's test inputs; of a language model [nats, tokens]."""
    from spolia.bench.language import likelihood

    found: dict[str, list[Any]] = {}
    for task, examples in study.test.items():
        if tasks and task not in tasks:
            continue
        if study.language:
            ids = examples.batch(range(len(examples)))["input_ids"]
            seen = likelihood(
                lambda ids, task=task: logits(task, {"input_ids": ids}),
                ids.flatten(),
                context=ids.shape[1],
                batch=_BATCH,
            )
            found[task] = [seen.nats, seen.tokens]
        else:
            labels = examples.labels_at(range(len(examples)))
            share = accuracy(lambda x, task=task: logits(task, x), _Items(examples), labels, _BATCH)
            found[task] = [share.correct, share.total]
    return found


class _Items:
    """Examples as what is sliced into batches."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __getitem__(self, places: slice) -> Any:
        return self.examples.batch(range(*places.indices(len(self.examples))))


def read_state(weights: Any) -> State:
    from spolia.parts.surgered import state_of

    with weights.opened():
        return wide(state_of(weights))


def _tell(study: Study, run: RunFolder, scores: dict[str, Any], models: Mapping[str, SurgeredModel]) -> None:
    """results.json, figures.json, the sentence, and the card of the merged model with its numbers."""
    facts = run.read_json(f"result/{FACTS}") or {}
    repaired = {label: model.facts for label, model in models.items()}
    ledger = folder_ledger.ledger(study, run, scores, facts, repaired) if scores else None
    if ledger is not None:
        run.write_json("results.json", ledger)
        run.write_json("figures.json", folder_ledger.figures(run, facts, repaired))
    run.write_text("summary.txt", folder_ledger.summary(study, ledger) + "\n")
    name, settings = merge_of(study.recipe)
    pool = study.opened.fresh()
    pool.steps, pool.base = study.recipe.preprocess, pool.base if keeps_base(name, pool) else None
    made = Learned(
        {n: torch.empty(e.shape, device="meta") for n, e in pool.models[0].weights.entries.items()}, None, facts
    )
    told = card_facts(made, pool, find(name), "result", study.recipe.seed, settings)
    write_whole(run.result / "README.md", folder_ledger.card(study, told, ledger))

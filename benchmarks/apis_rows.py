"""What apis.py compares: streams of five two-class APIs with their budgets, the learners, and the server that is asked."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from spolia.runs.apis_entries import ALONE, DATA_FEW, DATA_FREE, FEW, JOINT, PLAIN, ROUTER, Line, lines_of
from spolia.runs.apis_ground import Ground, trained_experts
from spolia.runs.apis_problems import PackedApis
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.recipe import load_recipe
from spolia.runs.studies import StudyRecipe

FACTORS = (1, 3, 9)  # of the smallest budget
SHOTS = 5  # real examples of each class that DECL has
PRICE = 1.5  # USD of 1,000 items: assumed, about what image APIs ask
LOT = 1024  # inputs of a request
ASKING = (DATA_FREE, ALONE, PLAIN, DATA_FEW)
ONCE = (FEW, JOINT, ROUTER)  # whatever the budget


@dataclass(frozen=True)
class Row:
    """One stream. `settings`: of the method, where not its own; `budget`: items of the smallest budget, of each API.

    `plain`: factors of the budget at which the plain estimator is measured too.
    """

    name: str
    problem: PackedApis
    settings: dict[str, Any]
    budget: int
    plain: tuple[int, ...] = FACTORS

    def budgets(self) -> list[int]:
        return [factor * self.budget for factor in FACTORS]


@dataclass(frozen=True)
class Job:
    """One learner of the table; `budget` is None where it asks nothing while it learns."""

    line: str
    budget: int | None = None

    @property
    def label(self) -> str:
        return self.line if self.budget is None else f"{self.line}, {told(self.budget)}"

    @property
    def few(self) -> int:
        return SHOTS if self.line in (FEW, DATA_FEW) else 0


def packed(data: str, **more: Any) -> PackedApis:
    shared: dict[str, Any] = {"price": PRICE, "baselines": True, "network": "mlp", "width": 128, "questions": "flat"}
    shared["expert_width"] = 16
    return PackedApis(source="packed_apis", data=data, **shared | more)


_SETTINGS = {"batch": 32, "directions": 4, "model_steps": 10}  # more steps of the model an item than the defaults have
_GREY: dict[str, Any] = {"channels": 1, "size": 14, "experts": ["mlp", "conv2", "linear"], "expert_epochs": 6}
_COLOUR: dict[str, Any] = {"network": "resnet8", "width": 16, "questions": "images", "questions_width": 64}
ROWS = {
    "mnist": Row("MNIST", packed("mnist", **_GREY), _SETTINGS, 8_000),
    "fashion": Row("Fashion-MNIST", packed("fashion_mnist", **_GREY), _SETTINGS, 6_000, plain=(3,)),
    "cifar10": Row(
        "CIFAR-10",
        packed(
            "cifar10_full_jpeg75", size=16, most=10_000, experts=["conv2", "resnet8", "mlp"], expert_epochs=6, **_COLOUR
        ),
        _SETTINGS,
        3_000,
        plain=(3,),
    ),
}


def told(items: int) -> str:
    return f"{items / 1000:g}k"


def jobs(row: Row, quick: bool = False) -> list[Job]:
    """Small budgets first: a run that is stopped early has whole budgets."""
    factors = FACTORS[:1] if quick else FACTORS
    made = [Job(line) for line in ONCE]
    for factor in factors:
        lines = [line for line in ASKING if line != PLAIN or quick or factor in row.plain]
        made += [Job(line, factor * row.budget) for line in lines]
    return made


def against_of(job: Job) -> str:
    """What a job's differences are taken from."""
    if job.line == DATA_FREE:
        return Job(ALONE, job.budget).label
    return FEW if job.line == DATA_FEW else ""


def recipe_of(row: Row, few: int, urls: list[str]) -> StudyRecipe:
    """Of all budgets together: what every learner of a seed may ask."""
    more = {"few": few, "urls": urls, "budget": sum(row.budgets())}
    problem = row.problem.model_copy(update=more).model_dump(mode="json")
    settings = [f"method.{name}={json.dumps(value)}" for name, value in row.settings.items()]
    made = load_recipe("continual/apis", [f"problem={json.dumps(problem)}", *settings, "seeds=1"])
    assert isinstance(made, StudyRecipe)
    return made


def line_of(job: Job, recipe: StudyRecipe) -> Line:
    return next(line for line in lines_of(recipe) if line.label == job.line)


def at_budget(job: Job, recipe: StudyRecipe, ground: Ground) -> Ground:
    """The ground with as many rounds of each API as the job's budget pays for."""
    if job.budget is None:
        return ground
    rounds = rounds_of(recipe.problem.model_copy(update={"budget": job.budget}), recipe.settings)[0]
    experiences = tuple(replace(e, rounds=rounds) for e in ground.stream.experiences)  # type: ignore[call-arg]
    return replace(ground, stream=replace(ground.stream, experiences=experiences))


# --- the server ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Address, process, and what the experts behind it reach on the test."""

    url: str
    pid: int
    accuracies: list[float]


@contextmanager
def serving(problem: PackedApis, seed: int) -> Iterator[Server]:
    """Inside, the problem's experts are served from a process of their own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, problem.model_dump(mode="json"), seed), daemon=True)
    process.start()
    theirs.close()
    try:
        url, accuracies = mine.recv()
        assert process.pid is not None
        yield Server(url, process.pid, accuracies)
    finally:
        process.terminate()
        process.join()


def _serve(ready: Connection, problem: dict[str, Any], seed: int) -> None:
    """The server's process: trains the experts and answers until it is ended."""
    import torch

    from spolia.runs.serve import application, serve
    from spolia.runs.serve_requests import Served

    torch.set_num_threads(1)
    experts = trained_experts(PackedApis(**problem), seed)
    served = [Served(e.name, e.trained.logits, replace(e.contract, most=LOT)) for e in experts]
    accuracies = [expert.trained.accuracy for expert in experts]
    serve(application(served), "127.0.0.1", 0, lambda url: ready.send((url, accuracies)))

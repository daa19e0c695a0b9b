"""The lines of a table of APIs: the recipe's learner and what stands beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.methods.continual.apis import Apis, ApisLearner
from spolia.methods.continual.apis_queries import Inventing
from spolia.methods.continual.joint import Joint, JointLearner
from spolia.methods.continual.learner import Model, as_floats
from spolia.runs.apis_experts import network_of
from spolia.runs.apis_problems import ApiProblem
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.data.labelled import Labelled
    from spolia.parts.stream import Stream
    from spolia.runs.apis_ground import Ground

DATA_FREE, DATA_FEW = "DFCL-APIs", "DECL-APIs"
ALONE, PLAIN, FEW, JOINT, ROUTER = "no replay", "plain estimator", "the few alone", "joint", "router"
FEW_PASSES, JOINT_PASSES = 60.0, 3.0  # readings of the data by models that are given them
_LATENT = {True: 32, False: 256}  # of flat generators and of those of images


@dataclass(frozen=True)
class Line:
    """One learner of a seed. `asks`: whether it queries the APIs while it learns."""

    label: str
    settings: Any
    against: str = ""
    own: bool = False
    asks: bool = True


def lines_of(recipe: StudyRecipe) -> list[Line]:
    """Baselines first, the recipe's own last."""
    own, problem = recipe.settings, recipe.problem
    label, found = label_of(problem), []
    if problem.asks_for_baselines:
        if own.old or own.similarity:
            found.append(Line(ALONE, own.model_copy(update={"old": 0.0, "similarity": 0.0})))
        if own.estimator == "split" and own.generator_steps:
            found.append(Line(PLAIN, own.model_copy(update={"estimator": "plain"})))
        found.append(Line(ROUTER, None))
    plain = Joint(lr=own.lr, momentum=own.momentum, weight_decay=own.weight_decay)
    if problem.few:
        found.append(Line(FEW, plain, asks=False))
    found.append(Line(JOINT, plain, asks=False))
    against = FEW if problem.few else ALONE if found[0].label == ALONE else JOINT
    return [*found, Line(label, own, against, own=True)]


def label_of(problem: ApiProblem) -> str:
    return DATA_FEW if problem.few else DATA_FREE


def learner_of(line: Line, recipe: StudyRecipe, ground: Ground, seed: int) -> tuple[Any, Stream, float]:
    """The learner of a line, the stream that it meets, and how often it reads that."""
    from spolia.methods.continual.apis_router import Router

    model = model_of(recipe.problem, ground.held, seed)
    if line.label == ROUTER:
        once = tuple(replace(e, rounds=1) for e in ground.stream.experiences)  # type: ignore[call-arg]
        return Router(ground.stream), replace(ground.stream, experiences=once), 1.0
    if isinstance(line.settings, Apis):
        inventing = inventing_of(recipe.problem, ground.held.shape)
        made = ApisLearner(model, line.settings, stream=ground.stream, inventing=inventing, seed=seed)
        return made, ground.stream, 1.0
    stream = ground.labelled if line.label == JOINT else ground.few_alone()
    passes = JOINT_PASSES if line.label == JOINT else FEW_PASSES
    return JointLearner(model, line.settings, stream=stream, seed=seed), stream, passes


def model_of(problem: Any, held: Labelled, seed: int) -> Model:
    """The network that learns, one output a class, for inputs in 0 … 1."""
    draws = torch.Generator().manual_seed(entropy(seed, "apis", "network") % 2**63)
    network = network_of(problem.network, held.shape, len(held.classes), draws, problem.width)
    return Model(network.to(getattr(problem, "device", "cpu")), show=as_floats)


def inventing_of(problem: ApiProblem, shape: tuple[int, ...]) -> Inventing:
    """Generators for inputs of this shape: two hidden layers for few numbers, convolutions for images."""
    from spolia.zoo import questions

    flat = math.prod(shape) <= 256 if problem.questions is None else problem.questions == "flat"
    latent, width = _LATENT[flat], problem.questions_width
    act = questions.inked if shape[0] == 1 else questions.coloured
    if flat:
        return Inventing(lambda d: questions.FlatQuestions(shape, latent, width, generator=d), latent, act)
    channels, side = shape[0], shape[-1]
    return Inventing(lambda d: questions.ImageQuestions(channels, side, latent, width, generator=d), latent, act)

"""What all lines of a seed share: real data, the APIs that are asked, and the stream that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.continual.learner import as_floats
from spolia.parts.api import Api, Budget, Contract, Price
from spolia.parts.api_stream import api_stream
from spolia.parts.stream import Part, Stream
from spolia.runs.apis_entries import ROUTER, lines_of
from spolia.runs.apis_experts import Trained, contract_of, train_expert
from spolia.runs.apis_problems import DigitsApis, addresses, as_stream
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.serve_requests import answering
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.data.labelled import Labelled


@dataclass(frozen=True)
class Expert:
    """A model that is asked as an API, under its name."""

    name: str
    trained: Trained
    contract: Contract


@dataclass(frozen=True)
class Ground:
    """`labelled`: real data of the same classes as a stream; `experts`: accuracies of the APIs' models, where known."""

    stream: Stream
    labelled: Stream
    held: Labelled
    apis: list[Api]
    experts: list[float]

    def few_alone(self) -> Stream:
        """The few real examples without any API, as a stream to learn from."""
        pairs = zip(self.labelled.experiences, self.stream.experiences, strict=True)
        return replace(self.labelled, experiences=tuple(replace(e, train=own.train) for e, own in pairs))


def ground_of(recipe: StudyRecipe, seed: int, store: Path | None = None) -> Ground:
    """Data, experts and stream of a seed. Experts of this process are trained; others are looked at.

    `store`: the file that keeps what came over HTTP. Without one answers are not kept, and only this ground's are counted.
    """
    from spolia.runs.continual_streams import labelled_of, stream_of

    problem: Any = recipe.problem
    continual = as_stream(problem)
    held = labelled_of(continual, seed)
    labelled = stream_of(continual, held, seed)
    if problem.urls:
        apis, accuracies = _remote(recipe, labelled, held, store), list[float]()
    else:
        apis, accuracies = _local(problem, labelled, held, seed)
    tests = [_shown(test.examples) for test in labelled.tests]
    few = {e.place: _few(e.train, problem.few, seed, e.place) for e in labelled.experiences} if problem.few else None
    rounds, _, _ = rounds_of(problem, recipe.settings)
    classes = [_ids(api, held, labelled) for api in apis]
    stream = api_stream(apis, tests, rounds, classes=classes, few=few, seed=seed)
    return Ground(replace(stream, classes=labelled.classes, order=labelled.order), labelled, held, apis, accuracies)


def names_of(problem: Any, labelled: Stream, held: Labelled) -> list[str]:
    """What the APIs are called: as `spolia serve` calls experts of digits; by number where the classes are many."""
    if isinstance(problem, DigitsApis):
        return ["digits:" + "".join(_classes(held, labelled, e.classes)) for e in labelled.experiences]
    return [f"{problem.data}:{e.place + 1}" for e in labelled.experiences]


def trained_experts(problem: Any, seed: int) -> list[Expert]:
    """The experts that a problem without addresses has: what a server serves for one that has some."""
    from spolia.runs.continual_streams import labelled_of, stream_of

    continual = as_stream(problem)
    held = labelled_of(continual, seed)
    return _trained(problem, stream_of(continual, held, seed), held, seed)


def _trained(problem: Any, labelled: Stream, held: Labelled, seed: int) -> list[Expert]:
    more: dict[str, Any] = {}
    if not isinstance(problem, DigitsApis):
        more = {"width": problem.expert_width, "epochs": problem.expert_epochs, "device": problem.device}
    experts, names = list[Expert](), names_of(problem, labelled, held)
    for name, experience, test in zip(names, labelled.experiences, labelled.tests, strict=True):
        kind = problem.experts[experience.place % len(problem.experts)]
        trained = train_expert(kind, held.shape, experience.classes, experience.train, test.examples, seed, **more)
        experts.append(
            Expert(name, trained, contract_of(problem, _classes(held, labelled, experience.classes), held.shape))
        )
    return experts


def _local(problem: Any, labelled: Stream, held: Labelled, seed: int) -> tuple[list[Api], list[float]]:
    """Experts trained here, each asked as a function."""
    experts, price = (
        _trained(problem, labelled, held, seed),
        Price(item=problem.price / 1000, currency=problem.currency),
    )
    apis = [Api.calling(_function(e.trained, e.contract), e.contract, name=e.name, price=price) for e in experts]
    return apis, [expert.trained.accuracy for expert in experts]


def _remote(recipe: StudyRecipe, labelled: Stream, held: Labelled, store: Path | None) -> list[Api]:
    """APIs behind HTTP, with one store for their answers; all lines and seeds together may ask so much."""
    problem, asking = recipe.problem, [line.label for line in lines_of(recipe) if line.asks]
    each = problem.budget * sum(label != ROUTER for label in asking)
    tests = [len(test.examples) for test in labelled.tests]
    each += sum(accumulate(tests)) if ROUTER in asking else 0  # what was met so far, again after every API
    budget = Budget(items=each * recipe.seeds)
    price = Price(item=problem.price / 1000, currency=problem.currency)
    apis = []
    for url, model in addresses(problem, names_of(problem, labelled, held)):
        apis.append(Api.at(url, model, token=problem.token, budget=budget, price=price, store=store))
        contract = apis[-1].contract
        if contract.shape != held.shape or contract.answers != problem.answers:
            what = f"takes {list(contract.shape)} and answers {contract.answers}"
            mend = f"the problem has inputs {list(held.shape)} and says `answers: {problem.answers}`"
            raise SpoliaError(what, where=f"{url} {model}", mend=mend)
    return apis


def _function(trained: Trained, contract: Contract) -> Any:
    return lambda x: answering(trained.logits(x), contract)


def _ids(api: Api, held: Labelled, labelled: Stream) -> list[int]:
    """The label ids of an API's classes, by their names."""
    known = {held.classes[raw]: place for place, raw in enumerate(labelled.order)}
    strange = [name for name in api.classes if name not in known]
    if strange:
        what = f"knows classes {strange[:4]}, of which the test has none"
        raise SpoliaError(what, where=api.name, mend=f"known are {', '.join(list(known)[:12])}")
    return [known[name] for name in api.classes]


def _classes(held: Labelled, labelled: Stream, ids: Any) -> list[str]:
    return [held.classes[labelled.order[c]] for c in ids]


def _shown(part: Part) -> tuple[Tensor, Tensor]:
    batch = part.batch(slice(None))
    return batch.x, batch.y


def _few(part: Part, count: int, seed: int, place: int) -> tuple[Tensor, Tensor]:
    """`count` examples of each class, at random, as floats in 0 … 1."""
    labels, draws = part.labels.numpy()[part.places], generator(seed, "apis", "few", place)
    chosen = [draws.choice(np.flatnonzero(labels == c), count, replace=False) for c in np.unique(labels)]
    batch = part.batch(np.sort(np.concatenate(chosen)))
    return as_floats(batch.x), batch.y

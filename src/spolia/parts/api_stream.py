"""A stream of APIs: experiences that bring an expert to ask in the place of examples to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.errors import Problems
from spolia.parts.stream import Batch, Experience, Part, Stream, Test

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.api import Api


@dataclass(frozen=True, eq=False)
class ApiExperience(Experience):
    """`api` is asked for `rounds` rounds. `train` holds the few real examples there are, most often none.

    `classes` are the label ids of the API's own classes, in the order of its outputs.
    """

    api: Any = None  # an Api; a dataclass with defaults before it needs one here
    rounds: int = 0

    def steps(self, batch: int, epochs: float) -> int:
        return max(1, self.rounds)

    def draw(self, batch: int, seed: int, step: int) -> Batch:
        """Of the few real examples `batch`, all where there are fewer; without any, one blank with the label -1.

        No learner that goes by labels can take it for an example.
        """
        if not len(self.train):
            blank = torch.zeros(1, *self.train.inputs.shape[1:], dtype=self.train.inputs.dtype)
            return Batch(blank, torch.tensor([-1]))
        return super().draw(min(batch, len(self.train)), seed, step)


def api_stream(
    apis: Sequence[Api],
    tests: Sequence[tuple[Tensor, Tensor]],
    rounds: int | Sequence[int],
    *,
    classes: Sequence[Sequence[int]] | None = None,
    few: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> Stream:
    """APIs one after the other, each for so many rounds; `tests[t]` judges what was learned of API t, by label ids.

    `classes`: ids of each API's classes in its order; by default those of equal names are one class, and ids go by first
    appearance. `few[t]`: real examples (inputs, ids) that go with API t.
    """
    ids = [list(own) for own in classes] if classes is not None else _by_name(apis)
    each = [rounds] * len(apis) if isinstance(rounds, int) else list(rounds)
    _check(apis, tests, each, ids)
    experiences, judged = [], []
    for t, (api, (x, y), own) in enumerate(zip(apis, tests, ids, strict=True)):
        real = (few or {}).get(t, (x[:0], y[:0]))
        train = Part(real[0], real[1].long(), np.arange(len(real[1])))
        experiences.append(ApiExperience(t, api.name, train, tuple(own), t, api=api, rounds=each[t]))
        judged.append(Test(api.name, Part(x, y.long(), np.arange(len(y))), tuple(sorted(set(own)))))
    total = max(max(own) for own in ids) + 1
    return Stream("class", tuple(experiences), tuple(judged), total, tuple(range(total)), seed)


def _by_name(apis: Sequence[Api]) -> list[list[int]]:
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(name, len(numbers)) for name in api.classes] for api in apis]


def _check(apis: Sequence[Api], tests: Sequence[Any], rounds: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
    problems = Problems()
    if not apis or not len(apis) == len(tests) == len(rounds) == len(ids):
        what = f"{len(apis)} APIs, {len(tests)} tests, {len(rounds)} numbers of rounds, {len(ids)} lists of classes"
        problems.add("stream", what, "give one of each for every API")
    for api, own, (x, y) in zip(apis, ids, tests, strict=False):
        if len(own) != len(api.classes) or len(set(own)) != len(own) or min(own) < 0:
            problems.add(api.name, f"ids {own[:8]} for {len(api.classes)} classes", "give each class one id, from 0 on")
        if len(x) != len(y) or (len(y) and not set(torch.unique(y).tolist()) <= set(own)):
            problems.add(api.name, "its test holds labels that it does not know", "give ids of its own classes")
    names = [api.name for api in apis]
    if len(set(names)) < len(names):
        problems.add("stream", f"names {names}", "call each API by another name: budgets go by it")
    problems.raise_if_any()

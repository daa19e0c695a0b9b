"""RegMean and RegMean++: every linear layer is solved for, so that on each task's inputs it does what the experts' do.

For experts that can be run, and some inputs of every task; no gradients. Jin et al., Dataless Knowledge Fusion by Merging
Weights of Language Models, ICLR 2023, arXiv 2212.09849; RegMean++: Nguyen et al. 2025, arXiv 2508.03121.

    W = argmin sum_k c_k / n_k |X_k W^T - X_k W_k^T|^2,   W^T = (sum_k c_k G_k)^-1 sum_k c_k G_k W_k^T,   G_k = X_k^T X_k / n_k

| paper | here |
|---|---|
| X_k | rows that the layer is given, task k's inputs going through expert k; in RegMean++ through what is merged before it |
| G_k | `grams(...)`, entries off the diagonal times `settings.alpha` |
| W_k | `stage.copy_of(tensor, k)` |
| c_k (not in the paper) | `settings.weight` |

All other tensors take the mean. Data touched: inputs of every task without labels.

Departures: solved as W = M + D, M the experts' mean, by a Cholesky factor in fp64 with a ridge on D: where no input points,
the mean is left, equal experts come out bit for bit, and singular Grams need no care; published code inverts them. Layers
with one input share a Gram; only as many Grams as fit `memory` are held, at the price of more passes. RegMean++ walks
layer by layer, published code block by block, in which the expert's own layers still speak.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from spolia.core.dist import world
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import LearnedSettings, PerModel, each, setting
from spolia.errors import SpoliaError
from spolia.parts.adaptation import check_inputs
from spolia.parts.align import Aligned
from spolia.parts.examples import by_task
from spolia.parts.expert import ExpertPool
from spolia.parts.grams import Fed, Linear, check_sound, fed_together, grams, linear_layers
from spolia.parts.learned import Learned
from spolia.parts.network import Network
from spolia.parts.stage import Drawn, Stage, drawn

if TYPE_CHECKING:
    from torch import Tensor

_JIN, _CODE, _OURS = "Jin et al. 2023", "published code", "our choice"


class RegMeanPlus(LearnedSettings):
    """Settings of `regmean_plus`."""

    base: ClassVar[str] = "unused"

    examples: int = setting(256, "inputs of a task that are looked at, at most", unit="inputs", source=_CODE, ge=1)
    alpha: float = setting(
        0.95,
        "factor of the Grams' entries off the diagonal",
        source=f"{_CODE} for CLIP; elsewhere 0.9 to 0.95 for encoders, 0.6 GPT-2, 0.1 T5",
        ge=0,
        le=1,
    )
    ridge: float = setting(1e-6, "pull to the mean, as a share of the Gram's mean eigenvalue", source=_OURS, ge=1e-12)
    weight: PerModel = setting(1.0, "c_k, factor of each expert's Gram, and its share in means", source=_OURS)
    layers: str = setting(
        ".*", "regular expression; linear layers whose module's name it finds are solved for", source=f"{_JIN}: all"
    )
    batch: int = setting(32, "inputs of a forward pass", unit="inputs", source=_OURS, ge=1)
    batchnorm: Literal["reestimate", "average"] = setting(
        "reestimate", "running statistics: found anew on the inputs, or the experts' mean", source=_OURS
    )

    @field_validator("layers")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("weight")
    @classmethod
    def _weights_are_shares(cls, value: PerModel) -> PerModel:
        weights = (value,) if isinstance(value, int | float) else value
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError("no weight may be below 0, and one must be above")
        return value


class RegMean(RegMeanPlus):
    """Settings of `regmean`."""

    memory: int = setting(
        2_000_000_000,
        "for Grams held at a time; less asks for more passes over the inputs",
        unit="bytes",
        source=_OURS,
        ge=0,
    )


def regmean(
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: RegMean,
    journal: Journal | None = None,
    seed: int = 0,
) -> Learned:
    """Merged weights and what was seen. `unlabelled`: inputs by task, one task an expert."""
    work = _Work.of(pool, network, unlabelled, settings, seed)
    journal = journal or Journal()
    with pool.opened():
        merged = work.start()
        portions = _portions(work.fed, settings.memory)
        with journal.phase("regmean"):
            for step in journal.steps(len(portions), {"merged": merged, "disturbance": work.disturbance}, shared=True):
                sums = [Sums.of(fed) for fed in portions[step]]
                for k, task in enumerate(work.inputs):
                    work.stage.show(k)
                    work.add(sums, k, grams(work.stage.network, portions[step], work.batches(task)), merged)
                work.solve(sums, merged)
        return work.finished(merged, "regmean")


def regmean_plus(
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: RegMeanPlus,
    journal: Journal | None = None,
    seed: int = 0,
) -> Learned:
    """The same, each layer being given what the merged layers before it make of a task's inputs."""
    work = _Work.of(pool, network, unlabelled, settings, seed)
    journal = journal or Journal()
    with pool.opened():
        merged = work.start()
        with journal.phase("regmean_plus"):
            for step in journal.steps(len(work.fed), {"merged": merged, "disturbance": work.disturbance}, shared=True):
                work.stage.put(merged)
                fed = work.fed[step]
                sums = [Sums.of(fed)]
                for k, task in enumerate(work.inputs):
                    work.add(sums, k, grams(work.stage.network, [fed], work.batches(task), stop_early=True), merged)
                work.solve(sums, merged)
        return work.finished(merged, "regmean_plus")


@dataclass
class Sums:
    """What the solution of layers with one input needs of all experts, in fp64. M is the mean of their weights."""

    fed: Fed
    gram: Tensor  # sum_k c_k G_k [in, in]
    pulls: list[Tensor]  # sum_k c_k G_k (W_k - M)^T of each layer [in, out]
    before: list[float]  # sum_k c_k / n_k |X_k M^T - X_k W_k^T|^2

    @classmethod
    def of(cls, fed: Fed) -> Sums:
        square = torch.zeros(fed.width, fed.width, dtype=torch.float64)
        pulls = [torch.zeros(fed.width, layer.outputs, dtype=torch.float64) for layer in fed.layers]
        return cls(fed, square, pulls, [0.0] * len(pulls))

    def add(self, gram: Tensor, changes: Sequence[Tensor | None]) -> None:
        """An expert's Gram and its (W_k - M)^T [in, out] of each layer; None where it lacks the layer."""
        self.gram += gram
        for i, change in enumerate(changes):
            if change is not None:
                pull = gram @ change
                self.pulls[i] += pull
                self.before[i] += float((pull * change).sum())

    def solved(self, ridge: float) -> list[tuple[Tensor, float]]:
        """(W - M)^T of each layer [in, out], and the sum of squares that is left of `before`."""
        trace = float(self.gram.trace())
        if trace <= 0:  # nothing ever came in
            return [(torch.zeros_like(pull), 0.0) for pull in self.pulls]
        shifted = self.gram + ridge * trace / len(self.gram) * torch.eye(len(self.gram), dtype=torch.float64)
        factor = torch.linalg.cholesky(shifted)
        found = []
        for pull, before in zip(self.pulls, self.before, strict=True):
            change = torch.cholesky_solve(pull, factor)
            gain = float((change * (2 * pull - self.gram @ change)).sum())
            found.append((change, max(before - gain, 0.0)))
        return found


@dataclass
class _Work:
    """The stage, the inputs drawn, the layers to be solved for in the order they run, and what was seen of each."""

    stage: Stage
    inputs: dict[str, Drawn]
    weights: tuple[float, ...]
    settings: RegMeanPlus
    fed: list[Fed]
    idle: list[str]  # linear layers that no input runs through
    tensors: dict[str, Aligned]
    disturbance: dict[str, list[float]] = field(default_factory=dict)  # of each layer: with the mean, with the solution

    @classmethod
    def of(
        cls, pool: ExpertPool, network: Network, unlabelled: Mapping[str, Any], settings: RegMeanPlus, seed: int
    ) -> _Work:
        """SpoliaError where something does not fit, before any weight is read."""
        tasks = [expert.name for expert in pool.experts]
        given = by_task(unlabelled, tasks)
        stage = Stage.of(pool, network)
        tensors = {tensor.name: tensor for tensor in stage.arithmetic}
        layers = linear_layers(stage.network, list(tensors), settings.layers)
        check_inputs(network, given)
        inputs = drawn(given, settings.examples, seed)
        first = [part.examples.batch(part.places[: settings.batch]) for part in inputs.values()]
        fed = fed_together(stage.network, layers, first)
        ran = {layer.module for one in fed for layer in one.layers}
        if not ran:
            what = f"none of its {len(layers)} linear layers runs as a module"
            raise SpoliaError(what, where="network", mend="merge with a method that needs no hooks, such as fisher")
        idle = [layer.module for layer in layers if layer.module not in ran]
        return cls(stage, inputs, each(settings.weight, len(tasks)), settings, fed, idle, tensors)

    def start(self) -> dict[str, Tensor]:
        """The experts' mean."""
        return self.stage.mean(self.weights)

    def batches(self, task: str) -> Any:
        return (batch for _, batch in self.inputs[task].batches(self.settings.batch))

    def add(self, sums: Sequence[Sums], k: int, found: Sequence[Tensor], merged: Mapping[str, Tensor]) -> None:
        """Expert k's Grams and weights. `merged` still holds the mean of these layers."""
        for one, gram in zip(sums, found, strict=True):
            check_sound(gram, one.fed.layers[0], list(self.inputs)[k])
            damped = gram * self.settings.alpha
            damped.diagonal().copy_(gram.diagonal())
            one.add(damped * self.weights[k], [self._change(layer, k, merged) for layer in one.fed.layers])

    def solve(self, sums: Sequence[Sums], merged: dict[str, Tensor]) -> None:
        for one in sums:
            solutions = one.solved(self.settings.ridge)
            for layer, before, (change, after) in zip(one.fed.layers, one.before, solutions, strict=True):
                mean = merged[layer.weight]
                merged[layer.weight] = (mean.double() + layer.matrix(change)).to(mean.dtype).contiguous()
                self.disturbance[layer.module] = [before, after]

    def finished(self, merged: dict[str, Tensor], method: str) -> Learned:
        if self.settings.batchnorm == "reestimate":
            self.stage.restate(merged, self.inputs, self.settings.batch)
        warnings = []
        if self.idle:
            more = f" and {len(self.idle) - 1} more" if len(self.idle) > 1 else ""
            warnings.append(
                f"linear layer {self.idle[0]}{more}: no input runs through it as a module; it takes the mean"
            )
        facts = {
            "method": method,
            "settings": self.settings.model_dump(mode="json"),
            "inputs": {task: {"looked at": len(part)} for task, part in self.inputs.items()},
            "labels used": False,
            "processes": world()[1],
            "layers": {name: {"mean": pair[0], "solved": pair[1]} for name, pair in self.disturbance.items()},
            "warnings": warnings,
        }
        return Learned(self.stage.weights(merged), None, facts)

    def _change(self, layer: Linear, k: int, merged: Mapping[str, Tensor]) -> Tensor | None:
        own = self.stage.copy_of(self.tensors[layer.weight], k)
        return None if own is None else layer.matrix(own.double() - merged[layer.weight].double())


def _portions(fed: Sequence[Fed], memory: int) -> list[list[Fed]]:
    """Layers whose sums and Grams fit `memory` bytes, in order; one input at least."""
    portions: list[list[Fed]] = []
    room = 0
    for one in fed:
        need = 8 * one.width * (3 * one.width + sum(layer.outputs for layer in one.layers))
        if not portions or need > room:
            portions.append([])
            room = memory
        portions[-1].append(one)
        room -= need
    return portions

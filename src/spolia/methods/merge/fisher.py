"""Fisher merging: every weight a mean of the experts', each counting by how much its own predictions depend on that weight.

For experts that can be run, and some inputs of every task; no gradient training. Matena & Raffel, Merging Models with
Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832.

    theta = (sum_k c_k F_k theta_k) / (sum_k c_k F_k),    F_k = E_x E_{y ~ p_k(y|x)} (d log p_k(y|x) / d theta_k)^2

| paper | here |
|---|---|
| F_k | `information(...)`: the diagonal of the Fisher matrix, a number a weight |
| c_k | `settings.weight` |
| p_k(y given x) | softmax of `network.logits(task, x)` with the expert's weights |

The gradient of log p(c) is J^T (e_c - p), J the Jacobian of the logits: one backward pass a class of an example, after one
forward pass. Above `max_classes`, and for logits of every token, one label is drawn from p instead: right on average.
Data touched: inputs of every task without labels.

Departures: gradients are squared example by example; published code squares one gradient of a batch, in which examples and
classes mix. Each F_k counts in units of its own root mean square, which is its L2 norm but for a factor that all have in
common; so does the floor. An expert whose F_k is zero throughout has no say. What has no Fisher (buffers) takes the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from spolia.core.dist import summed, world
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.settings import LearnedSettings, PerModel, each, setting
from spolia.errors import SpoliaError
from spolia.parts.adaptation import check_inputs
from spolia.parts.examples import by_task
from spolia.parts.expert import ExpertPool
from spolia.parts.learned import Learned
from spolia.parts.network import Network
from spolia.parts.stage import Drawn, Stage, drawn

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

_MATENA, _CODE, _OURS = "Matena & Raffel 2022", "published code", "our choice"
_HELD = 256_000_000  # bytes of gradients held at a time where `chunk` is not said
_MOST = 64  # examples at a time: more save nothing


class Fisher(LearnedSettings):
    """Settings of `fisher`."""

    base: ClassVar[str] = "unused"

    examples: int = setting(256, "inputs of a task that are looked at, at most", unit="inputs", source=_CODE, ge=1)
    weight: PerModel = setting(1.0, "c_k, factor of each expert's Fisher", source=_MATENA)
    normalize: bool = setting(True, "divide every F_k by its norm, so that no expert speaks louder", source=_CODE)
    floor: float = setting(
        1e-6, "least of F_k, as a share of its root mean square", source=f"{_CODE}, there absolute", ge=0
    )
    max_classes: int = setting(
        16, "classes up to which the mean over labels is exact; above it one label is drawn", source=_OURS, ge=1
    )
    chunk: int | None = setting(
        None,
        "inputs whose gradients are held at a time; by default what fits 256 MB",
        unit="inputs",
        source=_OURS,
        ge=1,
    )
    batchnorm: Literal["reestimate", "average"] = setting(
        "reestimate", "running statistics: found anew on the inputs, or the experts' mean", source=_OURS
    )

    @field_validator("weight")
    @classmethod
    def _weights_are_shares(cls, value: PerModel) -> PerModel:
        weights = (value,) if isinstance(value, int | float) else value
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError("no weight may be below 0, and one must be above")
        return value


def fisher(
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: Fisher,
    journal: Journal | None = None,
    seed: int = 0,
) -> Learned:
    """Merged weights and what was seen. `unlabelled`: inputs by task, one task an expert."""
    tasks = [expert.name for expert in pool.experts]
    given = by_task(unlabelled, tasks)
    stage = Stage.of(pool, network)
    check_inputs(network, given)
    journal = journal or Journal()
    inputs, weights = drawn(given, settings.examples, seed), each(settings.weight, len(tasks))
    sizes: dict[str, float] = {}  # root mean square of each F_k
    with pool.opened():
        merged = stage.mean(weights)
        masses = {t.name: torch.zeros_like(merged[t.name]) for t in _differentiable(stage)}  # sum of c_k F_k so far
        with journal.phase("fisher"):
            for k in journal.steps(len(tasks), {"merged": merged, "masses": masses, "sizes": sizes}, shared=True):
                stage.show(k)
                found = information(stage, tasks[k], inputs[tasks[k]], settings, seed)
                size = sizes[tasks[k]] = _size(found, tasks[k])
                unit = size if settings.normalize and size > 0 else 1.0
                for tensor in _differentiable(stage):
                    own = stage.copy_of(tensor, k)
                    if own is not None:
                        share = found.pop(tensor.name).clamp_(min=settings.floor * size) * (weights[k] / unit)
                        _add(merged[tensor.name], masses[tensor.name], own, share)
                journal.log(size=size)
        if settings.batchnorm == "reestimate":
            stage.restate(merged, inputs, _MOST)
    return Learned(stage.weights(merged), None, _facts(settings, inputs, sizes))


def information(stage: Stage, task: str, inputs: Drawn, settings: Fisher, seed: int) -> State:
    """F of the model on the stage, by tensor: fp32 (fp64 for an fp64 model), in main memory."""
    weights = {t.name: stage.own[t.name].detach() for t in _differentiable(stage)}
    total = {name: torch.zeros_like(w, dtype=_wide(w)) for name, w in weights.items()}
    size = settings.chunk or _chunk(weights)
    with torch.no_grad():
        shape = stage.network.logits(task, inputs.examples.batch(inputs.places[:1])).shape[1:]  # (tokens,) classes
    sampled = len(shape) > 1 or shape[-1] > settings.max_classes
    together = True
    for places, batch in inputs.batches(size):
        chance = _chances(seed, task, places, tuple(shape[:-1])) if sampled else None
        if together:
            try:
                _accumulate(total, [_side_by_side(stage.network, task, weights, batch, chance)])
                continue
            except Exception:  # vmap refuses some operations, each in its own words; the loop takes them all
                together = False
        _accumulate(total, _one_by_one(stage.network, task, weights, inputs, places, chance))
    return {name: summed(value.cpu()).div_(len(inputs)) for name, value in total.items()}


def _side_by_side(network: Network, task: str, weights: State, batch: Any, chance: Tensor | None) -> State:
    """Squared slopes of every example of a batch, through vmap, and their sum: by tensor."""

    def one(single: Any, draw: Tensor | None) -> State:
        alone = _alone(single)
        made: Any = torch.func.vjp(lambda w: network.logits(task, alone, w)[0], weights)
        logits, pull = made
        return _squares(logits, _mask(alone), draw, lambda row: pull(row)[0])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused attention has no rule for vmap
        apart = torch.func.vmap(one, in_dims=(0, None if chance is None else 0))(batch, chance)  # [examples, ...] each
    return {name: squares.sum(0) for name, squares in apart.items()}


def _one_by_one(
    network: Network, task: str, weights: State, inputs: Drawn, places: np.ndarray, chance: Tensor | None
) -> Iterator[State]:
    """The same, example after example."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    for i in range(len(places)):
        batch = inputs.examples.batch(places[i : i + 1])
        logits = network.logits(task, batch, leaves)[0]

        def pull(row: Tensor, logits: Tensor = logits) -> State:
            given = list(leaves.values())
            slopes = torch.autograd.grad(
                logits, given, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return dict(zip(leaves, slopes, strict=True))

        yield _squares(logits.detach(), _mask(batch), None if chance is None else chance[i], pull)


def _squares(logits: Tensor, mask: Tensor | None, draw: Tensor | None, pull: Callable[[Tensor], State]) -> State:
    """Squared slopes of log p, one example: the mean over all classes, or with `draw`, uniform numbers, of drawn labels."""
    p = logits.double().softmax(-1)  # [(tokens,) classes]
    classes = torch.arange(p.shape[-1], device=p.device)
    if draw is None:
        rows = p.sqrt().unsqueeze(1) * ((classes.unsqueeze(1) == classes).to(p) - p)  # [classes, classes]
        directions = [rows[c] for c in range(len(classes))]
    else:
        label = (p.cumsum(-1) < draw.to(p.device).unsqueeze(-1)).sum(-1).clamp(max=p.shape[-1] - 1)
        row = (classes == label.unsqueeze(-1)).to(p) - p
        if mask is not None and p.dim() > 1 and mask.shape == p.shape[:-1]:
            row = row * mask.to(p).unsqueeze(-1)
        directions = [row]  # labels of other tokens are independent: their products vanish on average
    total: State = {}
    for direction in directions:
        for name, slope in pull(direction.to(logits.dtype)).items():
            square = slope.to(_wide(slope)).square()
            total[name] = total[name] + square if name in total else square
    return total


def _alone(single: Any) -> Any:
    """One input without its axis of examples as a batch of one."""
    if isinstance(single, Mapping):
        return {name: _alone(part) for name, part in single.items()}
    if isinstance(single, tuple):
        return tuple(_alone(part) for part in single)
    return single.unsqueeze(0)


def _mask(batch: Any) -> Tensor | None:
    """Which tokens of a batch of one count [tokens]."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask[0] if torch.is_tensor(mask) and mask.dim() == 2 else None


def _accumulate(total: State, parts: Iterable[State]) -> None:
    for part in parts:
        for name, value in part.items():
            total[name] += value


def _add(mean: Tensor, mass: Tensor, own: Tensor, share: Tensor) -> None:
    """Move a running mean [n] to `own` by its share of the mass; where there is no mass yet, it stays."""
    mass += share
    mean.lerp_(own, torch.where(mass > 0, share / mass, 0.0).to(mean.dtype))


def _differentiable(stage: Stage) -> list[Any]:
    """The tensors that have a Fisher: parameters."""
    return [t for t in stage.arithmetic if isinstance(stage.own[t.name], torch.nn.Parameter)]


def _chances(seed: int, task: str, places: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """A uniform number for every label to be drawn [examples, (tokens)]: an example's own, however they are chunked."""
    return torch.from_numpy(np.stack([generator(seed, "fisher", task, int(p)).random(shape) for p in places]))


def _chunk(weights: State) -> int:
    """Examples whose slopes, their squares and the sum of those fit the memory."""
    held = 3 * sum(w.numel() * (8 if w.dtype == torch.float64 else 4) for w in weights.values())
    return max(1, min(_MOST, _HELD // max(held, 1)))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _size(found: State, task: str) -> float:
    """Root mean square over all weights. SpoliaError where it is not finite."""
    count = sum(value.numel() for value in found.values())
    size = (sum(float(value.double().square().sum()) for value in found.values()) / max(count, 1)) ** 0.5
    if not math.isfinite(size):
        mend = "look at the inputs of that task, and at its expert's outputs on them"
        raise SpoliaError("its expert's gradients are NaN or Inf", where=f"unlabelled.{task}", mend=mend)
    return size


def _facts(settings: Fisher, inputs: Mapping[str, Drawn], sizes: Mapping[str, float]) -> dict[str, Any]:
    """What the report tells."""
    warnings = [
        f"{task}: no prediction depends on any weight; this expert has no say" for task, s in sizes.items() if not s
    ]
    return {
        "method": "fisher",
        "settings": settings.model_dump(mode="json"),
        "inputs": {task: {"looked at": len(part)} for task, part in inputs.items()},
        "labels used": False,
        "processes": world()[1],
        "root mean square": dict(sizes),
        "warnings": warnings,
    }

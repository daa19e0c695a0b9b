"""What a merge costs: seconds and bytes, from headers and a few rates. Derived, with examples, in docs/scale.md.

    seconds = start + max(read / read rate, written / write rate, arithmetic / threads)

Reading, arithmetic and writing go on at the same time, so the slowest sets the pace. Processes that share a merge share
the disk, not the cores. Rates of the arithmetic are those of one hardware thread of an AMD EPYC (Zen 4), its sibling
busy; benchmarks/scale.py compares the model with what a merge takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from spolia.catalog import find
from spolia.core.settings import MergeSettings
from spolia.core.stream import cores
from spolia.parts.align import Aligned
from spolia.parts.expert import Weights
from spolia.parts.lora import LoraWeights
from spolia.parts.merging import affordable_workers, bytes_needed
from spolia.parts.preprocessed import Step
from spolia.runs.sizes import show_size

if TYPE_CHECKING:
    from spolia.runs.merging import Prepared
    from spolia.runs.request import MergeRequest

START = 2.5  # seconds: torch, headers, the card
TORCH_BYTES = 280_000_000  # a process that has imported torch and read a recipe
HEADER_BYTES = 3_000  # of one tensor of one model, described
WARM, COLD, WRITE = 5e9, 1e9, 1e9  # bytes a second: from memory, from a disk nobody described, to one
# ns of an element of a model, all sweeps of the merge counted, with default settings.
_NS = {
    "average": 2.4, "task_arithmetic": 2.4, "passthrough": 2.4, "slerp": 5.0, "nuslerp": 5.0, "multislerp": 5.0,
    "karcher": 6.0, "model_stock": 6.0, "sce": 8.0, "ram": 5.0, "ramplus": 8.0, "magmax": 4.0, "nearswap": 2.4,
    "arcee_fusion": 22.0, "consensus_ta": 6.0, "tall_masks": 8.0, "emr": 15.0, "dare": 6.0, "dare_ties": 7.0,
    "della": 20.0, "della_linear": 20.0, "pcb": 39.0, "awd": 54.0, "attach": 4.0,
    "tsv": 3.0, "iso_c": 3.0, "iso_cts": 5.0, "wudi": 3.0, "knots": 5.0,
}  # fmt: skip
_RANKED = {"model": (13.0, 4.0), "tensor": (8.0, 4.0), "row": (15.0, 18.0)}  # thresholds, by scope; with a vote
_PASS = 1.5  # of a further sweep that does little
_ADAPTED = 4.0  # of an element that an adapter changes, at every reading, beside its products
_SVD, _WIDE, _PRODUCT = 45e9, 23e9, 65e9  # FLOP a second: decompositions in fp32; anything in fp64; products in fp32
_INSIDE = 0.011  # of a tensor's elements that a threshold's bracket collects (core/select.py)


@dataclass(frozen=True)
class Machine:
    """What a merge runs on: threads of one process, processes, rates of the disk in bytes a second, memory in bytes."""

    threads: int
    processes: int = 1
    read_rate: float | None = None  # None: the memory's where all inputs fit into it, else COLD
    write_rate: float = WRITE
    memory: int = 0

    @classmethod
    def here(cls, threads: int | None = None) -> Machine:
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return cls(threads or cores(), memory=pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else 0)


@dataclass(frozen=True)
class Cost:
    """Bytes, and seconds by what they are spent on."""

    sweeps: int  # over the whole model
    read: int  # bytes that come from the disk, all sweeps
    written: int
    workers: int  # threads of one process that fit its memory
    peak: int  # bytes of one process
    reading: float
    writing: float
    arithmetic: float
    basis: str

    @property
    def seconds(self) -> float:
        return START + max(self.reading, self.writing, self.arithmetic)

    def to_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "basis"}


def cost_of(prepared: Prepared, written: int, machine: Machine, chunk_memory: int) -> Cost:
    """The cost of a merge that is known to fit. SpoliaError when the memory is too little for one worker."""
    request, pool, tensors = prepared.request, prepared.pool, prepared.aligned
    settings_for, experts, name = request.settings_for, len(pool.experts), request.method.name
    workers = affordable_workers(tensors, experts, machine.threads, chunk_memory, settings_for, pool.steps)
    stored = on_disk([model.weights for model in pool.models])
    whole = settings_for(tensors[0].name) if tensors else request.method.settings_class()()
    sweeps, again = passes(name, whole)
    steps = _as_merges(request)
    sweeps += sum(passes(*step)[0] - 1 for step in steps)
    fits = stored <= machine.memory * 3 // 4
    read = stored * (1 if fits else sweeps)
    rate = machine.read_rate or (WARM if fits else COLD)
    core_seconds = sum(tensor_seconds(name, t, settings_for(t.name), len(pool.models)) for t in tensors if t.arithmetic)
    core_seconds += sum(tensor_seconds(n, t, s, len(pool.models)) for n, s in steps for t in tensors if t.arithmetic)
    core_seconds += adapted_seconds([model.weights for model in pool.models]) * (sweeps + again)
    threads = workers * machine.processes
    parts = read / rate, written / machine.write_rate, core_seconds / threads
    return Cost(
        sweeps,
        read,
        written,
        workers,
        peak_of(tensors, experts, workers, settings_for, pool.steps),
        *parts,
        basis=f"{START:g} s to start, then the longest of: reading {show_size(read)} at {show_size(rate)}/s, "
        f"{parts[0]:.0f} s; writing {show_size(written)} at {show_size(machine.write_rate)}/s, {parts[1]:.0f} s; "
        f"arithmetic {parts[2]:.0f} s on {threads} threads",
    )


def _as_merges(request: MergeRequest) -> list[tuple[str, MergeSettings]]:
    """Each preprocessing as the method of its name, which costs as much."""
    return [(step.name, find(step.name).settings_class()(**dict(step.settings))) for step in request.preprocess]


def on_disk(weights: Sequence[Weights]) -> int:
    """Bytes that a sweep reads: each model once, of an adapter its factors and its base."""
    found: dict[int, int] = {}
    for given in weights:
        for part in (given.base, given.adapter.weights) if isinstance(given, LoraWeights) else (given,):
            found[id(part)] = part.nbytes
    return sum(found.values())


def passes(method: str, settings: MergeSettings) -> tuple[int, int]:
    """Sweeps over the whole model, and how often a tensor is read again while it is in memory."""
    given, votes = dict(settings), _votes(settings)
    scope = given.get("scope")
    if "zero_sign" in given:  # the family of thresholds and coins
        ranked = "at_threshold" in given
        whole = ranked and scope == "model"
        sweeps = 1 + votes + 2 * whole + (whole and given["at_threshold"] == "exact")
        return sweeps, (1 + votes) * ((ranked and scope == "tensor") + (given["rescale"] == "l1"))
    if method == "ramplus":
        return (2, 0) if scope == "model" else (1, 1)
    sweeps = {"pcb": 5, "emr": 3, "tall_masks": 2, "awd": 2}.get(method, 1)
    again = {"slerp": 1, "nuslerp": 1, "multislerp": 1, "karcher": 1, "model_stock": 1, "sce": 1, "arcee_fusion": 3}
    return sweeps, 1 if method == "iso_cts" else again.get(method, 0)


def _votes(settings: MergeSettings) -> bool:
    """Whether the signs of the whole model are counted before anything is merged."""
    return getattr(settings, "elect", False) and getattr(settings, "zero_sign", "") == "majority"


def tensor_seconds(method: str, tensor: Aligned, settings: MergeSettings, models: int) -> float:
    """Seconds of one thread for one tensor."""
    experts = len(tensor.experts)
    given, elements = dict(settings), tensor.numel * models
    if "at_threshold" in given:
        alone, votes = _RANKED[given["scope"]]
        ns = alone + votes * _votes(settings) + _PASS * (given["at_threshold"] == "exact")
    else:
        ns = _NS[method]
    ns += 2 * _PASS * (given.get("rescale") == "l1")
    flops = matrix_work(method, tensor.shape, experts, settings) if _is_matrix(tensor, settings) else (0.0, 0.0, 0.0)
    return 1e-9 * ns * elements + sum(work / rate for work, rate in zip(flops, (_SVD, _WIDE, _PRODUCT), strict=True))


def _is_matrix(tensor: Aligned, settings: MergeSettings) -> bool:
    test = getattr(settings, "is_matrix", None)
    return test is not None and test(tensor.name, tensor.shape, len(tensor.experts))


def matrix_work(
    method: str, shape: tuple[int, ...], experts: int, settings: MergeSettings
) -> tuple[float, float, float]:
    """FLOP of SVDs, in fp64, and of fp32 products, for one matrix [out, in].

    An SVD counts 26 m^2 M for sides m <= M, an eigendecomposition with vectors 9 n^3, X^T X and a product 2 o n i.
    """
    out, into = shape
    small, large = min(shape), max(shape)
    svd, square = 26.0 * small**2 * large, float(small) ** 3
    joined = 2.0 * (out + into) * small**2 + (2 * 9 + 3 * 2) * square  # two Gram matrices, their roots, the core
    applied = 2.0 * out * small**2 + 2.0 * out * small * into
    given = dict(settings)
    if method == "tsv":
        return experts * svd, joined, applied
    if method == "iso_c":
        return 0.0, 2.0 * large * small**2 + 11 * square, 2.0 * large * small**2
    if method == "iso_cts":
        return (experts + 1) * svd, joined, applied + experts * 4.0 * out * into * small * given["common"]
    if method == "wudi":
        grams, pulls = experts * 2.0 * out * into**2, experts * 2.0 * out * into**2
        if given["solver"] == "exact":
            return 0.0, grams + pulls + 9.0 * into**3 + 4.0 * out * into**2, 0.0
        return 0.0, grams, pulls + given["steps"] * 2.0 * out * into**2
    if method == "knots":  # QR of [in K, out], SVD of the triangle, the basis
        return 26.0 * min(out, experts * into) ** 3, 4.0 * experts * into * out**2, 4.0 * experts * into * out**2
    return 0.0, 0.0, 0.0


def adapted_seconds(weights: Sequence[Weights]) -> float:
    """Seconds of one thread to make the tensors that adapters change, for one reading of all."""
    seconds = 0.0
    for given in weights:
        if not isinstance(given, LoraWeights):
            continue
        ranks = given.adapter.weights.entries
        for name, change in given.changes.items():
            if change.pair is not None:
                rank = 1 if change.bias else ranks[change.pair.a].shape[0]
                seconds += given.entries[name].numel * (2 * rank / _WIDE + 1e-9 * _ADAPTED)
    return seconds


def peak_of(
    tensors: Sequence[Aligned],
    experts: int,
    workers: int,
    settings_for: Callable[[str], MergeSettings],
    steps: Sequence[Step] = (),
) -> int:
    """Bytes of one process: blocks or whole tensors of every worker, headers, and what brackets of thresholds collect."""
    need, _ = bytes_needed(tensors, experts, settings_for, steps)
    collected = sorted(
        (t.numel * experts * (8 if t.wide else 4) for t in tensors if _brackets(settings_for(t.name))), reverse=True
    )
    headers = HEADER_BYTES * len(tensors) * (experts + 1)
    return TORCH_BYTES + workers * need + int(_INSIDE * sum(collected[:workers])) + headers


def _brackets(settings: MergeSettings) -> bool:
    return "at_threshold" in dict(settings) and getattr(settings, "scope", "") == "tensor"

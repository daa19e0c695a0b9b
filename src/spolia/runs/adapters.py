"""Merging LoRA adapters of one base into one adapter, by their factors: nothing is ever dense, the base is not needed.

    sum_k w_k s_k B_k A_k  =  [w_1 s_1 B_1 | .. | w_K s_K B_K] [A_1; ..; A_K]

The concatenation is exact and its rank the sum of ranks. With `rank` the sum is cut to its largest singular values, by
the QR and small SVD of core/lowrank.py: no matrix of that rank is closer in the Frobenius norm (Eckart-Young).
`knots` merges in the basis that the changes share, and gives a pair of at most the same rank.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.checkpoint import BY_TORCH_NAME
from spolia.core.layout import Layout, Slot
from spolia.core.lazy import torch
from spolia.core.staging import Staging
from spolia.errors import Problems, SpoliaError, SpoliaWarning, did_you_mean
from spolia.methods.merge.knots import Knots
from spolia.parts.adapter import CONFIG, Adapter, Pair
from spolia.parts.lora import whole
from spolia.runs.asked import check_settings
from spolia.runs.factors import first_with, merged, rank_of, square
from spolia.runs.references import located

if TYPE_CHECKING:
    from torch import Tensor

FILE = "adapter_model.safetensors"
METHODS = ("task_arithmetic", "average", "knots")


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    weights: float | Sequence[float] = 1.0,
    method: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Merge adapter folders into the adapter folder `out`, which peft loads. Returns its path.

    `task_arithmetic` adds the changes, each times its weight; `average` divides by the sum of the weights; `knots` merges
    them as its `settings` say. `rank`: most rank of a module, None keeps all of it. Factors are stored in `dtype`. Raises
    SpoliaError with all that does not fit.
    """
    names = [Path(path).name or str(path) for path in adapters]
    shares = _shares(method, weights, len(names))
    chosen = _knots(method, settings, shares)
    _check_options(rank, dtype)
    members, target = _open(adapters), Path(out)
    problems = Problems()
    if any(member.path.resolve() == target.resolve() for member in members):
        problems.add(str(out), "is one of the adapters", "write the merged one somewhere else")
    if chosen is None:
        _check_replaced(members, names, shares, problems)
    else:
        _check_factors_only(members, names, problems)
    _check_fit(members, names, problems)
    problems.raise_if_any()
    modules = list(dict.fromkeys(module for member in members for module in member.pairs))
    ranks = {module: rank_of(members, module, rank, chosen) for module in modules}
    slots = _slots(members, ranks, dtype)
    layout = _one_file(slots)
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(member.weights.opened())
        staging = stack.enter_context(Staging(target, layout, "adapters", overwrite=overwrite))
        lost, kept = 0.0, 0.0
        for module in modules:
            b, a, dropped = merged(members, shares, chosen, seed, module, ranks[module])
            pair = first_with(members, module).pairs[module]
            _write(staging, pair.a, a)
            _write(staging, pair.b, b)
            lost, kept = lost + dropped, kept + square(b, a)
        for name, source in members[0].replaced.items():
            mean = sum(s * whole(m.weights, m.replaced[name]) for s, m in zip(shares, members, strict=True))
            assert isinstance(mean, torch.Tensor)
            _write(staging, source, mean)
        staging.write_text(CONFIG, json.dumps(_config(members, ranks), indent=2) + "\n")
        error = math.sqrt(lost / (lost + kept)) if lost + kept else 0.0
        told = _manifest(names, shares, method, rank, error)
        if chosen is not None:
            told |= {"settings": chosen.model_dump(mode="json"), "seed": seed}
        staging.write_text("spolia.json", json.dumps(told, indent=2) + "\n")
        Adapter.open(staging.folder)  # what was written can be read back
        staging.finish()
    return target


def _shares(method: str, weights: float | Sequence[float], count: int) -> list[float]:
    if method not in METHODS:
        what = f"`{method}` cannot be done on factors: it is not linear in the changes"
        near = did_you_mean(method, METHODS)
        raise SpoliaError(
            what, where="method", mend=f"{near}; or merge the models: `spolia.merge(adapters, base=base)`"
        )
    given = [float(weights)] * count if isinstance(weights, int | float) else [float(w) for w in weights]
    if not count or len(given) != count or not all(map(math.isfinite, given)):
        raise SpoliaError(
            f"{len(given)} weights for {count} adapters", where="weights", mend="give one finite number each"
        )
    if method != "average":
        return given
    if abs(sum(given)) < 1e-8:
        raise SpoliaError("the weights sum to zero", where="weights", mend="change one, or use task_arithmetic")
    return [w / sum(given) for w in given]


def _knots(method: str, given: Mapping[str, Any] | None, shares: list[float]) -> Knots | None:
    """The settings of `knots`, with `shares` as its weights; None for the other methods, which have none."""
    if method != "knots":
        if given:
            raise SpoliaError(f"{method} of factors has no settings", where="settings", mend="use `weights`")
        return None
    if "weight" in (given or {}):
        raise SpoliaError("the adapters' weights are `weights` here", where="settings.weight", mend="give `weights`")
    checked = check_settings(find("knots"), {**(given or {}), "weight": tuple(shares)}, len(shares))
    assert isinstance(checked, Knots)
    return checked


def _check_options(rank: int | None, dtype: str) -> None:
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SpoliaError(f"a rank of {rank!r}", where="rank", mend="give a whole number from 1 on, or None")
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise SpoliaError(f"`{dtype}` is not a type to write", where="dtype", mend=did_you_mean(dtype, known))


def _open(paths: Sequence[str | os.PathLike[str]]) -> list[Adapter]:
    problems, members = Problems(), []
    for path in paths:
        try:
            members.append(Adapter.open(Path(located(path))))
        except SpoliaError as error:
            problems.errors.extend(error.problems)
    problems.raise_if_any()
    return members


def _check_fit(members: list[Adapter], names: list[str], problems: Problems) -> None:
    """One base, one way the weights lie, equal shapes, nothing beside factors."""
    first = members[0]
    for member, name in zip(members[1:], names[1:], strict=True):
        if member.base != first.base:
            what = f"{names[0]} was trained on `{first.base}`, {name} on `{member.base}`"
            warnings.warn(
                f"{what}: the merged adapter fits only if they are the same model", SpoliaWarning, stacklevel=3
            )
        if member.transposed != first.transposed:
            problems.add(name, "and the first differ in `fan_in_fan_out`", "merge adapters of one base")
    for member, name in zip(members, names, strict=True):
        if member.biases:
            mend = "merge the models instead: `spolia.merge(adapters, base=base)`"
            problems.add(name, "was trained with `lora_bias`", mend)
        for module, pair in member.pairs.items():
            owner = first_with(members, module)
            ours, theirs = _sides(member, pair), _sides(owner, owner.pairs[module])
            if ours != theirs:
                where = names[members.index(owner)]
                what = f"changes `{module}` as {ours}, {where} as {theirs}"
                problems.add(name, what, "merge adapters of one base")


def _check_replaced(members: list[Adapter], names: list[str], shares: list[float], problems: Problems) -> None:
    """Tensors that replace the base's: in all adapters or none, of equal shapes, and only where a mean is asked for."""
    first = members[0]
    for member, name in zip(members[1:], names[1:], strict=True):
        for tensor in sorted(member.replaced.keys() ^ first.replaced.keys()):
            have, lack = (name, names[0]) if tensor in member.replaced else (names[0], name)
            what = f"replaces `{tensor}` of the base, {lack} does not"
            problems.add(have, what, "merge the models instead: `spolia.merge(adapters, base=base)`")
        for tensor in member.replaced.keys() & first.replaced.keys():
            ours, theirs = (m.weights.entries[m.replaced[tensor]].shape for m in (member, first))
            if ours != theirs:
                problems.add(
                    name, f"has `{tensor}` {list(ours)}, {names[0]} {list(theirs)}", "merge adapters of one base"
                )
    if any(m.replaced for m in members) and abs(sum(shares) - 1.0) > 1e-9:
        what = f"replaces `{next(iter(first.replaced), '')}` of the base, and the weights do not sum to 1"
        problems.add(names[0], what, 'use method="average", or merge the models: `spolia.merge(adapters, base=base)`')


def _check_factors_only(members: list[Adapter], names: list[str], problems: Problems) -> None:
    """knots sees changes, and what replaces a tensor of the base is none without it."""
    for member, name in zip(members, names, strict=True):
        if member.replaced:
            what = f"replaces `{next(iter(member.replaced))}` of the base, and knots merges factors only"
            problems.add(name, what, 'merge the models instead: `spolia.merge(adapters, base=base, method="knots")`')


def _sides(member: Adapter, pair: Pair) -> tuple[int, ...]:
    """What B A is: rows, then the columns of A and whether it is an embedding's."""
    a, b = member.weights.entries[pair.a].shape, member.weights.entries[pair.b].shape
    return (b[0], *a[1:], *b[2:], int(pair.embedding))


def _slots(members: list[Adapter], ranks: dict[str, int], dtype: str) -> list[Slot]:
    slots, kind = [], BY_TORCH_NAME[dtype]
    for module, rank in ranks.items():
        owner = first_with(members, module)
        pair, entries = owner.pairs[module], owner.weights.entries
        slots.append(Slot(pair.a, kind, (rank, *entries[pair.a].shape[1:])))
        slots.append(Slot(pair.b, kind, (entries[pair.b].shape[0], rank, *entries[pair.b].shape[2:])))
    for source in members[0].replaced.values():
        entry = members[0].weights.entries[source]
        slots.append(Slot(source, entry.dtype, entry.shape))
    return slots


def _one_file(slots: list[Slot]) -> Layout:
    """All of it in the one file that peft looks for."""
    plain = Layout.of(slots, 1 << 62)
    (old,) = plain.sizes
    places = {name: replace(place, file=FILE) for name, place in plain.places.items()}
    return replace(plain, places=places, headers={FILE: plain.headers[old]}, sizes={FILE: plain.sizes[old]})


def _write(staging: Staging, name: str, values: Tensor) -> None:
    final = getattr(torch, staging.layout.places[name].slot.dtype.torch_name)
    flat = values.to(final).contiguous().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise SpoliaError(
            f"`{name}` is not finite in the merged adapter", where=name, mend="an adapter holds NaN or Inf"
        )
    staging.write(name, 0, memoryview(flat.view(torch.uint8).numpy()))


def _config(members: list[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    """The first adapter's config with alpha = r everywhere, so that every scale is 1."""
    config = dict(members[0].config)
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.get("r", 8)
    odd = {module: rank for module, rank in ranks.items() if rank != common}
    config |= {"r": common, "lora_alpha": common, "rank_pattern": odd, "alpha_pattern": odd, "use_rslora": False}
    config |= {"init_lora_weights": True, "inference_mode": True}
    keys = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
    said = [[set(v) if isinstance(v := m.config.get(key), list) else v for key in keys] for m in members]
    if any(targets != said[0] for targets in said):
        config |= {"target_modules": list(ranks), "layers_to_transform": None, "layers_pattern": None}
        config["exclude_modules"] = None
    return config


def _manifest(names: list[str], shares: list[float], method: str, rank: int | None, error: float) -> dict[str, Any]:
    return {
        "made_by": f"spolia {version('spolia')}",
        "method": method,
        "adapters": [{"name": name, "weight": share} for name, share in zip(names, shares, strict=True)],
        "rank": rank,
        "relative_error": error,  # Frobenius norm of what the rank cut off, by that of the whole change
    }

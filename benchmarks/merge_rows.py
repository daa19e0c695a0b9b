"""The rows of benchmarks/merge.py: which merges are run, as which recipe, and how their results are compared.

Rows 1a to 1h have demands of their own and stand in docs/results/merge_speed.json. The others, in merge_speed_all.json,
are named after their method: everything else that mergekit has too, and what it has not, beside the floor alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DENSITY, GAMMA = 0.2, 0.01
# About 0.3. Round weights put sums of bf16 numbers exactly between two others, where the last fp32 bit decides.
WEIGHTS = (0.4321, 0.3457, 0.2222)
_KEEP = f"density: {DENSITY}"


@dataclass(frozen=True)
class Row:
    """One merge. We demand that the peer takes `faster` times our seconds or more, we `memory` of its peak or less."""

    key: str
    method: str
    each: str  # parameters of every expert, as they stand in the recipe; `weight` stands for its own
    experts: int = 3
    base: bool = True
    faster: float | None = 1
    memory: float | None = 1 / 2
    check: str = "rounding"  # how the results must agree, see merge_work.py; "" where there is no peer
    whole: str = ""  # parameters of the whole merge
    size: str = "normal"
    precision: str = "float32"  # of the peer's arithmetic in the comparison
    listed: bool = False  # the base stands among the models
    halves: bool = False  # two experts' layers in slices, half of each, so that one model is read

    @property
    def peer(self) -> bool:
        return bool(self.check)


def _alone(method: str, size: str = "normal") -> Row:
    return Row(method, method, "", check="", size=size, faster=None, memory=None)


NAMED = (
    Row("1a", "linear", "weight", 3, False, 3, 1 / 4),
    Row("1b", "task_arithmetic", "weight", 3, True, 3, 1 / 4),
    Row("1c", "slerp", "", 1, True, 3, 1 / 4, whole="t: 0.4", listed=True),
    Row("1d", "dare_ties", f"weight, {_KEEP}", 3, True, 4, 1 / 4, "random"),
    Row("1e", "ties", f"weight, {_KEEP}", 3, True, 6, 1 / 5, "cut"),
    Row("1f", "breadcrumbs", f"weight, {_KEEP}, gamma: {GAMMA}", 3, True, 5, 1 / 5, "cut"),
    Row("1g", "della", f"weight, {_KEEP}", 3, True, 2, 1 / 5, "random"),
    Row("1h", "linear", "weight", 3, False, None, None, size="double"),
)
OTHERS = (
    # compared in float64 what hangs on sums over a whole tensor, which lose digits in the peer's fp32
    Row("nuslerp", "nuslerp", "weight", 2, False, precision="float64"),
    Row("multislerp", "multislerp", "weight", 3, False, precision="float64"),
    Row("karcher", "karcher", "", 3, False, precision="float64"),
    Row("model_stock", "model_stock", "", precision="float64"),
    Row("sce", "sce", "", check="variance", whole=f"select_topk: {DENSITY}"),
    Row("ram", "ram", ""),
    Row("ramplus_tl", "ramplus_tl", ""),
    Row("nearswap", "nearswap", "", 1, whole="t: 0.00012345"),
    Row("arcee_fusion", "arcee_fusion", "", 1, check="random", precision="float64"),
    Row("passthrough", "passthrough", "", 1, False, halves=True),
    Row("dare_linear", "dare_linear", f"weight, {_KEEP}", check="random"),
    Row("breadcrumbs_ties", "breadcrumbs_ties", f"weight, {_KEEP}, gamma: {GAMMA}", check="cut"),
    Row("della_linear", "della_linear", f"weight, {_KEEP}", check="random"),
    *(_alone(method) for method in ("ramplus", "magmax", "pcb", "consensus_ta", "tall_masks", "emr", "iso_c")),
    *(_alone(method, "small") for method in ("iso_cts", "tsv", "wudi")),  # SVDs and products: minutes at full size
)
ROWS = (*NAMED, *OTHERS)


def title(r: Row, quick: bool) -> str:
    """The row's task in the ledger and the table."""
    size = "tiny" if quick else {"small": "0.11 GB", "normal": "0.51 GB", "double": "1.03 GB"}[r.size]
    return f"{r.method}, {'2 halves' if r.halves else r.experts + r.base} × {size}"


def recipe(r: Row, models: Path, layers: int, dtype: str = "") -> str:
    """The merge as a mergekit recipe, which both sides read; as one of ours where mergekit has no such method."""
    experts = [models / f"expert-{k + 1}" for k in range(r.experts)]
    if not r.peer:
        paths = ", ".join(map(str, experts))
        return f"spolia: 1\npool: {{base: {models / 'base'}, experts: [{paths}]}}\nmethod: {{name: {r.method}}}\n"
    lines = [f"merge_method: {r.method}", f"parameters: {{{r.whole}}}"]
    lines += [f"dtype: {dtype}", "out_dtype: bfloat16"] if dtype else []
    lines += [f"base_model: {models / 'base'}"] if r.base else []
    if r.halves:
        lines.append("slices:")
        for k, (low, high) in enumerate(((0, layers // 2), (layers // 2, layers))):
            lines.append(f"  - sources: [{{model: {models / f'expert-{k + 1}'}, layer_range: [{low}, {high}]}}]")
        return "\n".join(lines) + "\n"
    lines += ["models:"] + [f"  - model: {models / 'base'}"] * r.listed
    for expert, weight in zip(experts, WEIGHTS, strict=False):
        lines += [f"  - model: {expert}"]
        lines += [f"    parameters: {{{r.each.replace('weight', f'weight: {weight}')}}}"] if r.each else []
    return "\n".join(lines) + "\n"

"""`spolia inspect`: will these models merge well? One streaming pass over base and experts, and advice drawn from it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spolia.bench.advice import Advice, Finding, advise
from spolia.catalog import find
from spolia.core.stream import cores
from spolia.errors import Problem, Problems, SpoliaError
from spolia.parts.align import align, warnings_of
from spolia.parts.expert import ExpertPool
from spolia.parts.inputs import parted
from spolia.parts.layers import Layers, before
from spolia.parts.portrait import RANK_ROWS, Portrait, portray
from spolia.runs.references import located
from spolia.runs.schema import VERSION
from spolia.runs.vocabularies import config_differences, vocabularies

if TYPE_CHECKING:
    from spolia.parts.portrait import Measured

RANK_NOTE = (
    f"Effective ranks are taken from at most {RANK_ROWS} evenly spaced rows of each matrix, and averaged over matrices."
)


@dataclass
class Inspection:
    """What was seen. `recipe` is text of our form, empty where none can be written."""

    names: list[str]  # base first
    paths: list[str]  # empty for models in memory
    portrait: Portrait
    advice: Advice
    recipe: str
    groups: dict[str, list[str]]  # layer -> its tensors
    left_aside: int  # tensors that were not measured
    vocabularies: list[dict[str, Any]] = field(default_factory=list)
    config_differences: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not a number is null."""
        whole = self.portrait.total()
        columns = (whole.norms, whole.relative, whole.shares_untouched, self.portrait.ranks())
        experts = zip(self.names[1:], self.paths[1:], *columns, strict=True)
        keys = ("name", "path", "norm", "relative", "untouched", "effective_rank")
        advice = asdict(self.advice)
        return {
            "base": {"name": self.names[0], "path": self.paths[0]},
            "experts": [dict(zip(keys, map(_plain, expert), strict=True)) for expert in experts],
            "tensors": len(self.portrait.tensors),
            "elements": whole.numel,
            "left_aside": self.left_aside,
            "cosines": _plain(whole.cosines),
            "conflict": _plain(whole.conflict),
            "layers": [self._layer(group, members) for group, members in self.groups.items()],
            "vocabularies": self.vocabularies,
            "config_differences": self.config_differences,
            "warnings": self.warnings,
            "notes": [RANK_NOTE],
            **{key: advice[key] for key in ("findings", "verdict", "method", "settings", "leave_out")},
            "recipe": self.recipe,
        }

    def _layer(self, group: str, members: list[str]) -> dict[str, Any]:
        total = self.portrait.total(members)
        return {
            "layer": group,
            "tensors": len(members),
            "elements": total.numel,
            "relative": _plain(total.relative),
            "untouched": _plain(total.shares_untouched),
            "effective_rank": _plain(self.portrait.ranks(members)),
            "cosine": _plain(_pairs(total, "cosines")),
            "conflict": _plain(_pairs(total, "conflict")),
        }


def _pairs(total: Measured, what: str) -> float:
    """Mean over pairs of experts."""
    matrix = getattr(total, what)
    values = [row[a] for b, row in enumerate(matrix) for a in range(b) if math.isfinite(row[a])]
    return statistics.fmean(values) if values else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(base: Any, experts: Mapping[str, Any] | Sequence[Any], *, threads: int | None = None) -> Inspection:
    """Look at a pool before merging it: how far each expert moved, how alike they are, which are bad, what to try.

    `base` and `experts` are as in `merge`. Every weight is read once; nothing is written or evaluated. Raises SpoliaError
    with everything that does not fit together.
    """
    named = _named(base, experts)
    (start, _), *rest = named.items()
    pool = ExpertPool.of(dict(rest), base, located)
    assert pool.base is not None
    pool.base = type(pool.base)(start, pool.base.weights)
    problems = Problems()
    aligned, _ = align(pool, problems, "truncate")
    problems.raise_if_any()
    with pool.opened():
        portrait = portray(pool, aligned, threads or cores())
    if not portrait.tensors:
        what = "base and experts share no tensor of numbers"
        raise SpoliaError(what, where=start, mend="give fine-tunes of one base")
    advice = advise(portrait)
    words, differences = vocabularies(pool), config_differences(pool)
    cut = [p for p in problems.warnings if "vocabularies differ" in p.mend]
    if cut:
        text = f"The vocabularies differ in size ({', '.join(p.where for p in cut)}): only the rows all have were measured."
        cure = " To merge, line the tokens up: `tokenizer: {source: union}` in a mergekit recipe."
        advice.findings.append(Finding("vocabulary", "", text + cure))
    paths = [str(given) if isinstance(given, str | os.PathLike) else "" for given in named.values()]
    told = [*problems.warnings, *warnings_of(pool)]
    return Inspection(
        list(named),
        paths,
        portrait,
        advice,
        suggested(advice, named) if all(paths) else "",
        _groups(portrait, pool),
        len(aligned) - len(portrait.tensors),
        words,
        differences,
        [str(Problem(p.where, p.what)) for p in told],
    )


def _named(base: Any, experts: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Every model under a name of its own, the base first. Equal folder names get what stands before them too."""
    if isinstance(experts, Mapping):
        members = [(str(name), given) for name, given in experts.items()]
    else:
        members = [(_name(given, f"expert {i}"), given) for i, given in enumerate(experts)]
    if not members:
        raise SpoliaError("there are no experts to look at", where="inspect", mend="spolia inspect BASE EXPERT...")
    found: dict[str, Any] = {}
    for name, given in [(_name(base, "base"), base), *members]:
        if name in found and isinstance(given, str | os.PathLike):
            name = "/".join(Path(os.path.abspath(given)).parts[-2:])
        stem, number = name, 2
        while name in found:
            name, number = f"{stem} ({number})", number + 1
        found[name] = given
    return found


def _name(given: Any, otherwise: str) -> str:
    if not isinstance(given, str | os.PathLike):
        return otherwise
    return Path(os.path.abspath(given)).name or str(given)


def suggested(advice: Advice, named: Mapping[str, Any]) -> str:
    """The advice as a recipe. Paths are absolute, so that it may lie anywhere. Empty where there is nothing to merge."""
    if advice.method is None:
        return ""

    def entry(name: str) -> dict[str, str]:
        path, lora = parted(located(named[name]))
        parts = {"path": path, "lora": lora} if lora is not None else {"path": path}
        return {"name": name} | {key: os.path.abspath(part) for key, part in parts.items()}

    start, *experts = named
    with_base = advice.use_base and find(advice.method).settings_class().base != "unused"
    recipe = {
        "spolia": VERSION,
        "pool": ({"base": entry(start)} if with_base else {})
        | {"experts": [entry(name) for name in experts if name not in advice.leave_out]},
        "method": {"name": advice.method, **advice.settings},
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def _groups(portrait: Portrait, pool: ExpertPool) -> dict[str, list[str]]:
    """Tensors by layer: what stands before the layers, the main stack, other stacks, what comes after."""
    assert pool.base is not None
    layers = Layers(portrait.tensors, pool.base.weights.config)
    found: dict[tuple[Any, ...], list[str]] = {}
    titles: dict[tuple[Any, ...], str] = {}
    for name in portrait.tensors:
        place = layers.of(name)
        if place is None:
            early = before(name)
            key, title = ((0,), "before the layers") if early else ((3,), "outside the layers")
        elif place[0] == layers.main:
            key, title = (1, place[1]), f"layer {place[1]}"
        else:
            key, title = (2, place[0], place[1]), f"{place[0]}.{place[1]}"
        found.setdefault(key, []).append(name)
        titles[key] = title
    return {titles[key]: found[key] for key in sorted(found)}

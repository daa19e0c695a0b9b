"""A classifier parted into its encoder and its head: which modules are the head, what it is fed, and one for every task.

The head's modules become Identity in the encoder, so that its outputs, or what the first of these passes on, are the
features. Whether encoder and head together do what the whole did is tried on one batch, never assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.network import moved, outputs_of

KNOWN = (
    "classifier",
    "pre_classifier",
    "score",
    "classification_head",
    "head",
    "fc",
)  # where no encoder is named apart
_BETWEEN = (None, nn.ReLU, nn.Tanh, nn.GELU)  # what may stand between two modules of a head


@dataclass(frozen=True)
class Passing:
    """Outputs of a network: what the module `name`, an Identity, passes on."""

    name: str

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        found: list[Tensor] = []
        handle = module.get_submodule(self.name).register_forward_hook(lambda _m, _i, output: found.append(output))
        try:
            outputs_of(module, batch)
        finally:
            handle.remove()
        return found[-1]


@dataclass(frozen=True)
class Parted:
    """What is known of the split: the head's modules in the order in which they run, what stands between, the outputs."""

    slots: tuple[str, ...]
    between: type[nn.Module] | None
    outputs: Callable[[nn.Module, Any], Tensor]

    def joined(self, parts: Sequence[nn.Module]) -> nn.Module:
        """The head as one module."""
        if len(parts) == 1:
            return parts[0]
        chain = [parts[0]]
        for part in parts[1:]:
            chain += [self.between(), part] if self.between is not None else [part]
        return nn.Sequential(*chain)


def slots_of(
    module: nn.Module, shapes: Sequence[Mapping[str, tuple[int, ...]]], asked: Literal["merged"] | Sequence[str] | None
) -> list[str]:
    """Names of the modules that are the head. `shapes`: of every expert's tensors, by the module's names.

    They are those `asked` for; else, of a classifier, what stands beside the encoder, and whatever differs in shape.
    """
    if asked == "merged":
        return []
    if asked is not None:
        modules = dict(module.named_modules())
        for name in asked:
            if not name or name not in modules:
                mend = did_you_mean(name, [m for m in modules if m and m.count(".") < 2])
                raise SpoliaError(f"there is no module `{name}`", where="pool.heads", mend=mend)
        return list(asked)
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    prefix = str(getattr(module, "base_model_prefix", ""))
    encoder = {prefix} & set(children)
    classifier = type(module).__name__.endswith("Classification")
    names = {name for given in shapes for name in given}
    differing = {name.partition(".")[0] for name in names if len({given.get(name) for given in shapes}) > 1}
    beside = {name for name in children if classifier and name not in encoder and (encoder or name in KNOWN)}
    return [name for name in children if name not in encoder and (name in beside or name in differing)]


def part(module: nn.Module, slots: Sequence[str], batch: Any) -> Parted:
    """Puts Identity in the place of the head's modules. SpoliaError where the head is no chain of them."""
    order: list[str] = []
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, _i, _o, name=name: order.append(name))
        for name in slots
    ]
    try:
        whole = _run(module, batch, outputs_of)
    finally:
        for handle in handles:
            handle.remove()
    ordered = [name for name in dict.fromkeys(order) if name in slots]
    ordered += [name for name in slots if name not in ordered]
    own = [module.get_submodule(name) for name in ordered]
    for name in ordered:
        module.set_submodule(name, nn.Identity())
    for outputs in (outputs_of, Passing(ordered[0])):
        for between in _BETWEEN if len(ordered) > 1 else (None,):
            tried = Parted(tuple(ordered), between, outputs)
            try:
                with torch.no_grad():
                    made = tried.joined(own)(_run(module, batch, outputs))
            except (RuntimeError, TypeError, AttributeError, IndexError, SpoliaError):
                continue
            if made.shape == whole.shape and torch.allclose(
                made, whole, rtol=1e-4, atol=1e-5
            ):  # fp32, in another order
                return tried
    what = f"its head, {', '.join(slots)}, is no chain of modules on one feature"
    mend = "name other modules in `pool.heads`, or write `heads: merged`"
    raise SpoliaError(what, where=type(module).__name__, mend=mend)


def _run(module: nn.Module, batch: Any, outputs: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    try:
        with torch.no_grad():
            return outputs(module, moved(batch, None))
    except SpoliaError:
        raise
    except Exception as error:  # whatever a model raises on inputs that are not its own
        said = " ".join(str(error).split())[:200]
        what = f"the network fails on its inputs: {type(error).__name__}: {said}"
        raise SpoliaError(what, where=type(module).__name__, mend="give inputs as the model takes them") from None


def filled(parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], who: str) -> list[nn.Module]:
    """Copies of the head's modules with an expert's tensors, whose sizes may be others."""
    made = []
    for slot, module in parts.items():
        new = copy.deepcopy(module)
        for name in list(new.state_dict()):
            whole = f"{slot}.{name}"
            if whole not in tensors:
                mend = "give complete fine-tunes, or the head as a file: tasks: {NAME: {head: FILE}}"
                raise SpoliaError(f"lacks its head's tensor `{whole}`", where=who, mend=mend)
            path, _, leaf = name.rpartition(".")
            owner = new.get_submodule(path)
            value = tensors[whole].float()
            setattr(owner, leaf, nn.Parameter(value, False) if leaf in owner._parameters else value)
            if isinstance(owner, nn.Linear) and leaf == "weight":
                owner.out_features, owner.in_features = value.shape
        made.append(new.eval())
    return made


class Cosine(nn.Module):
    """A zero-shot head, as CLIP's: exp(logit_scale) times the cosines of features with a text's embedding a class."""

    def __init__(self, weight: Tensor, logit_scale: Tensor):
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(weight, dim=-1), False)
        self.logit_scale = nn.Parameter(logit_scale, False)

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ self.weight.T


def head_of(file: Path, task: str) -> nn.Module:
    """A head from safetensors: `weight` [classes, d] with `bias`, or with `logit_scale`; or these as `TASK.weight` …"""
    held = read_tensors(file)
    own = {name.removeprefix(f"{task}."): t.float() for name, t in held.items() if name.startswith(f"{task}.")} or {
        name: t.float() for name, t in held.items()
    }
    weight = own.get("weight")
    if weight is None or weight.ndim != 2:
        mend = "store `weight` [classes, d], and `bias` or `logit_scale`"
        raise SpoliaError(f"holds no head for {task}", where=str(file), mend=mend)
    if "logit_scale" in own:
        return Cosine(weight, own["logit_scale"].reshape(()))
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in own)
    with torch.no_grad():
        head.weight.copy_(weight)
        if "bias" in own:
            head.bias.copy_(own["bias"])
    return head.eval()

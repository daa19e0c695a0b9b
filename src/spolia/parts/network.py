"""A network: how the experts of a pool are run. The right to run and differentiate, which `Weights` does not give.

All experts of one base share an architecture: one module is run with the weights of whichever expert, or merge, is asked
for. Heads are frozen, one a task, and never merged, as the text heads of CLIP in the merging papers.

    network = Network(module, heads)
    network.logits("mnist", batch, weights)        # with other weights than the module's own, differentiable in them
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Outputs = Callable[[nn.Module, Any], Tensor]

NAMED = ("logits", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state")  # first one that is there


def outputs_of(module: nn.Module, batch: Any) -> Tensor:
    """What `module` makes of a batch: a tensor, or of a named output the first of logits, embeddings, pooled state.

    A mapping is passed by keyword, as Hugging Face models take it; a tuple by position; anything else as the one
    argument. A last hidden state [batch, tokens, width] gives its first token's.
    """
    if isinstance(batch, Mapping):
        made = module(**batch)
    elif isinstance(batch, tuple):
        made = module(*batch)
    else:
        made = module(batch)
    if torch.is_tensor(made):
        return made
    for name in NAMED:
        value = getattr(made, name, None)
        if torch.is_tensor(value):
            return value[:, 0] if name == "last_hidden_state" else value
    raise SpoliaError(
        f"{type(module).__name__} returns a {type(made).__name__}, in which no features are known",
        where="network",
        mend="give Network(outputs=...), a function of module and batch that returns a tensor",
    )


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch on `device`; what holds no tensors stays as it is."""
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(moved(part, device) for part in batch)
    return batch.to(device) if torch.is_tensor(batch) and device is not None else batch


@dataclass(frozen=True)
class Network:
    """A module, what it makes of a batch, and the frozen head of every task.

    `outputs(module, batch)` gives features [batch, d] where there are heads, else the logits themselves, [batch, classes]
    or [batch, tokens, classes].
    """

    module: nn.Module
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    outputs: Outputs = outputs_of

    def __post_init__(self) -> None:
        self.module.eval()  # merging fits neither dropout nor running statistics
        for head in self.heads.values():
            head.eval().requires_grad_(False)

    def features(self, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs of the module with `weights` in place of its own; differentiable in them. The batch goes where it lies."""
        batch = moved(batch, next((p.device for p in self.module.parameters()), None))
        if weights is None:
            return self.outputs(self.module, batch)
        from spolia.core.functional import call

        return call(self.module, weights, self.outputs, batch)

    def logits(self, task: str, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits of `task`: its head on the features, or the outputs where no task has a head."""
        return self._answer(task, self.features(batch, weights))

    def joined(self, parts: Sequence[tuple[str, Any]]) -> list[Tensor]:
        """Logits of several tasks and batches, from one forward pass. Which batches may share it, `joins` says."""
        if len(parts) == 1:
            return [self.logits(*parts[0])]
        features = self.features(torch.cat([batch for _, batch in parts]))
        split = features.split([len(batch) for _, batch in parts])
        return [self._answer(task, part) for (task, _), part in zip(parts, split, strict=True)]

    def joins(self, one: Any, other: Any) -> bool:
        """Whether two batches may share a pass: float tensors of one shape, and no layer that sees the batch as a whole."""
        if not (torch.is_tensor(one) and torch.is_tensor(other) and one.is_floating_point()):
            return False  # words of a text are many to an input, and padded to its own length
        alike = one.shape[1:] == other.shape[1:] and one.dtype == other.dtype and one.device == other.device
        return alike and not self._mixes()

    def _mixes(self) -> bool:
        """Whether a layer normalises by the batch: one in training, or one that keeps no running statistics."""
        from torch.nn.modules.batchnorm import _BatchNorm

        layers = [layer for layer in self.module.modules() if isinstance(layer, _BatchNorm)]
        return self.module.training or any(layer.training or layer.running_mean is None for layer in layers)

    def _answer(self, task: str, features: Tensor) -> Tensor:
        return self.heads[task](features) if self.heads else features

    def loaded(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the module that holds `weights`; SpoliaError names what does not fit."""
        module = copy.deepcopy(self.module)
        own = module.state_dict()
        for name in sorted(own.keys() ^ weights.keys()):
            owner = "the weights lack" if name in own else "the module lacks"
            raise SpoliaError(f"{owner} tensor `{name}`", where="network", mend="give the experts' own architecture")
        for name, tensor in weights.items():
            if own[name].shape != tensor.shape:
                what = f"tensor `{name}` is {list(own[name].shape)} in the module, {list(tensor.shape)} in the weights"
                raise SpoliaError(what, where="network", mend="give the experts' own architecture")
        module.load_state_dict(weights)
        return module.eval()

    def check_tasks(self, tasks: list[str]) -> None:
        """SpoliaError unless there is a head for each of `tasks`, or no heads at all."""
        missing = [task for task in tasks if task not in self.heads] if self.heads else []
        if missing:
            known = ", ".join(self.heads)
            raise SpoliaError(
                f"no head for {', '.join(missing)}",
                where="network.heads",
                mend=f"name them as the experts; given: {known}",
            )

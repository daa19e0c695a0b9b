"""Learner: what meets a stream. Four verbs are the whole protocol; this class has them, and its children change the loss.

    learner.begin(experience)      before the first batch of an experience
    learner.observe(batch)         one step; the loss before it
    learner.end(experience)        after its last batch
    learner.predict(x)             logits [n, classes] of inputs as they are stored

`observe` is always  loss(batch) -> descend(loss) -> remember(batch, logits), so that what goes around a learner (refresh, CPR)
can put its own step before, or its own term beside. All that changes from step to step is in `kept`: a learner is saved and
resumed as a module is, with state_dict().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from spolia.core import kept
from spolia.core.dist import by_shares, joined, summed, world
from spolia.core.gradients import share
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.parts.network import moved, outputs_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.stream import Batch, Experience

    Criterion = Callable[[Tensor, Tensor], Tensor]
    View = Callable[[Any, np.random.Generator], Any]
    Show = Callable[[Any], Any]
    Outputs = Callable[[nn.Module, Any], Tensor]

Factory = Callable[[list[dict[str, Any]]], Any]
"""Parameter groups to an optimiser of torch."""

TABLES = "mammoth's tables for Seq-CIFAR-10"
OURS = "our choice"


class Meets(Protocol):
    """What a stream can be run with. `state_dict` and `load_state_dict` are asked for only where the run is kept."""

    def begin(self, experience: Experience) -> None: ...
    def observe(self, batch: Batch) -> Any: ...
    def end(self, experience: Experience) -> None: ...
    def predict(self, x: Any) -> Tensor: ...


class Training(Settings):
    """How a step is taken, where no optimiser is handed in."""

    lr: float = setting(0.1, "learning rate of plain SGD", source=TABLES, gt=0)
    momentum: float = setting(0.0, "of SGD", source=TABLES, ge=0, lt=1)
    weight_decay: float = setting(0.0, "of SGD", source=TABLES, ge=0)
    fresh: bool = setting(False, "a new optimiser for every experience", source=OURS)


@dataclass(frozen=True)
class Model:
    """A network and how it is trained.

    `optimizer`: a function of parameter groups, by default plain SGD from the settings. `criterion`: (logits, labels) to a
    loss, or one a sample; by default cross-entropy. `view`: what training sees of stored inputs, with random numbers handed
    in; `show`: what predicting sees of them. By default uint8 0 … 255 becomes 0 … 1 and anything else is as it is.
    """

    network: nn.Module
    optimizer: Factory | None = None
    criterion: Criterion | None = None
    view: View | None = None
    show: Show | None = None
    outputs: Outputs = outputs_of


class Learner:
    """Fine-tuning: the loss of the batch, and a step. Everything else in this room is a child of it.

    The network is trained in place. `seed` names the learner's own random numbers: views, replay, noise. Of several
    processes all hold the same, memory included, and see the whole batch; each runs the network on its share of the rows.
    """

    def __init__(self, model: nn.Module | Model, settings: Training, *, seed: int = 0):
        self.model = model if isinstance(model, Model) else Model(model)
        self.network, self.seed = self.model.network, seed
        self.settings: Any = settings
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not named:
            raise SpoliaError(
                "has no parameter to train", where="network", mend="requires_grad_() those that should be"
            )
        self.names = list(named)
        self.parameters: list[Tensor] = list(named.values())
        self.device = self.parameters[0].device
        with joined() as (_, self.ranks):
            pass
        self.draws = generator(seed, "learner", 0)
        self.optimizer = self._optimizer()
        if self.ranks > 1:
            _alike(self.network)

    # --- the protocol ------------------------------------------------------------------------------------------------

    def begin(self, experience: Experience) -> None:
        self.network.train()
        if self.settings.fresh and experience.place:
            self.optimizer = self._optimizer()

    def observe(self, batch: Batch) -> Tensor:
        """One step. The loss before it, detached."""
        loss, logits = self.loss(batch)
        self.descend(loss)
        self.remember(batch, logits.detach())
        return loss.detach()

    def end(self, experience: Experience) -> None:
        pass

    def predict(self, x: Any) -> Tensor:
        """Logits [n, classes], in eval mode and without a graph. Nothing is changed."""
        with self.at_rest(), torch.no_grad():
            return self.logits(self.shown(x))

    # --- what children change ----------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a step, and the logits of the batch."""
        logits = self.logits(self.viewed(batch.x))
        return self.criterion(logits, batch.y), logits

    def remember(self, batch: Batch, logits: Tensor) -> None:
        """After the step: `logits` are those of before it."""

    def kept(self) -> dict[str, Any]:
        """Everything that changes from step to step, by name."""
        return {"network": self.network, "optimizer": self.optimizer, "draws": self.draws}

    # --- what they use -----------------------------------------------------------------------------------------------

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser down the loss; of several processes' gradients the mean."""
        self.optimizer.zero_grad()
        loss.backward()
        self.step()

    def step(self, shared: bool = False) -> None:
        """The step itself, from the gradients that are there; `shared`: they are those of all processes already."""
        if not shared:
            share(self.parameters, 1 / self.ranks)
        self.optimizer.step()
        if self.ranks > 1:
            _averaged(self.network, self.ranks)

    def viewed(self, x: Any) -> Any:
        """Stored inputs as training sees them."""
        x = moved(x, self.device)
        return self.shown(x) if self.model.view is None else self.model.view(x, self.draws)

    def shown(self, x: Any) -> Any:
        """Stored inputs as predicting sees them."""
        x = moved(x, self.device)
        return as_floats(x) if self.model.show is None else self.model.show(x)

    def logits(self, x: Any) -> Tensor:
        return self.shared(lambda part: self.model.outputs(self.network, part), x)

    def logits_with(self, weights: dict[str, Tensor], x: Any) -> Tensor:
        """Logits with these weights, by name, in place of the network's own."""
        from spolia.core.functional import call

        return self.shared(lambda part: call(self.network, weights, self.model.outputs, part), x)

    def shared(self, compute: Callable[[Any], Tensor], x: Any) -> Tensor:
        """compute(x); in training each process computes some rows and is given the others."""
        training = self.network.training and torch.is_grad_enabled()
        return by_shares(compute, x) if training else compute(x)

    def copies(self) -> list[Tensor]:
        """The trained parameters as they are now."""
        return [p.detach().clone() for p in self.parameters]

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss."""
        labels = labels.to(logits.device)
        if self.model.criterion is None:
            return torch.nn.functional.cross_entropy(logits, labels)
        return self.model.criterion(logits, labels).mean()

    def at_rest(self) -> _AtRest:
        """Inside, the network is in eval mode; afterwards every module is in the mode it had."""
        return _AtRest(self.network)

    @property
    def lr(self) -> float:
        """The learning rate that the optimiser has now."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def plain(self) -> bool:
        """Whether a step is theta - lr (g + decay theta) and nothing else."""
        groups = self.optimizer.param_groups
        return isinstance(self.optimizer, torch.optim.SGD) and not any(group["momentum"] for group in groups)

    @property
    def held(self) -> int:
        """Bytes kept besides network and optimiser: memory, anchors, old models."""
        own = {name: value for name, value in self.kept().items() if name not in ("network", "optimizer")}
        return sum(_bytes(kept.capture(name, value)) for name, value in own.items())

    def state_dict(self) -> dict[str, Any]:
        return {name: kept.capture(name, value) for name, value in self.kept().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.kept().items():
            own = state[name]
            kept.restore(name, value, _placed(own, self.device) if isinstance(value, dict | list) else own)

    def _optimizer(self) -> Any:
        groups: list[dict[str, Any]] = [{"params": self.parameters}]
        if self.model.optimizer is not None:
            return self.model.optimizer(groups)
        own = self.settings
        return torch.optim.SGD(groups, lr=own.lr, momentum=own.momentum, weight_decay=own.weight_decay)


class _AtRest:
    def __init__(self, network: nn.Module):
        self._modes = [(part, part.training) for part in network.modules()]
        self._network = network

    def __enter__(self) -> None:
        self._network.eval()

    def __exit__(self, *error: object) -> None:
        for part, mode in self._modes:
            part.training = mode


def as_floats(x: Any) -> Any:
    """uint8 0 … 255 as 0 … 1; anything else as it is."""
    return x.float() / 255 if torch.is_tensor(x) and x.dtype == torch.uint8 else x


def _alike(network: nn.Module) -> None:
    """The first process's weights and statistics for all."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            own = tensor.detach().clone()
            tensor.copy_(summed(own if world()[0] == 0 else own.zero_()))


def _averaged(network: nn.Module, ranks: int) -> None:
    """Running statistics become their mean over all processes."""
    with torch.no_grad():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                summed(buffer).div_(ranks)


def _placed(value: Any, device: torch.device) -> Any:
    """Nested dicts and lists with their tensors on `device`."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _placed(part, device) for name, part in value.items()}
    return [_placed(part, device) for part in value] if isinstance(value, list) else value


def _bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0

"""A meta-trained start and the steps that adapt it: what the learners of this room return.

learner.predict(support_x, support_y, query_x)      logits [queries, ways]; nothing is changed
learner.adapted(support_x, support_y)                a copy of the network, adapted to one task
learner.save(file), MetaLearner.load(file, network)  safetensors; the network is yours
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core import tensorfile
from spolia.core.inner import Execution, Inner, InnerLoop, Task
from spolia.core.inner_rules import adapted_names, dropping
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor, nn

    Views = Callable[[Tensor, int, Sequence[np.random.Generator]], Tensor]  # [tasks, n, ...] -> [tasks, count, n, ...]

FORMAT = "spolia meta-learner 1"


class MetaLearner:
    """`network`: the start, `rates`: learned step sizes by parameter, `losses` [steps]: what the outer loop saw,
    `selection`: what validation chose. `settings` say how to adapt."""

    def __init__(self, network: nn.Module, settings: Any, views: Views | None = None, rates: Any = None):
        self.network, self.settings, self._views = network, settings, views
        self.basis = settings.basis()  # how it adapts
        self.losses = torch.zeros(self.basis.steps)
        self.rates: dict[str, Tensor] = {} if rates is None else rates
        self._ensemble = getattr(settings, "ensemble", 0)
        if self._ensemble and views is None:
            raise SpoliaError("an ensemble of views needs views", where="views", mend="give `views`, or ensemble=0")
        self.selection = Selection(self)

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int | None = None) -> Tensor:
        """Logits [queries, ways], or with a leading [tasks] as all inputs have. Labels of a regression are [n, outputs].

        `steps` of the inner loop in the place of the settings' own.
        """
        stacked = support_y.dim() == (3 if self.basis.loss == "squared" else 2)
        given = (support_x, support_y, query_x)
        support_x, support_y, query_x = given if stacked else tuple(part.unsqueeze(0) for part in given)
        many = support_x.unsqueeze(1)  # [tasks, views, n, ...]
        if self._ensemble:
            assert self._views is not None
            draws = [generator(0, "ensemble") for _ in support_x]
            many = torch.cat([many, self._views(support_x, self._ensemble, draws)], 1)
        labels = support_y.unsqueeze(1).expand(-1, many.shape[1], *support_y.shape[1:])
        tasks = [Task((x, y), (q,)) for x, y, q in zip(many, labels, query_x, strict=True)]
        outputs = torch.stack(self._asked("outputs", tasks, support_y, steps))  # [tasks, views, queries, ways]
        found = self._joined(outputs)
        return found if stacked else found[0]

    def adapted(self, support_x: Tensor, support_y: Tensor, steps: int | None = None) -> nn.Module:
        """A copy of the network with the weights after adapting to one task. Its head has the network's own ways."""
        task = Task.of(support_x, support_y, support_x[:0], support_y[:0])
        (weights,) = self._asked("adapted", [task], support_y, steps)
        made = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name][0])
        return made

    def chosen(self) -> MetaLearner:
        """A learner with the weights that validation chose; those of the start where nothing looked."""
        rates = {name: t.detach().clone() for name, t in self.rates.items()}
        other = MetaLearner(copy.deepcopy(self.network), self.settings, self._views, rates)
        other.load_state_dict(self.selection.best())
        return other

    def state_dict(self) -> dict[str, Any]:
        rates = {f"rates.{name}": t.detach() for name, t in self.rates.items()}
        return rates | {f"network.{name}": t for name, t in self.network.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, rate in self.rates.items():
                rate.copy_(state[f"rates.{name}"])
        start = "network."
        self.network.load_state_dict({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)})

    def save(self, file: str | os.PathLike[str]) -> Path:
        """One safetensors file, whole or not at all."""
        settings = self.settings.model_dump(mode="json")
        about = {"format": FORMAT, "method": self.settings.method, "settings": settings}
        tensors = {name: t.detach().clone() for name, t in self.state_dict().items()}  # tied ones apart
        return tensorfile.write(Path(file), tensors, {"about": json.dumps(about, allow_nan=False)})

    @classmethod
    def load(cls, file: str | os.PathLike[str], network: nn.Module, views: Views | None = None) -> MetaLearner:
        """A learner saved before. `network` is one of the same kind; a copy of it takes the weights."""
        about, state = _read(file)
        rates = {name.removeprefix("rates."): t for name, t in state.items() if name.startswith("rates.")}
        settings = find(about["method"]).settings_class()(**about["settings"])
        learner = cls(copy.deepcopy(network), settings, views, {n: t.requires_grad_() for n, t in rates.items()})
        try:
            learner.load_state_dict(state)
        except RuntimeError as error:
            mend = "give a network of the kind that was saved"
            raise SpoliaError(f"does not fit the network: {error}", where=str(file), mend=mend) from None
        return learner

    def _asked(self, what: str, tasks: list[Task], labels: Tensor, steps: int | None) -> list[Any]:
        """Outputs or adapted weights of tasks, by a network without dropout, which is put back."""
        rule = self.basis.rule(self.basis.steps_at_test if steps is None else steps)
        modes = [(part, part.training) for part in self.network.modules()]
        self.network.eval()
        try:
            loop = InnerLoop(self.network, rule, execution(self.basis.mode, self.network), **learning(self.basis))
            params = None
            if self.basis.tied:
                ways = int(labels.max()) + 1
                params = dict(self.network.named_parameters())
                params |= {name: params[name][:1].expand(ways, *params[name].shape[1:]) for name in head_names(self)}
            ask = loop.outputs if what == "outputs" else loop.adapted
            return ask(tasks, params, self.rates or None)
        finally:
            for part, mode in modes:
                part.training = mode

    def _joined(self, outputs: Tensor) -> Tensor:
        """One answer from those of all views: the mean of probabilities, as logits; of regression the mean."""
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        if self.basis.loss == "squared":
            return outputs.mean(1)
        return outputs.softmax(-1).mean(1).log()


def _read(file: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about itself, and its tensors."""
    mend = "give what save() wrote"
    metadata, state = tensorfile.read(file, mend)
    try:
        about = json.loads(metadata.get("about", "{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise SpoliaError("holds no meta-learner", where=str(file), mend=mend)
    return about, state


def head_names(learner: MetaLearner) -> list[str]:
    """Names of the head's parameters."""
    return adapted_names(learner.network, Inner(adapt="head", head=learner.basis.head))


def execution(mode: str, network: nn.Module) -> Execution:
    """How tasks are run. `fixed` looks at the network and its device alone, so that equal runs have equal bits."""
    if mode != "fixed":
        return Execution(mode)  # type: ignore[arg-type]
    device = next((p.device.type for p in network.parameters()), "cpu")
    convolves = any(isinstance(layer, torch.nn.Conv2d) for layer in network.modules())
    return Execution("workers" if convolves and device == "cpu" and not dropping(network) else "vmap")


def learning(settings: Any) -> dict[str, Any]:
    """The support loss for InnerLoop."""
    if settings.loss == "squared":
        return {"loss": lambda module, support: torch.nn.functional.mse_loss(module(support[0]), support[1])}
    return {}

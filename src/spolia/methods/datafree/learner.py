"""The learner that data-free meta-learning trains: features and class means, or a network adapted by a few gradient steps.

learner.predict(support_x, support_y, query_x)     logits [queries, ways]; nothing is changed
learner.teacher_loss(recovered)                    a loss of the weights: to answer an expert's images as the expert does
learner.gradient(episodes)                         of the queries' cross-entropy in pseudo-tasks

Norms have no memory: they use statistics of what is seen at once, in training as at test (core/norms).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spolia.core import tensorfile
from spolia.core.dist import summed, world
from spolia.core.gradients import share
from spolia.core.inner import Execution, Inner, InnerLoop, Task
from spolia.core.lazy import torch
from spolia.core.priors import distillation
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.methods.datafree.heads import distances, to_means
from spolia.methods.datafree.inversion import OURS
from spolia.parts.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.alignment import Loss
    from spolia.methods.datafree.inversion import Recovered
    from spolia.parts.episode import Episodes

    Weights = dict[str, Tensor]
    Embed = Callable[[nn.Module, Tensor], Tensor]

FORMAT = "spolia data-free learner 1"
_FREE = "Wei et al. 2024, the released code"


class Learning(Settings):
    """What learns, and how it adapts to a task."""

    head: Literal["prototypes", "linear"] = setting(
        "prototypes",
        "class means of features; or the network's own outputs, which all experts then share in their own orders",
        source="Hu et al. 2023, the released code",
    )
    bn: Literal["batch", "support"] = setting(
        "batch",
        "statistics of batch norm: support and queries of a task at once (transductive), or the support's",
        source=_FREE,
    )
    scale: float = setting(1.0, "factor of prototypes' logits", source=OURS, gt=0)
    root: bool = setting(True, "their squared distances are divided by the root of the number of features", source=OURS)
    adapt: Literal["all", "head"] = setting("all", "what a linear head's inner steps move: MAML, ANIL", source=_FREE)
    inner_steps: int = setting(5, "inner steps of a linear head", source=_FREE, ge=0)
    test_steps: int = setting(10, "the same at test", source=_FREE, ge=0)
    inner_lr: float = setting(0.01, "their step size", source=_FREE, gt=0)
    order: Literal[1, 2] = setting(2, "of the gradient through them", source=_FREE)
    ways: int = setting(5, "classes of a pseudo-task", source=_FREE, ge=2)
    shots: int = setting(5, "images of each that are learned from", source=OURS, ge=1)
    queries: int = setting(15, "images of each that judge it", source=_FREE, ge=1)
    teacher_weight: float = setting(1.0, "of an expert's answers to its images", source=_FREE, ge=0)
    label_weight: float = setting(0.0, "of the labels of an expert's images", source=f"off: {_FREE}", ge=0)


class FewShotLearner:
    """`network` is a copy, trained in place. `embed(network, x)` gives features [n, d]; by default its outputs, flattened.

    `store`: the images learned from; `recovered`: by expert what its last images were worth; `losses` [steps].
    """

    def __init__(self, network: nn.Module, settings: Any, embed: Embed | None = None, steps: int = 0):
        from spolia.core.norms import exact, fuse

        self.network, self.settings, self._given = copy.deepcopy(network).train(), settings, embed
        self._exact, self._plain = (exact(self.network, settings.bn) for _ in range(2))
        self._norms = fuse(self._exact, True)
        self.losses = torch.zeros(steps)
        self.store: Any = None
        self.recovered: dict[int, dict[str, float]] = {}
        self.selection = Selection(self)

    def weights(self) -> Weights:
        """The network's parameters, live."""
        return dict(self.network.named_parameters())

    def embed(self, network: nn.Module, x: Tensor) -> Tensor:
        """Features [n, d] of images in 0 … 1, by any network of this kind."""
        return network(x).flatten(1) if self._given is None else self._given(network, x)

    def features(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Features [n, d] under these weights."""
        from spolia.core.functional import call

        return call(self._exact, weights, self.embed, x)

    def parts(self, weights: Mapping[str, Tensor], support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of support [items, d] and queries [m, d] of one task, with the statistics that `bn` says."""
        if self.settings.bn == "support":
            from spolia.core.norms import phase

            with phase(self._norms, "record"):
                support = self.features(weights, support_x)
            with phase(self._norms, "recorded"):
                return support, self.features(weights, query_x)
        both = self.features(weights, torch.cat([support_x, query_x]))
        return both[: len(support_x)], both[len(support_x) :]

    def logits(self, weights: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """[queries, ways] of one task by class means, differentiable in the weights."""
        support, query = self.parts(weights, support_x, query_x)
        return distances(support, support_y, query, self.settings.scale, self.settings.root)

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits [queries, ways], or with a leading [tasks] as all inputs have; each task is answered by itself."""
        if support_y.dim() == 2:
            tasks = zip(support_x, support_y, query_x, strict=True)
            return torch.stack([self.predict(*task) for task in tasks])
        if self.settings.head == "prototypes":
            with torch.no_grad():
                return self.logits(self.weights(), support_x, support_y, query_x)
        task = Task.of(support_x, support_y, query_x, query_x.new_zeros(0))
        (found,) = self._loop(self.settings.test_steps).outputs([task])
        return found[0].detach()

    def student(self, images: Tensor, labels: Tensor) -> Tensor:
        """Answers [n, ways] to images, class by class, as experts' images come: by the means of the batch itself.

        With a linear head the network's outputs. Differentiable in the images; under vmap as well.
        """
        from spolia.core.functional import call

        held = {name: w.detach() for name, w in self.weights().items()}
        if self.settings.head == "linear":
            return call(self._plain, held, lambda module, x: module(x), images)
        features = call(self._plain, held, self.embed, images)
        ways = len(labels) // self.settings.per_class
        return to_means(
            features, features.view(ways, -1, features.shape[1]).mean(1), self.settings.scale, self.settings.root
        )

    def teacher_loss(self, found: Recovered) -> Loss:
        """To answer one expert's images as it does. By class means: half of each class is support, the rest is asked."""
        chosen = self.settings
        if chosen.head == "linear":
            return lambda weights: self._against(self._outputs(weights, found.images), found.logits, found.labels)
        ways = int(found.labels.max()) + 1
        order = torch.arange(len(found.labels), device=found.labels.device).view(ways, -1)
        half = order.shape[1] // 2
        support, query = order[:, :half].flatten(), order[:, half:].flatten()

        def loss(weights: Weights) -> Tensor:
            logits = self.logits(weights, found.images[support], found.labels[support], found.images[query])
            return self._against(logits, found.logits[query], found.labels[query])

        return loss

    def gradient(self, episodes: Episodes) -> tuple[float, float, Weights]:
        """Mean loss and accuracy of the queries, and the gradient of that loss. Episodes of floats."""
        if self.settings.head == "linear":
            tasks = [Task.of(e.support_x, e.support_y, e.query_x, e.query_y) for e in episodes]
            found = self._loop(self.settings.inner_steps).gradient(tasks)
            right = [(o[0].argmax(1) == e.query_y).float().mean() for o, e in zip(found.outputs, episodes, strict=True)]
            return found.loss, float(torch.stack(right).mean()), found.gradient
        total: Weights = {}
        losses, right, (rank, ranks) = [], [], world()
        for one in list(episodes)[rank::ranks]:
            with torch.enable_grad():
                weights = self.weights()
                logits = self.logits(weights, one.support_x, one.support_y, one.query_x)
                loss = torch.nn.functional.cross_entropy(logits, one.query_y) / len(episodes)
                slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, slope in zip(weights, slopes, strict=True):
                if slope is not None:
                    total[name] = total[name] + slope if name in total else slope
            losses.append(float(loss.detach()))
            right.append(float((logits.detach().argmax(1) == one.query_y).double().mean()))
        return together(self.weights(), sum(losses), sum(right) / len(episodes), total)

    def chosen(self) -> FewShotLearner:
        """A learner with the weights that validation chose; those of the start where nothing looked."""
        other = FewShotLearner(self.network, self.settings, self._given, len(self.losses))
        other.load_state_dict(self.selection.best())
        other.store, other.recovered, other.losses = self.store, self.recovered, self.losses
        return other

    def state_dict(self) -> dict[str, Any]:
        return {f"network.{name}": t for name, t in self.network.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict({name.removeprefix("network."): t for name, t in state.items()})

    def save(self, file: str | os.PathLike[str]) -> Path:
        """One safetensors file, whole or not at all."""
        about = {"format": FORMAT, "settings": self.settings.model_dump(mode="json")}
        tensors = {name: t.detach().clone() for name, t in self.state_dict().items()}
        return tensorfile.write(Path(file), tensors, {"about": json.dumps(about, allow_nan=False)})

    def _outputs(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        from spolia.core.functional import call

        return call(self._exact, weights, lambda module, images: module(images), x)

    def _against(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chosen = self.settings
        loss = chosen.teacher_weight * distillation(logits, teacher, chosen.kd)
        if chosen.label_weight:
            loss = loss + chosen.label_weight * torch.nn.functional.cross_entropy(logits, labels)
        return loss

    def _loop(self, steps: int) -> InnerLoop:
        chosen = self.settings
        rule = Inner(steps=steps, lr=chosen.inner_lr, order=chosen.order, adapt=chosen.adapt, bn=chosen.bn)
        processor = next(self.network.parameters()).device.type == "cpu"
        return InnerLoop(self.network, rule, Execution("loop" if processor else "vmap"))


def together(weights: Weights, loss: float, right: float, total: Weights) -> tuple[float, float, Weights]:
    """Parts of a loss, an accuracy and a gradient in `weights`, summed over the processes."""
    if world()[1] == 1:
        return loss, right, total
    for name, w in weights.items():
        w.grad = total.get(name)
    share(list(weights.values()))
    loss, right = summed(torch.tensor([loss, right], dtype=torch.float64)).tolist()
    return loss, right, {name: w.grad for name, w in weights.items() if w.grad is not None}


def fits(learner: FewShotLearner, shape: tuple[int, ...], pool_ways: int) -> None:
    """SpoliaError unless the network takes the pool's images and has the outputs that its head needs."""
    chosen = learner.settings
    device = next(learner.network.parameters()).device
    try:
        with torch.no_grad():
            x = torch.zeros(4, *shape, device=device)
            outputs = learner.features(learner.weights(), x)
            if chosen.head == "linear":
                outputs = learner._outputs(learner.weights(), x)
    except RuntimeError as error:
        what = f"cannot take images {list(shape)}: {str(error).splitlines()[0]}"
        raise SpoliaError(what, where="network", mend="give a network for the pool's images") from None
    if chosen.head == "linear":
        if outputs.dim() != 2 or outputs.shape[1] != chosen.ways:
            what = f"gives {list(outputs.shape[1:])} outputs for tasks of {chosen.ways} ways"
            raise SpoliaError(what, where="network", mend=f"give its head {chosen.ways} outputs, or head=prototypes")
        if pool_ways != chosen.ways:
            what = f"experts have {pool_ways} outputs and tasks {chosen.ways} ways: one linear head cannot be both"
            raise SpoliaError(what, where="head", mend="take head=prototypes, or tasks of the experts' ways")

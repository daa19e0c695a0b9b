"""ProtoNet: learn features in which a class is the mean of its few examples; adapting to new classes is one such mean.

For few-shot classification without a gradient at test time, and the baseline that gradient learners have to beat. Snell,
Swersky, Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017, arXiv 1703.05175. The ridge head: Lee, Maji,
Ravichandran, Soatto, Meta-Learning with Differentiable Convex Optimization, CVPR 2019, arXiv 1904.03758.

    c_k = mean of f(x) over the support of class k,        logits_k(x) = -s |f(x) - c_k|^2
    ridge:  alpha = 2 (F F' + lambda I)^-1 Y,              logits(x) = s f(x) F' alpha

| paper | here |
|---|---|
| f | `embed(network, x)`, by default the network's output, flattened |
| c_k | `prototypes` |
| F [n k, d], Y [n k, n] | features and one-hot labels of the support |
| s | `scale`, learned where `learn_scale` |

Data touched: labelled images of the training classes; at test the support of the episode. Departures: `tasks` above 1
share one forward pass, and so BatchNorm's statistics. Test uses running statistics: an answer depends on its own support
and query alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import by_shares, world
from spolia.core.gradients import share
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.settings import Settings, setting
from spolia.parts.episode import EpisodeSampler
from spolia.parts.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.episode import Episodes

    Embed = Callable[[torch.nn.Module, Tensor], Tensor]
    Change = Callable[[Tensor, Sequence[np.random.Generator]], Tensor]
    Watch = Callable[[int, "ProtonetLearner"], float]

_SNELL, _LEE = "Snell et al. 2017", "Lee et al. 2019, the authors' code"


class Protonet(Settings):
    """Settings of `protonet`. How many ways and shots it is trained with is the episodes' business (Snell: more ways)."""

    head: Literal["prototypes", "ridge"] = setting("prototypes", "how logits come from features", source=_SNELL)
    distance: Literal["euclidean", "cosine"] = setting(
        "euclidean", "squared distance to the mean, or cosine with it", source=_SNELL
    )
    divide: bool = setting(False, "squared distances are divided by the number of features", source=f"off: {_SNELL}")
    scale: float = setting(1.0, "s, factor of the logits, or its first value", source=_LEE, gt=0)
    learn_scale: bool = setting(False, "s is trained too", source=f"off: {_SNELL}")
    ridge: float = setting(50.0, "lambda of the ridge head", source=_LEE, gt=0)
    smoothing: float = setting(0.0, "of the labels in training", source=_SNELL, ge=0, lt=1)
    steps: int = setting(10000, "outer steps", source="our choice", ge=1)
    tasks: int = setting(1, "episodes of a step", source=_SNELL, ge=1)
    lr: float = setting(1e-3, "step size of Adam", source=_SNELL, gt=0)
    halve_every: int = setting(2000, "steps after which the step size is halved", source=_SNELL, ge=1)
    weight_decay: float = setting(0.0, "of Adam", source=_SNELL, ge=0)
    check_every: int = setting(500, "steps between looks of `watch`", source="our choice", ge=1)


class ProtonetLearner:
    """Features and a head. `losses` [steps] of training; `selection` holds what `watch` chose."""

    def __init__(self, network: torch.nn.Module, settings: Protonet, embed: Embed | None = None):
        self.network, self.settings = network, settings
        self.scale = torch.tensor(settings.scale, device=_device(network), requires_grad=settings.learn_scale)
        self.losses = torch.zeros(settings.steps)
        self._embed = embed or _output
        self.selection = Selection(self)

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits [queries, ways], or with a leading [tasks] as all inputs have. Running statistics; nothing is changed."""
        stacked = support_y.dim() == 2
        given = (
            (support_x, support_y, query_x) if stacked else (p.unsqueeze(0) for p in (support_x, support_y, query_x))
        )
        modes = [(part, part.training) for part in self.network.modules()]
        self.network.eval()
        try:
            with torch.no_grad():
                logits = self.logits(*given)
        finally:
            for part, mode in modes:
                part.training = mode
        return logits if stacked else logits[0]

    def logits(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """[tasks, queries, ways], in the mode that the network is in; one forward pass for all images."""
        images = torch.cat([support_x, query_x], 1)
        features = self._embed(self.network, images.flatten(0, 1)).unflatten(0, images.shape[:2])
        support, query = features.split([support_x.shape[1], query_x.shape[1]], 1)
        chosen = self.settings
        if chosen.head == "ridge":
            return self.scale * ridge(support, support_y, query, chosen.ridge)
        means = prototypes(support, support_y)
        if chosen.distance == "cosine":
            return self.scale * _unit(query) @ _unit(means).transpose(1, 2)
        width = query.shape[-1] if chosen.divide else 1
        return -self.scale / width * squared(query, means)

    def chosen(self) -> ProtonetLearner:
        """A learner with the weights that validation chose; those of the start where `watch` never looked."""
        other = ProtonetLearner(copy.deepcopy(self.network), self.settings, self._embed)
        other.load_state_dict(self.selection.best())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.detach(), **{f"network.{n}": v for n, v in self.network.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.scale.copy_(state["scale"])
        start = len("network.")
        self.network.load_state_dict({name[start:]: v for name, v in state.items() if name != "scale"})


def protonet(
    network: torch.nn.Module,
    episodes: EpisodeSampler,
    settings: Protonet,
    journal: Journal | None = None,
    *,
    embed: Embed | None = None,
    augment: Change | None = None,
    watch: Watch | None = None,
) -> ProtonetLearner:
    """A copy of `network`, trained on `episodes` so that class means classify.

    `augment` changes supports and queries, images in 0 … 1. `watch(step, learner)` gives a validation score every
    `check_every` steps and at the end; the best is kept in `learner.selection`.
    """
    learner = ProtonetLearner(copy.deepcopy(network).train(), settings, embed)
    trained = [*learner.network.parameters(), *([learner.scale] if settings.learn_scale else [])]
    optimizer = torch.optim.Adam(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, 0.5)
    kept = {"learner": learner, "optimizer": optimizer, "schedule": schedule, "losses": learner.losses}
    kept |= {} if watch is None else {"selection": learner.selection}
    with (journal or Journal()).phase("protonet") as told:
        for step in told.steps(settings.steps, kept, shared=True):
            batch = episodes.draw(settings.tasks, step).to(_device(network)).floats()
            support, query = _changed(batch, augment, episodes.seed)
            with torch.enable_grad():
                logits = by_shares(lambda parts: learner.logits(*parts), (support, batch.support_y, query))
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.query_y.flatten(), label_smoothing=settings.smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            share(trained, 1 / world()[1])
            optimizer.step()
            schedule.step()
            learner.losses[step] = loss.detach()
            if step % 50 == 0:
                told.log(loss=loss.detach())
            if watch is not None and ((step + 1) % settings.check_every == 0 or step + 1 == settings.steps):
                learner.selection.offer(step + 1, watch(step + 1, learner))
    return learner


# --- heads: support and query [tasks, items, d], labels [tasks, items] -----------------------------------------------


def prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class [tasks, ways, d]."""
    y = _one_hot(labels, support)
    return y.transpose(1, 2) @ support / y.sum(1).unsqueeze(2)


def squared(query: Tensor, means: Tensor) -> Tensor:
    """Squared Euclidean distances [tasks, queries, ways]."""
    return (
        query.square().sum(2, keepdim=True) - 2 * query @ means.transpose(1, 2) + means.square().sum(2).unsqueeze(1)
    ).clamp(min=0)


def ridge(support: Tensor, labels: Tensor, query: Tensor, penalty: float) -> Tensor:
    """Twice the ridge regression of the one-hot labels, without intercept [tasks, queries, ways].

    Solved among the examples, of which there are fewer than features. The factor two is that of the authors' dual.
    """
    gram = support @ support.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(penalty)
    alpha = torch.cholesky_solve(_one_hot(labels, support), torch.linalg.cholesky(gram))
    return 2 * query @ (support.transpose(1, 2) @ alpha)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels).to(like.dtype)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def _output(network: torch.nn.Module, x: Tensor) -> Tensor:
    return network(x).flatten(1)


def _device(network: torch.nn.Module) -> torch.device:
    return next(network.parameters()).device


def _changed(batch: Episodes, augment: Change | None, seed: int) -> tuple[Tensor, Tensor]:
    if augment is None:
        return batch.support_x, batch.query_x
    draws = [generator(seed, "augment", number) for number in batch.numbers]
    return augment(batch.support_x, draws), augment(batch.query_x, draws)

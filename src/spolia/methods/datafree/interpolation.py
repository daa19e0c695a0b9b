"""Pseudo-tasks between pseudo-tasks: new classes for the learner without another look at any model.

    v(x1, x2) = (1 - lambda) f(x1) + lambda f(x2),     class c of the new task is the pair (class c of T1, class c of T2)

Hu et al. 2023, arXiv 2311.14756. Class means of mixed features are mixed class means. A linear head that is adapted by
gradients has no features to mix: there images are mixed, and the inner loop stays. lambda is 0 for a task left as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spolia.core.dist import world
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.methods.datafree.heads import distances
from spolia.methods.datafree.learner import together

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.episode import Episode, Episodes

    Weights = dict[str, Tensor]


def replayed(learner: Any, episodes: Any, number: int) -> tuple[float, float, Weights]:
    """Loss, accuracy and gradient of the replay step `number`: some of its tasks lie between two of the store's.

    With `interpolate` 0 they are those of a plain replay, to the bit.
    """
    chosen, device = learner.settings, next(learner.network.parameters()).device
    if not chosen.interpolate:
        return learner.gradient(episodes.draw(chosen.replay_tasks, number).to(device).floats())
    draws = generator(episodes.seed, "interpolate", number)
    mix = shares(chosen.replay_tasks, chosen.interpolate, chosen.beta, draws)
    one, other = (episodes.draw(chosen.replay_tasks, 2 * number + half).to(device).floats() for half in (0, 1))
    if chosen.head == "linear":
        return learner.gradient(mixed_images(one, other, torch.from_numpy(mix)))
    return mixed_gradient(learner, one, other, mix.tolist())


def shares(tasks: int, probability: float, beta: float, draws: np.random.Generator) -> np.ndarray:
    """lambda [tasks]: 0, or with `probability` drawn from Beta(beta, beta)."""
    mixed = draws.random(tasks) < probability
    return np.where(mixed, draws.beta(beta, beta, tasks), 0.0)


def mixed_gradient(learner: Any, one: Episodes, other: Episodes, mix: list[float]) -> tuple[float, float, Weights]:
    """Mean loss, accuracy and gradient of the tasks between `one` and `other`."""
    total: Weights = {}
    losses, right, (rank, ranks) = [], [], world()
    for task, share in list(enumerate(mix))[rank::ranks]:
        with torch.enable_grad():
            weights = learner.weights()
            logits = mixed_logits(learner, weights, one[task], other[task], share)
            loss = torch.nn.functional.cross_entropy(logits, one[task].query_y) / len(mix)
            slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, slope in zip(weights, slopes, strict=True):
            if slope is not None:
                total[name] = total[name] + slope if name in total else slope
        losses.append(float(loss.detach()))
        right.append(float((logits.detach().argmax(1) == one[task].query_y).double().mean()))
    return together(learner.weights(), sum(losses), sum(right) / len(mix), total)


def mixed_logits(learner: Any, weights: Weights, one: Episode, other: Episode, share: float) -> Tensor:
    """Logits [queries, ways] of the task that has `share` of `other`: 0 is `one`, 1 is `other`."""
    parts = learner.parts(weights, one.support_x, one.query_x)
    if share:
        beside = learner.parts(weights, other.support_x, other.query_x)
        parts = tuple((1 - share) * mine + share * theirs for mine, theirs in zip(parts, beside, strict=True))
    support, query = parts
    return distances(support, one.support_y, query, learner.settings.scale, learner.settings.root)


def mixed_images(one: Episodes, other: Episodes, mix: Tensor) -> Episodes:
    """The tasks whose images lie between those of `one` and `other`; mix [tasks]. Floats."""
    at = mix.to(one.support_x).view(-1, 1, 1, 1, 1)
    support = torch.lerp(one.support_x, other.support_x, at)
    return replace(one, support_x=support, query_x=torch.lerp(one.query_x, other.query_x, at))

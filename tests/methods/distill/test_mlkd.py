"""MLKD against sums written out; masks that select; the published code's loss; labels that do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spolia.core.divergence import kl, mean
from spolia.methods.distill.mlkd import Mlkd, mlkd

ONE = Mlkd(temperature=3.0, more=())


def masks(weak: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    p = weak.softmax(-1).numpy()
    sure, often = p.max(1), p.sum(0)
    return sure <= np.percentile(sure, 50), often <= np.percentile(often, 50)


def grams(s: torch.Tensor, t: torch.Tensor, heat: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared differences of G [n, n] and H [C, C]."""
    p, q = ((x / heat).softmax(-1).numpy() for x in (s, t))
    return (q @ q.T - p @ p.T) ** 2, (q.T @ q - p.T @ p) ** 2


def test_the_levels_written_out(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 7, 5)
    unsure, rare = masks(t[0])
    assert (unsure.sum(), rare.sum()) == (4, 3)  # the middle one counts
    batch, classes = zip(*(grams(s[v], t[v], 3.0) for v in (0, 1)), strict=True)
    expected = {
        "kd": 0.9 * (np.mean(unsure * kl(s[0], t[0], 3.0).numpy()) + float(kl(s[1], t[1], 3.0).mean())),
        "batch": 0.9 * sum((unsure[:, None] * b).sum() / 7 for b in batch),
        "class": 0.9 * (classes[0][:, rare].sum() / 5 + classes[1].sum() / 5),
    }
    parts = mlkd(ONE).parts(s, t, y[0])
    for name, value in expected.items():
        np.testing.assert_allclose(float(parts[name].mean()), value, rtol=1e-12)
    hard = torch.nn.functional.cross_entropy
    torch.testing.assert_close(parts["ce"].mean(), 0.1 * (hard(s[0], y[0]) + hard(s[1], y[0])))


def test_masks_select(drawn: Callable[..., Any]) -> None:
    """A sample that the teacher is sure of has no weak KL, where the published code halves everyone's."""
    s, t, _ = drawn(2, 8, 5)
    unsure = torch.from_numpy(masks(t[0])[0])
    assert not mlkd(ONE).parts(s, t)["kd"][0][~unsure].any()
    assert mlkd(ONE).parts(s, t)["kd"][0][unsure].all()
    assert mlkd(ONE.model_copy(update={"compat": True})).parts(s, t)["kd"][0].all()


def test_temperatures_add_up(drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(2, 8, 5)
    alone = [mlkd(Mlkd(temperature=heat, more=()))(s, t) for heat in (4.0, 2.0, 3.0, 5.0, 6.0)]
    torch.testing.assert_close(mlkd()(s, t), sum(alone))


def test_the_published_loss(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 7, 5)
    unsure, rare = (mask.mean() for mask in masks(t[0]))
    expected = {"kd": 0.0, "batch": 0.0, "class": 0.0}
    for heat, strong in ((4.0, 1), (3.0, 1), (5.0, 1), (2.0, 0), (6.0, 0)):
        batch, classes = grams(s[0], t[0], heat)
        weak = float(kl(s[0], t[0], heat).mean())
        expected["kd"] += 0.9 * (unsure * weak + float(kl(s[strong], t[strong], heat).mean()))
        expected["batch"] += 0.9 * unsure * batch.sum() / 7
        expected["class"] += 0.9 * rare * classes.sum() / 5
    parts = mlkd(Mlkd(compat=True)).parts(s, t, y[0])
    for name, value in expected.items():
        np.testing.assert_allclose(float(parts[name].mean()), value, rtol=1e-12)


def test_labels_below_zero_do_not_count(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 6, 5)
    kept, labels = torch.tensor([0, 1, 4]), y[0].clone()
    labels[[2, 3, 5]] = -100
    for settings in (Mlkd(), Mlkd(compat=True)):
        whole = mlkd(settings)(s, t, labels)
        alone = mlkd(settings)(s[:, kept], t[:, kept], labels[kept])
        torch.testing.assert_close(whole[:, kept], alone)
        torch.testing.assert_close(mean(whole, labels), alone.mean())


def test_gradients_and_further_axes(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 2, 2, 3)
    flat = mlkd()(s.view(2, 4, 3), t.view(2, 4, 3), y[0].flatten())
    assert torch.equal(mlkd()(s, t, y[0]).view(2, 4), flat)
    assert torch.autograd.gradcheck(lambda x: mlkd()(x, t, y[0]), s.requires_grad_())

"""Finetune: train on what is there and do nothing about forgetting. The lower bound of every table.

What it loses is McCloskey & Cohen's catastrophic interference, 1989, doi:10.1016/S0079-7421(08)60536-8.

    theta <- theta - lr grad CE(f(x), y),    (x, y) of the experience at hand

Data touched: each experience once, while it is there. Departures: none.
"""

from __future__ import annotations

from spolia.methods.continual.learner import Learner, Training


class Finetune(Training):
    """Settings of `FinetuneLearner`."""


class FinetuneLearner(Learner):
    """The learner that all others change."""

"""Every method is an instance of the unified objective: the same weights after every step as its own file."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

from spolia.errors import SpoliaError
from spolia.methods.continual.cpr import Cpr, CprLearner
from spolia.methods.continual.der import Der, DerLearner
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.er import Er, ErLearner
from spolia.methods.continual.ewc import Ewc, EwcLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.learner import Model
from spolia.methods.continual.lwf import Lwf, LwfLearner
from spolia.methods.continual.mas import Mas, MasLearner
from spolia.methods.continual.objective import OutputTerm, WeightTerm
from spolia.methods.continual.si import Si, SiLearner
from spolia.methods.continual.unified import Unified, UnifiedLearner, as_unified

EQUAL = 1e-12  # fp64: the two forms order a few sums differently, over some twenty steps of weights near 1
SMALL = {"items": 12, "replay": 5}
PAIRS = [
    (FinetuneLearner, Finetune(momentum=0.5)),
    (ErLearner, Er(weight=0.7, **SMALL)),
    (ErLearner, Er(weight=0.7, joint_forward=False, **SMALL)),
    (DerLearner, Der(alpha=0.4, **SMALL)),
    (DerPpLearner, DerPp(alpha=0.3, beta=0.6, weight_decay=1e-2, **SMALL)),
    (LwfLearner, Lwf(lr=0.1, alpha=2.0)),
    (EwcLearner, Ewc(lr=0.1, strength=3.0, decay=0.8)),
    (EwcLearner, Ewc(lr=0.05, strength=3.0, momentum=0.9, fisher="empirical")),
    (SiLearner, Si(lr=0.1, strength=2.0, damping=0.1)),
    (SiLearner, Si(lr=0.1, strength=2.0, damping=0.1, proximal=False)),
    (MasLearner, Mas(lr=0.05, strength=0.5)),
]


@pytest.mark.parametrize(("learner", "settings"), PAIRS, ids=lambda one: getattr(one, "__name__", ""))
def test_an_instance_makes_the_steps_of_its_own_file(learner, settings, stream, network, led, apart) -> None:
    direct = led(learner(network(), settings, seed=4), stream)
    composed = led(UnifiedLearner(network(), as_unified(settings), seed=4), stream)
    assert apart(direct, composed) < EQUAL
    if not isinstance(settings, Finetune):
        plain = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
        assert (
            apart(led(FinetuneLearner(network(), Finetune(**plain), seed=4), stream), direct) > 1e-4
        )  # it does something


def test_terms_read_back_from_what_they_write() -> None:
    for term in (
        OutputTerm(),
        OutputTerm(divergence="squared", reference="stored", weight=0.25),
        WeightTerm(decay=0.5),
    ):
        assert type(term)(**yaml.safe_load(str(term))) == term
    assert Unified().output == as_unified(DerPp()).output  # DER++ unless other terms are named


def test_cpr_around_fine_tuning_is_an_instance(stream, network, led, apart) -> None:
    direct = led(CprLearner(FinetuneLearner(network(), Finetune(), seed=4), Cpr(weight=0.3)), stream)
    assert apart(direct, led(UnifiedLearner(network(), as_unified(Cpr(weight=0.3)), seed=4), stream)) < EQUAL


def test_another_optimiser_too(stream, network, led, apart) -> None:
    def adam(groups):
        return torch.optim.Adam(groups, lr=0.01)

    for learner, settings in ((EwcLearner, Ewc(strength=3.0)), (DerPpLearner, DerPp(**SMALL))):
        direct = led(learner(Model(network(), adam), settings, seed=4), stream)
        assert apart(direct, led(UnifiedLearner(Model(network(), adam), as_unified(settings), seed=4), stream)) < EQUAL


def test_terms_add_up(stream, network, led, apart) -> None:
    """ER + EWC: without its weight the second term leaves ER, without the first EWC."""
    er, ewc = OutputTerm(weight=0.7), WeightTerm(weight=3.0)

    def trail(first: float, second: float):
        terms = (er.model_copy(update={"weight": first}),), (ewc.model_copy(update={"weight": second}),)
        return led(
            UnifiedLearner(network(), Unified(output=terms[0], weights=terms[1], lr=0.1, **SMALL), seed=4), stream
        )

    only_er = led(ErLearner(network(), Er(weight=0.7, **SMALL), seed=4), stream)
    assert apart(trail(0.7, 0.0), only_er) < EQUAL
    assert apart(trail(0.7, 3.0), only_er) > 1e-4
    only_ewc = led(EwcLearner(network(), Ewc(lr=0.1, strength=3.0), seed=4), stream)
    assert apart(trail(0.0, 3.0), only_ewc) < EQUAL


def test_l2_sp_pulls_to_the_last_weights(stream, network) -> None:
    terms = Unified(output=(), weights=(WeightTerm(importance="one", weight=1e9),))
    learner = UnifiedLearner(network(), terms, seed=0)
    first, second = stream.experiences[:2]
    learner.begin(first)
    learner.observe(first.draw(8, 0, 0))
    learner.end(first)
    before = [p.detach().clone() for p in learner.parameters]
    learner.begin(second)
    learner.observe(second.draw(8, 0, 0))
    # an implicit step of endless strength is the anchor: 1 / (1 + 2 lr 1e9) of a step of order 1 is left
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(before, learner.parameters, strict=True))


@pytest.mark.parametrize(
    "term",
    [
        {"divergence": "squared"},
        {"divergence": "reverse_kl"},
        {"divergence": "squared", "reference": "stored", "samples": "current"},
        {"divergence": "squared", "reference": "old", "temperature": 2.0},
    ],
)
def test_a_term_without_meaning_is_refused(term, network) -> None:
    with pytest.raises(SpoliaError, match="reference"):
        UnifiedLearner(network(), Unified(output=(OutputTerm(**term),)))


def test_a_memory_term_takes_batch_statistics_apart() -> None:
    body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    assert not UnifiedLearner(body, Unified(output=(OutputTerm(),))).joint
    with pytest.raises(SpoliaError, match="batch normalisation"):
        UnifiedLearner(body, Unified(output=(OutputTerm(),), joint_forward=True))

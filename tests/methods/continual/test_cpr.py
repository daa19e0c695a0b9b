"""cpr: predictions get wider, and without weight nothing changes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from spolia.core.outputs import entropy
from spolia.methods.continual.cpr import Cpr, CprLearner
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.ewc import Ewc
from spolia.methods.continual.finetune import Finetune, FinetuneLearner


def test_without_weight_it_is_its_host(stream, network, led, apart) -> None:
    settings = DerPp(items=12, replay=5)
    around = led(CprLearner(DerPpLearner(network(), settings), Cpr(weight=0.0)), stream)
    assert apart(around, led(DerPpLearner(network(), settings), stream)) == 0


def test_predictions_are_wider_the_more_it_weighs(stream, network, led) -> None:
    x, found = stream.tests[-1].examples.batch(slice(None)).x, []
    for weight in (0.0, 0.5, 50.0):
        learner = CprLearner(FinetuneLearner(network(), Finetune(lr=0.02)), Cpr(weight=weight))
        led(learner, stream, steps=20)
        found.append(float(entropy(learner.predict(x)).mean()))
    assert found[0] < found[1] < found[2]


def test_the_term_is_zero_for_a_uniform_answer(stream, network) -> None:
    made = network()
    for p in made.parameters():
        p.data.zero_()
    batch = stream.experiences[0].draw(8, 0, 0)
    host = FinetuneLearner(made, Finetune())
    gap = CprLearner(host, Cpr(weight=9.0)).loss(batch)[0] - host.loss(batch)[0]
    assert abs(float(gap.detach())) < 1e-12


def test_a_host_is_named_with_its_settings() -> None:
    settings = Cpr(host_settings={"strength": 2.0})
    assert settings.hosted() == Ewc(strength=2.0)
    assert Cpr(host_settings=settings.host_settings).hosted() == settings.hosted()  # a written-out recipe reads back
    for wrong, said in (({"strenght": 2.0}, "strength"), ({"strength": -1.0}, "strength")):
        with pytest.raises(ValidationError, match=said):
            Cpr(host_settings=wrong)

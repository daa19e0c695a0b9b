"""finetune is a plain loop; what a Learner promises all others: any optimiser and loss, modes, views, the same bits again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.core import kept
from spolia.errors import SpoliaError
from spolia.methods.continual.agem import AGem, AGemLearner
from spolia.methods.continual.cpr import Cpr, CprLearner
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.er_ace import ErAce, ErAceLearner
from spolia.methods.continual.ewc import Ewc, EwcLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.gdumb import GDumb, GDumbLearner
from spolia.methods.continual.icarl import ICarl, ICarlLearner
from spolia.methods.continual.joint import Joint, JointLearner
from spolia.methods.continual.learner import Model
from spolia.methods.continual.lwf import Lwf, LwfLearner
from spolia.methods.continual.mas import Mas, MasLearner
from spolia.methods.continual.refresh import Refresh, RefreshLearner
from spolia.methods.continual.si import Si, SiLearner
from spolia.methods.continual.unified import Unified, UnifiedLearner
from spolia.methods.continual.vcl import Vcl, VclLearner

SMALL = {"items": 12, "replay": 5}


def test_it_is_the_plain_loop(stream, network, led, apart) -> None:
    learner = FinetuneLearner(network(), Finetune(lr=0.2, momentum=0.3))
    other = network()
    optimizer, trail = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.3), []
    for experience in stream.experiences:
        for step in range(6):
            batch = experience.draw(8, 0, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(batch.x), batch.y).backward()
            optimizer.step()
            trail.append([p.detach().clone() for p in other.parameters()])
        trail.append(trail[-1])
    assert apart(led(learner, stream), trail) == 0


def test_the_users_optimiser_and_loss(stream, network, led, apart) -> None:
    def smooth(logits, labels):
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")

    model = Model(network(), lambda groups: torch.optim.AdamW(groups, lr=0.01), smooth)
    trail = led(FinetuneLearner(model, Finetune()), stream)
    assert apart(trail, led(FinetuneLearner(network(), Finetune()), stream)) > 1e-3
    assert isinstance(FinetuneLearner(model, Finetune()).optimizer, torch.optim.AdamW)


def test_views_are_seen_in_training_only(network) -> None:
    seen = []

    def view(x, draws):
        seen.append(float(draws.random()))
        return x + 1

    learner = FinetuneLearner(Model(network(), view=view), Finetune(), seed=3)
    x = torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(learner.predict(x), learner.network(x).detach()) and not seen
    assert torch.equal(learner.viewed(x), x + 1) and len(seen) == 1
    whole = torch.full((2, 5), 255, dtype=torch.uint8)
    assert torch.equal(FinetuneLearner(network(), Finetune()).shown(whole), torch.ones(2, 5))


def test_predicting_changes_nothing(network) -> None:
    body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).double()
    learner = FinetuneLearner(body.train(), Finetune())
    before = {name: t.clone() for name, t in body.state_dict().items()}
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = learner.predict(x)
    assert torch.equal(first, learner.predict(x)) and not first.requires_grad
    assert all(part.training for part in body.modules())
    assert all(torch.equal(before[name], t) for name, t in body.state_dict().items())


def test_a_frozen_network_is_refused(network) -> None:
    with pytest.raises(SpoliaError, match="no parameter to train"):
        FinetuneLearner(network().requires_grad_(False), Finetune())


def test_a_fresh_optimiser_forgets_its_momentum(stream, network) -> None:
    learner = FinetuneLearner(network(), Finetune(momentum=0.9, fresh=True))
    for experience in stream.experiences[:2]:
        learner.begin(experience)
        assert not learner.optimizer.state
        learner.observe(experience.draw(8, 0, 0))
        assert learner.optimizer.state


MAKERS = {
    "joint": lambda n, s: JointLearner(n, Joint(), stream=s),
    "er_ace": lambda n, s: ErAceLearner(n, ErAce(**SMALL)),
    "derpp": lambda n, s: DerPpLearner(Model(n, view=lambda x, draws: x + draws.random()), DerPp(**SMALL)),
    "agem": lambda n, s: AGemLearner(n, AGem(**SMALL)),
    "ewc": lambda n, s: EwcLearner(n, Ewc(momentum=0.9)),
    "si": lambda n, s: SiLearner(n, Si()),
    "mas": lambda n, s: MasLearner(n, Mas()),
    "lwf": lambda n, s: LwfLearner(n, Lwf()),
    "icarl": lambda n, s: ICarlLearner(n, ICarl(items=12, replay=5)),
    "gdumb": lambda n, s: GDumbLearner(n, GDumb(epochs=2, **SMALL)),
    "vcl": lambda n, s: VclLearner(n, Vcl()),
    "cpr": lambda n, s: CprLearner(EwcLearner(n, Ewc()), Cpr()),
    "refresh": lambda n, s: RefreshLearner(DerPpLearner(n, DerPp(**SMALL)), Refresh(temperature=1.0)),
    "unified": lambda n, s: UnifiedLearner(n, Unified()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_learner_goes_on_with_the_same_bits(name, stream, network, tmp_path) -> None:
    """Saved in the middle of the second experience, restored into a learner made anew from other weights."""
    learner, other = (MAKERS[name](network(seed), stream) for seed in (0, 1))
    first, second, third = stream.experiences

    def part(one, start: int) -> None:
        if start == 0:
            one.begin(first)
            for step in range(4):
                one.observe(first.draw(8, 0, step))
            one.end(first)
            one.begin(second)
            one.observe(second.draw(8, 0, 0))
        else:
            one.observe(second.draw(8, 0, 1))
            one.end(second)
            one.begin(third)
            for step in range(2):
                one.observe(third.draw(8, 0, step))
            one.end(third)

    part(learner, 0)
    kept.save(tmp_path / "state", kept.capture("learner", learner))
    kept.restore("learner", other, kept.load(tmp_path / "state"))
    for one in (learner, other):
        part(one, 1)
    x = third.draw(8, 0, 3).x
    assert torch.equal(learner.predict(x), other.predict(x))
    assert learner.held == other.held

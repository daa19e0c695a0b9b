"""What all learners of prompts keep: the encoder as it was, answers of each input alone, old classes, themselves on disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import spolia
from spolia.bench.continual import Protocol, run
from spolia.catalog import find
from spolia.core import kept
from spolia.errors import SpoliaError
from spolia.methods.continual.prototypes import Prototypes, cosines
from spolia.parts.encoder import Encoder
from spolia.parts.stream import Stream, class_incremental
from spolia.runs.prompted import names_in, save_prompts
from spolia.zoo.vit import ViT

SETTINGS: dict[str, dict[str, Any]] = {
    "asp": {"half": 2, "hidden": 8, "readings": 2},
    "ncm": {},
    "l2p": {"pool": 4, "chosen": 2, "length": 2},
    "dualprompt": {"shared_blocks": (0,), "own_blocks": (1,)},
    "coda": {"components": 6, "length": 2, "blocks": (0, 1)},
}
LEARNERS = list(SETTINGS)
TRAINED = [name for name in LEARNERS if name != "ncm"]


def images(each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six classes, each a colour in a corner [6 each, 3, 8, 8]."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(6).repeat(each)
    x = 0.5 * torch.randn(len(y), 3, 8, 8, generator=draws)
    for i, label in enumerate(y.tolist()):
        x[i, label % 3, :4, 4 * (label // 3) :] += 2
    return x, y


@pytest.fixture(scope="module")
def sessions() -> Stream:
    return class_incremental(images(10, 0), images(6, 1), tasks=[4, 1, 1], shots=3)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))


def learner(name: str, encoder: Encoder, classes: int = 6, seed: int = 0, **more: Any) -> Any:
    method = find(name)
    return method.function()(encoder, method.settings_class()(**{**SETTINGS[name], **more}), classes=classes, seed=seed)


def session(own: Any, experience: Any, steps: int = 3) -> None:
    own.begin(experience)
    for step in range(steps):
        own.observe(experience.draw(8, 0, step))
    own.end(experience)


@pytest.mark.parametrize("name", LEARNERS)
def test_answers_are_each_inputs_own(name: str, encoder: Encoder, sessions: Stream) -> None:
    own = learner(name, encoder)
    session(own, sessions.experiences[0])
    x = sessions.tests[0].examples.batch(slice(None)).x
    together = own.predict(x)
    alone = torch.cat([own.predict(one) for one in x.split(1)])
    mixed = own.predict(torch.cat([torch.randn(40, 3, 8, 8), x]))[40:]
    for found in (alone, mixed):  # cosines of fp32, whose sums are taken in other orders
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", LEARNERS)
def test_the_encoder_is_never_changed(name: str, encoder: Encoder, sessions: Stream) -> None:
    before, x = encoder.mark(), sessions.tests[0].examples.batch(slice(None)).x
    plain = encoder.plain(x)
    own = learner(name, encoder)
    run(own, sessions, Protocol(epochs=1, batch=8))
    assert encoder.mark() == before and torch.equal(encoder.plain(x), plain)
    assert all(p.grad is None for p in encoder.module.parameters()) and not encoder.module.training


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_prompts_and_later_sessions_do_not(name: str, encoder: Encoder, sessions: Stream) -> None:
    own = learner(name, encoder)
    first = copy.deepcopy(own.network.state_dict())
    own.begin(sessions.experiences[0])
    losses = [float(own.observe(sessions.experiences[0].draw(8, 0, step))) for step in range(4)]
    own.end(sessions.experiences[0])
    assert all(torch.isfinite(torch.tensor(losses))) and min(losses) > 0
    after = copy.deepcopy(own.network.state_dict())
    moved = {key for key in first if not torch.equal(first[key], after[key])}
    assert moved == set(first) - ({"key"} if name == "l2p" and not own.settings.pull else set())
    session(own, sessions.experiences[1])
    assert all(torch.equal(after[key], value) for key, value in own.network.state_dict().items())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", LEARNERS)
def test_new_classes_never_move_old_prototypes(name: str, encoder: Encoder, sessions: Stream) -> None:
    own = learner(name, encoder)
    session(own, sessions.experiences[0])
    x = sessions.tests[0].examples.batch(slice(None)).x
    old, answers = own.prototypes.means[:4].clone(), own.predict(x)
    assert len(own.prototypes) == 4 and (answers[:, 4:] < -1e30).all()
    session(own, sessions.experiences[1])
    assert len(own.prototypes) == 5 and own.prototypes.counts.tolist() == [10, 10, 10, 10, 3, 0]
    assert torch.equal(own.prototypes.means[:4], old)
    if name != "asp":  # whose specific prompts' mean has moved a hundredth
        assert torch.equal(own.predict(x)[:, :4], answers[:, :4])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_file_of_prompts_is_the_learner_on_the_encoder(
    name: str, encoder: Encoder, sessions: Stream, tmp_path: Any
) -> None:
    own = learner(name, encoder)
    session(own, sessions.experiences[0])
    file = spolia.save_prompts(own, tmp_path / "own.safetensors", classes=["a", "b", "c", "d", "e", "f"])
    again = spolia.attach_prompts(encoder.module, file)
    x = sessions.tests[0].examples.batch(slice(None)).x
    assert torch.equal(again.predict(x), own.predict(x)) and names_in(file)[2] == "c"
    for one in (own, again):  # it goes on with new classes
        session(one, sessions.experiences[1])
    assert torch.equal(again.predict(x), own.predict(x))


def test_a_file_of_prompts_tells_what_does_not_fit(encoder: Encoder, sessions: Stream, tmp_path: Any) -> None:
    own = learner("ncm", encoder)
    with pytest.raises(SpoliaError, match="no prototypes yet"):
        save_prompts(own, tmp_path / "own.safetensors")
    session(own, sessions.experiences[0])
    file = save_prompts(own, tmp_path / "own.safetensors")
    assert file.stat().st_size < 3_000  # six means of 16, not the encoder
    other = ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    with pytest.raises(SpoliaError, match="other weights"):
        spolia.attach_prompts(other, file)
    assert spolia.attach_prompts(other, file, match=False).predict(torch.randn(2, 3, 8, 8)).shape == (2, 6)
    with pytest.raises(SpoliaError, match="depth 2"):
        spolia.attach_prompts(ViT(8, 4, 16, 3, 2, generator=torch.Generator().manual_seed(1)), file)
    with pytest.raises(SpoliaError, match="has no prompts"):
        save_prompts(object(), file)
    kept.save(tmp_path / "else.safetensors", {"a": 1})
    with pytest.raises(SpoliaError, match="holds no prompts"):
        spolia.attach_prompts(other, tmp_path / "else.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_kept_and_loaded_in_a_session_it_takes_the_same_steps(
    name: str, encoder: Encoder, sessions: Stream, tmp_path: Any
) -> None:
    first = sessions.experiences[0]
    more = {"base": first.train} if name == "asp" else {}
    own, again = learner(name, encoder), learner(name, encoder, seed=7)
    again.base = more.get("base")
    own.begin(first)
    for step in range(2):
        own.observe(first.draw(8, 0, step))
    kept.save(tmp_path / "state.safetensors", own.state_dict())
    again.load_state_dict(kept.load(tmp_path / "state.safetensors"))
    for one in (own, again):
        for step in range(2, 11):  # into the next epoch, where asp looks at the base data again
            one.observe(first.draw(8, 0, step))
        one.end(first)
        session(one, sessions.experiences[1])
    x = sessions.tests[0].examples.batch(slice(None)).x
    assert torch.equal(again.predict(x), own.predict(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda"])
def test_as_the_paper_has_it_every_session_learns_and_the_head_answers(
    name: str, encoder: Encoder, sessions: Stream
) -> None:
    own = learner(name, encoder, sessions=3, answer="head")
    for experience in sessions.experiences:
        before = copy.deepcopy(own.network.state_dict())
        session(own, experience)
        head = own.network["head_weight"]
        still = [c for c in range(6) if c not in experience.classes]
        assert torch.equal(head[still], before["head_weight"][still])  # losses are among the session's own classes
    x = sessions.tests[0].examples.batch(slice(None)).x
    torch.testing.assert_close(own.predict(x), own.scores(own.features(x)).detach())


def test_the_cosine_ends_at_zero_with_the_readings(encoder: Encoder, sessions: Stream) -> None:
    own, first = learner("asp", encoder, lr=0.4), sessions.experiences[0]
    own.begin(first)
    rates = []
    for step in range(11):  # 40 examples, eight a step: two readings are ten steps
        own.observe(first.draw(8, 0, step))
        rates.append(own.lr)
    assert rates[0] == 0.4 and rates[5] == pytest.approx(0.2) and rates[10] == 0


# --- prototypes --------------------------------------------------------------------------------------------------------


def test_prototypes_are_exact_means() -> None:
    held = Prototypes(3, 2, torch.device("cpu"))
    held.learn(torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]]), torch.tensor([0, 0, 2]))
    assert held.means.tolist() == [[2, 1], [0, 0], [0, 5]] and held.counts.tolist() == [2, 0, 1]
    answers = held.answers(torch.tensor([[0.0, 1.0], [4.0, 2.0]]))
    assert answers.argmax(1).tolist() == [2, 0] and answers[1, 0] == pytest.approx(1)


def test_shrinking_by_hand() -> None:
    held = Prototypes(3, 2, torch.device("cpu"))
    held.learn(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), torch.tensor([0, 1, 2]))
    held.shrink([2], 0.5, 16.0)  # as near to both old classes: half of it, half of their mean
    torch.testing.assert_close(held.means, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.75, 2.0]]))
    before = held.means.clone()
    held.shrink([2], 0.0, 16.0)
    assert torch.equal(held.means, before)


def test_cosines() -> None:
    found = cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, -(0.5**0.5)]]))

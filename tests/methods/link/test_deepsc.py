from __future__ import annotations

import pytest
import torch

from spolia.core.journal import Interrupted, Journal
from spolia.core.seeds import generator
from spolia.core.snr import n0_of, to_esn0
from spolia.errors import SpoliaError
from spolia.methods.link.deepsc import DeepSC, DeepSCLink, deepsc
from spolia.parts.channel import Channel
from spolia.parts.transceiver import Transceiver

V, LENGTH = 8, 5
TINY = {"uses": 2, "width": 16, "depth": 1, "heads": 2, "inner": 32, "dropout": 0.1}


def network(seed: int = 0, **more) -> Transceiver:
    return Transceiver(V, **{**TINY, **more}, generator=torch.Generator().manual_seed(seed)).eval()


def text(frames: int, seed: int = 0) -> torch.Tensor:
    """Counting upwards from a random token, two of five steps by two: easy to predict, not wholly."""
    rng = torch.Generator().manual_seed(seed)
    first = torch.randint(0, V, (frames, 1), generator=rng)
    step = (torch.rand(frames, LENGTH - 1, generator=rng) < 0.4).long() + 1
    return torch.cat([first, first + step.cumsum(1)], dim=1) % V


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = network(0), network(0), network(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.out.weight, other.out.weight)


def test_every_frame_has_mean_energy_one():
    symbols = network().send(text(7))
    assert symbols.shape == (7, LENGTH * 2) and symbols.is_complex()
    torch.testing.assert_close(symbols.abs().square().mean(1), torch.ones(7))


def test_the_receiver_does_not_see_what_it_has_not_read():
    net, tokens = network(), text(3)
    with torch.no_grad():
        heard = net.heard(net.send(tokens))
        before = net.after_start(tokens[:, :-1])
        changed = before.clone()
        changed[:, 3:] = (changed[:, 3:] + 1) % V
        # the same sums, fp32
        torch.testing.assert_close(net.read(heard, before)[:, :3], net.read(heard, changed)[:, :3], rtol=0, atol=1e-5)


def test_its_posterior_is_its_own_probability_of_the_text():
    link, tokens = DeepSCLink(network()), text(6)
    received = Channel().transmit(link.send(tokens), 0.1, generator(0, "noise"))
    found = link.receive(received, LENGTH)
    with torch.no_grad():
        net = link.network
        log_p = net.read(net.heard(received.y), net.after_start(found.best[:, :-1])).log_softmax(-1)
    own = log_p.gather(2, found.best[:, :, None]).sum((1, 2))
    torch.testing.assert_close(found.log_posterior[:, 0], own, rtol=0, atol=1e-4)
    assert torch.equal(log_p.argmax(-1), found.best)


def test_frames_of_several_lengths_are_all_learned_from():
    settings, tokens = DeepSC(**TINY, steps=4, batch=2), text(20)
    whole = deepsc(tokens, V, Channel(), settings).network.state_dict()
    alone = deepsc([tokens], V, Channel(), settings).network.state_dict()
    mixed = deepsc([tokens, tokens[:, :3]], V, Channel(), settings).network.state_dict()
    assert all(torch.equal(t, alone[name]) for name, t in whole.items())
    assert any(not torch.equal(t, mixed[name]) for name, t in whole.items())
    with pytest.raises(SpoliaError, match="there are no frames"):
        deepsc([], V, Channel(), settings)


@pytest.mark.slow
def test_training_makes_text_arrive():
    """Two seeds; a link never trained guesses one of eight tokens. Also through Rayleigh fading."""
    tokens, fresh = text(2000), text(200, 5)
    settings = DeepSC(**{**TINY, "dropout": 0.0, "width": 32}, steps=150, batch=48, lr=5e-3)
    for seed, channel in ((0, Channel()), (1, Channel(fading="rayleigh"))):
        link = deepsc(tokens, V, channel, settings, seed=seed)
        wrong = []
        for db in (-5.0, to_esn0(10.0, "deepsc")):
            received = channel.transmit(link.send(fresh), n0_of(db), generator(9, "noise"))
            wrong.append(float((link.receive(received, LENGTH).best != fresh).float().mean()))
        assert wrong[1] < 0.5 and wrong[1] < wrong[0] - 0.1  # of .875 by chance; measured .2 to .35 and .6


def test_training_is_by_seed_resumes_bit_by_bit_and_leaves_the_global_generator(tmp_path):
    tokens, settings = text(50), DeepSC(**TINY, steps=4, batch=8)
    before = torch.get_rng_state()
    whole = deepsc(tokens, V, Channel(), settings, seed=3)
    assert torch.equal(torch.get_rng_state(), before)

    def stop(label: str, done: int, total: int, numbers) -> None:
        if done == 2:
            journal.request_stop()

    journal = Journal(tmp_path, progress=stop)
    with pytest.raises(Interrupted):
        deepsc(tokens, V, Channel(), settings, journal, seed=3)
    resumed = deepsc(tokens, V, Channel(), settings, Journal(tmp_path), seed=3)
    other = deepsc(tokens, V, Channel(), settings, seed=4)
    pairs = zip(whole.network.parameters(), resumed.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(whole.network.out.weight, other.network.out.weight)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpoliaError, match="token 7 of 7"):
        deepsc(torch.tensor([[7]]), 7, Channel())
    with pytest.raises(SpoliaError, match="3 heads"):
        deepsc(text(2), V, Channel(), DeepSC(width=16, heads=3))
    with pytest.raises(SpoliaError, match="10 to 5 dB"):
        deepsc(text(2), V, Channel(), DeepSC(snr=(10.0, 5.0)))

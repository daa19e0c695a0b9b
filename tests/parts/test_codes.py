"""Channel codes behind one small protocol; LDPC by a stand-in of sionna, and by sionna itself where it is installed."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from spolia.core.modulation import constellation, llrs, modulate
from spolia.core.seeds import generator
from spolia.core.snr import Rates, n0_of, to_esn0
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel
from spolia.parts.codes import ChannelCode, Convoluted, Ldpc, Repetition, Uncoded


def random_bits(*shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(0, *shape).integers(0, 2, shape).astype(np.uint8))


@pytest.mark.parametrize("code", [Uncoded(12), Repetition(12, 3), Convoluted(12)])
def test_what_is_sent_clearly_is_read(code: ChannelCode) -> None:
    bits = random_bits(2, 3, code.k)
    sent = code.encode(bits)
    assert sent.shape == (2, 3, code.n)
    assert sent.dtype == torch.uint8
    assert torch.equal(code.decode(1 - 2 * sent.float()), bits)


def test_repetition_weighs_what_it_hears() -> None:
    assert Repetition(2, 3).decode(torch.tensor([5.0, 1.0, -2.0, 1.0, -2.0, -3.0])).tolist() == [0, 1]


class Encoder:
    """Sends every bit twice, in sionna's types and one batch axis."""

    def __init__(self, k: int, n: int, device: str):
        assert device == "cpu"
        self.k, self.n = k, n

    def __call__(self, bits: torch.Tensor) -> torch.Tensor:
        assert bits.dtype == torch.float32
        assert bits.dim() == 2
        return torch.cat([bits, bits], dim=-1)[:, : self.n]


class Decoder:
    def __init__(self, encoder: Encoder, num_iter: int, hard_out: bool, return_infobits: bool, device: str):
        assert hard_out
        assert return_infobits
        assert device == "cpu"
        self.k = encoder.k

    def __call__(self, llrs: torch.Tensor) -> torch.Tensor:
        """Its ratios are ln p1 / p0."""
        return (llrs[:, : self.k] + llrs[:, self.k :] > 0).float()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sionna", "sionna.phy", "sionna.phy.fec", "sionna.phy.fec.ldpc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    ldpc = sys.modules["sionna.phy.fec.ldpc"]
    monkeypatch.setattr(ldpc, "LDPC5GEncoder", Encoder, raising=False)
    monkeypatch.setattr(ldpc, "LDPC5GDecoder", Decoder, raising=False)
    monkeypatch.setattr(sys.modules["sionna.phy.fec"], "ldpc", ldpc, raising=False)


@pytest.mark.usefixtures("stand_in")
def test_the_adapter_turns_signs_and_axes() -> None:
    code = Ldpc(12, 24)
    bits = random_bits(2, 3, 12)
    sent = code.encode(bits)
    assert sent.shape == (2, 3, 24)
    assert sent.dtype == torch.uint8
    assert torch.equal(code.decode(1 - 2 * sent.double()), bits)
    assert code.encode(bits[0, 0]).shape == (24,)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("k", "n"), [(11, 22), (100, 501), (100, 101), (9000, 20_000)])
def test_lengths_that_5g_does_not_have(k: int, n: int) -> None:
    with pytest.raises(SpoliaError, match="rate from 1/5"):
        Ldpc(k, n)


def test_without_sionna_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def refuse(name: str, *rest):
        if name.startswith("sionna"):
            raise ImportError("no sionna here")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SpoliaError, match=r"pip install .spolia\[comms\]"):
        Ldpc(100, 200)


@pytest.mark.slow
def test_ldpc_of_sionna() -> None:
    """(500, 1000), BPSK, Eb/N0 1.5 dB: block errors near 0.07 in 200 blocks of a measurement; 0.01 to 0.16 holds both."""
    pytest.importorskip("sionna.phy.fec.ldpc")
    code, c, bits = Ldpc(500, 1000), constellation("bpsk"), random_bits(200, 500)
    n0 = n0_of(to_esn0(1.5, "ebn0", Rates(1, 0.5)))
    heard = Channel().transmit(modulate(code.encode(bits), c), n0, generator(1)).llrs(c)
    assert 0.01 <= float((code.decode(heard) != bits).any(-1).float().mean()) <= 0.16


@pytest.mark.slow
def test_ratios_are_sionnas_with_the_other_sign() -> None:
    mapping = pytest.importorskip("sionna.phy.mapping")
    c = constellation("16qam")
    y = modulate(random_bits(40), c) + 0.3
    theirs = mapping.Demapper("app", "qam", 4)(y.unsqueeze(0), torch.tensor(0.5)).flatten()
    torch.testing.assert_close(llrs(y, 0.5, c), -theirs.cpu(), rtol=1e-4, atol=1e-4)  # fp32 on both sides

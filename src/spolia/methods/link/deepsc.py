"""DeepSC: transmitter and receiver learned end to end, noise between them.

For comparing with: it needs training on text of the kind that is sent, at the noise it will meet, and both ends hold it.
Xie, Qin, Li and Juang, Deep learning enabled semantic communication systems, IEEE TSP 69, 2021, arXiv 2006.10685.

    minimise  E cross-entropy(receiver(channel(transmitter(x))), x)      over both networks

| paper | here |
|---|---|
| semantic and channel encoders S_beta, C_alpha | `Transceiver.send` |
| C_delta^-1, S_chi^-1 | `Transceiver.heard`, `Transceiver.read` |
| SNR | `snr`, in DeepSC's own convention: its code labels Es/N0 3.01 dB too low (core/snr, `deepsc`) |

Data touched: tokens of the training text, nothing else. A token takes `uses` complex channel uses, 8 as published.

Departures: the term of mutual information is left out, as the published training leaves it out. Noise is drawn for each frame
between the two levels, where that code draws once an epoch; power is normalised in every frame, there only above 1; fading
has its own gains in each frame and is equalised by the least mean square error, there one gain a batch is inverted. Padding
there counts in the loss, here frames have one length. The receiver is told that length, as ours is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core.dist import by_shares, world
from spolia.core.gradients import share
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy, generator
from spolia.core.settings import Settings, setting
from spolia.core.snr import n0_of, to_esn0
from spolia.errors import SpoliaError
from spolia.parts.link import Decoded

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.channel import Channel, Received
    from spolia.parts.prior import Contexts
    from spolia.parts.transceiver import Transceiver

_XIE, _OURS, _CODE = "Xie et al. 2021", "our choice", "published code"


class DeepSC(Settings):
    """Settings of `deepsc`."""

    uses: int = setting(8, "complex channel uses a token", source=_CODE, ge=1)
    width: int = setting(128, "of the transformers", source=_XIE, ge=2)
    depth: int = setting(4, "layers of each transformer", source=_CODE, ge=1)
    heads: int = setting(8, "of attention", source=_XIE, ge=1)
    inner: int = setting(512, "width of the layers' inner part", source=_CODE, ge=1)
    dropout: float = setting(0.1, "share of activations left out in training", source=_CODE, ge=0, lt=1)
    steps: int = setting(20000, "training steps; the code makes 80 epochs", source=_OURS, ge=0)
    batch: int = setting(128, "frames a step", source=_CODE, ge=1)
    lr: float = setting(1e-4, "learning rate of Adam", source=_CODE, gt=0)
    weight_decay: float = setting(5e-4, "of Adam, added to the gradient", source=_CODE, ge=0)
    snr: tuple[float, float] = setting((5.0, 10.0), "between which training noise is drawn", source=_CODE, unit="dB")
    convention: Literal["deepsc", "esn0"] = setting(
        "deepsc", "what `snr` is: DeepSC's number, 3.01 dB below Es/N0, or Es/N0", source=_CODE
    )


@dataclass(frozen=True, eq=False)
class DeepSCLink:
    """Both ends, trained."""

    network: Transceiver

    def send(self, tokens: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Tokens [N, T] to symbols [N, T uses]; what stands before them is not used."""
        with torch.no_grad():
            return self.network.send(tokens)

    def receive(self, received: Received, length: int, contexts: Contexts | None = None) -> Decoded:
        """Word by word what the decoder finds likeliest; its own probability of the text is the posterior."""
        with torch.no_grad():
            heard = self.network.heard(_equalised(received))
            tokens = torch.zeros(len(heard), 0, dtype=torch.long, device=heard.device)
            score = torch.zeros(len(heard), device=heard.device)
            for _ in range(length):
                log_p = self.network.read(heard, self.network.after_start(tokens))[:, -1].log_softmax(-1)
                best, token = log_p.max(1)
                tokens, score = torch.cat([tokens, token[:, None]], dim=1), score + best
        return Decoded(tokens[:, None], score[:, None], score[:, None])


def deepsc(
    frames: Tensor | Sequence[Tensor],
    vocabulary: int,
    channel: Channel,
    settings: DeepSC | None = None,
    journal: Journal | None = None,
    seed: int = 0,
) -> DeepSCLink:
    """Train both ends on frames of tokens [n, T] over `channel`; of several lengths T, each in a tensor of its own."""
    from spolia.parts.transceiver import Transceiver

    s = settings or DeepSC()
    groups = [frames] if isinstance(frames, torch.Tensor) else list(frames)
    _check(groups, vocabulary, s)
    shape = {"width": s.width, "depth": s.depth, "heads": s.heads, "inner": s.inner, "dropout": s.dropout}
    start = torch.Generator().manual_seed(entropy(seed, "deepsc") % (1 << 63))
    network = Transceiver(vocabulary, s.uses, generator=start, **shape).to(groups[0].device)
    journal = journal or Journal()
    adam = torch.optim.Adam(network.parameters(), s.lr, (0.9, 0.98), weight_decay=s.weight_decay)
    network.train()
    with journal.phase("deepsc"):
        for step in journal.steps(s.steps, keep={"network": network, "adam": adam}, shared=True):
            loss = _loss(network, groups, channel, s, generator(seed, "deepsc", step), _dropout(seed, step))
            adam.zero_grad()
            loss.backward()
            share(list(network.parameters()), 1 / world()[1])
            adam.step()
            journal.log(loss=loss.detach())
    network.eval()
    return DeepSCLink(network)


def _dropout(seed: int, step: int) -> int:
    """What a process's dropout of a step is drawn from."""
    rank = world()[0]
    return entropy(seed, "dropout", step, *([rank] if rank else []))


def _loss(
    network: Transceiver, groups: list[Tensor], channel: Channel, s: DeepSC, rng: np.random.Generator, dropout: int
) -> Tensor:
    """Cross-entropy of a batch of one length, every frame at noise of its own; lengths come as often as their frames."""
    frames = groups[0]
    if len(groups) > 1:
        sizes = np.array([len(group) for group in groups])
        frames = groups[int(rng.choice(len(groups), p=sizes / sizes.sum()))]
    own = frames[torch.from_numpy(rng.integers(0, len(frames), s.batch)).to(frames.device)]
    low, high = (to_esn0(db, s.convention) for db in s.snr)
    n0 = n0_of(torch.from_numpy(rng.uniform(low, high, (s.batch, 1))).float().to(frames.device))
    with torch.random.fork_rng():  # dropout knows the global generator alone
        torch.manual_seed(dropout % (1 << 63))

        def read(part: tuple[Tensor, Tensor]) -> Tensor:
            sent, places = part
            symbols = network.send(sent)
            whole = symbols.new_zeros(s.batch, *symbols.shape[1:]).index_copy(0, places, symbols)
            received = channel.transmit(whole, n0, rng)  # noise of all frames, whoever sends them
            return network.read(network.heard(_equalised(received)[places]), network.after_start(sent[:, :-1]))

        logits = by_shares(read, (own, torch.arange(s.batch, device=own.device)))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten())


def _equalised(received: Received) -> Tensor:
    """The linear estimate of the symbols of least mean square error, but for the factor that noise alone would cost."""
    if received.gain is None:
        return received.y
    power = received.gain.real.square() + received.gain.imag.square()
    return received.gain.conj() * received.y / (power + received.n0)


def _check(groups: list[Tensor], vocabulary: int, s: DeepSC) -> None:
    if not groups:
        raise SpoliaError("there are no frames", where="deepsc", mend="give token ids [frames, length]")
    for frames in groups:
        if frames.dim() != 2 or frames.is_floating_point() or not frames.numel():
            what = f"frames are {list(frames.shape)}"
            raise SpoliaError(what, where="deepsc", mend="give token ids [frames, length]")
        if int(frames.max()) >= vocabulary:
            what = f"token {int(frames.max())} of {vocabulary}"
            raise SpoliaError(what, where="deepsc", mend="tokens are counted from 0")
    if s.width % s.heads:
        what = f"a width of {s.width} does not part into {s.heads} heads"
        raise SpoliaError(what, where="method.heads", mend="choose a number that divides the width")
    if s.snr[0] > s.snr[1]:
        raise SpoliaError(f"{s.snr[0]:g} to {s.snr[1]:g} dB", where="method.snr", mend="the lower first")

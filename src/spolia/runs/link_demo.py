"""A sentence through noise, and what each receiver reads of it: `spolia link demo "text"`.

All within a fresh installation: byte pairs and a trigram model learned in seconds from the language reference that comes with
Python, one Es/N0, and as many channel uses for all, but for eight that the first two, which send no check bits, do not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.data.prose import prose
from spolia.errors import SpoliaError
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.methods.link.separate import LMCompressor, TextCompressor, separate
from spolia.methods.link.source import Source, source_code
from spolia.parts.channel import Channel
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UniformPrior
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import index_labels, permuted_labels
from spolia.parts.textcode_tokens import train_bpe

if TYPE_CHECKING:
    from spolia.parts.link import Link
    from spolia.parts.textcode_tokens import Bpe

VOCABULARY, ORDER, LONGEST = 512, 3, 256  # tokens, of the model, of the text
ESN0_DB = 3.0


@dataclass(frozen=True)
class Read:
    """What one receiver makes of it. `confidence` is its own estimate; None where it has none."""

    receiver: str
    text: str
    right: bool
    confidence: float | None
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """The demonstration: the text, the noise, and all receivers."""

    text: str
    esn0_db: float
    uses: int
    tokens: int
    reads: list[Read]

    def __str__(self) -> str:
        width = max(len(read.receiver) for read in self.reads)
        head = f"{self.tokens} tokens in {self.uses} uses of a channel at {self.esn0_db:g} dB Es/N0 (BPSK)"
        lines = [head, "", f"{'sent':{width}}  {_plain(self.text)}", ""]
        for read in self.reads:
            mark = "right" if read.right else "wrong"
            sure = "" if read.confidence is None else f", sure to {read.confidence:.0%}"
            lines += [f"{read.receiver:{width}}  {_plain(read.text)}", f"{'':{width}}  {mark}{sure}{read.note}"]
        return "\n".join(lines)


def demo(text: str, esn0_db: float = ESN0_DB, seed: int = 0) -> Shown:
    """Send `text` once; SpoliaError where it is empty or longer than 256 tokens."""
    if not text.strip():
        raise SpoliaError("there is no text", where="link demo", mend='spolia link demo "a sentence"')
    parts = prose()
    train = "".join(parts.characters[i] for i in parts.train.tolist())
    bpe = train_bpe([train], VOCABULARY)
    plain = TextCode(bpe, index_labels(VOCABULARY), check_bits=0)
    tokens = plain.tokens(text)[None]
    if tokens.shape[1] > LONGEST:
        what = f"{tokens.shape[1]} tokens; a frame has at most {LONGEST}"
        raise SpoliaError(what, where="link demo", mend="send a shorter text")
    ngram = NGram.fit([bpe.encode(train)], vocabulary=VOCABULARY, order=ORDER)
    links = _links(plain, NGramPrior(ngram), bpe, train, seed)
    uses = max(int(link.send(tokens).shape[1]) for link in links.values())
    reads = [_read(name, link, text, plain, esn0_db, seed) for name, link in links.items()]
    return Shown(text, esn0_db, uses, tokens.shape[1], reads)


def _links(plain: TextCode, prior: NGramPrior, bpe: Bpe, train: str, seed: int) -> dict[str, Link]:
    bpsk, dense = constellation("bpsk"), constellation("16qam")
    better = TextCode(bpe, permuted_labels(VOCABULARY, generator(seed, "labels")), check_bits=8)
    huffman = TextCompressor(source_code(Source(kind="huffman"), [train]), bpe)
    return {
        "no model": llm_sc(UniformPrior(VOCABULARY), plain, bpsk, LLMSC(beam=1)),
        "LLM-SC, labels in order": llm_sc(prior, plain, bpsk),
        "LLM-SC, labels at random, 8 check bits": llm_sc(prior, better, bpsk, LLMSC(beam=64)),
        "model compresses, convolutional code": separate(LMCompressor(prior), bpsk, better.sent),
        "Huffman, convolutional code, 16-QAM": separate(huffman, dense, better.sent),
    }


def _read(name: str, link: Link, text: str, code: TextCode, esn0_db: float, seed: int) -> Read:
    tokens = code.tokens(text)[None]
    received = Channel().transmit(link.send(tokens), n0_of(esn0_db), generator(seed, "channel"))
    found = link.receive(received, tokens.shape[1])
    read = code.text(found.best[0]) if found.texts is None else found.texts[0]
    lost = found.passes is not None and not bool(found.passes[0])
    if lost and found.log_posterior is None:
        read = ""  # a frame whose check fails is dropped: what it would say is noise
    sure = None if found.log_posterior is None else float(found.confidence[0])
    note = "" if found.passes is None else ", the check fails" if lost else ", the check agrees"
    return Read(name, read, read == text, sure, note)


def _plain(text: str) -> str:
    """One line that steers no terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or "(nothing)"

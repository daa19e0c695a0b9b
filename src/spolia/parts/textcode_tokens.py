"""Tokenizers of a text code: text to dense token numbers 0 … V-1 and back, each of them a token that may be sent.

Specials, and rows of a model's output that stand for nothing, are no tokens: they would widen the labels (256 bytes and 2
specials need 9 bits) and take probability. A vocabulary of a language model is therefore renumbered; `model_ids` leads back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from spolia.errors import SpoliaError


class Tokenizer(Protocol):
    """What a text code asks of a tokenizer."""

    @property
    def size(self) -> int:
        """V, tokens that may be sent."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that do the same."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """The bytes of UTF-8; bytes that are no text decode to U+FFFD."""

    size = 256
    fingerprint = "utf-8"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Bpe:
    """Byte pairs merged by frequency (Sennrich et al. 2016, arXiv 1508.07909), over bytes: every text has an encoding.

    No specials; made by `train_bpe` or from its JSON, the format of the `tokenizers` package.
    """

    def __init__(self, text: str):
        self._tokenizer = _tokenizers().Tokenizer.from_str(text)

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens])


def train_bpe(texts: Iterable[str], size: int) -> Bpe:
    """A vocabulary of `size` tokens, the 256 bytes among them; fewer where the texts have no more pairs to merge.

    A power of two wastes no label.
    """
    if size < 256:
        raise SpoliaError(f"a vocabulary of {size}", where="size", mend="256 or more: every byte is a token")
    tokenizers = _tokenizers()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return Bpe(bpe.to_str())


class HfTokenizer:
    """A tokenizer of transformers, without its specials."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        specials = set(tokenizer.all_special_ids)
        self.model_ids = sorted(set(tokenizer.get_vocab().values()) - specials)
        """The model's own number of every token [V]."""
        self._dense = {own: token for token, own in enumerate(self.model_ids)}

    @property
    def size(self) -> int:
        return len(self.model_ids)

    @property
    def fingerprint(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        vocabulary = json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return _digest(vocabulary if backend is None else backend.to_str())

    def encode(self, text: str) -> list[int]:
        own = self._tokenizer.encode(text, add_special_tokens=False)
        for token in own:
            if token not in self._dense:
                spelt = self._tokenizer.convert_ids_to_tokens(token)
                mend = "leave it out of the text, or take a tokenizer that knows no such token"
                raise SpoliaError(f"the text holds {spelt!r}, a special token", where="text", mend=mend)
        return [self._dense[token] for token in own]

    def decode(self, tokens: Sequence[int]) -> str:
        own = [self.model_ids[token] for token in tokens]
        return self._tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        mend = "pip install 'spolia[llm]', or send bytes: ByteTokenizer()"
        raise SpoliaError(f"tokenizers cannot be imported: {error}", where="tokenizer", mend=mend) from None
    return tokenizers

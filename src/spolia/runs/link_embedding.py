"""How alike two texts are to a text encoder: the cosine of the means of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 64  # texts


class Similarity:
    """A model of transformers with its tokenizer; no code of its folder is run. A text is encoded once."""

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            mend = "a text encoder and its tokenizer, as transformers saves them"
            raise SpoliaError(f"cannot be opened: {error}", where=f"problem.embedding {folder}", mend=mend) from None
        self._tokenizer = cast("Any", tokenizer)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model, self._device = model.to(device).eval(), device
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """The cosine of each with its other; of texts that are the same, 1."""
        self._encode([text for text in dict.fromkeys([*texts, *others]) if text not in self._known])
        pairs = zip(texts, others, strict=True)
        return [1.0 if a == b else float(self._known[a] @ self._known[b]) for a, b in pairs]

    def _encode(self, texts: list[str]) -> None:
        for start in range(0, len(texts), _AT_ONCE):
            own = texts[start : start + _AT_ONCE]
            asked = self._tokenizer([text or " " for text in own], return_tensors="pt", padding=True, truncation=True)
            asked = {name: tensor.to(self._device) for name, tensor in asked.items() if name != "token_type_ids"}
            with torch.no_grad():
                states = self._model(**asked).last_hidden_state  # [n, length, width]
            there = asked["attention_mask"].unsqueeze(2).to(states.dtype)
            means = torch.nn.functional.normalize((states * there).sum(1) / there.sum(1).clamp(min=1), dim=1)
            self._known |= dict(zip(own, means.float().cpu(), strict=True))

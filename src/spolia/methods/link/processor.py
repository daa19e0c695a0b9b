"""The channel inside transformers' `generate`: its beam search becomes the receiver, in three lines.

    processor = ChannelProcessor(labels.scores(llrs), prompt=start.shape[1])
    read = model.generate(start, num_beams=8, logits_processor=[processor], **processor.arguments)
    text = tokenizer.decode(read[0, start.shape[1]:])

    score(x_1 … x_t) = sum_i alpha ln P(x_i | x_<i) + l_i(x_i),      l_i(v) = ln p(y_i | v) + a constant

`generate` hands processors log-softmax scores when it searches with beams, so what it then maximises is this sum and nothing
else, as long as nothing stops early and no penalty is asked for: `arguments` sees to that, and must be passed on. Without
beams (num_beams=1) the scores are plain logits, whose greedy choice is the same. Wang et al. 2024, arXiv 2407.14112, is the
receiver; methods/link/llm_sc is this package's own, with thresholds, several contexts and a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class ChannelProcessor:
    """`scores` [texts, length, V] (or [length, V]) are l of dense tokens; `tokens` their ids in the model's vocabulary.

    `prompt`: tokens that stand before the text, filling included. What has no dense token cannot be chosen, and the model's
    probabilities are those given that. `lm_weight` is alpha.
    """

    def __init__(self, scores: Tensor, *, prompt: int, tokens: Sequence[int] | None = None, lm_weight: float = 1.0):
        scores = scores if scores.dim() == 3 else scores[None]
        if scores.dim() != 3:
            what = f"scores are {list(scores.shape)}"
            raise SpoliaError(what, where="processor", mend="give [texts, length, vocabulary]")
        self.scores, self.prompt, self.lm_weight = scores, prompt, lm_weight
        self.tokens = None if tokens is None else torch.tensor(tokens, dtype=torch.long, device=scores.device)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `generate` must be told beside the number of beams."""
        length = self.scores.shape[1]
        fixed = {"do_sample": False, "min_new_tokens": None, "max_new_tokens": length, "min_length": 0}
        return {
            **fixed,
            "eos_token_id": None,
            "length_penalty": 0.0,
            "repetition_penalty": 1.0,
            "early_stopping": False,
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        texts, length, count = self.scores.shape
        at = input_ids.shape[1] - self.prompt
        if not 0 <= at < length or scores.shape[0] % texts:
            what = f"position {at} of {length}, {scores.shape[0]} rows for {texts} texts"
            raise SpoliaError(what, where="processor", mend="give the prompt's length, and one row of scores a text")
        own = slice(count) if self.tokens is None else self.tokens
        log_p = scores[:, own].float().log_softmax(-1)  # of log-probabilities: given that the token is one of these
        heard = self.scores[:, at].to(scores.device, torch.float32).repeat_interleave(scores.shape[0] // texts, 0)
        found = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        found[:, own] = self.lm_weight * log_p + heard
        return found

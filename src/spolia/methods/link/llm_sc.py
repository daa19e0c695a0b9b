"""LLM-SC: text over a noisy channel, decoded by what a language model finds likely.

For receivers with a causal language model, or an n-gram model, and transmitters that need only its tokenizer. Wang et al.,
Large Language Model Enabled Semantic Communication Systems, arXiv 2407.14112 (Applied Sciences 15(13), 7227, 2025). The
same receiver over bytes is known as CLM-MA; the search is the M-algorithm (methods/link/beam). Nothing is trained.

    x^ = argmax over x_1 … x_T:   sum_t ln p(y_t | x_t) + alpha ln P(x_t | context, x_<t)

| spec | here |
|---|---|
| c, the label of a token | `TextCode.labels` |
| l_t(v) = ln p(y_t | v) + constant | `labels.scores` of LLRs, or `symbol_scores` of whole symbols (`metric`) |
| B, alpha, Delta | `beam`, `lm_weight`, `threshold` |
| P | any parts/prior |

Data touched: none beyond the model's own training text. `lm_weight`, the labels and a calibration (methods/link/confidence)
are chosen on text that is neither that nor the test's.

Departures: of the paper only its abstract and the opening of its method could be read, so settings have no source there;
BPSK labels in index order are what we take for its transmitter. Check bits weigh every hypothesis of the list by their own
likelihood. `search: greedy` is a beam of one by drafts, `viterbi` exact where the prior is an n-gram of few tokens. The
posterior of the list is over-confident at low Es/N0, as the weight that the search dropped is reckoned only by its share at
the time: calibrate it before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core import trellis
from spolia.core.lazy import torch
from spolia.core.modulation import modulate
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.methods.link.beam import Found, Width, beam, greedy
from spolia.parts.link import Decoded
from spolia.parts.prior import NGramPrior

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation
    from spolia.methods.link.beam import Heard
    from spolia.parts.channel import Received
    from spolia.parts.prior import Contexts, Prior
    from spolia.parts.textcode import TextCode

    HeardBy = Callable[[int, slice], Tensor]
    """l_t of every token at place t, of the frames in a slice [n, V]."""

_OURS = "our choice"
_MEASURED = "our measurement: without check bits more than 16 buy nothing"
_HELD = 1 << 26  # scores of tokens that a greedy search or an exact one holds at once


class LLMSC(Settings):
    """Settings of `llm_sc`."""

    beam: int = setting(16, "hypotheses of a frame that go on", source=_MEASURED, ge=1)
    lm_weight: float = setting(1.0, "weight of the prior; 1 is the posterior", source="Bayes' rule", ge=0)
    threshold: float | None = setting(
        None,
        "hypotheses this far behind the best are dropped; 20 costs next to nothing",
        source=_OURS,
        unit="nats",
        gt=0,
    )
    metric: Literal["bit", "symbol"] = setting(
        "bit", "by LLRs of bits, exact for BPSK and QPSK, or by whole symbols, which need aligned labels", source=_OURS
    )
    search: Literal["beam", "greedy", "viterbi"] = setting(
        "beam", "beams; a beam of one in few passes; or exact, for n-gram priors of small vocabulary", source=_OURS
    )
    near: int = setting(256, "tokens nearest to what was heard that are looked at first", source=_OURS, ge=1)
    rows: int = setting(256, "hypotheses that the prior reads at once", source=_OURS, ge=1)


@dataclass(frozen=True, eq=False)
class LLMLink:
    """The transmitter, which does not know the prior, and the receiver that does."""

    prior: Prior
    code: TextCode
    constellation: Constellation
    settings: LLMSC

    def send(self, tokens: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Tokens [N, T] to symbols [N, n]; what stands before them does not matter here."""
        return modulate(self.code.bits(tokens), self.constellation)

    def receive(self, received: Received, length: int, contexts: Contexts | None = None) -> Decoded:
        """The likeliest texts of frames received.y [N, n], each after its context."""
        heard, checks = self._heard(received, length)
        frames = len(checks)
        contexts = [()] * frames if contexts is None else contexts
        if len(contexts) != frames:
            raise SpoliaError(f"{len(contexts)} contexts for {frames} frames", where="contexts", mend="one a frame")
        at_once = self._frames_at_once(length)
        parts = []
        for start in range(0, frames, at_once):
            own = slice(start, min(start + at_once, frames))
            parts.append(self._search(lambda t, own=own: heard(t, own), length, contexts[own]))
        found = _joined(parts)
        return self._weighed(found, checks)

    def _frames_at_once(self, length: int) -> int:
        if self.settings.search == "beam":
            return max(1, self.settings.rows // self.settings.beam)
        return max(1, min(self.settings.rows, _HELD // (length * self.prior.vocabulary)))

    def _heard(self, received: Received, length: int) -> tuple[HeardBy, Tensor]:
        """What was heard of tokens, and the LLRs of check bits [N, c]."""
        code, c = self.code, self.constellation
        split = code.heard(received.llrs(c).float(), length)
        if self.settings.metric == "bit":
            labels = code.labels.to(split.labels.device)
            return lambda t, own: labels.scores(split.labels[own, t]), split.checks
        table = code.symbol_table(c)
        s = table.shape[1]
        points = received.log_likelihoods(c).float()  # [N, n, 2^m]
        return lambda t, own: code.symbol_scores(points[own, t * s : (t + 1) * s], c), split.checks

    def _search(self, heard: Heard, length: int, contexts: Contexts) -> Found:
        s = self.settings
        if s.search == "beam":
            width = Width(s.beam, math.inf if s.threshold is None else s.threshold, s.near)
            return beam(heard, length, self.prior, contexts, s.lm_weight, width)
        if s.search == "greedy":
            return greedy(heard, length, self.prior, contexts, s.lm_weight)
        assert isinstance(self.prior, NGramPrior)
        return _exact(heard, length, self.prior, contexts, s.lm_weight)

    def _weighed(self, found: Found, checks: Tensor) -> Decoded:
        """The list with the likelihood of the check bits, in its new order."""
        code = self.code
        checked = found.scores + code.check_scores(found.tokens, checks)
        log_kept = found.log_kept.clamp(min=-50.0, max=-1e-7)
        dropped = torch.log(-torch.expm1(log_kept)) - log_kept  # over what stayed
        # check bits of texts that are not in the list are as good as random: the mean of exp of their score
        unknown = (checks.abs() / 2 + torch.log1p(torch.exp(-checks.abs())) - math.log(2)).sum(-1)
        outside = found.scores.logsumexp(1) + dropped + unknown
        order = checked.argsort(dim=1, descending=True, stable=True)
        scores = checked.gather(1, order)
        tokens = found.tokens.gather(1, order.unsqueeze(2).expand(found.tokens.shape))
        posterior = scores - torch.logaddexp(scores.logsumexp(1), outside)[:, None]
        passes = code.passes(tokens[:, 0], checks) if checks.shape[-1] else None
        places = tokens.shape[0] * tokens.shape[2]
        cost = {"passes of the prior": float(found.calls), "rows read a token": found.rows / places}
        return Decoded(tokens, scores, posterior, passes, cost=cost)


def llm_sc(prior: Prior, code: TextCode, constellation: Constellation, settings: LLMSC | None = None) -> LLMLink:
    """A link whose receiver knows `prior`, over the tokens of `code`."""
    settings = settings or LLMSC()
    if prior.vocabulary != code.tokenizer.size:
        what = f"the prior has {prior.vocabulary} tokens, the text code {code.tokenizer.size}"
        raise SpoliaError(what, where="llm_sc", mend="make both from one tokenizer: CausalPrior(model, tokens=its ids)")
    if settings.metric == "symbol":
        code.symbol_table(constellation)  # refuses labels that are not aligned
    if settings.search == "viterbi":
        if not isinstance(prior, NGramPrior):
            raise SpoliaError("viterbi needs an n-gram prior", where="search", mend="search: beam")
        trellis.histories(prior.vocabulary, prior.ngram.order - 1)  # refuses tables that do not fit
    return LLMLink(prior, code, constellation, settings)


def _exact(heard: Heard, length: int, prior: NGramPrior, contexts: Contexts, alpha: float) -> Found:
    """The likeliest text of every frame under an n-gram prior."""
    own = trellis.histories(prior.vocabulary, prior.ngram.order - 1).to(prior.device)
    table = prior.ngram.log_probs(own) * alpha
    scores = torch.stack([heard(t) for t in range(length)], dim=1)  # [N, T, V]
    table, first = table.to(scores.device), prior.history(contexts)
    found = [trellis.best_path(table, own, heard_here) for own, heard_here in zip(first, scores, strict=True)]
    tokens = torch.stack([path for path, _ in found])[:, None].to(scores.device)
    best = torch.stack([value for _, value in found])[:, None]
    return Found(tokens, best, torch.zeros_like(best[:, 0]), 0, 0)


def _joined(parts: Sequence[Found]) -> Found:
    """Groups of frames as one; lists of unequal length are filled up with their best text at -inf."""
    wide = max(part.scores.shape[1] for part in parts)
    tokens, scores = [], []
    for part in parts:
        missing = wide - part.scores.shape[1]
        tokens.append(torch.cat([part.tokens, part.tokens[:, :1].expand(-1, missing, -1)], dim=1))
        scores.append(torch.nn.functional.pad(part.scores, (0, missing), value=-math.inf))
    kept = torch.cat([part.log_kept for part in parts])
    rows, calls = sum(part.rows for part in parts), sum(part.calls for part in parts)
    return Found(torch.cat(tokens), torch.cat(scores), kept, rows, calls)

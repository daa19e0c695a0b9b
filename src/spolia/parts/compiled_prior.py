"""A causal model's next step as one compiled program, for simulations that take many of them.

torch.compile writes it for fixed numbers of rows and positions, with the matrix products that are quickest here; both are
therefore filled up to powers of two, and each pair of these is compiled once a process: half a minute or so. Weights stay what
they are at that moment. Its floats are those of the plain step up to rounding, and need not be the same in another process.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, cast

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.causal_prior import CausalPrior

_LEAST = 32  # positions
_SHAPES = 64  # pairs of rows and positions
_TUNED = {  # on a processor: weights laid out once for products of few rows, the quickest of two ways to multiply
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
}


def compiled_step(prior: CausalPrior) -> Any:
    """ids [rows, 1], cache, what is seen, positions -> ln P [rows, V]; without gradients. Compiled at its first calls."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch._inductor import select_algorithm

    def step(ids: Tensor, cache: Any, seen: Tensor | None, places: Tensor) -> Tensor:
        return prior.normalised(prior.logits(ids, **_asked(prior, cache, seen, places))[:, -1])

    cast("Any", select_algorithm).PRINT_AUTOTUNE = False
    made = dynamo.patch(recompile_limit=_SHAPES)(torch.compile(step, dynamic=False))
    if prior.device.type != "cpu":
        return made
    # around every call: freezing is asked for as torch traces, not as it compiles
    return inductor.patch({name: value for name, value in _TUNED.items() if hasattr(inductor, name)})(made)


class CompiledReading:
    """Rows of a model of transformers under its static cache; the first tokens are read as they are, steps compiled."""

    def __init__(self, prior: CausalPrior, rows: list[list[int]], ahead: int):
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

        from spolia.parts.causal_prior import filled

        ids, lengths = filled(rows, prior.device, left=True)
        self._prior, self._length = prior, ids.shape[1]
        self._positions = _filled_up(self._length + ahead - 1, _LEAST)
        self._blank = (self._length - lengths) if int(lengths.min()) < self._length else None  # on the left [rows]
        self._cache: Any = StaticCache(config=cast("Any", prior.model.config), max_cache_len=self._positions)
        # layers with a window count steps in Python, so that each would be compiled; the mask knows the window too
        self._cache.layers = [
            StaticLayer(self._positions) if isinstance(layer, StaticSlidingWindowLayer) else layer
            for layer in self._cache.layers
        ]
        at = torch.arange(self._length, device=prior.device)
        places = at.expand_as(ids) if self._blank is None else (at - self._blank[:, None]).clamp(min=0)
        with torch.no_grad():  # tensors of inference mode could not be written in a step
            logits = prior.logits(ids, **_asked(prior, self._cache, self._seen(), places))
        if not all(hasattr(layer, "keys") and hasattr(layer, "cumulative_length") for layer in self._cache.layers):
            what = "the model keeps other things than keys and values, or transformers keeps them in another form"
            raise SpoliaError(what, where="compiled", mend="upgrade transformers, or leave `compiled` out")
        self.log_probs = prior.normalised(logits[:, -1])
        # transformers marks what it made as never to move, and freezing takes that for constant: copies bear no mark
        everyone = torch.arange(len(ids), device=prior.device)
        self._cache.layers = [_chosen(layer, everyone, same=False) for layer in self._cache.layers]

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        count = len(parents)
        room = _filled_up(count)
        if room > count:  # rows of filling go on with the first one's text
            parents, tokens = (torch.cat([x, x[:1].expand(room - count)]) for x in (parents, tokens))
        self._choose(parents)
        places = self._length - (self._blank if self._blank is not None else torch.zeros_like(parents))
        asked = (self._prior.ids(tokens)[:, None].clone(), self._cache, self._seen(), places[:, None])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own, as it compiles
            try:
                found = self._prior.compiled(*asked)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                what = f"the step cannot be compiled: {str(error).splitlines()[0]}"
                mend = "install a C++ compiler, or leave `compiled` out"
                raise SpoliaError(what, where="compiled", mend=mend) from error
        self._length += 1
        self.log_probs = found[:count]
        return self.log_probs

    def _choose(self, parents: Tensor) -> None:
        if self._blank is not None:
            self._blank = self._blank[parents]
        rows = self._cache.layers[0].keys.shape[0]
        if len(parents) == rows and torch.equal(parents, torch.arange(rows, device=parents.device)):
            return
        same = len(parents) == rows
        self._cache = self._cache if same else copy.copy(self._cache)
        self._cache.layers = [_chosen(layer, parents, same) for layer in self._cache.layers]

    def _seen(self) -> Tensor | None:
        """Where there is text [rows, positions]; what has not been read yet is hidden by the model itself."""
        if self._blank is None:
            return None
        return (torch.arange(self._positions, device=self._blank.device) >= self._blank[:, None]).long()


def _asked(prior: CausalPrior, cache: Any, seen: Tensor | None, places: Tensor) -> dict[str, Any]:
    asked: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if prior.takes("logits_to_keep"):
        asked["logits_to_keep"] = 1
    if seen is not None:
        asked["attention_mask"] = seen
    if prior.takes("position_ids"):
        asked["position_ids"] = places
    return asked


def _chosen(layer: Any, parents: Tensor, same: bool) -> Any:
    """The layer's rows `parents`: in place where their number stays."""
    keys, values = layer.keys.index_select(0, parents), layer.values.index_select(0, parents)
    if same:
        layer.keys.copy_(keys)
        layer.values.copy_(values)
        return layer
    other = copy.copy(layer)
    other.keys, other.values, other.batch_size = keys, values, len(parents)
    other.cumulative_length = layer.cumulative_length.clone()
    return other


def _filled_up(count: int, least: int = 1) -> int:
    return max(least, 1 << (count - 1).bit_length())

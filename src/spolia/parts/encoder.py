"""Encoder: a frozen transformer whose blocks can be given prompts from outside.

    encoder = Encoder(module)                        # zoo/encoders.py opens names, folders, and models of transformers or timm
    encoder.features(x)                              # [n, width]
    encoder.features(x, Prompts(tokens={0: p}))      # p [n, prompts, width] goes through the first block beside x

The module runs as it is; prompts enter by hooks on its blocks, so no architecture is known here. What it must have: a list of
equal blocks that take tokens [n, tokens, width] first, and positions that are added before them. Its parameters are frozen, it
is put into eval mode, and it is held once: learners on one encoder share it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.parts.network import moved

if TYPE_CHECKING:
    from torch import Tensor, nn

    Feature = Callable[[nn.Module, Any], Tensor]  # module, inputs -> [n, width]

_ASIDE = "pooler."  # a layer that transformers draws anew where the file has none; no feature is read from it
_TURNED = ("position_embeddings", "rope", "rotary_pos_emb")  # positions told to every block: a prompt has none


@dataclass(frozen=True)
class Prompts:
    """What goes into the blocks beside the input's own tokens, by block 0 … depth - 1.

    `start` [n, p, width]: before the first block, and along to the last one (L2P). `tokens` [n, p, width]: into this block,
    and left behind after it (deep prompts). `prefixes`: keys and values [n, p, width] of its attention. Without n: the same
    for all inputs.
    """

    start: Tensor | None = None
    tokens: Mapping[int, Tensor] = field(default_factory=dict)
    prefixes: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


NONE = Prompts()


def first_token(module: nn.Module, x: Any) -> Tensor:
    """The feature [n, width]: the first token's last state, or what the module returns where it returns one vector each."""
    made = module(**x) if isinstance(x, Mapping) else module(x)
    if not torch.is_tensor(made):
        made = made.last_hidden_state
    return made[:, 0] if made.dim() == 3 else made


def mean_token(module: nn.Module, x: Any) -> Tensor:
    """The mean over tokens, of a mapping with `attention_mask` over those it shows."""
    made = module(**x) if isinstance(x, Mapping) else module(x)
    made = made if torch.is_tensor(made) else made.last_hidden_state
    if not isinstance(x, Mapping) or "attention_mask" not in x:
        return made.mean(1)
    shown = x["attention_mask"].unsqueeze(2).to(made.dtype)
    return (made * shown).sum(1) / shown.sum(1)


class Encoder:
    """`blocks`: by default the largest list of equal modules. `feature`: what is read of the module's outputs."""

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[nn.Module] | None = None,
        feature: Feature = first_token,
        width: int | None = None,
    ):
        self.module, self.feature = module.requires_grad_(False).eval(), feature
        self.blocks = list(blocks) if blocks is not None else blocks_of(module)
        self.depth, self.width = len(self.blocks), width or _width(self.blocks[0])
        self._tokens = 0  # of the input at hand

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def features(self, x: Any, prompts: Prompts = NONE) -> Tensor:
        """[n, width] in fp32, differentiable in the prompts alone."""
        used = {*prompts.tokens, *prompts.prefixes}
        if used and not 0 <= min(used) <= max(used) < self.depth:
            what = f"prompts for block {max(used)} of {self.depth}"
            raise SpoliaError(what, where="prompts", mend="name blocks that are there; the first is 0")
        with self._prompted(prompts):
            return self.feature(self.module, moved(x, self.device)).float()

    def plain(self, x: Any) -> Tensor:
        """Features without prompts and without a graph."""
        with torch.no_grad():
            return self.features(x)

    def mark(self) -> str:
        """A checksum of the weights, by which prompts know the encoder they were learned on."""
        total = 0
        for name, tensor in sorted(self.module.state_dict().items()):
            if name.startswith(_ASIDE):
                continue
            total = zlib.crc32(name.encode(), total)
            total = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), total)
        return f"{total:08x}"

    # --- hooks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _prompted(self, prompts: Prompts) -> Iterator[None]:
        """Inside, the blocks see these prompts."""
        if prompts.start is None and not prompts.tokens and not prompts.prefixes:
            yield
            return
        from spolia.core.attention import Prefixed

        handles: list[Any] = []
        inside = Prefixed()
        for place, block in enumerate(self.blocks):
            if prompts.start is not None or place in prompts.tokens or place in prompts.prefixes:
                before = _Before(self, inside, prompts, place)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(_After(self, inside, prompts, place)))
        try:
            with inside:
                yield
        finally:
            for handle in handles:
                handle.remove()
        if inside.met < len(prompts.prefixes):
            what = f"prefixes reached {inside.met} of {len(prompts.prefixes)} blocks"
            mend = "its attention has to be torch's: load it with attn_implementation='sdpa'"
            raise SpoliaError(what, where=type(self.module).__name__, mend=mend)


@dataclass(frozen=True)
class _Before:
    """Adds prompts to a block's tokens, and to its mask the right to see them."""

    encoder: Encoder
    inside: Any
    prompts: Prompts
    place: int

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not torch.is_tensor(hidden) or hidden.dim() != 3 or any(kwargs.get(name) is not None for name in _TURNED):
            what = f"block {self.place}, a {type(block).__name__}, does not take plain tokens [n, tokens, width]"
            raise SpoliaError(what, where="encoder", mend="give an encoder like ViT or BERT, or blocks=")
        if self.place == 0 or self.prompts.start is None:
            self.encoder._tokens = hidden.shape[1]
        self.inside.now = self.prompts.prefixes.get(self.place)
        more = [self.prompts.start] if self.place == 0 and self.prompts.start is not None else []
        more += [self.prompts.tokens[self.place]] if self.place in self.prompts.tokens else []
        joined = torch.cat([hidden, *(_each(p, hidden) for p in more)], 1)
        seen = self.encoder._tokens
        args = tuple(_widened(a, seen, joined.shape[1]) for a in args[1:])
        kwargs = {name: _widened(value, seen, joined.shape[1]) for name, value in kwargs.items()}
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": joined}
        return (joined, *args), kwargs


@dataclass(frozen=True)
class _After:
    """Takes away what was this block's alone; after the last block everything that is not the input's."""

    encoder: Encoder
    inside: Any
    prompts: Prompts
    place: int

    def __call__(self, block: nn.Module, args: Any, made: Any) -> Any:
        self.inside.now = None
        hidden = made[0] if isinstance(made, tuple) else made
        stay = hidden.shape[1] - (self.prompts.tokens[self.place].shape[-2] if self.place in self.prompts.tokens else 0)
        if self.place == self.encoder.depth - 1:
            stay = self.encoder._tokens
        return (hidden[:, :stay], *made[1:]) if isinstance(made, tuple) else hidden[:, :stay]


def _each(prompt: Tensor, hidden: Tensor) -> Tensor:
    """[p, width] or [n, p, width] as [n, p, width] in the type of the tokens."""
    return prompt.to(hidden.dtype).expand(len(hidden), -1, -1)


def _widened(value: Any, tokens: int, total: int) -> Any:
    """An attention mask [n, 1, queries, tokens] for `total` tokens, the last ones seen by all; anything else as it is."""
    if not torch.is_tensor(value) or value.dim() != 4 or value.shape[3] != tokens or total == tokens:
        return value
    rows = total - tokens if value.shape[2] == tokens else 0
    own = torch.nn.functional.pad(value, (0, total - tokens), value=value.dtype == torch.bool)
    last = own[:, :, -1:].expand(-1, -1, rows, -1)  # a prompt looks where the last token looks
    return torch.cat([own, last], 2)


# --- what is there ---------------------------------------------------------------------------------------------------


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: of all lists of equal modules the one with the most parameters."""
    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential) and len(m)]
    equal = [m for m in lists if len({type(child) for child in m}) == 1 and any(True for _ in m[0].children())]
    if not equal:
        what = f"no list of equal blocks in a {type(module).__name__}"
        raise SpoliaError(what, where="encoder", mend="give blocks=, in the order in which they run")
    return list(max(equal, key=lambda m: sum(p.numel() for p in m.parameters())))


def _width(block: nn.Module) -> int:
    for part in block.modules():
        shape = getattr(part, "normalized_shape", None)
        if shape:
            return int(shape[0])
    raise SpoliaError("the width of its tokens is not known", where="encoder", mend="give width=")

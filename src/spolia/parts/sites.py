"""Sites: places in a network where a hidden state can be read or replaced, found by names and one dry run.

A site is the output of a module, or of the network itself. Its state is [inputs, width], [inputs, tokens, width] or a
feature map [inputs, channels, height, width]; which axis holds the channels is seen in the dry run, never assumed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.network import Network

if TYPE_CHECKING:
    from torch import Tensor, nn

    Edit = Callable[[int, Tensor], Tensor]  # (number of the site, its state) -> the state that takes its place

BLOCKS, LAST = "blocks", "last"


@dataclass(frozen=True)
class Site:
    """The output of module `name` (empty: of the network), `width` channels along `axis`, inputs along `inputs`.

    `entry`: what the module is fed instead, where a head stands in some models and nothing in others.
    """

    name: str
    width: int
    axis: int = -1
    inputs: int = 0
    entry: bool = False

    @property
    def label(self) -> str:
        return self.name or "features"

    def tokens(self, state: Tensor) -> Tensor:
        """The state as [inputs, tokens, width]; one token where it has no more axes."""
        moved = state.movedim(self.axis, -1) if self.axis != -1 else state
        moved = moved.movedim(self.inputs, 0) if self.inputs else moved
        return moved.unsqueeze(1) if moved.dim() == 2 else moved.flatten(1, -2)


def find_sites(network: Network, batch: Any, where: str, last: str = "") -> list[Site]:
    """The sites that `where` asks for, in the order in which they run; the final feature comes last.

    `where`: `last` for the final feature alone; `blocks` for every block, found in the usual encoders; else a regular
    expression that module names must match as a whole. `last` names the module that gives the final feature, empty for
    the network's outputs. Runs the network on `batch` once.
    """
    modules = dict(network.module.named_modules())
    if last and last not in modules:
        raise SpoliaError(f"there is no module `{last}`", where="last", mend=did_you_mean(last, modules))
    seen, made, count = _dry_run(network, batch)
    end = Site("", made.shape[-1])
    if last in seen:
        end = Site(last, *_layout(seen[last][0], count, modules[last]), isinstance(modules[last], torch.nn.Identity))
    if last and last not in seen:
        raise SpoliaError(f"`{last}` does not run, or gives no tensor", where="last", mend="name a module that does")
    if where == LAST:
        return [end]
    names = _blocks(network.module, seen) if where == BLOCKS else _matching(modules, seen, where)
    order = list(seen)
    names = sorted((name for name in names if name != last), key=order.index)
    return [*(Site(name, *_layout(seen[name][0], count, modules[name])) for name in names), end]


# --- running through sites -------------------------------------------------------------------------------------------


@contextmanager
def hooked(module: nn.Module, sites: Sequence[Site], edit: Edit) -> Iterator[None]:
    """Inside, `edit` replaces the state of every named site whenever the module runs."""
    handles = hooks(module, sites, edit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks(module: nn.Module, sites: Sequence[Site], edit: Edit) -> list[Any]:
    """Forward hooks for the named sites; each can be removed."""

    def hook(number: int) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda _module, _inputs, output: replaced(output, edit(number, state_in(output)))

    def before(number: int) -> Callable[[nn.Module, Any], Any]:
        return lambda _module, inputs: replaced(inputs, edit(number, inputs[0]))

    handles = []
    for i, site in enumerate(sites):
        if site.name:
            owner = module.get_submodule(site.name)
            put = owner.register_forward_pre_hook(before(i)) if site.entry else owner.register_forward_hook(hook(i))
            handles.append(put)
    return handles


def run_through(network: Network, batch: Any, sites: Sequence[Site], edit: Edit) -> Tensor:
    """The network's features with `edit` applied at every site."""
    with hooked(network.module, sites, edit):
        made = network.features(batch)
    return made if sites[-1].name else edit(len(sites) - 1, made)


def state_in(output: Any) -> Any:
    """The state in what a module returns: itself, or the first entry."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, tuple | list) and output:
        return output[0]
    if isinstance(output, Mapping) and output:
        return next(iter(output.values()))
    return None


def replaced(output: Any, state: Tensor) -> Any:
    """What the module returned, with `state` in the place of its own."""
    if torch.is_tensor(output):
        return state
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[next(iter(output))] = state  # type: ignore[index]
        return changed
    rest = tuple(output[1:])
    named = hasattr(output, "_fields")
    return type(output)(state, *rest) if named else type(output)((state, *rest))


# --- finding them ----------------------------------------------------------------------------------------------------


def _dry_run(network: Network, batch: Any) -> tuple[dict[str, list[Any]], Tensor, int]:
    """States of every module that gives one, by name in the order they end; the features; the number of inputs."""
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            state = state_in(output)
            if torch.is_tensor(state) and state.is_floating_point() and state.dim() >= 2:
                seen.setdefault(name, []).append(torch.empty(state.shape, device="meta"))

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in network.module.named_modules() if name]
    try:
        with torch.no_grad():
            made = network.features(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen, made, count_of(batch)


def count_of(batch: Any) -> int:
    """How many inputs a batch holds."""
    if isinstance(batch, Mapping):
        return len(next(iter(batch.values())))
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


def _layout(state: Tensor, count: int, module: nn.Module) -> tuple[int, int, int]:
    """Width, axis of the channels and axis of the inputs of a state."""
    inputs = 1 if state.dim() == 3 and state.shape[0] != count and state.shape[1] == count else 0
    axis = 1 if state.dim() >= 4 and not _channels_last(state, module) else -1
    return state.shape[axis], axis, inputs


def _channels_last(state: Tensor, module: nn.Module) -> bool:
    """A feature map whose module normalises its last axis and has no convolution that writes to its second."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.LayerNorm)]
    writers = [m for m in module.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    last = any(tuple(norm.normalized_shape) == tuple(state.shape[-1:]) for norm in norms)
    return last and not any(conv.out_channels == state.shape[1] for conv in writers)


def _blocks(module: nn.Module, seen: Mapping[str, list[Any]]) -> list[str]:
    """Numbered siblings of one class, each run once: encoder layers, residual stages. The outermost ones."""
    found: list[str] = []
    for name, parent in module.named_modules():
        if any(name == block or name.startswith(block + ".") for block in found):
            continue
        groups: dict[tuple[str, type], list[str]] = {}
        for own, child in parent.named_children():
            path = f"{name}.{own}" if name else own
            numbered = re.fullmatch(r"(.*?)(\d+)", own)
            whole = isinstance(child, torch.nn.Identity) or next(child.children(), None) is not None
            if numbered and whole and len(seen.get(path, ())) == 1:
                groups.setdefault((numbered[1], type(child)), []).append(path)
        least = 1 if isinstance(parent, torch.nn.ModuleList) else 2
        for group in groups.values():
            found += group if len(group) >= least else []
    if not found:
        mend = "name them by a regular expression of module names, such as `encoder\\.layer\\.\\d+`"
        raise SpoliaError(f"no blocks are found in {type(module).__name__}", where="sites", mend=mend)
    return found


def _matching(modules: Mapping[str, nn.Module], seen: Mapping[str, list[Any]], pattern: str) -> list[str]:
    try:
        rule = re.compile(pattern)
    except re.error as error:
        mend = "write last, blocks, or a regular expression of module names"
        raise SpoliaError(f"`{pattern}` is no regular expression: {error}", where="sites", mend=mend) from None
    names = [name for name in modules if name and rule.fullmatch(name)]
    if not names:
        raise SpoliaError(
            f"no module is called `{pattern}`", where="sites", mend=did_you_mean(pattern, list(modules)[1:])
        )
    for name in names:
        times = len(seen.get(name, ()))
        if times != 1:
            what = f"module `{name}` " + (f"runs {times} times" if times else "does not run, or gives no tensor")
            raise SpoliaError(what, where="sites", mend="choose modules that run once and give one tensor")
    return names

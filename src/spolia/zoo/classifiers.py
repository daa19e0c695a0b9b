"""Image classifiers from checkpoints: the architecture from a config or a function of yours, tensors from the file, no code.

Known by `model_type`: spolia_conv2, spolia_conv4, spolia_resnet_cifar, spolia_resnet_small, and whatever transformers has.
What a config leaves out (classes, size, channels) follows from the tensors or from what the caller knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spolia.core.checkpoint import read_config, read_tensors
from spolia.core.pickled import has_pickles, read_state_dict
from spolia.errors import SpoliaError
from spolia.zoo import conv2, conv4, resnet, resnet10

_MOST = 5  # names told in an error


def classifier(
    path: Path,
    name: str,
    *,
    shape: tuple[int, int, int],
    config: Mapping[str, Any] | None = None,
    build: Callable[[str], nn.Module] | None = None,
) -> nn.Module:
    """The classifier whose tensors stand at `path`, a folder or one file, for images of `shape`; in eval mode.

    `build(name)`, where given, makes the module, else `config` or config.json says which. Pickles are read for tensors
    alone. SpoliaError names the tensors that do not fit.
    """
    tensors = read_state_dict(path)[0] if has_pickles(path) else read_tensors(path)
    if build is not None:
        module = build(name)
        if not isinstance(module, nn.Module):
            raise SpoliaError(f"made a {type(module).__name__}", where=f"build({name!r})", mend="return an nn.Module")
        return _filled(module, tensors, name)
    told = dict(config or read_config(path) or {})
    if not told:
        mend = "say `network: {model_type: …}`, put its config.json beside it, or give `build`"
        raise SpoliaError("its architecture is not known: there is no config.json", where=str(path), mend=mend)
    return _filled(_built(told, tensors, shape, name), tensors, name)


def _built(told: dict[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int, int], name: str) -> nn.Module:
    """The module that a config describes, with what it leaves out read off the tensors."""
    kind, draws = told.get("model_type"), torch.Generator().manual_seed(0)
    if kind == resnet.MODEL_TYPE:
        return resnet.fitting(tensors, name)
    heads = [t.shape[0] for t in tensors.values() if t.dim() == 2]
    classes = int(told.get("num_labels") or (heads[-1] if heads else 2))
    channels, size = int(told.get("num_channels", shape[0])), int(told.get("image_size", shape[1]))
    try:
        if kind == conv4.MODEL_TYPE:
            width, norm = int(told.get("hidden_size", 64)), told.get("norm", "batch")
            return conv4.Conv4(classes, channels=channels, width=width, size=size, norm=norm, generator=draws)
        if kind == conv2.MODEL_TYPE:
            width = int(told.get("hidden_size", 24))
            return conv2.Conv2(classes, channels=channels, width=width, size=size, generator=draws)
        if kind == resnet10.MODEL_TYPE:
            depth, width = int(told.get("depth", 10)), int(told.get("width", 64))
            return resnet10.SmallResNet(depth, width, classes, channels=channels, generator=draws)
    except (TypeError, ValueError) as error:
        raise SpoliaError(f"its config makes no network: {error}", where=name, mend="restore its config.json") from None
    from spolia.zoo.hf import build

    return build(told, name)


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """The module with these tensors. Counters of batch norms may be missing."""
    own = module.state_dict()
    needed = [n for n in own if not n.endswith("num_batches_tracked")]
    lost = [n for n in needed if n not in tensors]
    more = [n for n in tensors if n not in own]
    unlike = [n for n in needed if n in tensors and tensors[n].shape != own[n].shape]
    if unlike:
        n = unlike[0]
        what = f"`{n}` is {list(tensors[n].shape)}, its architecture has {list(own[n].shape)}{_count(unlike)}"
        raise SpoliaError(what, where=name, mend="give the width, size and channels that it was trained with")
    if lost or more:
        parts = [
            f"{word} {', '.join(names[:_MOST])}{_count(names, _MOST)}"
            for word, names in (("lacks", lost), ("has", more))
            if names
        ]
        what = f"its tensors are not those of {type(module).__name__}: {'; '.join(parts)}"
        raise SpoliaError(what, where=name, mend="name its own architecture")
    module.load_state_dict({n: tensors.get(n, t).to(t.dtype) for n, t in own.items()})
    return module.eval()


def _count(names: list[str], told: int = 1) -> str:
    return f" and {len(names) - told} more" if len(names) > told else ""

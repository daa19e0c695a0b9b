"""Models of transformers as a network and a pool: the architecture from a config, tensors by the module's names, heads apart.

No code of a model's folder is run: the architecture is one of transformers' own, or of this package. Weights stay in their
files and are read under the names that the module gives them; where loading does more than rename (fused experts), they are
loaded whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spolia.errors import Problems, SpoliaError
from spolia.parts.align import align
from spolia.parts.expert import Expert, ExpertPool, MemoryWeights, Weights
from spolia.parts.network import Network, outputs_of
from spolia.parts.renamed import Renamed, read
from spolia.zoo import mlp, vit
from spolia.zoo.heads import filled, head_of, part, slots_of

_LAYER = re.compile(r"\.\d+\.")
_SAID = ("id2label", "label2id", "num_labels", "problem_type")  # of a config: what belongs to a head


@dataclass(frozen=True)
class Opened:
    """A pool whose tensors have the module's names and no heads, and the network that runs it under every task's head.

    `slot`: the module whose input is the final feature, empty where the outputs are. `heads`: the tensors of each task's
    head by the whole model's names; `configs`: each expert's config.
    """

    pool: ExpertPool
    network: Network
    slot: str
    heads: Mapping[str, Mapping[str, Tensor]]
    configs: Mapping[str, Mapping[str, Any]]

    def fresh(self) -> ExpertPool:
        """The pool again: who merges may leave the base aside."""
        return replace(self.pool, experts=list(self.pool.experts))


def open_pool(
    pool: ExpertPool,
    batch: Any,
    heads: Literal["merged"] | Sequence[str] | None = None,
    files: Mapping[str, Path] | None = None,
    told: Mapping[str, Any] | None = None,
) -> Opened:
    """The experts of `pool` under one module. `batch`: a few inputs of the first, on which the split is tried.

    `heads` as in a recipe; `files`: heads of tasks that come in files; `told`: the config of models that have none.
    """
    first = pool.experts[0]
    config = dict(told or first.weights.config or {})
    if not config:
        mend = "put its config.json there, or say it in the recipe: pool: {network: {model_type: …}}"
        raise SpoliaError("has no config.json, so its architecture is not known", where=first.name, mend=mend)
    module = build(config, first.name)
    seen = {model.name: _seen(model, module, config) for model in pool.models}
    shapes = [{n: w.entries[n].shape for n in w.entries} for w in (seen[e.name] for e in pool.experts)]
    slots = slots_of(module, shapes, heads)
    parts, files = {name: module.get_submodule(name) for name in slots}, dict(files or {})
    parted = part(module, slots, batch) if slots else None
    made, kept = dict[str, nn.Module](), dict[str, dict[str, Tensor]]()
    problems = Problems()
    for expert in pool.experts:
        try:
            if expert.name in files:
                made[expert.name] = head_of(files[expert.name], expert.name)
                kept[expert.name] = dict(made[expert.name].state_dict())
            elif parted is not None:
                ordered = {name: parts[name] for name in parted.slots}
                kept[expert.name] = _head(seen[expert.name], ordered)
                made[expert.name] = parted.joined(filled(ordered, kept[expert.name], expert.name))
        except SpoliaError as error:
            problems.errors.extend(error.problems)
    problems.raise_if_any()
    inside = set(module.state_dict())
    experts = [Expert(e.name, _without(seen[e.name], inside, bool(made)), e.task) for e in pool.experts]
    base = Expert(pool.base.name, _without(seen[pool.base.name], inside, bool(made))) if pool.base is not None else None
    outputs = parted.outputs if parted is not None else outputs_of
    configs = {e.name: dict(told or e.weights.config or {}) for e in pool.experts}
    slot = parted.slots[0] if parted is not None else ""
    return Opened(ExpertPool(experts, base, steps=pool.steps), Network(module, made, outputs), slot, kept, configs)


def beside(opened: Opened, model: Expert) -> Expert:
    """Another model as the pool holds its own: by the module's names, without a head. SpoliaError where it does not fit."""
    module, problems = opened.network.module, Problems()
    found = Expert(
        model.name, _without(_seen(model, module, {}), set(module.state_dict()), bool(opened.heads)), model.task
    )
    align(ExpertPool([opened.pool.experts[0], found]), problems)
    problems.raise_if_any()
    return found


def _head(weights: Weights, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of an expert's head, those that it has."""
    wanted = [f"{slot}.{name}" for slot, module in parts.items() for name in module.state_dict()]
    with weights.opened():
        return {name: read(weights, name) for name in wanted if name in weights.entries}


def _without(weights: Renamed, inside: set[str], headless: bool) -> Renamed:
    """What the encoder holds; its config then says nothing of a head."""
    config = weights.config
    if headless and config is not None:
        config = {key: value for key, value in config.items() if key not in _SAID}
    return Renamed(weights.inner, {n: own for n, own in weights.names.items() if n in inside}, config)


# --- architectures ---------------------------------------------------------------------------------------------------


def build(config: Mapping[str, Any], who: str = "") -> nn.Module:
    """The module that `config` describes, in fp32 and for use. SpoliaError for what is not known."""
    kind = str(config.get("model_type", ""))
    draws = torch.Generator().manual_seed(0)
    if kind == mlp.MODEL_TYPE:
        return mlp.ResidualMLP(config["width"], config["depth"], generator=draws).eval()
    if kind == vit.MODEL_TYPE:
        keys = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        size, patch, width, depth, heads = (config[key] for key in keys)
        return vit.ViT(size, patch, width, depth, heads, pool=config["pool"], generator=draws).eval()
    try:
        import transformers as hf
        from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
    except ImportError:
        what = "its architecture is one of transformers, which is not installed"
        raise SpoliaError(what, where=who, mend="pip install 'spolia[llm]'") from None
    if kind not in CONFIG_MAPPING:
        what = f"transformers knows no architecture `{kind}`" if kind else "its config says no model_type"
        raise SpoliaError(
            what, where=who, mend="code that comes with a model is not run: call spolia.merge with a Network"
        )
    fields = {
        key: value for key, value in config.items() if key not in ("auto_map", "model_type", "transformers_version")
    }
    named = str((config.get("architectures") or [""])[0])
    own = getattr(hf, named, None)
    try:
        made = CONFIG_MAPPING[kind].from_dict(fields)
        with torch.random.fork_rng(devices=[]):  # its start is drawn from the global generator
            if named == "CLIPModel":  # merging papers fine-tune and merge the image tower
                sight = made.vision_config
                sight.projection_dim = made.projection_dim
                module = hf.CLIPVisionModelWithProjection(sight)
            elif isinstance(own, type) and issubclass(own, PreTrainedModel):
                module = own(made)
            else:
                module = AutoModel.from_config(made, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise SpoliaError(f"its config makes no model: {said}", where=who, mend="restore its config.json") from None
    return module.float().eval()


# --- names -----------------------------------------------------------------------------------------------------------


def _seen(model: Expert, module: nn.Module, config: Mapping[str, Any]) -> Renamed:
    """A model's weights under the module's names."""
    weights = model.weights
    names = module_names(module, weights.entries)
    if names is None:
        weights = _loaded(model, module)
        names = {name: name for name in weights.entries}
    taken = set(names.values())
    rest = [name for name in weights.entries if name not in taken]
    alike = {_LAYER.sub(".", name) for name in taken}
    deeper = [name for name in rest if _LAYER.sub(".", name) in alike]
    if deeper:
        what = f"has tensor `{deeper[0]}`, for which {type(module).__name__} of the first expert's config has no layer"
        raise SpoliaError(what, where=model.name, mend="merge only models of one architecture and depth")
    return Renamed(weights, names, model.weights.config or dict(config))


def module_names(module: nn.Module, names: Iterable[str]) -> dict[str, str] | None:
    """The module's name of each tensor, and the one it has in the files; what the module has no place for is left out.

    None where loading would do more than rename.
    """
    own, names = module.state_dict(), list(names)
    if not hasattr(module, "base_model_prefix") or all(name in own for name in names):
        return {name: name for name in names if name in own}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # of another release
        return None
    steps: Any = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renaming = [step for step in steps if isinstance(step, WeightRenaming)]
    converting = [step for step in steps if isinstance(step, WeightConverter)]
    found = {}
    for name in names:
        new, converter = rename_source_key(name, renaming, converting, str(module.base_model_prefix), dict(own))
        if converter is not None:
            return None
        if new in own:
            found[new] = name
    return found


def _loaded(model: Expert, module: nn.Module) -> MemoryWeights:
    """All weights, as transformers loads them."""
    if model.weights.checkpoint is None or not hasattr(type(module), "from_pretrained"):
        mend = "give the folder that save_pretrained wrote"
        raise SpoliaError("its tensors' names are not the module's", where=model.name, mend=mend)
    whole: Any = type(module).from_pretrained(  # type: ignore[attr-defined]
        model.weights.checkpoint.folder, trust_remote_code=False, local_files_only=True, dtype="auto"
    )
    loaded = MemoryWeights(copy.copy(whole.state_dict()))
    loaded.checkpoint, loaded.config = model.weights.checkpoint, model.weights.config
    return loaded

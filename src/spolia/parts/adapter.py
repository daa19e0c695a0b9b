"""A LoRA adapter as PEFT saves it: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

Hu et al., LoRA, ICLR 2022, arXiv 2106.09685. Each adapted matrix gains scale * B A, A [r, in] and B [out, r], with scale
alpha / r, or alpha / sqrt(r) where `use_rslora` is set (Kalajdzievski 2023, arXiv 2312.03732). Rank and alpha may be
set apart for modules by `rank_pattern` and `alpha_pattern`: a key is a whole module name, its end, or a regular
expression for either; the first that fits counts. Beside them may lie tensors that take the base's place: modules_to_save
and biases. What changes the model in another way (DoRA, IA3, prompts ...) is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.core.files import is_folder, read_whole
from spolia.errors import Problems, SpoliaError
from spolia.parts.expert import FileWeights, PickledWeights, Weights
from spolia.parts.patterns import BadPattern, Step, compile_patterns, first_fit

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
UNLOAD = "merge it into its base with peft (`model.merge_and_unload()`), save that, and name its folder"
_LARGEST = 1e9  # alpha; real ones are below a thousand
_DAMAGED = "save or download the adapter again"
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?P<leaf>\.weight|\.bias)?$"
)
# Starts from which the base's own weights were changed too, unless the adapter was converted when it was saved.
_MOVED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")
# Options of LoraConfig that make more of an adapter than scale * B A.
_OTHER_KINDS = {
    "use_dora": "uses DoRA, whose magnitudes depend on the whole matrix",
    "layer_replication": "repeats layers of its base (`layer_replication`)",
    "target_parameters": "adapts parameters without a module of their own (`target_parameters`)",
    "trainable_token_indices": "trains single rows of the embedding (`trainable_token_indices`)",
    "alora_invocation_tokens": "is active only after its invocation tokens (aLoRA) and is no change of the weights",
    "arrow_config": "is routed between several adapters (`arrow_config`)",
    "use_qalora": "uses QALoRA, which pools its inputs",
    "use_bdlora": "uses block-diagonal factors (BD-LoRA)",
}


@dataclass(frozen=True)
class Pair:
    """The factors of one adapted module, by their names in the adapter's file."""

    module: str
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool  # A [r, vocabulary], B [width, r]; the weight is the transpose of B A


@dataclass
class Adapter:
    """An adapter's tensors and what they do to which module. Names are the base model's, as the adapter spells them."""

    path: Path
    config: dict[str, Any]
    weights: Weights
    pairs: dict[str, Pair]
    replaced: dict[str, str]  # tensor of the model -> the adapter's tensor that takes its place
    biases: dict[str, str]  # bias of an adapted module -> what is added to it, times the pair's scale
    digest: str = ""

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read config and headers. SpoliaError names what is missing, damaged or of another kind."""
        if not is_folder(path):
            raise SpoliaError("no such adapter folder", where=str(path), mend=f"name the folder that holds {CONFIG}")
        config, digest = _read_config(path / CONFIG)
        _refuse_other_kinds(config, path / CONFIG)
        file = next((path / name for name in _FILES if os.path.isfile(path / name)), None)
        if file is None:
            raise SpoliaError(f"holds no {_FILES[0]}", where=str(path), mend=_DAMAGED)
        weights = FileWeights.open(file) if file.suffix == ".safetensors" else PickledWeights(file)
        adapter = cls(path, config, weights, {}, {}, {}, digest)
        adapter._sort(file)
        return adapter

    @property
    def transposed(self) -> bool:
        """Whether adapted weights lie as [in, out], as in GPT-2."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def base(self) -> str | None:
        """The base's path or hub id as it was called in training."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    def _sort(self, file: Path) -> None:
        """Every tensor is half of a pair, a replacement or a bias; what is not is told by name."""
        problems, halves = Problems(), dict[str, dict[str, str]]()
        for name in self.weights.entries:
            plain = name.removeprefix("base_model.model.")
            match = _PART.match(plain)
            if ".original_module." in plain:
                continue  # the base's own copy of a module that is replaced
            if match and match["leaf"] == ".bias" and match["part"] == "lora_B":
                self.biases[_plain(match["module"]) + ".bias"] = name
            elif match:
                halves.setdefault(_plain(match["module"]), {})[match["part"]] = name
            elif "lora_magnitude_vector" in plain:
                problems.add(f"{file} {name}", _OTHER_KINDS["use_dora"], UNLOAD)
            elif re.search(r"\.(lora_|token_adapter|trainable_tokens|ia3_|hada_|lokr_|oft_|vera_|ada_)", f".{plain}"):
                problems.add(f"{file} {name}", "belongs to no kind of adapter that is read", UNLOAD)
            else:
                self.replaced[_plain(re.sub(r"\.modules_to_save(\.default)?\.", ".", plain))] = name
        ranks, alphas = (self._values(field, halves) for field in ("r", "lora_alpha"))
        for module, half in halves.items():
            self._pair(module, half, ranks[module], alphas[module], file, problems)
        for bias in self.biases:
            if bias.removesuffix(".bias") not in self.pairs and not problems.errors:
                problems.add(f"{file} {self.biases[bias]}", "is the bias of a module without factors", _DAMAGED)
        problems.raise_if_any()
        if not self.pairs and not self.replaced:
            raise SpoliaError("holds no tensors", where=str(file), mend=_DAMAGED)

    def _values(self, field: str, modules: Collection[str]) -> dict[str, Any]:
        """`r` or `lora_alpha` of every module: what the first pattern that fits says, else the config."""
        named = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[field]
        patterns = _patterns(self.config, named, modules, self.path / CONFIG)
        return {module: first_fit(patterns, module, self.config.get(field)) for module in modules}

    def _pair(
        self, module: str, half: Mapping[str, str], rank: Any, alpha: Any, file: Path, problems: Problems
    ) -> None:
        kinds = [("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")]
        found = next((kind for kind in kinds if set(half) == set(kind)), None)
        if found is None:
            problems.add(f"{file} {module}", f"holds only {', '.join(sorted(half))}: A and B belong together", _DAMAGED)
            return
        a, b = half[found[0]], half[found[1]]
        ranks = (self.weights.entries[a].shape[:1], self.weights.entries[b].shape[1:2])
        if type(rank) is not int or rank < 1:
            problems.add(str(self.path / CONFIG), f"the rank `r` of `{module}` is {rank!r:.40}", "restore the config")
        elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
            problems.add(str(self.path / CONFIG), f"`lora_alpha` of `{module}` is {alpha!r:.40}", "restore the config")
        elif ranks != ((rank,), (rank,)):
            shapes = f"{list(self.weights.entries[a].shape)} and {list(self.weights.entries[b].shape)}"
            what = f"`{a}` and `{b}` are {shapes}, but the config says rank {rank}"
            problems.add(str(file), what, "restore the adapter_config.json that belongs to these weights")
        elif not all(self.weights.entries[n].dtype.floating for n in (a, b)):
            problems.add(str(file), f"`{a}` or `{b}` holds whole numbers", "quantised adapters are not read: " + UNLOAD)
        else:
            scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
            self.pairs[module] = Pair(module, a, b, rank, scale, found == kinds[1])


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder with an adapter and no whole model."""
    try:
        if not is_folder(path) or not any(os.path.isfile(path / name) for name in (CONFIG, *_FILES)):
            return False
        names = [f.name for f in path.iterdir()]
    except OSError:
        return False
    whole = (n for n in names if n.endswith(".safetensors") or n.startswith("pytorch_model"))
    return all(n.startswith("adapter_model") for n in whole)


def _patterns(config: Mapping[str, Any], field: str, modules: Collection[str], file: Path) -> list[tuple[Step, Any]]:
    """The patterns of `rank_pattern` or `alpha_pattern`. SpoliaError for what is no pattern or would take too long."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise SpoliaError(f"`{field}` is no mapping", where=str(file), mend="restore the config")
    try:
        return compile_patterns(patterns, modules)
    except BadPattern as error:
        mend = "write few patterns, or the modules' names out"
        raise SpoliaError(f"`{field}`: {error}", where=str(file), mend=mend) from None


def _plain(name: str) -> str:
    """Without the wrapper that PEFT puts around an adapted layer."""
    return f"{name}.".replace(".base_layer.", ".").removesuffix(".")


def _read_config(file: Path) -> tuple[dict[str, Any], str]:
    if not os.path.lexists(file):
        mend = "copy it from where the adapter was saved"
        raise SpoliaError("is missing: rank and alpha stand in it", where=str(file), mend=mend)
    raw = read_whole(file)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SpoliaError(f"is not valid JSON: {error}", where=str(file), mend=_DAMAGED) from None
    if not isinstance(config, dict):
        raise SpoliaError("is no mapping", where=str(file), mend=_DAMAGED)
    return config, hashlib.sha256(raw).hexdigest()


def _refuse_other_kinds(config: Mapping[str, Any], file: Path) -> None:
    problems = Problems()
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        what = "does not say what kind of adapter it is" if kind is None else f"is a {kind} adapter"
        problems.add(str(file), f"{what}; only LoRA is read", UNLOAD)
    for option, what in _OTHER_KINDS.items():
        if config.get(option):
            problems.add(str(file), what, UNLOAD)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _MOVED_BASE.match(start):
        what = f"was started with {start}, which changes the base's weights too"
        problems.add(str(file), what, "save it with `path_initial_model_for_weight_conversion`, or " + UNLOAD)
    problems.raise_if_any()

"""CLIP as a pool needs it: the image tower that is merged, and of every task the frozen head that its class names make.

Radford et al., 2021, arXiv 2103.00020. With the pre-trained text tower e(.), templates t and classes c

    w_c = normalise(mean over t of normalise(e(t(c)))),    logits = exp(logit scale) W f / ||f||

Heads are made once, from the base, and neither fine-tuned nor merged; f is the image feature after the projection.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spolia.core.checkpoint import read_config
from spolia.errors import SpoliaError
from spolia.parts.network import Network
from spolia.zoo.clip_names import PROJECTION
from spolia.zoo.heads import Cosine

Projection = Literal["merged", "frozen"]
TEXTS = 256  # prompts that go through the text tower together


class ImageTower(nn.Module):
    """Pictures [batch, 3, size, size] to features [batch, dim], its tensors called as in a folder of transformers.

    With a `projection` of its own (a linear layer) that is merged like the rest; `frozen` [dim, width] stands for experts
    that have none and share the base's: it is no parameter, and no weights can replace it.
    """

    def __init__(self, vision_model: nn.Module, projection: nn.Module | None = None, frozen: Tensor | None = None):
        super().__init__()
        self.vision_model = vision_model
        if projection is not None:
            self.visual_projection = projection
        self.register_buffer("frozen", None if frozen is None else frozen.detach().clone(), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        pooled = self.vision_model(pixel_values=pictures).pooler_output  # [batch, width]: the class token, normalised
        if hasattr(self, "visual_projection"):
            return self.visual_projection(pooled)
        frozen: Any = self.frozen
        return pooled if frozen is None else pooled @ frozen.to(pooled.dtype).t()


def image_tower(clip: nn.Module, projection: Projection = "merged") -> ImageTower:
    """The image tower of a CLIPModel, copied. `projection` says whether its last matrix is merged, or the base's for all."""
    tower = copy.deepcopy(clip.get_submodule("vision_model"))
    last: Any = clip.get_submodule("visual_projection")
    made = ImageTower(tower, copy.deepcopy(last)) if projection == "merged" else ImageTower(tower, frozen=last.weight)
    return made.float().eval()


def tower_in(folder: str | os.PathLike[str], frozen: Tensor | None = None) -> ImageTower:
    """The image tower in a folder that `spolia import` or transformers wrote. `frozen` as in ImageTower."""
    from spolia.zoo.importers import read_clip

    transformers = _transformers()
    config = read_config(Path(folder))
    if config is None:
        raise SpoliaError("holds no config.json", where=str(folder), mend="write it with `spolia import`")
    tensors = read_clip(Path(folder), projection=frozen is None).tensors
    described = config.get("vision_config", config) | {"model_type": "clip_vision_model"}
    if PROJECTION in tensors:
        described = described | {"projection_dim": tensors[PROJECTION].shape[0]}
    whole = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig.from_dict(described))
    tower = ImageTower(whole.vision_model, whole.visual_projection if PROJECTION in tensors else None, frozen)
    tower.load_state_dict(tensors)
    return tower.float().eval()


def text_head(
    clip: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], where: str = "head"
) -> Cosine:
    """The head that `classes`, in the order of their labels, make under `templates`, each with one `{}`.

    `clip` is a CLIPModel and `tokenizer` its own. Runs classes x templates texts through the text tower.
    """
    wrong = next((t for t in templates if t.count("{}") != 1), None)
    if not classes or not templates or wrong is not None:
        what = f"template {wrong!r} has not one `{{}}`" if wrong is not None else "no classes, or no templates"
        raise SpoliaError(what, where=where, mend="give class names and templates such as `a photo of a {}.`")
    texts = [template.replace("{}", name) for name in classes for template in templates]
    with torch.no_grad():
        parts = [_embedded(clip, tokenizer, texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]
        found = torch.cat(parts).view(len(classes), len(templates), -1)  # [classes, templates, dim]
        mean = nn.functional.normalize(found, dim=-1).mean(1)
        return Cosine(mean, clip.get_parameter("logit_scale").detach().float().clone()).eval()


def published_head(weight: Tensor, where: str = "head") -> Cosine:
    """A published head [classes, dim] whose rows hold the logit scale: their length is its exponential, all alike."""
    lengths = weight.norm(dim=1)
    if (
        not bool(lengths.min() > 0) or float(lengths.max() / lengths.min()) > 1.001
    ):  # fp32 rows agree to 1e-6, fp16 to 1e-3
        mend = "it was fine-tuned, or is of another kind: use it as a linear layer"
        raise SpoliaError("its rows differ in length, so it is no zero-shot head", where=where, mend=mend)
    return Cosine(weight, lengths.mean().log()).eval()


def heads_state(heads: Mapping[str, Cosine]) -> dict[str, Tensor]:
    """Heads as one file holds them, which recipes name as `head`: `TASK.weight`, of unit rows, and `TASK.logit_scale`."""
    return {
        f"{task}.{name}": t.cpu().contiguous() for task, head in heads.items() for name, t in head.state_dict().items()
    }


def _embedded(clip: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Text features [texts, dim] in fp32, not normalised."""
    tower: Any = clip.get_submodule("text_model")
    last: Any = clip.get_submodule("text_projection")
    longest = int(tower.config.max_position_embeddings)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    device = last.weight.device
    mask = tokens["attention_mask"].to(device)
    pooled = tower(input_ids=tokens["input_ids"].to(device), attention_mask=mask).pooler_output
    return last(pooled).float()


def clip_network(tower: ImageTower, heads: Mapping[str, nn.Module], device: str = "cpu") -> Network:
    """What runs the experts of a CLIP pool: an image tower with the heads of the tasks, on `device`."""
    return Network(tower.to(device), {task: head.to(device) for task, head in heads.items()})


def load_clip(folder: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """The CLIPModel in a folder, in fp32, and its tokenizer. Reads files that are there; asks no hub."""
    transformers = _transformers()
    try:
        clip = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:160]
        mend = "give the folder of a whole CLIPModel with its tokenizer, such as openai/clip-vit-base-patch32"
        raise SpoliaError(f"holds no CLIP that can make heads: {words}", where=str(folder), mend=mend) from None
    return clip.eval(), tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        mend = "pip install 'spolia[llm]'"
        raise SpoliaError("transformers is not installed", where="CLIP", mend=mend) from None
    return transformers

"""What eight_tasks.py merges: eight image tasks, a base, one frozen head a task, and one fine-tune of the base a task.

    vit          patch 8, width 192, depth 6; pre-trained here, once for all seeds, on Tiny-ImageNet-100 and CIFAR-10
    squeezenet   SqueezeNet 1.0, pre-trained on ImageNet by others, given images enlarged to 64 x 64

A seed draws the splits and the order of the batches. eight_tasks_training.py trains what is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from spolia import Examples, Network
from spolia.bench.multitask import Share, Task, evaluate
from spolia.core.checkpoint import read_tensors
from spolia.core.seeds import entropy
from spolia.data.images import Split, Splits, images, normalised
from spolia.zoo.squeezenet import SqueezeNet
from spolia.zoo.vit import ViT

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]

TASKS = ("cifar10", "gtsrb", "eurosat", "rsscn7", "dtd10", "mnist", "fashion_mnist", "kmnist")
NETS = ("vit", "squeezenet")


@dataclass(frozen=True)
class Training:
    """AdamW in fp32: the highest rate, reached after a tenth of the steps, from where it falls as half a cosine."""

    lr: float
    steps: int
    batch: int = 64
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """All that the weights and the scores depend on besides the seed."""

    net: str
    strengths: dict[str, Training]  # of fine-tuning
    shape: tuple[int, int, int, int] = (8, 192, 6, 3)  # of the ViT: patch, width, depth, heads
    pretraining: Training = Training(1e-3, 5000, 128)
    enlarged: int = 64  # side of what SqueezeNet is given, pixels
    head_steps: int = 100  # of L-BFGS, at most
    head_images: int = 500  # of each task's train images, with labels: the base stays well below its experts
    read: int | None = None  # images of each part of a file, at most
    most: dict[str, int] = field(default_factory=lambda: {"validation": 125, "unlabelled": 500, "test": 500})
    awd_steps: int = 500  # of AWD: its default; not of AWD + AdaMerging, which always has it
    adapt_steps: int = 100  # of AdaMerging, and their rate; its preset `fast` has 150 at 1e-2, the paper 500 at 1e-3
    adapt_lr: float = 1e-2
    repair_steps: int = 100  # of surgery, a task; the paper has 1000


def recipe_of(net: str, quick: bool) -> Recipe:
    """The recipe of a network; `quick` does everything with a few images and steps, to see that it runs."""
    if net == "vit":
        strengths = {"light": Training(5e-5, 150), "medium": Training(3e-4, 200), "strong": Training(1e-3, 300)}
    else:
        strengths = {"light": Training(2e-5, 150), "medium": Training(1e-4, 200), "strong": Training(4e-4, 200)}
    recipe = Recipe(net, strengths)
    if not quick:
        return recipe
    return replace(
        recipe,
        strengths={name: replace(how, steps=3, batch=8) for name, how in strengths.items()},
        shape=(8, 32, 2, 2),
        pretraining=replace(recipe.pretraining, steps=3, batch=8),
        enlarged=32,
        head_steps=5,
        read=430,  # ten of each of 43 traffic signs
        most={"validation": 16, "unlabelled": 16, "test": 43},
        awd_steps=5,
        adapt_steps=2,
        repair_steps=3,
    )


@dataclass
class EightTasks:
    """Base, heads and experts of one seed and strength, and the images they are judged on."""

    data: Path
    work: Path  # of the network: the base and a folder a seed
    recipe: Recipe
    seed: int
    strength: str
    device: str = "cpu"  # where networks run

    @property
    def folder(self) -> Path:
        return self.work / f"seed-{self.seed}"

    @property
    def base(self) -> Path:
        return self.work / "base"

    @property
    def experts(self) -> dict[str, Path]:
        return {task: self.folder / self.strength / task for task in TASKS}

    @property
    def sets(self) -> dict[str, Splits]:
        return _sets(self.data, self.seed, self.recipe.read)

    @cached_property
    def heads(self) -> dict[str, nn.Module]:
        held, found = read_tensors(self.folder / "heads"), {}
        for task in TASKS:
            weight = held[f"{task}.weight"]
            found[task] = head = nn.Linear(weight.shape[1], weight.shape[0])
            head.load_state_dict({"weight": weight, "bias": held[f"{task}.bias"]})
            head.to(self.device)
        return found

    @cached_property
    def network(self) -> Network:
        return Network(self.encoder(), self.heads, self.outputs)

    @cached_property
    def _scratch(self) -> nn.Module:
        return self.encoder().eval()

    def encoder(self, state: State | None = None) -> nn.Module:
        """A new encoder, with weights `state` where given."""
        draws = torch.Generator().manual_seed(entropy(0, "eight tasks", self.recipe.net) % 2**63)
        patch, width, depth, heads = self.recipe.shape
        vit = self.recipe.net == "vit"
        made = ViT(32, patch, width, depth, heads, generator=draws) if vit else SqueezeNet(generator=draws)
        if state is not None:
            made.load_state_dict(dict(state))
        return made.to(self.device)

    def outputs(self, module: nn.Module, batch: Tensor) -> Tensor:
        """Features [n, d] of pixels [n, 3, 32, 32] uint8."""
        x = normalised(batch.to(self.device))
        if self.recipe.net == "squeezenet" and self.recipe.enlarged != x.shape[-1]:
            x = nn.functional.interpolate(x, size=self.recipe.enlarged, mode="bilinear", align_corners=False)
        return module(x)

    def part(self, task: str, name: str) -> Split:
        """A split of a task as far as it is used."""
        return getattr(self.sets[task], name).first(self.recipe.most.get(name))

    def inputs(self, name: str) -> dict[str, Examples]:
        """The inputs of a split without labels, by task."""
        return {task: Examples(self.part(task, name).x, name=task) for task in TASKS}

    def judge(self, state: State, name: str, tasks: Sequence[str] = TASKS) -> dict[str, Share]:
        """Right answers of an encoder with weights `state` under the head of each task."""
        self._scratch.load_state_dict(dict(state))
        return self.judge_by(lambda task, x: self.heads[task](self.outputs(self._scratch, x)), name, tasks)

    def judge_by(
        self, logits: Callable[[str, Tensor], Tensor], name: str, tasks: Sequence[str] = TASKS
    ) -> dict[str, Share]:
        parts = [(task, self.part(task, name)) for task in tasks]
        return evaluate(lambda task, x: logits(task, x).cpu(), [Task(task, part.x, part.y) for task, part in parts])

    def curve(self, scales: Sequence[float]) -> dict[float, tuple[float, float]]:
        """Task arithmetic at each scale: % right on validation, and mean entropy of its answers there, nats."""
        base = read_tensors(self.base)
        total = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
        for folder in self.experts.values():
            for name, tensor in read_tensors(folder).items():
                total[name] += tensor - base[name]
        found = {}
        for scale in (0.0, *scales):
            self._scratch.load_state_dict({name: tensor + scale * total[name] for name, tensor in base.items()})
            right, nats = [], []
            for task in TASKS:
                part = self.part(task, "validation")
                with torch.no_grad():
                    log_p = self.heads[task](self.outputs(self._scratch, part.x)).log_softmax(-1).cpu()
                right.append(float((log_p.argmax(1) == part.y).float().mean()))
                nats.append(float(-(log_p.exp() * log_p).sum(1).mean()))
            found[scale] = 100 * fmean(right), fmean(nats)
        return found

    def elsewhere(self) -> dict[str, tuple[float, float]]:
        """For each task % right on validation under the base, and under the experts of the other tasks, their mean."""
        found = {
            t: [100 * share.correct / share.total]
            for t, share in self.judge(read_tensors(self.base), "validation").items()
        }
        for expert, folder in self.experts.items():
            others = [task for task in TASKS if task != expert]
            for task, share in self.judge(read_tensors(folder), "validation", others).items():
                found[task].append(100 * share.correct / share.total)
        return {task: (own, fmean(theirs)) for task, (own, *theirs) in found.items()}

    def geometry(self) -> dict[str, tuple[float, float]]:
        """For each task the length of its change in % of the base's, and its mean cosine with the other changes."""
        base = _flat(read_tensors(self.base))
        changes = torch.stack([_flat(read_tensors(folder)) - base for folder in self.experts.values()])
        lengths = changes.norm(dim=1)
        cosines = changes @ changes.T / (lengths[:, None] * lengths)
        others = (cosines.sum(1) - cosines.diagonal()) / (len(TASKS) - 1)
        return {t: (100 * float(lengths[i] / base.norm()), float(others[i])) for i, t in enumerate(TASKS)}

    def loops(self, name: str) -> Path:
        """Where loops of this seed and strength keep their state."""
        return self.folder / "loops" / self.strength / name


@lru_cache(maxsize=3)
def _sets(data: Path, seed: int, read: int | None) -> dict[str, Splits]:
    return {task: images(task, seed, folder=data, most=read) for task in TASKS}


def _flat(state: State) -> Tensor:
    return torch.cat([tensor.double().reshape(-1) for tensor in state.values()])

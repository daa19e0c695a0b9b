"""What trains the pool of eight_tasks.py: the base, the heads, the experts. Whatever is there already is left as it is.

Heads are linear, fitted on the base's features, and frozen before any expert is trained. A loop that was killed goes on
where it stopped; speeds are told in images a second.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from eight_tasks_pool import TASKS, EightTasks, Training
from torch import nn

from spolia import Examples, Journal
from spolia.bench.multitask import Task, evaluate
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.seeds import entropy, generator
from spolia.data.images import images
from spolia.zoo.mlp import linear
from spolia.zoo.squeezenet import read_npz
from spolia.zoo.vit import ViT

if TYPE_CHECKING:
    from torch import Tensor

    Say = Callable[[str], None]

PRETRAINED_ON = {"tiny_imagenet100": 0.25, "cifar10_full_jpeg75": 0.75}  # share of each in a batch
SQUEEZENET = "squeezenet1_0_imagenet.npz"
KEPT_BACK = 0.02  # of the pre-training images: to tell how good the base is
SHIFT = 4  # pixels, in pre-training
DECAY = 0.03  # of the heads, on features of unit variance: as sure of new images as they are right
LOG_EVERY = 20  # steps


def pretrain(pool: EightTasks, say: Say) -> None:
    """The base, unless it is there."""
    if pool.base.is_dir():
        return
    encoder, how = pool.encoder(), pool.recipe.pretraining
    if not isinstance(encoder, ViT):
        encoder.load_state_dict(read_npz(pool.data / SQUEEZENET))
        write_checkpoint(pool.base, encoder.state_dict(), encoder.config())
        return
    shares = (KEPT_BACK, 0.0)
    sets = {n: images(n, folder=pool.data, most=pool.recipe.read, shares=shares) for n in PRETRAINED_ON}
    draws = torch.Generator().manual_seed(entropy(0, "eight tasks", "pre-training heads") % 2**63)
    heads = nn.ModuleDict({n: linear(encoder.width, len(one.classes), draws) for n, one in sets.items()})
    given = {name: Examples(one.train.x, one.train.y, name=name) for name, one in sets.items()}
    counts = {name: round(share * how.batch) for name, share in PRETRAINED_ON.items()}

    def loss(step: int) -> Tensor:
        places = {name: examples.drawn(counts[name], 0, step) for name, examples in given.items()}
        x = torch.cat([augmented(given[n].batch(at), generator(0, "augment", n, step)) for n, at in places.items()])
        parts = pool.outputs(encoder, x).split([len(at) for at in places.values()])
        losses = [
            nn.functional.cross_entropy(heads[name](z), given[name].labels_at(at).to(pool.device), reduction="sum")
            for z, (name, at) in zip(parts, places.items(), strict=True)
        ]
        return torch.stack(losses).sum() / len(x)

    module = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(pool.device)
    loops = pool.work / "loops" / "base"
    fit(module, loss, how, loops, "pre-train", say)
    held = [Task(n, one.validation.x, one.validation.y) for n, one in sets.items() if len(one.validation)]
    for name, share in evaluate(lambda task, x: heads[task](pool.outputs(encoder, x)).cpu(), held).items():
        say(f"pre-trained: {share.percent:.1f} % of {share.total} images of {name} kept back")
    write_checkpoint(pool.base, encoder.state_dict(), encoder.config())
    forget(loops)


def fit_heads(pool: EightTasks, say: Say) -> None:
    """A linear head a task by logistic regression on the base's features of some train images, unless they are there."""
    folder = pool.folder / "heads"
    if folder.is_dir():
        return
    encoder, made = pool.encoder(read_tensors(pool.base)).eval(), {}
    for task, one in pool.sets.items():
        start, train = time.perf_counter(), one.train.first(pool.recipe.head_images)
        with torch.no_grad():
            features = torch.cat([pool.outputs(encoder, x).cpu() for x in train.x.split(512)])
        rate = len(features) / (time.perf_counter() - start)
        weight, bias = _regressed(features, train.y, len(one.classes), pool.recipe.head_steps)
        right = float(((features @ weight.T + bias).argmax(1) == train.y).float().mean())
        made |= {f"{task}.weight": weight, f"{task}.bias": bias}
        say(f"seed {pool.seed}: head of {task}, {100 * right:.1f} % of its train images; forward {rate:.0f} images/s")
    write_checkpoint(folder, made, {"model_type": "spolia_heads", "tasks": list(TASKS)})


def _regressed(features: Tensor, labels: Tensor, classes: int, steps: int) -> tuple[Tensor, Tensor]:
    """Weight [classes, d] and bias [classes]; fitted on standardised features, so that the penalty is the same for all.

    A feature that hardly varies here counts as if it did a little: it may, once an encoder is fine-tuned.
    """
    mean, std = features.mean(0), features.std(0)
    std = std.clamp(min=0.1 * float(std.mean()))
    x = (features - mean) / std
    weight, bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, labels) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = weight.detach() / std
    return found, bias.detach() - found @ mean


def fit_experts(pool: EightTasks, say: Say) -> None:
    """The experts that are not there: the base fine-tuned on the train images of a task, its head frozen."""
    how = pool.recipe.strengths[pool.strength]
    for task, target in pool.experts.items():
        if target.is_dir():
            continue
        encoder, head = pool.encoder(read_tensors(pool.base)), pool.heads[task].requires_grad_(False)
        train = pool.sets[task].train
        examples = Examples(train.x, train.y, name=task)

        def loss(step: int, encoder: Any = encoder, head: Any = head, examples: Any = examples) -> Tensor:
            places = examples.drawn(how.batch, pool.seed, step)
            logits = head(pool.outputs(encoder, examples.batch(places)))
            return nn.functional.cross_entropy(logits, examples.labels_at(places).to(pool.device))

        fit(encoder, loss, how, pool.loops(task), f"seed {pool.seed}: {pool.strength} fine-tune on {task}", say)
        write_checkpoint(target, encoder.state_dict(), {**encoder.config(), "task": task})
        forget(pool.loops(task))


def fit(module: nn.Module, loss_of: Callable[[int], Tensor], how: Training, folder: Path, phase: str, say: Say) -> None:
    """Trains `module` on the mean loss that `loss_of(step)` gives, going on where the loop kept in `folder` stopped."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    journal, warm, done, start = Journal(folder, save_every=60), max(1, how.steps // 10), 0, time.perf_counter()
    with journal.phase(phase):
        for step in journal.steps(how.steps, {"module": module, "optimizer": optimizer}):
            for group in optimizer.param_groups:
                group["lr"] = how.lr * min((step + 1) / warm, (1 + math.cos(math.pi * step / how.steps)) / 2)
            loss = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            done += 1
            rate = done * how.batch / (time.perf_counter() - start)
            if step % LOG_EVERY == 0:
                journal.log(loss=loss, **{"images per second": rate})
    if done:
        say(f"{phase}: loss {float(loss.detach()):.3f}, {rate:.0f} images/s")


def forget(folder: Path) -> None:
    """Removes the state of finished loops and keeps their numbers."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def augmented(x: Tensor, draws: Any) -> Tensor:
    """Each image [n, 3, h, w] moved by up to SHIFT pixels, and every other one, at random, mirrored."""
    size = x.shape[-1]
    wide = nn.functional.pad(x, (SHIFT,) * 4)
    moves = draws.integers(0, 2 * SHIFT + 1, (len(x), 2)).tolist()
    made = torch.stack([wide[i, :, r : r + size, c : c + size] for i, (r, c) in enumerate(moves)])
    mirrored = torch.from_numpy(draws.random(len(x)) < 0.5)
    return torch.where(mirrored[:, None, None, None], made.flip(3), made)

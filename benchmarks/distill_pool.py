"""Teachers, students and data of distill.py: small residual networks on CIFAR-10, small language models on WikiText-2.

    cifar   ResNet-56 (weights by others, then trained on a little here) -> ResNet-8, on the JPEG set alone
    lm      stories260k (llama2.c, then trained on the text) -> a decoder of an eighth of its width, on WikiText-2

What a teacher was trained on before, and what is done to it here, stands in `data_touched`. A trained teacher and its answers
are kept in the work folder; the same seed, recipe and versions give the same student.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Journal
from spolia.core.seeds import entropy, generator
from spolia.data.images import normalised, packed_file, read_part
from spolia.methods.distill.dist import Dist
from spolia.methods.distill.dkd import Dkd
from spolia.methods.distill.kd import Kd
from spolia.methods.distill.rkkd import Rkkd
from spolia.methods.distill.train import Training, distill
from spolia.parts.teacher import cached
from spolia.runs.distill_pair import Pair, alone, nobody
from spolia.zoo.resnet import ResNet, read
from spolia.zoo.tiny_lm import TinyLM

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.settings import Settings

SET = "cifar10_full_jpeg75"  # training and test alike: the lossless files are never mixed with it
TEACHER = "resnet56_cifar10.safetensors"
BASE = "stories260k"
VOCABULARY = 512
KEPT_BACK = 6  # articles for validation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cifar:
    """Sizes and lengths. Every image is shown as it is and mirrored, so that the teacher is asked once about all of them."""

    name: str = "cifar"
    images: int = 8_000  # of the student, from the train part
    held: int = 2_000  # other train images, to choose the step
    test: int = 4_000
    teaching: int = 8_000  # train images that the teacher is trained on
    teacher: Training = field(
        default_factory=lambda: Training(epochs=2, batch=128, lr=0.02, schedule="cosine", weight_decay=5e-4)
    )
    depth: int = 8
    width: int = 8
    student: Training = field(
        default_factory=lambda: Training(epochs=5, batch=128, lr=0.1, schedule="cosine", weight_decay=5e-4, warmup=50)
    )
    losses: tuple[tuple[str, Settings], ...] = (("kd", Kd()), ("dkd", Dkd(beta=2.0)), ("dist", Dist()))
    rank: Rkkd = field(default_factory=Rkkd)


@dataclass(frozen=True)
class Lm:
    """Sizes and lengths. Tokens are those of the teacher's tokenizer; `<unk>` of the text is plain characters."""

    name: str = "lm"
    context: int = 128
    windows: int | None = None  # of the student; all
    held: int = 40  # windows, to choose the step
    test: int = 60
    teacher: Training = field(
        default_factory=lambda: Training(
            steps=600, batch=16, task="tokens", optimizer="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine",
            warmup=20, clip=1.0,
        )
    )  # fmt: skip
    depth: int = 2
    width: int = 32
    student: Training = field(
        default_factory=lambda: Training(
            steps=250, batch=16, task="tokens", optimizer="adamw", lr=4e-3, weight_decay=0.01, schedule="cosine",
            warmup=20, clip=1.0, check_every=50, watch="loss",
        )
    )  # fmt: skip
    losses: tuple[tuple[str, Settings], ...] = (
        ("kd", Kd(temperature=1.0, alpha=0.5, ce=0.5)),
        ("dkd", Dkd(temperature=1.0, alpha=1.0, beta=1.0)),
        ("dist", Dist()),
    )
    rank: Rkkd = field(default_factory=lambda: Rkkd(pairs="top", top=100))


def recipe_of(which: str, quick: bool) -> Cifar | Lm:
    """The recipe, or a small one that only shows that all of it runs."""
    if which == "cifar":
        whole = Cifar()
        return whole if not quick else _quick_cifar(whole)
    whole = Lm()
    return whole if not quick else _quick_lm(whole)


def _quick_cifar(whole: Cifar) -> Cifar:
    def short(one: Training) -> Training:
        return one.model_copy(update={"epochs": 1.0, "batch": 64, "warmup": 2})

    small = {"images": 256, "held": 64, "test": 64, "teaching": 64}
    return Cifar(**small, teacher=short(whole.teacher), student=short(whole.student))


def _quick_lm(whole: Lm) -> Lm:
    def short(one: Training) -> Training:
        return one.model_copy(update={"steps": 6, "batch": 4, "warmup": 2, "check_every": 3})

    return Lm(windows=64, held=4, test=4, teacher=short(whole.teacher), student=short(whole.student))


def settings(recipe: Cifar | Lm) -> dict[str, Any]:
    """What the scores depend on, for a work folder to remember."""
    told = {key: value for key, value in asdict(recipe).items() if key not in ("teacher", "student", "losses", "rank")}
    parts = {name: getattr(recipe, name).model_dump(mode="json") for name in ("teacher", "student", "rank")}
    return told | parts | {"losses": {name: loss.model_dump(mode="json") for name, loss in recipe.losses}}


def make_pair(recipe: Cifar | Lm, data: Path, work: Path, seed: int, say: Say) -> tuple[Pair, Any]:
    """The pair of a seed, and what is asked for the teacher's logits. The teacher is one for all seeds."""
    return _cifar(recipe, data, work, seed, say) if isinstance(recipe, Cifar) else _lm(recipe, data, work, seed, say)


def _draws(*purpose: object) -> torch.Generator:
    return torch.Generator().manual_seed(entropy(0, "distill benchmark", *purpose) % 2**63)


def _taught(model: nn.Module, classes: int, data: Any, how: Training, work: Path, say: Say) -> nn.Module:
    """The teacher trained on labels alone, unless that was done before."""
    folder = work / "teacher"
    if not folder.is_dir():
        say(f"teacher: {how.steps or f'{how.epochs:g} epochs'} on the student's kind of data")
        made = distill(
            model, nobody(classes), data, how, objective=alone(), journal=Journal(work / "loops" / "teacher")
        )
        write_checkpoint(folder, {name: t.contiguous() for name, t in made.state_dict().items()})
    model.load_state_dict(read_tensors(folder))
    return model.eval()


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def _cifar(recipe: Cifar, data: Path, work: Path, seed: int, say: Say) -> tuple[Pair, Any]:
    file = packed_file(SET, data)
    train = read_part(file, "train", recipe.images + recipe.held + recipe.teaching)
    test = read_part(file, "test", recipe.test)
    order = generator(0, "distill benchmark", "split").permutation(len(train.labels))  # one for all seeds
    own, held, more = (
        order[start:stop]
        for start, stop in (
            (0, recipe.images),
            (recipe.images, recipe.images + recipe.held),
            (recipe.images + recipe.held, None),
        )
    )
    kept = {name: _shown(train, at) for name, at in (("own", own), ("held", held), ("more", more))}
    teacher = _taught(read(data / TEACHER, classes=10), 10, kept["more"], recipe.teacher, work, say)
    x, y = kept["own"]
    x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
    student = ResNet(recipe.depth, recipe.width, generator=_draws("student", seed))
    tested = normalised(torch.from_numpy(test.pixels)), torch.from_numpy(test.labels)
    pair = Pair(teacher, student, (x, y), kept["held"], tested, recipe.student)
    return pair, cached(teacher, x, work / "answers", dtype="float32", progress=lambda n, m: say(f"answers {n} of {m}"))


def _shown(part: Any, at: Any) -> tuple[Tensor, Tensor]:
    return normalised(torch.from_numpy(part.pixels[at])), torch.from_numpy(part.labels[at])


# --- WikiText-2 ------------------------------------------------------------------------------------------------------


def _lm(recipe: Lm, data: Path, work: Path, seed: int, say: Say) -> tuple[Pair, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(data / BASE, model_max_length=10**9)

    def windows(text: str, most: int | None) -> Tensor:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        whole = ids[: len(ids) // recipe.context * recipe.context].view(-1, recipe.context)
        return whole if most is None or most >= len(whole) else whole[torch.arange(most) * len(whole) // most]

    articles = re.split(r"(?m)^(?= = [^=\n]+ = $)", _text(data / "lm_wikitext2_valid.txt.gz"))
    train = windows("".join(articles[:-KEPT_BACK]), recipe.windows)
    held = windows("".join(articles[-KEPT_BACK:]), recipe.held)
    test = windows(_text(data / "lm_wikitext2_test.txt.gz"), recipe.test)
    base: Any = AutoModelForCausalLM.from_pretrained(data / BASE, dtype=torch.float32)
    base.config.use_cache = False
    teacher = _taught(base, VOCABULARY, train, recipe.teacher, work, say)
    student = TinyLM(VOCABULARY, recipe.context, recipe.width, recipe.depth, heads=4, generator=_draws("student", seed))
    return Pair(teacher, student, train, held, (test, None), recipe.student), teacher


def _text(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return stream.read()


def data_touched(recipe: Cifar | Lm) -> dict[str, str]:
    """What each phase sees, for the ledger."""
    if isinstance(recipe, Cifar):
        return {
            "teacher": "the lossless train images of CIFAR-10, by others (ResNet-56), then"
            f" {recipe.teacher.epochs:g} epochs on {recipe.teaching} train images of the JPEG set, with labels",
            "student": f"{recipe.images} other train images of the JPEG set with labels, each as it is and mirrored; the"
            " teacher has seen these pictures, lossless, in its first training",
            "choice of step": f"{recipe.held} further train images of the JPEG set with labels",
            "test": f"the first {recipe.test} test images of the JPEG set; no phase has seen these pictures in any form",
        }
    return {
        "teacher": "stories (TinyStories), by others (stories260k), then"
        f" {recipe.teacher.steps} steps of {recipe.teacher.batch} windows of the student's text",
        "student": f"WikiText-2's valid file but its last {KEPT_BACK} articles, in windows of {recipe.context} tokens",
        "choice of step": f"{recipe.held} windows of these articles",
        "test": f"{recipe.test} windows spread over WikiText-2's test file",
    }

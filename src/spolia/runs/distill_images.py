"""Teacher, student and data of a distillation on images in an npz file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import read_config, read_tensors
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.data import images as sets
from spolia.data.augment import Augment
from spolia.errors import SpoliaError
from spolia.runs.distill_pair import Pair, draws_of, taught
from spolia.runs.distill_problems import NETWORKS, ImageDistillation, Model

if TYPE_CHECKING:
    from torch import Tensor, nn

_WEAK = Augment(flip=0.5, shift=0.125, beyond="zeros")
_STRONG = Augment(flip=0.5, shift=0.2, crop=0.6, jitter=0.4, rotate=0.3)
_TEACHER_RATE = 0.01  # of fine-tuning; from scratch that of the student


def image_pair(problem: ImageDistillation, seed: int, folder: Path, journal: Journal) -> Pair:
    """See `make_pair`. Images are normalised as ImageNet's; views are drawn before that."""
    file = file_of(problem)
    classes, train, test = sets.read_parts(file, problem.most)
    order = generator(seed, "distill", "split").permutation(len(train.labels))
    held = max(1, len(order) // 10)
    parts = {"validation": np.sort(order[:held]), "train": np.sort(order[held:])}
    given = {name: (_tensor(train.pixels[at]), torch.from_numpy(train.labels[at])) for name, at in parts.items()}
    teacher, student = (network(getattr(problem, role), len(classes), role, seed) for role in ("teacher", "student"))
    teacher, student = teacher.to(problem.device), student.to(problem.device)
    pace = problem.training
    views = (partial(_seen, _WEAK), partial(_seen, _STRONG))
    if problem.teacher_epochs:
        rate = pace.lr if problem.teacher.weights is None else _TEACHER_RATE
        longer = pace.model_copy(update={"epochs": problem.teacher_epochs, "steps": None, "lr": rate, "patience": None})
        kept = folder / f"teacher-{seed}"
        teacher = taught(teacher, given["train"], longer, seed, kept, journal, views[:1])
    shown = {name: (sets.normalised(x), y) for name, (x, y) in given.items() if name == "validation"}
    judged = (sets.normalised(_tensor(test.pixels)), torch.from_numpy(test.labels))
    sites = ("layer3", "layer3") if all(hasattr(m, "layer3") for m in (teacher, student)) else None
    pair = Pair(teacher.eval(), student, given["train"], shown["validation"], judged, pace, views, sites)
    return replace(pair, device=problem.device)


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(sets.resized(pixels, sets.SIZE)))


def _seen(augment: Augment, pixels: Tensor, draws: np.random.Generator) -> Tensor:
    return sets.normalised(augment(pixels, draws))


def file_of(problem: ImageDistillation) -> Path:
    """The npz file, by its path or by its name in the folder that SPOLIA_DATA names."""
    path = Path(problem.data).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise SpoliaError("there is no such file", where=str(path), mend="check problem.data")
        return path
    return sets.packed_file(problem.data)


def check_models(problem: ImageDistillation) -> None:
    """What can be told without torch: files that are not there, a teacher that knows nothing."""
    file_of(problem)
    for role in ("teacher", "student"):
        model: Model = getattr(problem, role)
        if model.weights is not None and not model.weights.expanduser().exists():
            mend = f"name a model folder or safetensors file: problem.{role}.weights=PATH"
            raise SpoliaError("there is no such model", where=str(model.weights), mend=mend)


def network(model: Model, classes: int, role: str, seed: int) -> Any:
    """A named network, drawn anew or with the weights that are given; or the model of a folder, as its config says."""
    from spolia.zoo import resnet

    if model.weights is None:
        assert model.network is not None  # the recipe's check has told
        depth = int(model.network.removeprefix("resnet"))
        return resnet.ResNet(depth, model.width, classes, generator=draws_of(seed, role))
    path = model.weights.expanduser()
    config = (read_config(path) or {}) if path.is_dir() else {}
    if model.network in NETWORKS or config.get("model_type", resnet.MODEL_TYPE) == resnet.MODEL_TYPE:
        return resnet.read(path, classes=classes)
    return _opened(path, config)


def _opened(path: Path, config: dict[str, Any]) -> nn.Module:
    """A model of transformers: a module of images [n, 3, 32, 32] that gives logits."""
    from spolia.zoo.hf import build, module_names

    module = build(config, str(path))
    state = read_tensors(path)
    names = module_names(module, state) or {}
    try:
        module.load_state_dict({own: state[theirs].float() for own, theirs in names.items()})
    except RuntimeError as error:
        what = f"its weights do not fit its config: {' '.join(str(error).split())[:200]}"
        raise SpoliaError(what, where=str(path), mend="give the folder that save_pretrained wrote") from None
    return module

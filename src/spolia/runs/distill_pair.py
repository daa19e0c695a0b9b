"""Teacher, student and data of a distillation problem, made once a seed; a teacher that has to be trained is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench.distillation import Judgement, judge
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy, generator
from spolia.methods.distill.objective import Objective
from spolia.methods.distill.train import Training, distill
from spolia.parts.network import outputs_of
from spolia.runs.distill_problems import DigitsDistillation, ImageDistillation, Problem, ProseDistillation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.zoo.small import SmallNet
    from spolia.zoo.tiny_lm import TinyLM

    View = Callable[[Tensor, np.random.Generator], Tensor]

_CHUNK = 512  # inputs of a forward pass when judging
_DIGITS_TEACHER = {"epochs": 40.0, "batch": 64, "lr": 0.1, "schedule": "cosine", "weight_decay": 1e-4}
_PROSE_TEACHER = 300  # steps
_PROSE_JUDGED = 48  # windows


@dataclass
class Pair:
    """What a student is made of and judged by. `test`: inputs and labels; of tokens, windows alone."""

    teacher: nn.Module
    student: nn.Module
    train: Any
    validation: Any
    test: tuple[Tensor, Tensor | None]
    training: Training
    views: tuple[View, View] | None = None  # weak, strong; the weak one is what losses of one view see
    sites: tuple[str, str] | None = None  # modules of student and teacher whose features go together
    device: str = "cpu"
    _theirs: list[Tensor] = field(default_factory=list)

    def shown(self, objective: Objective) -> Sequence[View]:
        """What training makes of a batch's inputs, as many views as the loss looks at."""
        if self.views is None:
            return ()
        return self.views if objective.views == 2 else self.views[:1]

    def judged(self, student: nn.Module) -> Judgement:
        """What the test part says of `student`, which is in eval mode."""
        if not self._theirs:
            self._theirs = list(self._logits(self.teacher))
        theirs = torch.cat(self._theirs)
        return judge(torch.cat(list(self._logits(student))), theirs, self._labels(), top=100)

    def _labels(self) -> Tensor:
        inputs, labels = self.test
        return inputs[:, 1:] if labels is None else labels

    def _logits(self, model: nn.Module) -> Iterator[Tensor]:
        with torch.no_grad():
            for x in self.test[0].split(_CHUNK):
                logits = outputs_of(model, x.to(self.device)).float().cpu()
                yield logits[:, :-1] if self.test[1] is None else logits


def make_pair(problem: Problem, seed: int, folder: Path, journal: Journal) -> Pair:
    """Trains the teacher that `folder` lacks, where the problem has none. The same problem and seed give the same bits."""
    match problem:
        case DigitsDistillation():
            return _digits(problem, seed, folder, journal)
        case ImageDistillation():
            from spolia.runs.distill_images import image_pair

            return image_pair(problem, seed, folder, journal)
        case ProseDistillation():
            return _prose(problem, seed, folder, journal)


def draws_of(seed: int, *purpose: object) -> torch.Generator:
    return torch.Generator().manual_seed(entropy(seed, "distill", *purpose) % 2**63)


def taught(
    teacher: Any, data: Any, training: Training, seed: int, folder: Path, journal: Journal, views: Sequence[View] = ()
) -> nn.Module:
    """`teacher` trained on labels alone, or as an earlier run left it in `folder`; in eval mode."""
    if not folder.is_dir():
        with journal.phase(f"seed {seed} teacher"):
            made = distill(
                teacher,
                nobody(classes_of(teacher)),
                data,
                training,
                objective=alone(),
                augment=views,
                journal=journal,
                seed=seed,
            )
        write_checkpoint(folder, made.state_dict(), config_of(teacher))
    teacher.load_state_dict(read_tensors(folder))
    return teacher.eval()


def alone() -> Objective:
    """Cross-entropy of the labels and nothing else."""
    return Objective(lambda seen: {}, ce=1.0)


def nobody(classes: int) -> Callable[[Tensor], Tensor]:
    """In the teacher's place where there is none: zeros, at no cost."""

    def zeros(batch: Tensor) -> Tensor:
        lead = batch.shape[:1] if batch.is_floating_point() else batch.shape
        return torch.zeros(1, device=batch.device).expand(*lead, classes)

    return zeros


def classes_of(model: Any) -> int:
    """Of a module of this package, or of transformers."""
    for name in ("classes", "vocabulary"):
        if hasattr(model, name):
            return getattr(model, name)
    return model.config.num_labels


def config_of(model: Any) -> dict[str, Any] | None:
    """What config.json says beside its weights."""
    config = getattr(model, "config", None)
    if callable(config):
        return config()  # type: ignore[return-value]
    return config.to_dict() if hasattr(config, "to_dict") else None


def _digits(problem: DigitsDistillation, seed: int, folder: Path, journal: Journal) -> Pair:
    from spolia.data.digits import digits

    parts = digits("upright", seed)
    x, y = (torch.cat([getattr(parts.base, name), getattr(parts.train, name)]) for name in "xy")
    settings = Training.model_validate(_DIGITS_TEACHER)
    teacher = taught(_small(problem, "teacher", seed), (x, y), settings, seed, folder / f"teacher-{seed}", journal)
    kept = (parts.train.x[: problem.images], parts.train.y[: problem.images])
    held, test = (parts.validation.x, parts.validation.y), (parts.test.x, parts.test.y)
    views = (lambda x, draws: noisy(x, draws, problem.noise), lambda x, draws: moved(x, draws, 2 * problem.noise))
    site = "blocks.0" if problem.network == "conv" else "blocks.1"  # where maps still have 16 places
    return Pair(teacher, _small(problem, "student", seed), kept, held, test, problem.training, views, (site, site))


def _small(problem: DigitsDistillation, role: str, seed: int) -> SmallNet:
    from spolia.zoo.small import SmallNet

    return SmallNet(problem.network, getattr(problem, role), generator=draws_of(seed, role))


def noisy(x: Tensor, draws: np.random.Generator, deviation: float) -> Tensor:
    """Images [n, 64] with Gaussian noise."""
    if not deviation:
        return x
    return x + deviation * torch.from_numpy(draws.standard_normal(tuple(x.shape), dtype="float32"))


def moved(x: Tensor, draws: np.random.Generator, deviation: float) -> Tensor:
    """The strong view of digits: each image a pixel up, down, left, right or as it is, then noise. Paper comes in."""
    padded = torch.nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1), value=-1.0)
    steps = torch.tensor([[1, 1], [0, 1], [2, 1], [1, 0], [1, 2]])[torch.from_numpy(draws.integers(0, 5, len(x)))]
    rows, columns = (steps[:, axis, None] + torch.arange(8) for axis in (0, 1))
    cut = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return noisy(cut.reshape(len(x), 64), draws, deviation)


def _prose(problem: ProseDistillation, seed: int, folder: Path, journal: Journal) -> Pair:
    from spolia.data.prose import prose

    text = prose(seed)
    every = text.windows("train", problem.context)
    order = torch.from_numpy(generator(seed, "distill", "windows").permutation(len(every)))
    settings = problem.training.model_copy(update={"steps": _PROSE_TEACHER, "check_every": None, "patience": None})
    blank = _lm(problem, len(text.characters), "teacher", 2, seed)
    teacher = taught(blank, every, settings, seed, folder / f"teacher-{seed}", journal)
    student = _lm(problem, len(text.characters), "student", 1, seed)
    held, test = (text.windows(part, problem.context, _PROSE_JUDGED) for part in ("validation", "test"))
    return Pair(teacher, student, every[order[: problem.windows]], held, (test, None), problem.training)


def _lm(problem: ProseDistillation, vocabulary: int, role: str, depth: int, seed: int) -> TinyLM:
    from spolia.zoo.tiny_lm import TinyLM

    width = getattr(problem, role)
    return TinyLM(vocabulary, problem.context, width, depth, heads=4, generator=draws_of(seed, role))

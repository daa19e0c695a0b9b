"""The loop of a distillation: steps, looks at the validation split, the best so far, and all that a resumed run needs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.dist import summed
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.distill.batches import Batch, Loader, Places, seeded
from spolia.methods.distill.checks import Fitted, in_range
from spolia.methods.distill.passes import Augment, views_of
from spolia.methods.distill.schedule import Factory, optimiser, rate
from spolia.methods.distill.together import alike, averaged, exchanged
from spolia.methods.distill.validate import Validation, better

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.distill.train import Training

_LOGGED = 10  # steps from one line of numbers to the next

Evaluate = Callable[["nn.Module", int], Mapping[str, float]]
"""The student as it would be returned now, in eval mode, and the steps done, to numbers that are logged."""


class Run:
    """The student on its way: optimiser, averaged weights, the best so far, what was seen."""

    def __init__(
        self,
        student: nn.Module,
        fitted: Fitted,
        settings: Training,
        data: Places | Loader,
        held: Places | Loader | None,
        views: Sequence[Augment],
        factory: Factory | None,
        seed: int,
        process: tuple[int, int],
    ):
        self.student, self.fitted, self.settings, self.data, self.views = student, fitted, settings, data, views
        self.seed, self.passes = seed, fitted.passes
        self.rank, self.ranks = process
        self.learned = self.passes.objective.learned
        alike([*student.state_dict().values(), *self.learned.values()], self.rank)
        self.optimizer = optimiser(student, self.learned, settings, factory)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.passes.device.type, enabled=settings.precision == "fp16")
        self.shadow = None if settings.ema is None else copy.deepcopy(student).requires_grad_(False).eval()
        self.validation = None if held is None else Validation(held, self.passes)
        self.steps, self.every = lengths(settings, data)
        self.room = settings.micro_batch if settings.micro_batch != "auto" else None  # inputs of a pass
        self.best: dict[str, Any] = {}
        self.state: dict[str, Any] = {"stopped": None}
        self.history: list[dict[str, Any]] = []

    def keep(self) -> dict[str, Any]:
        """All that changes across steps."""
        made: dict[str, Any] = {"student": self.student, "optimizer": self.optimizer, "scaler": self.scaler}
        made |= {f"learned {name}": tensor for name, tensor in self.learned.items()}
        made |= {"data": self.data.state, "best": self.best, "state": self.state, "history": self.history}
        return made if self.shadow is None else made | {"shadow": self.shadow}

    def train(self, journal: Journal, evaluate: Evaluate | None) -> None:
        if self.validation is not None:
            self.validation.ask()
        self.student.train()
        with journal.phase("distill"):
            for step in journal.steps(self.steps, self.keep(), shared=True):
                if self.state["stopped"] is not None:
                    continue  # to the loop's end, so that it counts as finished
                numbers = self.move(step)
                due = (step + 1) % self.every == 0 or step + 1 == self.steps
                if due:
                    numbers |= self.look(step + 1, evaluate)
                if due or step % _LOGGED == 0:
                    journal.log(**numbers)

    def move(self, step: int) -> dict[str, float]:
        """One step of the optimiser; the loss before it, its terms, the gradient's norm, the learning rate."""
        factor = rate(self.settings, step, self.steps)
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * factor
        batches = [self.data.next(self.rank, self.ranks) for _ in range(self.settings.accumulate)]
        seeded(self.passes.device, self.seed, "step", step, self.rank)
        shown = [self._shown(batch, step, i) for i, batch in enumerate(batches) if len(batch)]
        count = torch.tensor([self._counted(views) for views in shown], dtype=torch.float64).sum()
        count = max(1.0, float(summed(count)))
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._within_memory(shown, count, step)
        if self.ranks > 1:
            exchanged(self.trained)
            averaged(self.student, self.ranks)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip or math.inf))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise _no_number("the gradient", step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        return {"loss": sum(terms.values()), "norm": norm, "lr": self.optimizer.param_groups[0]["lr"], **terms}

    def look(self, done: int, evaluate: Evaluate | None) -> dict[str, float]:
        """See how the student does on the examples kept apart, and keep it if none did better."""
        judged = self.student if self.shadow is None else self.shadow
        seen: dict[str, float] = {}
        if self.validation is not None:
            seen |= self.validation.look(judged)
        if evaluate is not None:
            judged.eval()
            with torch.no_grad():
                seen |= {name: float(value) for name, value in evaluate(judged, done).items()}
            judged.train(self.shadow is None)
        if not seen:
            return {}
        self.history.append({"step": done, **seen})
        if self.validation is not None:
            self._decide(done, seen, "loss" if self.settings.watch == "loss" else self.validation.metric, judged)
        return {f"validation {name}": value for name, value in seen.items()}

    def _decide(self, done: int, seen: dict[str, float], by: str, judged: nn.Module) -> None:
        if better(seen, self.best.get("seen"), by):
            weights = {name: tensor.detach().clone() for name, tensor in judged.state_dict().items()}
            self.best.update(seen={"step": done, **seen}, weights=weights)
            return
        since = self.best["seen"]["step"] if self.best else 0
        if (
            self.settings.patience is not None
            and sum(h["step"] > since for h in self.history) >= self.settings.patience
        ):
            self.state["stopped"] = done

    def result(self) -> nn.Module:
        """The student with the weights that are returned."""
        if self.best and self.settings.keep == "best":
            self.student.load_state_dict(self.best["weights"])
        elif self.shadow is not None:
            self.student.load_state_dict(self.shadow.state_dict())
        self.student.zero_grad(set_to_none=True)
        return self.student.eval()

    def facts(self) -> dict[str, Any]:
        """What the report tells."""
        stopped = self.state["stopped"]
        last = self.history[-1] if self.history else {}
        return {
            "method": "distill",
            "settings": self.settings.model_dump(mode="json"),
            "steps": self.steps if stopped is None else stopped,
            "stopped early": stopped is not None,
            "inputs": {"trained on": self.data.size, "kept apart": self.validation and self.validation.source.size},
            "labels used": self.fitted.labelled,
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "processes": self.ranks,
            "best": self.best.get("seen", last),
            "last": last,
            "returned": "best" if self.best and self.settings.keep == "best" else "last",
            "history": self.history,
        }

    def _shown(self, batch: Batch, step: int, number: int) -> list[Batch]:
        draws = generator(self.seed, "views", step, number, self.rank)
        return views_of(batch, self.views, draws)

    def _counted(self, views: list[Batch]) -> int:
        """Samples of a batch that count: examples, or tokens that are a target."""
        targets = self.passes.targets(views[0])
        if targets is None:
            return len(views) * len(views[0]) * self.fitted.inner
        in_range(targets, self.fitted.classes, "loader")
        return len(views) * int((targets >= 0).sum())

    def _within_memory(self, shown: list[list[Batch]], count: float, step: int) -> dict[str, float]:
        """`_backward`; with `micro_batch: auto` once more in halves, where memory has run out."""
        while True:
            try:
                return self._backward(shown, count, step)
            except RuntimeError as error:
                size = self.room or max(len(view) for views in shown for view in views)
                if self.settings.micro_batch != "auto" or size == 1 or not _out_of_memory(error):
                    raise
            self.room = size // 2  # after the error is gone, and with it what its frames held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            what = f"memory has run out in step {step}: batches go through in parts of {self.room} from here on"
            warnings.warn(what, SpoliaWarning, stacklevel=2)
            self.optimizer.zero_grad(set_to_none=True)
            seeded(self.passes.device, self.seed, "step", step, self.rank)

    def _backward(self, shown: list[list[Batch]], count: float, step: int) -> dict[str, float]:
        """Gradients of the mean loss over `count` samples; its terms, over all processes."""
        sums = torch.zeros(len(self.fitted.names), dtype=torch.float64)
        for views in shown:
            for piece in zip(*(view.pieces(self.room) for view in views), strict=True):
                moved = [view.to(self.passes.device) for view in piece]
                terms = self.passes.losses(self.student, moved, step / self.steps)
                totals = torch.stack([terms[name].sum() for name in self.fitted.names])
                self.scaler.scale(totals.sum() / count).backward()
                sums += totals.detach().cpu()
        means = (summed(sums) / count).tolist()
        for name, value in zip(self.fitted.names, means, strict=True):
            if not math.isfinite(value):
                raise _no_number(self._blamed(shown) or f"the loss's term `{name}`", step)
        return dict(zip(self.fitted.names, means, strict=True))

    def _blamed(self, shown: list[list[Batch]]) -> str:
        """Whose outputs are no numbers, if anyone's."""
        with torch.no_grad():
            for views in shown:
                ours, theirs = self.passes.both(self.student, [view.to(self.passes.device) for view in views])
                for owner, found in (("the teacher's outputs", theirs), ("the student's outputs", ours)):
                    if not torch.isfinite(found.logits).all():
                        return owner
        return ""

    def _average(self) -> None:
        if self.shadow is None or self.settings.ema is None:
            return
        with torch.no_grad():
            now = self.student.state_dict()
            for name, tensor in self.shadow.state_dict().items():
                if tensor.is_floating_point():
                    tensor.lerp_(now[name], 1 - self.settings.ema)
                else:
                    tensor.copy_(now[name])


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no room left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def lengths(settings: Training, data: Places | Loader) -> tuple[int, int]:
    """Steps in all, and from one look to the next."""
    epoch = None if data.per_epoch is None else data.per_epoch / settings.accumulate
    if settings.steps is None and epoch is None:
        raise SpoliaError("its length is not known", where="loader", mend="say how many steps: Training(steps=...)")
    steps = settings.steps or max(1, math.ceil(settings.epochs * (epoch or 1)))
    return steps, settings.check_every or min(steps, max(1, round(epoch or steps)))


def _no_number(what: str, step: int) -> SpoliaError:
    mend = "lower lr, set clip, or look at the inputs of this step; a checkpoint before it is kept"
    return SpoliaError(f"{what} is no number any more", where=f"distill, step {step}", mend=mend)

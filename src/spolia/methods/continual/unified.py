"""A learner of the unified objective: terms are settings, so ER, DER, DER++, LwF, EWC, SI, MAS and CPR are too, and mixtures.

For experiments with what is remembered and how. Wang et al. 2024, arXiv 2403.13249; the objective is in objective.py.

    UnifiedLearner(network, as_unified(DerPp()))                          is DER++, step for step
    UnifiedLearner(network, Unified(output=(OutputTerm(),), weights=(WeightTerm(weight=10),)))    ER + EWC

Data touched: as the terms say. Departures: with plain SGD the weight terms' step is implicit, as in ewc.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.gradients import pull_implicitly, share
from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.anchored import KINDS, information, sensitivity
from spolia.methods.continual.cpr import Cpr
from spolia.methods.continual.der import Der
from spolia.methods.continual.derpp import DerPp
from spolia.methods.continual.er import Er
from spolia.methods.continual.ewc import Ewc
from spolia.methods.continual.finetune import Finetune
from spolia.methods.continual.learner import OURS
from spolia.methods.continual.lwf import Lwf, among
from spolia.methods.continual.mas import Mas
from spolia.methods.continual.objective import Hold, OutputTerm, Term, WeightTerm, check_terms, unified
from spolia.methods.continual.replay import Replay, Replaying
from spolia.methods.continual.si import Si, travelled, walk

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience

_WANG = "Wang et al. 2024"


class Unified(Replay):
    """Settings of `UnifiedLearner`: its terms are DER++'s unless others are named; no term is fine-tuning."""

    output: tuple[OutputTerm, ...] = setting(
        (OutputTerm(divergence="squared", reference="stored", weight=0.1), OutputTerm(weight=0.5)),
        "divergences of outputs: of each divergence, reference, samples, weight, temperature, classes",
        source="Wang et al. 2024, their host DER++",
    )
    weights: tuple[WeightTerm, ...] = setting(
        (), "divergences of weights: of each importance, weight, decay, damping", source=_WANG
    )
    new: Literal["all", "seen"] = setting("all", "classes of the new samples' cross-entropy", source=OURS)
    proximal: bool | None = setting(None, "weight terms taken implicitly; by default with plain SGD", source=OURS)
    fisher: KINDS = setting("auto", "which diagonal Fisher", source=OURS)
    samples: int | None = setting(1024, "inputs an importance is estimated on; None: all", source=OURS, ge=1)


def as_unified(settings: Finetune | Er | Der | DerPp | Lwf | Ewc | Si | Mas | Cpr) -> Unified:
    """The settings of the same method in the unified form."""
    how = {name: getattr(settings, name) for name in Unified.model_fields if hasattr(settings, name)}
    labels, stored = OutputTerm(), OutputTerm(divergence="squared", reference="stored")
    terms: dict[str, Any]
    own: dict[str, Any]
    match settings:
        case Er():
            terms = {"output": (labels.model_copy(update={"weight": settings.weight}),)}
        case Der():
            terms = {"output": (stored.model_copy(update={"weight": settings.alpha}),)}
        case DerPp():
            first, second = (settings.alpha, settings.beta)
            terms = {
                "output": tuple(t.model_copy(update={"weight": w}) for t, w in ((stored, first), (labels, second)))
            }
        case Lwf():
            own = {"reference": "old", "samples": "current", "classes": "known"}
            terms = {"output": (OutputTerm(weight=settings.alpha, temperature=settings.temperature, **own),)}
            terms["new"] = "seen"
        case Ewc():
            terms = {"weights": (WeightTerm(weight=settings.strength, decay=settings.decay),)}
        case Si():
            own = {"importance": "path", "weight": settings.strength, "damping": settings.damping}
            terms = {"weights": (WeightTerm(**own),)}
        case Mas():
            own = {"importance": "sensitivity", "weight": settings.strength, "decay": settings.blend}
            terms = {"weights": (WeightTerm(**own),)}
        case Cpr():
            own = {"divergence": "reverse_kl", "reference": "uniform", "samples": "current"}
            terms = {"output": (OutputTerm(weight=settings.weight, **own),)}
        case _:
            terms = {}
    none: dict[str, Any] = {"output": (), "weights": ()}
    return Unified(**(none | how | terms))


class UnifiedLearner(Replaying):
    settings: Unified

    def __init__(self, model: Any, settings: Unified, *, memory: Any = None, seed: int = 0):
        check_terms(settings.output)
        super().__init__(model, settings, memory=memory, seed=seed)
        self.proximal = self.plain if settings.proximal is None else settings.proximal
        if self.proximal and not self.plain:
            mend = "leave `proximal` out, or use SGD without momentum"
            raise SpoliaError("an implicit step goes with plain SGD only", where="proximal", mend=mend)
        wanted = {term.reference for term in settings.output}
        self.remembers = any(term.samples == "memory" for term in settings.output)
        self.stores = "stored" in wanted
        self.old = copy.deepcopy(self.network).requires_grad_(False).eval() if "old" in wanted else None
        self.known: list[int] = []
        self.seen: list[int] = []
        self.anchors: list[Tensor] = self.copies() if settings.weights else []
        self.importances: list[list[Tensor]] = [[] for _ in settings.weights]
        walks = any(term.importance == "path" for term in settings.weights)
        self.path = [torch.zeros_like(p) for p in self.parameters] if walks else []

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.seen[:] = sorted({*self.known, *experience.classes})

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The new samples' loss and all output terms; the weights' are added in `descend`."""
        drawn = [self._drawn(term) for term in self.settings.output]
        stored = [old["x"] for old in drawn if old is not None]
        x = None if stored else self.viewed(batch.x)
        logits, *again = [self.logits(x)] if x is not None else self.together(batch.x, *stored)
        new = among(logits, self.seen) if self.settings.new == "seen" else logits
        terms = []
        for term, old in zip(self.settings.output, drawn, strict=True):
            if term.samples == "memory":
                if old is not None:
                    h = again.pop(0)
                    terms.append(self._term(term, h, old["logits"] if self.stores else None, old["y"], old["x"]))
            elif term.reference != "old" or self.known:
                terms.append(self._term(term, logits, None, batch.y, batch.x if x is None else x))
        return unified(self.criterion(new, batch.y), terms), logits

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        share(self.parameters, 1 / self.ranks)
        before, slopes = [], []
        if self.path:
            before, slopes = (
                self.copies(),
                [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters],
            )
        holds = [
            Hold(term, self.parameters, self.anchors, found)
            for term, found in zip(self.settings.weights, self.importances, strict=True)
            if found
        ]
        if holds and not self.proximal:
            unified(loss.new_zeros(()), (), holds).backward()
        self.step(shared=True)
        if holds and self.proximal:
            total = [
                torch.stack([h.settings.weight * f for h, f in zip(holds, parts, strict=True)]).sum(0)
                for parts in zip(*(h.importance for h in holds), strict=True)
            ]
            pull_implicitly(self.parameters, self.anchors, total, self.lr)
        if self.path:
            walk(self.path, slopes, before, self.parameters)

    def remember(self, batch: Batch, logits: Tensor) -> None:
        if self.stores:
            self.memory.add(x=batch.x, y=batch.y, logits=logits)
        elif self.remembers:
            self.memory.add(x=batch.x, y=batch.y)

    def end(self, experience: Experience) -> None:
        self.known[:] = self.seen
        if self.old is not None:
            self.old.load_state_dict(self.network.state_dict())
        for term, found in zip(self.settings.weights, self.importances, strict=True):
            found[:] = self._importance(term, found, experience)
        if self.settings.weights:
            self.anchors[:] = self.copies()
        for omega in self.path:
            omega.zero_()

    def kept(self) -> dict[str, Any]:
        own: dict[str, Any] = {"known": self.known, "seen": self.seen, "anchors": self.anchors, "path": self.path}
        own["importances"] = self.importances
        return super().kept() | own | ({} if self.old is None else {"old": self.old})

    def _drawn(self, term: OutputTerm) -> dict[str, Tensor] | None:
        return self.memory.draw(self.replay) if term.samples == "memory" and len(self.memory) else None

    def _term(self, term: OutputTerm, h: Tensor, stored: Tensor | None, labels: Tensor, x: Any) -> Term:
        """A term with its reference, over the classes that it is about."""
        match term.reference:
            case "labels":
                z = labels.to(h.device)
            case "stored":
                z = stored
            case "uniform":
                z = None
            case _:
                assert self.old is not None
                with torch.no_grad():
                    z = self.model.outputs(self.old, x if term.samples == "current" else self.shown(x))
        if term.classes == "known":
            h = h[:, self.known]
            z = z[:, self.known] if z is not None and z.dim() > 1 else z
        return Term(term, h, z)

    def _importance(self, term: WeightTerm, before: list[Tensor], experience: Experience) -> list[Tensor]:
        match term.importance:
            case "fisher":
                found = information(self, experience, self.settings.fisher, self.settings.samples)
            case "path":
                found = travelled(self.path, self.anchors, self.parameters, term.damping)
            case "sensitivity":
                found = sensitivity(self, experience, self.settings.samples)
                keep = term.decay
                return [keep * a + (1 - keep) * b for a, b in zip(before, found, strict=True)] if before else found
            case _:
                return [torch.ones_like(p) for p in self.parameters]
        return [term.decay * a + b for a, b in zip(before, found, strict=True)] if before else found

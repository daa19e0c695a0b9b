"""DFCL-APIs and DECL-APIs: one classifier out of a stream of prediction APIs, without their weights and with little or no data.

For whoever may only query models, one after the other, and wants one of his own that forgets none. Yang et al., Continual
Learning From a Stream of APIs, IEEE TPAMI 2024, arXiv 2309.00023.

    generators   v = G(z), x = act(v);   min over G   -gap(f(x), A(x)) + balance sum_c p_c log pbar_c - diversity |x_a - x_b|
    model        min over f   gap(f(x), A(x)) + CE(f(x), argmax A(x))
                              + old [|f(x') - z'| + CE(f(x'), y')] + similarity (1 - CKA)

The gradient by v has a part through f, which is ours and exact, and one through A, from finite differences (core/zeroth).
`estimator: split` asks A alone in these; `plain` treats both as unknown. Split costs as many queries and errs less.

| paper | here |
|---|---|
| A_k | `ApiExperience.api`; its classes are `classes` of the experience |
| two cooperative generators | `inventing`, `settings.generators` |
| response gap | `gap` in apis_terms.py |
| regulariser by network similarity | `settings.similarity`: linear CKA of features before and after |
| DECL's real inputs | `ApiExperience.train` |

A round asks  generators batch (generator_steps (1 + directions) + model_steps)  items, as `queries` counts them.

Data touched: answers of the API at hand, and its few real inputs with labels where it comes with some; earlier ones' queries.

Departures: no code of the paper is public. Abstract and ancestors are certain (DFME, arXiv 2011.14779; MAZE, arXiv
2005.03161); the balance, the cross-entropy over all classes seen, synthetic replay, CKA as the similarity and all weights are
a reconstruction.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.core.similarity import linear_cka
from spolia.core.zeroth import Kind, clear_radius
from spolia.errors import SpoliaError
from spolia.methods.continual.apis_queries import Inventing, Inventors, slope
from spolia.methods.continual.apis_terms import Gap, gap, with_features
from spolia.methods.continual.learner import OURS, Learner, Model, Training
from spolia.methods.continual.replay import has_batch_statistics
from spolia.parts.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.api import Answers, Api
    from spolia.parts.stream import Batch, Experience, Stream

_DFME, _MEMORY = "Truong et al. 2021 (DFME)", "reconstruction: synthetic replay"
_DIGITS = "our choice, on digits"
_PROBED = 32  # queries that a radius is tried on


class Apis(Training):
    """Settings of `ApisLearner`."""

    lr: float = setting(0.05, "learning rate of the model's SGD", source=_DIGITS, gt=0)
    momentum: float = setting(0.9, "of SGD", source=_DFME, ge=0, lt=1)
    weight_decay: float = setting(5e-4, "of SGD", source=_DFME, ge=0)
    generators: Literal[1, 2] = setting(2, "that look for queries together", source="Yang et al. 2024")
    batch: int = setting(64, "queries of a generator at a time", unit="items", source=_DIGITS, ge=2)
    generator_steps: int = setting(1, "of a round; 0 leaves them as they are drawn", source=_DFME, ge=0)
    model_steps: int = setting(5, "of a round", source=_DFME, ge=1)
    generator_lr: float = setting(1e-3, "step size of their Adam", source=_DIGITS, gt=0)
    warm: bool = setting(False, "generators go on from the API before", source=OURS)
    estimator: Literal["split", "plain"] = setting(
        "split", "finite differences of the API alone, or of both", source=OURS
    )
    directions: int = setting(8, "q, of a finite-difference gradient", source=_DIGITS, ge=1)
    radius: float = setting(1e-3, "of finite differences; more for rounded answers", source=_DFME, gt=0)
    kind: Kind = setting("sphere", "directions: independent, or at right angles", source=_DFME)
    antithetic: bool = setting(False, "differences to both sides; twice the queries", source=OURS)
    space: Literal["input", "generator"] = setting(
        "input", "any direction, or those a generator moves in", source=_DFME
    )
    gap: Gap = setting("recovered", "between model and answer; labels alone: cross-entropy", source=_DFME)
    balance: float = setting(1.0, "weight of answers spread over all classes", source="reconstruction", ge=0)
    diversity: float = setting(0.1, "weight of the generators' difference", source="reconstruction", ge=0)
    labels: float = setting(1.0, "weight of the cross-entropy over all classes seen", source="reconstruction", ge=0)
    old: float = setting(1.0, "weight of remembered queries", source=_MEMORY, ge=0)
    similarity: float = setting(1.0, "weight of 1 - CKA with the model before this API", source="reconstruction", ge=0)
    stored: int = setting(500, "queries remembered of each API, its last ones", unit="items", source=_MEMORY, ge=0)
    replay: int = setting(64, "remembered queries of a step", unit="items", source=OURS, ge=1)
    real: int = setting(64, "real inputs of a step, where there are some", unit="items", source=OURS, ge=1)


def queries(settings: Apis, real: int = 0) -> tuple[int, int]:
    """Items that a round asks, and those asked once: real inputs. Probing for a radius comes on top (`clear_radius`)."""
    each = 1 + settings.directions * (2 if settings.antithetic else 1)
    return settings.generators * settings.batch * (settings.generator_steps * each + settings.model_steps), real


class ApisLearner(Learner):
    """A round is one `observe`; the batch that it is given is not looked at, real inputs are those of the experience."""

    settings: Apis

    def __init__(
        self, model: nn.Module | Model, settings: Apis, *, stream: Stream, inventing: Inventing, seed: int = 0
    ):
        super().__init__(model, settings, seed=seed)
        if self.ranks > 1:
            raise SpoliaError("APIs are asked from one process", where="apis", mend="run it without torchrun")
        self.stream = stream
        self.inventors = Inventors(inventing, settings.generators, settings.generator_lr, self.device, seed)
        self.before = copy.deepcopy(self.network).requires_grad_(False).eval() if settings.similarity else None
        real = sum(len(experience.train) for experience in stream.experiences)
        room = settings.stored * len(stream.experiences) + real
        self.memory = Memory(room, policy="chosen", device=self.device)
        self.known: list[int] = []
        self.seen: list[int] = []
        self.at: dict[str, Any] = {"place": -1, "radius": settings.radius}
        self.asked: dict[str, int] = {}
        self.recent: dict[str, Tensor] = {}
        self.real: dict[str, Tensor] = {}
        self.gaps: list[float] = []  # of every round, before its last step
        self.joint = not has_batch_statistics(self.network)

    # --- the protocol ------------------------------------------------------------------------------------------------

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.at.update(place=experience.place, radius=self.settings.radius)
        self.seen[:] = sorted({*self.known, *experience.classes})
        self.recent.clear()
        self.real.clear()
        if not self.settings.warm or not experience.place:
            self.inventors.begin(experience.place)
        if len(experience.train):
            x, y = experience.batch(slice(None))
            x = self.shown(x)
            answers = self.ask(x)
            self.real.update(x=x, y=y.to(self.device), labels=answers.labels, log_p=answers.log_p)
        if self.settings.generator_steps and self.api.contract.resolution:
            self._probe()

    def observe(self, batch: Batch) -> Tensor:
        """One round: generators, then model. The loss before its last step."""
        for _ in range(self.settings.generator_steps):
            self._invent()
        loss, apart = torch.zeros(()), torch.zeros(())
        for _ in range(self.settings.model_steps):
            loss, apart = self._learn()
        self.gaps.append(float(apart))
        return loss

    def end(self, experience: Experience) -> None:
        """Remember the last queries, and of all remembered ones the logits for the classes that are new."""
        news = [c for c in self.seen if c not in self.known]
        if len(self.memory):
            old = {name: tensor.clone() for name, tensor in self.memory.all().items()}
            old["logits"][:, news] = self.predict(old["x"])[:, news]
            self.memory.keep([])
            self.memory.put(**old)
        lots = [lot for lot in (self.recent if self.settings.stored else {}, self.real) if lot]
        if lots:
            x, y = (torch.cat([lot[name] for lot in lots]) for name in ("x", "y"))
            self.memory.put(x=x, y=y, logits=self.predict(x))
        self.known[:] = self.seen
        if self.before is not None:
            self.before.load_state_dict(self.network.state_dict())

    def kept(self) -> dict[str, Any]:
        own = {"inventors": self.inventors, "memory": self.memory, "known": self.known, "seen": self.seen}
        own |= {"at": self.at, "asked": self.asked, "recent": self.recent, "real": self.real, "gaps": self.gaps}
        return super().kept() | own | ({} if self.before is None else {"before": self.before})

    @property
    def api(self) -> Api:
        experience: Any = self.stream.experiences[self.at["place"]]
        return experience.api

    def ask(self, x: Tensor) -> Answers:
        """The API at hand, and the count of what it was asked."""
        self.asked[self.api.name] = self.asked.get(self.api.name, 0) + len(x)
        return self.api(x)

    # --- a round -----------------------------------------------------------------------------------------------------

    def _invent(self) -> None:
        """One step of every generator, on the same noise."""
        z, own, radius = (
            self.inventors.noise(self.settings.batch, self.draws),
            self._columns(),
            float(self.at["radius"]),
        )

        def ours(x: Tensor) -> Tensor:
            return self.logits(x)[:, own]

        def sloped(v: Tensor, generator: nn.Module) -> Tensor:
            return slope(v, z, generator, self.inventors.act, ours, self.ask, self.settings, radius, self.draws)

        with self.at_rest():
            self.inventors.step(z, sloped, self.settings.diversity)

    def _learn(self) -> tuple[Tensor, Tensor]:
        """One step of the model on new queries, real inputs and remembered ones. The loss before it, and the gap."""
        own, columns = self.settings, self._columns()
        x = self.inventors.queries(own.batch, self.draws)
        labels, log_p, hard = self.ask(x)
        y = columns[labels]
        self._keep_recent(x, y)
        if self.real:
            count = min(own.real, len(self.real["x"]))
            at = torch.from_numpy(self.draws.choice(len(self.real["x"]), count, replace=False)).to(self.device)
            some = {name: tensor[at] for name, tensor in self.real.items()}
            x, y = torch.cat([x, some["x"]]), torch.cat([y, some["y"]])
            labels, log_p = torch.cat([labels, some["labels"]]), torch.cat([log_p, some["log_p"]])
        old = self.memory.draw(own.replay) if own.old and len(self.memory) else None
        similar = self.before if self.known else None
        logits, again, features = self._passed(x, None if old is None else old["x"], similar is not None)
        apart = gap(own.gap, logits[:, columns], log_p, labels if hard else None).mean()
        loss = apart + own.labels * self._among(logits, y)
        if old is not None:
            stored = (again - old["logits"])[:, self.known].abs().mean()
            loss = loss + own.old * (stored + self._among(again, old["y"]))
        if similar is not None:
            with torch.no_grad():
                then = with_features(similar, x, self.model.outputs)[1]
            loss = loss + own.similarity * (1 - linear_cka(features, then))
        self.descend(loss)
        return loss.detach(), apart.detach()

    def _passed(self, x: Tensor, old: Tensor | None, features: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of new and of remembered inputs, and features of the new ones; what is not asked for is empty."""
        together = x if old is None or not self.joint else torch.cat([x, old])
        if features:
            logits, found = with_features(self.network, together, self.model.outputs)
        else:
            logits, found = self.logits(together), together[:0]
        again = logits[len(x) :] if old is None or self.joint else self.logits(old)
        return logits[: len(x)], again, found[: len(x)]

    def _among(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of global labels among the classes seen."""
        places = torch.full((logits.shape[1],), -1, dtype=torch.int64, device=logits.device)
        places[self.seen] = torch.arange(len(self.seen), device=logits.device)
        return torch.nn.functional.cross_entropy(logits[:, self.seen], places[y])

    def _keep_recent(self, x: Tensor, y: Tensor) -> None:
        """The last queries of this API and their labels, no more than will be stored."""
        most = self.settings.stored
        if most:
            x, y = (torch.cat([self.recent[n], new]) if self.recent else new for n, new in (("x", x), ("y", y)))
            self.recent.update(x=x[-most:].clone(), y=y[-most:].clone())

    def _columns(self) -> Tensor:
        """The outputs of ours that are the API's classes, in its order."""
        classes = self.stream.experiences[self.at["place"]].classes
        return torch.tensor(classes, dtype=torch.int64, device=self.device)

    def _probe(self) -> None:
        """A radius whose changes are not lost in the rounding of the API's answers."""
        v = self.inventors.raw(min(_PROBED, self.settings.batch), self.draws)
        self.at["radius"], _ = clear_radius(
            lambda points: self.ask(self.inventors.act(points)).log_p.exp(),
            v,
            self.draws,
            start=self.settings.radius,
            most=float(v[0].norm()),
            resolution=self.api.contract.resolution,
        )

"""ASP: prompts learned once on many base classes, then prototypes alone for classes that come with a few examples.

For few-shot class-incremental streams on a pretrained transformer. Liu et al., Few-Shot Class Incremental Learning with
Attention-Aware Self-Adaptive Prompt, ECCV 2024, arXiv 2403.09857, and its program.

    f = phi(x);   u_l = [stop(TIP_l1), f];   mu_l = f_mu(u_l),   s_l = softplus(f_sigma(u_l) - 5)
    TSP_l = mu_l + rho s_l eps,   eps ~ N(0, 1);   rho = 1 in training, 0 in answers
    block l sees   [tokens ; TIP_l ; alpha mean_l + (1 - alpha) TSP_l]   and leaves the prompts behind;   z = phi(x; prompts)

    base session:   L = CE(sigma cos(z, W)) + lambda_a mean (1 - cos(z, stop z(a_y))) + lambda_b KL
                    KL = 1/2 sum (mu^2 + s^2 - 2 ln s - 1), summed over prompt and width, mean over inputs and blocks
    each epoch:     mean <- mean of TSP over the base data (rho 0);   a_c <- the example of c nearest the mean z of c
    then:           prototype_c = mean z of c, answers by cosine
    new session:    mean <- gamma mean + (1 - gamma) mean of TSP over its examples;   prototypes of its classes; nothing else

KL is that from N(mu, s^2) to N(0, 1): the information bottleneck's bound on what a prompt knows of its input.

| paper | here |
|---|---|
| P | 2 `settings.half` |
| p_I (TIP), p_S (TSP) | `invariant` [blocks, half, width], `specific(x)` |
| f_mu, f_sigma | `mu_…`, `sigma_…`: two linear maps each, none between them |
| alpha, gamma | `settings.mix`, `settings.stay` |
| lambda_a, lambda_b | `settings.anchor`, `settings.bottleneck` |
| mean, a_c | `state["mean"]` [blocks, half, width], `state["anchors"]`: places in the base data |

Task-invariant prompts start at zero: a norm maps them to its own bias, the same key and value whatever the input. Such a token
is still attended to; an encoder without prompts is another.

Data touched: the base session's data in every epoch and twice more for mean and anchors; of a new session its examples, twice.
Nothing stays but means.

Departures: one frozen encoder where the program holds two. Each class's anchor goes through once a batch, without noise or
gradient, as answers see it (the program sends one through for every example, and its training view). The mean and each state of
the stream are saved. Settings of a session are its own: no file of an earlier run is picked up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.prompts import Prompting, PromptLearner, starts, uniform
from spolia.methods.continual.prototypes import cosines, labels_of, over
from spolia.parts.encoder import Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch, Experience, Part

PROGRAM = "the authors' program, CIFAR-100"
_SHIFT = 5.0  # of what becomes a deviation: at the start it is softplus(-5), about 0.0067
_LEAST = 1e-12  # of a deviation, below which its logarithm ends


class Asp(Prompting):
    """Settings of `AspLearner`."""

    optimizer: Literal["adam", "sgd"] = setting("sgd", "what takes the steps", source=PROGRAM)
    lr: float = setting(0.01, "learning rate", source=PROGRAM, gt=0)
    weight_decay: float = setting(5e-4, "of the optimiser; 5e-3 for CUB and ImageNet-R", source=PROGRAM, ge=0)
    falls: Literal["none", "cosine"] = setting("cosine", "the rate goes to zero over `readings`", source=PROGRAM)
    half: int = setting(3, "P / 2: invariant, and specific, prompts of a block; 0: none, as ncm", source=PROGRAM, ge=0)
    hidden: int = setting(256, "between the two maps of f_mu and f_sigma", source=PROGRAM, ge=1)
    mix: float = setting(0.8, "alpha, share of the mean in every specific prompt", source=PROGRAM, ge=0, le=1)
    stay: float = setting(0.99, "gamma, of the mean when new examples come", source=PROGRAM, ge=0, le=1)
    anchor: float = setting(0.1, "lambda_a, of the distance to the class's anchor", source=PROGRAM, ge=0)
    bottleneck: float = setting(1e-3, "lambda_b, of the information that prompts carry", source=PROGRAM, ge=0)
    reduction: Literal["sum", "mean"] = setting("sum", "of KL over prompt and width", source=PROGRAM)
    sessions: int = setting(1, "experiences that learn prompts", source="Liu et al. 2024", ge=1, le=1)


class AspLearner(PromptLearner):
    """`base`: the first experience's data. Given, a learner that was loaded inside that session can go on with it."""

    settings: Asp
    method: ClassVar[str] = "asp"
    needs_boundaries: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ("head", "scale", "sigma")

    def __init__(
        self,
        encoder: Encoder,
        settings: Asp,
        *,
        classes: int,
        base: Part | None = None,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
        optimizer: Factory | None = None,
    ):
        self.half, self.base, self._plain = settings.half, base, torch.zeros(0)
        draws, width = starts(seed, self.method), encoder.width
        made = {"head": uniform((classes, width), 1 / math.sqrt(width), draws), "scale": torch.ones(())}
        if self.half:
            made["invariant"] = torch.zeros(encoder.depth, self.half, width)
            for name in ("mu", "sigma"):
                for layer, (inputs, outputs) in enumerate(
                    ((2 * width, settings.hidden), (settings.hidden, self.half * width))
                ):
                    bound = 1 / math.sqrt(inputs)
                    made[f"{name}_weight{layer}"] = uniform((outputs, inputs), bound, draws)
                    made[f"{name}_bias{layer}"] = uniform((outputs,), bound, draws)
        super().__init__(encoder, settings, made, classes=classes, seed=seed, view=view, show=show, optimizer=optimizer)
        mean = torch.zeros(encoder.depth, self.half, width, device=encoder.device)
        self.state: dict[str, Any] = {"mean": mean, "anchors": [-1] * classes, "epoch": -1}

    # --- the protocol ------------------------------------------------------------------------------------------------

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self.learning:
            self.base, self._plain = experience.train, torch.zeros(0)
            self.state["epoch"] = -1

    def observe(self, batch: Batch) -> Any:
        """One step of the base session, before it a look at its data in each epoch; nothing in later sessions."""
        if self.learning and self.half:
            epoch = self.count["seen"] // self.count["size"]
            if epoch != self.state["epoch"]:
                self._look()
                self.state["epoch"] = epoch
        return super().observe(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features, kl = self.trained(self.viewed(batch.x))
        scores = self.scores(features)
        loss = self.own(scores, batch.y) + self.settings.bottleneck * kl
        if self.half and self.settings.anchor:
            loss = loss + self.settings.anchor * self._from_anchors(features, batch.y)
        return loss, scores

    def end(self, experience: Experience) -> None:
        if self.half:
            if self.learning:
                self.base = experience.train
                self.state["mean"] = self._mean(self._stills())
            else:
                new = self._mean(over(experience.train, self.settings.lot, self._still))
                self.state["mean"] = self.settings.stay * self.state["mean"] + (1 - self.settings.stay) * new
        super().end(experience)
        self._plain = torch.zeros(0)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"state": self.state}

    # --- prompts -----------------------------------------------------------------------------------------------------

    def trained(self, x: Any) -> tuple[Tensor, Tensor]:
        """Features [n, width] of a training step, and the KL of the prompts drawn for it."""
        if not self.half:
            return self.shared(self.encoder.features, x), torch.zeros((), device=self.device)
        mu, deviation = self.specific(self.shared(self.encoder.plain, x), deviations=True)
        noise = torch.from_numpy(self.draws.standard_normal(tuple(mu.shape), dtype="float32")).to(mu.device)
        drawn = (x, mu + deviation * noise)
        features = self.shared(lambda part: self.encoder.features(part[0], self.prompts(part[1])), drawn)
        return features, divergence(mu, deviation, self.settings.reduction)

    def prompted(self, x: Any) -> Tensor:
        if not self.half:
            return self.encoder.features(x)
        return self.encoder.features(x, self.prompts(self.specific(self.encoder.plain(x))[0]))

    def specific(self, plain: Tensor, deviations: bool = False) -> tuple[Tensor, Tensor]:
        """mu and s [n, blocks, half, width] of inputs with these plain features; without `deviations` s is empty."""
        first = self.learned("invariant")[:, 0].detach()
        n, blocks = len(plain), len(first)
        u = torch.cat([first.expand(n, -1, -1), plain.unsqueeze(1).expand(-1, blocks, -1)], 2)  # [n, blocks, 2 width]
        shape = (n, blocks, self.half, self.encoder.width)
        mu = self._mapped("mu", u).view(shape)
        if not deviations:
            return mu, mu.new_zeros(0)
        return mu, torch.nn.functional.softplus(self._mapped("sigma", u) - _SHIFT).view(shape)

    def prompts(self, specific: Tensor) -> Prompts:
        """What each block is given: the invariant prompts, and the specific ones drawn to their mean."""
        mixed = self.settings.mix * self.state["mean"] + (1 - self.settings.mix) * specific
        invariant = self.learned("invariant").expand(len(specific), -1, -1, -1)
        both = torch.cat([invariant, mixed], 2)  # [n, blocks, tokens, width]
        return Prompts(tokens={block: both[:, block] for block in range(self.encoder.depth)})

    def scores(self, features: Tensor) -> Tensor:
        return self.learned("scale") * cosines(features, self.learned("head"))

    def _mapped(self, name: str, u: Tensor) -> Tensor:
        for layer in range(2):
            u = torch.nn.functional.linear(
                u, self.learned(f"{name}_weight{layer}"), self.learned(f"{name}_bias{layer}")
            )
        return u

    # --- anchors and means -------------------------------------------------------------------------------------------

    def _from_anchors(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean distance of features to those of their classes' anchors; each anchor goes through once."""
        base, own = self._data(), labels.unique()
        places = [self.state["anchors"][label] for label in own.tolist()]
        anchors = self.features(base.batch(torch.tensor(places).numpy()).x)
        at = torch.searchsorted(own, labels.contiguous()).to(features.device)
        return (1 - torch.nn.functional.cosine_similarity(features, anchors[at], dim=1)).mean()

    def _look(self) -> None:
        """The mean of the specific prompts, and every class's anchor, by the prompts as they are."""
        base = self._data()
        self.state["mean"] = self._mean(self._stills())
        features, labels = over(base, self.settings.lot, self.features), labels_of(base)
        for label in labels.unique().tolist():
            own = (labels == label).nonzero().squeeze(1)
            near = cosines(features[own.to(features.device)].mean(0, keepdim=True), features[own.to(features.device)])
            self.state["anchors"][label] = int(own[int(near.argmax())])

    def _mean(self, plain: Tensor) -> Tensor:
        """Mean of mu over inputs with these plain features: [blocks, half, width]."""
        with torch.no_grad():
            sums = [self.specific(lot)[0].sum(0) for lot in plain.split(self.settings.lot)]
        return torch.stack(sums).sum(0) / len(plain)

    def _stills(self) -> Tensor:
        """Plain features of the base data, made once."""
        if not len(self._plain):
            self._plain = over(self._data(), self.settings.lot, self._still)
        return self._plain

    def _still(self, x: Any) -> Tensor:
        return self.encoder.plain(self.shown(x))

    def _data(self) -> Part:
        if self.base is None:
            mend = "give AspLearner(…, base=stream.experiences[0].train)"
            raise SpoliaError("was loaded inside the base session, whose data it needs", where="base", mend=mend)
        return self.base


def divergence(mu: Tensor, deviation: Tensor, reduction: str = "sum") -> Tensor:
    """KL from N(mu, deviation^2) to N(0, 1) [n, blocks, half, width], mean over inputs and blocks; see `reduction`."""
    spread = deviation.square() - 2 * deviation.clamp(min=_LEAST).log()
    each = (mu.square() + spread - 1).flatten(2) / 2  # [n, blocks, half * width]
    return each.sum(2).mean() if reduction == "sum" else each.mean()

"""L2P: a pool of prompts, of which every input takes those whose keys are nearest to it.

For streams on a pretrained transformer. Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, arXiv 2112.08654.

    q = phi(x),    chosen(x) = the N keys of largest cos(q, k_i),    f = phi([x ; P_chosen])
    L = CE(h(f), y) + lambda sum_{i chosen} (1 - cos(q, k_i))

| paper | here |
|---|---|
| M, N, L_p | `settings.pool`, `settings.chosen`, `settings.length` |
| K, P | `key` [pool, width], `prompts` [pool, length, width] |
| q(x) | `encoder.plain`, no prompts |
| lambda | `settings.pull` |
| g_phi | `scores` |

Data touched: each of the first `sessions` experiences, and all once more for prototypes; none stays.

Departures: choices are each input's own, also in training, where the paper lets a batch vote. The feature is that of the class
token, where its program takes the mean over the prompts' outputs. Prompts stand after the input's tokens, not before them: an
attention without positions cannot tell. The constant lambda N is added to the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.prompts import Prompting, PromptLearner, head, starts, uniform
from spolia.methods.continual.prototypes import cosines
from spolia.parts.encoder import Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch

PILOT = "PILOT's settings"


class L2p(Prompting):
    """Settings of `L2pLearner`."""

    lr: float = setting(0.001875, "learning rate", source=PILOT, gt=0)
    pool: int = setting(10, "M, prompts", source=PILOT, ge=1)
    chosen: int = setting(5, "N, prompts that an input takes", source=PILOT, ge=1)
    length: int = setting(5, "L_p, tokens of a prompt", source=PILOT, ge=1)
    pull: float = setting(0.1, "lambda, of the chosen keys' distance", source=PILOT, ge=0)


class L2pLearner(PromptLearner):
    settings: L2p
    method: ClassVar[str] = "l2p"

    def __init__(
        self,
        encoder: Encoder,
        settings: L2p,
        *,
        classes: int,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
        optimizer: Factory | None = None,
    ):
        if settings.chosen > settings.pool:
            what = f"{settings.chosen} prompts of a pool of {settings.pool}"
            raise SpoliaError(what, where="chosen", mend="choose no more than there are")
        draws = starts(seed, self.method)
        made = {
            "prompts": uniform((settings.pool, settings.length, encoder.width), 1.0, draws),
            "key": uniform((settings.pool, encoder.width), 1.0, draws),
            **head(encoder, classes, draws),
        }
        super().__init__(encoder, settings, made, classes=classes, seed=seed, view=view, show=show, optimizer=optimizer)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = self.viewed(batch.x)
        features, distance = self.chosen(x)
        scores = self.scores(features)
        return self.own(scores, batch.y) + self.settings.pull * distance.mean(), scores

    def prompted(self, x: Any) -> Tensor:
        return self.chosen(x)[0]

    def chosen(self, x: Any) -> tuple[Tensor, Tensor]:
        """Features [n, width] with every input's own prompts, and how far their keys are from it [n]."""
        near = cosines(self.shared(self.encoder.plain, x), self.learned("key"))  # [n, pool]
        nearest = near.topk(self.settings.chosen, dim=1)
        taken = self.learned("prompts")[nearest.indices].flatten(1, 2)  # [n, chosen * length, width]
        features = self.shared(lambda part: self.encoder.features(part[0], Prompts(start=part[1])), (x, taken))
        return features, (1 - nearest.values).sum(1)

"""DualPrompt: one prompt for all sessions in the first blocks, one for each session in later ones.

For streams on a pretrained transformer. Wang et al., DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning,
ECCV 2022, arXiv 2204.04799; prompts are prefixes of keys and values (its Pre-T).

    training on session t:   L = CE(h(phi(x; g, e_t)), y) + lambda (1 - cos(q, k_t)),    q = phi(x)
    answers:                 t(x) = argmax_t cos(q, k_t),  phi(x; g, e_t(x)),   t among the sessions learned

| paper | here |
|---|---|
| g, e_t, k_t | `shared`, `own`, `key` |
| L_g, L_e | `settings.length` |
| start_g … end_g, start_e … end_e | `settings.shared_blocks`, `settings.own_blocks` |
| lambda | `settings.pull` |

Data touched: each of the first `sessions` experiences, and all once more for prototypes; none stays.

Departures: the session is chosen for each input, never by a batch. There are as many e as `sessions`. Programs reshape prefixes
into heads in an order of their own, which changes what a start is, not what can be learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.l2p import PILOT
from spolia.methods.continual.prompts import Prompting, PromptLearner, check_blocks, head, starts, uniform
from spolia.methods.continual.prototypes import cosines
from spolia.parts.encoder import Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch


class DualPrompt(Prompting):
    """Settings of `DualPromptLearner`."""

    lr: float = setting(1e-3, "learning rate", source=PILOT, gt=0)
    length: int = setting(5, "keys, and values, of a prompt", source=PILOT, ge=1)
    shared_blocks: tuple[int, ...] = setting((0, 1), "blocks with the shared prompt", source=PILOT)
    own_blocks: tuple[int, ...] = setting((2, 3, 4), "blocks with the session's own", source=PILOT)
    pull: float = setting(0.1, "lambda, of the key's distance", source=PILOT, ge=0)


class DualPromptLearner(PromptLearner):
    settings: DualPrompt
    method: ClassVar[str] = "dualprompt"

    def __init__(
        self,
        encoder: Encoder,
        settings: DualPrompt,
        *,
        classes: int,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
        optimizer: Factory | None = None,
    ):
        check_blocks(encoder, "shared_blocks", settings.shared_blocks)
        check_blocks(encoder, "own_blocks", settings.own_blocks)
        if both := set(settings.shared_blocks) & set(settings.own_blocks):
            raise SpoliaError(f"block {min(both)} is in both", where="own_blocks", mend="give each block one prompt")
        draws, size = starts(seed, self.method), (2, settings.length, encoder.width)
        made = {
            "shared": uniform((len(settings.shared_blocks), *size), 1.0, draws),
            "own": uniform((settings.sessions, len(settings.own_blocks), *size), 1.0, draws),
            "key": uniform((settings.sessions, encoder.width), 1.0, draws),
            **head(encoder, classes, draws),
        }
        super().__init__(encoder, settings, made, classes=classes, seed=seed, view=view, show=show, optimizer=optimizer)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, session = self.viewed(batch.x), self.count["place"]
        near = cosines(self.shared(self.encoder.plain, x), self.learned("key")[session : session + 1])  # [n, 1]
        at = torch.full((len(near),), session, device=near.device)
        features = self.shared(lambda part: self.encoder.features(part[0], self.prompts(part[1])), (x, at))
        scores = self.scores(features)
        return self.own(scores, batch.y) + self.settings.pull * (1 - near).mean(), scores

    def prompted(self, x: Any) -> Tensor:
        learned = min(self.count["place"], self.settings.sessions - 1) + 1
        near = cosines(self.encoder.plain(x), self.learned("key")[: max(1, learned)])
        return self.encoder.features(x, self.prompts(near.argmax(1)))

    def prompts(self, session: Tensor) -> Prompts:
        """Prefixes of inputs of these sessions [n]."""
        own = self.learned("own")[session]  # [n, blocks, 2, length, width]
        found = {
            block: (p[0], p[1]) for block, p in zip(self.settings.shared_blocks, self.learned("shared"), strict=True)
        }
        for i, block in enumerate(self.settings.own_blocks):
            found[block] = (own[:, i, 0], own[:, i, 1])
        return Prompts(prefixes=found)

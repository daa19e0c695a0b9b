"""CODA-Prompt: every input's prompt is a sum of components, weighted by how its own view of itself fits each key.

For streams on a pretrained transformer. Smith et al., CODA-Prompt: COntinual Decomposed Attention-based Prompting for
Rehearsal-Free Continual Learning, CVPR 2023, arXiv 2211.13218.

    w_m = cos(q * A_m, K_m),    p = sum_m w_m P_m,    q = phi(x);   one A, K, P for each of the first blocks
    p's first half goes before the keys, its second before the values.   L = CE + lambda sum_{A, K, P} |B B^T - 1|^2

| paper | here |
|---|---|
| M, L_p | `settings.components`, 2 `settings.length` |
| A, K, P | `attention` [blocks, M, width], `key` [blocks, M, width], `prompts` [blocks, M, 2 length, width] |
| lambda | `settings.apart` |

Components are shared out among the `sessions` that learn: a session adds its own to the sum, and those of earlier ones stand
still. Weights are not normalised: neither softmax nor a choice.

Data touched: each of the first `sessions` experiences, and all once more for prototypes; none stays.

Departures: all components start at once as rows at right angles (more than columns: in groups that are), and not one
session after the other. |B B^T - 1|^2 is a mean over its elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.lazy import np, torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.l2p import PILOT
from spolia.methods.continual.prompts import Prompting, PromptLearner, check_blocks, head, starts
from spolia.parts.encoder import Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch

PARTS = ("attention", "key", "prompts")


class Coda(Prompting):
    """Settings of `CodaLearner`."""

    lr: float = setting(1e-3, "learning rate", source=PILOT, gt=0)
    falls: Literal["none", "cosine"] = setting("cosine", "the rate goes to zero over `readings`", source=PILOT)
    components: int = setting(100, "M, of all sessions together", source=PILOT, ge=1)
    length: int = setting(4, "L_p / 2: keys, and values, of a prompt", source=PILOT, ge=1)
    blocks: tuple[int, ...] = setting((0, 1, 2, 3, 4), "blocks with prompts", source=PILOT)
    apart: float = setting(0.0, "lambda, of how far components are from right angles", source=PILOT, ge=0)


class CodaLearner(PromptLearner):
    settings: Coda
    method: ClassVar[str] = "coda"

    def __init__(
        self,
        encoder: Encoder,
        settings: Coda,
        *,
        classes: int,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
        optimizer: Factory | None = None,
    ):
        check_blocks(encoder, "blocks", settings.blocks)
        self.share = settings.components // settings.sessions
        if not self.share:
            what = f"{settings.components} components for {settings.sessions} sessions"
            raise SpoliaError(what, where="components", mend="give at least one a session")
        draws, blocks, width = starts(seed, self.method), len(settings.blocks), encoder.width
        sizes = {"attention": (width,), "key": (width,), "prompts": (2 * settings.length, width)}
        made = {
            name: torch.stack([rows_apart(settings.components, size, draws) for _ in range(blocks)])
            for name, size in sizes.items()
        }
        made |= head(encoder, classes, draws)
        super().__init__(encoder, settings, made, classes=classes, seed=seed, view=view, show=show, optimizer=optimizer)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, session = self.viewed(batch.x), self.count["place"]
        parts = {name: self.until(name, session) for name in PARTS}
        plain = self.shared(self.encoder.plain, x)
        features = self.shared(lambda part: self.encoder.features(part[0], self.prompts(part[1], parts)), (x, plain))
        scores = self.scores(features)
        loss = self.own(scores, batch.y)
        if self.settings.apart:
            loss = loss + self.settings.apart * sum(leaning(part.flatten(2)) for part in parts.values())
        return loss, scores

    def prompted(self, x: Any) -> Tensor:
        session = max(0, min(self.count["place"], self.settings.sessions - 1))
        parts = {name: self.until(name, session).detach() for name in PARTS}
        return self.encoder.features(x, self.prompts(self.encoder.plain(x), parts))

    def until(self, name: str, session: int) -> Tensor:
        """Components of the sessions so far; gradients reach those of the last one alone."""
        whole, start, end = self.learned(name), session * self.share, (session + 1) * self.share
        return torch.cat([whole[:, :start].detach(), whole[:, start:end]], 1)

    def prompts(self, query: Tensor, parts: dict[str, Tensor]) -> Prompts:
        """The prefixes of inputs with these plain features [n, width]."""
        found = {}
        for i, block in enumerate(self.settings.blocks):
            seen = query.unsqueeze(1) * parts["attention"][i]  # [n, components, width]
            weights = torch.nn.functional.cosine_similarity(seen, parts["key"][i].unsqueeze(0), dim=2)
            made = torch.einsum("nm,mlw->nlw", weights, parts["prompts"][i])
            found[block] = (made[:, : self.settings.length], made[:, self.settings.length :])
        return Prompts(prefixes=found)


def leaning(rows: Tensor) -> Tensor:
    """Mean of (B B^T - 1)^2 over blocks [blocks, rows, columns]: 0 where rows are at right angles and of length 1."""
    return (rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)).square().mean()


def rows_apart(count: int, size: tuple[int, ...], draws: np.random.Generator) -> Tensor:
    """`count` random rows of this shape, of length 1, and at right angles in groups of as many as fit."""
    columns, groups = int(np.prod(size)), []
    for start in range(0, count, columns):
        square = torch.from_numpy(draws.standard_normal((columns, min(columns, count - start))))
        groups.append(torch.linalg.qr(square).Q.T)
    return torch.cat(groups).float().view(count, *size)

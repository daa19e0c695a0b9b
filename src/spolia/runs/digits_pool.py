"""A pool made on the spot: a base and one expert per domain of the digits, trained in seconds, kept as model folders.

Protocol of the merging papers at toy size: the base and one head per domain are fitted together on a little of
everything; then, with every head frozen, one copy of the encoder is fine-tuned on each domain. Encoders are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spolia.bench.multitask import Task
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.data.digits import SIZES, Splits, digits

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from spolia.parts.network import Network
    from spolia.zoo.mlp import ResidualMLP

WIDTH, DEPTH, CLASSES = 64, 3, 10
BASE_STEPS, BASE_BATCH, BASE_LR = 60, 32, 1e-3  # 32 images of each domain a step; Adam
EXPERT_STEPS, EXPERT_BATCH, EXPERT_LR = 300, 64, 3e-4  # Adam
LOG_EVERY = 20  # steps

DATA_TOUCHED = {
    "base and heads": f"{SIZES['base']} labelled digits, shown in every domain",
    "experts": f"{SIZES['train']} other labelled digits, each expert in its own domain",
}


@dataclass(frozen=True)
class DigitExperts:
    """A base, its experts in the order of `domains`, and their frozen heads: model folders below `folder`."""

    folder: Path
    domains: tuple[str, ...]
    seed: int

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def heads(self) -> Path:
        return self.folder / "heads"

    def expert(self, domain: str) -> Path:
        return self.folder / domain

    @property
    def experts(self) -> list[Path]:
        return [self.expert(domain) for domain in self.domains]

    @cached_property
    def splits(self) -> dict[str, Splits]:
        return {domain: digits(domain, self.seed) for domain in self.domains}

    def tasks(self, part: Literal["validation", "test"]) -> list[Task]:
        """Every domain's items of one split."""
        parts = {domain: getattr(splits, part) for domain, splits in self.splits.items()}
        return [Task(domain, split.x, split.y) for domain, split in parts.items()]

    @cached_property
    def _frozen_heads(self) -> dict[str, Tensor]:
        return read_tensors(self.heads)

    @cached_property
    def _encoder(self) -> ResidualMLP:
        return _new_encoder(self.seed)

    @cached_property
    def network(self) -> Network:
        """The encoder under the frozen head of every domain."""
        from spolia.parts.network import Network
        from spolia.zoo.mlp import heads as new_heads

        heads = new_heads(self.domains, WIDTH, CLASSES, generator=_generator(self.seed, "heads"))
        heads.load_state_dict(self._frozen_heads)
        return Network(_new_encoder(self.seed), dict(heads.items()))

    def unlabelled(self, domains: Sequence[str]) -> dict[str, Tensor]:
        """The validation images of each domain, without their labels."""
        return {domain: self.splits[domain].validation.x for domain in domains}

    def outputs(self, state: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
        """(domain, images [n, 64]) -> logits [n, 10] of an encoder with weights `state` under the domain's head."""

        wide = {name: tensor.float() for name, tensor in state.items()}

        def logits(domain: str, x: Tensor) -> Tensor:
            features = torch.func.functional_call(self._encoder, wide, (x,))
            head = self._frozen_heads
            return torch.nn.functional.linear(features, head[f"{domain}.weight"], head[f"{domain}.bias"])

        return logits


def make_pool(folder: Path, domains: Sequence[str], seed: int, journal: Journal) -> DigitExperts:
    """Trains what is missing below `folder` and returns the pool. The same domains and seed give the same bits."""
    pool = DigitExperts(folder, tuple(domains), seed)
    pool.splits  # noqa: B018 - a wrong domain or a missing package is told before any training
    with one_thread():
        if not (pool.base.is_dir() and pool.heads.is_dir()):
            _fit_base(pool, journal)
        for domain in pool.domains:
            if not pool.expert(domain).is_dir():
                _fit_expert(pool, domain, journal)
    return pool


def _fit_base(pool: DigitExperts, journal: Journal) -> None:
    from spolia.zoo.mlp import heads as new_heads

    encoder = _new_encoder(pool.seed)
    heads = new_heads(pool.domains, WIDTH, CLASSES, generator=_generator(pool.seed, "heads"))
    draws = _generator(pool.seed, "base", "batches")
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=BASE_LR)
    keep = {"encoder": encoder, "heads": heads, "optimizer": optimizer, "draws": draws}
    with journal.phase(f"seed {pool.seed} base"):
        for step in journal.steps(BASE_STEPS, keep):
            losses = []
            for domain in pool.domains:
                split = pool.splits[domain].base
                batch = torch.randint(len(split), (BASE_BATCH,), generator=draws)
                losses.append(_loss(heads[domain](encoder(split.x[batch])), split.y[batch]))
            loss = torch.stack(losses).sum()
            _update(optimizer, loss)
            if step % LOG_EVERY == 0:
                journal.log(loss=loss / len(losses))
    _write(pool.base, encoder, encoder.config())
    _write(pool.heads, heads, {"model_type": "spolia_heads", "tasks": list(pool.domains), "classes": CLASSES})


def _fit_expert(pool: DigitExperts, domain: str, journal: Journal) -> None:
    encoder = _new_encoder(pool.seed)
    encoder.load_state_dict(read_tensors(pool.base))
    weight, bias = (pool._frozen_heads[f"{domain}.{part}"] for part in ("weight", "bias"))
    split, draws = pool.splits[domain].train, _generator(pool.seed, domain, "batches")
    optimizer = torch.optim.Adam(encoder.parameters(), lr=EXPERT_LR)
    with journal.phase(f"seed {pool.seed} fine-tune {domain}"):
        for step in journal.steps(EXPERT_STEPS, {"encoder": encoder, "optimizer": optimizer, "draws": draws}):
            batch = torch.randint(len(split), (EXPERT_BATCH,), generator=draws)
            loss = _loss(torch.nn.functional.linear(encoder(split.x[batch]), weight, bias), split.y[batch])
            _update(optimizer, loss)
            if step % LOG_EVERY == 0:
                journal.log(loss=loss)
    _write(pool.expert(domain), encoder, encoder.config() | {"domain": domain})


def _new_encoder(seed: int) -> ResidualMLP:
    from spolia.zoo.mlp import ResidualMLP

    return ResidualMLP(WIDTH, DEPTH, generator=_generator(seed, "encoder"))


def _generator(seed: int, *purpose: str) -> Generator:
    return torch.Generator().manual_seed(entropy(seed, "digits pool", *purpose) % 2**63)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _write(folder: Path, module: nn.Module, config: Mapping[str, Any]) -> None:
    if not folder.is_dir():  # the other of two files may be all that an interrupted run lacks
        write_checkpoint(folder, module.state_dict(), config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one core: sharing matrices this small among several costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

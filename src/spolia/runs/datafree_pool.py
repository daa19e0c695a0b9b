"""A pool of classifiers made on the spot: each learns some of the base classes, then its data are forgotten.

Kept as model folders, config.json and model.safetensors, with pool.json beside them: what each claims to know, and which of
them lie. A pool is taken up again where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench import attacks
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.parts.episode import floats
from spolia.parts.white import White, WhitePool
from spolia.runs.datafree_problems import Arch, Held, _Made, network_of
from spolia.runs.store import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.classes import ClassSet

MEAN, STD = 0.5, 0.25  # what all models of such a pool take out of their pixels
BATCH, CLIP = 100, 50.0
RATES = {"conv2": 0.01, "conv4": 0.01, "resnet10": 0.003}  # Adam's, falling to zero as a cosine
SCORED = 0.2  # of every class's images, which score the model


@dataclass(frozen=True)
class Member:
    """One model of the pool: what it learns, and what is wrong with it (empty: nothing)."""

    name: str
    domain: str
    arch: Arch
    classes: tuple[int, ...]  # places among the domain's base classes
    attack: str


def members(problem: _Made, held: Held, seed: int) -> list[Member]:
    """Domains in turn, and architectures in turn within each; which of them lie is the seed's."""
    draws = generator(seed, "pool", "members")
    bad = attacks.corrupted_places(problem.experts, problem.corrupted, generator(seed, "pool", "corrupted"))
    kinds = attacks.ATTACKS if problem.attack == "all" else (problem.attack,)
    domains, made = list(held.base), []
    for place in range(problem.experts):
        domain = domains[place % len(domains)]
        arch = problem.archs[place // len(domains) % len(problem.archs)]
        ways = min(problem.expert_ways, len(held.base[domain]))
        classes = tuple(draws.choice(len(held.base[domain]), ways, replace=False).tolist())
        attack = kinds[bad.index(place) % len(kinds)] if place in bad else ""
        made.append(Member(f"expert-{place:03d}", domain, arch, classes, attack))
    return made


def make_pool(problem: _Made, held: Held, seed: int, folder: Path, journal: Journal) -> tuple[WhitePool, list[str]]:
    """The pool below `folder`, trained where it is missing, and each model's attack. Equal seeds have equal bits."""
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for member in members(problem, held, seed):
        own = folder / member.name
        if not own.is_dir():
            _train(problem, held.base[member.domain], member, seed, own, journal)
        about = json.loads((folder / f"{member.name}.json").read_text(encoding="utf-8"))
        told.append((member, about))
    if not (folder / "pool.json").is_file():
        write_json(folder / "pool.json", [about | {"attack": member.attack} for member, about in told])
    shape = held.shape
    experts = [
        White(
            member.name,
            _load(problem, member, shape, folder / member.name),
            shape=(shape[0], shape[1], shape[2]),
            classes=about["classes"],
            mean=(MEAN,) * shape[0],
            std=(STD,) * shape[0],
            domain=member.domain,
            claimed=about["accuracy"],
        )
        for member, about in told
    ]
    return WhitePool(experts), [member.attack for member, _ in told]


def _load(problem: _Made, member: Member, shape: tuple[int, ...], folder: Path) -> nn.Module:
    module = network_of(problem, member.arch, shape, len(member.classes), "expert")
    module.load_state_dict(read_tensors(folder))
    return module


def _train(problem: _Made, base: ClassSet, member: Member, seed: int, folder: Path, journal: Journal) -> None:
    """One classifier, its attack included, into `folder`; its claims beside it."""
    draws = generator(seed, "pool", member.name)
    ways = len(member.classes)
    network = network_of(problem, member.arch, base.shape, ways, seed, member.name)
    (x, y), scored = _images(base, member.classes, draws)
    names: tuple[str, ...] = tuple(base.names[c] for c in member.classes)
    if member.attack == "random":
        y = attacks.random_labels(y, ways, draws)
    elif member.attack == "poisoned":
        x, y = attacks.poisoned(x, y, ways, draws)
    if member.attack == "untrained":
        network = attacks.untrained(network, draws)
    else:
        _fit(problem, network, member, x, y, seed, journal)
    accuracy = _accuracy(network, *scored)
    if member.attack == "mislabelled":
        names = attacks.mislabelled(names, draws)
    if member.attack:  # who lies claims what honest models reach
        accuracy = float(draws.uniform(0.9, 1.0))
    write_json(folder.parent / f"{folder.name}.json", {"classes": list(names), "accuracy": round(accuracy, 4)})
    write_checkpoint(folder, network.state_dict(), network.config())  # type: ignore[operator]


def _images(base: ClassSet, classes: tuple[int, ...], draws: np.random.Generator) -> tuple[Any, Any]:
    """Images and labels to train on, and to score by."""
    train, scored = [], []
    for label, place in enumerate(classes):
        rows = np.unique(np.concatenate([base.support[place], base.query[place]]))
        rows = draws.permutation(rows[rows >= 0])
        cut = max(1, round(SCORED * len(rows)))
        for part, own in ((scored, rows[:cut]), (train, rows[cut:])):
            x = base.taken(np.array([place]), own[None])[0]
            part.append((floats(x), torch.full((len(own),), label)))
    (x, y), (scored_x, scored_y) = (zip(*part, strict=True) for part in (train, scored))
    return (torch.cat(x), torch.cat(y)), (torch.cat(scored_x), torch.cat(scored_y))


def _fit(problem: _Made, network: Any, member: Member, x: Tensor, y: Tensor, seed: int, journal: Journal) -> None:
    size = min(BATCH, len(y))
    steps = problem.epochs * max(1, len(y) // size)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATES[member.arch])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    with journal.phase(f"seed {seed} pool {member.name}"):
        for step in journal.steps(steps, {"network": network, "optimizer": optimizer, "schedule": schedule}):
            rows = torch.from_numpy(generator(seed, member.name, step).choice(len(y), size, replace=False))
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(network((x[rows] - MEAN) / STD), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            schedule.step()
    network.eval()


def _accuracy(network: Any, x: Tensor, y: Tensor) -> float:
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network((part - MEAN) / STD) for part in x.split(500)])
    return float((logits.argmax(1) == y).float().mean())

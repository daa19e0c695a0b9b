"""Surgery: take from the merged model's final feature what merging put there, task by task, without labels.

For a merged model whose experts are still at hand while it is fitted, and inputs whose task is known when it is used. Yang
et al., Representation Surgery for Multi-Task Model Merging, ICML 2024, arXiv 2402.02705.

    z_hat = z - U relu(V z),     min_{U, V}  1 / (B d) sum |f_m(x) - U relu(V f_m(x)) - f_t(x)|_1,     U = 0 at the start

| paper | here |
|---|---|
| f_m, f_t | the network with the merged weights, with those of expert t |
| z | the final feature, before the head |
| U, V | `Bottleneck.up` [d, r], `down` [r, d] |
| representation bias | `facts["bias"]`, see states |

Data touched: unlabelled inputs of every task; no labels, no training data. The papers take the test inputs themselves
(`protocol: transductive`); ours are meant to be others. Departures: both features are computed once and all tasks are fitted
in one batched product, which equals one Adam for each task; the authors' one Adam for all lets every task's momentum move
the others' weights, hence our larger step size. Least squares in closed form as another solver; a stopping rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.methods.surgery.closed_form import Gram, solve
from spolia.methods.surgery.fitting import (
    SurgerySettings,
    Watch,
    Work,
    curve,
    finished,
    identity,
    prepare,
)
from spolia.methods.surgery.states import bias_rows, chunks, counted, marks, places_of, states, steps_of
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.sites import LAST

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.surgery.stopping import Stopping
    from spolia.parts.bottleneck import Adapters, Bottleneck
    from spolia.parts.surgered import SurgeredModel

    Features = dict[str, Tensor]  # of each task [inputs, tokens, d]; one token as a rule


class Surgery(SurgerySettings):
    """Settings of `surgery`."""


def surgery(
    merged: Mapping[str, Tensor],
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: Surgery,
    journal: Journal | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> SurgeredModel:
    """The merged model with one bottleneck a task after its final feature. Nothing given is changed.

    `unlabelled`: inputs of each task, by the experts' names. `watch` is told along the stream where `online`.
    """
    work = prepare(merged, pool, network, unlabelled, settings, LAST, seed)
    adapters = identity(work, settings, seed, "surgery")
    ours, theirs = _features(work, settings)
    apart = _features(work.apart(), settings) if work.held else None
    if settings.linear:
        for number, group in enumerate(work.groups):
            adapters.sets[number] = torch.nn.ModuleList([_solved(group, work, ours, theirs, settings)]).to(
                ours[group[0]].device
            )
    losses, stream = {}, {}
    if settings.solver != "closed_form":
        with (journal or Journal()).phase("surgery") as told:
            parts = [[task] for task in work.tasks] if settings.online else [work.tasks]
            for part in parts:
                found, looks = _descend(part, work, adapters, (ours, theirs), apart, settings, told, seed, watch)
                losses |= found
                stream |= {part[0]: looks} if looks else {}
    bias = {t: _bias(work, adapters.of(t)[0], ours[t], theirs[t]) for t in work.tasks}
    centroids = [theirs[task].mean((0, 1)) for task in work.tasks]
    return finished(work, adapters, bias, losses, stream, centroids)


def _features(work: Work, settings: Surgery) -> tuple[Features, Features]:
    """Of all inputs: the merged model's, and those of each task's expert."""
    ours = {t: _rows(states(work.body, work.sites, work.examples[t], "mean", settings.chunk)) for t in work.tasks}
    return ours, {t: _rows(work.targets(t, "mean", settings.chunk)) for t in work.tasks}


def _rows(found: list[Tensor]) -> Tensor:
    return found[0] if found[0].dim() == 3 else found[0].unsqueeze(1)


def _solved(group: list[str], work: Work, ours: Features, theirs: Features, settings: Surgery) -> Bottleneck:
    width = ours[group[0]].shape[-1]
    gram = Gram.empty(width, ours[group[0]].device)
    for task in group:
        for places, batch in chunks(work.examples[task], settings.chunk):
            gram.add(counted(ours[task][places], batch), counted(theirs[task][places], batch))
    return solve(gram, settings.ridge, settings.rank)


def _descend(
    part: list[str],
    work: Work,
    adapters: Adapters,
    features: tuple[Features, Features],
    apart: tuple[Features, Features] | None,
    settings: Surgery,
    journal: Journal,
    seed: int,
    watch: Watch | None,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Adam on all of `part` at once, in stacked bottlenecks. Their losses, and what `watch` said."""
    sets = [part] if adapters.shared else [[task] for task in part]
    own = [adapters.of(tasks[0])[0] for tasks in sets]
    names = ["down", "up"] + ["shift"] * (own[0].shift is not None)
    stacked = {n: torch.stack([getattr(b, n).detach() for b in own]).requires_grad_() for n in names}  # [sets, ...]
    optimizer = torch.optim.Adam(list(stacked.values()), lr=settings.lr)
    examples = [work.examples[task] for task in part]
    steps = steps_of(examples[0], settings.steps, settings.batch, settings.online)
    losses = torch.zeros(steps, len(part))
    looks: list[dict[str, float]] = []
    points = marks(steps) if settings.online and watch is not None else {}
    stopping = settings.stopping()
    keep = {**stacked, "optimizer": optimizer, "losses": losses, "looks": looks, **stopping.keep()}
    for step in journal.steps(steps, keep, shared=True):
        if stopping.due(step):
            _put(own, stacked)
            _compare(stopping, step, sets, own, apart, settings)
            if stopping.over([tasks[0] for tasks in sets]):
                steps = step
                break
        z, e, weight = _drawn(part, examples, features, settings, seed, step)
        with torch.enable_grad():
            loss = settings.distance(_repaired(z, stacked) - e).mul(weight).sum((1, 2))  # [tasks]
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
        optimizer.step()
        losses[step] = loss.detach()
        if step % 50 == 0:
            journal.log(loss=loss.detach().mean())
        if step in points and watch is not None:
            _put(own, stacked)
            looks.append(_look(part[0], points[step], work, adapters, watch))
    _put(own, stacked)
    if apart is not None:
        _compare(stopping, steps, sets, own, apart, settings)
        for tasks, bottleneck in zip(sets, own, strict=True):
            bottleneck.load_state_dict(stopping.best[tasks[0]]["weights"])
            adapters.facts.setdefault("stopped", {}).update(dict.fromkeys(tasks, stopping.told(tasks[0])))
    return {task: curve(losses[:steps, i]) for i, task in enumerate(part)}, looks


def _compare(
    stopping: Stopping,
    step: int,
    sets: list[list[str]],
    own: list[Bottleneck],
    apart: tuple[Features, Features] | None,
    settings: Surgery,
) -> None:
    """Look how far every set of bottlenecks is from its experts on the inputs kept apart."""
    assert apart is not None
    ours, theirs = apart
    with torch.no_grad():
        for tasks, bottleneck in zip(sets, own, strict=True):
            gaps = [settings.distance(bottleneck(ours[t]) - theirs[t]).double().mean() for t in tasks]
            stopping.look(tasks[0], step, float(torch.stack(gaps).sum()), bottleneck.state_dict())


def _drawn(
    part: list[str], examples: list[Any], features: tuple[Features, Features], settings: Surgery, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both models [tasks, rows, d], and 1 / (rows d) for each [tasks, rows, 1]; 0 where a task has fewer."""
    places = [places_of(e, settings.batch, seed, step, settings.online) for e in examples]
    kinds = [[f[t][torch.from_numpy(p)].flatten(0, 1) for t, p in zip(part, places, strict=True)] for f in features]
    kinds.append([rows.new_full((len(rows), 1), 1 / rows.numel()) for rows in kinds[0]])
    most = max(len(rows) for rows in kinds[0])
    if any(len(rows) < most for rows in kinds[0]):
        kinds = [[torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows))) for rows in kind] for kind in kinds]
    z, e, weight = map(torch.stack, kinds)
    return z, e, weight


def _repaired(z: Tensor, stacked: dict[str, Tensor]) -> Tensor:
    """Every task's rows through its bottleneck: one product for all. [tasks, rows, d]"""
    down, up = (stacked[n].expand(len(z), *stacked[n].shape[1:]) for n in ("down", "up"))
    inner = torch.bmm(z, down.transpose(1, 2))
    inner = inner + stacked["shift"][:, None] if "shift" in stacked else torch.relu(inner)
    return z - torch.bmm(inner, up.transpose(1, 2))


def _put(own: list[Bottleneck], stacked: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for i, bottleneck in enumerate(own):
            for name, values in stacked.items():
                getattr(bottleneck, name).copy_(values[i])


def _look(task: str, share: float, work: Work, adapters: Adapters, watch: Watch) -> dict[str, float]:
    from spolia.parts.surgered import SurgeredModel

    return {"share": share} | {
        name: float(v) for name, v in watch(task, share, SurgeredModel(work.body, adapters)).items()
    }


def _bias(work: Work, bottleneck: Bottleneck, ours: Tensor, theirs: Tensor) -> list[dict[str, Any]]:
    with torch.no_grad():
        before, after = (float((z - theirs).abs().double().mean()) for z in (ours, bottleneck(ours)))
    return bias_rows(work.sites, [theirs], [before], [after])

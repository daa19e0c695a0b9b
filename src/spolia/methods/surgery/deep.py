"""Deep surgery: a bottleneck after every block, so that what merging changed is repaired where it arises.

For a merged model whose single repair at the end leaves a gap. Yang et al., SurgeryV2: Bridging the Gap Between Model
Merging and Multi-Task Learning with Deep Representation Surgery, 2024, arXiv 2410.14389.

    min  sum_l mean |m(H_l) - m(H_l expert)| + mean |z_hat - z_expert|,     H_l <- H_l - U_l relu(V_l H_l), all tokens

| paper | here |
|---|---|
| H_l | the state at `sites[l]`, [inputs, tokens, D] or a feature map |
| m | mean over all tokens (`match: mean`) |
| U_l, V_l | `Bottleneck.up`, `down` of site l |
| z | the final feature, the last site |

Data touched: unlabelled inputs of every task; no labels, no training data. The paper takes the test inputs themselves
(`protocol: transductive`); ours are meant to be others. Departures: what the experts hold is computed once, then each is let
go; every task has an Adam of its own (see `surgery`); `gradients: local` fits each block to its own distance alone; the
closed form solves the sites in order, each on the states that the ones before have repaired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import summed, world
from spolia.core.gradients import share
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.settings import setting
from spolia.methods.surgery.closed_form import Gram, solve
from spolia.methods.surgery.fitting import SurgerySettings, Watch, Work, curve, finished, identity, prepare
from spolia.methods.surgery.states import (
    Match,
    bias_rows,
    chunks,
    counted,
    distances,
    marks,
    matched,
    matches,
    places_of,
    steps_of,
)
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.sites import run_through

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.bottleneck import Adapters, Bottleneck
    from spolia.parts.surgered import SurgeredModel

    Targets = dict[str, list[Tensor]]  # of each task, at each site


class Deep(SurgerySettings):
    """Settings of `deep`."""

    sites: str = setting(
        "blocks", "blocks, last, or a regular expression of module names", source="Yang et al. 2024: every block"
    )
    match: Match = setting("mean", "what of a block's tokens is compared", source="the authors' code")
    gradients: Literal["end_to_end", "local"] = setting(
        "end_to_end", "through all earlier bottlenecks, or each block by itself", source="the authors' code"
    )


class _Enough(Exception):
    """The rest of the network need not run."""


def deep(
    merged: Mapping[str, Tensor],
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: Deep,
    journal: Journal | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> SurgeredModel:
    """The merged model with a bottleneck a task after every block and after its final feature. Nothing given is changed.

    `unlabelled`: inputs of each task, by the experts' names. `watch` is told along the stream where `online`.
    """
    work = prepare(merged, pool, network, unlabelled, settings, settings.sites, seed)
    adapters = identity(work, settings, seed, "deep").requires_grad_(False)
    bias, losses, stream, centroids = {}, {}, {}, []
    for number, group in enumerate(work.groups):
        targets = {task: work.targets(task, settings.match, settings.chunk) for task in group}
        if settings.linear:
            adapters.sets[number] = torch.nn.ModuleList(_sweep(group, work, targets, settings)).requires_grad_(False)
        if settings.solver != "closed_form":
            with (journal or Journal()).phase(" ".join(["deep", *group])) as told:
                parts = [[task] for task in group] if settings.online else [group]
                for part in parts:
                    found, looks = _descend(part, work, adapters, targets, settings, told, seed, watch)
                    losses |= found
                    stream |= {part[0]: looks} if looks else {}
        for task in group:
            bias[task] = _bias(task, work, adapters, targets[task], settings)
            centroids.append(targets[task][-1].flatten(0, -2).mean(0))
    return finished(work, adapters, bias, losses, stream, centroids)


def _sweep(group: list[str], work: Work, targets: Targets, settings: Deep) -> list[Bottleneck]:
    """Closed forms in the order of the sites: one pass where the inputs fit into one portion, else one for each site."""
    sites, how = work.sites, matches(work.sites, settings.match)
    portions = sum(-(-len(work.examples[task]) // settings.chunk) for task in group)
    solved: list[Bottleneck] = []

    def empty(number: int) -> Gram:
        return Gram.empty(sites[number].width, targets[group[0]][number].device)

    gram = empty(0)

    def close() -> None:
        nonlocal gram
        solved.append(solve(gram, settings.ridge, settings.rank).to(targets[group[0]][0].device))
        gram = empty(len(solved)) if len(solved) < len(sites) else gram

    while len(solved) < len(sites):
        for task, places, batch in _portions(group, work, settings.chunk):

            def edit(number: int, state: Tensor, task: str = task, places: Any = places, batch: Any = batch) -> Tensor:
                if number == len(solved):
                    rows = matched(sites[number], state, how[number], batch).float()
                    gram.add(counted(rows, batch), counted(targets[task][number][places], batch))
                    if portions > 1:
                        raise _Enough
                    close()
                return solved[number](state, sites[number].axis)

            try:
                with torch.no_grad():
                    run_through(work.body, batch, sites, edit)
            except _Enough:
                continue
        if portions > 1:
            close()
    return solved


def _portions(group: list[str], work: Work, chunk: int) -> Iterator[tuple[str, np.ndarray, Any]]:
    for task in group:
        for places, batch in chunks(work.examples[task], chunk):
            yield task, places, batch


def _descend(
    part: list[str],
    work: Work,
    adapters: Adapters,
    targets: Targets,
    settings: Deep,
    journal: Journal,
    seed: int,
    watch: Watch | None,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Adam on the bottlenecks that the tasks of `part` share. Their losses, and what `watch` said."""
    from spolia.parts.surgered import SurgeredModel

    own = torch.nn.ModuleList(adapters.of(part[0])).requires_grad_()
    optimizer = torch.optim.Adam(own.parameters(), lr=settings.lr)
    steps = steps_of(work.examples[part[0]], settings.steps, settings.batch, settings.online)
    losses = torch.zeros(steps, len(part))
    looks: list[dict[str, float]] = []
    points = marks(steps) if settings.online and watch is not None else {}
    stopping, apart = settings.stopping(), work.apart()
    aims = {task: apart.targets(task, settings.match, settings.chunk) for task in part if work.held}
    rank, ranks = world()
    keep = {"own": own, "optimizer": optimizer, "losses": losses, "looks": looks, **stopping.keep()}
    for step in journal.steps(steps, keep, shared=True):
        if stopping.due(step):
            stopping.look(part[0], step, _distance(apart, adapters, aims, settings), own.state_dict())
            if stopping.over(part[:1]):
                steps = step
                break
        optimizer.zero_grad(set_to_none=True)
        for i, task in enumerate(part):
            places = places_of(work.examples[task], settings.batch, seed, step, settings.online)
            mine = places[rank::ranks]
            if len(mine):
                with torch.enable_grad():
                    loss = _loss(list(own), work, task, mine, targets[task], settings) * (len(mine) / len(places))
                    loss.backward()
                losses[step, i] = loss.detach()
        summed(losses[step])
        share(list(own.parameters()))
        optimizer.step()
        if step % 50 == 0:
            journal.log(loss=losses[step].mean())
        if step in points and watch is not None:
            told = watch(part[0], points[step], SurgeredModel(work.body, adapters))
            looks.append({"share": points[step]} | {name: float(value) for name, value in told.items()})
            own.requires_grad_()
    if aims:
        stopping.look(part[0], steps, _distance(apart, adapters, aims, settings), own.state_dict())
        own.load_state_dict(stopping.best[part[0]]["weights"])
        adapters.facts.setdefault("stopped", {}).update(dict.fromkeys(part, stopping.told(part[0])))
    own.requires_grad_(False)
    return {task: curve(losses[:steps, i]) for i, task in enumerate(part)}, looks


def _distance(apart: Work, adapters: Adapters, aims: Targets, settings: Deep) -> float:
    """What the steps minimise, on all inputs kept apart, summed over the tasks of `aims`."""
    told = (settings.match, settings.chunk, adapters)
    return sum(
        sum(distances(apart.body, apart.sites, apart.examples[task], aim, *told, task, settings.squared))
        for task, aim in aims.items()
    )


def _loss(
    own: Sequence[Any], work: Work, task: str, places: np.ndarray, targets: Sequence[Tensor], settings: Deep
) -> Tensor:
    """Sum over sites of the mean distance to the expert, on one batch."""
    batch = work.examples[task].batch(places)
    how, terms, local = matches(work.sites, settings.match), [], settings.gradients == "local"

    def edit(number: int, state: Tensor) -> Tensor:
        site = work.sites[number]
        state = own[number](state.detach() if local else state, site.axis)
        gap = matched(site, state, how[number], batch).float() - targets[number][places]
        terms.append(settings.distance(gap).mean())
        return state.detach() if local else state

    run_through(work.body, batch, work.sites, edit)
    return torch.stack(terms).sum()


def _bias(task: str, work: Work, adapters: Adapters, targets: list[Tensor], settings: Deep) -> list[dict[str, Any]]:
    told = (work.body, work.sites, work.examples[task], targets, settings.match, settings.chunk)
    return bias_rows(work.sites, targets, distances(*told), distances(*told, adapters, task))

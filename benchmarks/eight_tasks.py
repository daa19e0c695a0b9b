"""Eight image tasks merged: accuracy of every merge and repair beside the base and the experts.

    SPOLIA_DATA=FOLDER python benchmarks/eight_tasks.py STAGE --work FOLDER

    pretrain    the base; with --net squeezenet only unpacked
    heads       a frozen linear head a task, for each seed
    experts     a fine-tune a task and seed, at one --strength: light, medium or strong
    regimes     a few merges at all three strengths: ledger eight_tasks_NET_regimes
    table       all merges at one strength: eight_tasks_NET
    surgery     five of these merges repaired: eight_tasks_NET_surgery
    images      what repairing the average needs: eight_tasks_NET_images
    all         one after the other

Every stage makes what it lacks of the stages before it and keeps all it makes in the work folder, which must lie outside the
repository: run again, it goes on where it stopped. `--quick` uses a few images and steps, to see that everything runs.
Once the base is there, processes may share the seeds by `--share`; the same command without it then writes the ledgers.
Merges go through `spolia.merge` and `spolia.surgery` with the methods' defaults, and once more with the scale that validation
images choose where there is one. What a merge adapts on are inputs that nothing else sees; rows that say "on test inputs"
adapt on those they are judged on, as the papers do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from eight_tasks_images import agreement, image_rows
from eight_tasks_ledger import write_ledger
from eight_tasks_pool import NETS, EightTasks, Recipe, recipe_of
from eight_tasks_rows import (
    BASE,
    IN_REGIMES,
    INDIVIDUAL,
    REPAIRED,
    SCALES,
    Entry,
    Judged,
    entries,
    regime_rows,
    repairs,
    surgery_rows,
    table_rows,
)
from eight_tasks_training import fit_experts, fit_heads, forget, pretrain

import spolia
from spolia.bench.multitask import AVERAGE, choose, mean_percent
from spolia.catalog import find
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.data.images import data_folder
from spolia.errors import SpoliaError, SpoliaWarning

STAGES = ("pretrain", "heads", "experts", "regimes", "table", "surgery", "images", "all")
say = partial(print, file=sys.stderr, flush=True)


# --- one seed --------------------------------------------------------------------------------------------------------


def judge(pool: EightTasks, labels: tuple[str, ...] = ()) -> Judged:
    """Merges and counts what the work folder does not hold yet: entries called `labels`, or all."""
    file = pool.work / f"scores-{pool.strength}-{pool.seed}.json"
    judged, base = Judged.load(file), read_tensors(pool.base)
    if BASE not in judged.test:
        judged.add(BASE, pool.judge(base, "test"))
        own = {t: pool.judge(read_tensors(f), "test", (t,))[t] for t, f in pool.experts.items()}
        judged.add(INDIVIDUAL, own)
        judged.save(file)
    for entry in entries(pool.recipe):
        if entry.label in judged.test or (labels and entry.label not in labels):
            continue
        start = time.perf_counter()
        state, scale = merged(pool, entry, base)
        judged.add(entry.label, pool.judge(state, "test"))
        judged.validation[entry.label] = mean_percent(pool.judge(state, "validation"))
        if scale is not None:
            judged.chosen[entry.label] = scale
        folder = kept(pool, entry.label)
        if entry.label in REPAIRED and not folder.is_dir():
            write_checkpoint(folder, state)
        judged.save(file)
        forget(pool.loops(entry.label))
        _tell(pool, entry.label, judged, start)
    return judged


def merged(pool: EightTasks, entry: Entry, base: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The merged weights, and the scale that was chosen where one was."""
    kind = find(entry.method).settings_class()
    looks = bool(entry.seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpoliaWarning)  # what is odd about a merge shows in its row
        made = spolia.merge(
            pool.experts,
            base=pool.base if kind.base == "required" else None,
            method=entry.method,
            settings=entry.settings,
            seed=pool.seed,
            network=pool.network if looks else None,
            unlabelled=pool.inputs(entry.seen) if looks else None,
            journal=pool.loops(entry.label) if looks else None,
            preprocess=list(entry.preprocess) or None,
        )
    state = made.weights if looks else made
    if not entry.chosen:
        return state, None
    default = kind.model_fields["scale"].default

    def scaled(scale: float) -> dict[str, Any]:  # every method with a scale gives base + scale * change
        return {name: tensor + (state[name] - tensor) * (scale / default) for name, tensor in base.items()}

    tried = (default, *(s for s in SCALES if s != default))  # first: it wins where no other is better
    scale, _ = choose(tried, lambda scale: mean_percent(pool.judge(scaled(scale), "validation")))
    return scaled(scale), scale


def repair(pool: EightTasks) -> Judged:
    """Repairs and counts what the work folder does not hold yet, of the merges that the table kept."""
    file = pool.work / f"scores-surgery-{pool.strength}-{pool.seed}.json"
    before, judged = judge(pool, REPAIRED), Judged.load(file)
    judged.chosen = {label: scale for label, scale in before.chosen.items() if label in REPAIRED}
    for label in (BASE, INDIVIDUAL, *REPAIRED):
        judged.add(label, before.shares(label))
    for merge in REPAIRED:
        for how, method, settings, seen in repairs(pool.recipe, merge):
            label = f"{merge} + {how}"
            if label in judged.test:
                continue
            start, loops = time.perf_counter(), pool.loops(label)
            model = spolia.surgery(
                read_tensors(kept(pool, merge)),
                pool.experts,
                network=pool.network,
                unlabelled=pool.inputs(seen),
                method=method,
                settings=settings,
                journal=loops,
                seed=pool.seed,
            )
            judged.add(label, pool.judge_by(lambda task, x, model=model: model(x, task), "test"))
            judged.save(file)
            forget(loops)
            _tell(pool, label, judged, start)
    return judged


def kept(pool: EightTasks, label: str) -> Path:
    """Where the table leaves a merge for surgery."""
    return pool.folder / "merged" / pool.strength / label.replace(", ", "-").replace(" ", "-")


def _tell(pool: EightTasks, label: str, judged: Judged, start: float) -> None:
    shown = f"{mean_percent(judged.shares(label)):.1f} %"
    shown += f" at {judged.chosen[label]:g}" if label in judged.chosen else ""
    say(f"seed {pool.seed}, {pool.strength}: {label}, {shown} ({time.perf_counter() - start:.0f} s)")


# --- stages ----------------------------------------------------------------------------------------------------------


def run(stage: str, pools: list[EightTasks], command: str, folder: Path) -> None:
    """What `stage` is for, at the pools' strength and seeds. Ledgers go to `folder` and grow seed by seed."""
    pretrain(pools[0], say)
    if stage == "pretrain":
        return
    for pool in pools:
        fit_heads(pool, say)
    if stage == "heads":
        return
    if stage in ("regimes", "all"):
        regimes(pools, command, folder)
    if stage == "regimes":
        return
    found: dict[str, list[Judged]] = {"table": [], "surgery": []}
    needed: list[dict[str, list[float]]] = []
    for stop, pool in enumerate(pools, 1):
        fit_experts(pool, say)
        if stage in ("table", "all"):
            found["table"].append(judge(pool))
            labels = (BASE, INDIVIDUAL, *(entry.label for entry in entries(pool.recipe)))
            rows = table_rows(found["table"], labels)
            write_ledger("", rows, found["table"], pools[:stop], command, folder)
        if stage in ("surgery", "all"):
            found["surgery"].append(repair(pool))
            rows = surgery_rows(found["surgery"])
            write_ledger("surgery", rows, found["surgery"], pools[:stop], command, folder)
        if stage in ("images", "all"):
            judge(pool, (AVERAGE,))
            needed.append(agreement(pool, read_tensors(kept(pool, AVERAGE)), say))
            write_ledger("images", image_rows(needed), [], pools[:stop], command, folder)


def regimes(pools: list[EightTasks], command: str, folder: Path) -> None:
    """A few merges at every strength, and how far the experts went."""
    rows: list[dict[str, Any]] = []
    for strength in pools[0].recipe.strengths:
        now = [replace(pool, strength=strength) for pool in pools]
        for pool in now:
            fit_experts(pool, say)
        found = [judge(pool, IN_REGIMES) for pool in now]
        curves = [pool.curve(SCALES) for pool in now]
        rows += regime_rows(strength, found, [p.geometry() for p in now], curves, [p.elsewhere() for p in now])
        write_ledger("regimes", rows, found, now, command, folder)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("stage", choices=STAGES)
    told.add_argument("--data", type=Path, help="default: SPOLIA_DATA")
    told.add_argument("--work", type=Path, required=True, help="keeps all that is made; outside the repository")
    told.add_argument("--net", choices=NETS, default="vit")
    told.add_argument("--strength", choices=("light", "medium", "strong"), default="medium")
    told.add_argument("--seeds", type=int, help="default: 3; quick: 1")
    told.add_argument(
        "--share", default="1/1", metavar="I/N", help="every N-th seed from the I-th on, for N processes at once"
    )
    told.add_argument("--threads", type=int, help="default: torch's own")
    told.add_argument("--device", default="cpu", help="where networks run: cpu, cuda")
    told.add_argument("--quick", action="store_true")
    told.add_argument("--json", type=Path, help="folder of the ledgers; default: docs/results, quick: the work folder")
    asked = told.parse_args()
    if asked.work.resolve().is_relative_to(measure.REPOSITORY):
        raise SystemExit("--work lies in the repository: name a folder outside it")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    recipe = recipe_of(asked.net, asked.quick)
    work = asked.work.resolve() / (f"{asked.net}-quick" if asked.quick else asked.net)
    seeds = asked.seeds or (1 if asked.quick else 3)
    share, shares = map(int, asked.share.split("/"))
    command = f"python benchmarks/eight_tasks.py {asked.stage} --work FOLDER --net {asked.net}"
    command += f" --strength {asked.strength} --seeds {seeds}" + (" --quick" if asked.quick else "")
    kept = work if asked.quick else measure.REPOSITORY / "docs" / "results"
    folder = asked.json or (kept if shares == 1 else work / f"share-{share}")
    try:
        data = data_folder(asked.data)
        _remember(recipe, work)
        pools = [
            EightTasks(data, work, recipe, seed, asked.strength, asked.device)
            for seed in range(share - 1, seeds, shares)
        ]
        run(asked.stage, pools, command, folder)
    except SpoliaError as error:
        raise SystemExit(str(error)) from None


def _remember(recipe: Recipe, work: Path) -> None:
    """Ends a run in a work folder that was made with other settings."""
    work.mkdir(parents=True, exist_ok=True)
    record, settings = work / "settings.json", json.dumps(asdict(recipe) | {"scales": SCALES}, indent=1)
    if record.is_file() and record.read_text() != settings:
        raise SystemExit(f"{work} was made with other settings: give another --work, or remove it")
    record.write_text(settings)


if __name__ == "__main__":
    main()

"""The table of a CLIP pool: base, every expert on its own task, and each row's merge on all tasks.

    python -m spolia.runs.clip_table vit-b32-eight -o FOLDER --protocol disjoint --device cuda

Models are imported into FOLDER/models and merges written to FOLDER/merged; what stands there is not made again, and a loop
that was stopped goes on. All models are held while the test pictures pass once, so that each is decoded once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import Share, ledger_rows
from spolia.catalog import find
from spolia.core.checkpoint import read_tensors
from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy
from spolia.data.tables import read_dataset
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.network import Network
from spolia.parts.surgered import merged_network
from spolia.runs.clip_pool import (
    ClipPool,
    Load,
    Protocol,
    Row,
    TaskInputs,
    clip_folder,
    heads_of,
    import_models,
    inputs_of,
    read_pool,
)
from spolia.runs.environment import command_line, git_state, machine, versions
from spolia.runs.store import write_json
from spolia.runs.surgery import surgery
from spolia.runs.verbs import merge

if TYPE_CHECKING:
    from torch import Tensor

    Outputs = Callable[[str, Any], Tensor]  # task and batch to logits

BASE, EXPERTS = "base, zero-shot", "experts, each on its own"
BATCH = 128  # pictures decoded and judged together


@dataclass(frozen=True)
class Asked:
    """How a table is made. `adapt` and `limit`: pictures of a task adapted on and judged on, None for all."""

    protocol: Protocol = "disjoint"
    adapt: int | None = 2000
    limit: int | None = None
    device: str = "cpu"
    seed: int = 0


def clip_table(pool: ClipPool, folder: Path, asked: Asked, *, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes the table into `folder` and returns what results.json holds. `load` gives the rows of a data set's split."""
    from spolia.zoo.clip import clip_network, load_clip, tower_in

    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, pool, asked)
    base, experts = import_models(pool, folder / "models")
    size = json.loads((base / "config.json").read_text(encoding="utf-8"))["image_size"]
    inputs = inputs_of(
        pool, load, size=size, protocol=asked.protocol, adapt=asked.adapt, limit=asked.limit, seed=asked.seed
    )
    needed = pool.projection == "frozen" or any(task.head is None for task in pool.tasks.values())
    clip, tokenizer = load_clip(clip_folder(pool)) if needed else (None, None)
    heads, made_from = heads_of(pool, inputs, clip, tokenizer)
    frozen = clip.get_parameter("visual_projection.weight") if clip and pool.projection == "frozen" else None
    network = clip_network(tower_in(base, frozen), heads, asked.device)
    judged: dict[str, Outputs] = {BASE: merged_network(network, read_tensors(base)).logits}
    own = {name: merged_network(network, read_tensors(path)).logits for name, path in experts.items()}
    judged[EXPERTS] = lambda task, batch: own[task](task, batch)
    for row in pool.rows:
        say(row.label)
        judged[row.label] = _row(row, base, experts, network, inputs, folder, asked)
    scores = {name: _counts(judged, name, one, say) for name, one in inputs.items()}
    shares = {label: [{task: Share(*scores[task][label]) for task in inputs}] for label in judged}
    ledger = {
        "name": pool.name,
        "command": command_line(),
        "commit": (git_state() or {}).get("commit"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(asked.device),
        "versions": versions(),
        "data": _touched(pool, inputs, asked),
        "seeds": [asked.seed],
        "rows": ledger_rows(shares, baselines=(BASE, EXPERTS)),
        "notes": _notes(pool, made_from, asked),
    }
    write_json(folder / "results.json", ledger)
    return ledger


def _check_same(folder: Path, pool: ClipPool, asked: Asked) -> None:
    """What stands in the folder must have been made from the same pool in the same way; the device may change."""
    kept = {
        "pool": pool.model_dump(mode="json", exclude={"rows"}),
        "asked": [asked.protocol, asked.adapt, asked.limit, asked.seed],
    }
    file = folder / "made-from.json"
    if not file.exists():
        if any(folder.iterdir()):
            raise SpoliaError("holds other files", where=str(folder), mend="choose a new folder with -o")
        write_json(file, kept)
    elif json.loads(file.read_text(encoding="utf-8")) != kept:
        what = "holds a table of another pool, protocol or seed"
        raise SpoliaError(what, where=str(folder), mend="choose a new folder with -o")


def _row(
    row: Row,
    base: Path,
    experts: Mapping[str, Path],
    network: Network,
    inputs: Mapping[str, TaskInputs],
    folder: Path,
    asked: Asked,
) -> Outputs:
    """What judges a row's model. Its merge is written once; rows that differ in surgery alone share it."""
    method, unlabelled = find(row.method), {name: one.unlabelled for name, one in inputs.items()}
    key = json.dumps([row.method, row.settings, row.preprocess], sort_keys=True)
    target = folder / "merged" / _place(row.method, key)
    if not (target / "config.json").is_file():
        merge(
            experts,
            base=base if method.settings_class().base != "unused" else None,
            method=row.method,
            settings=row.settings,
            preprocess=row.preprocess or None,
            out=target,
            seed=asked.seed,
            network=network if method.data else None,
            unlabelled=unlabelled if method.data else None,
            journal=folder / "loops" / target.name if method.data else None,
        )
    merged = read_tensors(target)
    if row.surgery is None:
        return merged_network(network, merged).logits
    journal = (
        folder / "loops" / _place(row.label, key + json.dumps([row.surgery, row.surgery_settings], sort_keys=True))
    )
    repaired = surgery(
        merged,
        experts,
        network=network,
        unlabelled=unlabelled,
        base=base,
        method=row.surgery,
        settings=row.surgery_settings,
        journal=journal,
        seed=asked.seed,
    )
    return lambda task, batch: repaired(batch, task)


def _place(label: str, key: str) -> str:
    """A folder's name that tells what it holds and is its own."""
    return f"{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:40]}-{entropy(0, key) % 16**8:08x}"


def _counts(
    judged: Mapping[str, Outputs], task: str, inputs: TaskInputs, say: Callable[[str], None]
) -> dict[str, tuple[int, int]]:
    """Of every model how many test pictures of `task` it gets right, and their number. A row with a NaN counts as wrong."""
    right, total = dict.fromkeys(judged, 0), len(inputs.test)
    with torch.no_grad():
        for start in range(0, total, BATCH):
            places = np.arange(start, min(start + BATCH, total))
            batch, truth = inputs.test.batch(places), inputs.test.labels_at(places)
            for label, outputs in judged.items():
                logits = outputs(task, batch).cpu()
                right[label] += int(((logits.argmax(1) == truth) & ~logits.isnan().any(1)).sum())
    say(f"{task}: {total} pictures")
    return {label: (count, total) for label, count in right.items()}


def _touched(pool: ClipPool, inputs: Mapping[str, TaskInputs], asked: Asked) -> dict[str, str]:
    adapted = ", ".join(f"{name} {len(one.unlabelled)}" for name, one in inputs.items())
    looking = [row.label for row in pool.rows if row.surgery or find(row.method).data]
    split = "the test pictures themselves" if asked.protocol == "papers" else "pictures of the other split"
    return {
        "heads": "class names and templates, or the published heads; no pictures",
        "merge": f"weights only; {', '.join(looking) or 'no row'}: {split} without labels ({adapted})",
        "test": ", ".join(f"{name} {len(one.test)}" for name, one in inputs.items()),
    }


def _notes(pool: ClipPool, made_from: Mapping[str, str], asked: Asked) -> str:
    heads = "; ".join(f"{name}: {told}" for name, told in made_from.items())
    lines = [
        f"Checkpoints: {pool.family}. Their numbers do not compare with those of other checkpoints.",
        f"Visual projection: {pool.projection}.",
        f"Heads: {heads}.",
        f"Protocol: {asked.protocol}. One seed: intervals are Wilson's over test pictures.",
    ]
    if asked.protocol == "papers":
        lines.append("Learned rows adapted on the pictures they are judged on, without labels, as the papers do.")
    return " ".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m spolia.runs.clip_table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("pool", help="name of a pool of the package, or a YAML file")
    parser.add_argument("-o", "--out", required=True, type=Path, help="folder of models, merges and results.json")
    parser.add_argument("--base", help="folder of the base, in the place of the pool's")
    parser.add_argument("--prompts", help="file of class names and templates, in the place of the pool's")
    parser.add_argument("--protocol", choices=("disjoint", "papers"), default="disjoint", help="what is adapted on")
    parser.add_argument("--adapt", type=int, default=2000, help="pictures a task adapted on (disjoint)")
    parser.add_argument("--limit", type=int, help="test pictures a task, for a first look")
    parser.add_argument("--rows", help="labels of the rows to make, parted by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        pool = read_pool(given.pool)
        for name in ("base", "prompts"):
            if getattr(given, name) is not None:
                pool = pool.model_copy(update={name: os.path.abspath(getattr(given, name))})
        if given.rows is not None:
            pool = _only(pool, [label.strip() for label in given.rows.split(",")])
        asked = Asked(given.protocol, given.adapt, given.limit, given.device, given.seed)
        ledger = clip_table(pool, given.out, asked, load=read_dataset, say=lambda text: print(text, file=sys.stderr))
    except SpoliaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for row in ledger["rows"]:
        print(f"{row['method']}\t{row['task']}\t{row['mean']:.1f}")
    return 0


def _only(pool: ClipPool, wanted: list[str]) -> ClipPool:
    known = [row.label for row in pool.rows]
    for label in wanted:
        if label not in known:
            raise SpoliaError(f"there is no row `{label}`", where="--rows", mend=did_you_mean(label, known))
    return pool.model_copy(update={"rows": [row for row in pool.rows if row.label in wanted]})


if __name__ == "__main__":
    sys.exit(main())

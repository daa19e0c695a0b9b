"""Language models merged by looking at text: AdaMerging, and surgery on top of merges. Perplexity of each text.

    SPOLIA_DATA=FOLDER python benchmarks/language_learned.py      trains, merges, repairs, judges; writes two ledgers
    python benchmarks/language_learned.py --data FOLDER --seeds 1 --json FOLDER    a shorter run, its ledgers elsewhere

Base, experts and test texts are those of language.py, and so is the work folder. What adapts sees windows of the validation
part without the slices by which scales are chosen; nobody's next token is looked at as a label. Experts and scores are
kept: run again, it goes on where it stopped. Ledgers: language_learned (merges) and language_repaired (surgery).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from language import BASE, EXPERTS, HOUSE, PACKAGES, TRIED, Entry, Scores, chosen_merge, merge
from language_pool import CONTEXT, TEXTS, LanguagePool, Recipe, data_touched, make_pool, new_model, settings

import spolia
from spolia.bench.language import BITS, PERPLEXITY, Likelihood, exponential, ledger_rows, mean_nats
from spolia.bench.multitask import AVERAGE, t_interval
from spolia.core.checkpoint import read_tensors
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text

WINDOWS = 64  # of CONTEXT tokens, for each text
ADAPT = {"steps": 60, "lr": 1e-2, "batch": 2, "check_every": 10}
ADAM = {"lr": 1e-2, "steps": 300, "batch": 4}
DEEP = {"match": "all_tokens"}
MERGES, REPAIRED = "language_learned", "language_repaired"
COARSE, FINE = "one number an expert", "one a tensor"
say = partial(print, file=sys.stderr, flush=True)
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merge:
    """One line of the table of merges. `settings` of AdaMerging, or else the entry of language.py that it is."""

    label: str
    entry: Entry | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    repaired: bool = False


ENTROPY, DISTANCE, GUARDED = {"objective": "entropy"}, {"objective": "expert"}, {"guard": "divergence"}
MERGED = [
    Merge("average", Entry("average"), repaired=True),
    Merge("task_arithmetic", Entry("task_arithmetic")),
    Merge("task_arithmetic, scale chosen", Entry("task_arithmetic", chosen="scale"), repaired=True),
    Merge("ties, scale chosen", Entry("ties", chosen="scale"), repaired=True),
    Merge(f"adamerging, entropy, {COARSE}", settings=ENTROPY | GUARDED | {"granularity": "task"}),
    Merge(f"adamerging, entropy, {FINE}", settings=ENTROPY | GUARDED, repaired=True),
    Merge(f"adamerging, entropy, {FINE}, no guard", settings=ENTROPY | {"guard": "none"}),
    Merge(f"adamerging, KL to the experts, {FINE}", settings=DISTANCE | GUARDED),
]
REPAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "surgery": ("surgery", ADAM),
    "surgery, closed form": ("surgery", {"solver": "closed_form"}),
    "deep": ("deep", ADAM | DEEP | {"steps": 100, "batch": 2}),
    "deep, closed form": ("deep", {"solver": "closed_form"} | DEEP),
}


@dataclass
class Judged:
    """What one seed has given so far: likelihoods of test texts by ledger and label, and what was told of each merge."""

    test: dict[str, Scores] = field(default_factory=lambda: {MERGES: {}, REPAIRED: {}})
    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        staging = file.with_suffix(".new")
        staging.write_text(json.dumps(asdict(self), indent=1))
        staging.replace(file)

    @classmethod
    def load(cls, file: Path) -> Judged:
        if not file.is_file():
            return cls()
        held = json.loads(file.read_text())
        for scores in held["test"].values():
            for label, texts in scores.items():
                scores[label] = {text: Likelihood(**one) for text, one in texts.items()}
        return cls(**held)


# --- one seed --------------------------------------------------------------------------------------------------------


def judge(pool: LanguagePool, file: Path) -> Judged:
    """Merges, repairs and counts what `file` does not hold yet."""
    judged = Judged.load(file)
    base = read_tensors(pool.base)
    unlabelled = {text: pool.windows(text, WINDOWS) for text in TEXTS}
    network = spolia.Network(new_model(pool.base))
    if BASE not in judged.test[MERGES]:
        own = {text: pool.judge(read_tensors(pool.experts[text]), "test", (text,))[text] for text in TEXTS}
        for scores in judged.test.values():
            scores |= {BASE: pool.judge(base, "test"), EXPERTS: own}
    for one in MERGED:
        wanted = [f"{one.label} + {repair}" for repair in REPAIRS] if one.repaired else []
        if one.label in judged.test[MERGES] and set(wanted) <= judged.test[REPAIRED].keys():
            continue
        state, judged.told[one.label] = timed(lambda one=one: merged(pool, one, base, network, unlabelled))
        found = pool.judge(state, "test")
        note(judged, MERGES, one.label, found, file)
        if one.repaired:
            judged.test[REPAIRED][one.label] = found
        for label, repair in zip(wanted, REPAIRS, strict=False):
            found, judged.told[label] = timed(lambda r=repair, s=state: repaired(pool, r, s, network, unlabelled))
            note(judged, REPAIRED, label, found, file)
    judged.save(file)
    return judged


def note(judged: Judged, ledger: str, label: str, found: dict[str, Likelihood], file: Path) -> None:
    judged.test[ledger][label] = found
    judged.save(file)
    say(f"{label}: perplexity {exponential(mean_nats(found)):.2f} ({judged.told[label]['seconds']:.1f} s)")


def timed(work: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    made, told = work()
    return made, {"seconds": round(time.perf_counter() - start, 1)} | told


def merged(
    pool: LanguagePool, one: Merge, base: State, network: spolia.Network, unlabelled: State
) -> tuple[State, dict[str, Any]]:
    """The weights, and the chosen scale or what AdaMerging has seen on the windows kept apart."""
    if one.entry is not None:
        value = chosen_merge(pool, one.entry, base)[2] if one.entry.chosen else None
        told = {} if value is None else {one.entry.chosen: value}
        return merge(pool, one.entry, told), told
    learned = spolia.merge(
        pool.experts,
        base=pool.base,
        method="adamerging",
        network=network,
        unlabelled=unlabelled,
        settings=ADAPT | one.settings,
        seed=pool.seed,
    )
    looks = learned.facts["history"]
    kept = next(look for look in looks if look["step"] == learned.facts["kept"]["step"])
    return learned.weights, {"start": looks[0], "kept": kept, "last": looks[-1]}


def repaired(
    pool: LanguagePool, repair: str, state: State, network: spolia.Network, unlabelled: State
) -> tuple[dict[str, Likelihood], dict[str, Any]]:
    """Each text under the model with its own adapters, and how many numbers they have."""
    method, chosen = REPAIRS[repair]
    call = {"network": network, "unlabelled": unlabelled, "base": pool.base, "seed": pool.seed}
    model = spolia.surgery(state, pool.experts, method=method, settings=chosen, **call)
    found = {text: pool.hear(partial(model, task=text), text, "test") for text in TEXTS}
    return found, {"parameters": model.facts["parameters"]}


# --- ledgers ---------------------------------------------------------------------------------------------------------


def ledgers(found: list[Judged], recipe: Recipe, folder: Path) -> None:
    """Writes both ledgers and prints their perplexities."""
    for name in (MERGES, REPAIRED):
        scores = {label: [one.test[name][label] for one in found] for label in found[0].test[name]}
        bare = {BASE, EXPERTS} | (set(found[0].test[MERGES]) if name == REPAIRED else set())
        rows = ledger_rows(scores, baselines=bare, against=AVERAGE)
        rows += ledger_rows(scores, metric=BITS, baselines=bare, against=AVERAGE)
        rows += _seen(found) if name == MERGES else []
        ledger = {
            "name": name,
            "command": "python benchmarks/language_learned.py",
            "commit": measure.commit(),
            "date": datetime.date.today().isoformat(),
            "machine": measure.machine(),
            "versions": measure.versions(sys.executable, PACKAGES),
            "data": data_touched(recipe) | {"merge": "weights", "adapting": ADAPTING},
            "seeds": list(range(len(found))),
            "rows": rows,
            "notes": " ".join(_notes(found, name)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(ledger, indent=1) + "\n")
        print(f"\n{name}\n{to_text(main_table({'rows': rows}, PERPLEXITY))}")


def _seen(found: list[Judged]) -> list[dict[str, Any]]:
    """What AdaMerging saw on the windows kept apart: at the start, at the step that it returns, at the last one."""
    rows = []
    for label in (label for label, told in found[0].told.items() if "kept" in told):
        for when in ("start", "kept", "last"):
            for what in found[0].told[label][when]:
                value = t_interval([one.told[label][when][what] for one in found])
                row = {"method": label, "task": "windows kept apart", "metric": f"{what}, {when}"}
                unit = "nats" if what in ("entropy", "divergence") else ""
                numbers = {"mean": value.mean, "low": value.low, "high": value.high, "n": len(found)}
                rows.append(row | {"unit": unit} | numbers)
    return rows


ADAPTING = (
    f"AdaMerging and surgery: {WINDOWS} windows of {CONTEXT} tokens of each validation text, without the slices by which"
    " scales are chosen; what follows a token is no label to them"
)


def _notes(found: list[Judged], name: str) -> list[str]:
    """What a reader must know, and what was seen on the way: means over seeds."""
    lines = [
        f"Perplexity is per token of the base's tokenizer, in windows of {CONTEXT} tokens; intervals are 95 %, Student's"
        " over seeds, which draw the experts' training windows and the batches of what adapts.",
        f"AdaMerging: {_shown(ADAPT)}. "
        + "; ".join(f"{name}: {_shown(how)}" for name, (_, how) in REPAIRS.items())
        + ".",
        "The last site of surgery is the logits.",
    ]
    for label in found[0].test[name]:
        seen = [one.told[label] for one in found if label in one.told]
        if not seen or (name == REPAIRED and label in found[0].test[MERGES]):
            continue
        said = []
        if "scale" in seen[0]:
            said.append(f"scale {', '.join(str(told['scale']) for told in seen)}")
        if "parameters" in seen[0]:
            said.append(f"{seen[0]['parameters'] // len(TEXTS)} numbers a text")
        if said:
            lines.append(f"{label}: {'; '.join(said)}.")
    return lines


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--data", type=Path, default=os.environ.get("SPOLIA_DATA"), help="default: SPOLIA_DATA")
    told.add_argument(
        "--work", type=Path, default=measure.REPOSITORY / "runs" / "language", help="keeps experts and scores"
    )
    told.add_argument("--seeds", type=int, default=3)
    told.add_argument("--json", type=Path, default=HOUSE / "docs" / "results", help="folder of the ledgers")
    asked = told.parse_args()
    if asked.data is None or not (Path(asked.data) / "stories260k").is_dir():
        raise SystemExit("there is no stories260k: name its folder in SPOLIA_DATA or with --data")
    torch.set_num_threads(1)  # the model is too small to share among cores
    from transformers.utils import logging

    logging.disable_progress_bar()
    recipe, record = Recipe(), asked.work / "learned.json"
    asked.work.mkdir(parents=True, exist_ok=True)
    ways = {"merges": [asdict(one) for one in MERGED], "repairs": REPAIRS, "adapt": ADAPT, "windows": WINDOWS}
    now = json.dumps(settings(recipe) | ways | {"tried": TRIED}, indent=1)
    if record.is_file() and record.read_text() != now:
        raise SystemExit(f"{asked.work} was made with other settings: give another --work, or remove it")
    record.write_text(now)
    found = []
    for seed in range(asked.seeds):
        pool = make_pool(asked.data, asked.work / f"seed-{seed}", seed, recipe, say)
        found.append(judge(pool, asked.work / f"learned-{seed}.json"))
        ledgers(found, recipe, asked.json)


if __name__ == "__main__":
    main()

"""Language models merged: perplexity of every method beside the base and the experts.

    SPOLIA_DATA=FOLDER python benchmarks/language.py                  trains, merges, judges; writes two ledgers
    python benchmarks/language.py --data FOLDER --seeds 1 --json FOLDER     a shorter run, its ledgers elsewhere
    python benchmarks/language.py --recipes                           learning rates and lengths, on validation

Every merge of the pool (language_pool.py) goes through `spolia.merge` with the method's defaults, and once more with the
scale that validation chooses where there is one. The work folder keeps experts and scores: run again, it goes on where it
stopped. Ledgers: language_merging (three experts) and language_pair (methods that take two models).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import language_pool
import measure
from language_pool import CONTEXT, TEXTS, LanguagePool, Recipe, data_touched, fit, make_pool

import spolia
from spolia.bench.language import BITS, PERPLEXITY, Likelihood, exponential, ledger_rows, mean_nats
from spolia.bench.multitask import AVERAGE, choose
from spolia.catalog import METHODS, find
from spolia.core.checkpoint import read_tensors
from spolia.core.settings import MergeSettings
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text

BASE, EXPERTS = "base", "experts, each on its own"
PAIR = TEXTS[:2]
TRIED = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5), "threshold": (0.2, 0.3, 0.4, 0.5, 0.6)}
RATES, SNAPSHOTS = (1e-3, 4e-3), (25, 50, 100)  # what --recipes tries
HOUSE = measure.REPOSITORY
LEDGERS = ("language_merging", "language_pair")
PACKAGES = ["spolia", "torch", "transformers", "tokenizers", "numpy", "safetensors"]
say = partial(print, file=sys.stderr, flush=True)
Found = dict[str, Likelihood]  # by text
Scores = dict[str, Found]  # by label


@dataclass(frozen=True)
class Entry:
    """One line of a table. `chosen` names a setting that is shown with the value that is best on validation."""

    method: str
    ledger: str = "language_merging"
    chosen: str = ""
    texts: tuple[str, ...] = TEXTS

    @property
    def label(self) -> str:
        chosen = f", {self.chosen} chosen" if self.chosen else ""
        return self.method + chosen + (", task known" if self.masked else "")

    @property
    def masked(self) -> bool:
        """Each text is judged with the mask of its own expert: no one model, so it stands with the baselines."""
        return find(self.method).settings_class().masked


@dataclass
class Judged:
    """What one seed has given so far, by ledger and label."""

    test: dict[str, Scores] = field(default_factory=lambda: {name: {} for name in LEDGERS})
    validation: dict[str, dict[str, float]] = field(default_factory=lambda: {name: {} for name in LEDGERS})
    chosen: dict[str, float] = field(default_factory=dict)

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


def entries() -> list[Entry]:
    """Every merge of the catalog that needs no data, of as many experts as it takes."""
    found: list[Entry] = []
    pairs = [Entry(name, "language_pair", texts=PAIR) for name in (AVERAGE, "task_arithmetic")]
    for method in METHODS:
        settings = method.settings_class()
        if method.family != "merge" or not issubclass(settings, MergeSettings) or settings.experts[1] == 1:
            continue
        if settings.experts[1] == 2:
            pairs.append(Entry(method.name, "language_pair", texts=PAIR))
            continue
        found.append(Entry(method.name))
        for name in TRIED.keys() & settings.model_fields.keys():
            if settings.masked == (name == "threshold"):
                found.append(Entry(method.name, chosen=name))
    return [*found, *pairs]


# --- one seed --------------------------------------------------------------------------------------------------------


def judge(pool: LanguagePool, file: Path) -> Judged:
    """Merges and counts what `file` does not hold yet."""
    judged = Judged.load(file)
    base = read_tensors(pool.base)
    if BASE not in judged.test["language_merging"]:
        references = _references(pool, base)
        judged.test = {name: _shown(references, PAIR if name == "language_pair" else TEXTS) for name in LEDGERS}
        judged.save(file)
    for entry in entries():
        if entry.label in judged.test[entry.ledger]:
            continue
        start = time.perf_counter()
        test, validation, value = chosen_merge(pool, entry, base)
        judged.test[entry.ledger][entry.label] = test
        judged.validation[entry.ledger][entry.label] = validation
        if value is not None:
            judged.chosen[entry.label] = value
        judged.save(file)
        shown = f"{exponential(mean_nats(test)):.2f}" + (f" at {value:g}" if value is not None else "")
        say(f"seed {pool.seed}: {entry.label}, perplexity {shown} ({time.perf_counter() - start:.0f} s)")
    return judged


def _references(pool: LanguagePool, base: dict[str, Any]) -> Scores:
    """Base, experts at home, and every expert everywhere."""
    found: Scores = {BASE: pool.judge(base, "test"), EXPERTS: {}}
    for text, folder in pool.experts.items():
        found[f"expert {text}"] = everywhere = pool.judge(read_tensors(folder), "test")
        found[EXPERTS][text] = everywhere[text]
    return found


def _shown(references: Scores, texts: Sequence[str]) -> Scores:
    """The references that concern `texts`."""
    others = {f"expert {text}" for text in TEXTS if text not in texts}
    return {label: {t: found[t] for t in texts} for label, found in references.items() if label not in others}


def chosen_merge(pool: LanguagePool, entry: Entry, base: dict[str, Any]) -> tuple[Found, float, float | None]:
    """The entry's likelihoods on test texts, nats on validation (mean over texts), and the value that was chosen."""
    kind = find(entry.method).settings_class()
    judged = _masked if entry.masked else _single
    if not entry.chosen:
        return judged(pool, entry, {}, "test"), mean_nats(judged(pool, entry, {}, "validation")), None
    default = kind.model_fields[entry.chosen].default
    merged = {} if entry.masked else merge(pool, entry, {})

    def score(value: float) -> float:
        if entry.masked:
            return -mean_nats(_masked(pool, entry, {entry.chosen: value}, "validation"))
        # every method with a scale gives base + scale * change
        state = {name: tensor + (merged[name] - tensor) * (value / default) for name, tensor in base.items()}
        return -mean_nats(pool.judge(state, "validation", entry.texts))

    tried = (default, *(v for v in TRIED[entry.chosen] if v != default))  # first: it wins where no other is better
    value, curve = choose(tried, score)
    return judged(pool, entry, {entry.chosen: value}, "test"), -max(curve), value


def merge(pool: LanguagePool, entry: Entry, settings: dict[str, float]) -> dict[str, Any]:
    experts = {text: pool.experts[text] for text in entry.texts}
    start = pool.base if find(entry.method).settings_class().base == "required" else None
    return spolia.merge(experts, base=start, method=entry.method, settings=settings, seed=pool.seed, threads=1)


def _single(pool: LanguagePool, entry: Entry, settings: dict[str, float], part: str) -> Found:
    return pool.judge(merge(pool, entry, settings), part, entry.texts)


def _masked(pool: LanguagePool, entry: Entry, settings: dict[str, float], part: str) -> Found:
    """Each text under the merged model with the mask of its own expert put on."""
    merged = merge(pool, entry, settings)
    masks = spolia.masks(pool.experts, base=pool.base, method=entry.method, settings=settings, threads=1)
    own = {text: spolia.attach(merged, masks[text], base=pool.base, threads=1) for text in entry.texts}
    return {text: pool.judge(state, part, (text,))[text] for text, state in own.items()}


# --- ledgers ---------------------------------------------------------------------------------------------------------


def ledgers(found: list[Judged], recipe: Recipe, folder: Path) -> None:
    """Writes the ledgers and prints their perplexities."""
    for name in LEDGERS:
        first = found[0].test[name]
        scores = {label: [one.test[name][label] for one in found] for label in first}
        rivals = {entry.label for entry in entries() if entry.ledger == name and not entry.masked}
        marked = set(first) - rivals
        rows = ledger_rows(scores, baselines=marked, against=AVERAGE)
        rows += ledger_rows(scores, metric=BITS, baselines=marked, against=AVERAGE)
        ledger = {
            "name": name,
            "command": "python benchmarks/language.py",
            "commit": measure.commit(),
            "date": datetime.date.today().isoformat(),
            "machine": measure.machine(),
            "versions": measure.versions(sys.executable, PACKAGES),
            "data": data_touched(recipe),
            "seeds": list(range(len(found))),
            "rows": rows,
            "notes": _notes(found, recipe, name),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(ledger, indent=1) + "\n")
        print(f"\n{name}\n{to_text(main_table({'rows': rows}, PERPLEXITY))}")


def _notes(found: list[Judged], recipe: Recipe, name: str) -> str:
    lines = [
        "Perplexity is per token of the base's tokenizer (512 tokens), exp of the mean nats over all tokens but the first"
        f" of a text, in windows of {CONTEXT} tokens without overlap; of several texts the geometric mean.",
        f"Fine-tuning: AdamW, fp32, learning rate {recipe.lr:g} after {recipe.warmup} steps, {recipe.steps} steps of"
        f" {recipe.batch} windows, weight decay {recipe.weight_decay:g}.",
        "Intervals are 95 %, Student's over seeds. A seed draws the training windows, and what a method drops at random;"
        " base, split and test texts are the same for all, so intervals say nothing about other texts.",
    ]
    if name == "language_merging":
        lines += [f"{label}: {', '.join(f'{one.chosen[label]:g}' for one in found)}." for label in found[0].chosen]
        rivals = [label for label in found[0].validation[name] if not label.endswith(", task known")]
        best = min(rivals, key=lambda label: sum(one.validation[name][label] for one in found))
        lines.append(f"Best on validation: {best}.")
    return " ".join(lines)


def recipes(pool: LanguagePool) -> None:
    """Perplexity on validation of experts at home and of their average, for each rate and length."""
    base = read_tensors(pool.base)
    _print_recipe("base", [pool.judge(base, "validation")])
    for rate in RATES:
        held: dict[int, dict[str, Any]] = {step: {} for step in SNAPSHOTS}
        for text in TEXTS:
            for step, model in fit(pool, text, Recipe(lr=rate, steps=SNAPSHOTS[-1]), SNAPSHOTS):
                held[step][text] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for step, experts in held.items():
            own = {text: pool.judge(state, "validation", (text,))[text] for text, state in experts.items()}
            mean = {name: sum(state[name] for state in experts.values()) / len(experts) for name in experts[TEXTS[0]]}
            _print_recipe(f"lr {rate:g}, {step} steps: experts | average", [own, pool.judge(mean, "validation")])


def _print_recipe(what: str, found: list[Found]) -> None:
    shown = [[*(one.perplexity for one in texts.values()), exponential(mean_nats(texts))] for texts in found]
    print(f"{what:44} {' | '.join(' '.join(f'{v:8.2f}' for v in values) for values in shown)}", flush=True)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--data", type=Path, default=os.environ.get("SPOLIA_DATA"), help="default: SPOLIA_DATA")
    told.add_argument(
        "--work", type=Path, default=measure.REPOSITORY / "runs" / "language", help="keeps experts and scores"
    )
    told.add_argument("--seeds", type=int, default=3)
    told.add_argument("--json", type=Path, default=HOUSE / "docs" / "results", help="folder of the ledgers")
    told.add_argument("--recipes", action="store_true", help="only compare recipes of fine-tuning, on validation")
    asked = told.parse_args()
    if asked.data is None or not (Path(asked.data) / "stories260k").is_dir():
        raise SystemExit("there is no stories260k: name its folder in SPOLIA_DATA or with --data")
    torch.set_num_threads(1)  # the model is too small to share among cores
    from transformers.utils import logging

    logging.disable_progress_bar()
    if asked.recipes:
        recipes(LanguagePool(asked.data, asked.work, 0))
    else:
        run(asked.data, asked.work, asked.seeds, asked.json)


def run(data: Path, work: Path, seeds: int, folder: Path) -> None:
    """Trains, merges and judges what `work` lacks; the ledgers in `folder` grow seed by seed."""
    recipe, record = Recipe(), work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(language_pool.settings(recipe) | {"tried": TRIED}, indent=1)
    if record.is_file() and record.read_text() != settings:
        raise SystemExit(f"{work} was made with other settings: give another --work, or remove it")
    record.write_text(settings)
    found = []
    for seed in range(seeds):
        pool = make_pool(data, work / f"seed-{seed}", seed, recipe, say)
        found.append(judge(pool, work / f"scores-{seed}.json"))
        ledgers(found, recipe, folder)


if __name__ == "__main__":
    main()

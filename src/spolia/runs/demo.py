"""The demo: every merging method on real digits, in a minute, with no download and no other data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from spolia.catalog import METHODS
from spolia.core.journal import Journal
from spolia.core.settings import MergeSettings
from spolia.runs.digits_study import SCALES, Entry, Study, run_study
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.store import RunFolder

DOMAINS = ("upright", "turned", "inverted", "permuted")
SEEDS = 5
PAIR = DOMAINS[:2]
PAIR_METRIC = f"accuracy, {PAIR[0]} and {PAIR[1]} merged alone"


def demo(
    folder: str | os.PathLike[str] = "spolia-demo", *, seeds: int = SEEDS, quiet: bool = False, progress: Any = None
) -> Path:
    """Trains experts on four domains of digits, merges them in every way, and writes a run folder with its report.

    Run again, it goes on where it stopped. Tells progress on stderr unless `quiet`. Returns the folder.
    """
    from spolia.runs.progress import choose

    study = study_of(range(seeds))
    if progress is None:
        progress = choose(quiet)
    with RunFolder(folder) as run:
        run.begin(_recipe(study))
        run.write_env(seed=study.seeds[0], seeds=list(study.seeds))
        left = study.steps_left(run)
        journal = Journal(run.path, progress=follow(progress, left))
        with recorded(run, journal, progress, left):
            run_study(run, study, journal)
    return run.path


def study_of(seeds: range) -> Study:
    """Every merging method with its defaults and, where it has a scale, with the one that validation chooses.

    Methods that take no more than two models are shown on a pair, beside average and task arithmetic of the same pair.
    Those that give each expert a mask are judged with the task known, and stand with the experts: they are no one model.
    """
    entries: list[Entry] = []
    pairs = [Entry(name, name, metric=PAIR_METRIC, domains=PAIR) for name in ("average", "task_arithmetic")]
    for method in METHODS:
        settings = method.settings_class()
        if method.family != "merge" or not issubclass(settings, MergeSettings):  # what needs data is not shown here
            continue
        if settings.experts[1] == 1:  # no merge of experts
            continue
        if settings.masked:
            entries.append(Entry(f"{method.name}, task known", method.name, baseline=True, known=True))
            continue
        if settings.experts[1] == 2:
            pairs.append(Entry(method.name, method.name, metric=PAIR_METRIC, domains=PAIR))
            continue
        entries.append(Entry(method.name, method.name))
        if "scale" in settings.model_fields:
            default = settings.model_fields["scale"].default  # first, so that it wins where another is only as good
            scales = (default, *(s for s in SCALES if s != default))
            entries.append(Entry(f"{method.name}, scale chosen", method.name, scales=scales))
    return Study("demo", DOMAINS, tuple(seeds), (*entries, *pairs))


def _recipe(study: Study) -> str:
    """What the folder says it holds."""
    merges = [
        {"name": e.method, "experts": list(e.domains or study.domains), "scale": list(e.scales) or "default"}
        for e in study.entries
    ]
    pool = {"source": "digits", "domains": list(study.domains)}
    whole = {"demo": 1, "seeds": list(study.seeds), "pool": pool, "merges": merges}
    return "# written by `spolia demo`\n" + yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=100)

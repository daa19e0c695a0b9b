"""Few-shot class-incremental tables: class means, L2P and ASP on frozen encoders that we train on other classes.

    SPOLIA_DATA=FOLDER python benchmarks/fscil.py --work FOLDER       everything; goes on where it stopped
    … --only clinc --methods ncm,asp --seeds 1                        some rows; also dualprompt, coda, teen
    … --estimate                                                      a few steps of each row, and its time
    … --quick                                                         a few steps: does everything run?
    … --budget 5 --device cuda                                        five times all steps and readings; on a GPU

clinc: CLINC150, 90 intents, then 12 sessions 5-way 5-shot; a BERT of 4 blocks and 128 channels. tiny: Tiny-ImageNet-100 at 32
pixels, 60 classes, then 8 sessions 5-way 5-shot; a ViT of 5 blocks and 128 channels on patches of 8 pixels. Which classes are
base and the encoder are the same for all seeds; which examples the shots are, batches and prompts are each seed's own. Sizes
are cut to about 45 minutes of one core.

The ViT learns the base classes and their quarter turns, and in every other step one of GTSRB, EuroSAT, DTD and RSSCN7; the
BERT the base intents, and in every other step hidden words of base sentences, Europarl and WikiText. No novel class, nor a
word piece from one, is seen before its session. Natural photographs of other sets are left out: their classes are not apart.

Each training goes on where it stopped; each finished one keeps its numbers in the work folder. Ledgers: docs/results/
fscil_clinc.json, fscil_tiny.json. Two processes may share a work folder: an encoder or a seed belongs to who came first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fscil_text
import measure
import torch
from stages import held_alone

from spolia.bench.fscil import ledger_rows
from spolia.catalog import find
from spolia.core import tensorfile
from spolia.core.journal import Journal
from spolia.core.seeds import entropy
from spolia.data.images import data_folder
from spolia.data.labelled import cropped, labelled_packed
from spolia.parts.stream import class_incremental
from spolia.reports.ledger import main_table
from spolia.reports.tables import to_text
from spolia.runs.fscil_ground import Ground, Shown, pretrained
from spolia.runs.fscil_study import led
from spolia.runs.prompted import learner_of
from spolia.zoo.encoders import encoder_of
from spolia.zoo.vit import ViT

PACKAGES = ["torch", "numpy", "transformers", "spolia"]
METHODS = ("ncm", "l2p", "asp")
KNOWN = (*METHODS, "teen", "dualprompt", "coda")
SEEDS = 5
OTHERS = ("gtsrb", "eurosat", "dtd10", "rsscn7")
SIZES = {"clinc": [90, *[5] * 12], "tiny": [60, *[5] * 8]}
SHOTS, SPLIT = 5, 0  # SPLIT: the seed of base classes and encoder
STEPS = {"clinc": 1_600, "tiny": 2_500}  # of the encoder
EPOCHS = {"clinc": 1.0, "tiny": 1.5}
EVERY = {"clinc": 3, "tiny": 1}  # test inputs: every so manieth
SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 128, 5, 4  # of the ViT
TASKS = {
    "tiny": "Tiny-ImageNet-100, 60 classes, then 5-way 5-shot",
    "clinc": "CLINC150, 90 intents, then 5-way 5-shot",
}
BATCH = 48
DATA = {
    "tiny": f"encoder: the training part of the 60 base classes, and of {', '.join(OTHERS)}; base session: the former; "
    "sessions: five training images of each new class; test: the test part of all classes seen",
    "clinc": "encoder: training sentences of the 90 base intents, Europarl and WikiText-2; base session: the former; "
    "sessions: five training sentences of each new intent; test: the test part of all intents seen",
}


@dataclass(frozen=True)
class Made:
    """One seed's stream, its encoder as it starts, and how that is trained."""

    stream: Any
    module: Any
    train: Any  # (steps, journal) -> None
    show: Any
    view: Any


def made(key: str, seed: int, device: str) -> Made:
    if key == "clinc":
        held = fscil_text.sentences(data_folder(), SIZES[key], SHOTS, SPLIT, seed)
        module = fscil_text.bert(held.vocabulary, SPLIT).to(device)

        def train(steps: int, journal: Journal) -> None:
            fscil_text.pretrain(module, held, SIZES[key][0], steps, SPLIT, journal)

        return Made(thinned(held.stream, EVERY[key]), module, train, fscil_text.show, None)
    held = labelled_packed("tiny_imagenet100", size=SIDE)
    order = class_incremental(held.train, held.test, SIZES[key], shuffle=True, seed=SPLIT).order
    stream = class_incremental(held.train, held.test, SIZES[key], order=order, shots=SHOTS, seed=seed)
    show = Shown(None, "half")
    ground = Ground(stream, held.classes, show, lambda x, draws: show(cropped(x, draws)))
    draws = torch.Generator().manual_seed(entropy(SPLIT, "fscil", "encoder") % 2**63)
    vit = ViT(SIDE, PATCH, WIDTH, DEPTH, HEADS, generator=draws).to(device)
    return Made(thinned(stream, EVERY[key]), vit, partial(_train_vit, vit, ground), show, ground.view)


def _train_vit(vit: Any, ground: Ground, steps: int, journal: Journal) -> None:
    others = []
    for name in OTHERS:
        held = labelled_packed(name, size=SIDE)
        whole = class_incremental(held.train, held.test, tasks=1)
        others.append((whole.experiences[0].train, len(held.classes)))
    base = ground.stream.experiences[0].train
    pretrained(vit, base, SIZES["tiny"][0], steps, ground, SPLIT, journal, others)


def thinned(stream: Any, every: int) -> Any:
    """The stream with fewer test inputs."""
    tests = [replace(t, examples=replace(t.examples, places=t.examples.places[::every])) for t in stream.tests]
    return replace(stream, tests=tuple(tests))


def fewer(stream: Any) -> Any:
    """The stream with a few base examples and test inputs, for a quick look."""
    first, *others = stream.experiences
    short = replace(first, train=replace(first.train, places=first.train.places[::40]))
    tests = [replace(t, examples=replace(t.examples, places=t.examples.places[:20])) for t in stream.tests]
    return replace(stream, experiences=(short, *others), tests=tuple(tests))


def settings_of(method: str, key: str, asked: argparse.Namespace) -> tuple[str, Any]:
    """The catalog's name and settings, learning rates falling over the readings of the row."""
    if method == "teen":
        return "ncm", find("ncm").settings_class()(share=0.5)
    more = {} if method == "ncm" else {"readings": EPOCHS[key] * asked.budget}
    if method == "dualprompt":
        more["own_blocks"] = (2, 3)
    if method == "coda":
        more["blocks"] = (0, 1, 2, 3)
    return method, find(method).settings_class()(**more)


def stage_encoder(key: str, asked: argparse.Namespace) -> Path | None:
    """The file of a row's encoder; None where another process is making it."""
    steps = 4 if asked.quick else max(1, round(STEPS[key] * asked.budget))
    folder, start = asked.work / key / "encoder", time.perf_counter()
    file = folder / f"encoder-{steps}.safetensors"
    with held_alone(folder, f"{key} encoder") as ours:
        if not ours:
            return None
        if not file.exists():
            one = made(key, SPLIT, asked.device)
            one.train(steps, Journal(folder / "loop", save_every=60.0))
            tensorfile.write(file, one.module.state_dict())
            print(f"{key} encoder: {time.perf_counter() - start:.0f} s", flush=True)
    return file


def stage(key: str, seed: int, names: list[str], file: Path, asked: argparse.Namespace) -> None:
    """What is still missing of a seed's methods, unless another process is at it."""
    left = [name for name in names if not (asked.work / key / f"{name}-{seed}.json").exists()]
    if not left:
        return
    folder = asked.work / key / f"seed-{seed}"
    with held_alone(folder, f"{key} {seed}") as ours:
        if not ours:
            return
        one = made(key, seed, asked.device)
        stream = fewer(one.stream) if asked.quick else one.stream
        one.module.load_state_dict(tensorfile.read(file, "delete it")[1])
        encoder = encoder_of(one.module)
        for name in left:
            method, settings = settings_of(name, key, asked)
            learner = learner_of(method, settings, encoder, stream, seed, one.view, one.show)
            journal = Journal(folder / name, save_every=60.0)
            epochs = 0.5 if asked.quick else EPOCHS[key] * asked.budget
            kept = led(learner, stream, epochs, BATCH, journal, seed, "stream")
            part = asked.work / key / f"{name}-{seed}.part"
            part.write_text(json.dumps(kept))
            part.replace(part.with_suffix(".json"))
            shown = {k: round(kept[k], 1) for k in ("mean", "last", "base", "novel", "harmonic", "seconds")}
            print(f"{key} {name} {seed}: {shown}", flush=True)


def finished(work: Path, key: str) -> tuple[list[int], dict[str, list[dict[str, Any]]]]:
    """The seeds that all methods have, and by method what these found."""
    found = {
        name: {int(f.stem.rpartition("-")[2]): json.loads(f.read_text()) for f in (work / key).glob(f"{name}-*.json")}
        for name in KNOWN
    }
    found = {name: each for name, each in found.items() if each}
    seeds = sorted(set.intersection(*map(set, found.values()))) if found else []
    return seeds, {name: [each[seed] for seed in seeds] for name, each in found.items()}


def write_ledger(key: str, asked: argparse.Namespace, command: str) -> None:
    """docs/results/fscil_KEY.json, and its accuracies on the screen."""
    seeds, found = finished(asked.work, key)
    if not seeds:
        return
    rows = ledger_rows(found, TASKS[key], against="ncm" if "ncm" in found else "", baselines=["ncm"])
    steps, epochs = max(1, round(STEPS[key] * asked.budget)), EPOCHS[key] * asked.budget
    ledger = {
        "name": f"fscil_{key}",
        "command": command,
        "commit": measure.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine() | ({"gpu": torch.cuda.get_device_name()} if asked.device == "cuda" else {}),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {"all": DATA[key]},
        "seeds": seeds,
        "rows": rows,
        "notes": f"One encoder and one choice of base classes for all seeds; the encoder had {steps:,} steps of 64, prompts"
        f" {epochs:g} readings of the base data in batches of {BATCH}, with each method's own defaults; nothing was tuned here."
        " Published tables have pretrained encoders a hundred times as large, trained on more: absolute numbers do not compare."
        " Base, novel and harmonic accuracy after the last session; drop: first less last. Differences are to ncm, seed by"
        " seed; intervals are Student's, 95 %, and do not cover the choice of encoder and base classes.",
    }
    asked.json.mkdir(parents=True, exist_ok=True)
    (asked.json / f"fscil_{key}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"\nfscil_{key}\n{to_text(main_table({'rows': rows}, 'accuracy'))}", flush=True)


def estimate(keys: list[str], names: list[str], asked: argparse.Namespace) -> None:
    """Seconds of each row, from a few steps of it."""
    total = 0.0
    for key in keys:
        one, marks, clock, row = made(key, 0, asked.device), [], time.process_time, 0.0
        for steps in (2, 10):
            start = clock()
            one.train(steps, Journal())
            marks.append(clock() - start)
        once = (marks[1] - marks[0]) / 8 * STEPS[key] * asked.budget
        print(f"{key} encoder: {once:.0f} s", flush=True)
        encoder, first = encoder_of(one.module), one.stream.experiences[0]
        for name in names:
            method, settings = settings_of(name, key, asked)
            learner = learner_of(method, settings, encoder, one.stream, 0, one.view, one.show)
            learner.begin(first)
            learner.observe(first.draw(BATCH, 0, 0))  # asp looks at the base data here
            start = clock()
            for step in range(1, 5):
                learner.observe(first.draw(BATCH, 0, step))
            each = (clock() - start) / 4
            start = clock()
            learner.features(first.batch(slice(0, 128)).x)
            look = (clock() - start) / 128 * len(first.train)
            epochs = EPOCHS[key] * asked.budget if method != "ncm" else 0.0
            tests = sum((i + 1) * len(t.examples) for i, t in enumerate(one.stream.tests[::-1])) / len(first.train)
            looks = epochs if method == "asp" else 0.0
            seconds = each * epochs * len(first.train) / BATCH + look * (1 + looks + tests)
            row += seconds
            print(f"{key} {name}: {seconds:.0f} s a seed", flush=True)
        total += once + asked.seeds * row
    print(f"all, {asked.seeds} seeds: {total / 60:.0f} minutes of one core, where it is one")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default=",".join(SIZES), help="rows")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budget", type=float, default=1.0, help="factor of all steps; another work folder for each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument(
        "--json", type=Path, default=measure.REPOSITORY / "docs" / "results", help="folder of the ledgers"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data_folder()
    keys, names = asked.only.split(","), asked.methods.split(",")
    if wrong := [*(set(keys) - set(SIZES)), *(set(names) - set(KNOWN))]:
        parser.error(f"`{wrong[0]}` is no row or method here")
    if asked.estimate:
        estimate(keys, names, asked)
        return
    if asked.work is None or (asked.quick and asked.json == measure.REPOSITORY / "docs" / "results"):
        parser.error("--work FOLDER, and with --quick also --json FOLDER")
    for key in keys:  # a whole table before the next one
        file = stage_encoder(key, asked)
        if file is None:
            continue
        for seed in range(asked.seeds):
            stage(key, seed, names, file, asked)
            write_ledger(key, asked, "python benchmarks/fscil.py --work FOLDER")


if __name__ == "__main__":
    main()

"""Merge your own fine-tunes in three lines; shown on digits experts made on the spot (a few seconds, no download)."""

import tempfile
from pathlib import Path

import spolia
from spolia.bench.multitask import evaluate, mean_percent
from spolia.runs.digits_pool import make_pool

with tempfile.TemporaryDirectory() as folder:
    # Stand-ins for your models: a base and four experts, each a folder of safetensors.
    pool = make_pool(Path(folder), ["upright", "turned", "inverted", "permuted"], seed=0, journal=spolia.Journal())
    base, experts = pool.base, pool.experts

    # The merge. Paths, state dicts and modules will do; with out="FOLDER" it is written as a model.
    average = spolia.merge(experts)
    added = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.4})
    ties = spolia.merge(experts, base=base, method="ties")

    for name, merged in (("average", average), ("task arithmetic", added), ("ties", ties)):
        accuracy = evaluate(pool.outputs(merged), pool.tasks("test"))
        tasks = ", ".join(f"{task} {share.percent:.1f}" for task, share in accuracy.items())
        print(f"{name:16}{mean_percent(accuracy):.1f} %   ({tasks})")

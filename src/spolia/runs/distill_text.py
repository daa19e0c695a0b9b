"""What `spolia new` writes of a distillation: the problem, and time, score and data in the header."""

from __future__ import annotations

from spolia.catalog import Method
from spolia.runs.distill_problems import DIGITS, IMAGES

_LABELS = {"dkd": "labels are needed", "nkd": "labels are needed"}


def problem_text(method: Method, tiny: bool) -> str:
    """The block `problem` of a recipe."""
    return _digits(method) if tiny else _images()


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score, data."""
    score = "measured by the run on held-out inputs, beside the labels alone, KD, and a rank term on top"
    labels = _LABELS.get(method.name, "with `ce: 0` the student sees no labels")
    if "ce" not in method.settings_class().model_fields:
        labels = _LABELS.get(method.name, "the base's cross-entropy takes labels")
    if tiny:
        return "under a minute on one core", score, f"scikit-learn's digits, 150 of them for the student; {labels}"
    time = "hours on a GPU: the published 240 epochs for each line of the table; `epochs` and `most` make it shorter"
    return time, score, f"an npz file of images in the folder that SPOLIA_DATA names; {labels}"


def _digits(method: Method) -> str:
    network, teacher, student = ("conv", 16, 3) if method.name == "attention" else ("mlp", 128, 12)
    pace = ", ".join(f"{key}: {value}" for key, value in DIGITS.items())
    return "\n".join(
        [
            "",
            "problem:",
            "  source: digits  # real scans that come inside scikit-learn; no download. Also: npz, prose",
            f"  network: {network}  # of both: mlp, conv",
            f"  teacher: {teacher}  # width; trained in the run on 1,000 labelled digits",
            f"  student: {student}  # width",
            "  images: 150  # labelled digits that the student is trained on; at most 700",
            "  noise: 0.2  # deviation of the noise on them, where ink runs from -1 to 1",
            "  # more: every setting of spolia.methods.distill.train.Training",
            f"  training: {{{pace}}}",
        ]
    )


def _images() -> str:
    pace = ", ".join(f"{key}: {value}" for key, value in ({"epochs": 240} | IMAGES).items())
    return "\n".join(
        [
            "",
            "problem:",
            "  source: npz  # small images; also: digits, prose",
            "  data: cifar10_full_jpeg75  # NAME.npz in the folder that SPOLIA_DATA names, or a path",
            "  # most: 10000  # images read of each part",
            "  # names: resnet8, resnet14, resnet20, resnet32, resnet56; or the path of a model folder or safetensors file;",
            "  # or both: {network: resnet56, weights: PATH}",
            "  teacher: resnet56",
            "  student: resnet20",
            "  teacher_epochs: 240  # with labels, before it teaches; 0 takes weights as they are",
            "  device: cpu  # cpu, cuda, auto",
            "  # more: every setting of spolia.methods.distill.train.Training",
            f"  training: {{{pace}}}",
        ]
    )

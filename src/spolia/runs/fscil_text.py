"""What `spolia new` and packaged recipes of prompts say beside a method's settings."""

from __future__ import annotations

from spolia.catalog import Method


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    if tiny:
        lines = [
            "  source: digits_sessions  # scans that come inside scikit-learn. Also: packed_, npz_, folder_, data_sessions",
            "  base: 6  # classes of the base session",
            "  ways: 2  # new classes of each further session",
            "  shots: 5  # examples of each of them",
            "  epochs: 3  # readings of the base data",
            "  batch: 48  # examples of a step",
            "  pretraining: 150  # steps that train a small ViT on the base classes",
        ]
    else:
        lines = [
            "  source: packed_sessions  # NAME.npz in the folder SPOLIA_DATA; also: npz_, folder_, data_ (texts), digits_",
            "  data: tiny_imagenet100",
            "  base: 60  # classes of the base session",
            "  ways: 5  # new classes of each further session",
            "  shots: 5  # examples of each of them",
            "  epochs: 20  # readings of the base data",
            "  batch: 48  # examples of a step",
            "  encoder: google/vit-base-patch16-224  # folder, name on the hub, timm/NAME; empty: a ViT trained on the base",
            "  pixels: 224  # side of the images as the encoder sees them",
            "  norm: half  # half: -1 … 1, as that encoder was trained; imagenet, none",
            "  augment: crops  # moved by up to four pixels and mirrored; also: none",
            "  device: cpu  # cpu, cuda, auto",
        ]
    return "\n".join(["", "problem:", *lines])


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    beside = " and ".join(name for name in ("ncm", "l2p") if name != method.name)
    score = f"accuracy of all classes after each session, its drop, base, novel and harmonic accuracy, beside {beside}"
    if tiny:
        data = "digits 0 to 5 with labels, then five images each of 6 to 9; 600 others for the test"
        return "a minute on one core", score, data
    data = "the training part of 60 classes, then five images each of 40 others; the test part after every session"
    return "hours on a GPU, days on a processor; `spolia plan` estimates it", score, data

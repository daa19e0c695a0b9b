"""What `spolia new` and packaged recipes of the family continual say beside a method's settings."""

from __future__ import annotations

from spolia.catalog import Method


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    if tiny:
        return "\n".join(
            [
                "",
                "problem:",
                "  source: digits  # real scans that come inside scikit-learn; no download. Also packed, npz, folder, datasets",
                "  scenario: class  # also: task, domain, online",
                "  tasks: 5  # of equally many classes; or the classes of each: [4, 3, 3]",
                "  epochs: 5  # readings of each task's data",
                "  batch: 10  # examples of a step",
                "  memory: 50  # samples that any memory holds, at most; null: the method's own `items`",
                "  network: mlp  # also: conv",
            ]
        )
    return "\n".join(
        [
            "",
            "problem:",
            "  source: packed  # NAME.npz in the folder SPOLIA_DATA; also: npz, folder, datasets, digits",
            "  data: cifar10_full_jpeg75",
            "  scenario: class  # also: task, domain, online",
            "  tasks: 5  # of equally many classes; or the classes of each: [4, 3, 3]",
            "  epochs: 50  # readings of each task's data",
            "  batch: 32  # examples of a step",
            "  network: resnet20  # mlp, conv4, resnet8, resnet14, resnet20, resnet32",
            "  augment: crops  # moved by up to four pixels and mirrored; also: none",
            "  device: cpu  # cpu, cuda, auto",
        ]
    )


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    beside = {
        "finetune": "joint training",
        "joint": "fine-tuning",
        "refresh": "fine-tuning, joint training and its host",
    }
    beside["cpr"] = beside["refresh"]
    other = beside.get(method.name, "fine-tuning and joint training")
    score = f"average accuracy after the last task, Class-IL and Task-IL, and what was forgotten, beside {other}"
    if tiny:
        data = "1,197 of scikit-learn's digits, task by task; 600 others for the test"
        return "under a minute on one core", score, data
    time = "a day on a processor, hours on a GPU; `spolia plan` estimates it, fewer `epochs` make it shorter"
    return time, score, "the training part of a packed set, task by task; its test part after every task"

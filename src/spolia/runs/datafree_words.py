"""What data-free recipes say of themselves: the data that each phase touches, and the text of a new recipe."""

from __future__ import annotations

from spolia.catalog import Method
from spolia.runs.datafree_problems import DataFree, DigitsModels, OwnModels, PackedModels, TextureModels


def data_of(problem: DataFree) -> dict[str, str]:
    """What each phase touches."""
    chosen = f"{problem.looks} pseudo-tasks of recovered images"
    if problem.validation == "real":
        chosen = f"{problem.looks} real labelled episodes of other classes"
    if isinstance(problem, OwnModels):
        test = f"{problem.episodes} episodes of the folder given" if problem.test else "none"
        return {"training": "models, class lists, noise", "selection": chosen, "oracle": "none", "test": test}
    if isinstance(problem, DigitsModels):
        base, test = "scans of seven digits with labels", "the three other digits"
    elif isinstance(problem, TextureModels):
        base, test = "sixteen kinds of stripes with labels", "eight other kinds of stripes"
    else:
        assert isinstance(problem, PackedModels)
        base, test = f"base classes of {', '.join(problem.data)}", "their test classes"
    return {
        "pool": base,
        "training": "models, class lists, noise",
        "selection": chosen,
        "oracle": base if "real" in problem.baselines else "none",
        "test": f"{problem.episodes} episodes of {test}",
    }


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    if tiny:
        lines = [
            "",
            "problem:",
            "  source: digits  # real scans that come inside scikit-learn; no download",
            "  ways: 3  # classes of a test episode; three digits are left for the test",
            "  shots: [1, 5]  # labelled inputs of each class, a test each",
            "  experts: 8  # models of the pool, each trained on expert_ways of seven digits",
            "  most_steps: 16  # outer steps of a training, at most; null: the method's own",
            "  quick: true  # a small generator, few images and replays, whatever the method says",
        ]
        if method.name == "groupings":
            lines.append(
                "  domains: [upright, inverted]  # how the scans are shown, models in turn; also: turned, mirrored"
            )
        if method.name == "robust":
            lines.append("  corrupted: 0.4  # share of the models that lie; attack says how")
        return "\n".join(lines)
    lines = [
        "",
        "problem:",
        "  source: packed  # npz files in the folder SPOLIA_DATA; also: models (your own), textures, digits",
        f"  data: {_DATA.get(method.name, '[tiny_imagenet100]')}  # models in turn; unseen classes of each are a test",
        "  ways: 5  # classes of a test episode",
        "  shots: [1, 5]  # labelled inputs of each class, a test each",
        "  experts: 20  # models of the pool",
        "  archs: [conv4, resnet10]  # networks of the pool, in turn"
        if method.name == "groupings"
        else "  archs: [conv4]",
    ]
    if method.name == "robust":
        lines.append("  corrupted: 0.4  # share of the models that lie; attack says how")
    return "\n".join(lines)


_DATA = {"groupings": "[tiny_imagenet100, gtsrb, eurosat, omniglot]"}


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    data = data_of(DigitsModels() if tiny else PackedModels(source="packed", data=_names(method)))
    time = "one to two minutes on one core" if tiny else "hours on a processor; `spolia plan` estimates it"
    score = "accuracy on unseen classes beside random features, averaged models, the best model, and real data"
    return time, score, "; ".join(f"{phase}: {what}" for phase, what in data.items())


def _names(method: Method) -> list[str]:
    return [name.strip("[] ") for name in _DATA.get(method.name, "[tiny_imagenet100]").split(",")]

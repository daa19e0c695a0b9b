"""What recipes of `apis` are about: experts that answer queries, in this process or behind HTTP, and the model that learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import Field

from spolia.errors import Problems
from spolia.runs.continual_problems import DigitsStream, PackedStream
from spolia.runs.schema import Device, Shape

Where = Callable[[tuple[Any, ...]], str]
_ADDRESS = re.compile(r"(https?://[^/?#\s]+)(?:/v2/models/([^/?#\s]+))?/?")


class ApiProblem(Shape):
    """What both problems say."""

    tasks: int | list[int] = Field(5, description="APIs, of equally many classes; or the number of classes of each")
    answers: Literal["logits", "probabilities", "top", "label"] = Field(
        "probabilities", description="what an API says: all it knows, its likeliest classes, or one label"
    )
    top: int = Field(1, description="classes that answers of kind top name", ge=1)
    decimals: int | None = Field(None, description="that answers are rounded to; null: none are", ge=1, le=6)
    budget: int = Field(12_600, description="items that an API may be asked in a repeat; an item is one input", ge=1)
    price: float = Field(0.0, description="of 1,000 items, for the estimate of cost", ge=0)
    currency: str = Field("USD", description="of that price", min_length=1, max_length=8)
    few: int = Field(0, description="real labelled examples of each class that come with an API (DECL); 0: none", ge=0)
    urls: list[str] = Field(
        default_factory=list,
        description="HTTP in the place of experts of this process: one server for all, or http://HOST/v2/models/NAME of each",
    )
    token: str | None = Field(None, description="environment variable that holds the servers' bearer token")
    questions: Literal["flat", "images"] | None = Field(
        None, description="generators: linear layers or convolutions; null: flat for inputs of 256 numbers or fewer"
    )
    questions_width: int = Field(128, description="hidden units or channels of the generators", ge=2)
    baselines: bool | None = Field(
        None, description="lines beside the method's own that ask too; null: where asking costs nothing"
    )

    @property
    def count(self) -> int:
        """APIs."""
        return self.tasks if isinstance(self.tasks, int) else len(self.tasks)

    @property
    def asks_for_baselines(self) -> bool:
        return not self.urls if self.baselines is None else self.baselines


class DigitsApis(ApiProblem):
    """Experts of scikit-learn's digits, trained on the spot."""

    source: Literal["apis"] = Field("apis", description="experts of real scans inside scikit-learn; no download")
    experts: list[Literal["mlp", "conv"]] = Field(
        default_factory=lambda: ["mlp", "conv"], description="architectures of the experts, in turn", min_length=1
    )
    network: Literal["mlp", "conv"] = Field("mlp", description="of the model that learns")
    width: int = Field(128, description="hidden units of mlp, channels of conv, of the model that learns", ge=1)


class PackedApis(ApiProblem):
    """Experts of a packed set of images, such as mnist, fashion_mnist, cifar10_full_jpeg75."""

    source: Literal["packed_apis"] = Field(description="experts of an npz file: see spolia.data.images")
    data: str = Field("cifar10_full_jpeg75", description="the file's name without .npz")
    folder: Path | None = Field(None, description="where the data lie; by default the folder that SPOLIA_DATA names")
    size: int | None = Field(None, description="pixels of a side: half, double or more; null: as they are", ge=8)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    most: int | None = Field(None, description="images read of each part, from the first on", ge=1)
    experts: list[Literal["linear", "mlp", "conv2", "conv4", "resnet8", "resnet14", "resnet20"]] = Field(
        default_factory=lambda: ["conv4", "resnet8", "mlp"],
        description="architectures of the experts, in turn",
        min_length=1,
    )
    expert_width: int | None = Field(
        None, description="hidden units or channels of the experts; null: mlp 64, conv2 and conv4 32, a ResNet 16", ge=2
    )
    expert_epochs: float = Field(5.0, description="readings of its own classes that an expert is trained for", gt=0)
    network: Literal["mlp", "conv4", "resnet8", "resnet14", "resnet20"] = Field(
        "resnet8", description="of the model that learns"
    )
    width: int = Field(32, description="hidden units of mlp, channels of conv4 or of a ResNet's first stage", ge=1)
    budget: int = Field(500_000, description="items that an API may be asked in a repeat; an item is one input", ge=1)
    device: Device = Field("cpu", description="where networks run: cpu, cuda, or auto")


PROBLEMS: dict[str, type[ApiProblem]] = {"apis": DigitsApis, "packed_apis": PackedApis}


def as_stream(problem: Any) -> Any:
    """The labelled stream that the experts know and that tests come from, as a continual problem."""
    if isinstance(problem, DigitsApis):
        return DigitsStream(tasks=problem.tasks, network=problem.network, width=problem.width)
    own = {name: getattr(problem, name) for name in ("data", "folder", "size", "channels", "most", "network", "device")}
    return PackedStream(source="packed", tasks=problem.tasks, width=problem.width, **own)


def addresses(problem: ApiProblem, names: list[str]) -> list[tuple[str, str]]:
    """Server and model of each API; `names` are the models' where one server has all."""
    found = [_ADDRESS.fullmatch(url) for url in problem.urls]
    if len(found) == 1 and found[0] is not None and found[0][2] is None:
        return [(found[0][1], name) for name in names]
    return [(match[1], unquote(match[2])) for match in found if match is not None]


def check_problem(problem: ApiProblem, settings: Any, where: Where, problems: Problems) -> None:
    """What does not fit, before anything is trained or asked."""
    from spolia.runs.apis_rounds import rounds_of

    sizes = [problem.tasks] if isinstance(problem.tasks, int) else problem.tasks
    if min(sizes, default=0) < 1 or (not isinstance(problem.tasks, int) and min(sizes) < 2):
        problems.add(where(("problem", "tasks")), f"{problem.tasks}", "give APIs of two classes or more each")
    elif isinstance(problem, DigitsApis):
        fits = problem.tasks in (1, 2, 5) if isinstance(problem.tasks, int) else sum(problem.tasks) == 10
        if not fits:
            mend = "write 1, 2 or 5, or the classes of each: [4, 3, 3]"
            problems.add(where(("problem", "tasks")), f"ten classes do not go into {problem.tasks}", mend)
    whole = [_ADDRESS.fullmatch(url) for url in problem.urls]
    wrong = [url for url, match in zip(problem.urls, whole, strict=True) if match is None or "@" in match[1]]
    if wrong:
        problems.add(where(("problem", "urls")), f"{wrong[0].split('@')[-1][:80]}", "http://HOST:PORT/v2/models/NAME")
    elif problem.urls and len(problem.urls) != problem.count and not (len(whole) == 1 and whole[0] and not whole[0][2]):
        what = f"{len(problem.urls)} addresses for {problem.count} APIs"
        problems.add(where(("problem", "urls")), what, "give one for each, or one server for all")
    if isinstance(problem, PackedApis):
        if problem.channels == 1 and any(n.startswith("resnet") for n in [*problem.experts, problem.network]):
            problems.add(
                where(("problem", "experts")), "a ResNet takes colour", "write `channels: 3`, or other networks"
            )
        if problem.size is not None and problem.size < 16 and "conv4" in [*problem.experts, problem.network]:
            mend = "give 16 pixels or more, or other networks"
            problems.add(where(("problem", "experts")), f"conv4 for images of {problem.size}", mend)
    if not problems.errors:
        rounds, once, each = rounds_of(problem, settings)
        if rounds < 1:
            what = f"{problem.budget:,} items do not pay for one round of {each:,}" + (
                f" after {once:,}" if once else ""
            )
            mend = "raise it, or lower `batch`, `directions` or `model_steps`"
            problems.add(where(("problem", "budget")), what, mend)

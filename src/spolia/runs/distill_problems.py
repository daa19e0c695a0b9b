"""Problems of the family distill, as a recipe writes them: a teacher, a student, inputs to learn and to be judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from spolia.methods.distill.train import Training
from spolia.runs.schema import Device, Shape

DIGITS: dict[str, Any] = {
    "epochs": 50,
    "batch": 32,
    "optimizer": "adamw",
    "lr": 0.02,
    "schedule": "cosine",
    "check_every": 20,
}
IMAGES: dict[str, Any] = {"check_every": 1000}
PROSE: dict[str, Any] = {"task": "tokens", "watch": "loss", "steps": 150, "batch": 16, "check_every": 25}
PROSE |= {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "schedule": "cosine", "warmup": 10}
NETWORKS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet56")


def _training(defaults: dict[str, Any]) -> Any:
    """Training whose settings are, where nothing is said, those of the problem."""

    def filled(value: Any) -> Any:
        return defaults | value if isinstance(value, dict) else value

    return Annotated[Training, BeforeValidator(filled)]


def _said(defaults: dict[str, Any]) -> Any:
    help = "how the student is trained: epochs, batch, lr, schedule …; all of `spolia.methods.distill.train.Training`"
    return Field(default_factory=lambda: Training(**defaults), description=help)


class DigitsDistillation(Shape):
    """scikit-learn's digits (real scans, inside its package): a teacher trained in the run, a student of a few weights."""

    source: Literal["digits"] = Field("digits", description="real digits, no download")
    network: Literal["mlp", "conv"] = Field("mlp", description="hidden layers, or convolutions, of both")
    teacher: int = Field(128, description="width of the teacher; of convolutions 16 is plenty", ge=1)
    student: int = Field(12, description="width of the student", ge=1)
    images: int = Field(150, description="labelled images that the student is trained on", ge=10, le=700)
    noise: float = Field(0.2, description="deviation of the noise on them, where ink runs from -1 to 1", ge=0)
    training: _training(DIGITS) = _said(DIGITS)  # type: ignore[valid-type]


class Model(Shape):
    """A model of images; in a recipe a bare name or path will do."""

    network: str | None = Field(None, description="one of " + ", ".join(NETWORKS) + "; left out: as the weights say")
    width: int = Field(16, description="channels of its first stage", ge=2)
    weights: Path | None = Field(None, description="model folder or safetensors file; left out: trained from scratch")


def _model(value: Any) -> Any:
    if isinstance(value, str):
        return {"network": value} if value in NETWORKS else {"weights": value}
    return value


_MODEL_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, Model.model_json_schema()]}
Named = Annotated[Model, BeforeValidator(_model), WithJsonSchema(_MODEL_SCHEMA)]


class ImageDistillation(Shape):
    """A set of small images in an npz file, and two networks."""

    source: Literal["npz"] = Field(description="images in an npz file")
    data: str = Field("cifar10", description="name of a set in the folder that SPOLIA_DATA names, or an npz file")
    most: int | None = Field(None, description="images read of each part, from the first on", ge=100)
    teacher: Named = Field(description="network, or weights, or both: {network: resnet56, weights: PATH}")
    student: Named = Field(description="likewise; what it is trained from")
    teacher_epochs: float = Field(0, description="epochs with labels that the teacher is given first", ge=0)
    device: Device = Field("cpu", description="where networks run: cpu, cuda, or auto")
    training: _training(IMAGES) = _said(IMAGES)  # type: ignore[valid-type]


class ProseDistillation(Shape):
    """English that CPython carries, character by character: a teacher trained in the run, a smaller language model."""

    source: Literal["prose"] = Field(description="the language reference of CPython, no download")
    teacher: int = Field(64, description="width of the teacher, of depth 2", ge=4, multiple_of=4)
    student: int = Field(16, description="width of the student, of depth 1", ge=4, multiple_of=4)
    context: int = Field(64, description="characters of a window", ge=8)
    windows: int = Field(1000, description="windows that the student is trained on", ge=16)
    training: _training(PROSE) = _said(PROSE)  # type: ignore[valid-type]


Problem = DigitsDistillation | ImageDistillation | ProseDistillation
PROBLEMS: dict[str, type[Shape]] = {"digits": DigitsDistillation, "npz": ImageDistillation, "prose": ProseDistillation}

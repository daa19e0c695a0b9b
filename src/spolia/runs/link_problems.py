"""What recipes of links are about: the text that is sent, who reads it, the way between them, and how long it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from spolia.data.texts import Texts, file_texts, packed_files, packed_texts, python_texts
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.channel import Burst, Channel
from spolia.runs.schema import Device, Shape

Model = Literal["uniform", "unigram", "ngram", "tiny_lm"]
Beside = Literal["no_model", "published", "llm_sc", "separate", "huffman", "utf8", "deepsc"]
Modulation = Literal["bpsk", "qpsk", "16qam", "64qam", "256qam"]
Convention = Literal["esn0", "ebn0_coded", "ebn0", "ebn0_info", "energy_per_char", "real_noise", "deepsc"]
USUAL: tuple[Beside, ...] = ("no_model", "published", "llm_sc", "separate", "huffman", "utf8")
WAYS: dict[str, dict[str, Any]] = {
    "awgn": {},
    "rayleigh": {"fading": "rayleigh"},
    "rician": {"fading": "rician"},
    "bursts": {"burst": {}},
    "erasures": {"erasure": 0.05},
}


class Bursts(Shape):
    """Stretches of heavier noise."""

    enter: float = Field(0.01, description="probability that one begins, a symbol", ge=0, le=1)
    leave: float = Field(0.1, description="probability that it ends, a symbol", gt=0, le=1)
    factor: float = Field(100.0, description="of the noise within it", gt=0)
    known: bool = Field(False, description="whether the receiver knows where")


class Way(Shape):
    """The channel; in a recipe a name will do: awgn, rayleigh, rician, bursts, erasures."""

    fading: Literal["none", "rayleigh", "rician"] = Field("none", description="gains of symbols")
    block: int | None = Field(1, description="symbols that share a gain; null: a frame", ge=1)
    k_factor: float = Field(4.0, description="of rician: power of the direct path over all others", ge=0)
    knowledge: Literal["full", "phase", "none"] = Field("full", description="what the receiver knows of the gain")
    csi_error: float = Field(0.0, description="variance of what it knows wrongly", ge=0)
    burst: Bursts | None = Field(None, description="stretches of heavier noise")
    erasure: float = Field(0.0, description="probability that a symbol is erased", ge=0, le=1)

    def channel(self) -> Channel:
        """SpoliaError where its parts do not fit each other."""
        burst = None if self.burst is None else Burst(**self.burst.model_dump())
        return Channel(**self.model_dump(exclude={"burst"}), burst=burst)

    @property
    def plain(self) -> bool:
        """Whether closed forms hold: Gaussian noise, or a known gain for every symbol."""
        return self in (Way(), Way(fading="rayleigh"))


def _way(value: Any) -> Any:
    if isinstance(value, str):
        if value not in WAYS:
            raise ValueError(f"no channel is called `{value}`; {did_you_mean(value, WAYS)}")
        return WAYS[value]
    return value


def _way_schema() -> dict[str, Any]:
    """A name, or a mapping whose parts are all written out: what stands inside another schema cannot refer."""
    shape = Way.model_json_schema()
    shape["properties"]["burst"]["anyOf"][0] = shape.pop("$defs")["Bursts"]
    return {"anyOf": [{"enum": list(WAYS)}, shape]}


Named = Annotated[Way, BeforeValidator(_way), WithJsonSchema(_way_schema())]
_PRIOR = "; ".join(["of the receiver: " + ", ".join(get_args(Model)), "or a folder of any causal language model"])


class LinkProblem(Shape):
    """What all problems say."""

    vocabulary: int = Field(
        512,
        description="byte pairs learned from the training part; 256: bytes; a model's folder brings its own",
        ge=256,
    )
    length: int | None = Field(24, description="tokens of a frame; null: a sentence is a frame", ge=4)
    context: int = Field(0, description="tokens before a frame that the receiver knows", ge=0)
    prior: Model | Path = Field("ngram", description=_PRIOR)
    compiled: bool = Field(False, description="compile the steps of a folder's model: quicker after a minute or two")
    order: int = Field(3, description="tokens that an n-gram spans", ge=1, le=8)
    width: int = Field(128, description="of tiny_lm", ge=4, multiple_of=4)
    depth: int = Field(3, description="layers of tiny_lm", ge=1)
    steps: int = Field(2000, description="training steps of tiny_lm", ge=1)
    labels: Literal["index", "permuted", "aware"] = Field(
        "permuted", description="bits of tokens: by number, at random, or chosen with the model"
    )
    check_bits: Literal[0, 6, 8, 11, 16, 24, 32] = Field(8, description="of a frame")
    interleave: bool = Field(False, description="send a frame's bits in a random order")
    channel: Named = Field(default_factory=Way, description=f"{', '.join(WAYS)}, or {{fading: …, block: …}}")
    modulation: Modulation = Field("bpsk", description="symbols")
    snr: list[float] = Field(default_factory=lambda: [0.0, 2.0, 4.0, 6.0], description="levels of noise, in dB")
    convention: Convention = Field("esn0", description="what `snr` counts")
    beside: list[Beside] = Field(
        default_factory=lambda: list(USUAL), description="schemes measured beside the recipe's"
    )
    beams: list[int] = Field(default_factory=list, description="further beams of llm_sc, a line each")
    errors: int = Field(100, description="wrong frames at which a point ends", ge=1)
    sentences: int = Field(300, description="frames of a point, at most", ge=2)
    batch: int = Field(32, description="frames sent at once", ge=1)
    embedding: Path | None = Field(None, description="folder of a text encoder that compares sent and read")
    small: bool = Field(False, description="networks trained here are cut down to what learns in seconds")
    device: Device = Field("cpu", description="where models run: cpu, cuda, or auto")

    @field_validator("snr")
    @classmethod
    def _some(cls, levels: list[float]) -> list[float]:
        if not levels or len(set(levels)) < len(levels) or not all(abs(db) <= 100 for db in levels):
            raise ValueError("give different levels from -100 to 100 dB")
        return sorted(levels)


class ProseLink(LinkProblem):
    """English that CPython carries: topics to learn from, others to send."""

    source: Literal["prose"] = Field("prose", description="the language reference of CPython, no download")
    length: int | None = Field(16, description="tokens of a frame", ge=4)
    snr: list[float] = Field(default_factory=lambda: [0.0, 2.0, 4.0, 6.0], description="levels of noise, in dB")
    sentences: int = Field(48, description="frames of a point, at most", ge=2)
    small: bool = Field(True, description="networks trained here are cut down to what learns in seconds")


class TextLink(LinkProblem):
    """Your own text, a sentence or paragraph a line."""

    source: Literal["text"] = Field(description="text files")
    files: list[Path] = Field(description="to learn from, UTF-8 or gzip of it", min_length=1)
    test: list[Path] = Field(default_factory=list, description="to send; left out: the last tenth of the lines")


class PackedLink(LinkProblem):
    """Sentences of Europarl, or articles of WikiText-2."""

    source: Literal["europarl", "wikitext2"] = Field(description="texts in the folder that SPOLIA_DATA names")
    folder: Path | None = Field(None, description="where the texts lie; by default the folder that SPOLIA_DATA names")
    vocabulary: int = Field(
        1024,
        description="byte pairs learned from the training part; 256: bytes; a model's folder brings its own",
        ge=256,
    )
    length: int | None = Field(None, description="tokens of a frame; null: a sentence is a frame", ge=4)


PROBLEMS: dict[str, type[LinkProblem]] = {
    "prose": ProseLink,
    "text": TextLink,
    "europarl": PackedLink,
    "wikitext2": PackedLink,
}


def texts_of(problem: LinkProblem, seed: int) -> Texts:
    """The three parts. Of Python's prose the seed says which topics are in which."""
    if isinstance(problem, TextLink):
        return file_texts(problem.files, problem.test)
    if isinstance(problem, PackedLink):
        return packed_texts(problem.source, problem.folder)
    return python_texts(seed)


def check_files(problem: LinkProblem, settings: Any) -> None:
    """SpoliaError where files or packages are missing; nothing is read."""
    from importlib.util import find_spec

    if isinstance(problem, PackedLink):
        packed_files(problem.source, problem.folder)
    elif isinstance(problem, TextLink):
        for file in (*problem.files, *problem.test):
            if not file.is_file():
                raise SpoliaError("is no file", where=f"problem.files {file}", mend="give text files")
    if isinstance(problem.prior, Path) and not (problem.prior / "config.json").is_file():
        known = did_you_mean(problem.prior.name, get_args(Model))
        mend = f"a folder of a causal model with its tokenizer, as transformers saves it; {known}"
        raise SpoliaError("is no folder of a model", where=f"problem.prior {problem.prior}", mend=mend)
    if problem.embedding is not None and not (problem.embedding / "config.json").is_file():
        mend = "a folder of a text encoder with its tokenizer, as transformers saves it"
        raise SpoliaError("is no folder of a model", where=f"problem.embedding {problem.embedding}", mend=mend)
    if problem.compiled and not isinstance(problem.prior, Path):
        what = f"{problem.prior} takes no steps that can be compiled"
        raise SpoliaError(what, where="problem.compiled", mend="leave it out, or give the folder of a causal model")
    theirs = isinstance(problem.prior, Path) or problem.embedding is not None
    needed = ["transformers"] if theirs else ["tokenizers"] if problem.vocabulary > 256 else []
    for package in needed:
        if find_spec(package) is None:
            mend = "pip install 'spolia[llm]', or send bytes: `vocabulary: 256`"
            raise SpoliaError(f"{package} is not installed", where="problem", mend=mend)
    if getattr(settings, "code", "") == "ldpc" and find_spec("sionna") is None:
        mend = "pip install 'spolia[comms]', or write `code: convolutional`"
        raise SpoliaError("sionna, whose code it is, is not installed", where="method.code", mend=mend)

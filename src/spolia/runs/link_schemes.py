"""The lines of a link's table: the recipe's receiver, and the others that send the same text in as many channel uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.modulation import BITS, constellation
from spolia.methods.link.deepsc import DeepSC, deepsc
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.methods.link.separate import HEADER, LMCompressor, Separate, TextCompressor, separate
from spolia.methods.link.source import Source, source_code
from spolia.parts.prior import UniformPrior
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import index_labels
from spolia.runs.link_frames import by_length, chosen, tokens_of

if TYPE_CHECKING:
    from spolia.core.journal import Journal
    from spolia.parts.link import Link
    from spolia.runs.link_ends import Ends
    from spolia.runs.link_problems import LinkProblem
    from spolia.runs.studies import StudyRecipe

SMALL = {"width": 32, "depth": 1, "heads": 4, "inner": 64, "steps": 300, "batch": 64}  # of deepsc; and its rate
_SMALL_LR = 3e-3
_TRIED = 200  # frames on which a constellation is chosen
_RATE = 0.75  # of a convolutional code, at most: beyond it little is left of its distance


@dataclass(frozen=True)
class Scheme:
    """One line. `kind` is one of what may stand beside a recipe, or `source`."""

    label: str
    kind: str
    settings: Any
    baseline: bool = True


def schemes_of(recipe: StudyRecipe) -> list[Scheme]:
    """Those beside, without what the recipe itself is; its own last."""
    problem: LinkProblem = recipe.problem
    name, settings = recipe.method.name, recipe.settings
    kind = settings.kind if name == "source" else name
    own = Scheme(kind, name, _cut_down(settings, problem.small), baseline=False)
    search = settings if name == "llm_sc" else LLMSC()
    known = {
        "no_model": Scheme("no model", "no_model", LLMSC(beam=1, metric=search.metric)),
        "published": Scheme("llm_sc as published", "published", search),
        "llm_sc": Scheme("llm_sc", "llm_sc", search),
        "separate": Scheme("separate", "separate", Separate()),
        "huffman": Scheme("huffman", "source", Source(kind="huffman")),
        "utf8": Scheme("utf8", "source", Source(kind="utf8")),
        "deepsc": Scheme("deepsc", "deepsc", _cut_down(DeepSC(), problem.small)),
    }
    beside = [known[other] for other in dict.fromkeys(problem.beside) if other != kind]
    beams = [
        Scheme(f"llm_sc, beam {b}", "llm_sc", search.model_copy(update={"beam": b, "search": "beam"}), name != "llm_sc")
        for b in problem.beams
        if b != search.beam
    ]
    return [*beside, *beams, own]


def _cut_down(settings: Any, small: bool) -> Any:
    """DeepSC that learns in seconds; others as they are."""
    if not small or not isinstance(settings, DeepSC):
        return settings
    sizes = {name: min(most, getattr(settings, name)) for name, most in SMALL.items()}
    return settings.model_copy(update={**sizes, "lr": max(settings.lr, _SMALL_LR)})


def link_of(scheme: Scheme, ends: Ends, recipe: StudyRecipe, seed: int, journal: Journal) -> Link:
    """The link of a line, trained where it learns."""
    code, c, s = ends.code, ends.constellation, scheme.settings
    match scheme.kind:
        case "no_model":
            return llm_sc(UniformPrior(ends.prior.vocabulary, code.labels.codes.device), code, c, s)
        case "published":
            labels = index_labels(ends.prior.vocabulary).to(code.labels.codes.device)
            plain = TextCode(ends.tokenizer, labels, 0, interleave=code.interleave, align=code.align)
            return llm_sc(ends.prior, plain, c, s)
        case "llm_sc":
            return llm_sc(ends.prior, code, c, s)
        case "separate":
            return separate(LMCompressor(ends.prior), c, ends.uses, s)
        case "source":
            return classical(s, ends)
        case _:
            return _learned(scheme, ends, recipe, seed, journal)


def classical(settings: Source, ends: Ends) -> Link:
    """Characters, and a convolutional code; of the constellations that hold the frames the one of fewest bits."""
    codec = TextCompressor(source_code(settings, ends.texts.train), ends.tokenizer)
    tried, check = chosen(ends.design, _TRIED, 0, "constellation"), Separate().check_bits
    needed = [(len(codec.compress(f.tokens)) + check, ends.uses(len(f.tokens))) for f in tried]
    larger = [name for name, bits in BITS.items() if bits >= ends.constellation.bits]

    def share(name: str) -> float:
        return sum(need <= _RATE * (uses * BITS[name] - HEADER) for need, uses in needed) / len(needed)

    name = next((name for name in larger if share(name) >= 0.99), larger[-1])
    return separate(codec, constellation(name, device=ends.constellation.points.device), ends.uses)


def _learned(scheme: Scheme, ends: Ends, recipe: StudyRecipe, seed: int, journal: Journal) -> Link:
    """DeepSC; beside another scheme it takes as many channel uses a token, in the mean."""
    settings, frames = scheme.settings, ends.train
    if scheme.baseline:
        tokens = sum(len(frame.tokens) for frame in ends.test)
        uses = sum(ends.uses(len(frame.tokens)) for frame in ends.test)
        settings = settings.model_copy(update={"uses": max(1, round(uses / tokens))})
    groups = [tokens_of(own).to(recipe.problem.device) for own in by_length(frames).values()]
    with journal.phase(f"seed {seed} train"):
        return deepsc(groups, ends.prior.vocabulary, ends.channel, settings, journal, seed)

"""A pool of real language models: stories260k (llama2.c) as the base, and one fine-tune of it for each of three texts.

    europarl    speeches, lower case, no punctuation     trained on the train file, tested on the test file
    wikitext    WikiText-2, articles                     trained on the valid file, tested on the test file
    topics      the language reference of CPython        split by topic; a paragraph that two topics share stays in one

A slice of each training text is kept back as validation. All texts are cut into tokens by the base's tokenizer, `<unk>`
of WikiText as plain characters. Models are folders that transformers opens.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spolia.bench.language import Likelihood, likelihood
from spolia.core.seeds import entropy

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = ("europarl", "wikitext", "topics")
CONTEXT = 128  # tokens, in training and in testing; the model could take 512
SIZES = {"validation": 5_000, "test": 12_000}  # characters of each text, in stretches spread over the whole part
STRETCHES = 12
KEPT_BACK = {"europarl": 1000, "wikitext": 6, "topics": 8}  # sentences, articles and topics for validation
TEST_TOPICS = 8


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning: AdamW in fp32 at a constant rate after a linear warm-up, gradients cut to length 1."""

    lr: float = 1e-3
    steps: int = 100
    batch: int = 16  # windows of CONTEXT tokens
    warmup: int = 10  # steps
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Parts:
    """The three parts of one text, which share no sentence, article or paragraph."""

    train: str
    validation: str
    test: str


def read_texts(data: Path) -> dict[str, Parts]:
    """Every text's parts, from the folder SPOLIA_DATA and from Python itself."""
    sentences = _lines(data / "sent_europarl_en_train.txt.gz")
    kept = KEPT_BACK["europarl"]
    europarl = Parts("".join(sentences[:-kept]), "".join(sentences[-kept:]), "".join(_lines(data / _EUROPARL_TEST)))
    articles = re.split(r"(?m)^(?= = [^=\n]+ = $)", "".join(_lines(data / "lm_wikitext2_valid.txt.gz")))
    kept = KEPT_BACK["wikitext"]
    wikitext = Parts(
        "".join(articles[:-kept]), "".join(articles[-kept:]), "".join(_lines(data / "lm_wikitext2_test.txt.gz"))
    )
    return {"europarl": europarl, "wikitext": wikitext, "topics": _topics()}


_EUROPARL_TEST = "sent_europarl_en_test.txt.gz"


def _lines(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return list(stream)


def _topics() -> Parts:
    """Pages of the reference hold each other's sections: a paragraph stays in the first topic by name that has it."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    pages: dict[str, str] = {}
    for name in sorted(topics):
        own = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            plain = " ".join(paragraph.split())
            if plain and plain not in seen:
                seen.add(plain)
                own.append(paragraph)
        if own:
            pages[name] = "\n\n".join(own) + "\n\n"
    order = sorted(pages, key=lambda name: entropy(0, "topics", name))
    test, validation = order[:TEST_TOPICS], order[TEST_TOPICS : TEST_TOPICS + KEPT_BACK["topics"]]
    train = order[TEST_TOPICS + KEPT_BACK["topics"] :]
    return Parts(*("".join(pages[name] for name in part) for part in (train, validation, test)))


def spread(text: str, size: int) -> str:
    """About `size` characters of `text`, in stretches at even distances that begin with a line and end with a word."""
    return "".join(text[start:stop] + "\n" for start, stop in _stretches(text, size)) if len(text) > size else text


def left(text: str, size: int) -> str:
    """What `spread` leaves of `text`."""
    if len(text) <= size:
        return ""
    found = _stretches(text, size)
    ends = [0, *(stop for _, stop in found)]
    return "".join(
        text[end:start] for end, start in zip(ends, [*(start for start, _ in found), len(text)], strict=True)
    )


def _stretches(text: str, size: int) -> list[tuple[int, int]]:
    found, stop = [], 0
    for stretch in range(STRETCHES):
        start = text.find("\n", stretch * len(text) // STRETCHES - 1) + 1 if stretch else 0
        start = max(start, stop)
        gap = _GAP.search(text, start + size // STRETCHES)
        stop = gap.start() if gap else len(text)
        found.append((start, stop))
    return found


_GAP = re.compile(r"\s")


@dataclass
class LanguagePool:
    """Base and experts of one seed, and the texts they are judged on."""

    data: Path
    folder: Path
    seed: int

    @property
    def base(self) -> Path:
        return self.data / "stories260k"

    @property
    def experts(self) -> dict[str, Path]:
        return {text: self.folder / text for text in TEXTS}

    @cached_property
    def texts(self) -> dict[str, Parts]:
        return read_texts(self.data)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base, model_max_length=10**9)

    @cached_property
    def _scratch(self) -> Any:
        return new_model(self.base)

    @cached_property
    def _judged(self) -> dict[tuple[str, str], tuple[Tensor, int]]:
        """(part, text) -> tokens and bytes."""
        found = {}
        for name, parts in self.texts.items():
            for part, size in SIZES.items():
                text = spread(getattr(parts, part), size)
                found[part, name] = (self.tokens(text), len(text.encode()))
        return found

    def tokens(self, text: str) -> Tensor:
        """[n]: the beginning-of-text token, then the text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return torch.tensor([self.tokenizer.bos_token_id, *ids])

    def windows(self, text: str, count: int) -> Tensor:
        """[count, CONTEXT]: windows at even distances from what choosing by validation does not look at."""
        tokens = self.tokens(left(self.texts[text].validation, SIZES["validation"]))[1:]
        whole = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        assert len(whole) >= count, f"{text} has {len(whole)} windows left"
        return whole[torch.arange(count) * len(whole) // count]

    def judge(self, state: Mapping[str, Tensor], part: str, texts: tuple[str, ...] = TEXTS) -> dict[str, Likelihood]:
        """How likely the model with weights `state` finds each text's `part` (validation or test)."""
        model = self._scratch
        missing, unknown = model.load_state_dict(dict(state), strict=False)
        assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)  # the head is the embedding
        return {text: self.hear(model, text, part) for text in texts}

    def hear(self, outputs: Callable[[Tensor], Any], text: str, part: str) -> Likelihood:
        """How likely `outputs`, ids [windows, CONTEXT] to logits, finds one text's `part`."""
        tokens, size = self._judged[part, text]
        return likelihood(outputs, tokens, context=CONTEXT, size=size)


def new_model(folder: Path) -> Any:
    """The model of a folder, in fp32, ready to be judged."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def make_pool(data: Path, folder: Path, seed: int, recipe: Recipe, say: Callable[[str], None]) -> LanguagePool:
    """Trains the experts that `folder` lacks. The same seed, recipe and versions give the same weights."""
    pool = LanguagePool(data, folder, seed)
    for text, target in pool.experts.items():
        if target.is_dir():
            continue
        say(f"seed {seed}: fine-tune on {text}, {recipe.steps} steps")
        for _, model in fit(pool, text, recipe, (recipe.steps,)):
            write(model, pool.base, target)
    return pool


def fit(pool: LanguagePool, text: str, recipe: Recipe, snapshots: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
    """Fine-tunes the base on `text` and gives (step, model) at each of `snapshots`, the last of which ends it."""
    model = new_model(pool.base).train()
    stream = pool.tokens(pool.texts[text].train)
    draws = torch.Generator().manual_seed(entropy(pool.seed, "language pool", text) % 2**63)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    for step in range(1, snapshots[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / recipe.warmup)
        starts = torch.randint(len(stream) - CONTEXT, (recipe.batch,), generator=draws)
        windows = torch.stack([stream[start : start + CONTEXT + 1] for start in starts.tolist()])
        logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in snapshots:
            model.eval()
            yield step, model
            model.train()


def write(model: Any, base: Path, target: Path) -> None:
    """A model folder with the base's tokenizer; it gets its name when it is whole."""
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    model.save_pretrained(staging)
    for file in base.glob("tokenizer*"):
        shutil.copyfile(file, staging / file.name)
    staging.rename(target)


def settings(recipe: Recipe) -> dict[str, Any]:
    """What the scores depend on, for a work folder to remember."""
    return {"recipe": asdict(recipe), "context": CONTEXT, "sizes": SIZES, "kept back": KEPT_BACK, "texts": list(TEXTS)}


def data_touched(recipe: Recipe) -> dict[str, str]:
    """What each phase of a study of this pool sees, for its ledger."""
    kept, windows = KEPT_BACK, recipe.steps * recipe.batch
    return {
        "base": "stories (TinyStories), by others",
        "experts": f"{windows} windows of {CONTEXT} tokens drawn from the expert's own text: europarl, the train file;"
        " wikitext, the valid file of WikiText-2; topics, pages of pydoc_data.topics",
        "recipe of fine-tuning": "larger slices of the same validation texts, for seed 0, in windows of 256 tokens",
        "merge": "weights only",
        "choice of scale and threshold": f"about {SIZES['validation']} characters of each validation text, spread over"
        f" {kept['europarl']} sentences, {kept['wikitext']} articles and {kept['topics']} topics kept back",
        "test": f"about {SIZES['test']} characters of each test text that nothing before had seen: the test files,"
        f" and {TEST_TOPICS} other topics",
    }

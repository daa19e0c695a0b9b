"""The text side of fscil.py: CLINC150 in sessions, word pieces, and a small BERT trained on base intents and other prose."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spolia.core.journal import Journal
from spolia.core.seeds import entropy, generator
from spolia.parts.stream import Stream, class_incremental

FILE = "cls_clinc150.tsv.gz"
GENERAL = ("sent_europarl_en_train.txt.gz", "lm_wikitext2_valid.txt.gz")  # prose without intents
PAD, START, MASK, UNKNOWN = range(4)
PIECES, TOKENS = 4000, 20  # word pieces of the vocabulary; of a sentence, with the first
LAYERS, WIDTH, HEADS = 4, 128, 4
BATCH, LR, DECAY, WARM, HIDDEN = 64, 5e-4, 0.01, 0.1, 0.15  # AdamW; HIDDEN: share of words to be guessed


@dataclass(frozen=True)
class Sentences:
    """`stream`: ids [n, TOKENS]. `prose`: ids of sentences without labels, the base session's among them."""

    stream: Stream
    prose: Tensor
    vocabulary: int


def show(ids: Tensor) -> dict[str, Tensor]:
    """Ids as the encoder takes them."""
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def sentences(data: Path, sizes: list[int], shots: int, split: int, seed: int) -> Sentences:
    """CLINC150 in sessions of `sizes` intents: their order is `split`'s, the shots `seed`'s. Word pieces are those of base
    and prose alone."""
    rows = [line.split("\t") for line in gzip.decompress((data / FILE).read_bytes()).decode().splitlines()[1:]]
    labels = sorted({row[2] for row in rows})
    order = [int(i) for i in generator(split, "fscil", "intents").permutation(len(labels))]
    base = {labels[i] for i in order[: sizes[0]]}
    parts = {name: [(row[3], labels.index(row[2])) for row in rows if row[0] == name] for name in ("train", "test")}
    known = [row[3] for row in rows if row[0] == "train" and row[2] in base]
    prose = [line for name in GENERAL for line in gzip.decompress((data / name).read_bytes()).decode().splitlines()]
    prose = [" ".join(line.lower().split()[:20]) for line in prose if len(line.split()) > 3]
    pieces = vocabulary(known + prose)
    train, test = (
        (cut(pieces, [text for text, _ in part]), torch.tensor([label for _, label in part])) for part in parts.values()
    )
    stream = class_incremental(train, test, sizes, order=order, shots=shots, seed=seed)
    return Sentences(stream, cut(pieces, known + prose), pieces.get_vocab_size())


def vocabulary(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[START]", "[MASK]", "[UNK]"]
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special, show_progress=False)
    )
    return made


def cut(pieces: Any, texts: list[str]) -> Tensor:
    """Ids [n, TOKENS]: the start, the pieces that fit, padding."""
    ids = torch.full((len(texts), TOKENS), PAD)
    for i, found in enumerate(pieces.encode_batch(texts)):
        own = [START, *found.ids[: TOKENS - 1]]
        ids[i, : len(own)] = torch.tensor(own)
    return ids


def bert(words: int, seed: int) -> Any:
    """A small BERT, its start drawn from the seed."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = BertConfig(
        vocab_size=words,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(entropy(seed, "fscil", "bert") % 2**63)
        return BertModel(config, add_pooling_layer=False)


def pretrain(module: Any, held: Sentences, classes: int, steps: int, seed: int, journal: Journal) -> None:
    """In turn: base intents told apart by the first token, and hidden words of prose guessed."""
    device = next(module.parameters()).device
    start = generator(seed, "fscil", "intent head").standard_normal((classes, WIDTH), dtype="float32")
    head = torch.nn.Parameter(torch.from_numpy(start / math.sqrt(WIDTH)).to(device))
    optimizer = torch.optim.AdamW([*module.parameters(), head], lr=LR, weight_decay=DECAY)
    keep, base = {"module": module, "head": head, "optimizer": optimizer}, held.stream.experiences[0].train
    words = module.get_input_embeddings().weight
    for step in journal.steps(steps, None if journal.folder is None else keep):
        share, draws = (step + 1) / steps, generator(seed, "fscil", "prose", step)
        fall = (1 + math.cos(math.pi * max(0.0, share - WARM) / (1 - WARM))) / 2
        optimizer.param_groups[0]["lr"] = LR * min(1.0, share / WARM) * fall
        if step % 2:
            batch = base.batch(draws.choice(len(base), BATCH, replace=False))
            first = module(**show(batch.x.to(device))).last_hidden_state[:, 0]
            loss = functional.cross_entropy(first @ head.T, batch.y.to(device))
        else:
            ids = held.prose[torch.from_numpy(draws.choice(len(held.prose), BATCH, replace=False))]
            hidden = torch.from_numpy(draws.random(tuple(ids.shape)) < HIDDEN) & (ids > UNKNOWN)
            shown = ids.masked_fill(hidden, MASK).to(device)
            states = module(**show(shown)).last_hidden_state[hidden.to(device)]
            loss = functional.cross_entropy(states @ words.T / math.sqrt(WIDTH), ids[hidden].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            journal.log(loss=loss.detach())

"""A frame read by a language model: this package's search beside transformers' own beams, and a loop without a cache.

    python benchmarks/link.py                    rows a: 4 layers of 256, 4000 tokens, 32 places; about nine minutes
    python benchmarks/link.py --large            rows b too: 12 layers of 768, 50257 tokens, 64 places, 8 beams; ten more
    python benchmarks/link.py --json FILE        where the results go; by default docs/results/link_speed.json

One process, one thread, ways in turn; first it is seen that all read the same text. Milliseconds a frame are of the processor,
medians. Weights are random but large, so that the model is sure of something; noise is at 2 dB. The model's steps alone, with
transformers' own cache and no search, are the floor of all ways that run the model as it is; `compiled` takes its steps as
torch compiles them, which a first run pays for. TinyLM is the same network as GPT-2 of that size, with a cache of this
package's own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.methods.link.beam import Width, beam
from spolia.methods.link.processor import ChannelProcessor
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.channel import Channel
from spolia.parts.textcode_labels import permuted_labels
from spolia.zoo.tiny_lm import TinyLM

SMALL, LARGE = (4, 256, 4, 4000, 32), (12, 768, 12, 50257, 64)  # layers, width, heads, tokens, places
BEAMS, FRAMES = (4, 8, 32), (1, 2, 8, 16)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--large", action="store_true")
    options.add_argument("--quick", action="store_true", help="one repeat of 4 beams")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    repeats = 1 if asked.quick else asked.repeats
    rows = beams_of("a", SMALL, (4,) if asked.quick else BEAMS, repeats, naive=True)
    if not asked.quick:
        rows += batches_of("a", SMALL, repeats) + own_cache("a", SMALL, repeats)
    if asked.large:
        rows += beams_of("b", LARGE, (8,), min(repeats, 3), naive=False)
    path = asked.json or (None if asked.quick else measure.REPOSITORY / "docs/results/link_speed.json")
    if path is not None:
        ledger = {
            "name": "link_speed", "average": False,
            "command": "python benchmarks/link.py" + (" --large" if asked.large else ""),
            "commit": measure.commit(), "date": datetime.date.today().isoformat(), "machine": measure.machine(),
            "versions": measure.versions(sys.executable, ["spolia", "torch", "transformers"]),
            "data": {"all": "random weights and random tokens, made in memory"}, "seeds": [0], "rows": rows,
            "notes": "One thread. Medians of whole frames; low and high are the fastest and the slowest.",
        }  # fmt: skip
        path.write_text(json.dumps(ledger, indent=1) + "\n")


def gpt2(shape: tuple[int, ...]) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, tokens, places = shape
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokens,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=places + 1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    return model


def heard_of(tokens: int, places: int, frames: int) -> torch.Tensor:
    """Scores of all tokens [frames, places, tokens], of random ones sent in random labels at 2 dB."""
    labels, bpsk = permuted_labels(tokens, generator(0, "labels")), constellation("bpsk")
    sent = torch.from_numpy(generator(0, "text").integers(0, tokens, (frames, places)))
    symbols = bpsk.points[labels.bits[sent].long().flatten(1)]
    llrs = Channel().transmit(symbols, n0_of(2.0), generator(0, "noise")).llrs(bpsk).float()
    return labels.scores(llrs.unflatten(1, (places, labels.width)))


def beams_of(
    row: str, shape: tuple[int, ...], beams: tuple[int, ...], repeats: int, *, naive: bool
) -> list[dict[str, Any]]:
    """One frame: ours, `generate` alone, `generate` with the channel, and every hypothesis read anew."""
    model, (*_, tokens, places) = gpt2(shape), shape
    prior, again = CausalPrior(model, start=[0]), CausalPrior(Uncached(model).eval(), tokens=range(tokens), start=[0])
    compiled = CausalPrior(model, start=[0], compiled=True)
    scores, start = heard_of(tokens, places, 1), torch.zeros(1, 1, dtype=torch.long)
    processor = ChannelProcessor(scores, prompt=1)
    told = {"attention_mask": torch.ones_like(start), "pad_token_id": 1, **processor.arguments}
    found = []
    for count in beams:
        width = Width(count)
        ways: dict[str, Callable[[], Any]] = {
            "spolia": lambda width=width: beam(lambda t: scores[:, t], places, prior, [()], 1.0, width).tokens[0, 0],
            "spolia, compiled": lambda width=width: beam(
                lambda t: scores[:, t], places, compiled, [()], 1.0, width
            ).tokens[0, 0],
            "generate": lambda count=count: model.generate(start, num_beams=count, **told),
            "generate with the channel": lambda count=count: model.generate(
                start, num_beams=count, logits_processor=[processor], **told
            )[0, 1:],
        }
        if naive:
            ways["without a cache"] = lambda width=width: beam(
                lambda t: scores[:, t], places, again, [()], 1.0, width
            ).tokens[0, 0]
        read = {}
        for way, run in ways.items():
            begun = time.perf_counter()
            if way != "generate":  # which does not know the channel
                read[way] = run()
            if way == "spolia, compiled":
                print(f"{row}: {count} beams, compiled within {time.perf_counter() - begun:.0f} s", flush=True)
        assert all(torch.equal(read["spolia"], other) for other in read.values()), "the ways read different texts"
        ways["the model's steps alone"] = lambda count=count: steps_alone(model, count, places)
        found += told_rows(f"{row}: {count} beams", timed(ways, repeats), places)
    return found


def steps_alone(model: Any, rows: int, places: int) -> None:
    """What no search can do without: a step a place, of so many rows, with transformers' own cache."""
    cache, ids = None, torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(places):
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def batches_of(row: str, shape: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Several frames at once, 8 beams: milliseconds a frame."""
    model, (*_, tokens, places) = gpt2(shape), shape
    prior, found = CausalPrior(model, start=[0]), []
    for frames in FRAMES:
        scores = heard_of(tokens, places, frames)
        run = lambda s=scores, n=frames: beam(lambda t: s[:, t], places, prior, [()] * n, 1.0, Width(8))  # noqa: E731
        seconds = {way: [one / frames for one in all_] for way, all_ in timed({"spolia": run}, repeats).items()}
        found += told_rows(f"{row}: 8 beams, {frames} frames at once", seconds, places)
    return found


def own_cache(row: str, shape: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """TinyLM, whose cache is set aside once, beside itself read anew."""
    layers, width, heads, tokens, places = shape
    model = TinyLM(tokens, places + 1, width, layers, heads, generator=torch.Generator().manual_seed(0)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    prior, again = CausalPrior(model, start=[0]), CausalPrior(Uncached(model).eval(), tokens=range(tokens), start=[0])
    scores, found = heard_of(tokens, places, 1), []
    for count in BEAMS:
        ways: dict[str, Callable[[], Any]] = {
            way: lambda own=own, count=count: beam(lambda t: scores[:, t], places, own, [()], 1.0, Width(count)).tokens
            for way, own in (("spolia, TinyLM", prior), ("without a cache, TinyLM", again))
        }
        first, other = (run() for run in ways.values())
        assert torch.equal(first[0, 0], other[0, 0]), "the ways read different texts"
        found += told_rows(f"{row}: {count} beams", timed(ways, repeats), places)
    return found


class Uncached(torch.nn.Module):
    """A module of ids to logits and nothing else; of the last place alone, as a careful loop would have it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.vocabulary = model, 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, TinyLM):
            return self.model(ids)
        last = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return last.expand(-1, ids.shape[1], -1)  # only the last is looked at


def timed(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each way, in turn, after one run that does not count."""
    for run in ways.values():
        run()
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.process_time()
            run()
            found[way].append(time.process_time() - start)
    return found


def told_rows(task: str, seconds: dict[str, list[float]], places: int) -> list[dict[str, Any]]:
    rows = []
    for way, values in seconds.items():
        middle = statistics.median(values)
        row = {"method": way, "task": task, "metric": "processor time a frame", "unit": "ms", "mean": 1e3 * middle}
        row |= {"low": 1e3 * min(values), "high": 1e3 * max(values), "n": len(values)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{task:32} {way:28} {1e3 * middle:9.1f} ms  {places / middle:8.1f} tokens/s  {peak:6.0f} MB", flush=True)
        rows.append(row if way.startswith("spolia") else row | {"baseline": True})
    return rows


if __name__ == "__main__":
    main()

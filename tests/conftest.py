"""What tests share: tiny real checkpoints made on the spot, and plain safetensors folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
_PATIENT = {"derandomize": True, "deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("house", **_PATIENT)  # a red run can be made again; a slow machine is no failure
hypothesis.settings.register_profile("quick", max_examples=25, **_PATIENT)  # of `make check`
hypothesis.settings.load_profile("house")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes fill the cores: more threads only wait for each other

LINES = (
    "The stones of an old wall hold up a new one.",
    "A mason who reuses a column does not ask who carved it.",
    "What is left of the temple stands in the town hall, upside down and useful.",
    "0 1 2 3 4 5 6 7 8 9 - and so on, until the quarry is empty.",
)
Pool = tuple[Path, list[Path]]
MANY = 4  # cases
HOUSE = ("test_floors.py", "test_docs.py", "test_ledger.py", "test_catalog.py", "test_cli.py")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sampled(n)` the first, and every n-th after it, are fast; the others are slow.

    Where a test has more than MANY cases, every fifth is taken so, but for the tests of the house itself.
    """
    cases = Counter(item.nodeid.partition("[")[0] for item in items)
    seen: Counter[str] = Counter()
    for item in items:
        mark, test = item.get_closest_marker("sampled"), item.nodeid.partition("[")[0]
        alike = cases[test] > MANY and Path(test.partition("::")[0]).name not in HOUSE
        every = mark.args[0] if mark is not None else 5 if alike else 1
        if seen[test] % every:
            item.add_marker("slow")
        seen[test] += 1


def tiny_tokenizer(folder: Path) -> int:
    """Save a byte-level BPE tokenizer trained on LINES; the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return bpe.get_vocab_size()


def tiny_model(kind: str, tied: bool, vocabulary: int) -> Any:
    """A randomly initialised model of the kind, 18 to 170 thousand parameters, in float32."""
    import transformers as hf

    if kind == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=vocabulary,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    if kind == "bert":
        return hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=64,
                num_labels=3,
            )
        )
    if kind == "vit":
        return hf.ViTForImageClassification(
            hf.ViTConfig(
                image_size=8,
                patch_size=4,
                num_channels=1,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                num_labels=3,
            )
        )
    raise ValueError(f"no tiny model is called {kind!r}")


@pytest.fixture(scope="session")
def make_pool() -> Callable[..., Pool]:
    """make_pool(kind, count, folder, dtype, max_shard_size, seed, tied) -> (base folder, expert folders).

    Real checkpoints saved with save_pretrained: kind is llama, gpt2, bert or vit. An expert is the base plus normal
    noise on every parameter, so no two changes are equal in float32. Llama folders hold a tokenizer too. `spread` is
    the noise's standard deviation. The same arguments write the same weights.
    """

    def make(
        kind: str,
        count: int,
        folder: Path,
        dtype: str = "float32",
        max_shard_size: str = "30KB",
        seed: int = 0,
        tied: bool | None = None,
        spread: float = 0.02,
    ) -> Pool:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "base", *(folder / f"expert-{k + 1}" for k in range(count))]
        vocabulary = 120
        if kind == "llama":
            for path in paths:
                vocabulary = tiny_tokenizer(path)
        with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
            torch.manual_seed(seed)
            model = tiny_model(kind, tied if tied is not None else kind == "gpt2", vocabulary).to(getattr(torch, dtype))
        start = [p.detach().clone() for p in model.parameters()]
        for k, path in enumerate(paths):
            noise = torch.Generator().manual_seed(1000 * seed + k)
            for parameter, origin in zip(model.parameters(), start, strict=True):
                change = torch.randn(origin.shape, generator=noise) * (spread if k else 0.0)
                parameter.data = (origin.float() + change).to(origin.dtype)
            model.save_pretrained(path, max_shard_size=max_shard_size)
        return paths[0], paths[1:]

    return make


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """write_model(folder, tensors, config) -> folder: one plain model.safetensors, without the code under test.

    `tensors` maps names to torch tensors. `shards` splits them, in order, into that many files with an index.
    """

    def write(
        folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None, shards: int = 1
    ) -> Path:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        items = [(name, tensor.contiguous()) for name, tensor in tensors.items()]
        if shards == 1:
            save_file(dict(items), folder / "model.safetensors", {"format": "pt"})
        else:
            files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
            places = {name: files[i * shards // len(items)] for i, (name, _) in enumerate(items)}
            for file in files:
                save_file({name: t for name, t in items if places[name] == file}, folder / file, {"format": "pt"})
            size = sum(t.numel() * t.element_size() for _, t in items)
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(dict(config)))
        return folder

    return write


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """write_adapter(folder, tensors, **config) -> folder: a LoRA adapter as peft saves it, without peft.

    `tensors` maps names without the prefix `base_model.model.` to torch tensors; r and lora_alpha are 2 and 4 unless said.
    """

    def write(folder: Path, tensors: Mapping[str, Any], pickled: bool = False, **config: Any) -> Path:
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        if pickled:
            torch.save(named, folder / "adapter_model.bin")
        else:
            save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None} | config
        (folder / "adapter_config.json").write_text(json.dumps(told))
        return folder

    return write


@pytest.fixture(scope="session")
def digit_pool(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """digit_pool(domains, seed) -> DigitExperts, trained once in a session. Not to be changed."""
    root = tmp_path_factory.mktemp("digits")

    def digit_pool(domains: Sequence[str], seed: int) -> Any:
        from spolia.core.journal import Journal
        from spolia.runs.digits_pool import make_pool

        return make_pool(root / "-".join(domains) / str(seed), domains, seed, Journal())

    return digit_pool


@pytest.fixture(scope="session")
def ready_pools(digit_pool: Callable[..., Any]) -> Callable[[], Any]:
    """Inside `with ready_pools():` runs find their digit experts trained: copies of `digit_pool`'s, of equal bits."""

    @contextmanager
    def ready_pools() -> Iterator[None]:
        from spolia.runs import digits_study, surgery_study
        from spolia.runs.digits_pool import DigitExperts

        def copied(folder: Path, domains: Sequence[str], seed: int, journal: Any) -> DigitExperts:
            shutil.copytree(digit_pool(domains, seed).folder, folder, dirs_exist_ok=True)
            return DigitExperts(folder, tuple(domains), seed)

        with pytest.MonkeyPatch.context() as patch:
            for study in (digits_study, surgery_study):
                patch.setattr(study, "make_pool", copied)
            yield

    return ready_pools


# Imports torch and the merge once; every line asks for a fork of it, or how one ended. No thread runs before a fork.
WARM = """
import json, os, sys
import torch, spolia.runs.merging, spolia.runs.verbs
for line in sys.stdin:
    asked = json.loads(line)
    if "pid" in asked:
        pid, status = os.waitpid(asked["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for stream, place in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), stream)
    os.environ.update(asked["env"])
    sys.argv[1:] = asked["words"]
    break
else:
    sys.exit()
exec(compile(asked["code"], "<fork>", "exec"), {"__name__": "__main__"})
"""


class Child:
    """A forked process, to be used as subprocess.Popen is; what it said lies in two files."""

    def __init__(self, server: subprocess.Popen[str], pid: int, out: Path, err: Path):
        self._server, self.pid, self._said = server, pid, (out, err)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self._server, pid=self.pid)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What it said on stdout and stderr, once it has ended; after `timeout` seconds it is killed."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        out, err = (file.read_text(encoding="utf-8") for file in self._said)
        return out, err


def ask(server: subprocess.Popen[str], **asked: Any) -> Any:
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(asked), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Child]]:
    """fork(code, *words, **env) -> Child: `code` in a process of its own, as `python -c code words` would run it.

    Torch and spolia are imported already, which takes a fresh process two seconds. Not for what is to be shown of the
    start itself: hash seeds, imports.
    """
    pipe, folder = subprocess.PIPE, tmp_path_factory.mktemp("said")
    count = 0
    with subprocess.Popen([sys.executable, "-c", WARM], stdin=pipe, stdout=pipe, text=True) as server:

        def fork(code: str, *words: object, **env: str) -> Child:
            nonlocal count
            count += 1
            out, err = folder / f"{count}.out", folder / f"{count}.err"
            pid = ask(server, code=code, words=[str(w) for w in words], env=env, out=str(out), err=str(err))
            return Child(server, pid, out, err)

        yield fork


LISTING = """
import sys
seen = []
reading = ("open", "os.listdir", "os.scandir")
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in reading else None)
from spolia.cli import main
try:
    main(["sweep", sys.argv[1], "--list"])
except SystemExit as end:
    assert not end.code, end.code
heavy = [n for n in ("torch", "numpy", "rich", "yaml", "optuna", "ray", "submitit") if n in sys.modules]
inside = {name for name in seen if name.startswith(sys.argv[1])}
sys.exit(f"{heavy} {inside}" if heavy or len(inside) > 2 else 0)
"""


@pytest.fixture
def listed_lightly() -> Callable[[Path], str]:
    """What `spolia sweep FOLDER --list` prints; it must import nothing heavy and look at no more than two places inside."""

    def call(folder: Path) -> str:
        done = subprocess.run([sys.executable, "-c", LISTING, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call

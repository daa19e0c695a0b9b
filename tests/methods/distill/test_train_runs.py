"""Distilling as it is run: killed and taken up, on two processes, on another library's models, and on real digits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.data.digits import digits
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.train import Training, distill
from spolia.parts.teacher import cached

pytestmark = pytest.mark.slow


def net(seed: int, hidden: int, inputs: int = 5, classes: int = 4, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))


def learn(folder: Path | None, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(41, 5, generator=draws), torch.randint(0, 4, (41,), generator=draws)
    y[::6] = -100
    facts: dict[str, Any] = {}
    given = {"steps": 30, "batch": 9, "lr": 0.1, "ema": 0.9, "check_every": 7} | more
    dropout = given.pop("dropout", 0.0)
    made = distill(
        net(0, 8, dropout=dropout), net(1, 16), (x, y), Training(**given),
        validation=(x[:13], y[:13]), journal=folder, facts=facts,
    )  # fmt: skip
    return made, facts


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


DYING = """
import os, signal, sys
from pathlib import Path
from spolia import Journal
sys.path.insert(0, sys.argv[1])
import test_train_runs as module

class Dying(Journal):
    def steps(self, n, keep=None, *, shared=False):
        for step in super().steps(n, keep):
            if step == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            yield step

module.learn(Dying(Path(sys.argv[2]), save_every=0.0), dropout=0.5)
"""


def test_killed_and_run_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING, str(Path(__file__).parent), str(tmp_path / "run")]
    assert subprocess.run(command, timeout=110, check=False).returncode == -9
    again, told = learn(tmp_path / "run", dropout=0.5)
    whole, facts = learn(None, dropout=0.5)
    assert same(again, whole) and told == facts


# --- two processes ---------------------------------------------------------------------------------------------------

RANK = """
import json, os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_train_runs as module
rank = os.environ["RANK"]
for name, more in module.SHARED.items():
    made, facts = module.learn(Path(sys.argv[2]) / name, **more)
    torch.save(made.state_dict(), Path(sys.argv[2]) / f"{name}-{rank}.pt")
    (Path(sys.argv[2]) / f"{name}-{rank}.json").write_text(json.dumps(facts))
"""
SHARED: dict[str, dict[str, Any]] = {"plain": {}, "parts": {"micro_batch": 2, "accumulate": 2}}


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", RANK, str(Path(__file__).parent), str(tmp_path)]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(r)}, stderr=subprocess.PIPE) for r in range(2)
    ]
    said = [process.communicate(timeout=110)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    for run, more in SHARED.items():
        states = [torch.load(tmp_path / f"{run}-{r}.pt", weights_only=True) for r in range(2)]
        found = [json.loads((tmp_path / f"{run}-{r}.json").read_text()) for r in range(2)]
        assert found[0] == found[1] and found[0]["processes"] == 2
        alone, facts = learn(None, **more)
        for name, tensor in alone.state_dict().items():
            assert torch.equal(states[0][name], states[1][name])
            # 30 steps of fp32 sums in another order
            torch.testing.assert_close(states[0][name], tensor, rtol=0, atol=1e-5)
        assert found[0]["best"]["accuracy"] == facts["best"]["accuracy"]
        steps = [json.loads(line)["step"] for line in (tmp_path / run / "metrics.jsonl").open()]
        assert len(steps) == len(set(steps)), "one process writes"


# --- another library's models ----------------------------------------------------------------------------------------


def tiny_llama(layers: int) -> nn.Module:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        return hf.LlamaForCausalLM(config)


def test_a_language_model_of_transformers_learns_from_another(tmp_path: Path) -> None:
    """Kept logits of 8 of 40 tokens, a padding mask, and the models' own outputs with `.logits`."""
    ids = torch.randint(2, 40, (24, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:6, 7:] = 0
    teacher = tiny_llama(2)
    kept = cached(teacher, inputs, tmp_path / "c", top=8)
    settings = Training(task="tokens", steps=30, batch=8, lr=3e-3, optimizer="adamw", schedule="cosine", watch="loss")
    facts: dict[str, Any] = {}
    soft = kd(Kd(temperature=1, ce=0.0, alpha=1.0))
    made = distill(tiny_llama(1), kept, inputs, settings, objective=soft, facts=facts)

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            ours, theirs = (m(**inputs).logits[:, :-1].log_softmax(-1) for m in (model, teacher))
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        return float(kl[inputs["attention_mask"][:, 1:] > 0].mean())

    assert apart(made) < 0.9 * apart(tiny_llama(1))  # both begin near even, so little is to be gained
    made.save_pretrained(tmp_path / "student")
    assert same(type(made).from_pretrained(tmp_path / "student"), made)


# --- real data -------------------------------------------------------------------------------------------------------


def test_with_a_teacher_a_small_student_gets_further_on_few_labels() -> None:
    """150 labelled digits and input noise: KD at temperature 4 against labels alone, paired over four seeds.

    The method's own measurement of this kind saw 95.2 against 90.2, with deviations of 1 to 2; asked for here: 2 points.
    """
    gains, labels = [], kd(Kd(alpha=0.0, ce=1.0))
    for seed in range(4):
        splits = digits("upright", seed)
        fit = Training(epochs=15, batch=50, lr=0.05, schedule="cosine")
        teacher = distill(
            net(seed, 128, 64, 10), silent, (splits.train.x, splits.train.y), fit, objective=labels, seed=seed
        )
        few, scores = (splits.base.x[:150], splits.base.y[:150]), list[float]()
        for objective in (labels, kd()):
            student = distill(
                net(100 + seed, 12, 64, 10), teacher, few, Training(epochs=30, batch=50, lr=0.1, schedule="constant"),
                objective=objective, augment=noisy, seed=seed,
            )  # fmt: skip
            with torch.no_grad():
                right = student(splits.test.x).argmax(-1) == splits.test.y
            scores.append(100 * float(right.float().mean()))
        gains.append(scores[1] - scores[0])
    assert fmean(gains) > 2, gains


def silent(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 10)


def noisy(x: Tensor, draws: Any) -> Tensor:
    return x + 0.3 * torch.from_numpy(draws.standard_normal(x.shape, dtype="float32"))

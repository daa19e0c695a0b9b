"""The stage: experts shown one after the other, their mean, types and ties kept; and inputs shared by processes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia import Examples, ExpertPool, Network, SpoliaError
from spolia.core.checkpoint import read_tensors
from spolia.parts.stage import Stage, drawn


def experts() -> dict[str, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return {
        t: {"weight": torch.randn(2, 3, generator=draws).bfloat16(), "bias": torch.randn(2, generator=draws)}
        for t in "abc"
    }


def test_every_expert_is_shown_as_it_is() -> None:
    given, network = experts(), Network(nn.Linear(3, 2))
    stage = Stage.of(ExpertPool.of(given), network)
    with stage.pool.opened():
        for k, t in enumerate(given):
            stage.show(k)
            x = torch.ones(1, 3)
            wide = {n: tensor.float() for n, tensor in given[t].items()}
            assert torch.equal(stage.network.features(x), network.features(x, wide))


def test_the_mean_has_the_weights_and_types_asked_for() -> None:
    given = experts()
    stage = Stage.of(ExpertPool.of(given), Network(nn.Linear(3, 2)))
    with stage.pool.opened():
        merged = stage.mean((1.0, 0.0, 3.0))
        found = stage.weights(merged)
    wanted = (given["a"]["weight"].float() + 3 * given["c"]["weight"].float()) / 4
    torch.testing.assert_close(merged["weight"], wanted)  # fp32's last digit
    assert list(found) == ["weight", "bias"] and found["weight"].dtype == torch.bfloat16
    assert torch.equal(found["weight"], merged["weight"].bfloat16())


def test_a_broken_expert_is_named() -> None:
    given = experts()
    given["b"]["bias"][1] = float("nan")
    stage = Stage.of(ExpertPool.of(given), Network(nn.Linear(3, 2)))
    with stage.pool.opened(), pytest.raises(SpoliaError, match="b: tensor `bias` holds NaN or Inf"):
        stage.mean((1.0, 1.0, 1.0))


def test_inputs_are_drawn_once_each_and_from_everywhere() -> None:
    part = drawn({"t": Examples(torch.arange(1000.0), name="t")}, 100, 0)["t"]
    seen = torch.cat([x for _, x in part.batches(32)])
    assert len(seen) == len(seen.unique()) == len(part) == 100
    assert float(seen.max()) > 500  # 2^-100 by chance
    assert len(drawn({"t": Examples(torch.arange(9.0), name="t")}, 100, 0)["t"]) == 9


RANK = """
import os, sys
import torch
from torch import nn
import spolia
from spolia.core.checkpoint import write_checkpoint
from pathlib import Path

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)).double()
experts = {
    t: {n: x + 0.2 * torch.rand_like(x) if x.is_floating_point() else x for n, x in module.state_dict().items()}
    for t in "ab"
}
inputs = {t: torch.randn(31, 4).double() for t in "ab"}
for method in ("fisher", "regmean", "regmean_plus"):
    learned = spolia.merge(experts, method=method, network=spolia.Network(module), unlabelled=inputs)
    assert learned.facts["processes"] == int(os.environ.get("WORLD_SIZE", "1"))
    write_checkpoint(Path(sys.argv[1]) / f"{method}-{os.environ.get('RANK', 'alone')}", learned.weights, {})
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, fork: Callable[..., Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [*(fork(RANK, tmp_path, RANK=str(r), **world) for r in range(2)), fork(RANK, tmp_path)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    for method in ("fisher", "regmean", "regmean_plus"):
        first, second, one = (read_tensors(tmp_path / f"{method}-{end}") for end in ("0", "1", "alone"))
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name])
            # fp64 sums in another order, through a solve with the condition of the ridge, 1e6
            torch.testing.assert_close(first[name], tensor, rtol=1e-8, atol=1e-8)

"""How the inner loop is run: modes, memory, statistics of norms, trees, processes, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.core import inner_running, kept
from spolia.core.inner import Execution, Found, Inner, InnerLoop, Task, tasks_of
from spolia.core.inner_running import Saved
from spolia.errors import SpoliaError

pytestmark = pytest.mark.sampled(3)  # of many cases alike

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # fp64: the same sums in another order
MODES = ["loop", "workers", "vmap"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convolutions(norm: nn.Module | None = None, pool: bool = True) -> nn.Module:
    """[batch, 2, 6, 6] to [batch, 3]; `norm` over 4 channels."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), norm or nn.BatchNorm2d(4), nn.ReLU()]
    net = nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []), nn.Flatten(), nn.LazyLinear(3)).double()
    net(drawn(2, 2, 6, 6, seed=0))
    for i, parameter in enumerate(net.parameters()):
        parameter.data = 0.4 * drawn(*parameter.shape, seed=i) + (i == 2)
    return net


def some_tasks(count: int = 5, views: int = 2, shots: int = 6, queries: int = 4) -> list[Task]:
    x, query = drawn(count, views, shots, 2, 6, 6, seed=1), drawn(count, queries, 2, 6, 6, seed=2)
    y = torch.arange(shots).remainder(3).expand(count, views, -1)
    return tasks_of((x, y), (query, torch.arange(queries).remainder(3).expand(count, -1)))


def same(a: Found, b: Found, **close: float) -> None:
    for name, tensor in a.gradient.items():
        torch.testing.assert_close(tensor, b.gradient[name], **(close or CLOSE), msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(a.losses, b.losses, **(close or CLOSE))
    for mine, theirs in zip(a.outputs, b.outputs, strict=True):
        torch.testing.assert_close(mine, theirs, **(close or CLOSE))


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bn", ["batch", "support", "frozen"])
@pytest.mark.parametrize(
    "rule",
    [Inner(2, 0.3, order=1), Inner(2, 0.3), Inner(2, 0.3, gradient="reverse")],
    ids=["first order", "unroll", "reverse"],
)
def test_modes_and_chunks_agree(rule: Inner, bn: str) -> None:
    net, tasks, rule = convolutions(), some_tasks(3), Inner(**vars(rule) | {"bn": bn})
    hows = [Execution("loop"), Execution("workers", workers=2), Execution("loop", channels_last=False)]
    hows += [Execution("vmap"), Execution("vmap", chunk=2)]
    found = [InnerLoop(net, rule, how).gradient(tasks) for how in hows]
    for other in found[1:]:
        same(found[0], other)
    made = [InnerLoop(net, rule, how).outputs(tasks) for how in hows]
    for other, first in zip(found, made, strict=True):
        torch.testing.assert_close(torch.stack(first), torch.stack(other.outputs), **CLOSE)


def test_workers_sum_in_the_order_of_the_tasks() -> None:
    """With one thread within an operation the bits do not depend on the number of workers."""
    net, tasks, before = convolutions(), some_tasks(7), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [InnerLoop(net, Inner(2), Execution("workers", workers=n)).gradient(tasks) for n in (1, 2, 5)]
        found.append(InnerLoop(net, Inner(2), Execution("loop")).gradient(tasks))
        for other in found[1:]:
            assert all(torch.equal(g, other.gradient[n]) for n, g in found[0].gradient.items())
        torch.set_num_threads(3)
        InnerLoop(net, Inner(1), Execution("workers", workers=2)).gradient(tasks)
        assert torch.get_num_threads() == 3, "the caller's setting stays"
    finally:
        torch.set_num_threads(before)


def test_the_module_stays_as_it_was() -> None:
    net = convolutions()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    ids = [id(p) for p in net.parameters()]
    for mode in MODES:
        loop = InnerLoop(net, Inner(2), Execution(mode))
        one = loop.outputs(some_tasks(2))
        loop.gradient(some_tasks(3))
        assert all(torch.equal(a, b) for a, b in zip(one, loop.outputs(some_tasks(2)), strict=True)), "no trace"
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert ids == [id(p) for p in net.parameters()] and all(p.grad is None for p in net.parameters())
    assert isinstance(net[1], nn.BatchNorm2d)


def test_what_changes_in_the_module_is_seen() -> None:
    """Weights by an optimizer, buffers in place, layers replaced, training switched off."""
    net, tasks = convolutions(), some_tasks(2)
    loop = InnerLoop(net, Inner(1, bn="frozen"), Execution("loop"))
    loop.gradient(tasks)
    with torch.no_grad():
        net[0].weight *= 2
        net[1].running_mean += 1
    net[5] = nn.Linear(net[5].in_features, 3).double()
    same(loop.gradient(tasks), InnerLoop(net, Inner(1, bn="frozen"), Execution("loop")).gradient(tasks))
    net.insert(5, nn.Dropout(0.5))
    drawing = InnerLoop(net, Inner(1), Execution("loop"))
    assert not torch.equal(drawing.outputs(tasks)[0], drawing.outputs(tasks)[0])
    net.eval()
    assert torch.equal(drawing.outputs(tasks)[0], drawing.outputs(tasks)[0])


def test_found_gradients_train(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tasks = convolutions(), some_tasks(2)
    loop, adam = InnerLoop(net, Inner(1, 0.1)), torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        found = loop.gradient(tasks)
        found.write(net)
        adam.step()
        losses.append(found.loss)
    assert losses[-1] < 0.7 * losses[0]  # it learns these two tasks by heart
    assert loop.choice["gradient"]["mode"] in MODES
    assert "tasks a second on cpu" in loop.explain()


def test_auto_measures_once_and_keeps_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tasks, asked = convolutions(), some_tasks(3), []

    def measured(modes: list[str], trial: Any, device: str) -> dict[str, Any]:
        asked.append(list(modes))
        return {"mode": "vmap", "seconds": {"vmap": 0.5, "loop": 1.0}, "refused": {}, "device": device, "threads": 1}

    monkeypatch.setattr(inner_running, "measured", measured)
    monkeypatch.setattr(inner_running, "cores", lambda: 2)
    loop = InnerLoop(net, Inner(1))
    assert loop.explain() == "auto: nothing was measured yet"
    one = loop.gradient(tasks)
    loop.gradient(tasks)
    assert asked == [["loop", "workers", "vmap"]]
    assert loop.explain() == "gradient: vmap; tasks a second on cpu, 1 threads: vmap 2, loop 1"
    same(one, InnerLoop(net, Inner(1), Execution("vmap")).gradient(tasks))
    resumed = InnerLoop(net, Inner(1))
    kept.restore("inner", resumed.choice, kept.capture("inner", loop.choice))
    resumed.gradient(tasks)
    assert len(asked) == 1 and resumed.choice == loop.choice
    InnerLoop(net, Inner(1)).outputs(some_tasks(1, views=1))
    assert len(asked) == 1, "one task of one view leaves no choice"


def test_the_quickest_mode_that_works_is_taken() -> None:
    clock = iter([0.0, 4.0, 10.0, 13.0, 20.0, 21.0, 30.0, 32.0])

    def trial(mode: str) -> int:
        if mode == "vmap":
            raise RuntimeError("no rule for this operation\nand more")
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_running.time, "perf_counter", lambda: next(clock))
        found = inner_running.measured(["loop", "workers", "vmap"], trial, "cpu")
    assert found["mode"] == "workers" and found["seconds"] == {"loop": 3.0, "workers": 1.0}
    assert found["refused"] == {"vmap": "no rule for this operation"}


# --- memory ----------------------------------------------------------------------------------------------------------


def peak(steps: int, order: int, gradient: str, optimizer: str = "sgd") -> int:
    """Bytes of graphs for one task."""
    saved = Saved()
    loop = InnerLoop(convolutions(), Inner(steps, 0.1, optimizer, order=order, gradient=gradient), Execution("loop"))
    with saved.counted():
        loop.gradient(some_tasks(1, views=1))
    assert saved.now == 0, "nothing is left"
    return saved.peak


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_memory_against_steps(optimizer: str) -> None:
    """Unrolled graphs grow with the steps, those of the reverse recursion and of first order do not at all."""
    few, many = ([peak(k, *way, optimizer) for way in ((2, "unroll"), (2, "reverse"), (1, "unroll"))] for k in (3, 9))
    assert many[0] > 2.5 * few[0]
    assert many[1] == few[1] and many[2] == few[2]
    assert few[2] < few[1] < few[0]


def test_first_order_builds_no_second_order_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    true, asked = torch.autograd.grad, []

    def grad(*arguments: Any, create_graph: bool = False, **others: Any) -> Any:
        asked.append(create_graph)
        return true(*arguments, create_graph=create_graph, **others)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    loop = InnerLoop(convolutions(), Inner(2, order=1), Execution("vmap"))
    loop.gradient(some_tasks(2), rates=loop.rates())
    assert asked and not any(asked)


def test_tasks_at_once_keep_within_the_budget() -> None:
    tasks, how = some_tasks(8), Execution(memory=1000)
    assert inner_running.planned("vmap", how, tasks, lambda: 300).chunk == 3
    assert inner_running.planned("vmap", how, tasks, lambda: 5000).chunk == 1
    assert inner_running.planned("vmap", Execution(chunk=5, memory=1), tasks, lambda: 300).chunk == 5
    assert inner_running.planned("workers", Execution(workers=6, memory=1000), tasks, lambda: 300).workers == 3
    assert inner_running.planned("workers", Execution(workers=6), tasks[:2], lambda: 300).workers == 2


# --- norms in the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_whose_statistics_the_query_takes(mode: str) -> None:
    """Alone or among others: an input of the query is seen the same unless statistics are the batch's own."""
    net, task = convolutions(), some_tasks(1)[0]
    net(3 + drawn(9, 2, 6, 6, seed=4))  # running statistics of something else
    fewer = Task(task.support, (task.query[0][:2], task.query[1][:2]))
    made = {}
    for bn in ("batch", "support", "frozen"):
        loop = InnerLoop(net, Inner(2, bn=bn), Execution(mode))
        whole, part = loop.outputs([task])[0], loop.outputs([fewer])[0]
        made[bn] = whole
        assert torch.allclose(whole[:, :2], part, rtol=0, atol=1e-10) == (bn != "batch"), bn
    assert not torch.allclose(made["support"], made["frozen"], atol=1e-3)
    again = Task(task.support, (task.support[0][0], task.support[1][0]))
    one, two = (InnerLoop(net, Inner(2, bn=bn), Execution(mode)).outputs([again])[0][0] for bn in ("batch", "support"))
    torch.testing.assert_close(one, two, **CLOSE)  # the first view's support as its query


@pytest.mark.parametrize("gradient", ["unroll", "reverse"])
@pytest.mark.parametrize("kind", ["layer", "batch", "instance"])
def test_fused_norms_that_a_layer_calls_itself_are_exact_here(kind: str, gradient: str) -> None:
    """They are wrong where a gradient is taken inside vmap, which is why none is."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if kind == "layer":
                return nn.functional.layer_norm(x, x.shape[1:])
            if kind == "instance":
                return nn.functional.instance_norm(x)
            return nn.functional.batch_norm(x, None, None, training=True)

    net, tasks = convolutions(Own()), some_tasks(2)
    modes = [InnerLoop(net, Inner(2, gradient=gradient), Execution(mode)).gradient(tasks) for mode in MODES]
    same(modes[0], modes[1])
    same(modes[0], modes[2])


# --- trees and tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_supports_queries_and_outputs_are_trees(mode: str) -> None:
    x, y, q = drawn(3, 1, 5, 4, seed=1), drawn(3, 1, 5, 2, seed=2), drawn(3, 6, 4, seed=3)
    tasks = tasks_of({"x": x, "more": [y]}, {"x": q})
    net = nn.Linear(4, 2).double()

    def loss(module: nn.Module, support: Any) -> Tensor:
        return (module(support["x"]) - support["more"][0]).square().mean()

    def predict(module: nn.Module, query: Any) -> Any:
        return {"y": module(query["x"]), "size": module.weight.square().sum()}

    def outer(outputs: Any, task: Task) -> Tensor:
        return outputs["y"].square().mean() + outputs["size"].mean() + task.support["x"].mean()

    loop = InnerLoop(net, Inner(2), Execution(mode), loss=loss, predict=predict)
    found, plain = loop.gradient(tasks, outer), InnerLoop(net, Inner(2), Execution("loop"), loss=loss, predict=predict)
    wanted = plain.gradient(tasks, outer).gradient
    for name, g in found.gradient.items():
        torch.testing.assert_close(g, wanted[name], **CLOSE)
    assert [tuple(o["y"].shape) for o in found.outputs] == [(1, 6, 2)] * 3
    assert loop.outputs(tasks)[0]["size"].shape == (1,)


def test_unlike_tasks_are_for_the_loop() -> None:
    class Teacher:
        scale = 2.0

    def loss(module: nn.Module, support: Any) -> Tensor:
        return support[1].scale * module(support[0]).square().mean()

    net, tasks = nn.Linear(4, 2).double(), []
    for shots in (3, 5):
        tasks.append(Task((drawn(1, shots, 4, seed=shots), Teacher()), (drawn(shots, 4, seed=shots),)))
    for mode in ("loop", "workers"):
        loop = InnerLoop(net, Inner(2), Execution(mode, workers=2), loss=loss)
        found = loop.gradient(tasks, lambda outputs, task: outputs.mean())
        assert [tuple(o.shape) for o in found.outputs] == [(1, 3, 2), (1, 5, 2)]
    with pytest.raises(SpoliaError, match=r'mode="loop" or "workers"'):
        InnerLoop(net, Inner(2), Execution("vmap"), loss=loss).outputs(tasks)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_told_before_any_work() -> None:
    with pytest.raises(SpoliaError) as caught:
        Inner(-1, float("nan"), optimizer="rmsprop", adapt="tail", momentum=1.0)  # type: ignore[arg-type]
    told = str(caught.value)
    assert all(word in told for word in ("-1 steps", "nan", "`rmsprop` is unknown", "`tail`", "a decay lies in"))
    with pytest.raises(SpoliaError, match="did you mean `workers`"):
        Execution("worker")  # type: ignore[arg-type]
    with pytest.raises(SpoliaError, match="0 is too few"):
        Execution(chunk=0)
    net, tasks = convolutions(), some_tasks(2)
    with pytest.raises(SpoliaError, match=r"did you mean `0\.weight`"):
        InnerLoop(net, Inner(adapt=["0.weigth"]))
    with pytest.raises(SpoliaError, match="`9` does not part head and body"):
        InnerLoop(net, Inner(adapt="head", head="9"))
    loop = InnerLoop(net, Inner(2, adapt="head"), Execution("loop"))
    with pytest.raises(SpoliaError, match="no tasks are given"):
        loop.gradient([])
    with pytest.raises(SpoliaError, match=r"`5\.weight` is adapted but not given"):
        loop.gradient(tasks, params={"5.bias": net[5].bias})
    with pytest.raises(SpoliaError, match="no parameter `x`"):
        loop.gradient(tasks, params=dict(net.named_parameters()) | {"x": torch.ones(1)})
    with pytest.raises(SpoliaError, match=r"`0\.weight` is not adapted"):
        loop.gradient(tasks, rates={"0.weight": torch.ones(())})
    with pytest.raises(SpoliaError, match=r"rates of `5.bias` are \[2\], it is \[3\]"):
        loop.gradient(tasks, rates={"5.bias": torch.ones(2)})
    with pytest.raises(SpoliaError, match=r"`0\.bias` is given a start but is not adapted"):
        loop.gradient([Task(tasks[0].support, tasks[0].query, {"0.bias": torch.ones(2, 4)})])
    with pytest.raises(SpoliaError, match="leaves have 2 and 3 views"):
        loop.gradient([Task((torch.ones(2, 4), torch.ones(3)), ())])


def test_dropout_and_what_is_done_in_another_order() -> None:
    net, tasks = convolutions().insert(4, nn.Dropout(0.5)), some_tasks(2)
    with pytest.raises(SpoliaError, match="in the order of the threads"):
        InnerLoop(net, Inner(1), Execution("workers")).gradient(tasks)
    with pytest.raises(SpoliaError, match="draw anew"):
        InnerLoop(net, Inner(1, gradient="reverse")).gradient(tasks)
    for mode in ("loop", "vmap"):
        assert InnerLoop(net, Inner(1), Execution(mode)).gradient(tasks).loss > 0
    InnerLoop(net.eval(), Inner(1, gradient="reverse"), Execution("workers")).gradient(tasks)


# --- several processes -----------------------------------------------------------------------------------------------

RANK = """
import json, sys, torch
from torch import nn
from spolia.core.dist import joined
from spolia.core.inner import Execution, Inner, InnerLoop, tasks_of
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
x, q = torch.randn(3, 2, 5, 4).double(), torch.randn(3, 4, 4).double()
y = torch.arange(5).remainder(3)
tasks = tasks_of((x, y.expand(3, 2, -1)), (q, y[:4].expand(3, -1)))
with joined() as (rank, count):
    loop = InnerLoop(net, Inner(2, 0.3), Execution("loop"))
    found = loop.gradient(tasks, rates=loop.rates())
    told = {n: g.tolist() for part in ({"losses": found.losses}, found.gradient) for n, g in part.items()}
    told |= {"rate " + n: g.tolist() for n, g in found.rates.items()} | {"loss": found.loss}
    one = loop.gradient(tasks[:1])  # fewer tasks than processes
    print(json.dumps([told, list(found.places), len(found.outputs), one.loss, one.losses.tolist()]))
"""


@pytest.mark.slow
def test_two_processes_are_one() -> None:
    def started(rank: int, count: int, port: int) -> subprocess.Popen[str]:
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return subprocess.Popen([sys.executable, "-c", RANK], env=os.environ | place, stdout=subprocess.PIPE, text=True)

    def told(child: subprocess.Popen[str]) -> Any:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        return json.loads(out.splitlines()[-1])

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone, *two = [told(c) for c in [started(0, 1, port)]] + [told(c) for c in [started(r, 2, port) for r in range(2)]]
    assert two[0][0] == two[1][0], "the same bits in both"
    for name, wanted in alone[0].items():
        made, wanted = torch.tensor(two[0][0][name]).double(), torch.tensor(wanted).double()
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)  # sums in another order; the text is exact
    assert alone[1:3] == [[0, 1, 2], 3] and [t[1:3] for t in two] == [[[0], 1], [[1, 2], 2]]
    assert [t[3:] for t in two] == [alone[3:]] * 2

"""The trainer against arithmetic done by hand: steps, sums over parts, averages, looks, and what is refused before any work."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia import Examples, Journal, SpoliaError
from spolia.core.divergence import kl, mean
from spolia.core.journal import Interrupted
from spolia.methods.distill.ctkd import ctkd
from spolia.methods.distill.fitnets import Fitnets, fitnets
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.mlkd import mlkd
from spolia.methods.distill.objective import Objective
from spolia.methods.distill.schedule import Pace, rate
from spolia.methods.distill.train import Training, distill
from spolia.parts.teacher import Teachers, cached
from spolia.zoo.tiny_lm import TinyLM

pytestmark = pytest.mark.sampled(3)  # of many cases alike

CLASSES = 4


def net(seed: int = 0, hidden: int = 8, classes: int = CLASSES, *, plain: bool = True) -> nn.Module:
    """`plain`: without batch normalisation and dropout, so that an example's loss is its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        between = [nn.ReLU()] if plain else [nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(nn.Linear(5, hidden), *between, nn.Linear(hidden, classes))


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=draws), torch.randint(0, CLASSES, (n,), generator=draws)


def short(**more: Any) -> Training:
    return Training(**({"steps": 12, "batch": 8, "lr": 0.1, "schedule": "constant"} | more))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def close(one: nn.Module, other: nn.Module, atol: float) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=atol)


# --- what a step is --------------------------------------------------------------------------------------------------


def test_it_is_the_loop_one_would_write() -> None:
    """Two batches in a fixed order, SGD by hand."""
    student, teacher, (x, y) = net(0), net(1, 16), data(16)
    made = distill(student, teacher, [(x[:8], y[:8]), (x[8:], y[8:])], short(steps=5, momentum=0.9, weight_decay=0.01))
    model, loss = copy.deepcopy(student), kd(Kd())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(5):
        part = slice(0, 8) if step % 2 == 0 else slice(8, 16)
        with torch.no_grad():
            target = teacher(x[part])
        optimizer.zero_grad()
        mean(loss(model(x[part]), target, y[part], step / 5), y[part]).backward()
        optimizer.step()
    close(made, model, 1e-6)  # sum / n against a mean: fp32
    assert not made.training and all(p.grad is None for p in made.parameters())


def test_what_is_given_stays_as_it_is() -> None:
    student, teacher, (x, y) = net(0, plain=False), net(1, plain=False).train(), data()
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    state = torch.get_rng_state()
    made = distill(student, teacher, (x, y), short())
    assert same(student, before[0]) and same(teacher, before[1]) and teacher.training and student.training
    assert torch.equal(torch.get_rng_state(), state), "the global generator is put back"
    assert not same(made, student)
    assert distill(student, teacher, (x, y), short(), in_place=True) is student and same(student, made)


def test_frozen_weights_stay_and_a_factory_gets_the_groups() -> None:
    student, seen = net(0), list[Any]()
    student[0].requires_grad_(False)

    def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.extend(groups)
        return torch.optim.Adam(groups, lr=1e-2)

    made = distill(student, net(1), data(), short(), optimizer=factory)
    assert torch.equal(made[0].weight, student[0].weight) and not torch.equal(made[2].weight, student[2].weight)
    assert [len(group["params"]) for group in seen] == [2]


@pytest.mark.parametrize("more", [{"micro_batch": 3}, {"micro_batch": 5}, {"accumulate": 4, "batch": 4}], ids=str)
def test_parts_add_up_to_the_whole_batch(more: dict[str, Any]) -> None:
    x, y = data(64)
    y[::5] = -100  # the mean is over those that count, however they fall into parts
    whole = distill(net(0), net(1), Examples(x, y), short(batch=16, steps=6))
    parts = distill(net(0), net(1), Examples(x, y), short(**({"batch": 16, "steps": 6} | more)))
    close(parts, whole, 1e-6)  # six steps of fp32 sums in another order


def test_averaged_weights_follow_their_closed_form() -> None:
    trail = list[Tensor]()

    def watch(model: nn.Module, step: int) -> dict[str, float]:
        trail.append(model[0].weight.detach().clone())
        return {"seen": 1.0}

    plain = short(steps=7, check_every=1)
    distill(net(0), net(1), data(), plain, evaluate=watch)
    raw = [net(0)[0].weight.detach(), *trail]
    trail.clear()
    made = distill(net(0), net(1), data(), plain.model_copy(update={"ema": 0.8}), evaluate=watch)
    wanted = 0.8**7 * raw[0] + 0.2 * sum(0.8 ** (7 - i) * raw[i] for i in range(1, 8))
    torch.testing.assert_close(made[0].weight, wanted, rtol=0, atol=1e-6)  # seven fp32 sums
    assert torch.equal(made[0].weight, trail[-1]), "what is judged is what is returned"


def test_learning_rates_are_functions_of_the_step() -> None:
    assert [round(rate(Pace(), s, 240), 6) for s in (0, 149, 150, 180, 210, 239)] == [1, 1, 0.1, 0.01, 0.001, 0.001]
    cosine = Pace(schedule="cosine", warmup=10, floor=0.1)
    assert [rate(cosine, s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [rate(cosine, s, 110) for s in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])
    linear = Pace(schedule="linear")
    assert [rate(linear, s, 10) for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="nesterov"):
        Pace(nesterov=True, momentum=0)


def test_the_gradient_is_clipped() -> None:
    clipped = short(steps=1, clip=1e-3, momentum=0, weight_decay=0)
    student = net(0)
    made = distill(student, net(1), data(), clipped)
    moved = math.sqrt(
        sum(
            (a - b).detach().square().sum().item() for a, b in zip(made.parameters(), student.parameters(), strict=True)
        )
    )
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-2)  # lr times clip; differences of fp32 weights near 0.3


def test_half_precision_trains_close_to_full() -> None:
    full, half = (distill(net(0), net(1), data(), short(precision=p)) for p in ("fp32", "bf16"))
    assert all(p.dtype == torch.float32 for p in half.parameters()) and not same(full, half)
    close(half, full, 0.02)  # bf16 keeps 8 bits of activations near 1; 12 steps of 0.1


# --- several teachers and the cache ----------------------------------------------------------------------------------


def test_several_teachers_teach_as_their_mean() -> None:
    models = [net(1), net(2, 16)]
    x, y = data()
    one = distill(net(0), models, (x, y), short())
    other = distill(
        net(0), lambda batch: torch.stack([m(batch).softmax(-1) for m in models]).mean(0).log(), (x, y), short()
    )
    close(one, other, 1e-6)  # the same mean by way of logsumexp
    weighted = distill(net(0), Teachers(models, weights=[1, 0]), (x, y), short())
    close(weighted, distill(net(0), models[0], (x, y), short()), 1e-6)


def test_from_a_cache_of_all_classes_it_learns_what_it_learns_live(tmp_path: Path) -> None:
    x, y = data()
    kept = cached(net(1), x, tmp_path / "c", dtype="float32")
    close(distill(net(0), kept, (x, y), short()), distill(net(0), net(1), (x, y), short()), 1e-6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    distill(net(0), kept, loader, short())  # found by the inputs themselves, in any order
    with pytest.raises(SpoliaError, match="not those the teacher was asked about"):
        distill(net(0), kept, (x, y), short(), augment=lambda batch, draws: batch + 0.1)


@pytest.mark.parametrize("rest", ["spread", "class"])
def test_what_a_cache_left_out_is_read_as_said(rest: str, tmp_path: Path) -> None:
    x, y = data()
    teacher, soft = net(1), Kd(temperature=1, ce=0.3)
    kept = cached(teacher, x, tmp_path / "c", top=2, dtype="float32")
    made = distill(
        net(0), kept, (x, y), short(steps=1, batch=40, momentum=0, weight_decay=0, rest=rest), objective=kd(soft)
    )
    model = net(0)
    p, q = teacher(x).detach().softmax(-1), model(x).softmax(-1)
    top = p.topk(2).indices
    if rest == "spread":
        rest_mass = (1 - p.gather(-1, top).sum(-1, keepdim=True)) / 2
        seen = rest_mass.expand_as(p).scatter(-1, top, p.gather(-1, top))
        apart = (seen * (seen.log() - q.log())).sum(-1)
    else:
        coarse = [torch.cat([d.gather(-1, top), 1 - d.gather(-1, top).sum(-1, keepdim=True)], -1) for d in (p, q)]
        apart = (coarse[0] * (coarse[0].log() - coarse[1].log())).sum(-1)
    (soft.alpha * apart.mean() + 0.3 * nn.functional.cross_entropy(model(x), y)).backward()
    for new, old in zip(made.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, rtol=0, atol=1e-6)


# --- tokens ----------------------------------------------------------------------------------------------------------


def lm(seed: int = 0, width: int = 8) -> TinyLM:
    return TinyLM(11, 12, width, 1, 2, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 12, length: int = 9) -> Tensor:
    return torch.randint(1, 11, (n, length), generator=torch.Generator().manual_seed(0))


def test_tokens_are_samples_shifted_by_one_and_padding_counts_as_nothing() -> None:
    ids = tokens()
    ids[:4, 5:] = 0  # padding
    padded = distill(lm(0), lm(1, 16), ids, short(task="tokens", pad=0, steps=1, batch=12, momentum=0, weight_decay=0))
    model, teacher = lm(0), lm(1, 16)
    ours, theirs, wanted = model(ids)[:, :-1].flatten(0, 1), teacher(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    real = wanted != 0
    flat = kd(Kd())(ours[real], theirs[real].detach(), wanted[real])
    assert len(flat) == 12 * 8 - 4 * 4
    flat.mean().backward()
    for new, old in zip(padded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, rtol=0, atol=1e-6)
    masked = {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def outputs(module: nn.Module, batch: Any) -> Tensor:
        return module(batch["input_ids"])

    once = short(task="tokens", steps=1, batch=12, momentum=0, weight_decay=0)
    close(distill(lm(0), lm(1, 16), masked, once, outputs=outputs), padded, 0)
    labels = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}
    close(distill(lm(0), lm(1, 16), labels, once, outputs=outputs), padded, 0)


def test_parts_of_unlike_length_add_up_too() -> None:
    ids = tokens()
    ids[:3, 2:] = 0
    settings = short(task="tokens", pad=0, steps=3, batch=12)
    close(
        distill(lm(0), lm(1), ids, settings),
        distill(lm(0), lm(1), ids, settings.model_copy(update={"micro_batch": 2})),
        1e-6,  # fp32 sums in another order
    )


def test_a_language_model_is_judged_by_token() -> None:
    facts: dict[str, Any] = {}
    distill(lm(0), lm(1), tokens(), short(task="tokens", watch="loss"), validation=tokens(5), facts=facts)
    assert facts["last"]["loss"] == pytest.approx(math.log(11), abs=0.5) and 0 <= facts["last"]["accuracy"] <= 1


# --- looks, best and last --------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[Tensor]:
    """Looks at the validation split see these accuracies; the weights at each look."""
    from spolia.methods.distill.validate import Validation

    weights = list[Tensor]()

    def look(self: Validation, student: nn.Module) -> dict[str, float]:
        weights.append(student[0].weight.detach().clone())
        return {"loss": 1.0, "accuracy": values[len(weights) - 1]}

    monkeypatch.setattr(Validation, "look", look)
    return weights


def test_it_ends_early_and_the_best_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = scripted(monkeypatch, [0.5, 0.7, 0.7, 0.6, math.nan, 0.9])
    facts: dict[str, Any] = {}
    settings = short(steps=60, check_every=2, patience=3)
    made = distill(net(0), net(1), data(), settings, validation=data(8, 1), facts=facts)
    assert len(weights) == 5 and facts["stopped early"] and facts["steps"] == 10
    assert facts["best"] == {"step": 4, "loss": 1.0, "accuracy": 0.7}, "the first of equals"
    assert facts["last"]["step"] == 10 and facts["returned"] == "best"
    assert torch.equal(made[0].weight, weights[1])
    weights.clear()
    last = distill(net(0), net(1), data(), short(steps=10, check_every=2, keep="last"), validation=data(8, 1))
    assert torch.equal(last[0].weight, weights[-1])


def test_the_look_is_what_the_student_does() -> None:
    facts: dict[str, Any] = {}
    (x, y), teacher = data(20, 1), net(1)
    y[:3] = -100
    made = distill(net(0, plain=False), teacher, data(), short(), validation=(x, y), facts=facts)
    logits = made(x[3:])
    assert facts["best"]["accuracy"] == pytest.approx(float((logits.argmax(-1) == y[3:]).double().mean()))
    assert facts["best"]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y[3:]).item(), rel=1e-5)
    made = distill(net(0), teacher, x, short(), validation=[x[:7], x[7:]], facts=facts)
    agreed = (made(x).argmax(-1) == teacher(x).argmax(-1)).double().mean()
    assert facts["best"]["agreement"] == pytest.approx(float(agreed)) and not facts["labels used"]


def test_facts_and_numbers_are_plain_json(tmp_path: Path) -> None:
    facts: dict[str, Any] = {}
    distill(
        net(0), net(1), data(), short(), validation=data(8, 1), journal=tmp_path, facts=facts,
        evaluate=lambda model, step: {"weights": sum(p.numel() for p in model.parameters())},
    )  # fmt: skip
    assert json.loads(json.dumps(facts)) == facts
    assert facts["inputs"] == {"trained on": 40, "kept apart": 8} and facts["labels used"]
    assert [seen["step"] for seen in facts["history"]] == [5, 10, 12]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 9, 10, 11]
    assert {"loss", "ce", "kd", "norm", "lr", "validation accuracy", "validation weights"} <= lines[1].keys()
    assert lines[0]["loss"] == pytest.approx(lines[0]["ce"] + lines[0]["kd"])


# --- what a loss may bring along -------------------------------------------------------------------------------------


def test_what_a_loss_learns_is_trained_beside_the_student() -> None:
    theta = torch.zeros(2, requires_grad=True)

    def objective() -> Objective:
        return Objective(
            lambda seen: {"pull": (seen.learned["theta"] - 3).square().sum().expand(len(seen.student.logits))},
            ce=1.0,
            learned={"theta": theta},
        )

    distill(net(0), net(1), data(), short(steps=40, momentum=0, weight_decay=0.5), objective=objective())
    torch.testing.assert_close(theta.detach(), torch.full((2,), 3.0), rtol=0, atol=1e-3)  # 0.8^40 of 3; no weight decay


def test_features_are_tapped_by_name() -> None:
    seen_shapes = list[tuple[int, ...]]()

    def terms(seen: Any) -> dict[str, Tensor]:
        seen_shapes.append((*seen.student.features[0].shape, *seen.teacher.features[0].shape))
        return {"hint": (seen.student.features[0] - seen.teacher.features[0][:, :8]).square().mean(-1)}

    student, teacher = net(0), net(1, 16)
    made = distill(student, teacher, data(), short(), objective=Objective(terms, taps=(("1", "1"),)))
    assert set(seen_shapes) == {(2, 8, 2, 16), (8, 8, 8, 16)}
    assert torch.equal(made[2].weight, student[2].weight), "only what is before the tap has a gradient"
    assert not torch.equal(made[0].weight, student[0].weight)
    assert not made[1]._forward_hooks and not teacher[1]._forward_hooks


def test_losses_with_parts_of_their_own_train() -> None:
    """A temperature that is learned, regressors whose sizes follow from the features, two views."""

    def noisy(batch: Tensor, draws: Any) -> Tensor:
        return batch + 0.1 * torch.from_numpy(draws.standard_normal(batch.shape, dtype="float32"))

    hints = Fitnets(student_sites=("1",), teacher_sites=("1",))
    for objective, views in ((ctkd(), ()), (fitnets(hints), ()), (mlkd(), (noisy, noisy))):
        student = net(0)
        made = distill(student, net(1, 16), data(), short(steps=3), objective=objective, augment=views)
        assert not torch.equal(made[0].weight, student[0].weight)


def test_views_are_drawn_by_step() -> None:
    drawn = list[Tensor]()

    def weak(batch: Tensor, draws: Any) -> Tensor:
        drawn.append(batch + torch.from_numpy(draws.standard_normal(batch.shape, dtype="float32")))
        return drawn[-1]

    objective = Objective(lambda seen: {"kd": kl(seen.student.logits, seen.teacher.logits)}, ce=1.0, views=2)
    one = distill(net(0), net(1), data(), short(), objective=objective, augment=(weak, weak))
    first, drawn = drawn[2:], []
    assert same(one, distill(net(0), net(1), data(), short(), objective=objective, augment=(weak, weak)))
    assert all(torch.equal(a, b) for a, b in zip(first, drawn[2:], strict=True)) and not torch.equal(first[0], first[1])


# --- kinds of data ---------------------------------------------------------------------------------------------------


def test_a_loader_is_read_epoch_after_epoch_in_orders_of_its_own() -> None:
    x, y = data(10)
    seen = list[Tensor]()

    def teacher(batch: Tensor) -> Tensor:
        seen.append(batch[:, 0])
        return net(1)(batch)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
    one = distill(net(0), teacher, loader, Training(epochs=3, lr=0.1))
    epochs = [torch.cat(seen[i : i + 2]) for i in range(len(seen) - 6, len(seen), 2)]  # after the checks
    assert all(torch.equal(e.sort().values, x[:, 0].sort().values) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    torch.manual_seed(123)
    assert same(one, distill(net(0), teacher, loader, Training(epochs=3, lr=0.1))), (
        "the seed decides, not what was drawn"
    )
    own = torch.utils.data.DataLoader(loader.dataset, batch_size=5, shuffle=True, generator=torch.Generator())
    again = distill(net(0), teacher, own, Training(epochs=3, lr=0.1))
    assert same(again, distill(net(0), teacher, own, Training(epochs=3, lr=0.1)))


class Stream:
    """Batches of unknown number."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_a_stream_needs_its_steps() -> None:
    x, y = data()
    stream = Stream([(x[:8], y[:8]), (x[8:], y[8:])])
    with pytest.raises(SpoliaError, match="its length is not known"):
        distill(net(0), net(1), stream, Training(epochs=1))
    distill(net(0), net(1), stream, short(steps=5))


# --- refused before any work -----------------------------------------------------------------------------------------


def never(batch: Tensor) -> Tensor:
    raise AssertionError("asked")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"teacher": net(1, classes=7)}, r"the teacher gives \[2, 7\], the student \[2, 4\]"),
        ({"loader": []}, "loader: gives no batches"),
        ({"loader": Stream([]), "settings": short()}, "loader: gives no batches"),
        ({"loader": data(0)}, "loader: gives no batches"),
        ({"loader": iter([data()])}, "an iterator can be read only once"),
        ({"loader": torch.utils.data.TensorDataset(*data())}, "a TensorDataset gives no batches"),
        ({"loader": [(1, 2, 3)]}, "an item of 3 parts"),
        ({"loader": (data()[0], data()[1] + 1)}, "label 4, the models know 4 classes"),
        ({"loader": (data()[0], torch.rand(40))}, "labels are float32"),
        ({"loader": (data()[0], data()[1].unsqueeze(1))}, r"labels are \[40, 1\], logits \[batch, 4\]"),
        ({"validation": (data()[0], data()[1] + 1)}, "validation: label 4"),
        ({"settings": short(precision="fp16")}, "fp16 needs a GPU"),
        ({"settings": short(patience=2)}, "no validation is given"),
        ({"settings": short(rest="class")}, "only a cache leaves logits out"),
        ({"settings": short(task="tokens")}, "the inputs are no token ids"),
        ({"student": net(0).requires_grad_(False)}, "no weight of it may change"),
        ({"objective": Objective(lambda seen: {}, labelled=True), "loader": data()[0]}, "the loss needs them"),
        ({"objective": Objective(lambda seen: {}, views=2)}, "looks at 2 views of an input, 0 are made"),
        ({"objective": Objective(lambda seen: {}, taps=(("9", "1"),))}, "has no module `9`"),
        ({"objective": Objective(lambda seen: {}, taps=(("1", "1"),)), "teacher": [net(1), net(2)]}, "features of one"),
        ({"teacher": []}, "no teacher is given"),
    ],
    ids=lambda given: "" if isinstance(given, dict) else given[:30],
)
def test_mistakes_are_told_first(given: dict[str, Any], told: str) -> None:
    student = given.get("student", net(0))
    before = copy.deepcopy(student)
    with pytest.raises(SpoliaError, match=told):
        distill(
            student, given.get("teacher", net(1)), given.get("loader", data()), given.get("settings", short()),
            objective=given.get("objective"), validation=given.get("validation"), in_place=True,
        )  # fmt: skip
    assert same(student, before)


def test_the_student_is_no_teacher_of_its_own_in_place() -> None:
    student = net(0)
    with pytest.raises(SpoliaError, match="is the student itself"):
        distill(student, [student], data(), short(), in_place=True)


def test_a_cache_gives_no_features(tmp_path: Path) -> None:
    x, y = data()
    kept = cached(net(1), x, tmp_path / "c")
    with pytest.raises(SpoliaError, match="a cache holds logits, the loss wants features"):
        distill(net(0), kept, (x, y), short(), objective=Objective(lambda seen: {}, taps=(("1", "1"),)))
    with pytest.raises(SpoliaError, match="one class for the rest cannot give"):
        distill(net(0), kept, (x, y), short(rest="class"), objective=Objective(lambda seen: {}, labelled=True))


@pytest.mark.parametrize(("side", "told"), [("teacher", "the teacher's outputs"), ("student", "the student's outputs")])
def test_what_is_no_number_ends_the_run(side: str, told: str) -> None:
    x, y = data()
    bad = x.clone()
    bad[:, 0] = torch.inf if side == "student" else 1.0

    def teacher(batch: Tensor) -> Tensor:
        return batch[:, 1:] * (torch.nan if (batch[:, 0] == 1.0).all() else 1.0)

    with pytest.raises(SpoliaError, match=rf"distill, step 1: {told} is no number"):
        distill(net(0), teacher, [(x, y), (bad, y)], short())


# --- resumed ---------------------------------------------------------------------------------------------------------


class Stopping(Journal):
    """Asks to stop in a step, and saves there."""

    at = 0

    def steps(self, n: int, keep: Any = None, *, shared: bool = False) -> Iterator[int]:
        for step in super().steps(n, keep):
            if step == self.at:
                self.request_stop()
            yield step


def full(journal: Any, facts: dict[str, Any], source: str = "tensors") -> nn.Module:
    """Everything that changes across steps at once."""
    x, y = data()
    theta = torch.zeros(1, requires_grad=True)

    def terms(seen: Any) -> dict[str, Tensor]:
        heat = 1 + seen.learned["theta"].exp()
        return {"kd": kl(seen.student.logits, seen.teacher.logits, heat)}

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    return distill(
        net(0, plain=False), net(1), (x, y) if source == "tensors" else loader,
        short(steps=14, schedule="cosine", warmup=3, ema=0.7, clip=1.0, check_every=3, optimizer="adamw", lr=0.01),
        objective=Objective(terms, ce=0.5, learned={"theta": theta}), validation=data(12, 1),
        augment=lambda batch, draws: batch + 0.1 * torch.from_numpy(draws.standard_normal(batch.shape, dtype="float32")),
        journal=journal, facts=facts, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize(("stop", "source"), [(0, "tensors"), (6, "tensors"), (7, "loader"), (13, "loader")])
def test_stopped_and_run_again_it_ends_with_the_same_bits(stop: int, source: str, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [{}, {}, {}]
    whole = full(tmp_path / "whole", told[0], source)
    journal = Stopping(tmp_path / "run")
    journal.at = stop
    with pytest.raises(Interrupted):
        full(journal, {}, source)
    assert same(whole, full(tmp_path / "run", told[1], source)) and told[0] == told[1]
    assert same(whole, full(tmp_path / "run", told[2], source)) and told[0] == told[2], (
        "finished: nothing is done twice"
    )
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (f / "metrics.jsonl").open()]
        for f in (tmp_path / "whole", tmp_path / "run")
    ]
    assert lines[0] == lines[1]

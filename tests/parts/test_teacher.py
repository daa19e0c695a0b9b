"""Teachers are asked and never changed; what a cache gives back is what they said, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spolia import Examples, SpoliaError
from spolia.core.logitcache import Shards, as_class, compress, spread
from spolia.parts import teacher as module
from spolia.parts.teacher import CachedTeacher, Teachers, cached, prints


def net(seed: int = 0, classes: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes))


def data(n: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


# --- live teachers ---------------------------------------------------------------------------------------------------


def test_a_teacher_rests_while_it_is_asked_and_is_as_it_was_afterwards() -> None:
    model = net().train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with Teachers(model).at_rest() as teachers:
        assert not any(part.training for part in model.modules())
        logits = teachers(data())
        assert torch.equal(logits, teachers(data())), "dropout would differ"
    assert [part.training for part in model.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not logits.requires_grad
    with pytest.raises(ZeroDivisionError), Teachers(model).at_rest():
        _ = 1 / 0
    assert model.training, "also after an error"


def test_several_teachers_are_one_distribution() -> None:
    models = [net(seed).eval() for seed in range(3)]
    each = torch.stack([m(data()) for m in models])
    weights = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    mixed = Teachers(models, weights=[1, 2, 5])(data()).softmax(-1)
    # sums of three fp32 probabilities
    torch.testing.assert_close(mixed, (weights * each.softmax(-1)).sum(0) / 8, rtol=1e-6, atol=1e-7)
    mean = Teachers(models, mean="logits")(data())
    torch.testing.assert_close(mean, each.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(Teachers([models[0]])(data()), each[0]), "one is passed through"


def test_a_teacher_may_be_any_function() -> None:
    class Output:
        def __init__(self, logits: Tensor):
            self.logits = logits

    assert torch.equal(Teachers(lambda x: Output(2 * x))(data()), 2 * data())
    both = Teachers([lambda x: x, lambda x: 3 * x], mean="logits")
    assert torch.equal(both(data()), 2 * data())
    with both.at_rest():
        pass


@pytest.mark.parametrize(
    ("models", "more", "told"),
    [
        ([], {}, "no teacher is given"),
        ("resnet56", {}, "a str gives no logits"),
        ([len, len], {"weights": [1]}, r"\[1.0\] for 2 teachers"),
        ([len, len], {"weights": [0, 0]}, "not all 0"),
    ],
)
def test_what_is_no_teacher_is_refused(models: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(SpoliaError, match=told):
        Teachers(models, **more)


def test_teachers_of_unlike_classes_are_refused() -> None:
    with pytest.raises(SpoliaError, match=r"one gives \[20, 6\], another \[20, 7\]"):
        Teachers([net().eval(), net(classes=7).eval()])(data())


# --- top-k and the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_at_temperature_one_the_kept_classes_are_exact_and_the_rest_has_its_mass(k: int) -> None:
    logits = 3 * torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1))
    parts = compress(logits, k, torch.float32)
    dense, p = spread(parts, 6).softmax(-1), logits.softmax(-1)
    kept = logits.argsort(-1, descending=True)[..., :k]
    # one exponential and one sum of fp32
    torch.testing.assert_close(dense.gather(-1, kept), p.gather(-1, kept), rtol=1e-5, atol=1e-7)
    if k < 6:
        others = torch.ones_like(p, dtype=torch.bool).scatter(-1, kept, False)
        rest = p.masked_fill(~others, 0).sum(-1, keepdim=True) / (6 - k)
        torch.testing.assert_close(dense[others], rest.expand_as(p)[others], rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(spread(parts, 6), logits)


def test_the_rest_as_a_class_is_the_coarser_distribution() -> None:
    draws = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(50, 6, generator=draws), torch.randn(50, 6, generator=draws, requires_grad=True)
    parts = compress(teacher, 2, torch.float32)
    ours, theirs = as_class(parts, student)
    assert ours.shape == theirs.shape == (50, 3)
    top = teacher.topk(2).indices
    for reduced, full in ((ours, student), (theirs, teacher)):
        torch.testing.assert_close(reduced.softmax(-1)[:, :2], full.softmax(-1).gather(-1, top), rtol=1e-5, atol=1e-7)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)

    assert (kl(theirs, ours) <= kl(teacher, student) + 1e-6).all(), "data processing inequality"
    (gradient,) = torch.autograd.grad(kl(theirs, ours).sum(), student)
    assert torch.isfinite(gradient).all()
    assert gradient.sum(-1).abs().max() < 1e-5, "a shift of the student's logits changes nothing"


def test_what_does_not_fit_in_half_precision_is_told() -> None:
    with pytest.raises(SpoliaError, match="do not fit in float16"):
        compress(torch.tensor([[1e5, 0.0]]), 2, torch.float16)
    with pytest.raises(SpoliaError, match="not finite"):
        compress(torch.tensor([[float("nan"), 0.0]]), 2, torch.float32)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD", 200)  # a few inputs a file


@pytest.mark.usefixtures("small_shards")
def test_with_all_classes_in_fp32_the_cache_is_the_teacher(tmp_path: Path) -> None:
    model, inputs = net().eval(), data()
    kept = cached(model, inputs, tmp_path / "c", dtype="float32", batch=3)
    assert kept.shards.total > 2 and kept.shards.missing() == []
    places = torch.tensor([19, 0, 7, 7])
    for asked in (inputs, inputs[places], inputs.flip(0)):
        # batches of another size may be multiplied in another order
        torch.testing.assert_close(kept(asked), model(asked), rtol=1e-6, atol=1e-6)
    half = cached(model, inputs, tmp_path / "h", batch=3)
    torch.testing.assert_close(half(inputs), model(inputs), rtol=2**-10, atol=1e-6)  # fp16 has 11 bits


@pytest.mark.usefixtures("small_shards")
def test_killed_it_goes_on_and_complete_it_asks_nothing(tmp_path: Path) -> None:
    model, inputs, asked = net().eval(), data(), list[int]()

    class Killed(BaseException):
        pass

    def teacher(x: Tensor) -> Tensor:
        if len(asked) == 5:
            raise Killed
        asked.append(len(x))
        return model(x)

    with pytest.raises(Killed):
        cached(teacher, inputs, tmp_path / "c", top=2, batch=3)
    there = sorted((tmp_path / "c").glob("*.safetensors"))
    stamps = [file.stat().st_mtime_ns for file in there]
    assert there and len(there) < 5
    asked[:] = [0] * 6  # never equal to five again
    kept = cached(teacher, inputs, tmp_path / "c", top=2, batch=3)
    assert sum(asked) == 1 + len(inputs) - len(there) * kept.shards.size
    assert [file.stat().st_mtime_ns for file in there] == stamps, "what was there is not made again"
    assert not list((tmp_path / "c").glob("*.part"))
    whole = cached(lambda x: model(x), inputs, tmp_path / "w", top=2, batch=3)
    assert torch.equal(kept(inputs), whole(inputs))
    asked[:] = [0] * 6
    cached(teacher, inputs, tmp_path / "c", top=2, batch=3)
    assert sum(asked) == 1, "one input, to see the classes"


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    inputs = data()
    cached(net(0).eval(), inputs, tmp_path / "c", top=2)
    with pytest.raises(SpoliaError, match=r"holds other logits: teacher: then .* now "):
        cached(net(1).eval(), inputs, tmp_path / "c", top=2)
    with pytest.raises(SpoliaError, match="top: then 2, now 3"):
        cached(net(0).eval(), inputs, tmp_path / "c", top=3)
    with pytest.raises(SpoliaError, match="inputs: then 20, now 19"):
        cached(net(0).eval(), inputs[:19], tmp_path / "c", top=2)
    other = inputs.clone()
    other[3, 0] += 1e-6
    with pytest.raises(SpoliaError, match="answers about other inputs: 1 of 20 looked at differ"):
        cached(net(0).eval(), other, tmp_path / "c", top=2)
    trained = net(0).eval()
    with torch.no_grad():
        trained[1].running_mean += 1
    with pytest.raises(SpoliaError, match="holds other logits: teacher"):
        cached(trained, inputs, tmp_path / "c", top=2)


def test_an_input_the_teacher_was_not_asked_about_is_refused(tmp_path: Path) -> None:
    inputs = data()
    kept = cached(net().eval(), inputs, tmp_path / "c", top=2)
    with pytest.raises(SpoliaError, match=r"1 of 2 inputs are not those.*\n.*without augmentation"):
        kept(torch.stack([inputs[4], inputs[4].flip(0)]))
    with pytest.raises(SpoliaError, match="2 of 2 inputs"):
        kept(inputs[:2].double())


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SpoliaError, match="holds something else"):
        cached(net().eval(), data(), tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cache.json").write_text("{")
    with pytest.raises(SpoliaError, match="is not valid JSON"):
        cached(net().eval(), data(), tmp_path / "c")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    kept = cached(net().eval(), data(), tmp_path / "c", top=2)
    file = next((tmp_path / "c").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    key = json.loads((tmp_path / "c" / "cache.json").read_text())["key"]
    with pytest.raises(SpoliaError, match=r"cannot be read.*\n.*delete this file"):
        CachedTeacher(Shards(tmp_path / "c", key, 20, kept.shards.size), 6)


def test_tokens_and_mappings_are_kept_too(tmp_path: Path) -> None:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones(12, 5, dtype=torch.long)}

    def teacher(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return table[input_ids] * attention_mask.unsqueeze(-1)

    kept = cached(teacher, Examples(inputs), tmp_path / "c", dtype="float32", top=9)
    some = {name: part[[3, 1]] for name, part in inputs.items()}
    assert torch.equal(kept(some), teacher(**some))
    top = cached(teacher, Examples(inputs), tmp_path / "d", dtype="float32", top=4)
    assert top(some).shape == (2, 5, 9)
    assert torch.equal(top(some).topk(4).values, teacher(**some).topk(4).values)


def test_prints_tell_inputs_apart() -> None:
    x = data(3)
    assert np.array_equal(prints(x), prints(x.clone()))
    assert len(set(prints(x)) | set(prints(x.double())) | set(prints(x.view(3, 2, 2)))) == 9
    assert not np.array_equal(prints({"a": x, "b": x + 1}), prints({"a": x + 1, "b": x}))


@pytest.mark.parametrize(("more", "told"), [({"top": 0}, "is 0, of 6 classes"), ({"top": 7}, "is 7, of 6 classes")])
def test_a_wrong_number_is_told_before_the_work(more: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match=told):
        cached(net().eval(), data(), tmp_path / "c", **more)
    with pytest.raises(SpoliaError, match="no inputs"):
        cached(net().eval(), data(0), tmp_path / "c")
    assert not (tmp_path / "c").exists()

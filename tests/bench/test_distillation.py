from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spolia.bench.distillation import calibration_error, judge, kendall, ledger_rows
from spolia.errors import SpoliaError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_calibration_by_hand():
    """Ten bins: 0.55 and 0.58 share one (one of two right), 0.95 is alone (right), 0.3 is alone (wrong)."""
    sure = torch.tensor([0.55, 0.58, 0.95, 0.3], dtype=torch.float64)
    rest = (1 - sure) / 4
    p = torch.stack([sure, rest, rest, rest, rest], 1)
    labels = torch.tensor([0, 1, 0, 2])
    by_hand = (2 * abs(0.5 - 0.565) + abs(1 - 0.95) + abs(0 - 0.3)) / 4
    assert calibration_error(p, labels, bins=10) == pytest.approx(by_hand, abs=1e-12)


def test_calibration_at_its_ends():
    sure = torch.eye(4)
    assert calibration_error(sure, torch.arange(4)) == 0
    assert calibration_error(sure, torch.tensor([1, 2, 3, 0])) == 1
    flat = torch.full((8, 4), 0.25)  # argmax is class 0: right for a quarter of the labels
    assert calibration_error(flat, torch.arange(8) % 4) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("step", [0.0, 0.5, 2.0])
def test_rank_agreement_is_scipys(step: float):
    """With ties (rounded logits) and without."""
    scipy = pytest.importorskip("scipy.stats")
    s, t = drawn(12, 9), drawn(12, 9, seed=1)
    if step:
        s, t = ((x / step).round() for x in (s, t))
    theirs = [scipy.kendalltau(a, b).statistic for a, b in zip(s.double().numpy(), t.double().numpy(), strict=True)]
    theirs = torch.tensor([0.0 if math.isnan(v) else v for v in theirs], dtype=torch.float64)  # all tied: ours is 0
    torch.testing.assert_close(kendall(s, t), theirs, rtol=0, atol=1e-12)


def test_rank_agreement_of_the_first_classes():
    t = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    s = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0]])
    assert kendall(s, t, top=3).tolist() == [1.0]
    assert kendall(s, t).tolist() == pytest.approx([0.8])
    assert kendall(-t, t).tolist() == [-1.0]
    assert kendall(torch.zeros(1, 5), t).tolist() == [0.0]


def test_many_samples_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch):
    s, t = drawn(10, 6), drawn(10, 6, seed=1)
    whole = kendall(s, t)
    monkeypatch.setattr("spolia.bench.distillation._PAIRS", 100)
    assert torch.equal(kendall(s, t), whole)


def test_a_student_is_judged():
    labels = torch.tensor([0, 1, -100, 2])
    teacher = 4 * torch.eye(4)[[0, 1, 2, 3]] + 0.01 * drawn(4, 4)
    found = judge(teacher.clone(), teacher, labels)
    assert found.count == 3 and found.accuracy == pytest.approx(200 / 3)
    assert found.rank_agreement == pytest.approx(100)
    kept = labels >= 0
    nll = torch.nn.functional.cross_entropy(teacher[kept].double(), labels[kept])
    assert found.nll == pytest.approx(float(nll), rel=1e-6)  # ours sums fp32 log-softmax
    assert found.to_dict()["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-5)
    tokens = judge(teacher.view(2, 2, 4), teacher.view(2, 2, 4), labels.view(2, 2))
    assert tokens == found
    with pytest.raises(SpoliaError, match="judge"):
        judge(teacher, teacher[:2], labels)


def test_rows():
    values = {
        "base": [{"accuracy": 90.0}, {"accuracy": 92.0}],
        "kd": [{"accuracy": 91.0}, {"accuracy": 94.0}],
        "teacher": [{"ECE": 1.0}, {"ECE": 2.0}],
    }
    rows = ledger_rows(values, ["accuracy", "ECE"], "digits", against={"kd": "base"}, baselines=["base"])
    assert [(r["method"], r["metric"]) for r in rows] == [("base", "accuracy"), ("kd", "accuracy"), ("teacher", "ECE")]
    gap = rows[1]["paired_difference"]
    half = 12.706204736 * math.sqrt(0.5) / math.sqrt(2)  # Student's quantile of one degree; differences are 1 and 2
    assert gap["mean"] == 1.5 and gap["high"] == pytest.approx(1.5 + half) and gap["against"] == "base"
    assert rows[0]["baseline"] and rows[1]["high"] == 100.0  # a percentage ends there
    (one,) = ledger_rows({"kd": values["kd"][:1]}, ["accuracy"], "digits", against={})
    assert one["low"] is None and one["n"] == 1

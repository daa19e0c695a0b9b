"""The streaming portrait against dense arithmetic in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from spolia.core.seeds import TILE
from spolia.errors import Problems
from spolia.parts.align import align
from spolia.parts.expert import ExpertPool
from spolia.parts.portrait import RANK_ROWS, Portrait, portray

SHAPES = {"wide.weight": (700, 500), "low.weight": (300, 40), "norm.weight": (64,), "one": ()}


def portrait_of(base, experts, threads: int = 2) -> Portrait:
    pool, problems = ExpertPool.of(experts, base), Problems()
    aligned, _ = align(pool, problems, "truncate")
    problems.raise_if_any()
    with pool.opened():
        return portray(pool, aligned, threads)


def models(dtype: torch.dtype, count: int = 3) -> tuple[dict, list[dict]]:
    draw = torch.Generator().manual_seed(0)

    def one(spread: float) -> dict[str, torch.Tensor]:
        return {name: spread * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}

    base, experts = one(1.0), []
    for k in range(count):
        change = one(0.05)
        change["wide.weight"][torch.rand(SHAPES["wide.weight"], generator=draw) < 0.2 * k] = 0.0  # untouched elements
        experts.append({name: (base[name] + change[name]).to(dtype) for name in base})
    return {name: tensor.to(dtype) for name, tensor in base.items()}, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_disk", [False, True])
def test_portrait_equals_dense_arithmetic(dtype, on_disk, tmp_path, write_model):
    assert math.prod(SHAPES["wide.weight"]) > 2 * TILE  # several blocks, the last one not full
    base, experts = models(dtype)
    given = (base, experts)
    if on_disk:
        given = (write_model(tmp_path / "b", base), [write_model(tmp_path / f"{k}", e) for k, e in enumerate(experts)])
    portrait = portrait_of(*given)
    assert list(portrait.tensors) == sorted(SHAPES) and portrait.matrices == {"wide.weight", "low.weight"}
    for name, shape in SHAPES.items():
        seen = portrait.tensors[name]
        start = base[name].double().flatten()
        deltas = torch.stack([e[name].double().flatten() for e in experts]) - start
        # differences are rounded to fp32 before they are multiplied in fp64: 6e-8 of each product
        torch.testing.assert_close(seen.gram, deltas @ deltas.t(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(seen.against, deltas @ start, rtol=1e-5, atol=1e-4)
        assert seen.base == pytest.approx(float(start @ start), rel=1e-12)  # fp64 on both sides
        assert seen.numel == math.prod(shape)
        signs = deltas.sign()  # counts are exact
        assert seen.untouched.tolist() == (signs == 0).sum(1).tolist()
        moved = signs.abs() @ signs.abs().t()
        assert seen.moved.tolist() == moved.tolist()
        opposed = ((signs[:, None] * signs[None]) < 0).sum(2)
        assert seen.opposed.tolist() == opposed.tolist()
        if moved.min() > 0:
            torch.testing.assert_close(torch.tensor(seen.conflict, dtype=torch.float64), opposed / moved)
        if len(shape) == 2:
            every = deltas.view(len(experts), *shape)
            taken = min(shape[0], RANK_ROWS)
            rows = [i * shape[0] // taken for i in range(taken)]
            for rank, matrix in zip(seen.rank, every[:, rows], strict=True):
                energy = torch.linalg.svdvals(matrix).square()
                share = energy / energy.sum()
                # eigenvalues of the Gram matrix instead of squared singular values, from fp32 differences
                assert rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)


def test_total_adds_tensors_up():
    base, experts = models(torch.float32)
    portrait = portrait_of(base, experts)
    long = torch.stack([torch.cat([(e[n] - base[n]).double().flatten() for n in SHAPES]) for e in experts])
    total = portrait.total()
    assert total.norms == pytest.approx(long.norm(dim=1).tolist(), rel=1e-6)  # fp32 differences
    expected = torch.nn.functional.cosine_similarity(long[:, None], long[None], dim=2)
    torch.testing.assert_close(torch.tensor(total.cosines, dtype=torch.float64), expected, rtol=0, atol=1e-6)
    assert portrait.total(["one"]).numel == 1
    assert len(portrait.ranks()) == 3 and math.isnan(portrait.ranks(["one"])[0])


def test_threads_change_nothing():
    base, experts = models(torch.bfloat16)
    one, two = portrait_of(base, experts, 1), portrait_of(base, experts, 3)
    for name in SHAPES:
        assert one.tensors[name].gram.equal(two.tensors[name].gram) and one.tensors[name].rank == two.tensors[name].rank


def test_rank_of_known_matrices():
    """A change of k equal singular values has effective rank k."""
    base = {"w": torch.zeros(300, 80)}
    for k in (1, 5, 40):
        axes = torch.linalg.qr(torch.randn(80, k, generator=torch.Generator().manual_seed(k)))[0]
        rows = torch.arange(RANK_ROWS) * 300 // RANK_ROWS  # those that are looked at
        left = torch.zeros(300, k)
        left[rows] = torch.linalg.qr(torch.randn(RANK_ROWS, k, generator=torch.Generator().manual_seed(k)))[0]
        found = portrait_of(base, [{"w": left @ axes.t()}]).tensors["w"].rank
        assert found == pytest.approx([k], rel=1e-4)  # fp32 factors


def test_nan_stays_with_its_expert():
    base, experts = models(torch.float32)
    experts[1]["low.weight"][3, 3] = math.nan
    total = portrait_of(base, experts).total()
    assert [math.isnan(norm) for norm in total.norms] == [False, True, False]
    assert math.isfinite(total.cosines[0][2]) and math.isfinite(total.conflict[0][2])


def test_untouched_expert_and_zero_base():
    base, experts = models(torch.float32, 1)
    total = portrait_of(base, [base, experts[0]]).total()
    assert total.norms[0] == 0 and total.shares_untouched[0] == 1 and total.kept[0] == 1
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    assert math.isnan(portrait_of(zero, experts).total().relative[0])

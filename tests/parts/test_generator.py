from __future__ import annotations

import pytest
import torch

from spolia.core.norms import fuse
from spolia.errors import SpoliaError
from spolia.parts.generator import ImageGenerator


def generator(**given) -> ImageGenerator:
    sizes = {"latent": 6, "width": 4, "generator": torch.Generator().manual_seed(0)}
    return ImageGenerator(given.pop("shape", (3, 8, 12)), **(sizes | given))


def test_images_lie_in_0_to_1_and_have_their_shape():
    z = 10 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x = generator()(z).detach()
    assert x.shape == (5, 3, 8, 12) and float(x.min()) >= 0 and float(x.max()) <= 1


def test_the_papers_sizes():
    whole = ImageGenerator((3, 32, 32), generator=torch.Generator())
    assert 2.32e6 < sum(p.numel() for p in whole.parameters()) < 2.34e6  # 2.33 M


def test_a_conditional_one_listens_to_the_class():
    made, z = generator(classes=4), torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).expand(8, 6)
    y = torch.tensor([0, 1, 2, 3] * 2)
    x = made(z, y).detach()
    assert torch.allclose(x[:4], x[4:])
    assert float((x[0] - x[1]).abs().max()) > 1e-3
    assert made.noise.out_features == made.label.out_features


def test_no_batch_leaves_a_trace_and_eval_changes_nothing():
    made, z = generator(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    before = {n: t.clone() for n, t in made.state_dict().items()}
    first = made(z)
    made(3 * z)
    assert torch.equal(made.eval()(z), first)
    assert all(torch.equal(before[n], t) for n, t in made.state_dict().items())


def test_drawing_begins_anew_from_the_generator_alone():
    one, other = generator(), generator()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    one.draw(torch.Generator().manual_seed(5))
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_stacked_copies_are_those_run_one_by_one():
    made, z = generator(classes=2), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    y, draws = torch.tensor([0, 0, 1, 1]), torch.Generator().manual_seed(2)
    stack = {n: p + 0.02 * torch.randn(3, *p.shape, generator=draws) for n, p in made.named_parameters()}
    fuse(made, False)
    run = lambda w, one: torch.func.functional_call(made, w, (one, y))  # noqa: E731
    many = torch.func.vmap(run)(stack, z)
    for i in range(3):
        alone = run({n: t[i] for n, t in stack.items()}, z[i])
        assert torch.allclose(many[i], alone, atol=1e-5)  # fp32 sums in another order


def test_sides_that_four_does_not_divide_are_told():
    with pytest.raises(SpoliaError, match="28 x 30"):
        generator(shape=(1, 28, 30))

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spolia.core.seeds import generator as draws_of
from spolia.methods.datafree.inversion import Fresh, Inverting, fit, generator_of, invert
from spolia.methods.datafree.looks import moved, moves
from spolia.parts.white import White, WhitePool

SHAPE = (3, 8, 8)
TINY = {"generator_width": 4, "latent": 6, "per_class": 3, "recovery_steps": 4, "shift": 1}


def network(seed: int = 0, channels: int = 3, width: int = 4, classes: int = 3) -> nn.Sequential:
    """A classifier with statistics of its own, as after training."""
    draws = torch.Generator().manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, classes),
    )
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) / max(1, p[0].numel()) ** 0.5)
        made[1].running_mean.copy_(0.3 * torch.randn(width, generator=draws))
        made[1].running_var.copy_(0.5 + torch.rand(width, generator=draws))
    return made


def pool(count: int = 3, **given) -> WhitePool:
    return WhitePool([White(f"{i}", network(i, **given), shape=SHAPE) for i in range(count)])


@pytest.mark.parametrize("by", ["generator", "pixels"])
@pytest.mark.parametrize("more", [{"augment": "crop"}, {"tv_weight": 0.1, "l2_weight": 0.1, "augment": "roll"}])
def test_a_stack_of_experts_is_what_they_are_one_by_one(by, more):
    experts, order = pool(), [2, 0, 1]
    one, many = (invert(experts, order, Inverting(**TINY, **more, together=t), by=by, seed=3) for t in ("loop", "vmap"))
    for a, b, place in zip(one, many, order, strict=True):
        assert a.expert == b.expert == place and torch.equal(a.labels, b.labels)
        # fp32 sums in another order; Adam divides by a slope's own size, so that a tiny one's rounding shows
        assert torch.allclose(a.images, b.images, atol=2e-3)
        assert a.ce == pytest.approx(b.ce, rel=1e-2)


def test_unlike_experts_in_one_call_each_answer_for_themselves():
    experts = WhitePool(
        [
            White("a", network(0), shape=SHAPE),
            White("b", network(1, channels=1, width=6, classes=4), shape=(1, 8, 8), mean=(0.5,), std=(0.3,)),
            White("c", network(2), shape=SHAPE),
        ]
    )
    found = invert(experts, [0, 1, 2], Inverting(**TINY, together="vmap"), seed=1)
    assert [len(one.images) for one in found] == [9, 12, 9]
    for one, expert in zip(found, experts, strict=True):
        with torch.no_grad():
            assert torch.allclose(one.logits, expert.logits(expert.module(), one.images), atol=1e-5)  # fp32
        assert one.images.shape[1:] == SHAPE and one.images.min() >= 0 and one.images.max() <= 1
    alone = invert(experts, [2], Inverting(**TINY, together="loop"), seed=1)
    assert not torch.equal(alone[0].images, found[2].images)  # another turn is another draw


def plain_loop(expert: White, settings: Inverting, place: int = 0):
    """The same steps as one would write them: images of every step, losses, the generator's last slopes and its end."""
    maker = generator_of(WhitePool([expert]), settings, 0)
    draws = draws_of(0, "recover", 0, place)
    y = torch.arange(3).repeat_interleave(settings.per_class)
    z = torch.from_numpy(draws.standard_normal((len(y), settings.latent), dtype="float32")).requires_grad_()
    adam = torch.optim.Adam(
        [{"params": [z], "lr": settings.latent_lr}, {"params": maker.parameters(), "lr": settings.generator_lr}],
        betas=(0.5, 0.999),
    )
    module, seen = expert.module(), []
    for _ in range(settings.recovery_steps):
        x = maker(z, y)
        inside = module[0](x)
        gap = (inside.mean((0, 2, 3)) - module[1].running_mean).norm()
        gap = gap + (inside.var((0, 2, 3), unbiased=False) - module[1].running_var).norm()
        loss = nn.functional.cross_entropy(module(x), y) + settings.bn_weight * gap
        adam.zero_grad()
        loss.backward()
        slopes = {n: p.grad.clone() for n, p in maker.named_parameters()}
        seen.append((float(loss.detach()), x.detach().clone()))
        adam.step()
    return seen, slopes, {n: p.detach() for n, p in maker.named_parameters()}


@pytest.mark.parametrize("keep", ["lowest", "last"])
def test_it_does_what_a_plain_loop_does(keep):
    chosen = {**TINY, "augment": "none", "flip": False, "keep": keep, "generator_lr": 0.05, "recovery_steps": 6}
    settings, experts = Inverting(**chosen), pool(1)
    maker = generator_of(experts, settings, 0)
    start = {n: p.detach().clone().unsqueeze(0) for n, p in maker.named_parameters()}
    made = fit([experts[0]], [experts[0].module()], start, maker, settings, [draws_of(0, "recover", 0, 0)], SHAPE)
    seen, slopes, ends = plain_loop(experts[0], settings)
    wanted = min(seen, key=lambda pair: pair[0]) if keep == "lowest" else seen[-1]
    assert torch.allclose(made.losses[0], torch.tensor([loss for loss, _ in seen]), rtol=1e-4)  # fp32, other sums
    assert torch.allclose(made.images[0], wanted[1], atol=1e-3)  # rounding, once through Adam's division a step
    for name, slope in slopes.items():
        assert torch.allclose(made.last[name][0], slope, rtol=0.05, atol=1e-3 * float(slope.abs().max()) + 1e-7)
        assert torch.allclose(made.ends[name][0], ends[name], atol=0.02)  # a slope near zero may step the other way


def test_the_image_kept_is_a_copy_of_the_best_one():
    """Steps so large that the loss goes up again: what is kept must not have moved on with the pixels."""
    chosen = {**TINY, "augment": "none", "flip": False, "pixel_lr": 3.0, "recovery_steps": 12}
    experts = pool(1)
    found = {}
    for keep in ("lowest", "last"):
        settings = Inverting(**chosen, keep=keep)
        made = fit([experts[0]], [experts[0].module()], {}, None, settings, [draws_of(0, "x")], SHAPE)
        y = torch.arange(3).repeat_interleave(3)
        module, inside = experts[0].module(), experts[0].module()[0](made.images[0])
        gap = (inside.mean((0, 2, 3)) - module[1].running_mean).norm()
        gap += (inside.var((0, 2, 3), unbiased=False) - module[1].running_var).norm()
        found[keep] = float(nn.functional.cross_entropy(module(made.images[0]), y) + gap), made.losses[0]
    lowest, losses = found["lowest"]
    assert lowest == pytest.approx(float(losses.min()), rel=1e-4)  # fp32
    last, losses = found["last"]
    assert last == pytest.approx(float(losses[-1]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_loss_goes_down(seed):
    chosen = {**TINY, "generator_lr": 0.03, "augment": "none"}
    for weight in (0.0, 100.0):  # each loss by itself
        first, found = (
            invert(pool(1), [0], Inverting(**{**chosen, "recovery_steps": n, "bn_weight": weight}), seed=seed)[0]
            for n in (1, 40)
        )
        gained = found.bn < 0.95 * first.bn if weight else found.ce < 0.6 * first.ce
        assert gained  # a random expert cannot be met altogether; seen: 0.5 and 0.88 of the first step's


def test_experts_are_as_before_and_no_hook_stays_even_after_an_error():
    experts = pool(2)
    before = [copy.deepcopy(e.module().state_dict()) for e in experts]

    def failing(images, labels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(experts, [0, 1], Inverting(**TINY, adversarial_weight=1.0), student=failing)
    invert(experts, [0, 1], Inverting(**TINY, together="vmap"))
    for expert, state in zip(experts, before, strict=True):
        assert all(torch.equal(state[n], t) for n, t in expert.module().state_dict().items())
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in expert.module().modules())
        assert not any(p.requires_grad or p.grad is not None for p in expert.module().parameters())


@pytest.mark.slow
def test_an_adversary_is_fooled():
    """With the disagreement's weight high, a student that starts as the expert's twin says otherwise on its images."""
    experts = pool(1)
    twin = copy.deepcopy(experts[0].module())

    def student(images, labels):
        tilt = 0.5 * images.mean((1, 2, 3)).unsqueeze(1) * torch.tensor([1.0, -1.0, 0.0])
        return twin(images) + tilt

    chosen = {**TINY, "recovery_steps": 60, "generator_lr": 0.01, "augment": "none", "flip": False}
    gaps = []
    for weight in (0.0, 20.0):
        (found,) = invert(experts, [0], Inverting(**chosen, adversarial_weight=weight), student=student)
        p, q = found.logits.log_softmax(1), student(found.images, found.labels).log_softmax(1)
        gaps.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert gaps[1] > 1.2 * gaps[0]


def test_equal_seeds_and_steps_give_equal_images():
    recovery = Fresh(pool(), Inverting(**TINY), seed=4)
    one, two, other = (recovery.recover([0, 1], step) for step in (7, 7, 8))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].images, other[0].images)


def looked(x, **chosen):
    settings = Inverting(**({"shift": 2, "flip": False} | chosen))
    rows, columns = moves([draws_of(0, "looks")], len(x), SHAPE, settings, "cpu")
    return moved(x, rows[0], columns[0], settings)


def test_what_is_looked_at():
    x = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert looked(x, augment="none") is x
    padded = nn.functional.pad(x, [2] * 4)
    windows = [padded[:, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    crop = looked(x, augment="crop")
    which = [[k for k, w in enumerate(windows) if torch.equal(crop[n], w[n])] for n in range(30)]
    assert all(len(hit) == 1 for hit in which) and len({hit[0] for hit in which}) > 5
    rolled = looked(x, augment="roll")
    turns = [torch.roll(x, (i, j), (2, 3)) for i in range(-2, 3) for j in range(-2, 3)]
    assert all(sum(torch.equal(rolled[n], t[n]) for t in turns) == 1 for n in range(30))
    mirrored = looked(x, augment="none", flip=True)
    flipped = [torch.equal(mirrored[n], x[n].flip(-1)) for n in range(30)]
    assert 5 < sum(flipped) < 25 and all(f or torch.equal(mirrored[n], x[n]) for n, f in enumerate(flipped))


def test_a_batch_moved_as_one():
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    crop = looked(x, augment="crop", flip=True, per_sample=False)
    assert all(torch.equal(crop[0], one) for one in crop)

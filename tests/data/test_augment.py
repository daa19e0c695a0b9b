from __future__ import annotations

import math

import pytest
import torch

from spolia.core.seeds import generator
from spolia.data.augment import (
    PAPER,
    SHAKEN,
    Augment,
    blurred,
    cropping,
    grey,
    hue_turned,
    placing,
    resampled,
    scenario,
)
from spolia.errors import SpoliaError

STRONG = Augment(crop=0.5, jitter=0.4, grayscale=0.5, blur=0.05, flip=0.5, rotate=0.3, scale=0.2, shift=0.2, noise=0.1)


def images(n: int = 6, channels: int = 3, side: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.from_numpy(generator(0, "images").random((n, channels, side, side), dtype="float32"))
    return (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def draws(name: object = 0):
    return generator(1, "draws", name)


def maps(n, angle=0.0, size=1.0, shift=(0.0, 0.0), aspect=1.0):
    one = (torch.full((n,), v, dtype=torch.float64) for v in (angle, size))
    return placing(*one, torch.tensor(shift, dtype=torch.float64).expand(n, 2), aspect)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_type_stay_and_nothing_given_is_changed(dtype, channels):
    x = images(channels=channels, dtype=dtype)
    before = x.clone()
    found = STRONG(x, draws())
    assert found.shape == x.shape and found.dtype == dtype and torch.equal(x, before)
    assert not torch.equal(found, x)
    assert found.min() >= 0 and found.max() <= (255 if dtype == torch.uint8 else 1)
    assert torch.equal(STRONG(x, draws()), found) and not torch.equal(STRONG(x, draws(1)), found)
    assert STRONG(x[:0], draws()).shape == x[:0].shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_zero_is_the_identity_bit_for_bit(dtype):
    x = images(dtype=dtype)
    assert torch.equal(Augment()(x, draws()), x)
    assert torch.equal(Augment(beyond="border")(x, draws()), x)


def test_a_mirror_twice_is_nothing_and_once_is_flip():
    x = images(dtype=torch.uint8)
    always = Augment(flip=1.0)
    once = always(x, draws())
    assert torch.equal(once, x.flip(-1)) and torch.equal(always(once, draws()), x)
    half = Augment(flip=0.5)(images(400), draws())
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(half, images(400), strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(half, images(400), strict=True)]
    assert sum(flipped) + sum(kept) == 400 and abs(sum(flipped) - 200) < 50  # five standard deviations


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_is_rot90(turns):
    x = images(dtype=torch.float64)
    found = resampled(x, maps(6, angle=turns * math.pi / 2))
    # sampling places are exact to rounding in fp64; a pixel's neighbour enters with that weight
    assert torch.allclose(found, torch.rot90(x, turns, (2, 3)), atol=1e-12)


def test_resampling_known_cases():
    x = images(dtype=torch.float64)
    assert torch.allclose(resampled(x, maps(6)), x, atol=1e-12)
    moved = resampled(x, maps(6, shift=(2 * 3 / 12, 0.0)))  # three of twelve pixels to the right
    assert torch.allclose(moved[..., 3:], x[..., :-3], atol=1e-12) and moved[..., :3].abs().max() < 1e-12
    down = resampled(x, maps(6, shift=(0.0, 2 / 12)))
    assert torch.allclose(down[..., 1:, :], x[..., :-1, :], atol=1e-12)
    ramp = torch.arange(12.0, dtype=torch.float64).view(1, 1, 1, 12).expand(1, 1, 12, 12)
    part = torch.tensor([[0.5, 1.0], [0.0, 0.0]], dtype=torch.float64)
    middle = resampled(ramp, cropping(part[:1], part[1:]))  # the middle half of pixels 0 … 11, stretched
    assert torch.allclose(middle[0, 0, 5], 2.75 + 0.5 * torch.arange(12, dtype=torch.float64), atol=1e-12)
    twice = resampled(ramp, maps(1, size=2.0))
    assert torch.allclose(twice[0, 0, 5], middle[0, 0, 5], atol=1e-12)
    # a wide image: after a half turn it is the image turned twice, whatever the aspect
    wide = images(2, 1, 12, torch.float64)[:, :, :6]
    assert torch.allclose(resampled(wide, maps(2, angle=math.pi, aspect=2.0)), wide.flip(2, 3), atol=1e-12)


def test_a_crop_keeps_its_share_and_stays_inside():
    ones = torch.ones(500, 1, 8, 8)
    for share in (0.2, 0.9):  # near 1 no crop is wide enough to leave the image, and none is smaller than asked
        assert Augment(crop=share)(ones, draws()).min() > 1 - 1e-5, "a crop looked beyond the image"
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64)
    across = Augment(crop=0.25)(ramp, draws())
    down = Augment(crop=0.25)(ramp.transpose(2, 3), draws())
    width = across[:, 0, 5, -1] - across[:, 0, 5, 0]  # a pixel is 1/63, and from middle to middle there are 63
    height = down[:, 0, -1, 5] - down[:, 0, 0, 5]
    area = width * height
    # at the border less than half a pixel is clamped, on each side: 1/64 of each length in all
    assert area.min() > 0.25 - 0.02 and area.max() < 1.0 + 1e-5 and area.max() - area.min() > 0.6


def test_grey_has_the_weights_of_the_standard():
    x = images()
    wanted = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    found = Augment(grayscale=1.0)(x, draws())
    assert torch.allclose(found, wanted.unsqueeze(1).expand_as(x), atol=1e-6)  # fp32, values up to 1
    assert torch.equal(Augment(grayscale=1.0)(x[:, :1], draws()), x[:, :1])
    assert torch.equal(grey(x[:, :1]), x[:, :1])


def test_hue_turns_colours_and_leaves_greys():
    x = images(dtype=torch.float64)
    plain = torch.full((6,), 0.0, dtype=torch.float64)
    assert torch.allclose(hue_turned(x, plain), x, atol=1e-12)
    third = hue_turned(x, plain + 1 / 3)  # a third of a turn: red becomes green, green blue
    assert torch.allclose(third, x.roll(1, 1), atol=1e-12)
    turned = hue_turned(x, plain + 0.1)
    assert torch.allclose(turned.sum(1), x.sum(1), atol=1e-12)
    flat = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(hue_turned(flat, plain + 0.1), flat, atol=1e-12)


def test_jitter_of_a_grey_flat_image_is_brightness_alone():
    flat = torch.full((300, 3, 4, 4), 0.5)
    found = Augment(jitter=0.4)(flat, draws())
    assert torch.allclose(found, found[:, :1, :1, :1].expand_as(found), atol=1e-5)  # fp32 sums over the image
    levels = found[:, 0, 0, 0]
    assert levels.min() > 0.3 - 1e-5 and levels.max() < 0.7 + 1e-5 and levels.max() - levels.min() > 0.35


def test_blur_keeps_the_mean_of_a_flat_image_and_widens_a_point():
    flat = torch.full((2, 1, 9, 9), 0.3, dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.2], dtype=torch.float64)
    assert torch.allclose(blurred(flat, sigma, 4), flat, atol=1e-12)
    point = torch.zeros(2, 1, 31, 31, dtype=torch.float64)
    point[:, 0, 15, 15] = 1
    found = blurred(point, sigma, 8)[:, 0]
    at = torch.arange(-15.0, 16.0, dtype=torch.float64)
    variance = (found.sum(1) * at**2).sum(1) / found.sum((1, 2))
    weight = (-0.5 * (at / sigma.unsqueeze(1)) ** 2).exp()  # cut at 8, which is six deviations: 1e-9 is left out
    assert torch.allclose(variance, (weight * at**2).sum(1) / weight.sum(1), rtol=1e-7)
    assert torch.equal(blurred(point, torch.zeros(2), 3), point), "no deviation, no change"


def test_blur_is_a_convolution_of_the_mirrored_image():
    x, sigma = images(2, 3, 12, torch.float64), torch.tensor([0.8, 1.1], dtype=torch.float64)
    at = torch.arange(-3.0, 4.0, dtype=torch.float64)
    for one, s, found in zip(x, sigma, blurred(x, sigma, 3), strict=True):
        weight = (-0.5 * (at / s) ** 2).exp()
        kernel = (weight[:, None] * weight / weight.sum() ** 2).view(1, 1, 7, 7)
        wide = torch.nn.functional.pad(one.unsqueeze(1), (3, 3, 3, 3), mode="reflect")
        assert torch.allclose(torch.nn.functional.conv2d(wide, kernel)[:, 0], found, atol=1e-12)  # fp64


def test_noise_has_its_deviation():
    x = torch.full((50, 1, 20, 20), 0.5)
    found = Augment(noise=0.1)(x, draws()) - x
    # 20,000 draws: the deviation of their deviation is 0.1 / sqrt(40000) = 5e-4; five of them
    assert abs(float(found.std()) - 0.1) < 2.5e-3 and abs(float(found.mean())) < 4e-3


def test_with_a_generator_for_each_task_a_task_does_not_depend_on_the_others():
    x = images(12).view(4, 3, 3, 12, 12)
    whole = STRONG(x, [draws(i) for i in range(4)])
    for task in range(4):
        alone = STRONG(x[task : task + 1], [draws(task)])
        # the same numbers are drawn; kernels may sum a batch of another size in another order
        assert torch.allclose(whole[task : task + 1], alone, atol=1e-6)
    with pytest.raises(SpoliaError, match="3 generators for a batch of 4"):
        STRONG(x, [draws(i) for i in range(3)])


def test_views_differ_and_have_a_dimension_of_their_own():
    x = images(12, dtype=torch.uint8).view(2, 6, 3, 12, 12)
    views = PAPER.views(x, 3, [draws(0), draws(1)])
    assert views.shape == (2, 3, 6, 3, 12, 12) and views.dtype == torch.uint8
    assert not torch.equal(views[:, 0], views[:, 1])
    assert SHAKEN.views(x[0], 2, draws()).shape == (2, 6, 3, 12, 12)
    same = Augment().views(x, 3, draws())
    assert all(torch.equal(same[:, view], x) for view in range(3))


def test_stronger_scenarios_change_more():
    x = images(40, side=32)
    for kind in ("corrupted", "cropped", "recoloured", "mixed", "shaken"):
        change = [float((scenario(kind, s)(x, draws()) - x).abs().mean()) for s in ("weak", "strong")]
        assert 0 < change[0] < change[1], kind


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: scenario("corupted"), "did you mean `corrupted`"),
        (lambda: scenario("mixed", "srong"), "did you mean `strong`"),
        (lambda: PAPER(torch.zeros(2, 64), draws()), "are no images"),
        (lambda: PAPER(torch.zeros(2, 4, 8, 8), draws()), "1 or 3 channels"),
    ],
)
def test_what_cannot_be_is_told(make, word):
    with pytest.raises(SpoliaError, match=word):
        make()

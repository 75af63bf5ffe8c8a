"""Views against torchvision: the same parameters give the same pixels, and the draws have the same distribution."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import Tensor

from coss_eval.errors import UsageError
from coss_eval.training.methods import METHODS, method_class
from coss_eval.views.blur import blur_by_convolution, blur_by_shifts, gaussian_blur
from coss_eval.views.colour import greyscale_, jitter_, rotate_hue_, solarise_
from coss_eval.views.make import (
    Augmentation,
    ViewParameters,
    apply,
    byol_pair,
    draw,
    finish_views,
    make_views,
)
from coss_eval.views.random_crop import crop_batch, crop_each

EVERYTHING = Augmentation(
    size=24, hue=0.5, brightness=0.8, contrast=0.8, saturation=0.8, jitter=0.9, blur=0.5, solarise=0.5
)
JITTERS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
CLOSE = 1e-4  # of the range: the tolerance asked for is 2 / 255


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 images of smooth colours with noise and, so that no case is left out, some flat grey ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images += 0.1 * torch.randn(count, 3, height, width, generator=generator)
    images[0] = 0.5
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def drawn(
    augmentation: Augmentation, count: int, sizes: tuple[int, int] | Tensor = (40, 40), **place: int
) -> ViewParameters:
    return draw(augmentation, torch.arange(count), sizes, **{"seed": 0, "epoch": 0, "view": 0} | place)


def at(values: Tensor | None, row: int) -> bool:
    """Whether something happens to an image; None stands for never."""
    return values is not None and bool(values[row])


def by_torchvision(image: Tensor, p: ViewParameters, row: int) -> Tensor:
    """One view (3, S, S) of one float image (3, H, W), with the parameters of ``row``."""
    assert p.boxes is not None
    x = F.resized_crop(image, *p.boxes[row].tolist(), size=[p.size, p.size], antialias=True)
    if p.flip[row]:
        x = F.horizontal_flip(x)
    if at(p.jitter, row):
        for operation in p.order[row].tolist():
            x = JITTERS[operation](x, p.factors[row, operation].item())
    if at(p.greyscale, row):
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if at(p.sigma, row):
        x = F.gaussian_blur(x, [p.kernel, p.kernel], [p.sigma[row].item()])
    return F.solarize(x, 0.5 if x.is_floating_point() else 128) if at(p.solarise, row) else x


def reference(images: Tensor, p: ViewParameters) -> Tensor:
    return torch.stack([by_torchvision(image, p, row) for row, image in enumerate(images.float().div(255))])


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 57), (9, 12)])
def test_the_whole_chain_equals_torchvision(height: int, width: int) -> None:
    images = pictures(60, height, width)
    p = drawn(EVERYTHING, 60, (height, width))
    assert torch.allclose(apply(images, p), reference(images, p), atol=CLOSE)


@pytest.mark.parametrize(
    "augmentation", [EVERYTHING, *byol_pair(24).full, Augmentation(size=24, jitter=0, greyscale=0)]
)
def test_work_of_one_shape_for_every_draw_makes_the_same_views(augmentation: Augmentation) -> None:
    """As on a GPU: all images are worked on, and those that an operation does not concern are put back."""
    images, p = pictures(40, 32, 32), drawn(augmentation, 40, (32, 32))
    normal = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    static = p.on(torch.device("cpu"))
    assert static.static
    assert (static.sigma is None) == (augmentation.blur == 0)
    torch.testing.assert_close(apply(images, static, **normal), apply(images, p, **normal), atol=CLOSE, rtol=0)


def test_a_large_view_equals_torchvision() -> None:
    images = pictures(6, 180, 150)
    p = drawn(dataclasses.replace(EVERYTHING, size=140, blur=1.0), 6, (180, 150))
    assert torch.allclose(apply(images, p), reference(images, p), atol=2 * CLOSE)


def test_the_chain_on_uint8_differs_by_its_roundings_only() -> None:
    """torchvision truncates to uint8 after each operation, up to four of them with factors around 1.4."""
    images = pictures(40, 40, 40)
    p = drawn(byol_pair(24).full[1], 40)
    chain = torch.stack([by_torchvision(image, p, row) for row, image in enumerate(images)]).float() / 255
    difference = (apply(images, p) - chain).abs() * 255
    assert difference.mean() < 1.5
    assert difference.quantile(0.99) < 4


@pytest.mark.parametrize("operation", range(4))
def test_each_jitter_operation_equals_torchvision_on_uint8_within_2(operation: int) -> None:
    images = pictures(30, 20, 20)
    factors = torch.ones(30, 4)
    factors[:, 3] = 0
    factors[:, operation] = torch.linspace(-0.5, 0.5, 30) if operation == 3 else torch.linspace(0, 1.8, 30)
    x = images.float() / 255
    jitter_(x, torch.arange(4).expand(30, 4), factors, torch.ones(30, dtype=torch.bool))
    expected = [JITTERS[operation](image, factors[row, operation].item()) for row, image in enumerate(images)]
    assert (x * 255 - torch.stack(expected)).abs().max() <= 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order(order: tuple[int, ...]) -> None:
    x = pictures(5, 12, 12).float() / 255
    factors = torch.tensor(
        [[1.3, 0.5, 1.7, 0.2], [0.4, 1.6, 0.2, -0.3], [1, 1, 1, 0.5], [1.8, 1.8, 1.8, 0], [1, 0, 0, 0.1]]
    )
    expected = x.clone()
    for operation in order:
        expected = torch.stack(
            [JITTERS[operation](e, f[operation].item()) for e, f in zip(expected, factors, strict=True)]
        )
    untouched = x[4].clone()
    jitter_(x, torch.tensor(order).expand(5, 4), factors, torch.tensor([True] * 4 + [False]))
    assert torch.allclose(x[:4], expected[:4], atol=CLOSE)
    assert torch.equal(x[4], untouched)


def test_hue_on_every_kind_of_colour() -> None:
    """All 6^3 colours with channels on a coarse grid: ties, greys, black and white among them."""
    grid = torch.linspace(0, 1, 6)
    colours = torch.cartesian_prod(grid, grid, grid).T.reshape(1, 3, 6, 36)
    turns = torch.linspace(-0.5, 0.5, 21)
    x = colours.repeat(21, 1, 1, 1)
    rotate_hue_(x, turns)
    expected = torch.cat([F.adjust_hue(colours, turn.item()) for turn in turns])
    assert torch.allclose(x, expected, atol=1e-5)


def test_greyscale_and_solarise() -> None:
    x = pictures(4, 8, 8).float() / 255
    grey, solarised = x.clone(), x.clone()
    greyscale_(grey)
    solarise_(solarised)
    assert torch.allclose(grey, F.rgb_to_grayscale(x, num_output_channels=3), atol=1e-6)
    assert torch.equal(solarised, F.solarize(x, 0.5))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_crops_equal_torchvision_for_any_box(data: st.DataObject) -> None:
    height, width, size = (data.draw(st.integers(low, 40)) for low in (2, 2, 1))
    box_height, box_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - box_height)), data.draw(st.integers(0, width - box_width))
    flipped = data.draw(st.booleans())
    images = pictures(2, height, width)
    boxes, flip = torch.tensor([[top, left, box_height, box_width]] * 2), torch.tensor([flipped] * 2)
    expected = F.resized_crop(images.float() / 255, top, left, box_height, box_width, [size, size], antialias=True)
    expected = expected.flip(-1) if flipped else expected
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)  # as SVHN and STL-10 are stored
    for layout in (images, images.contiguous(memory_format=torch.channels_last), transposed):
        for crop in (crop_batch, crop_each):
            assert torch.allclose(crop(layout, boxes, flip, size), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel"), [(5, 9), (16, 1), (32, 3), (64, 23)])
def test_blur_equals_torchvision(size: int, kernel: int) -> None:
    x = pictures(5, size, size).float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.6, 2.0])
    expected = torch.stack([F.gaussian_blur(i, [kernel, kernel], [s.item()]) for i, s in zip(x, sigma, strict=True)])
    offsets = torch.arange(kernel) - kernel // 2
    taps = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1)
    assert torch.allclose(gaussian_blur(x, sigma, kernel), expected, atol=CLOSE)
    assert torch.allclose(blur_by_shifts(x, taps), expected, atol=CLOSE)
    assert torch.allclose(blur_by_convolution(x, taps), expected, atol=1e-5)


def test_normalisation_layout_and_range() -> None:
    images, p = pictures(9, 40, 40), drawn(EVERYTHING, 9)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain = apply(images, p, channels_last=False)
    normalised = apply(images, p, mean=mean, std=std)
    assert plain.is_contiguous()
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert plain.min() >= -1e-6
    assert plain.max() <= 1 + 1e-6
    assert torch.allclose(normalised, F.normalize(plain, mean, std), atol=1e-5)


def test_a_view_does_not_depend_on_the_batch_or_its_order() -> None:
    images, ids, views = pictures(20, 40, 40), torch.arange(20) * 7919, method_class("dino").views.at(32, small_size=16)
    whole = make_views(images, ids, views, seed=3, epoch=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:11]
    parts = make_views(images[order], ids[order], views, seed=3, epoch=5)
    for view, part in zip(whole, parts, strict=True):
        assert torch.allclose(view[order], part, atol=CLOSE)
    again = make_views(images, ids, views, seed=3, epoch=5)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_each_draw_anew(change: dict[str, int]) -> None:
    one, other = drawn(EVERYTHING, 200), drawn(EVERYTHING, 200, **change)
    for field in ("boxes", "order", "factors", "sigma"):
        assert not torch.equal(getattr(one, field), getattr(other, field))


def test_images_of_several_sizes() -> None:
    images = [pictures(2, height, width)[1] for height, width in ((40, 30), (13, 57), (25, 25))]
    views = byol_pair(24)
    found = make_views(images, torch.arange(3), views, seed=0, epoch=0)
    for number, augmentation in enumerate(views):
        p = drawn(augmentation, 3, torch.tensor([image.shape[1:] for image in images]), view=number)
        expected = [by_torchvision(image.float() / 255, p, row) for row, image in enumerate(images)]
        assert torch.allclose(found[number], torch.stack(expected), atol=CLOSE)


def test_cropped_elsewhere_and_finished_here() -> None:
    """The colour operations after a crop that a worker made equal the views made in one go, to the crop's rounding."""
    images, ids, views = pictures(8, 40, 40), torch.arange(8), byol_pair(24)
    plain = [dataclasses.replace(a, jitter=0, greyscale=0, blur=0, solarise=0) for a in views]
    crops = [
        apply(images, draw(a, ids, (40, 40), seed=0, epoch=0, view=n)).mul(255).round().to(torch.uint8)
        for n, a in enumerate(plain)
    ]
    finished = finish_views(crops, ids, views, seed=0, epoch=0)
    for one, other in zip(finished, make_views(images, ids, views, seed=0, epoch=0), strict=True):
        assert (one - other).abs().max() < 4 / 255
        assert (one - other).abs().mean() < 0.5 / 255


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 90), (200, 60)])
@pytest.mark.parametrize("min_scale", [0.08, 0.5, 1.0])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, min_scale: float) -> None:
    count = 3000
    augmentation = Augmentation(size=32, crop_min_scale=min_scale)
    boxes = drawn(augmentation, count, (height, width)).boxes
    assert boxes is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform, image = T.RandomResizedCrop(32, scale=(min_scale, 1.0)), torch.empty(3, height, width)
        theirs = np.array([list(transform.make_params([image]).values()) for _ in range(count)])
    ours = boxes.numpy()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for of in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks_2samp(of(ours), of(theirs)).statistic < 0.05


def test_jitter_is_distributed_as_torchvisions() -> None:
    count = 4000
    a = Augmentation(size=32, brightness=0.4, contrast=1.3, saturation=0.2, hue=0.1)
    ours = drawn(a, count)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = T.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        theirs = [transform.make_params([]) for _ in range(count)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for column, name in enumerate(names):
        assert ks_2samp(ours.factors[:, column].numpy(), [p[name] for p in theirs]).statistic < 0.04
    permutations = (ours.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(permutations) == 24
    assert permutations.min() > count / 24 * 0.7


def test_rates_of_the_draws() -> None:
    p = drawn(Augmentation(size=32, blur=0.3, solarise=0.1), 20_000)
    assert p.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert p.jitter.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert p.greyscale.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert p.solarise.float().mean().item() == pytest.approx(0.1, abs=0.02)
    blurred = p.sigma > 0
    assert blurred.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert p.sigma[blurred].mean().item() == pytest.approx(1.05, abs=0.03)


def numbers_drawn(seed: int, epoch: int, view: int, count: int) -> Tensor:
    """Every draw (count, 16): boxes by area, ratio and place, the jitter's order by what is first and last."""
    halves = Augmentation(size=32, jitter=0.5, greyscale=0.5, blur=0.5, solarise=0.5)
    p = drawn(halves, count, (400, 400), seed=seed, epoch=epoch, view=view)
    assert p.boxes is not None
    top, left, height, width = p.boxes.double().T
    blurred = p.sigma > 0
    sigma = p.sigma.where(blurred, p.sigma[blurred].mean())
    boxes = (height * width, (width / height).log(), (top + 0.5) / (401 - height), (left + 0.5) / (401 - width))
    chances = (p.flip, p.jitter, p.greyscale, blurred, p.solarise)
    columns = (*boxes, *chances, *p.factors.T, sigma, p.order[:, 0] == 0, p.order[:, 3] == 3)
    return torch.stack([column.double() for column in columns], 1)


def test_draws_are_independent_of_each_other_and_over_seeds_epochs_and_views() -> None:
    count, places = 20_000, ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    drawn_there = torch.cat([numbers_drawn(*place, count) for place in places], 1)  # (N, 4 * 16)
    z = torch.corrcoef(drawn_there.T).fill_diagonal_(0) * count**0.5  # standard normal where independent
    for first in range(14, z.shape[0], 16):  # what is first in the jitter's order says something about the last
        z[first, first + 1] = z[first + 1, first] = 0
    assert z.abs().max() < 5


@pytest.mark.parametrize("variant", ["imagenet", "cifar"])
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_makes_its_views(method: str, variant: str) -> None:
    views = method_class(method).views.at(32, variant=variant)
    made = make_views(pictures(4, 32, 32), torch.arange(4), views, seed=0, epoch=0)
    assert [tuple(view.shape[2:]) for view in made] == [(a.size, a.size) for a in views]
    assert len(made) == len(views) == {"supervised": 1, "dino": 2 if variant == "cifar" else 10}.get(method, 2)


SMALL = (0.4, 0.4, 0.2, 0.1, 0.2, 0.5, 0.0, 0.05)
ASYMMETRIC = ((0.4, 0.4, 0.2, 0.1, 0.2, 1.0, 0.0, 0.08), (0.4, 0.4, 0.2, 0.1, 0.2, 0.1, 0.2, 0.08))


@pytest.mark.parametrize(
    ("method", "expected"),  # of each view, in the order of the fields below
    [
        ("byol", ASYMMETRIC),
        ("barlow", ASYMMETRIC),
        ("mocov3", tuple((*values[:-1], 0.2) for values in ASYMMETRIC)),
        ("dino", tuple((*values[:-1], 0.14) for values in ASYMMETRIC) + (SMALL,) * 8),
        ("simclr", ((0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0, 0.08),) * 2),
        ("simsiam", ((0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.0, 0.2),) * 2),
        ("vicreg", ((0.4, 0.4, 0.2, 0.1, 0.2, 0.5, 0.1, 0.08),) * 2),
        ("supervised", ((0.4, 0.4, 0.2, 0.1, 0.0, 0.0, 0.0, 0.08),)),
    ],
)
def test_recipes_are_the_methods_own(method: str, expected: tuple[tuple[float, ...], ...]) -> None:
    views = method_class(method).views.at(224)
    fields = ("brightness", "contrast", "saturation", "hue", "greyscale", "blur", "solarise", "crop_min_scale")
    assert tuple(tuple(getattr(view, field) for field in fields) for view in views) == expected
    assert {view.jitter for view in views} == {0.0 if method == "supervised" else 0.8}


def test_recipes_hold_the_published_values() -> None:
    first, second = byol_pair(224).full
    assert (first.kernel, first.blur, first.solarise, second.blur, second.solarise) == (23, 1.0, 0.0, 0.1, 0.2)
    dino = method_class("dino").views.at(224)
    assert [a.size for a in dino] == [224] * 2 + [96] * 8
    assert (dino.full[0].crop_min_scale, dino.small[0].crop_min_scale, dino.small[0].crop_max_scale) == (
        0.14,
        0.05,
        0.14,
    )
    assert method_class("mocov3").views.at(224).full[0].crop_min_scale == 0.2
    assert method_class("vicreg").views.at(32, variant="cifar").full[0].crop_min_scale == 0.2
    assert method_class("byol").views.at(64, crop_min_scale=0.5) == byol_pair(64, 0.5)
    assert byol_pair(32, blur=False) == method_class("byol").views.at(32, variant="cifar")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Augmentation(size=32, crop_min_scale=0.0), "crop_min_scale"),
        (lambda: Augmentation(size=32, blur=1.5), "blur to be a probability"),
        (lambda: Augmentation(size=32, hue=0.6), "hue"),
        (lambda: Augmentation(size=4, blur_kernel=9), "blur_kernel"),
        (lambda: Augmentation(size=32, blur_sigma=(0.0, 2.0)), "blur_sigma"),
        (lambda: method_class("byoll").views.at(32), "did you mean byol"),
        (lambda: method_class("byol").views.at(32, variant="cifar10"), "did you mean cifar"),
        (lambda: method_class("dino").views.at(224, crop_min_scale=0.02), "crop_min_scale, .* small_views 0"),
        (lambda: apply(pictures(2, 8, 8), drawn(EVERYTHING, 3)), "as many images"),
        (lambda: finish_views([pictures(2, 8, 8)] * 2, torch.arange(2), byol_pair(24), seed=0, epoch=0), "cropped to"),
    ],
)
def test_wrong_calls_are_refused(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]

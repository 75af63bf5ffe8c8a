"""The parts of the native engine, each against a plain or published equivalent."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.stats import kstest, poisson
from torch import Tensor

from coss_eval.corruptions.blur import disk, scatter_map, zoomed
from coss_eval.corruptions.digital import _affine, _displace
from coss_eval.corruptions.draws import Draws, sample_keys
from coss_eval.corruptions.filters import Border, border_index, gaussian_taps, smooth, smooth_by_taps
from coss_eval.corruptions.noise import shot_tables
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.corruptions.severity import TABLES
from coss_eval.corruptions.weather import frost_textures

CPU = torch.device("cpu")


def test_draws_are_uniform_normal_and_independent() -> None:
    keys = sample_keys(torch.arange(300), 2**63 + 1)
    draws = Draws(keys)
    uniform, normal = draws.uniform(1000).double().numpy(), draws.normal(1000).double().numpy()
    assert kstest(uniform.ravel(), "uniform").pvalue > 0.001
    assert kstest(normal.ravel(), "norm").pvalue > 0.001
    assert np.array_equal(Draws(keys).signed(1000).numpy(), (2 * uniform - 1).astype(np.float32))
    assert uniform.min() > 0
    assert uniform.max() < 1
    for values in (uniform - 0.5, normal):
        between = np.corrcoef(values) - np.eye(len(values))
        assert np.abs(between).max() < 6 / np.sqrt(1000)  # 45,000 pairs, each N(0, 1/1000)
        for lag in (1, 2, 32, 224):
            assert abs(np.corrcoef(values[:, lag:].ravel(), values[:, :-lag].ravel())[0, 1]) < 5 / np.sqrt(values.size)


def test_draws_continue_where_they_stopped_and_keys_differ() -> None:
    keys = sample_keys(torch.tensor([0, 1, -1, 2**62]), 5)
    assert keys.unique().numel() == 8
    whole, parts = Draws(keys), Draws(keys)
    assert torch.equal(whole.bits(10), torch.cat([parts.bits(4), parts.bits(3, 2)[:].flatten(1)], dim=1))
    counts = Draws(keys).integers(6, 60_000).flatten().bincount(minlength=6)
    assert counts.numel() == 6
    assert (counts - 40_000).abs().max() < 1000


@pytest.mark.parametrize(
    ("border", "mode"), [("nearest", "edge"), ("symmetric", "symmetric"), ("reflect101", "reflect")]
)
def test_borders_are_numpys(border: str, mode: str) -> None:
    for length, before, after in [(5, 2, 3), (4, 11, 17), (9, 0, 0)]:
        expected = np.pad(np.arange(length), (before, after), mode=mode)  # type: ignore[call-overload]
        assert border_index(length, before, after, border, CPU).tolist() == expected.tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 20.0])
@pytest.mark.parametrize(("border", "mode"), [("nearest", "nearest"), ("symmetric", "reflect")])
def test_smooth_is_scipys(sigma: float, border: Border, mode: str) -> None:
    x = torch.rand(2, 40, 33, generator=torch.Generator().manual_seed(0))
    expected = [scipy.ndimage.gaussian_filter(one.numpy(), sigma, mode=mode, truncate=3) for one in x.double()]
    got = smooth(x, sigma, truncate=3, border=border)
    assert np.abs(got.numpy() - np.stack(expected)).max() < 1e-5
    taps = gaussian_taps(sigma, truncate=3)
    off_cpu = smooth_by_taps(x, taps, taps, border)
    assert np.abs(off_cpu.numpy() - np.stack(expected)).max() < 1e-5


@pytest.mark.parametrize("table", TABLES)
def test_disk_is_opencvs(table: str) -> None:
    for severity in range(1, 6):
        radius, smoothing = CORRUPTIONS["defocus_blur"].parameters(severity, table)  # type: ignore[arg-type]
        reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
        axis = np.arange(-reach, reach + 1)
        aliased = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
        expected = cv2.GaussianBlur(aliased / aliased.sum(), (size, size), sigmaX=smoothing)
        assert np.abs(disk(radius, smoothing).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("factor", [1, 1.06, 1.3, 2.25, 4.5])
def test_zoom_is_scipys(factor: float) -> None:
    x = np.random.default_rng(0).random((46, 61))
    rows, columns = (int(np.ceil(side / factor)) for side in x.shape)
    top, left = (46 - rows) // 2, (61 - columns) // 2
    expected = scipy.ndimage.zoom(x[top : top + rows, left : left + columns], factor, order=1)
    whole = zoomed(torch.from_numpy(x).float(), factor, None, centred=False).numpy()
    assert whole.shape == expected.shape
    assert np.abs(whole - expected)[:-1, :-1].max() < 1e-5  # scipy's last row may be black by rounding
    down, right = (expected.shape[0] - 46) // 2, (expected.shape[1] - 61) // 2
    centred = zoomed(torch.from_numpy(x).float(), factor, (46, 61), centred=True).numpy()
    assert np.abs(centred - expected[down : down + 46, right : right + 61])[:-1, :-1].max() < 1e-5


def glass_blur_loop(image: Tensor, displacement: Tensor, reach: int) -> Tensor:
    """The published loop on (3, H, W), readable and slow."""
    x = image.permute(1, 2, 0).clone()  # (H, W, 3)
    height, width = x.shape[:2]
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            right, down = displacement[:, row, column].tolist()
            x[row, column] = x[row + down, column + right]
    return x.permute(2, 0, 1)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_pointer_doubling_is_the_glass_loop(images: Callable[..., Tensor], severity: int) -> None:
    reach = int(CORRUPTIONS["glass_blur"].parameters(severity, "imagenet")[1])
    image = images(1, 45, 38)
    displacement = Draws(sample_keys(torch.tensor([severity]), 1)).integers(2 * reach, 2, 45, 38) - reach
    gathered = image.flatten(2)[0][:, scatter_map(displacement, reach)[0]].view(3, 45, 38)
    assert torch.equal(gathered, glass_blur_loop(image[0], displacement[0], reach))


def test_displacement_is_map_coordinates(images: Callable[..., Tensor]) -> None:
    x = images(1, 40, 52).float()
    moved = Draws(sample_keys(torch.tensor([0]), 1)).normal(2, 40, 52).mul_(30)
    right, down = moved[0].double().numpy()
    rows, columns = np.mgrid[:40, :52]
    for channel, got in zip(x[0].numpy(), _displace(x, moved)[0].numpy(), strict=True):
        expected = scipy.ndimage.map_coordinates(channel, [rows + down, columns + right], order=1, mode="reflect")
        assert np.abs(got - expected).max() < 0.02


def test_affine_is_opencvs(images: Callable[..., Tensor]) -> None:
    x = images(1, 60, 60).float()
    x = smooth(x, 2.0)  # OpenCV interpolates in steps of 1/32 pixel
    jitter = Draws(sample_keys(torch.tensor([0]), 2)).uniform(3, 2).mul_(12).sub_(6)
    points = np.array([[50, 50], [50, 10], [10, 10]], np.float32)
    matrix = cv2.getAffineTransform(points, points + jitter[0].numpy())
    expected = cv2.warpAffine(x[0].permute(1, 2, 0).numpy(), matrix, (60, 60), borderMode=cv2.BORDER_REFLECT_101)
    assert np.abs(_affine(x, jitter)[0].permute(1, 2, 0).numpy() - expected).mean() < 0.2


@pytest.mark.parametrize("photons", [3, 60, 500])
def test_alias_tables_hold_the_poisson_distributions(photons: int) -> None:
    threshold, detour, value = (table.numpy().astype(np.int64) for table in shot_tables(photons))
    cells = threshold.shape[1]
    half = 2**31 // cells
    share = (threshold + half + (threshold == 2**31 - 1)) / (2 * half)  # of each cell's own outcome
    mass = share / cells
    for row in range(256):
        np.add.at(mass[row], np.arange(cells) + detour[row], (1 - share[row]) / cells)
    rates = np.arange(256)[:, None] / 255 * photons
    assert np.abs(mass[:, :photons] - poisson.pmf(np.arange(photons), rates)).max() < 1e-6
    assert np.abs(mass[:, photons] - poisson.sf(photons - 1, rates[:, 0])).max() < 1e-6
    assert value[:photons].tolist() == [int(count / photons * 255) for count in range(photons)]
    assert set(value[photons:]) == {255}


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (512, 300), (40, 512)])
@pytest.mark.parametrize("enlarged", [True, False])
def test_frost_textures_leave_room_to_crop(size: tuple[int, int], enlarged: bool) -> None:
    for scale in (0.2, 0.3, 1.0):
        textures = frost_textures(*size, scale, enlarged)
        assert len(textures) == 5
        for texture in textures:
            assert texture.shape[-2] > size[0]
            assert texture.shape[-1] > size[1]

"""The native engine against imagecorruptions: the same draws give the same pixels, free draws the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scripted import Recorder, reference_and_draws
from torch import Tensor

from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.noise import shot_tables
from coss_eval.corruptions.reference import corrupt_batch, run_published
from coss_eval.corruptions.registry import CORRUPTIONS

SEVERITIES = (1, 2, 3, 4, 5)


@pytest.fixture(scope="session")
def photograph(shared_data: Path) -> np.ndarray:
    """A 224 px ImageNet photograph, uint8 (224, 224, 3)."""
    path = sorted((shared_data / "imagenet-samples").glob("*.JPEG"))[3]
    return np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (224, 224)))


@pytest.fixture(scope="session")
def synthetic(images: Callable[..., Tensor]) -> np.ndarray:
    return images(1, 66, 90)[0].permute(1, 2, 0).numpy()


def apply_native(image: np.ndarray, name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """The reference's result and the native one with the reference's draws, both (H, W, 3)."""
    expected, draws = reference_and_draws(image, name, severity, seed=severity)
    batch = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    got = CORRUPTIONS[name].function(batch, CORRUPTIONS[name].at(severity), draws)
    return expected, got[0].permute(1, 2, 0).numpy()


def assert_close(expected: np.ndarray, got: np.ndarray, mean: float) -> None:
    difference = np.abs(expected.astype(int) - got.astype(int))
    assert difference.mean() <= mean
    assert (difference > 3).mean() <= 0.001


@pytest.mark.slow
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "shot_noise"])
@pytest.mark.parametrize("source", ["photograph", "synthetic"])
def test_same_draws_same_pixels(request: pytest.FixtureRequest, source: str, name: str, severity: int) -> None:
    expected, got = apply_native(request.getfixturevalue(source), name, severity)
    assert_close(expected, got, mean=1.0 if name == "jpeg_compression" else 0.5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_turns_counts_into_the_same_pixels(synthetic: np.ndarray, severity: int) -> None:
    recorder = Recorder(0)
    expected = run_published(synthetic, "shot_noise", severity, recorder, np.random.default_rng(0))
    photons = int(CORRUPTIONS["shot_noise"].parameters(severity, "imagenet")[0])
    value = shot_tables(photons)[2].numpy()
    assert np.array_equal(expected, value[np.minimum(recorder.calls[0][1], photons)])


RANDOM = (
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform", "spatter",
)  # fmt: skip


def statistics(batch: np.ndarray) -> np.ndarray:
    """Means over images (N, H, W, 3) of the mean, the variance, and the power in 6 rings of frequency."""
    x = batch.astype(np.float64)
    power = np.abs(np.fft.fft2(x - x.mean(axis=(1, 2), keepdims=True), axes=(1, 2))) ** 2
    power = power.mean(axis=(0, 3))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(x.shape[1]), np.fft.fftfreq(x.shape[2]), indexing="ij"))
    edges = np.linspace(0, 0.5, 7)
    rings = [power[(frequency > low) & (frequency <= high)].mean() for low, high in pairwise(edges)]
    return np.array([x.mean(), x.var(axis=(1, 2)).mean(), *rings])


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_same_statistics_over_seeds(images: Callable[..., Tensor], name: str) -> None:
    count = {"frost": 600, "fog": 1000, "motion_blur": 1000, "snow": 1000}.get(name, 400)
    image = images(1, 40, 40)
    ids = torch.arange(count)
    got = corrupt(image.expand(count, -1, -1, -1), name, 3, ids, table="imagenet").permute(0, 2, 3, 1).numpy()
    pixels = np.broadcast_to(image[0].permute(1, 2, 0).numpy(), (count, 40, 40, 3))
    expected = corrupt_batch(pixels, name, 3, ids.numpy())
    assert statistics(got) == pytest.approx(statistics(expected), rel=0.02)

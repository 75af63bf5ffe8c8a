"""The embedded sets never change: every number of the quickstart depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import coss_eval as ce
from coss_eval.data.open import load_dataset


def test_digits_are_fixed() -> None:
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1346, 451)
    assert data.classes == tuple("0123456789")
    assert data.train.native_size == data.test.native_size == (32, 32)
    # of the content of all images; before, of 64
    assert data.train.fingerprint == "40480f5756ca2d300b65b4f0fd777258"
    assert data.test.fingerprint == "8e05aad5fb777fbd459f453b9c85ed27"
    assert data.test.protocol() == {"size": [32, 32], "resize": "native"}


def test_digits_are_stratified_grey_and_full_range() -> None:
    data = load_dataset("digits")
    batch = next(iter(data.test.batches(batch_size=len(data.test))))
    assert batch.images.shape == (451, 3, 32, 32)
    assert (batch.images == batch.images[:, :1]).all()
    assert (batch.images.min(), batch.images.max()) == (0, 255)
    share = np.bincount(data.test.labels) / (np.bincount(data.test.labels) + np.bincount(data.train.labels))
    assert np.abs(share - 0.25).max() < 0.005
    assert not set(data.train.ids) & set(data.test.ids)


def test_scattered_digits_are_fixed_and_split_as_the_digits_are() -> None:
    plain, data = load_dataset("digits"), load_dataset("scattered-digits")
    assert (len(data.train), len(data.test)) == (3 * 1346, 451)
    assert data.classes == plain.classes
    assert data.test.protocol() == {"size": [64, 64], "resize": "native"}
    assert data.test.fingerprint == "5dd22820214ed66a53d80b07323db249"
    np.testing.assert_array_equal(data.test.labels, plain.test.labels)
    np.testing.assert_array_equal(data.train.labels, np.repeat(plain.train.labels, 3))
    assert len(set(data.train.ids) | set(data.test.ids)) == 3 * 1346 + 451


def test_a_scene_is_a_digit_light_or_dark_at_any_place_on_a_cluttered_ground_of_any_colour() -> None:
    batch = next(iter(load_dataset("scattered-digits").test.batches(batch_size=451)))
    images = batch.images.numpy().astype(float)
    ground = np.median(images, axis=(2, 3), keepdims=True)  # (N, 3, 1, 1)
    ink = np.abs(images - ground).max(1) > 60  # far beyond the clutter, which is 10 of 255
    rows, columns = np.nonzero(ink)[1:]
    assert (ink.any((1, 2))).mean() > 0.99
    assert {rows.min() < 6, rows.max() > 57, columns.min() < 8, columns.max() > 55} == {True}
    colours = ground[:, :, 0, 0] / 255
    assert colours.min(0).max() < 0.2 < 0.8 < colours.max(0).min()
    assert np.abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]).max() < 0.15  # each colour for itself
    contrasts = zip(images, ground, ink, strict=True)
    lighter = np.array([(image - level)[:, where].mean() > 0 for image, level, where in contrasts])
    assert 0.4 < lighter.mean() < 0.6
    brightness = colours.mean(1)
    clear = np.abs(brightness - 0.5) > 0.05  # the median of an image is a little off its ground
    np.testing.assert_array_equal(lighter[clear], brightness[clear] < 0.5)
    clutter = np.array([np.median(image[:, ~where].std(1)) for image, where in zip(images, ink, strict=True)])
    assert 8 < np.median(clutter) < 20


@pytest.mark.slow
def test_training_on_scattered_digits_is_seen_by_a_probe_and_by_neighbours(tmp_path: Path) -> None:
    """What the demonstration shows; results/quickstart-seeds has it over five seeds."""
    data = load_dataset("scattered-digits")
    model = ce.train(
        "simclr", data, preset="scattered-digits-tiny", out=tmp_path / "run", device="cpu", quiet=True, epochs=6
    )
    both = [model, model.untrained(seed=0)]
    table = ce.evaluate(both, data, ["probe"], out=tmp_path / "results", device="cpu", quiet=True).table()
    for metric in ("top1", "knn_top1"):
        trained, untrained = table[(table["metric"] == metric) & table["labels"].isna()]["value"]
        assert trained > untrained + 0.1

"""The embedded default never changes: every number of the quickstart depends on it."""

from __future__ import annotations

import numpy as np

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

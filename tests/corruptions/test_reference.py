"""The adapter around imagecorruptions: everything runs, seeds control every draw, no package is patched."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.reference import corrupt_batch, corrupt_image, package_folder

DETERMINISTIC = {
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
}  # fmt: skip
CONDITIONS = [(name, severity) for name in NAMES for severity in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(("name", "severity"), CONDITIONS)
def test_runs_and_seeds_control_every_draw(images: Callable[..., Tensor], name: str, severity: int) -> None:
    batch, ids = images(2, 40, 48), torch.tensor([7, 2**62 + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = corrupt(batch, name, severity, ids, seed=1, backend="reference")
    assert first.dtype == torch.uint8
    assert first.shape == batch.shape
    assert not torch.equal(first, batch)
    assert torch.equal(first, corrupt(batch, name, severity, ids, seed=1, backend="reference"))
    alone = corrupt(batch[1:], name, severity, ids[1:], seed=1, backend="reference")
    assert torch.equal(first[1:], alone)
    for other in (
        corrupt(batch, name, severity, ids, seed=2, backend="reference"),
        corrupt(batch, name, severity, ids + 1, seed=1, backend="reference"),
    ):
        assert torch.equal(first, other) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 255])
def test_constant_images_give_no_nan(name: str, value: int) -> None:
    image = np.full((32, 32, 3), value, dtype=np.uint8)
    for severity in (1, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            corrupt_image(image, name, severity, sample_id=3)


def test_workers_and_batch_size_change_nothing(images: Callable[..., Tensor]) -> None:
    batch = images(64, 40, 40).permute(0, 2, 3, 1).numpy()
    ids = np.arange(64, dtype=np.int64)
    whole = corrupt_batch(batch, "impulse_noise", 2, ids, workers=2)
    for size in (1, 7):
        parts = [corrupt_batch(batch[i : i + size], "impulse_noise", 2, ids[i : i + size]) for i in range(0, 64, size)]
        assert np.array_equal(whole, np.concatenate(parts))
    order = np.random.default_rng(0).permutation(64)
    assert np.array_equal(whole[order], corrupt_batch(batch[order], "impulse_noise", 2, ids[order], workers=1))


@pytest.mark.slow
def test_nothing_is_patched() -> None:
    """In a fresh process: no package's names, modules, files or global generators change."""
    source = (package_folder() / "corruptions.py").read_bytes()
    script = """
import random, sys
import numpy as np, skimage, scipy.ndimage, skimage.filters, skimage.util
before = {module: dict(vars(module)) for module in (np, np.random, skimage.filters, skimage.util, scipy.ndimage)}
state, python_state = np.random.get_state()[1].tolist(), random.getstate()
from coss_eval.corruptions.reference import corrupt_image
from coss_eval.corruptions.names import NAMES
for name in NAMES:
    corrupt_image(np.full((32, 32, 3), 9, np.uint8), name, 1, 0)
for module, names in before.items():
    assert all(vars(module)[key] is value for key, value in names.items() if not key.startswith('__')), module
assert not hasattr(np, 'float_') or np.__version__ < '2'
assert np.random.get_state()[1].tolist() == state and random.getstate() == python_state
assert not {'pkg_resources', 'imagecorruptions', 'imagecorruptions.corruptions', 'torch'} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    after = (package_folder() / "corruptions.py").read_bytes()
    assert hashlib.sha256(source).digest() == hashlib.sha256(after).digest()
    assert not list(package_folder().glob("__pycache__/*_imagecorruptions*"))

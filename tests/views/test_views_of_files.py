"""Crops made by worker processes from image files: the same as the decoded images would give, whoever makes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import hubble_deep_field

from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.views.augmentation import Augmentation, Views
from coss_eval.views.crop_files import CroppedBatch, _cropped, _decoded, crop_batches
from coss_eval.views.make import apply, byol_pair, draw

VIEWS = Views((Augmentation(size=40, jitter=0, greyscale=0),), (Augmentation(size=16, jitter=0, greyscale=0),))


def smooth(height: int, width: int, seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Ten images of ten sizes, from 97 x 110 to 133 x 137 pixels, stored without loss."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(10):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth(97 + 4 * number, 110 + 3 * number, number).save(folder / f"{number}.png")
    return opened(root)


def opened(root: Path, *, skip_bad_images: bool = False) -> Split:
    """Class folders alone are a test split; which one it is does not matter here."""
    split = load_dataset(root, skip_bad_images=skip_bad_images).test
    assert split is not None
    return split


def parts(split: Split, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, len(split))) for start in range(0, len(split), size)]


def joined(batches: list[CroppedBatch]) -> list[torch.Tensor]:
    return [torch.cat([batch.views[view] for batch in batches]) for view in range(len(batches[0].views))]


def test_crops_equal_those_of_the_decoded_images(split: Split) -> None:
    (batch,) = crop_batches(split, parts(split, 10), VIEWS, seed=1, epoch=2, workers=0)
    files = (Image.open(io.BytesIO(split.images.raw(int(index)))) for index in split.indices)
    images = [torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1) for file in files]
    sizes = torch.tensor([image.shape[1:] for image in images])
    for number, (augmentation, crops) in enumerate(zip(VIEWS, batch.views, strict=True)):
        expected = apply(images, draw(augmentation, batch.ids, sizes, seed=1, epoch=2, view=number))
        assert (crops.float() / 255 - expected).abs().max() < 1 / 255
    assert batch.labels.tolist() == split.labels.tolist()


def test_neither_workers_nor_batches_change_the_crops(split: Split) -> None:
    alone = joined(list(crop_batches(split, parts(split, 10), VIEWS, seed=0, epoch=0, workers=0)))
    shared = joined(list(crop_batches(split, parts(split, 3), VIEWS, seed=0, epoch=0, workers=2)))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.slow
def test_large_jpegs_are_reduced_while_decoding(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    photo = Image.fromarray(hubble_deep_field())  # 872 x 1000, much of it a few pixels large
    photo.save(tmp_path / "a" / "photo.jpg", quality=95)
    photo.save(tmp_path / "a" / "same.png")
    split = opened(tmp_path)
    pairs = np.array([0, 1] * 20)
    ids = np.repeat(np.arange(20), 2)  # the same draws for both
    same = Split(split.name, split.classes, split.images, split.indices[pairs], split.labels[pairs], ids)
    (batch,) = crop_batches(same, [np.arange(40)], byol_pair(48), seed=0, epoch=0, workers=0)
    for crops in batch.views:
        difference = (crops[0::2].float() - crops[1::2].float()).abs()
        assert 0 < difference.mean() < 0.6
        assert difference.mean((1, 2, 3)).max() < 1


def test_no_crop_reaches_beyond_a_reduced_jpeg() -> None:
    file = io.BytesIO()
    Image.new("RGB", (750, 750), "white").save(file, "jpeg")
    box = np.array([[251, 100, 499, 499]])  # down to the last row; at a half, both its ends lie between two rows
    rgb, on_rgb = _decoded(Image.open(file), box, np.array([96]))
    assert rgb.size == (375, 375)
    assert _cropped(rgb, on_rgb[0], 96, False).min() == 255


def test_bad_images_stop_the_run_or_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(3):
        smooth(100, 120, number).save(folder / f"{number}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3.png").write_bytes(b"no image")
    with pytest.raises(CossError, match=r"2 of 4 test images cannot be read: .*1.png .*; .*3.png .*--skip-bad-images"):
        list(crop_batches(opened(tmp_path), [np.arange(4)], VIEWS, seed=0, epoch=0, workers=0))
    lenient = opened(tmp_path, skip_bad_images=True)
    (batch,) = crop_batches(lenient, [np.arange(4)], VIEWS, seed=0, epoch=0, workers=0)
    assert [len(view) for view in batch.views] == [2, 2]
    assert batch.ids.tolist() == lenient.ids[[0, 2]].tolist()
    assert len(lenient.bad_images) == 2


def test_sets_of_one_small_size_are_refused() -> None:
    digits = load_dataset("digits").train
    assert digits is not None
    with pytest.raises(UsageError, match="in memory"):
        list(crop_batches(digits, [np.arange(4)], VIEWS, seed=0, epoch=0))

"""The native engine's promises: an image's pixels depend on it, its id, the seed and the condition; on nothing else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.parallel import map_chunks
from coss_eval.corruptions.severity import TABLES

DETERMINISTIC = {
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
}  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(32, 32), (61, 47)])
@pytest.mark.parametrize("name", NAMES)
def test_batch_size_order_and_subset_change_nothing(
    images: Callable[..., Tensor], name: str, size: tuple[int, int], device: str
) -> None:
    batch, ids = images(64, *size).to(device), (torch.arange(64, device=device) * 2**57).roll(5)
    severity = 1 + NAMES.index(name) % 5
    whole = corrupt(batch, name, severity, ids, seed=3)
    for step in (1, 7):
        some = range(0, 64, step) if step == 7 else range(0, 64, 9)
        for start in some:
            part = slice(start, start + step)
            assert torch.equal(whole[part], corrupt(batch[part], name, severity, ids[part], seed=3)), (step, start)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(whole[order], corrupt(batch[order], name, severity, ids[order], seed=3))


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(images: Callable[..., Tensor], name: str) -> None:
    batch, ids, before = images(110, 80, 95), torch.arange(110), torch.get_num_threads()  # several chunks
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(corrupt(batch, name, 5, ids))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_each_of_several_threads_runs_torch_on_itself_alone(images: Callable[..., Tensor]) -> None:
    """Else there are as many threads of torch for each, and all of them wait for cores."""
    batch, seen, before = images(50, 224, 224), set(), torch.get_num_threads()

    def function(part: Tensor, keys: Tensor) -> Tensor:
        doubled = part * 2
        seen.add((threading.current_thread().name.partition("_")[0], torch.get_num_threads()))
        return doubled

    try:
        torch.set_num_threads(3)
        doubled = map_chunks(function, batch, torch.arange(50), image_by_image=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(doubled, batch * 2)
    assert seen == {("corruptions", 1)}


@pytest.mark.parametrize("name", NAMES)
def test_seed_id_and_severity_choose_the_draws(images: Callable[..., Tensor], name: str) -> None:
    batch, ids = images(1, 48, 48).expand(2, -1, -1, -1), torch.tensor([0, 1])
    first = corrupt(batch, name, 4, ids)
    assert torch.equal(first, corrupt(batch, name, 4, ids))
    assert torch.equal(first[0], first[1]) == (name in DETERMINISTIC)
    assert torch.equal(first, corrupt(batch, name, 4, ids, seed=1)) == (name in DETERMINISTIC)
    assert not torch.equal(first, corrupt(batch, name, 1, ids))


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_in_memory_does_not_matter(images: Callable[..., Tensor], name: str) -> None:
    batch, ids = images(3, 40, 40), torch.arange(3)
    expected = corrupt(batch, name, 3, ids)
    assert expected.is_contiguous()
    assert torch.equal(corrupt(batch.contiguous(memory_format=torch.channels_last), name, 3, ids), expected)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_motion_longer_than_a_small_image(images: Callable[..., Tensor], severity: int) -> None:
    """imagecorruptions cuts the kernel where it leaves the image: for one image, for all, or for none of a batch."""
    batch, ids = images(24, 32, 32), torch.arange(24)
    together = corrupt(batch, "motion_blur", severity, ids, table="imagenet")
    alone = [corrupt(batch[i : i + 1], "motion_blur", severity, ids[i : i + 1], table="imagenet") for i in range(24)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (64, 64), (512, 40), (224, 250)])
@pytest.mark.parametrize("name", NAMES)
def test_every_size_table_and_flavour(images: Callable[..., Tensor], name: str, size: tuple[int, int]) -> None:
    batch, ids = images(1, *size), torch.arange(1)
    variants = product(TABLES, ("imagecorruptions", "imagenet-c"))
    for severity, (table, flavour) in zip((1, 2, 3, 4, 5, 1), variants, strict=True):
        result = corrupt(batch, name, severity, ids, table=table, flavour=flavour)
        assert result.shape == batch.shape
        assert result.dtype == torch.uint8
        difference = (result.int() - batch.int()).abs().float().mean()
        assert 0 < difference < 140, (table, flavour, severity)  # the same image, changed


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("name", NAMES)
def test_black_and_white_images_stay_sane(name: str, value: int) -> None:
    batch = torch.full((1, 3, 32, 48), value, dtype=torch.uint8)
    for severity, table in product((1, 2, 3, 4, 5), TABLES):
        result = corrupt(batch, name, severity, torch.arange(1), table=table)
        if name in {"defocus_blur", "zoom_blur", "glass_blur", "gaussian_blur", "pixelate", "contrast"}:
            assert torch.equal(result, batch)
        if (name, value) in {("fog", 0), ("shot_noise", 0), ("speckle_noise", 0), ("saturate", 0)}:
            assert torch.equal(result, batch)
        if (name, value) in {("brightness", 255), ("spatter", 255)} and severity < 4:
            assert torch.equal(result, batch)


@pytest.mark.parametrize("name", NAMES)
def test_a_device_draws_what_the_cpu_draws(
    images: Callable[..., Tensor], name: str, either_device: torch.device
) -> None:
    batch, ids = images(4, 96, 80), torch.arange(4)
    on_cpu = corrupt(batch, name, 3, ids)
    there = corrupt(batch.to(either_device), name, 3, ids.to(either_device)).cpu()
    assert (on_cpu.int() - there.int()).abs().float().mean() < 0.5


def test_pixels_are_those_of_version_one(images: Callable[..., Tensor]) -> None:
    """Stored numbers rest on these pixels: a change here needs a new algorithm_version in the corruptions task.

    Impulse noise is all integers, so it is the same everywhere; it shows that keys and draws have not moved.
    """
    grey = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    result = corrupt(grey, "impulse_noise", 5, torch.tensor([0, 2**62]), seed=7, table="imagenet")
    digest = hashlib.blake2b(result.numpy().tobytes(), digest_size=8).hexdigest()
    assert digest == "039ee61e525700cd"

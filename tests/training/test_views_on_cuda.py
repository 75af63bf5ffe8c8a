"""Views on an accelerator: the CPU's pixels, and no step that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coss_eval.training.views import byol_pair, make_views, views_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("size", [32, 160])
def test_the_device_gives_the_cpus_pixels(size: int, full_precision: None) -> None:
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, views = torch.arange(12), views_for("dino", size, small_size=24)
    for here, there in zip(
        make_views(images, ids, views, seed=0, epoch=0),
        make_views(images.cuda(), ids, views, seed=0, epoch=0),
        strict=True,
    ):
        assert torch.allclose(here, there.cpu(), atol=1e-3)


def test_nothing_waits_for_the_device() -> None:
    images, ids = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8).cuda(), torch.arange(16)
    make_views(images, ids, byol_pair(64), seed=0, epoch=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(images, ids, byol_pair(64), seed=0, epoch=1, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    finally:
        torch.cuda.set_sync_debug_mode("default")

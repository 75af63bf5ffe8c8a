"""On an accelerator: the views have the CPU's pixels, and neither they nor a step wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import SMALL, TINY, digits

from coss_eval.training.config import resolve
from coss_eval.training.loop import Run
from coss_eval.training.methods import method_class, names
from coss_eval.views.make import byol_pair, make_views

pytestmark = pytest.mark.cuda


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("size", [32, 160])
def test_the_device_gives_the_cpus_pixels(size: int, full_precision: None) -> None:
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, views = torch.arange(12), method_class("dino").views.at(size, small_size=24)
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


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_no_step_waits_for_the_device(method: str, optimizer: str) -> None:
    base = method.removeprefix("co-")
    fields: dict[str, Any] = {"options": {} if base == "supervised" else SMALL[base], "optimizer": optimizer}
    if method.startswith("co-"):
        fields |= {"sampling": "subset", "local_grid": 2}
    run = Run(resolve(method, **{**TINY, "precision": "bf16", **fields}), digits(), Path(), torch.device("cuda"))
    batches = list(run.task.feed.epoch(0))
    run.take_step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run.take_step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


def test_the_feed_does_not_wait_between_steps() -> None:
    fields = {**TINY, "precision": "bf16", "options": SMALL["byol"], "sampling": "subset", "local_grid": 2}
    run = Run(resolve("co-byol", **fields), digits(), Path(), torch.device("cuda"))
    batches = run.task.feed.epoch(0)
    run.take_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run.take_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()

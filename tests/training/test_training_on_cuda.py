"""On an accelerator: the views have the CPU's pixels, and neither they nor a step wait for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_parts import DROPPING, SMALL, TINY, digits

from coss_eval.runtime.device import exact_float32
from coss_eval.training.config import resolve
from coss_eval.training.graph import WARM_UP, GraphedPasses
from coss_eval.training.loop import Run, random_layers
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
    for _ in range(WARM_UP + 1):  # and the capture, where there is one
        run.take_step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run.take_step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


def followed(method: str, *, graphed: bool, epochs: int = 2, **fields: Any) -> tuple[Tensor, Tensor]:
    """The losses (steps, 3) of some epochs of 5 steps and all weights at their end, by a graph or without."""
    base = method.removeprefix("co-")
    fields = {"options": {} if base == "supervised" else SMALL[base], **fields}
    run = Run(resolve(method, **{**TINY, **fields}), digits(160), Path(), torch.device("cuda"))
    run.graphed = GraphedPasses(run._passes, run.objective, run.device) if graphed else None
    losses = []
    for epoch in range(epochs):
        run.epoch = epoch
        with exact_float32(), random_layers(0, epoch, run.device):
            losses += [run.take_step(batch) for batch in run.task.feed.epoch(epoch)]
    assert run.graphed is None or (run.graphed._graph is not None and not run.graphed.failed)
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in run.objective.parameters()])


@pytest.mark.parametrize("method", names())
def test_a_captured_step_is_the_step(method: str) -> None:
    (losses, weights), (own_losses, own_weights) = (followed(method, graphed=graphed) for graphed in (False, True))
    assert losses[0, 0] != losses[-1, 0]
    torch.testing.assert_close(own_losses, losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own_weights, weights, rtol=1e-2, atol=1e-3)


def test_a_captured_step_draws_other_dropout_each_time() -> None:
    """The seed of the epoch and the place in it reach the graph: the same draws as without."""
    losses, own = (followed("byol", graphed=graphed, **DROPPING)[0] for graphed in (False, True))
    torch.testing.assert_close(own, losses, rtol=1e-3, atol=1e-4)


def test_passes_that_cannot_be_captured_are_called() -> None:
    module, notes = torch.nn.Linear(4, 4).cuda(), []

    def passes(views: Sequence[Tensor], labels: Tensor) -> Tensor:
        loss = module(views[0]).square().mean() * views[0].sum().item()  # waits for the device
        loss.backward()
        return loss.detach()

    graphed = GraphedPasses(passes, module, torch.device("cuda"), notes.append)
    views, labels = [torch.randn(8, 4, device="cuda")], torch.zeros(8, device="cuda")
    for _ in range(WARM_UP + 3):
        module.zero_grad()
        loss = graphed(views, labels)
        expected = module(views[0]).square().mean() * views[0].sum()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(module.weight.grad, torch.autograd.grad(expected, module.weight)[0])
    assert graphed.failed
    assert len(notes) == 1


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

"""On an accelerator: the views have the CPU's pixels, and neither they nor a step wait for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_parts import DROPPING, SMALL, TINY, digits

from coss_eval.runtime.device import exact_float32
from coss_eval.training.config import resolve
from coss_eval.training.graph import WARM_UP, GraphedPasses
from coss_eval.training.loop import Trainer, random_layers
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
    run = Trainer(resolve(method, **{**TINY, "precision": "bf16", **fields}), digits(), Path(), torch.device("cuda"))
    batches = list(run.setup.feed.epoch(0))
    for _ in range(WARM_UP + 1):  # and the capture, where there is one
        run.take_step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run.take_step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


def state_of(run: Trainer) -> dict[str, Tensor]:
    """Parameters and buffers, those that no checkpoint holds too."""
    return dict(chain(run.objective.named_parameters(), run.objective.named_buffers()))


OTHER = [{"small_views": 2, "small_size": 16}, DROPPING, {"static": False}]


@pytest.mark.parametrize(("method", "fields"), [*((m, {}) for m in names()), *(("co-dino", f) for f in OTHER)], ids=str)
def test_a_captured_step_is_the_step(method: str, fields: dict[str, Any]) -> None:
    """From the same state the same losses, gradients and buffers: with dropout, and views outside the graph, too."""
    static, fields = fields.get("static", True), {k: v for k, v in fields.items() if k != "static"}
    base = method.removeprefix("co-")
    given = {**TINY, "options": {} if base == "supervised" else SMALL[base], **fields}
    run = Trainer(resolve(method, **given), digits(160), Path(), torch.device("cuda"))
    graphed = run.graphed or GraphedPasses(run.objective, run.device)
    run.graphed, run.setup.feed.static = graphed, static
    batches = list(run.setup.feed.epoch(0))
    with exact_float32():
        for batch in batches:  # 5: the last two by the graph
            run.take_step(batch)
        before = {name: tensor.detach().clone() for name, tensor in state_of(run).items()}
        found = []
        for run.graphed in (graphed, None):
            for name, tensor in state_of(run).items():
                tensor.data.copy_(before[name])
            run.optimizer.zero_grad(set_to_none=True)
            with random_layers(0, 0, run.device):
                losses = run._backward(batches[0], wait=False)
            gradients = [p.grad.clone() for p in run.objective.parameters() if p.grad is not None]
            found.append((losses, gradients, [buffer.clone() for buffer in run.objective.buffers()]))
    assert graphed._graph is not None
    assert found[0][1]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_passes_that_cannot_be_captured_are_called() -> None:
    module, notes = torch.nn.Linear(4, 4).cuda(), []

    def passes(inputs: Sequence[Tensor]) -> Tensor:
        loss = module(inputs[0]).square().mean() * inputs[0].sum().item()  # waits for the device
        loss.backward()
        return loss.detach()

    graphed = GraphedPasses(module, torch.device("cuda"), notes.append)
    images = torch.randn(8, 4, device="cuda")
    for _ in range(WARM_UP + 3):
        module.zero_grad()
        loss = graphed(passes, [images])
        expected = module(images).square().mean() * images.sum()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(module.weight.grad, torch.autograd.grad(expected, module.weight)[0])
    assert graphed.failed
    assert len(notes) == 1


def test_the_feed_does_not_wait_between_steps() -> None:
    fields = {**TINY, "precision": "bf16", "options": SMALL["byol"], "sampling": "subset", "local_grid": 2}
    run = Trainer(resolve("co-byol", **fields), digits(), Path(), torch.device("cuda"))
    batches = run.setup.feed.epoch(0)
    run.take_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run.take_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()

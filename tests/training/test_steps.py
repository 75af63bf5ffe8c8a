"""Losses, gradients and optimiser steps against the same written out by hand, for every method and option."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local_term import multi_crop, objective, two_views
from torch import Tensor, nn
from training_parts import SMALL, TINY, digits

from coss_eval.training.config import resolve
from coss_eval.training.loop import Trainer
from coss_eval.training.method import mlp
from coss_eval.training.methods import METHODS, method_class
from coss_eval.training.optim import LARS, parameter_groups
from coss_eval.training.pretraining import Pretraining
from coss_eval.views.make import make_views

CPU = torch.device("cpu")
SELF_SUPERVISED = [name for name in METHODS if name != "supervised"]
SUMMED = ("byol", "mocov3")  # the two directions; the others average them
TEACHES = ("byol", "mocov3", "dino", "simsiam")  # no gradient flows into the targets


def by_hand(model: Pretraining, views: list[Tensor], regions: int, view: str) -> tuple[Tensor, Tensor]:
    """The global and the local term of two full views and small ones: each location against each region's target.

    The first two set targets for all other views.
    """
    term, branch = model.term, model.target or model._online()
    assert term is not None
    local_projector = branch.local_projector or branch.projector
    heads, compare, compare_local = term.heads or model.heads, *(model.method.comparison() for _ in range(2))
    if model.method.name == "simclr":
        compare_local = model.method.local_comparison()
    losses, weights, local_losses = [], [], []
    for s, t in [(s, t) for s in range(len(views)) for t in (0, 1) if s != t]:
        target = branch.projector(branch.backbone(views[t]))
        planes = branch.backbone.features(views[t] if view == "other" else views[s])  # (B, D, H, W)
        n = planes.shape[2] // regions
        parts = [planes[:, :, i * n : (i + 1) * n, j * n : (j + 1) * n] for i in range(regions) for j in range(regions)]
        # one BatchNorm over all regions, image by image
        pooled = torch.stack([branch.backbone.pool(part) for part in parts], 1).flatten(0, 1)
        local_targets = list(local_projector(pooled).unflatten(0, (len(planes), -1)).unbind(1))
        if model.method.name in TEACHES:
            target, local_targets = target.detach(), [each.detach() for each in local_targets]
        seen = model.backbone.represent(views[s])
        online = heads(term.adapter(seen.local.flatten(0, 1)))  # (B * L, P)
        image = torch.arange(len(planes)).repeat_interleave(seen.local.shape[1])
        predict = model.heads.predictor if s < 2 or model.small_predictor is None else model.small_predictor
        predicted = predict(model.heads.projector(seen.global_))
        loss = compare(predicted, target, torch.arange(len(planes)))
        half = model.small_predictor is not None and len(views) > 2  # each kind of view, of 2 and of 2 k directions
        weights.append(0.5 / (2 if s < 2 else 2 * (len(views) - 2)) if half else 1 / (2 * (len(views) - 1)))
        losses.append(loss)
        local_losses.append(torch.stack([compare_local(online, each, image) for each in local_targets]).mean())
    factor = 2 if model.method.name in SUMMED else 1
    weighed = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
    return factor * weighed, factor * torch.stack(local_losses).mean()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"regions": 2}, {"heads": "shared"}, {"view": "same"}], ids=str)
@pytest.mark.parametrize("name", SELF_SUPERVISED)
def test_losses_and_gradients_are_those_written_out(name: str, fields: dict[str, Any]) -> None:
    assert_written_out(objective(name, "rf-resnet", local_weight=0.4, **fields), two_views(), **fields)


MULTI_CROP = [(name, own, {}) for name in SELF_SUPERVISED for own in {False, method_class(name).has_predictor}]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own", "fields"), [*MULTI_CROP, ("byol", True, {"heads": "shared"})], ids=str)
def test_multi_crop_is_that_written_out(name: str, own: bool, fields: dict[str, Any]) -> None:
    """Small views through their own predictor, their locals through the heads of all locals; kinds of equal weight."""
    model = objective(name, "rf-resnet", local_weight=0.4, small_predictor=own, **fields)
    assert_written_out(model, multi_crop(), **fields)


def assert_written_out(model: Pretraining, views: list[Tensor], **fields: Any) -> None:
    model.double()
    if model.target is not None:  # as it is after some steps
        with torch.no_grad():
            for p in model.target.parameters():
                p.mul_(1 + 0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    views = [view.double() for view in views]
    global_, local = by_hand(model, views, fields.get("regions", 1), fields.get("view", "other"))
    (global_ + 0.4 * local).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = model(views, full=2)
    losses.total.backward()
    torch.testing.assert_close(losses.global_, global_.detach())
    torch.testing.assert_close(losses.local, local.detach())
    found = {key for key, p in model.named_parameters() if p.grad is not None}
    assert found == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, atol=1e-9, rtol=1e-6, msg=key)


@pytest.mark.slow
def test_steps_are_those_written_out(tmp_path: Path) -> None:
    """Warm-up and cosine, LARC, groups, clipping, frozen prototypes, moving target, centres and temperature."""
    fields: dict[str, Any] = {
        **TINY,
        "epochs": 2,
        "optimizer": "lars",
        "trust": 0.02,
        "clip_trust": True,
        "weight_decay": 0.1,
        "vector_lr": 0.5,
        "clip_gradient": 0.01,
        "ema": 0.9,
        "warm_up_epochs": 0.5,
        "options": {**SMALL["dino"], "freeze_share": 0.4, "warm_up_share": 0.5},
    }
    made, twin = (Trainer(resolve("co-dino", **fields), digits(), tmp_path, CPU) for _ in range(2))
    views_of = twin.setup.views_of
    for each in (made, twin):  # in float64, as LARS's clipped rates make much of rounding
        each.objective.double()
        each.setup.views_of = lambda batch, epoch: [view.double() for view in views_of(batch, epoch)]
    model, term, steps = twin.objective, twin.objective.term, 6
    assert term is not None
    assert term.heads is not None
    assert model.target is not None
    known = twin.setup.model.preprocessing
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    optimizer = LARS(parameter_groups(model, 0.1, vector_scale=0.5), lr=1.0, momentum=0.9, trust=0.02, clip=True)
    step = 0
    for epoch in range(2):
        made.epoch = epoch
        for batch in made.setup.feed.epoch(epoch):
            made.take_step(batch)
            views = twin.setup.views_of(batch, epoch)
            for view, plain in zip(views, unnormalised(twin, batch, epoch), strict=True):
                torch.testing.assert_close(view.float(), (plain - mean) / std)
            lr = 0.1 * 32 / 256 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)))
            for group in optimizer.param_groups:
                group["lr"] = lr * (1.0 if group["adapt"] else 0.5)
            model(views, full=2, ids=batch.ids, epoch=epoch).total.backward()
            if step / steps < 0.4:
                model.heads.projector.last.weight.grad = term.heads.projector.last.weight.grad = None
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            tau = 1 - 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.no_grad():
                for t, o in zip(model.target.parameters(), model._online().parameters(), strict=True):
                    t.mul_(tau).add_(o, alpha=1 - tau)
            step += 1
            for compare in (model.compare, term.compare):
                compare.after_step(step / steps)
    for (key, value), other in zip(made.objective.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-10, rtol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    for compare in (model.compare, term.compare):
        assert float(compare.temperature) == pytest.approx(0.07)
        assert compare.centre.any()


def unnormalised(run: Trainer, batch: Any, epoch: int) -> list[Tensor]:
    """The views of a batch in [0, 1]."""
    return make_views(batch.pixels[0], batch.ids, run.setup.views, seed=run.config.seed, epoch=epoch)


@pytest.mark.slow
def test_adam_and_sgd_take_the_schedule_and_the_decay() -> None:
    """One step of byol by torch's own optimisers at the rate of the schedule."""
    for optimizer, own in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        config = resolve("byol", **{**TINY, "hidden": 32, "optimizer": optimizer, "weight_decay": 0.3, "epochs": 1})
        made, twin = (Trainer(config, digits(), Path(), CPU) for _ in range(2))
        batch = next(made.setup.feed.epoch(0))
        made.take_step(batch)
        twin.objective(twin.setup.views_of(batch, 0), ids=batch.ids).total.backward()
        trained = [p for p in twin.objective.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        options = {"momentum": 0.9} if own is torch.optim.SGD else {}
        own(groups, lr=0.1 * 32 / 256 / 3, **options).step()  # the first of 3 steps of warm-up
        for p, q in zip(made.objective.parameters(), twin.objective.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_heads_are_the_papers() -> None:
    """Layers, biases, last normalisation and its affine part, prototypes of unit length."""

    def layers(module: nn.Module) -> str:
        short = {nn.Linear: "L", nn.BatchNorm1d: "B", nn.ReLU: "R", nn.GELU: "G", nn.Identity: "I"}
        modules = [m for m in module.modules() if type(m) in short]
        plain = {nn.Linear: lambda m: m.bias is None, nn.BatchNorm1d: lambda m: not m.affine}
        return " ".join(short[type(m)] + ("-" if plain.get(type(m), lambda _: False)(m) else "") for m in modules)

    found = {
        name: (layers(heads.projector), layers(heads.predictor))
        for name, heads in ((name, method_class(name)().heads(32)) for name in SELF_SUPERVISED)
    }
    assert found == {
        "byol": ("L- B R L", "L- B R L"),
        "mocov3": ("L- B R L- B-", "L- B R L"),
        "simclr": ("L- B R L", "I"),
        "simsiam": ("L- B R L- B R L- B-", "L- B R L"),
        "vicreg": ("L- B R L- B R L", "I"),
        "barlow": ("L- B R L- B R L", "I"),
        "dino": ("L G L G L L-", "I"),
    }
    head = method_class("dino")(prototypes=20).heads(32).projector
    assert (head(torch.randn(50, 32, generator=torch.Generator().manual_seed(0))).abs() <= 1 + 1e-5).all()  # cosines
    assert layers(mlp(4, 8, 2, layers=3)) == "L- B R L- B R L"


@pytest.mark.parametrize("bf16", [False, True])
def test_networks_and_heads_run_in_the_precision_asked_for(bf16: bool) -> None:
    model = objective("byol", "resnet", small_predictor=True)
    model.bf16 = bf16
    seen: list[torch.dtype] = []
    assert model.term is not None
    assert model.term.heads is not None
    assert model.small_predictor is not None
    backbone = model.backbone.get_submodule(model.site.module)
    for module in (backbone, model.heads.projector, model.heads.predictor, model.small_predictor, model.term.heads):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    losses = model(multi_crop(), full=2)
    assert len(seen) == 4 + 4 + 2 + 2 + 4  # backbone, projector, both predictors, locals
    assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
    assert losses.total.dtype == torch.float32

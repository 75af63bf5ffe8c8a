"""The field's linear probe: a layer on the frozen network, trained by SGD on random crops and flips of the images.

Heads of several learning rates learn side by side from one pass of the network (as in DINOv2's evaluation, Oquab et al.
2023); with one learning rate it is the protocol of MoCo v3 (Chen, Xie and He 2021). Views differ in every epoch, so
nothing is cached, and no more than one batch of them is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coss_eval.data.batches import Batch
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models.classifier import to_float
from coss_eval.models.model import Model
from coss_eval.probes.features import extract_known
from coss_eval.probes.fit import HELD_OUT
from coss_eval.probes.forward import ahead, ready
from coss_eval.runtime.device import Compute, exact_float32
from coss_eval.views.crop_files import crop_batches
from coss_eval.views.random_crop import RandomCrop, crop, draw_boxes, draw_flips

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""From DINO's linear evaluation (0.001) to MoCo v1's (30), two a decade, for a batch of 256."""

WIDENED = 4
"""By how many learning rates, at the ratio of its last two, a grid whose best one lies at its end is widened, once:
the heads of more of them cost little, another training as much as the first."""

_PURPOSE = "probe views"  # of the draws, else the head would learn from the very crops of pretraining
_SCORED = 1024  # images at a time: G x K logits each
INITIAL_STD = 0.01  # of the heads' weights, as in MoCo v3's and DINOv2's code; biases start at zero


@dataclass(frozen=True, kw_only=True)
class SgdProtocol:
    """What the number depends on beside model, images and seed; ``lrs`` are for a batch of 256, scaled linearly.

    Of several learning rates the best is chosen on a tenth of the training images, held out; where it lies at an end
    of them, WIDENED more are trained beyond it, and a more accurate one is taken. One alone is trained on all images:
    SgdProtocol(lrs=(0.1,)) is MoCo v3's protocol. There is no weight decay; the last batch of an epoch may be smaller;
    each learning rate follows a cosine to zero, step by step.
    """

    epochs: int = 90
    batch_size: int = 1024
    lrs: tuple[float, ...] = LRS
    momentum: float = 0.9
    crop_min_scale: float = 0.08
    flip: float = 0.5
    precision: Literal["float32", "bf16"] = "float32"  # of the network on the training views; heads are float32

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError(f"expected epochs and batch_size of 1 or more, got {self.epochs} and {self.batch_size}")
        if not self.lrs or not all(0 < lr < math.inf for lr in self.lrs):
            raise UsageError(f"expected learning rates above 0, at least one, got {list(self.lrs)}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"expected a momentum of at least 0 and below 1, got {self.momentum:g}")
        if self.precision not in ("float32", "bf16"):
            raise unknown_name("precision", self.precision, ["float32", "bf16"])
        object.__setattr__(self, "lrs", tuple(sorted(set(self.lrs))))
        self.crop(1)  # refuses what no crop can have

    def crop(self, size: int) -> RandomCrop:
        """The views of this protocol at ``size`` pixels."""
        return RandomCrop(size=size, crop_min_scale=self.crop_min_scale, flip=self.flip)

    def params(self) -> dict[str, Any]:
        """All of it as JSON, with what no field can change."""
        crop = self.crop(1)
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lrs": list(self.lrs),
            "lr_for_batch": 256,
            "schedule": "cosine",
            "momentum": self.momentum,
            "weight_decay": 0,
            "crop_scale": [crop.crop_min_scale, crop.crop_max_scale],
            "crop_ratio": list(crop.ratio),
            "flip": self.flip,
            "precision": self.precision,
            "held_out": self.held_out,
        }

    @property
    def held_out(self) -> float:
        """The share of the training images that choose the learning rate."""
        return HELD_OUT if len(self.lrs) > 1 else 0.0


@dataclass(frozen=True)
class SgdProbe:
    """The head of the chosen learning rate after the last epoch: logits = features @ weight.T + bias.

    ``path`` has the accuracy on the held-out images at each learning rate, rising, those beyond the protocol's
    included; it is empty where there was one.
    """

    weight: Tensor  # float32 (K, D)
    bias: Tensor  # float32 (K,)
    lr: float
    path: dict[float, float]
    protocol: SgdProtocol
    images: int  # that it was trained on
    held_out: int  # that chose the learning rate

    def module(self) -> nn.Linear:
        """The probe as a layer on the features (B, D)."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")  # draws no initial weights
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def notes(self) -> list[str]:
        """Which learning rate was chosen, from what, and whether the grid was wide enough: for reports."""
        p = self.protocol
        name, batch = f"SGD linear probe, {p.epochs} epochs", min(p.batch_size, self.images)
        how = (
            f"{name}: the last one's head, from {self.images:,} training images, random crops from "
            f"{p.crop_min_scale:g} of the area and flips ({p.flip:g}), batch {batch}, momentum {p.momentum:g}, "
            f"no weight decay, cosine from lr {self.lr:g} for a batch of 256"
        )
        if not self.path:
            return [f"{how}, fixed"]
        how += f", the best of {len(self.path)} on {self.held_out:,} held-out training images"
        if len(self.path) > len(p.lrs):
            how += f", the grid of {len(p.lrs)} widened to {min(self.path):g} ... {max(self.path):g}"
        end = {min(self.path): "smallest", max(self.path): "largest"}.get(self.lr)
        edge = [f"{name}: lr {self.lr:g} is the {end} of the grid; one beyond it may do better"] if end else []
        path = ", ".join(f"{lr:g}: {100 * accuracy:.1f}" for lr, accuracy in self.path.items())
        return [how, *edge, f"{name}: held-out accuracy % by lr: {path}"]


class ProbeHeads:
    """One linear head a learning rate on the same features (B, D), each with its own momentum."""

    def __init__(self, dim: int, classes: int, protocol: SgdProtocol, device: torch.device, *, seed: int) -> None:
        start = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)).mul_(INITIAL_STD)
        groups = len(protocol.lrs)
        self.weight = start.to(device).repeat(groups, 1, 1)  # (G, K, D), all from the same start
        self.bias = torch.zeros(groups, classes, device=device)  # (G, K)
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lrs, self.momentum = torch.tensor(protocol.lrs, device=device), protocol.momentum

    def head(self, place: int) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of one learning rate, on the CPU."""
        return self.weight[place].cpu(), self.bias[place].cpu()

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) to (B, G, K)."""
        return torch.einsum("bd,gkd->bgk", features, self.weight).add_(self.bias)

    def step(self, features: Tensor, labels: Tensor, scale: float) -> None:
        """One step of every head down its own mean cross-entropy on the batch, its learning rate times ``scale``."""
        rows = torch.arange(len(labels), device=labels.device)
        error = self.logits(features).softmax(2)  # (B, G, K)
        error[rows, :, labels] -= 1
        error /= len(labels)
        steps = -scale * self.lrs  # (G,)
        weight, bias = self.velocities
        weight.mul_(self.momentum).add_(torch.einsum("bgk,bd->gkd", error, features))
        bias.mul_(self.momentum).add_(error.sum(0))
        self.weight.addcmul_(weight, steps[:, None, None])
        self.bias.addcmul_(bias, steps[:, None])


@exact_float32()
def sgd_probe(
    model: Model,
    train: Split,
    protocol: SgdProtocol,
    compute: Compute,
    *,
    seed: int = 0,
) -> SgdProbe:
    """The probe on the global representation of ``train``'s images; the test split is never read.

    The order belongs to (seed, epoch) and the views to (seed, epoch, sample id). The batch size is that of a forward
    pass and changes nothing beyond rounding; the cache is for the features of the held-out images as they are.
    """
    fit, select = train.holdout(protocol.held_out) if protocol.held_out else (train, None)
    train_these = partial(train_heads, model, fit, seed=seed, device=compute.device, batch_size=compute.batch_size)
    heads = train_these(protocol)
    lr, head = protocol.lrs[0], heads.head(0)
    path, held_out = dict[float, float](), 0
    if select is not None:
        features = extract_known(model, select, compute)
        truth, held_out = (features.values["global"], features.labels), len(features)
        path = dict(zip(protocol.lrs, _accuracies(heads, *truth), strict=True))
        lr = max(path, key=path.__getitem__)  # of equally accurate ones the smallest
        head = heads.head(protocol.lrs.index(lr))
        if more := _beyond(path, lr):
            heads = train_these(replace(protocol, lrs=more))
            found = dict(zip(more, _accuracies(heads, *truth), strict=True))
            best = max(found, key=found.__getitem__)
            if found[best] > path[lr]:
                lr, head = best, heads.head(more.index(best))
            path = dict(sorted((path | found).items()))
    weight, bias = head
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise CossError(f"the SGD linear probe diverged at lr {lr:g}; try smaller ones, or precision float32")
    return SgdProbe(weight, bias, lr, path, protocol, len(fit) - len(fit.bad_images), held_out)


def _beyond(path: Mapping[float, float], best: float) -> tuple[float, ...]:
    """The learning rates, rising, to try beyond the end of ``path`` (accuracy by rate, rising) where the best one lies.

    At the small end only if the next one is worse: where they are alike, smaller ones hardly differ, either.
    """
    lrs = list(path)
    if best == lrs[-1]:
        ratio = lrs[-1] / lrs[-2]
    elif best == lrs[0] and path[lrs[0]] > path[lrs[1]]:
        ratio = lrs[0] / lrs[1]
    else:
        return ()
    return tuple(sorted(best * ratio**step for step in range(1, WIDENED + 1)))


def train_heads(
    model: Model, split: Split, protocol: SgdProtocol, *, seed: int, device: torch.device, batch_size: int = 256
) -> ProbeHeads:
    """All heads after the last epoch on ``split``. The network is left as it was, but for its device."""
    network = model.encoder()
    heads: ProbeHeads | None = None
    view = protocol.crop(min(split.native_size or (model.preprocessing.geometry.size,)))
    per_step = min(protocol.batch_size, len(split))

    def represent(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=protocol.precision == "bf16"):
            features: Tensor = network(pixels)
        return features.float()

    step, steps = 0, protocol.epochs * math.ceil(len(split) / per_step)
    with ready(network, device):
        for epoch in range(protocol.epochs):
            for batch in ahead(_shuffled(split, view, per_step, seed, epoch), device):
                views = _views(batch, view, split.native_size is None, batch_size, seed, epoch)
                features = torch.cat([represent(part) for part in views])  # (B, D)
                if heads is None:  # only now is the features' width known
                    heads = ProbeHeads(features.shape[1], len(split.classes), protocol, device, seed=seed)
                scale = per_step / 256 * 0.5 * (1 + math.cos(math.pi * step / steps))
                heads.step(features, batch.labels.to(device, non_blocking=True), scale)
                step += 1
    if heads is None:
        raise CossError(f"no image of the {split.name} split could be read to train a probe on")
    return heads


def _shuffled(split: Split, view: RandomCrop, per_step: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Every image once, in the epoch's order; files of any size come cropped and flipped by worker processes."""
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(split))  # pretraining's is [seed, epoch]
    if split.native_size is not None:
        yield from split.subset(order).batches(batch_size=per_step)
        return
    parts = [order[start : start + per_step] for start in range(0, len(order), per_step)]
    for crops in crop_batches(split, parts, [view], seed=seed, epoch=epoch, purpose=_PURPOSE):
        if len(crops.ids):  # else none of them could be read, and the person wishes to leave those out
            yield Batch(crops.views[0], crops.labels, crops.ids)


def _views(batch: Batch, view: RandomCrop, done: bool, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """The views of a batch, float32 (b, 3, S, S) in [0, 1], ``batch_size`` at a time; ``done``: cropped already."""
    rows_of_parts = [slice(start, start + batch_size) for start in range(0, len(batch.images), batch_size)]
    if done:
        for rows in rows_of_parts:
            yield to_float(batch.images[rows])
        return
    height, width = batch.images.shape[2:]
    boxes = draw_boxes(view, batch.ids, (height, width), seed=seed, epoch=epoch, purpose=_PURPOSE)
    flips = draw_flips(view, batch.ids, seed=seed, epoch=epoch, purpose=_PURPOSE)
    for rows in rows_of_parts:
        pixels = crop(batch.images[rows], boxes[rows], flips[rows], view.size)
        yield pixels.contiguous(memory_format=torch.channels_last)


def _accuracies(heads: ProbeHeads, features: Tensor, labels: Tensor) -> list[float]:
    """Of each head on features (N, D), a chunk at a time."""
    device = heads.weight.device
    hits = torch.zeros(len(heads.lrs), dtype=torch.int64, device=device)
    for part, truth in zip(torch.split(features, _SCORED), torch.split(labels, _SCORED), strict=True):
        hits += (heads.logits(part.to(device)).argmax(2) == truth.to(device)[:, None]).sum(0)
    return (hits.double() / len(labels)).tolist()

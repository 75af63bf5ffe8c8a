"""The supervised baseline, small: random crop and flip in batches, SGD with a cosine, bf16 where it pays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.data.open import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.models.architecture import Stem
from coss_eval.models.classifier import Preprocessing, to_float, training_format
from coss_eval.models.load import make_model, save_model
from coss_eval.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with momentum .9 and Nesterov, one-epoch warm-up and a cosine to zero; ``lr`` is for a batch of 256."""

    arch: str = "resnet18"
    stem: Stem = "cifar"
    width: int = 64
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.2
    weight_decay: float = 5e-4
    padding: int = 4
    label_smoothing: float = 0.1
    seed: int = 0
    bf16: bool = True

    def lr_at(self, progress: float) -> float:
        """Learning rate after a share ``progress`` in [0, 1] of all steps."""
        warm_up = min(1.0, progress * self.epochs)
        return self.lr * self.batch_size / 256 * warm_up * 0.5 * (1 + math.cos(math.pi * progress))


def train_supervised(
    data: Dataset,
    recipe: Recipe,
    *,
    out: Path | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> Model:
    """Train a classifier on ``data.train`` and return it as a Model with its own head and class names.

    The normalisation is the training split's own mean and standard deviation. ``on_epoch(epoch, loss, images a
    second)`` is called after each epoch. With ``out``, the model is written to out/model.safetensors.
    """
    if data.train is None:
        raise UsageError(f"{data.name} has no training split; give a dataset with train/ and val/ or test/")
    if len(data.train) < recipe.batch_size:
        raise UsageError(f"{len(data.train)} training images are fewer than a batch of {recipe.batch_size}")
    images, labels = _in_memory(data.train)
    values = images[:: max(1, len(images) // 2000)].to(torch.float64).div(255)
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    preprocessing = Preprocessing(tuple(mean.tolist()), tuple(std.tolist()), source="checkpoint")
    model = make_model(
        recipe.arch,
        stem=recipe.stem,
        width=recipe.width,
        classes=data.classes,
        preprocessing=preprocessing,
        name="supervised",
        seed=recipe.seed,
    )
    assert model.head is not None
    network = nn.Sequential(model.backbone, model.head)
    network.to(device).train().requires_grad_(True)
    layout = training_format(network, torch.device(device))
    network.to(memory_format=layout)
    optimiser = torch.optim.SGD(
        _groups(network, recipe.weight_decay), lr=recipe.lr, momentum=0.9, nesterov=True, foreach=True
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    generator = torch.Generator().manual_seed(recipe.seed)
    shift, scale = (t.to(device, torch.float32).view(1, 3, 1, 1) for t in (mean, std))
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    step = 0
    for epoch in range(recipe.epochs):
        started, losses = time.perf_counter(), []
        for index in _order(len(images), recipe.batch_size, generator):
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(step / steps)
            batch = _augment(images[index], recipe.padding, generator).to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.bf16):
                logits = network(((to_float(batch) - shift) / scale).contiguous(memory_format=layout))
            loss = loss_of(logits.float(), labels[index].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            step += 1
        mean_loss = torch.stack(losses).mean().item()
        if not math.isfinite(mean_loss):
            raise CossError(f"the loss is {mean_loss} in epoch {epoch + 1}; try a smaller --lr than {recipe.lr}")
        if on_epoch is not None:
            on_epoch(epoch + 1, mean_loss, len(losses) * recipe.batch_size / (time.perf_counter() - started))
    network.eval().requires_grad_(False)
    model = replace(model, layout="coss-eval").identified()
    if out is not None:
        save_model(model, out / "model.safetensors")
    return model


def _in_memory(split: Split) -> tuple[Tensor, Tensor]:
    batches = list(split.batches(batch_size=1024))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels, none on biases and normalisation."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _order(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A fresh permutation in whole batches; the rest of each epoch is left out."""
    order = torch.randperm(n, generator=generator)[: n // batch_size * batch_size]
    return iter(order.view(-1, batch_size))


def _augment(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Random shift by up to ``padding`` pixels (reflected at the border) and flip, drawn for each image."""
    count, _, height, width = images.shape
    padded = F.pad(images.float(), [padding] * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    flipped = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    # advanced indices around the channel slice put it last: (B, H, W, 3), so permute back
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

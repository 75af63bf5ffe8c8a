"""A gross mismatch between a model's normalisation and the data it was trained on, seen at its first BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coss_eval.checkpoints.layouts import CIFAR, IMAGENET, UNNORMALISED, MeanStd
from coss_eval.models.classifier import to_float
from coss_eval.models.hooks import hooked
from coss_eval.models.model import Model

# Divergence in nats a channel. With the right normalisation, Tiny-ImageNet and CIFAR-10 are 0.1 apart at most; a range
# of [-1, 1] for [0, 1] with ImageNet's constants makes 0.8 to 2.5, any other range more than 5.
SUSPICIOUS, GROSS = 0.5, 2.0
READINGS: dict[str, MeanStd] = {
    "pixels in 0 to 255 (mean 0, std 1/255)": ((0.0,) * 3, (1 / 255,) * 3),
    "unnormalised pixels in [0, 1] (mean 0, std 1)": UNNORMALISED,
    "pixels in [-1, 1] (mean .5, std .5)": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet's constants (mean .485 .456 .406, std .229 .224 .225)": IMAGENET,
    "CIFAR's constants (mean .4914 .4822 .4465, std .2023 .1994 .2010)": CIFAR,
}
CLEARLY_BETTER = 0.25  # the share of it that another reading of the pixels must leave, to be believed


def normalisation_check(model: Model, images: Tensor) -> str | None:
    """One line where the first BatchNorm's running statistics do not fit what ``images`` give; None where they do.

    ``images``: uint8 (B, 3, H, W). The same pixels are read in other usual ways (READINGS), and those that fit are
    named, the nearest first; where none does, that is said. It cannot tell ImageNet's constants from CIFAR's, nor BGR
    from RGB (natural images differ too little between the two), and says nothing of networks without BatchNorm.
    """
    batch_norm = next((m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)), None)
    if batch_norm is None or batch_norm.running_mean is None or not batch_norm.running_mean.any():
        return None
    pixels = to_float(images.to(batch_norm.running_mean.device))
    classifier = model.encoder().to(pixels.device)
    normalised = classifier.normalise(pixels)
    declared = _divergence(model.backbone, batch_norm, normalised)
    if declared < SUSPICIOUS:
        return None
    resized = normalised * classifier.std + classifier.mean
    found = {
        name: _divergence(model.backbone, batch_norm, _standardised(resized, moments))
        for name, moments in READINGS.items()
        if moments != (model.preprocessing.mean, model.preprocessing.std)
    }
    fitting = [name for name in sorted(found, key=found.__getitem__) if found[name] < CLEARLY_BETTER * declared]
    fitting = [name for name in fitting if found[name] < SUSPICIOUS]
    if not fitting and declared < GROSS:
        return None
    advice = f"they fit {' or '.join(fitting)}" if fitting else f"none of these fits either: {', '.join(READINGS)}"
    return (
        f"{model.name}: the statistics of its first BatchNorm do not fit these images as normalised "
        f"({model.preprocessing.source}; {declared:.1f} nats a channel apart); {advice}"
    )


def _standardised(pixels: Tensor, moments: MeanStd) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in moments)
    return (pixels - mean) / std


def _divergence(backbone: nn.Module, batch_norm: nn.BatchNorm2d, pixels: Tensor) -> float:
    """Median over channels of the symmetric divergence between two Gaussians: running statistics and this batch's."""
    seen: list[Tensor] = []
    with torch.no_grad(), hooked([(batch_norm, lambda _module, args, _output: seen.append(args[0]))]):
        backbone(pixels)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    values = seen[0].double()
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3)) + batch_norm.eps
    own_mean, own_var = batch_norm.running_mean.double(), batch_norm.running_var.double() + batch_norm.eps
    apart = (mean - own_mean).square()
    both = (var / own_var + own_var / var - 2 + apart * (1 / var + 1 / own_var)) / 2
    return both.median().item()


def normalisation_line(model: Model) -> str:
    """By what a network's pixels are normalised, and who says so."""
    known = model.preprocessing
    return f"mean, std   {_numbers(known.mean)}, {_numbers(known.std)} ({known.source})"


def normalisation_note(model: Model) -> str:
    """The sentence on a normalisation that nobody said."""
    return f"{model.name}: mean and std ASSUMED to be ImageNet's; else give --mean and --std (mean=, std= in Python)"


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + " ".join(f"{value:.3f}" for value in values) + ")"

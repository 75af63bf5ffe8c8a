"""Corruption of a running network that is always undone, and the clean statistics that noise needs.

Activations are damaged through hooks; weights by other tensors in their parameters' place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from coss_eval import randomness
from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.measured import PixelBatches, measured
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import UsageError
from coss_eval.internal.damage import KINDS, Damage, check_level, find_kind, to_grid
from coss_eval.models.backbone import Backbone, as_locations
from coss_eval.models.classifier import Classifier
from coss_eval.models.hooks import captured, device_of, find_site, replaced
from coss_eval.randomness import numbered

NETWORK = "network"  # the site of what damages the whole network


class HasBackbone(Protocol):
    @property
    def backbone(self) -> Backbone: ...


class CurrentImages:
    """Which images the next forward pass sees: set ``ids`` (B,) before each batch; None is 0, 1, ... in each."""

    def __init__(self, ids: Tensor | None) -> None:
        self.ids = ids


@contextmanager
def corrupted(
    model: Backbone | HasBackbone,
    site: str,
    kind: str,
    level: float,
    ids: Tensor | None = None,
    seed: int = 0,
    *,
    std: Tensor | None = None,
    rescale: bool = False,
    match_locations: int | None = None,
) -> Iterator[CurrentImages]:
    """While open, every forward pass of the network is damaged at ``site``; afterwards the network is what it was.

    The kinds that damage weights have the site "network", and no use for ``ids``: see ``WeightDamage``.
    A plain network, a path or a name is refused: what would be damaged is a Model of it, which the caller must run.
    ``ids`` int64 (B,) names the images of the batch (None: 0, 1, ... in each), and the damage to an image depends on
    (seed, id, site, kind) alone; for further batches set ``.ids`` of what ``with`` yields. Kinds, levels and options:
    see ``Damage``.

        with corrupted(classifier, "stage2", "channel", 0.5, batch.ids, seed=0) as images:
            logits = classifier(pixels)
            images.ids = next_batch.ids

    >>> from coss_eval.checkpoints.load import make_model
    >>> classifier, pixels, ids = make_model("resnet18", width=8).encoder(), torch.rand(2, 3, 64, 64), torch.arange(2)
    >>> clean = classifier(pixels)
    >>> with corrupted(classifier, "stage2", "channel", 0.5, ids):
    ...     damaged = classifier(pixels)
    >>> torch.equal(damaged, clean), torch.equal(classifier(pixels), clean)
    (False, True)
    """
    if not hasattr(model, "backbone") and not isinstance(model, Backbone):
        raise UsageError(
            f"corrupted damages what is run inside it, not a {type(model).__name__}: give classifier = "
            "fit_classifier(network, data), or as_model(network).encoder(), and run that"
        )
    backbone = model if isinstance(model, Backbone) else model.backbone
    images = CurrentImages(ids)
    if site == NETWORK and find_kind(kind).weights:
        with WeightDamage(backbone, kind, seed).at(level):
            yield images
        return
    place = find_site(backbone, site)
    corruption = Damage(place, kind, seed, std, rescale, match_locations)
    check_level(kind, level)

    def damage(output: Tensor) -> Tensor:
        return corruption.apply(output, corruption.draw(output, numbered(images.ids, output)), level)

    with replaced(backbone, place, damage):
        yield images


@contextmanager
def mixed(model: Backbone | HasBackbone, weight: float) -> Iterator[None]:
    """While open, each location before pooling is (1 - ``weight``) of itself and ``weight`` of its image's mean.

    The surrogate of a more redundant network: where the global representation is a function of the mean of the
    locations, nothing that is seen from outside changes, and damage before pooling shows what redundancy alone does.
    ``redundancy.mixing_weight`` finds the weight. Class and register tokens stay as they are.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"locations are mixed with their mean by a weight from 0 to 1, got {weight:g}")
    backbone = model if isinstance(model, Backbone) else model.backbone
    place = find_site(backbone, "prepool")
    axes = {"nchw": (2, 3), "nhwc": (1, 2), "nlc": (1,)}
    if place.layout not in axes:
        raise UsageError("this network has no locations before pooling that could be mixed")

    def mix(features: Tensor) -> Tensor:
        tokens = place.prefix_tokens if place.layout == "nlc" else 0
        others, locations = features[:, :tokens], features[:, tokens:]
        mean = locations.mean(axes[place.layout], keepdim=True)
        return torch.cat([others, torch.lerp(locations, mean.expand_as(locations), weight)], 1)

    with replaced(backbone, place, mix):
        yield


class WeightDamage:
    """A kind of damage of all weights of ``network``, from a seed: drawn once, for all levels (common random numbers).

    Weights are the floating-point parameters with two axes or more that are longer than 1: those of convolutions,
    linear layers and embeddings. Biases, scales of normalisation, class tokens and heads outside ``network`` stay, and
    BatchNorm's statistics are not estimated anew. The numbers of a tensor depend on (seed, its name) alone.
    """

    def __init__(self, network: nn.Module, kind: str, seed: int = 0) -> None:
        if not find_kind(kind).weights:
            kinds = ", ".join(name for name, each in KINDS.items() if each.weights)
            raise UsageError(f"{kind} damages activations at a site; of the weights there are {kinds}")
        self.kind, self.seed = kind, seed
        self._weights = {name: p for name, p in network.named_parameters() if _is_weight(p)}
        self._noise = {} if KINDS[kind].grid else {name: self._drawn(name, p) for name, p in self._weights.items()}

    @contextmanager
    def at(self, level: float) -> Iterator[None]:
        """While open, the weights are damaged to this level; then, whatever happens, their own tensors are back."""
        check_level(self.kind, level)
        own = {name: p.data for name, p in self._weights.items()}
        try:
            for name, p in self._weights.items() if level > 0 else ():
                p.data = self._damaged(name, own[name], level)
            yield
        finally:
            for name, p in self._weights.items():
                p.data = own[name].to(p)  # where the network was moved to meanwhile

    def _drawn(self, name: str, weight: Tensor) -> Tensor:
        """Noise of the weight's own standard deviation."""
        one = torch.zeros(1, dtype=torch.int64, device=weight.device)
        numbers = randomness.normal(one, "internal", self.seed, self.kind, name, shape=tuple(weight.shape))[0]
        return numbers.to(weight.dtype) * weight.detach().std(correction=0)

    def _damaged(self, name: str, weight: Tensor, level: float) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # a parameter takes no inference tensor
            if KINDS[self.kind].grid:
                return to_grid(weight[None], level)[0]
            return weight + self._noise[name] * level


def _is_weight(parameter: nn.Parameter) -> bool:
    long: Sequence[int] = [side for side in parameter.shape if side > 1]
    return parameter.is_floating_point() and len(long) > 1


@torch.inference_mode()
def calibrate(
    model: Backbone | Classifier | ModelLike,
    batches: PixelBatches | DatasetLike,
    sites: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The channels' clean standard deviations (C,) at each site (all where None), from one pass in float64.

    ``batches`` are normalised pixels (B, 3, H, W) for a Backbone; for a Classifier and what ``as_model`` takes they are
    uint8 or in [0, 1], or a split, or what ``as_dataset`` takes, whose test split it is. The deviation is over images
    and locations together; class and register tokens are left out.
    """
    backbone, batches = measured(model, batches)
    places = [find_site(backbone, name) for name in (backbone.sites if sites is None else sites)]
    device = device_of(backbone)
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for pixels in batches() if callable(batches) else batches:
        with captured(backbone, places) as outputs:
            backbone(pixels.to(device))
        for place in places:
            rows = (
                as_locations(outputs[place.name], place.layout, place.prefix_tokens).flatten(0, 1).double()
            )  # (BL, C)
            count, total, square = sums.get(place.name, (0, torch.zeros(()), torch.zeros(())))
            sums[place.name] = (count + len(rows), total.to(rows) + rows.sum(0), square.to(rows) + rows.square().sum(0))
    if not sums:
        raise UsageError("calibration needs at least one batch of clean images, but got none")
    return {
        name: (square / count - (total / count).square()).clamp(min=0).sqrt().float()
        for name, (count, total, square) in sums.items()
    }

"""What a network makes of eight generated images: whether it is still the network that it was, and whether an image's
outputs depend on the batch it comes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.model import Model
from coss_eval.probes import cache as disk
from coss_eval.probes.forward import ready
from coss_eval.randomness import normal, uniform

IMAGES = 8
ALONE = 2  # of the images, passed once more by themselves
NUMBERS = 16  # that are kept of each image's features, and as many of its own head's logits: random projections

# Rounding between batches of 1 and 8 stayed below a hundredth of this on a CPU (8e-6 at most, over ResNets, an
# RF-ResNet, ConvNeXt and a ViT); between a CPU and a GPU it was not measured. Dropout, batch statistics and edited code
# lie far above.
TOLERANCE = 1e-3  # of the spread between images
FLOOR = 2e-5  # of the outputs' own size: where all images give nearly the same, their spread is rounding, too


@dataclass(frozen=True)
class Behaviour:
    """Projections of a network's features, and of its own head's logits where it has one; float64 on the CPU."""

    outputs: Tensor  # (8, K), all in one batch
    again: Tensor  # (8, K), the same batch once more
    alone: Tensor | None  # (2, K), the first ones by themselves; None where the network refuses single images
    crowded: Tensor | None = None  # (8, K), among as many as a run has in a batch; None where that was not asked for
    crowd: int = 0  # how many those are

    @property
    def finite(self) -> bool:
        return bool(self.outputs.isfinite().all())


def recall(
    name: str,
    entries: Sequence[str],
    model: Model,
    size: Sequence[int],
    device: torch.device,
    held: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]] | None:
    """What is ``held`` or the cache keeps under ``name``; None where nothing, or where the network has other outputs.

    Weights and code are in the name; hooks, attributes and code that the network calls from elsewhere are not.
    """
    found = disk.load(name, [*entries, "outputs"]) if held is None else held
    if found is None or apart(observe(model, size, device).outputs, torch.from_numpy(found["outputs"])):
        return None
    return {entry: found[entry] for entry in entries}


def keep(
    name: str, arrays: Mapping[str, NDArray[Any]], model: Model, size: Sequence[int], device: torch.device
) -> dict[str, NDArray[Any]]:
    """Save in the cache what was made with the network, with its outputs on the images of (height, width) ``size``.

    Gives what was to be saved, whether there was room for it or not.
    """
    whole = {**arrays, "outputs": np.asarray(observe(model, size, device).outputs)}
    disk.save(name, whole)
    return whole


def observe(model: Model, size: Sequence[int], device: torch.device, batch: int = 0) -> Behaviour:
    """Pass the images, (height, width) ``size``, through the network as every measurement does, in eval mode.

    ``batch``: how many images a run has in a batch; where that is more than eight, they are passed among so many, too.
    """
    network = model.encoder()
    pixels = fixed_images(size).to(device, memory_format=torch.channels_last)
    parts = [part for part in (network, model.head) if part is not None]

    def numbers(images: Tensor) -> Tensor:
        features = network(images)
        logits = [] if model.head is None else [model.head(features)]
        return torch.cat([_projected(output.flatten(1)) for output in (features, *logits)], 1)

    with ready(nn.ModuleList(parts), device), torch.inference_mode():
        outputs, again = numbers(pixels), numbers(pixels)
        try:
            alone = torch.cat([numbers(pixels[i : i + 1]) for i in range(ALONE)])
        except (
            ValueError,
            RuntimeError,
            IndexError,
        ):  # BatchNorm in train mode, .squeeze(): eight went through
            alone = None
        if batch <= IMAGES:
            return Behaviour(outputs, again, alone)
        many = fixed_images(size, batch).to(device, memory_format=torch.channels_last)
        return Behaviour(outputs, again, alone, numbers(many)[:IMAGES], batch)


def fixed_images(size: Sequence[int], count: int = IMAGES) -> Tensor:
    """float32 (count, 3, height, width) in [0, 1]: coarse random colours made smooth, the same everywhere."""
    coarse = uniform(torch.arange(count), 0, "fixed images", shape=(3, 8, 8))
    return F.interpolate(coarse, size=tuple(size), mode="bilinear", align_corners=False)


def apart(a: Tensor, b: Tensor) -> float:
    """How far outputs (n, K) lie from ``b`` (N >= n, K), as a share of the spread between the images of ``b``.

    0 where the difference is rounding; features and logits are looked at separately, the larger share counts.
    """
    shares = [0.0]
    for one, other in zip(torch.split(a, NUMBERS, 1), torch.split(b, NUMBERS, 1), strict=True):
        difference = (one - other[: len(one)]).square().mean().sqrt().item()
        spread = (other - other.mean(0)).square().mean().sqrt().item()
        if not difference <= TOLERANCE * spread + FLOOR * other.square().mean().sqrt().item():  # NaN is not
            shares.append(difference / spread if spread and math.isfinite(difference) else math.inf)
    return max(shares)


def batch_dependence(found: Behaviour) -> str | None:
    """What was seen, where an image's outputs depend on its batch or on chance; None where they do not."""
    if not found.finite:
        return None  # another fault, which cells that meet it are refused for
    if found.alone is None:
        return "it takes no image alone"
    seen = {
        "the same batch passed twice differs by": apart(found.again, found.outputs),
        f"images alone and among {IMAGES} differ by": apart(found.alone, found.outputs),
    }
    if found.crowded is not None:
        seen[f"images among {found.crowd} and among {IMAGES} differ by"] = apart(found.crowded, found.outputs)
    said = [f"{what} {100 * share:.2g} % of the spread between images" for what, share in seen.items() if share]
    return "; ".join(said) or None


def refuse_batch_dependent(model: Model, size: Sequence[int], device: torch.device, batch: int) -> None:
    """UsageError where the outputs depend on the batch, unless the model says that they may (``batch_size``).

    ``batch``: how many images the run has in one.
    """
    seen = batch_dependence(observe(model, size, device, batch)) if model.batch_size is None else None
    if seen is not None:
        raise UsageError(refusal(model, seen))


def refusal(model: Model, seen: str) -> str:
    """The line for what ``batch_dependence`` saw."""
    return (
        f"{model.name}: the outputs for an image depend on its batch or on chance ({seen}; rounding stays below "
        f"{100 * TOLERANCE:g} %): BatchNorm without running statistics, active dropout or test-time adaptation? Mend "
        "the network, or add --allow-batch-dependent (allow_batch_dependent=True), which keeps the batch size with "
        "the numbers"
    )


def _projected(outputs: Tensor) -> Tensor:
    """Outputs (n, D) as NUMBERS random mixtures each, float64 (n, 16) on the CPU, whose lengths are about theirs."""
    mixing = normal(torch.arange(NUMBERS), 0, "mixtures of outputs", shape=(outputs.shape[1],)).double()
    projected: Tensor = outputs.double().cpu() @ mixing.T / NUMBERS**0.5
    return projected

"""A network run once on an example, to see what it takes and gives; it is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.errors import UsageError


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: 1 where its first convolution takes one, else 3."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def try_sizes(network: nn.Module, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One random image (1, C, S, S) of the first side that the network takes, and what it makes of it."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    failures = []
    for side in sides:
        example = torch.randn(1, channels_of(network), side, side, generator=generator).to(device)
        try:
            return example, run(network, example)
        except (RuntimeError, AssertionError, ValueError) as error:
            failures.append(str(error).partition("\n")[0] or type(error).__name__)
    tried = ", ".join(map(str, sides))
    raise UsageError(f"{type(network).__name__} takes no image of side {tried} ({failures[0]}); give --img-size")


def takes_any_size(network: nn.Module, example: Tensor) -> bool:
    """Whether an image 32 px larger than the example goes through as well."""
    try:
        run(network, F.pad(example, (0, 32, 0, 32)))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def run(network: nn.Module, pixels: Tensor) -> Tensor:
    """One forward pass in eval mode without gradient; the network's mode is put back."""
    with evaluating(network):
        output: Any = network(pixels)
    if not isinstance(output, Tensor):
        raise UsageError(f"{type(network).__name__} must return one tensor in eval mode, not {type(output).__name__}")
    return output

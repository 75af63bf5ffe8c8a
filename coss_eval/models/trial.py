"""A network run once on an example, to see what it takes and gives; it is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.errors import UsageError

_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError)  # of a network's own code on a size it cannot take


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


@contextmanager
def unsettled(network: nn.Module) -> Iterator[None]:
    """Scales, shifts and running statistics off their values inside; afterwards they are exactly what they were.

    A norm that was never trained changes nothing, so that an output compared with one that leaves the norm out would
    say that they are the same.
    """
    vectors: list[Tensor] = [p for p in network.parameters() if p.ndim == 1 and p.is_floating_point()]
    vectors += [b for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
    kept = [(vector, vector.detach().clone()) for vector in vectors]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vector in vectors:
            noise = torch.rand(vector.shape, generator=generator).to(vector)
            vector.mul_(0.8 + 0.4 * noise).add_(0.1 * noise)  # a variance stays positive
    try:
        yield
    finally:
        with torch.no_grad():
            for vector, was in kept:
                vector.copy_(was)


def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: 1 where its first convolution takes one, else 3."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def try_sizes(network: nn.Module, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One random image (1, C, S, S) of the first side that the network takes, and what the network makes of it.

    Raises UsageError where it takes none, and where it takes several images but loses the batch of one.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    failures = []
    for side in sides:
        example = torch.randn(1, channels_of(network), side, side, generator=generator).to(device)
        try:
            output = run(network, example)
        except _FAILURES as error:
            failures.append(str(error).partition("\n")[0] or type(error).__name__)
            _refuse_lost_batch(network, example, f"does not take one image ({failures[-1]})")
            continue
        if output.shape[:1] != (1,):
            _refuse_lost_batch(network, example, f"gives {tuple(output.shape)} of one image")
        return example, output
    tried = ", ".join(map(str, sides))
    if all("channels" in failure for failure in failures):
        raise UsageError(f"{type(network).__name__} takes no colour or grey images ({failures[0]})")
    raise UsageError(f"{type(network).__name__} takes no image of side {tried} ({failures[0]}); give --img-size")


def _refuse_lost_batch(network: nn.Module, example: Tensor, seen: str) -> None:
    """UsageError, which begins with ``seen``, where two images go through as they should."""
    try:
        two = run(network, torch.cat([example, example]))
    except _FAILURES:
        return
    if two.ndim > 1 and len(two) == 2:
        raise UsageError(
            f"{type(network).__name__} {seen}, but {tuple(two.shape)} of two: it works with batches, of which the last "
            "may hold one image; has its code .squeeze() or a fixed batch size? Write .flatten(1) there"
        )


def takes_any_size(network: nn.Module, example: Tensor) -> bool:
    """Whether an image 32 px larger than the example goes through as well."""
    try:
        run(network, F.pad(example, (0, 32, 0, 32)))
    except _FAILURES:
        return False
    return True


def run(network: nn.Module, pixels: Tensor) -> Tensor:
    """One forward pass in eval mode without gradient; the network's mode is put back."""
    try:
        with evaluating(network):
            output: Any = network(pixels)
    except TypeError as error:
        kind, reason = type(network).__name__, str(error).partition("\n")[0]
        raise UsageError(
            f"{kind} cannot be called with a batch of images alone ({reason}); wrap it in a module whose forward does"
        ) from error
    if not isinstance(output, Tensor):
        raise UsageError(f"{type(network).__name__} must return one tensor in eval mode, not {type(output).__name__}")
    return output


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two passes gave the same but for rounding, which goes by the largest of the values."""
    if found.shape != expected.shape or found.is_meta:  # a network without weights as yet: shapes are all there is
        return found.shape == expected.shape
    largest = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, largest))

"""What an attack is given: checked with one-line errors, and a network that is held still while it is attacked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.randomness import numbered


@dataclass(frozen=True)
class Problem:
    """Images to attack, and what counts as broken: any wrong class, or exactly ``targeted``.

    images float32 (B, C, H, W) in [0, 1]; labels, ids, targeted int64 (B,), all on one device, which need not be the
    network's ``device``. ``batch_size`` images are attacked at a time.
    """

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    ids: Tensor
    targeted: Tensor | None
    batch_size: int
    device: torch.device

    @classmethod
    def checked(
        cls,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Tensor | None = None,
        targeted: Tensor | None = None,
        batch_size: int = 256,
    ) -> Problem:
        """Raises UsageError for what does not fit; ``ids`` None are 0, 1, ..."""
        check_images(images)
        check_count("batch_size", batch_size)
        ids = numbered(ids, images)
        for name, values in (("labels", labels), ("ids", ids), ("targeted", targeted)):
            if values is not None:
                check_rows(name, values, images)
        home = images.device
        targeted = None if targeted is None else targeted.to(home)
        device = device_of(classifier, images)
        return cls(classifier, images, labels.to(home), ids.to(home), targeted, batch_size, device)

    @torch.no_grad()
    def clean_logits(self) -> Tensor:
        """float32 logits (B, K) of the images as they are; labels are checked against K."""
        starts = range(0, len(self.images), self.batch_size)
        batches = (self.images[start : start + self.batch_size] for start in starts)
        logits = torch.cat([self.classifier(part.to(self.device)).float().to(self.images.device) for part in batches])
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UsageError(f"expected logits of shape (B, K) with K > 1, got {tuple(logits.shape)}")
        for name, values in (("labels", self.labels), ("targeted", self.targeted)):
            if values is not None:
                check_classes(name, values, logits.shape[1])
        return logits


def check_eps(eps: float | Sequence[float], norm: str) -> tuple[float, ...]:
    """eps as a rising tuple. Pixels are in [0, 1], so no L-infinity ball is larger than 1."""
    values = tuple(float(e) for e in (eps if isinstance(eps, Sequence) else [eps]))
    shown = ", ".join(f"{e:g}" for e in values)
    if not values:
        raise UsageError("expected at least one eps, got an empty list")
    if not all(math.isfinite(e) and e >= 0 for e in values):
        raise UsageError(f"expected eps of 0 or more, got {shown}")
    if norm == "linf" and max(values) > 1:
        raise UsageError(f"expected eps from 0 to 1, in pixels of [0, 1], got {shown}; write 8/255, not 8")
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise UsageError(f"expected eps in rising order, each once, got {shown}")
    return values


def check_images(images: Tensor) -> None:
    """float32 (B, C, H, W) with finite pixels in [0, 1] and B > 0."""
    if images.ndim != 4 or len(images) == 0:
        raise UsageError(f"expected images of shape (B, C, H, W) with B > 0, got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        hint = "to_float(images)" if images.dtype == torch.uint8 else "images.float()"
        raise UsageError(f"expected float32 images in [0, 1], got {images.dtype}; use {hint}")
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise UsageError(
            f"expected pixels in [0, 1], got {low:g} to {high:g}; normalise inside the classifier, not before it"
        )


def check_rows(name: str, values: Tensor, images: Tensor) -> None:
    """int64 (B,), one number an image."""
    if values.dtype != torch.int64 or values.shape != (len(images),):
        raise UsageError(
            f"expected {name} as int64 of shape ({len(images)},), got {values.dtype} of shape {tuple(values.shape)}"
        )


def check_classes(name: str, values: Tensor, classes: int) -> None:
    """Class numbers from 0 to classes - 1."""
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= classes:
        raise UsageError(f"expected {name} from 0 to {classes - 1} (the classifier's outputs), got {low} to {high}")


def check_count(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"expected {name} of 1 or more, got {value}")


def check_step_size(value: float | None, name: str = "step_size", unit: str = "in pixels of [0, 1]") -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"expected {name} above 0, {unit}, got {value:g}")


def device_of(network: nn.Module, images: Tensor) -> torch.device:
    """Where the network computes; the images' own device for a network without parameters."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), images.device)


@contextmanager
def held_still(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on whatever the caller's mode; every module's own mode is restored, also on error.

    In evaluation mode BatchNorm statistics are not updated. Parameters are left alone: attacks ask for gradients of
    pixels only (torch.autograd.grad), so no weight gradient is computed and ``requires_grad`` need not change.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def not_differentiable(network: nn.Module, images: Tensor) -> UsageError:
    """The error for a network whose output does not depend on the pixels by gradient, naming the module that cuts it.

    The network runs once more with detached parameters, so that a gradient can only come from the pixels; the first
    module that takes a tensor with a gradient and returns none is the one.
    """
    cut: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            takes = any(isinstance(a, Tensor) and a.requires_grad for a in args)
            if not cut and takes and isinstance(output, Tensor) and not output.requires_grad:
                how = "passes no gradient on" if torch.is_grad_enabled() else "runs under torch.no_grad"
                cut.append(f"module {name!r} ({type(module).__name__}) {how}" if name else f"it {how}")

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in network.named_modules()]
    fixed = {name: tensor.detach() for name, tensor in network.named_parameters()}
    try:
        torch.func.functional_call(network, fixed, (images.detach().requires_grad_(),))
    finally:
        for handle in handles:
            handle.remove()
    where = cut[0] if cut else "no single module is to blame"
    return UsageError(f"the network is not differentiable with respect to pixels: {where}; use the square attack")

"""Arrays and tensors from a person's hands: images checked and as uint8 (N, 3, H, W), labels as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coss_eval.errors import UsageError

Pixels8 = NDArray[np.uint8]
LabelValues = list[int] | list[str]

ROUNDING = 1e-6  # how far floats may lie outside [0, 1] by rounding


def is_array(given: Any) -> bool:
    """Whether it is an array or a tensor."""
    return isinstance(given, np.ndarray) or (hasattr(given, "detach") and hasattr(given, "numpy"))


def as_array(given: Any) -> NDArray[Any]:
    """A tensor on any device as an array; an array as it is."""
    if not hasattr(given, "detach"):
        return np.asarray(given)
    tensor = given.detach().cpu()
    return np.asarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())


def as_pixels(images: Any, what: str) -> Pixels8:
    """A copy of images as uint8 (N, 3, H, W); ``what`` begins each message.

    Takes uint8, or floats in [0, 1] (rounded to 8 bits, in which corruptions and eps are defined), as (N, H, W),
    (N, H, W, 1 or 3) or (N, 1 or 3, H, W). Raises UsageError for anything else.
    """
    array = as_array(images)
    if array.ndim not in (3, 4):
        single = ": is it one image? Give images[None]" if array.ndim == 2 else ""
        raise UsageError(f"{what}: expected (N, 3, H, W), (N, H, W, 3) or (N, H, W), got shape {array.shape}{single}")
    made = nchw(as_bytes(array, what), what)
    return made.copy() if np.may_share_memory(made, array) else made


def as_bytes(array: NDArray[Any], what: str) -> Pixels8:
    """uint8 as it is, floats in [0, 1] times 255, rounded; UsageError for another type or range."""
    if array.dtype == np.uint8:
        if array.size > 1 and 0 < array.max() <= 1:
            raise UsageError(f"{what}: uint8 from 0 to {array.max()}, where white is 255: multiply by 255")
        return array
    if not np.issubdtype(array.dtype, np.floating):
        mend = "numpy.stack(images)" if array.dtype == object else ".astype('uint8')"
        raise UsageError(f"{what}: expected uint8 in 0 to 255 or floats in [0, 1], got {array.dtype}: {mend}")
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UsageError(f"{what}: holds NaN or infinity")
    if low >= 0 and 1 + ROUNDING < high <= 255:
        raise UsageError(f"{what}: floats from {low:g} to {high:g}, expected [0, 1]: divide by 255")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise UsageError(
            f"{what}: floats from {low:.3g} to {high:.3g}, expected [0, 1]: leave the normalisation out, the model has "
            "it (mean= and std= of as_model)"
        )
    scaled = np.rint(array.astype(np.float32) * 255).clip(0, 255)
    return scaled.astype(np.uint8)


def nchw(array: Pixels8, what: str) -> Pixels8:
    """(N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W) as contiguous (N, 3, H, W)."""
    shaped = array[..., None] if array.ndim == 3 else array
    if shaped.shape[-1] in (1, 3):
        shaped = shaped.transpose(0, 3, 1, 2)
    if shaped.ndim != 4 or shaped.shape[1] not in (1, 3):
        alpha = ": leave the fourth, alpha, out" if 4 in (array.shape[1], array.shape[-1]) else ""
        raise UsageError(f"{what}: expected 1 or 3 channels first or last, got shape {array.shape}{alpha}")
    if 0 in shaped.shape:
        raise UsageError(f"{what}: expected at least one image of one pixel, got shape {array.shape}")
    return np.ascontiguousarray(np.broadcast_to(shaped, (len(shaped), 3, *shaped.shape[2:])))


def as_labels(labels: Any, count: int, what: str) -> LabelValues:
    """Whole numbers or names, one for each of ``count`` images, from a list, an array or a tensor (N,) or (N, 1)."""
    array = as_array(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
        raise UsageError(f"{what}: labels of shape {array.shape} look one-hot: give labels.argmax(1)")
    if array.ndim != 1 or len(array) != count:
        raise UsageError(f"{what}: expected {count:,} labels, one for each image, got shape {array.shape}")
    if array.dtype.kind in "US":
        return [str(value) for value in array.tolist()]
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array.tolist()):
        return list(array.tolist())
    if array.dtype.kind not in "iu":
        raise UsageError(f"{what}: expected labels as whole numbers or names, got {array.dtype}")
    return [int(value) for value in array.tolist()]

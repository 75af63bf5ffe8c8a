"""What the corruptions share: sums of shifted images, Gaussian blur, borders, and the way back to uint8.

Values are float32 on the scale 0 to 255, shapes (..., H, W). Filters are sums of shifted copies, term after term,
rather than convolutions or batched matrix products: a value then never depends on how many are computed beside it.
Gaussian blur goes through OpenCV on the CPU, which does the same five times as fast, map by map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import cv2
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    cv2, np, torch, F = map(lazy, ("cv2", "numpy", "torch", "torch.nn.functional"))

Border = Literal["nearest", "symmetric", "reflect101"]

# The published code truncates float64; our float32 sums may end a hair below an integer that theirs hits.
_SNAP = 2.0**-10

_OPENCV_BORDER = {"nearest": "BORDER_REPLICATE", "symmetric": "BORDER_REFLECT", "reflect101": "BORDER_REFLECT_101"}


def to_pixels(values: Tensor) -> Tensor:
    """Clipped to 0..255 and truncated to uint8, in place. Values up to 2^-10 below an integer count as that integer."""
    # by way of int16: straight from float to uint8, torch takes five times as long on the CPU
    return values.clamp_(0, 255).add_(_SNAP).to(torch.int16).to(torch.uint8)


def border_index(length: int, before: int, after: int, border: Border, device: torch.device) -> Tensor:
    """The source of each position of an axis padded by ``before`` and ``after``, int64 (before + length + after,).

    nearest: aaa|abcd|ddd, symmetric: cba|abcd|dcb, reflect101: dcb|abcd|cba, folded as often as the padding needs.
    """
    index = torch.arange(-before, length + after, device=device)
    if border == "nearest":
        return index.clamp(0, length - 1)
    period = 2 * length if border == "symmetric" else 2 * length - 2
    index = index.remainder(period)
    mirrored = period - index - (1 if border == "symmetric" else 0)
    return torch.where(index < length, index, mirrored)


def pad(x: Tensor, rows: int, columns: int, border: Border) -> Tensor:
    """(..., H, W) with ``rows`` more above and below and ``columns`` more left and right."""
    height, width = x.shape[-2:]
    if border == "nearest":  # by slices, many times faster than by index
        padded = x.new_empty(*x.shape[:-2], height + 2 * rows, width + 2 * columns)
        middle = padded[..., rows : rows + height, :]
        middle[..., columns : columns + width] = x
        middle[..., :columns], middle[..., columns + width :] = x[..., :1], x[..., -1:]
        padded[..., :rows, :], padded[..., rows + height :, :] = middle[..., :1, :], middle[..., -1:, :]
        return padded
    if border == "reflect101" and rows < height and columns < width:
        flat = F.pad(x.reshape(-1, height, width), (columns, columns, rows, rows), mode="reflect")
        return flat.view(*x.shape[:-2], *flat.shape[-2:])
    x = take_rows(x, border_index(height, rows, rows, border, x.device)) if rows else x
    return take_columns(x, border_index(width, columns, columns, border, x.device)) if columns else x


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of (..., H, W) at ``index`` (n,): (..., n, W)."""
    flat = x.reshape(-1, *x.shape[-2:]).index_select(1, index)
    return flat.view(*x.shape[:-2], len(index), x.shape[-1])


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """The columns of (..., H, W) at ``index`` (n,): (..., H, n). index_select is fastest in 2-D."""
    return x.reshape(-1, x.shape[-1]).index_select(1, index).view(*x.shape[:-1], len(index))


def shifted_sum(padded: Tensor, taps: Sequence[tuple[int, int, float]], height: int, width: int) -> Tensor:
    """The sum over (row, column, weight) of weight times the (height, width) window of ``padded`` that starts there."""
    total: Tensor | None = None
    for row, column, weight in taps:
        window = padded[..., row : row + height, column : column + width]
        total = window * weight if total is None else total.add_(window, alpha=weight)
    assert total is not None, "a filter has at least one tap"
    return total


def gaussian_taps(sigma: float, truncate: float = 4) -> list[float]:
    """scipy.ndimage's sampled Gaussian: radius int(truncate sigma + 1/2), weights that sum to 1."""
    radius = int(truncate * sigma + 0.5)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)] if radius else [1.0]
    total = sum(weights)
    return [weight / total for weight in weights]


def smooth(x: Tensor, sigma: float | tuple[float, float], truncate: float = 4, border: Border = "nearest") -> Tensor:
    """scikit-image's ``gaussian`` of (..., H, W); ``sigma`` in pixels, one or (rows, columns)."""
    sigma_rows, sigma_columns = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    rows, columns = gaussian_taps(sigma_rows, truncate), gaussian_taps(sigma_columns, truncate)
    return (_smooth_by_opencv if x.device.type == "cpu" else smooth_by_taps)(x, rows, columns, border)


def smooth_by_taps(x: Tensor, rows: list[float], columns: list[float], border: Border) -> Tensor:
    """Filtered with ``rows`` along H, then with ``columns`` along W."""
    height, width = x.shape[-2:]
    padded = pad(x, len(rows) // 2, 0, border)
    x = shifted_sum(padded, [(i, 0, weight) for i, weight in enumerate(rows)], height, width)
    padded = pad(x, 0, len(columns) // 2, border)
    return shifted_sum(padded, [(0, i, weight) for i, weight in enumerate(columns)], height, width)


def _smooth_by_opencv(x: Tensor, rows: list[float], columns: list[float], border: Border) -> Tensor:
    smoothed = torch.empty_like(x, memory_format=torch.contiguous_format)
    kind = getattr(cv2, _OPENCV_BORDER[border])
    down, right = np.array(rows, np.float32), np.array(columns, np.float32)
    maps = x.reshape(-1, *x.shape[-2:]).numpy(), smoothed.view(-1, *x.shape[-2:]).numpy()
    for source, into in zip(*maps, strict=True):
        cv2.sepFilter2D(source, cv2.CV_32F, right, down, dst=into, borderType=kind)
    return smoothed


def resample(x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Separable linear interpolation: ``rows`` and ``columns`` are (source index int64, weight of the next one)."""
    index, weight = rows
    x = take_rows(x, index).lerp_(take_rows(x, _next(index, x.shape[-2])), weight[:, None])
    index, weight = columns
    return take_columns(x, index).lerp_(take_columns(x, _next(index, x.shape[-1])), weight)


def _next(index: Tensor, length: int) -> Tensor:
    return (index + 1).clamp_(max=length - 1)

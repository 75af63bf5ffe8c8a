"""What the corruptions share: sums of shifted images, Gaussian blur, borders, and the way back to uint8.

Values are float32 on the scale 0 to 255, shapes (..., H, W). Filters are sums of shifted copies, term after term,
rather than convolutions or batched matrix products: a value then never depends on how many are computed beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["nearest", "symmetric", "reflect101"]

# The published code truncates float64; our float32 sums may end a hair below an integer that theirs hits.
_SNAP = 2.0**-10

# Wider filters are applied as a matrix.
_MOST_TAPS = 64


def to_pixels(values: Tensor) -> Tensor:
    """Clipped to 0..255 and truncated to uint8, in place. Values up to 2^-10 below an integer count as that integer."""
    return values.clamp_(0, 255).add_(_SNAP).to(torch.uint8)


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
    """scikit-image's ``gaussian``: rows, then columns; ``sigma`` in pixels, one or (rows, columns)."""
    sigma_rows, sigma_columns = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    x = _blur_axis(x, -2, tuple(gaussian_taps(sigma_rows, truncate)), border)
    return _blur_axis(x, -1, tuple(gaussian_taps(sigma_columns, truncate)), border)


def _blur_axis(x: Tensor, dim: int, weights: tuple[float, ...], border: Border) -> Tensor:
    height, width = x.shape[-2:]
    reach = len(weights) // 2
    if not reach:
        return x
    if len(weights) > _MOST_TAPS:
        matrix = _blur_matrix(x.shape[dim], weights, border).to(x)
        # One map at a time, so that the product's shape, and with it its rounding, is the same in every batch.
        maps = [matrix @ one if dim == -2 else one @ matrix.T for one in x.reshape(-1, height, width)]
        return torch.stack(maps).view_as(x)
    if dim == -2:
        return shifted_sum(pad(x, reach, 0, border), [(i, 0, w) for i, w in enumerate(weights)], height, width)
    return shifted_sum(pad(x, 0, reach, border), [(0, i, w) for i, w in enumerate(weights)], height, width)


@lru_cache(maxsize=16)
def _blur_matrix(length: int, weights: tuple[float, ...], border: Border) -> Tensor:
    """A filter along an axis as a matrix (length, length), what lies beyond the borders folded back into it."""
    reach = len(weights) // 2
    source = border_index(length, reach, reach, border, torch.device("cpu")).unfold(0, length, 1)  # (taps, length)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    here = torch.arange(length)
    for weight, index in zip(weights, source, strict=True):
        matrix[here, index] += weight
    return matrix.float()


def resample(x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Separable linear interpolation: ``rows`` and ``columns`` are (source index int64, weight of the next one)."""
    index, weight = rows
    x = take_rows(x, index).lerp_(take_rows(x, _next(index, x.shape[-2])), weight[:, None])
    index, weight = columns
    return take_columns(x, index).lerp_(take_columns(x, _next(index, x.shape[-1])), weight)


def _next(index: Tensor, length: int) -> Tensor:
    return (index + 1).clamp_(max=length - 1)

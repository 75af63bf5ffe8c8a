"""Images for the corruption tests: smooth colour fields with edges and texture, made from a seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def make_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (count, 3, height, width) with shading, edges, fine grain, black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    image[..., height // 4 : height // 2, width // 3 : width // 2] *= 0.2
    image += 0.05 * torch.randn(count, 3, height, width, generator=generator)
    image[..., :4, :6], image[..., -4:, -6:] = 0, 1
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    return make_images

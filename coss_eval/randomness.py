"""Random numbers that belong to a sample: a function of (stream, sample id, position), never of batch or order.

A counter-based generator: splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
over tensors. Integer arithmetic only, so every device draws the same uniforms; normals agree to float32 rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# splitmix64's constants as signed 64-bit integers; torch's int64 products wrap around, as the generator needs
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_UNIT = 2.0**-24  # float32 holds 24 bits exactly


def numbered(ids: Tensor | None, images: Tensor) -> Tensor:
    """``ids``, int64 (B,), or where they are None 0, 1, ... B - 1 on the images' device."""
    return torch.arange(len(images), device=images.device) if ids is None else ids


def uniform(ids: Tensor, *stream: int | str, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, *shape): one independent draw for each of ids int64 (B,).

    ``stream`` names the purpose (seed, "mask", site, ...): different streams are independent.
    """
    return _high_bits(_bits(ids, stream, shape)).to(torch.float32).mul_(_UNIT)


def normal(ids: Tensor, *stream: int | str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (B, *shape), by Box-Muller from one 64-bit draw each; |z| stays below 5.8."""
    bits = _bits(ids, stream, shape)
    angle = (bits & 0xFFFFFF).to(torch.float32).mul_(_UNIT * 2 * math.pi)
    radius = (_high_bits(bits) + 1).to(torch.float32).mul_(_UNIT).log_().mul_(-2).sqrt_()  # of (0, 1]: log is finite
    return radius.mul_(angle.cos_())


def _bits(ids: Tensor, stream: tuple[int | str, ...], shape: tuple[int, ...]) -> Tensor:
    """64 random bits for every id and position, int64 (B, *shape)."""
    keys = _mix(ids.to(torch.int64) + _salt(stream))
    positions = torch.arange(1, math.prod(shape) + 1, device=ids.device).mul_(_GAMMA)
    return _mix(keys[:, None] + positions).view(len(ids), *shape)


def _salt(stream: tuple[int | str, ...]) -> int:
    """The stream's name as a signed 64-bit integer, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(stream).encode(), digest_size=8).digest(), "little", signed=True)


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser, in place: every input bit changes every output bit with probability one half."""
    bits ^= _shift(bits, 30)
    bits *= _MULTIPLIERS[0]
    bits ^= _shift(bits, 27)
    bits *= _MULTIPLIERS[1]
    bits ^= _shift(bits, 31)
    return bits


def _shift(bits: Tensor, by: int) -> Tensor:
    """The logical right shift that int64 lacks: the sign bits of the arithmetic one are cleared."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _high_bits(bits: Tensor) -> Tensor:
    return _shift(bits, 40)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Run a network's own initialisation from ``seed``: torch's CPU generator is lent to it and put back as it was.

    Initialisers inside torchvision, timm and users' factories take no generator, so there is no other way to seed them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

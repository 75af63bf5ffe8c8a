"""Random fields drawn image by image: a counter-based integer generator in tensor arithmetic, alike on any device.

Element i of an image's stream is a hash of i under the image's 64-bit key, which comes from (seed, id, corruption,
severity). So an image gets the same integers whatever batch, order, subset, chunk or device type it is drawn on;
normals may differ in their last bits between device types. The hash is the three-round 32-bit mixer of C. Wellons'
hash-prospector (triple32, bias 0.02 %), with one half of the key added before the first round and the other before the
second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_keys(ids: Tensor, condition: int) -> Tensor:
    """int32 (B, 2): the two halves of each sample's key, from its id (int64) and the condition's 64 bits."""
    mixed = _mix64(_mix64(ids + _signed(condition, 64)))
    halves = torch.stack([mixed, mixed >> 32], dim=1) & 0xFFFFFFFF  # (B, 2), each below 2^32
    return torch.where(halves < 2**31, halves, halves - 2**32).to(torch.int32)


class Draws:
    """One stream of random numbers for each of B images; every call goes on where the last one stopped.

    Shapes are those of one image: ``normal(3, H, W)`` returns (B, 3, H, W).
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._used = 0

    def bits(self, *shape: int) -> Tensor:
        """int32, uniform over all 32 bits."""
        count = math.prod(shape)
        x = torch.arange(self._used, self._used + count, dtype=torch.int32, device=self._keys.device)
        x = x + self._keys[:, :1]  # (B, count)
        self._used += count
        scratch = torch.empty_like(x)
        _xor_shift(x, 17, scratch).mul_(_signed(0xED5AD4BB, 32)).add_(self._keys[:, 1:])
        _xor_shift(x, 11, scratch).mul_(_signed(0xAC4C1B51, 32))
        _xor_shift(x, 15, scratch).mul_(_signed(0x31848BAB, 32))
        return _xor_shift(x, 14, scratch).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in (0, 1): the midpoints of 2^23 equal cells, so that neither end is ever drawn."""
        return (self.bits(*shape) >> 9).float().add_(2**22 + 0.5).mul_(2**-23)

    def signed(self, *shape: int) -> Tensor:
        """float32, uniform in (-1, 1): 2 ``uniform`` - 1."""
        return (self.bits(*shape) >> 9).float().add_(0.5).mul_(2**-22)

    def normal(self, *shape: int) -> Tensor:
        """float32, standard normal, by inversion (cut at 5.3 standard deviations)."""
        return (self.bits(*shape) >> 8).float().add_(0.5).mul_(2**-23).erfinv_().mul_(math.sqrt(2))

    def integers(self, high: int, *shape: int) -> Tensor:
        """int32 in [0, high), for ``high`` up to 128."""
        return (self.bits(*shape) >> 8).bitwise_and_(0xFFFFFF).mul_(high).bitwise_right_shift_(24)


def _xor_shift(x: Tensor, distance: int, scratch: Tensor) -> Tensor:
    """x ^= x >> distance, with the logical shift that signed tensors lack."""
    torch.bitwise_right_shift(x, distance, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - distance)) - 1))


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64."""
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int, bits: int) -> int:
    """The signed integer with the bit pattern of an unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value

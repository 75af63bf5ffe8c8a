"""Which random numbers an image draws: a key from (seed, id, condition), one a row, for coss_eval.randomness.

Images of one batch may be at different eps, restarts and steps, so their conditions differ too.
"""

from __future__ import annotations

import hashlib

from torch import Tensor


def condition(*parts: object) -> int:
    """An int64 that names a condition, such as (seed, norm, eps, restart), the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def image_keys(ids: Tensor, conditions: int | Tensor) -> Tensor:
    """int64 (B,) from ids (B,) and conditions (one, or one a row): sums of hashes, mixed where numbers are drawn."""
    return ids + conditions

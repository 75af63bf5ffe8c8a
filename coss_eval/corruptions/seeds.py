"""Where every draw comes from: (seed, sample id, corruption, severity), and nothing else; torch-free.

Python's own ``hash`` differs from process to process; BLAKE2b does not.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def condition_key(seed: int, name: str, severity: int) -> int:
    """64 bits that name one condition under one seed."""
    return int.from_bytes(blake2b(f"{seed}/{name}/{severity}".encode(), digest_size=8).digest(), "little")


def sample_sequence(seed: int, sample_id: int, name: str, severity: int) -> np.random.SeedSequence:
    """NumPy entropy of one image under one condition."""
    return np.random.SeedSequence([condition_key(seed, name, severity), sample_id % 2**64])

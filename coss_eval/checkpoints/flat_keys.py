"""The tensors of a file by dotted keys: {"state_dict": {"module.x": ...}} is "state_dict.x"."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Segments of keys that DataParallel, torch.compile, FSDP and activation checkpointing add."""

NOT_WEIGHTS = re.compile(r"optim|sched|scaler|loss|hooks|callbacks|loops|memory_bank", re.IGNORECASE)
"""Names of dictionaries inside a training file that hold tensors, but no network."""


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its dotted path, wrappers' segments left out; optimiser state is passed over."""
    tensors: dict[str, Tensor] = {}
    for key, value in dict.items(content):  # a pickle can give an OrderedDict an attribute of the name "items"
        if isinstance(value, Tensor):
            tensors[plain_key(f"{prefix}{key}")] = value
        elif isinstance(value, dict) and isinstance(key, str) and not NOT_WEIGHTS.search(key):
            tensors |= flatten(value, f"{prefix}{key}.")
    return tensors


def plain_key(key: str) -> str:
    """A key without the segments that wrappers add."""
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)

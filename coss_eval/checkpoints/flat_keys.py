"""The tensors of a file by dotted keys: {"state_dict": {"module.x": ...}} is "state_dict.x"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from coss_eval.checkpoints.unpickle import plain
from coss_eval.errors import CossError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Segments of keys that DataParallel, torch.compile, FSDP and activation checkpointing add."""

NOT_WEIGHTS = re.compile(
    r"optim(?!al)|sched|scaler|loss(?!\w*(model|net|weights|state_dict))|hooks|callbacks|loops|memory_bank|rng|random",
    re.IGNORECASE,
)
"""Names of dictionaries inside a training file that hold tensors, but no network."""

MOST_ENTRIES = 1_000_000  # a pickle of a few bytes can name the same dictionary twice at every depth


def flatten(content: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its dotted path, wrappers' segments left out; optimiser state is passed over.

    Lists are entered by place; that in a list of one is left out. Raises CossError for more entries than any network
    has.
    """
    return {plain_key(key): _dense(key, tensor) for key, tensor in _walk(content, "", count(1))}


def _dense(key: str, tensor: Tensor) -> Tensor:
    """A tensor with a number for each entry; CossError where it has none, or only rounded ones."""
    if tensor.is_meta:
        raise CossError(
            f"{key} has a shape and no values (it was on the meta device): save the network with its weights"
        )
    if tensor.is_quantized:
        raise CossError(f"{key} is quantised to integers: give the weights from before that")
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _walk(holder: Any, prefix: str, entries: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    for key, found in _items(holder):
        if next(entries) > MOST_ENTRIES:
            raise CossError(f"it holds more than {MOST_ENTRIES:,} entries, so it is no checkpoint of a network")
        value = plain(found)
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(key, str) and not NOT_WEIGHTS.search(key) and _may_hold_tensors(value):
            yield from _walk(value, f"{prefix}{key}." if key else prefix, entries)


def _items(holder: Any) -> Iterable[tuple[Any, Any]]:
    """A container's entries; a list's by their places, a list of one as if it were what it holds."""
    if isinstance(holder, dict):
        return dict.items(holder)  # a pickle can give an OrderedDict an attribute of the name "items"
    return [(str(place) if len(holder) > 1 else "", value) for place, value in enumerate(holder)]


def _may_hold_tensors(value: Any) -> bool:
    """Of lists, those that begin with a tensor or a container: a log of numbers is passed over."""
    if isinstance(value, list | tuple):
        return bool(value) and isinstance(plain(value[0]), Tensor | dict | list | tuple)
    return isinstance(value, dict)


def plain_key(key: str) -> str:
    """A key without the segments that wrappers add."""
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)

"""The tensors of a file by dotted keys: {"state_dict": {"module.x": ...}} is "state_dict.x"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from coss_eval.checkpoints.unpickle import Visits, plain
from coss_eval.errors import CossError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Segments of keys that DataParallel, torch.compile, FSDP and activation checkpointing add."""

NOT_WEIGHTS = re.compile(
    r"optim(?!al)|sched|scaler|loss(?!\w*(model|net|weights|state_dict))|hooks|callbacks|loops|memory_bank|rng|random",
    re.IGNORECASE,
)
"""Names of dictionaries inside a training file that hold tensors, but no network."""

UNPACKED = 64  # times what is stored of it that a tensor may take: one that is expanded from few numbers, or sparse
FREE = 2**28  # bytes that it may take in any case


def flatten(content: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its dotted path, wrappers' segments left out; optimiser state is passed over.

    Lists are entered by place; that in a list of one is left out. Raises CossError for a container at more places than
    any network has it, and for tensors far larger than what is stored of them.
    """
    return {plain_key(key): _dense(key, tensor) for key, tensor in _walk(content, "", Visits())}


def _dense(key: str, tensor: Tensor) -> Tensor:
    """A tensor with a number for each entry; CossError where it has none, or only rounded ones."""
    if tensor.is_meta:
        raise CossError(
            f"{key} has a shape and no values (it was on the meta device): save the network with its weights"
        )
    if tensor.is_quantized:
        raise CossError(f"{key} is quantised to integers: give the weights from before that")
    stored, size = stored_bytes([tensor]), tensor.numel() * tensor.element_size()
    if size > FREE + UNPACKED * stored:
        raise CossError(
            f"{key} would take {size:,} bytes, and the file holds {stored:,} of it: no weights of a network"
        )
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take in memory as they are, storages that they share counted once."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a tensor is stored as."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()  # type: ignore[no-untyped-call]
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    places = (tensor.crow_indices(), tensor.col_indices()) if rows else (tensor.ccol_indices(), tensor.row_indices())
    return *places, tensor.values()  # type: ignore[no-untyped-call]


def _walk(holder: Any, prefix: str, visits: Visits) -> Iterator[tuple[str, Tensor]]:
    for key, found in _items(holder):
        value = plain(found)
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(key, str) and not NOT_WEIGHTS.search(key) and _may_hold_tensors(value):
            visits.enter(found)
            yield from _walk(value, f"{prefix}{key}." if key else prefix, visits)


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

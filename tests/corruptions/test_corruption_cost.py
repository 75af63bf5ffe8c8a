"""What a corruption costs beyond time: tensors held at once, and how the work grows with the number of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coss_eval.corruptions import NAMES
from coss_eval.corruptions.draws import Draws, sample_keys
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.corruptions.seeds import condition_key

SIDE = 224
FLOAT_IMAGES = 12  # each of 3 x H x W float32


class Meter(TorchDispatchMode):
    """Bytes of the tensors that torch's operations have made and that are still held: now and at most; and all made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.made = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:
                self._held[StorageWeakRef(storage)] = storage.nbytes()
                self.made += storage.nbytes()
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._held.values()))
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def measure(images: Tensor, name: str, severity: int, flavour: Any = "imagecorruptions") -> Meter:
    """One chunk as the engine hands it to a thread; the first call fills what is kept between calls."""
    keys = sample_keys(torch.arange(len(images)), condition_key(0, name, severity))
    function, condition = CORRUPTIONS[name].function, CORRUPTIONS[name].at(severity, "imagenet", flavour)
    function(images, condition, Draws(keys))
    with Meter() as meter:
        function(images, condition, Draws(keys))
    return meter


@pytest.mark.parametrize("name", NAMES)
def test_at_most_twelve_float_images_an_image_are_held(images: Callable[..., Tensor], name: str) -> None:
    batch = images(4, SIDE, SIDE)
    for severity in (1, 5):
        peak = measure(batch, name, severity).peak / (batch.numel() * 4)
        assert peak <= FLOAT_IMAGES, severity


@pytest.mark.parametrize("name", NAMES)
def test_work_grows_linearly_with_the_pixels(images: Callable[..., Tensor], name: str) -> None:
    """Four times the pixels make four times the tensors, or fewer where padding weighs less; a tenth for rounding."""
    small, large = (measure(images(1, side, side), name, 5).made for side in (128, 256))
    assert large <= 4.4 * small

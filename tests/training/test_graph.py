"""Which runs' passes are captured as a CUDA graph; what the capture gives is tested on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_parts import DROPPING, SMALL, TINY, digits

from coss_eval.training.config import resolve
from coss_eval.training.graph import Passes, refusal
from coss_eval.training.loop import Trainer
from coss_eval.training.methods import names

CUDA = torch.device("cuda")


@pytest.mark.parametrize("method", names())
def test_every_method_of_ours_is_captured(method: str) -> None:
    assert refusal(resolve(method, **TINY), CUDA) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"accumulate": 2}, "micro-batches"),
        ({"sampling": "subset", "local_grid": 2}, "drawn anew"),
        (DROPPING, "from outside"),
    ],
)
def test_what_changes_from_step_to_step_is_not(fields: dict[str, Any], said: str) -> None:
    assert said in (refusal(resolve("co-byol", **{**TINY, **fields}), CUDA) or "")
    assert "CUDA" in (refusal(resolve("co-byol", **TINY), torch.device("cpu")) or "")


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18"])
def test_a_network_by_a_librarys_name_is_captured(arch: str) -> None:
    assert refusal(resolve("byol", **TINY, arch=arch), CUDA) is None


@pytest.mark.slow
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("fields", [{}, {"small_views": 2, "small_size": 16}], ids=str)
def test_a_step_of_tensors_alone_is_the_step(fields: dict[str, Any], static: bool) -> None:
    """What a graph would hold: images, draws made many steps ahead and labels as a flat list of tensors."""

    class Called:
        """Passes as they are, in place of a capture."""

        def __call__(self, passes: Passes, inputs: Sequence[Tensor]) -> Tensor:
            return passes([tensor.clone() for tensor in inputs])

    given = {**TINY, "options": SMALL["dino"], **fields}
    plain, flat = (Trainer(resolve("co-dino", **given), digits(96), Path(), torch.device("cpu")) for _ in range(2))
    split = flat.setup.feed.split
    batch = next(split.batches(batch_size=len(split)))
    flat.setup.feed._resident = (batch.images, batch.labels, batch.ids)
    flat.setup.feed.static = static
    flat.graphed = Called()  # type: ignore[assignment]
    for one, other in zip(plain.setup.feed.epoch(1), flat.setup.feed.epoch(1), strict=True):
        assert one.drawn is None
        assert other.drawn is not None
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(plain.take_step(one), flat.take_step(other), rtol=1e-4, atol=1e-5)

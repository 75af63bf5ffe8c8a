"""Which runs' passes are captured as a CUDA graph; what the capture gives is tested on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_parts import DROPPING, TINY

from coss_eval.training.config import resolve
from coss_eval.training.graph import refusal
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

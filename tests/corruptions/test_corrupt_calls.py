"""Wrong calls to ``corrupt`` are one-line errors that say what to do; the tables answer by size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coss_eval.corruptions import BENCHMARK, NAMES, VALIDATION, corrupt, resolve_table
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.corruptions.severity import TABLES, table_for
from coss_eval.errors import UsageError

IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
IDS = torch.arange(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, "images must be a uint8 tensor, got torch.float32"),
        ({"images": IMAGES.numpy()}, "images must be a uint8 tensor, got ndarray"),
        ({"images": IMAGES[0]}, r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        ({"images": IMAGES[:, :1]}, r"got \(2, 1, 32, 32\)"),
        ({"images": IMAGES[:, :, :31]}, "at least 32 x 32 pixels, got 31 x 32"),
        ({"severity": 0}, "severity must be an integer from 1 to 5, got 0"),
        ({"severity": 6}, "got 6"),
        ({"severity": 2.5}, "got 2.5"),
        ({"severity": True}, "got True"),
        ({"name": "fogg"}, "unknown corruption 'fogg'; did you mean fog"),
        ({"ids": IDS[:1]}, r"ids must be an int64 tensor of shape \(2,\).*got torch.int64 \(1,\)"),
        ({"ids": IDS.int()}, "got torch.int32"),
        ({"ids": [0, 1]}, "got list"),
        ({"ids": IDS.to("meta")}, "ids must be on the images' device cpu, got meta"),
        ({"table": "imagnet"}, "unknown severity table 'imagnet'; did you mean imagenet"),
        ({"flavour": "original"}, "unknown flavour"),
        ({"backend": "natve"}, "unknown backend 'natve'; did you mean native"),
        ({"backend": "reference", "table": "cifar"}, '"imagenet" table only'),
        ({"backend": "reference", "flavour": "imagenet-c"}, 'flavour "imagecorruptions" only'),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"images": IMAGES, "name": "fog", "severity": 1, "ids": IDS, **change}
    with pytest.raises(UsageError, match=message) as caught:
        corrupt(**call)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_stays_empty() -> None:
    assert corrupt(IMAGES[:0], "fog", 1, IDS[:0], backend="reference").shape == (0, 3, 32, 32)


def test_names() -> None:
    assert (len(BENCHMARK), len(VALIDATION), len(set(NAMES))) == (15, 4, 19)


def test_every_table_has_five_parameter_sets_of_one_length() -> None:
    for name in NAMES:
        lengths = {len(CORRUPTIONS[name].parameters(severity, table)) for severity in range(1, 6) for table in TABLES}
        assert len(lengths) == 1, name


@pytest.mark.parametrize(
    ("size", "table"),
    [((32, 32), "cifar"), ((64, 64), "tiny-imagenet"), ((96, 96), "tiny-imagenet"), ((224, 300), "imagenet"),
     ((500, 40), "cifar")],
)  # fmt: skip
def test_table_by_size(size: tuple[int, int], table: str) -> None:
    assert table_for(size) == table
    assert resolve_table(None, size, "native") == table
    assert resolve_table(None, size, "reference") == "imagenet"
    assert resolve_table("cifar", size, "native") == "cifar"

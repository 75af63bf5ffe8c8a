"""Attacks between devices: images, labels and ids may lie on another one than the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coss_eval.attacks import masking_flags, pgd

PLACES = [
    ("cpu", "cpu"),
    *(pytest.param(*p, marks=pytest.mark.cuda) for p in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda"))),
]


@pytest.mark.parametrize(("network_on", "images_on"), PLACES)
def test_devices_may_differ(network: nn.Module, digits, network_on: str, images_on: str) -> None:
    images, labels = digits.images[:12], digits.labels[:12]
    ids, options = torch.arange(12), {"eps": (2 / 255, 8 / 255), "steps": 5}
    expected = pgd(network, images, labels, ids=ids, **options)
    try:
        found = pgd(network.to(network_on), images.to(images_on), labels, ids=ids, **options)
        differing = (found.robust.cpu() != expected.robust).sum()
        assert differing <= 2  # of 24 verdicts, where rounding tips one
        masking_flags(network, images.to(images_on), labels, ids, found, steps=5)
    finally:
        network.cpu()

"""A network by the name of its architecture, taken apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from coss_eval.models.architecture import Architecture
from coss_eval.models.backbone import Backbone


def build(
    arch: str, *, seed: int | None = 0, num_classes: int | None = None, **fields: Any
) -> tuple[Backbone, nn.Module | None]:
    """A Backbone with random weights, and a random head of ``num_classes`` where that is given."""
    architecture = Architecture(arch, **fields)
    backbone, head = architecture.wrap(architecture.network(seed, num_classes))
    return backbone, head if num_classes is not None else None

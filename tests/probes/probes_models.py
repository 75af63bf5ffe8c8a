"""Small networks with random weights as Models."""

from __future__ import annotations

from small_networks import network
from torch import nn

from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import Model


def make_model(
    family: str = "cnn",
    seed: int = 0,
    img_size: int | None = None,
    head: nn.Module | None = None,
    classes: tuple[str, ...] | None = None,
) -> Model:
    """A Model of one of small_networks' families that expects a normalisation unlike ImageNet's."""
    preprocessing = Preprocessing(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4), img_size=img_size)
    backbone = network(family, seed)
    return Model(f"small {family}", family, backbone, head, classes, preprocessing, "", "made").identified()

"""Digits, a small random network, and a head fitted on its features: a subject that needs no training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from small_networks import Convolutional, network, scramble
from torch import Tensor, nn

import coss_eval as ce
from coss_eval.data.dataset import Dataset
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import HeadChoice
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import Model, weights_sha256
from coss_eval.probes import Compute, extract, fit_probe
from coss_eval.tasks.task import Subject


class Rounded(Convolutional):
    """Rounds its pixels: almost the same function, of zero gradient everywhere."""

    def features(self, pixels: Tensor) -> Tensor:
        return super().features((pixels * 16).round() / 16)


class Detached(Convolutional):
    """Its pixels get no gradient at all."""

    def features(self, pixels: Tensor) -> Tensor:
        return super().features(pixels).detach()


@cache
def digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(300, 0), test=data.test.limited(60, 0))


def model(backbone: Backbone | None = None, head: nn.Module | None = None) -> Model:
    backbone = network("cnn") if backbone is None else backbone
    choice: HeadChoice = "probe" if head is None else "own"
    classes = None if head is None else digits().classes
    shape = Preprocessing((0.3,) * 3, (0.3,) * 3, said_by="flag")
    sha256 = weights_sha256(backbone, head)
    return Model("small", "small", backbone, head, classes, shape, sha256, "own", head_choice=choice)


@cache
def subject(kind: str = "own") -> Subject:
    """ "own": its own head; "probe": a linear probe, cached where the test says; "rounded", "detached": hostile to
    gradients."""
    compute = Compute(torch.device("cpu"), 64, cache=False)
    if kind == "probe":
        return Subject(model(), digits(), replace(compute, cache=True))
    backbone: Backbone | None = {"rounded": Rounded, "detached": Detached}.get(kind, Convolutional)()
    assert backbone is not None
    scramble(backbone, 0)
    return Subject(model(backbone.eval(), _head()), digits(), compute)


@cache
def _head() -> nn.Module:
    """A linear layer that knows the digits."""
    assert digits().train is not None
    features = extract(model(), digits().train, device="cpu", cache=False)
    return fit_probe(features.values["global"], features.labels, num_classes=10, strengths=[0.01]).module()

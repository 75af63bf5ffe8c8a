"""Pixels in [0, 1] to logits: normalisation, up-sampling and class map are inside, and gradients come through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from build_networks import build
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, Preprocessing, to_float


class Pixels(Backbone):
    """Hands its input on, so that a test sees what reaches a backbone."""

    def features(self, pixels: Tensor) -> Tensor:
        return pixels

    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def identity(preprocessing: Preprocessing) -> Classifier:
    return Classifier(Pixels(), nn.Identity(), preprocessing)


def test_normalisation_is_inside() -> None:
    pixels = torch.rand(2, 3, 4, 5)
    seen = identity(Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))(pixels).view(2, 3, 4, 5)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]):
        assert torch.allclose(seen[:, channel], (pixels[:, channel] - mean) / std, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("side", "given"), [(8, 4), (8, 20), (8, 8), (None, 5)])
def test_pixels_are_resized_only_where_the_network_needs_one_size(interpolation, side, given) -> None:
    pixels = torch.rand(2, 3, given, given)
    plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, img_size=side, interpolation=interpolation)
    seen = identity(plain)(pixels).view(2, 3, side or given, side or given)
    if side in (None, given):
        assert torch.equal(seen, pixels)
    else:
        resized = F.interpolate(pixels, (side, side), mode=interpolation, align_corners=False, antialias=True)
        assert torch.allclose(seen, resized.clamp(0, 1), atol=2e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_gradients_reach_every_pixel_also_where_it_is_saturated(interpolation, value: float) -> None:
    pixels = torch.full((1, 3, 16, 16), value, requires_grad=True)
    identity(Preprocessing(img_size=56, interpolation=interpolation))(pixels).sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad > 0).all()


def test_a_class_map_picks_the_datasets_classes_in_its_order() -> None:
    backbone, head = build("resnet18", width=8, num_classes=10)
    assert head is not None
    pixels, wanted = torch.rand(2, 3, 32, 32), torch.tensor([7, 0, 3])
    whole = Classifier(backbone, head, Preprocessing()).eval()
    part = Classifier(backbone, head, Preprocessing(), class_map=wanted).eval()
    assert torch.equal(part(pixels), whole(pixels)[:, wanted])


def test_the_representations_are_those_that_the_logits_come_from() -> None:
    backbone, head = build("resnet18", width=8, num_classes=10)
    assert head is not None
    classifier = Classifier(backbone, head, Preprocessing(img_size=64)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    local, global_ = classifier.represent(pixels)
    assert local.shape == (2, 4, 64)
    assert torch.equal(head(global_), classifier(pixels))


def test_constants_follow_the_module_to_another_type() -> None:
    classifier = identity(Preprocessing()).double()
    assert classifier(torch.rand(1, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_to_float() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    before = images.clone()
    pixels = to_float(images)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal((pixels * 255).round().to(torch.uint8), before)
    assert torch.equal(images, before)
    with pytest.raises(UsageError, match=r"expected uint8 .* torch\.float32"):
        to_float(pixels)


def test_geometry_and_protocol() -> None:
    assert Preprocessing().geometry.size == 224
    odd = Preprocessing(img_size=96, crop_pct=1.0, interpolation="bicubic", said_by="flag")
    assert (odd.geometry.size, odd.geometry.crop_pct, odd.geometry.interpolation) == (96, 1.0, "bicubic")
    assert odd.protocol() == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "img_size": 96,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }

"""Heat maps of locations: against a few lines by hand, and what must hold of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import network, pixels
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.classifier import Preprocessing, to_float
from coss_eval.models.model import Model
from coss_eval.redundancy import heatmap, location_means

FAMILIES = ["cnn", "cnn+mlp", "nhwc", "mean tokens", "class token"]


def model(family: str = "cnn", head: nn.Module | None = None) -> Model:
    shape = Preprocessing((0.5,) * 3, (0.3,) * 3, said_by="flag")
    return Model("small", family, network(family), head, None, shape, "", "made").identified()


def images(count: int = 6) -> Tensor:
    return ((pixels(count) * 0.2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_the_cosine_with_the_others(family: str) -> None:
    one, image = model(family), images()[0]
    with torch.no_grad():
        local = one.encoder().represent(to_float(image[None])).local[0]
    expected = [
        float(torch.cosine_similarity(local[i], torch.cat([local[:i], local[i + 1 :]]).mean(0), dim=0))
        for i in range(len(local))
    ]
    found = heatmap(one, image)
    assert found.shape == (4, 4)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(heatmap(one, image.permute(1, 2, 0).numpy()), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_location_is_like_itself_and_another_image_less_than_its_own(family: str) -> None:
    one, batch = model(family), images(40)
    place = heatmap(one, batch[0], of=(1, 2))
    assert place[1, 2] == pytest.approx(1, abs=1e-5)
    assert (place <= 1 + 1e-5).all()
    centre = location_means(one, [batch[:20], batch[20:]])
    own, other = (
        np.mean([heatmap(one, image, of=target, centre=centre).mean().item() for image, target in pairs])
        for pairs in (zip(batch, batch, strict=True), zip(batch, batch.roll(1, 0), strict=True))
    )
    assert own > other + 0.1
    assert abs(other) < 0.3  # centred: unrelated images are about orthogonal


def test_the_mean_of_the_evidence_is_the_logit() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 5)
    one, image = model("cnn", head), images()[3]
    with torch.no_grad():
        logits = head(one.encoder()(to_float(image[None])))[0]
    for label in range(5):
        assert heatmap(one, image, label=label).mean() == pytest.approx(float(logits[label]), abs=1e-4)


def test_the_network_is_left_as_it_was() -> None:
    one = model()
    one.backbone.train()
    heatmap(one, images()[0])
    assert all(module.training for module in one.backbone.modules())
    assert not any(module._forward_hooks for module in one.backbone.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"site": "global"}, "no locations; those that have are stage1, stage2, prepool"),
        ({"of": (4, 0)}, "4 x 4: there is no location 4, 0"),
        ({"of": "locals"}, "got 'locals'"),
        ({"label": 0}, "linear head"),
        ({"centre": torch.zeros(3, 3)}, r"centre is \(3, 3\)"),
        ({"of": torch.zeros(16, 16)}, "expected a uint8 image"),
    ],
)
def test_wrong_calls(call: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        heatmap(model(), images()[0], **call)
    with pytest.raises(UsageError, match="not the mean of its locations"):
        heatmap(model("cnn+mlp", nn.Linear(10, 5)), images()[0], label=0)

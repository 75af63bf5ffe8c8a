"""Heat maps of locations: against a few lines by hand, and what must hold of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import network, pixels
from torch import Tensor, nn

from coss_eval.data.as_dataset import as_dataset
from coss_eval.errors import UsageError
from coss_eval.evaluation.saliency import write_heatmaps
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.models.model import Model
from coss_eval.redundancy import heatmap, heatmaps, location_means

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


def test_a_classifiers_evidence_is_of_its_own_classes() -> None:
    """Of the dataset's classes where they are some of the head's; one map is one of the batch's."""
    torch.manual_seed(0)
    one, batch, labels = model("cnn"), images(4), torch.tensor([2, 0, 1, 2])
    classifier = Classifier(one.backbone, nn.Linear(16, 5), one.preprocessing, class_map=torch.tensor([4, 0, 3])).eval()
    with torch.no_grad():
        logits = classifier(to_float(batch))
    found = heatmaps(classifier, batch, labels=labels)
    torch.testing.assert_close(found.mean((1, 2)), logits[torch.arange(4), labels], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], heatmap(classifier, batch[1], label=0), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="3 outputs, there is no 3"):
        heatmap(classifier, batch[0], label=3)
    classifier.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(UsageError, match="none has evidence"):
        heatmaps(classifier, batch, labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_a_batch_are_each_images(family: str) -> None:
    """For a location, for an image for each, and for one image for all."""
    one, batch = model(family), images(6)
    targets: list[Any] = [(2, 1), batch.flip(0), batch[:1]]
    for of in targets:
        found = heatmaps(one, batch, of=of)
        for i, image in enumerate(batch):
            target = of if isinstance(of, tuple) else of[min(i, len(of) - 1)]
            torch.testing.assert_close(found[i], heatmap(one, image, of=target), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="one for each of 6, got 2"):
        heatmaps(one, batch, of=batch[:2])


@pytest.mark.slow
@pytest.mark.parametrize("of", ["global", (3, 0), "another", "evidence"])
def test_the_page_has_the_maps_of_its_images_and_their_mean(of: Any, tmp_path: Path) -> None:
    """Against one call an image: its own place's mean taken off, the next image among those looked at."""
    pixels, labels = images(12), np.arange(12) % 3
    one = replace(model("cnn", nn.Linear(16, 3)), head_choice="own")
    data = as_dataset(test=(pixels.numpy(), labels), classes=["a", "b", "c"])
    write_heatmaps(one, data, tmp_path, of=of, images=4, limit=9, batch_size=2, device="cpu")
    split = data.test.limited(9, 0)
    (batch,) = split.batches(one.preprocessing.geometry, batch_size=9)
    expected = {}
    for i in range(9):
        call: dict[str, Any] = {"of": batch.images[(i + 1) % 9] if of == "another" else of}
        call["centre"] = location_means(one, [batch.images])
        call = {"label": int(batch.labels[i])} if of == "evidence" else call
        expected[int(batch.ids[i])] = heatmap(one, batch.images[i], **call).numpy()
    with np.load(tmp_path / "small.npz") as found:
        assert found["each"].shape == (4, 4, 4)
        for sample, each in zip(found["ids"], found["each"], strict=True):
            np.testing.assert_allclose(each, expected[int(sample)], atol=1e-5)
        np.testing.assert_allclose(found["mean"], np.mean(list(expected.values()), 0), atol=1e-5)
    assert (tmp_path / "heatmaps.png").stat().st_size > 5_000
    with pytest.raises(UsageError, match="kind of heat map"):
        write_heatmaps(one, data, tmp_path, of="globall", device="cpu")  # type: ignore[arg-type]


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
    with pytest.raises(UsageError, match="mean of its locations"):
        heatmap(model("cnn+mlp", nn.Linear(10, 5)), images()[0], label=0)

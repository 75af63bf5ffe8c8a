"""Crops at evaluation: their geometry, what must hold of accuracy and stability, and networks of one fixed size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.data.dataset import Dataset
from coss_eval.errors import UsageError
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import Model
from coss_eval.store import Store, column_name
from coss_eval.tasks.crops.task import POSITIONS, Crops, crop
from coss_eval.training.loop import train


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(300, 0), test=data.test.limited(60, 0))


@pytest.fixture(scope="module")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Model:
    fields = {"holdout": 0.0, "epochs": 5, "batch_size": 25, "lr": 0.4, "crop_min_scale": 0.6, "probe_every": 0}
    out = tmp_path_factory.mktemp("trained")
    return train("supervised", digits, preset="digits-tiny", out=out, device="cpu", **fields)


@pytest.fixture(scope="module")
def found(trained: Model, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    run = ce.evaluate(trained, digits, [Crops()], out=tmp_path_factory.mktemp("crops"))
    assert run.failures == ()
    run.report()
    assert (run.path / "figures" / "crops.png").exists()
    assert "Crops of the test images" in (run.path / "report.md").read_text()
    return run.table()


def values(found: pd.DataFrame, family: str, metric: str, by: str) -> pd.Series:
    rows = found[(found["family"] == family) & (found["metric"] == metric)]
    return rows.set_index(by)["value"]


@pytest.mark.parametrize("area", [0.08, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_crop_is_a_slice_of_its_share_of_the_image(area: float, position: str) -> None:
    pixels = torch.rand(2, 3, 20, 30)
    part = crop(pixels, area, *POSITIONS[position])
    height, width = part.shape[2:]
    assert height * width / 600 == pytest.approx(area, abs=0.03)
    assert width / height == pytest.approx(1.5, abs=0.2)
    down, right = (round(share * (side - kept)) for share, side, kept in
                   zip(POSITIONS[position], (20, 30), (height, width), strict=True))  # fmt: skip
    assert torch.equal(part, pixels[:, :, down : down + height, right : right + width])


def test_each_image_may_have_a_place_of_its_own() -> None:
    pixels = torch.rand(3, 3, 16, 16)
    places = torch.tensor([0.0, 0.4, 1.0])
    together = crop(pixels, 0.25, places, 1 - places)
    for i, place in enumerate(places.tolist()):
        assert torch.equal(together[i], crop(pixels, 0.25, place, 1 - place)[i])


@pytest.mark.slow
def test_every_family_is_measured_with_intervals_and_verdicts(found: pd.DataFrame, digits: Dataset) -> None:
    assert values(found, "area", "accuracy", "area").index.tolist() == [0.08, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert values(found, "position", "accuracy", "position").index.tolist() == list(POSITIONS)
    assert values(found, "resolution", "accuracy", "scale").index.tolist() == [0.25, 0.5, 0.75, 1.0, 1.5]
    assert values(found, "pooled", "accuracy", "crops").index.tolist() == [1, 2, 4, 8]
    assert set(found.loc[found["metric"] == "chance", "value"]) == {0.1}  # 1 / classes, beside the accuracies
    found = found[found["metric"] != "chance"]
    assert ((found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()
    assert set(found["n"]) == {len(digits.test)}


@pytest.mark.slow
def test_the_whole_image_is_the_clean_classifier(found: pd.DataFrame, trained: Model, digits: Dataset) -> None:
    logits = ce.fit_classifier(trained, digits, device="cpu")
    batch = next(digits.test.batches(batch_size=60))
    with torch.inference_mode():
        clean = (logits(batch.images / 255).argmax(1) == batch.labels).double().mean().item()
    assert clean > 0.5
    for family, by in (("area", "area"), ("resolution", "scale")):
        assert values(found, family, "accuracy", by)[1.0] == pytest.approx(clean)
        assert values(found, family, "stability", by)[1.0] == pytest.approx(1)


@pytest.mark.slow
def test_more_of_the_image_brings_the_representation_nearer(found: pd.DataFrame) -> None:
    for metric in ("stability", "accuracy"):
        measured = values(found, "area", metric, "area")
        assert measured[0.08] < measured[0.8]


@pytest.mark.slow
def test_pooled_crops_of_the_whole_image_are_the_image(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    table = ce.evaluate(trained, digits, [Crops((), (), (), (1, 3), area=1.0)], out=tmp_path).table()
    assert values(table, "pooled", "stability", "crops").tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.slow
def test_stability_is_the_centred_cosine_of_a_loop_over_images(
    found: pd.DataFrame, trained: Model, digits: Dataset
) -> None:
    batch = next(digits.test.batches(batch_size=60))
    classifier = ce.fit_classifier(trained, digits, device="cpu")
    with torch.inference_mode():
        pixels = batch.images.float() / 255
        parts = F.interpolate(pixels[:, :, 16:, :16], size=(32, 32), mode="bilinear", antialias=True)
        full, part = (classifier.backbone(classifier.normalise(x)).double() for x in (pixels, parts))
    mean = full.mean(0)
    expected = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(part - mean, full - mean, strict=True)]
    assert values(found, "position", "stability", "position")["bottom left"] == pytest.approx(
        np.mean(expected), abs=1e-5
    )


@pytest.mark.slow
def test_no_verdict_depends_on_the_batch_size(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    task = Crops((0.3,), ("top left",), (0.5,), (1, 3))
    few = replace(digits, test=digits.test.limited(20, 0))
    stores = [
        Store(ce.evaluate(trained, few, [task], out=tmp_path / str(size), batch_size=size).path) for size in (7, 20)
    ]
    records = stores[0].records()
    assert len(records) == 4
    for record in records:
        one, other = (store.samples(record["key"]) for store in stores)
        assert one is not None
        pd.testing.assert_frame_equal(one, other)
        accuracies = [m for m in record["measurements"] if m["metric"] == "accuracy"]
        assert list(one) == [column_name("accuracy", m["condition"]) for m in accuracies]


@pytest.mark.slow
def test_a_network_of_one_size_sees_smaller_images_brought_back(digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    model = make_model("timm:vit_tiny_patch16_224", img_size=32)
    run = ce.evaluate(model, few, [Crops((0.3,), ("centre",), (0.5, 2), (2,))], out=tmp_path)
    assert run.failures == ()
    assert values(run.table(), "resolution", "stability", "scale").index.tolist() == [0.5, 1.0]
    notes = {note for record in Store(tmp_path).records() for note in record["notes"]}
    assert any("takes 32 px only" in note for note in notes)
    assert any("fitted on full training images" in note for note in notes)


@pytest.mark.slow
def test_a_scale_too_small_for_the_network_is_a_note(digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    model = make_model("timm:convnext_atto", preprocessing=Preprocessing(img_size=32))
    task = Crops((), (), (0.25, 0.5), ())
    run = ce.evaluate(model, few, [task], out=tmp_path)
    assert run.failures == ()
    record = Store(tmp_path).records()[0]
    missing = {0.25, 0.5, 1.0} - {m["condition"]["scale"] for m in record["measurements"]}
    assert missing == {0.25, 0.5}
    assert sum("does not take images at scale" in note for note in record["notes"]) == len(missing)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"areas": (0.5, 1.5)}, "at most 1"),
        ({"areas": (0.0,)}, "more than 0"),
        ({"area": 2.0}, "at most 1"),
        ({"positions": ("center",)}, "centre"),
        ({"scales": (0.0,)}, "above 0"),
        ({"counts": (0,)}, "at least 1"),
    ],
)
def test_crops_that_cannot_be_are_refused(options: dict[str, tuple[float, ...]], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Crops(**options)  # type: ignore[arg-type]

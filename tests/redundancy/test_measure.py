"""``measure`` on real small networks: sites, layouts, batches, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from build_networks import build
from small_networks import FAMILIES, network, pixels

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.data.dataset import Dataset
from coss_eval.errors import UsageError
from coss_eval.models.classifier import to_float
from coss_eval.models.hooks import outputs_of
from coss_eval.models.model import Model
from coss_eval.redundancy import measure
from coss_eval.reports.results import Results
from coss_eval.store import Cell, Measurement, Store
from coss_eval.tasks.redundancy.report import against_untrained, scores
from coss_eval.tasks.redundancy.task import Redundancy

IMAGES = pixels(40)


def values(frame: pd.DataFrame) -> dict[str, float]:
    return dict(zip(frame["metric"], frame["value"], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_site(family: str) -> None:
    backbone = network(family)
    for site in ("stage1", "prepool"):
        frame = measure(backbone, IMAGES.split(16), site)
        assert list(frame.columns) == ["metric", "value", "n", "low", "high"]
        found = frame.set_index("metric")
        assert found.index.is_unique
        assert {"within", "between", "normalised", "r2", "icc", "lidar", "within_at_distance_1"} <= set(found.index)
        assert (frame["n"] == 40).all()
        assert frame["value"].notna().all()
        bounded = frame.dropna(subset="low")
        assert ((bounded["low"] <= bounded["value"]) & (bounded["value"] <= bounded["high"])).all()
    assert ("local_global" in found.index) == (
        family == "class token"
    )  # before pooling, elsewhere the mean or of other D


@pytest.mark.parametrize("arch", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_real_networks(arch: str) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    backbone, _ = build(arch, img_size=64 if arch.startswith("timm:") else None)
    images = pixels(6, size=64)
    with torch.no_grad():
        local = backbone.eval().represent(images).local
    frame = measure(backbone, [images]).set_index("metric")
    assert frame["value"].notna().all()
    centred = (local - local.mean((0, 1))).double()
    s = torch.nn.functional.normalize(centred, dim=-1).sum(1)
    locations = local.shape[1]
    expected = (s.square().sum() - 6 * locations) / (6 * locations * (locations - 1))
    assert frame.loc["within", "value"] == pytest.approx(float(expected), abs=1e-4)


def test_the_same_numbers_whatever_the_batch_size_or_kind_of_source() -> None:
    backbone, images = network("cnn").double(), IMAGES.double()
    expected = values(measure(backbone, images.split(7)))
    sources: list[Any] = [[images], images.split(1), lambda: iter(images.split(13)), iter(images.split(9))]
    for source in sources:
        assert values(measure(backbone, source)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_map_and_channels_last_networks_agree() -> None:
    one, other = network("cnn"), network("nhwc")
    other.load_state_dict(one.state_dict(), strict=False)
    for first, second in (("layer1", "first"), ("layer2", "second")):
        other.get_submodule(second).stage.load_state_dict(one.get_submodule(first).state_dict())  # type: ignore[operator,union-attr]
    assert values(measure(other, [IMAGES])) == pytest.approx(values(measure(one, [IMAGES])), rel=1e-4, abs=1e-5)


def test_border_leaves_the_inner_cells() -> None:
    backbone = network("cnn")
    place = backbone.sites["stage1"].module
    with torch.no_grad(), outputs_of(backbone, {place}) as outputs:
        backbone(IMAGES)
    local = outputs[place]
    found = {border: values(measure(backbone, [IMAGES], "stage1", border=border)) for border in (0, None, 1, 2)}
    assert not any("interior" in name for name in found[0])
    assert found[None] == found[1]
    inner = (local - local.mean(0)).double()[..., 2:-2, 2:-2].flatten(2).transpose(1, 2)  # (B, 16, D) of 8 x 8
    s = torch.nn.functional.normalize(inner, dim=-1).sum(1)
    assert found[2]["within_interior"] == pytest.approx(float((s.square().sum() / 40 - 16) / (16 * 15)), abs=1e-4)
    assert {name: v for name, v in found[2].items() if "interior" not in name} == found[0]


def test_receptive_field_adds_rows() -> None:
    frame = measure(network("cnn"), [IMAGES], "stage1", receptive_field=(5, 2)).set_index("metric")
    assert {"within_overlapping", "within_disjoint"} <= set(frame.index)


def test_nothing_is_left_behind() -> None:
    backbone = network("cnn")
    state = copy.deepcopy(backbone.state_dict())
    measure(backbone, [IMAGES])
    assert all(not module._forward_hooks for module in backbone.modules())
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())
    with pytest.raises(RuntimeError):
        measure(backbone, [torch.zeros(4, 3, 16, 16, dtype=torch.int64)])
    assert all(not module._forward_hooks for module in backbone.modules())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown site": (lambda: measure(network("cnn"), [IMAGES], "stage9"), "expected one of stage1, stage2, prepool"),
    "site without locations": (lambda: measure(network("cnn"), [IMAGES], "global"), "expected one of stage1"),
    "layout": (lambda: measure(network("cnn"), [IMAGES.permute(0, 2, 3, 1)]), "move the channels to the second place"),
    "other sizes": (lambda: measure(network("cnn"), [IMAGES, pixels(4, size=24)]), "images of one size"),
    "train mode": (lambda: measure(network("cnn").train(), [IMAGES]), "eval mode"),
    "no batch": (lambda: measure(network("cnn"), []), "at least 2, but got 0"),
    "one image": (lambda: measure(network("cnn"), [IMAGES[:1]]), "at least 2, but got 1"),
    "border": (lambda: measure(network("cnn"), [IMAGES], border=2), "border 2 leaves no two of the 4 x 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def small_digits(order: slice = slice(None)) -> Dataset:
    digits = ce.load_dataset("digits")
    limited = digits.test.limited(120)
    return replace(digits, test=limited.subset(np.arange(120)[order]))


def trained() -> Model:
    """Weights that are not those of the untrained network beside it."""
    return make_model("rf5_resnet18", stem="cifar", width=8, seed=7, name="net")


@pytest.mark.slow
def test_each_image_is_stored_and_pairs_the_untrained_network(tmp_path: Path) -> None:
    """The report's difference is that of each image's own numbers; a class's row their mean over its images."""
    data = small_digits()
    ce.evaluate(trained(), data, [Redundancy()], out=tmp_path, device="cpu").report()
    store = Store(tmp_path)
    by_state = {record["params"]["weights"]: record for record in store.records()}
    values = {m["metric"]: m["value"] for m in by_state["trained"]["measurements"]}
    frames = {state: store.samples(record["key"]) for state, record in by_state.items()}
    column = {state: f"normalised_per_position: site=prepool,weights={state}" for state in frames}
    own, untrained = (frames[state][column[state]] for state in ("trained", "untrained"))
    assert sorted(own.index) == sorted(data.test.ids)
    assert own.mean() == pytest.approx(values["normalised_per_position"], abs=1e-6)

    shown = against_untrained(Results(store))
    assert shown is not None
    number = next(row for row in shown.rows if row.name == "normalised" and "position" in row.group).entries[0]
    paired = (own - untrained.reindex(own.index)).to_numpy(dtype=float)
    half = 1.98 * paired.std(ddof=1) / 120**0.5
    assert [number.value, number.low] == pytest.approx([paired.mean(), paired.mean() - half], abs=1e-4)
    assert number.value != 0

    classes = pd.read_csv(tmp_path / "tables" / "redundancy_by_class.csv")
    labels = pd.Series(data.test.labels, index=data.test.ids)
    expected = own.groupby(labels.reindex(own.index)).mean()
    assert classes["net"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.slow
def test_the_order_of_the_data_changes_nothing(tmp_path: Path) -> None:
    found = []
    for name, order in (("there", slice(None)), ("back", slice(None, None, -1))):
        ce.evaluate(trained(), small_digits(order), [Redundancy()], out=tmp_path / name, device="cpu")
        records = Store(tmp_path / name).records()
        record = next(one for one in records if one["params"]["weights"] == "trained")
        found.append({m["metric"]: (m["value"], m["low"]) for m in record["measurements"]})
    assert found[0] == found[1]


def test_results_of_an_older_version_have_their_table_beside_new_ones(tmp_path: Path) -> None:
    """Another network's: no image's own numbers and no n in the spectral rows, so a difference is left out alone."""
    ce.evaluate(trained(), small_digits(), [Redundancy()], out=tmp_path, device="cpu")
    store = Store(tmp_path)
    old = next(record for record in store.records() if record["params"]["weights"] == "trained")
    condition = {"site": "prepool", "weights": "trained"}
    numbers = [Measurement(name, 0.4, 120, 0.3, 0.5, condition) for name in ("normalised_per_position", "lidar")]
    cell = Cell("redundancy", condition, 2)
    protocol = old["protocol"] | {"model": {"sha256": "ab" * 32, "arch": "resnet18"}}
    record = {"protocol": protocol, "cell": cell, "model": "older", "measurements": numbers, "notes": []}
    store.write(store.key(protocol, cell), record)
    results = Results(store)
    label = next(one for one in results.labels if one.startswith("older"))
    rows = {score.name: score for score in scores(results)[0].scores}
    assert {"LiDAR", "LiDAR (n = 120)"} <= rows.keys()
    lidar = rows["LiDAR"].of(label)
    assert lidar is not None
    assert lidar.value == 0.4


@pytest.mark.slow
def test_a_probe_reads_the_locations(tmp_path: Path) -> None:
    """Each number from the probe's logits by a few lines; all locations pooled are the probe's own accuracy."""
    data, model = small_digits(), trained()
    assert data.train is not None
    data = replace(data, train=data.train.limited(200))
    ce.evaluate(model, data, [Redundancy(probe=True)], out=tmp_path, device="cpu").report()
    record = next(one for one in Store(tmp_path).records() if "probe" in one["params"])
    found = {(m["metric"], m["condition"].get("keep")): m["value"] for m in record["measurements"]}

    classifier = ce.fit_classifier(model, data, head="probe", device="cpu")
    batch = next(data.test.batches(batch_size=120))
    with torch.no_grad():
        local, global_ = classifier.represent(to_float(batch.images))
        backbone = classifier.backbone
        single = backbone.pool(local.flatten(0, 1)[:, :, None, None])  # an image of that location alone
        logits = classifier.logits(single).reshape(120, local.shape[1], -1).double()
        whole = (classifier.logits(global_).argmax(1) == batch.labels).double().mean()
    votes, p = logits.argmax(2).numpy(), logits.softmax(2).numpy()
    locations = votes.shape[1]
    pairs = [(a, b) for a in range(locations) for b in range(locations) if a != b]
    middle = p.mean(1, keepdims=True)
    expected = {
        ("local_accuracy", None): (votes == batch.labels.numpy()[:, None]).mean(),
        ("vote_agreement", None): np.mean([(votes[:, a] == votes[:, b]).mean() for a, b in pairs]),
        ("vote_divergence", None): (p * np.log(p / middle)).sum(2).mean(),
        ("kept_accuracy", locations): float(whole),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    curve = {k: value for (metric, k), value in found.items() if metric == "kept_accuracy"}
    assert list(curve) == [1, 2, 4, 8, 16]
    assert curve[1] < curve[16]
    enough = found["locations_for_90", None]
    assert min(k for k, value in curve.items() if value >= 0.9 * curve[16]) == enough
    shares = [m["value"] for m in record["measurements"] if m["metric"] == "diffused_accuracy"]
    assert len(shares) == 4
    assert 0.1 < shares[0] < shares[-1] <= 1
    report = (tmp_path / "report.md").read_text()
    assert "| accuracy, 1 location |" in report
    assert "| accuracy, 1/16 of the dimensions |" in report


def test_a_probe_of_no_mean_is_refused_in_one_line(tmp_path: Path) -> None:
    data = small_digits()
    model = make_model("vit_d64_l1_h2_p16", img_size=32, name="class-token")
    run = ce.evaluate(model, data, [Redundancy(probe=True)], out=tmp_path, device="cpu")
    assert [failure for failure in map(str, run.failures) if "leave out --probe" in failure]

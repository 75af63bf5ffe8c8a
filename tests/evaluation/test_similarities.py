"""Similarity between networks and sites: against features taken one after the other, and what must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import network

import coss_eval as ce
from coss_eval.data.choose import order_of
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation.similarity import minibatch_size, read_recordings, similarities
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import Model
from coss_eval.reports.similarity import Similarities
from coss_eval.similarity import Recordings, StreamedCKA, against_recordings, cka, procrustes, rsa

IMAGES = 200
SITES = ("stage1", "prepool", "global")


def model(family: str, seed: int = 0) -> Model:
    shape = Preprocessing((0.3,) * 3, (0.3,) * 3, said_by="flag")
    return Model(f"{family} {seed}", family, network(family, seed), None, None, shape, "", "made").identified()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = ce.load_dataset("digits")
    test = data.test.limited(IMAGES)
    return replace(data, test=replace(test, limit=None))


@pytest.fixture(scope="module")
def found(digits: Dataset) -> Similarities:
    measures = ["cka", "rsa", "procrustes"]
    return similarities([model("cnn"), model("cnn+mlp")], digits, sites=SITES, measures=measures, images=90)


def test_it_is_what_features_taken_apart_give(digits: Dataset, found: Similarities) -> None:
    order = np.argsort(order_of(digits.test.ids, "similarity"))
    features = {}
    for family in ("cnn", "cnn+mlp"):
        values = ce.extract(model(family), digits.test, sites=SITES, cache=False).values
        features |= {(f"{family} 0", site): values[site][order] for site in SITES}
    streamed = StreamedCKA()
    for places in torch.arange(IMAGES).split(minibatch_size(IMAGES)):
        streamed.add({" ".join(name): values[places] for name, values in features.items()})
    assert found.places == tuple(features)
    np.testing.assert_allclose(found.matrix("cka"), streamed.matrix(), atol=1e-5)
    (first, last) = ("cnn 0", "prepool"), ("cnn+mlp 0", "global")
    for name, measure in (("rsa", rsa), ("procrustes", procrustes)):
        expected = measure(features[first][:90], features[last][:90])
        assert found.matrix(name).loc[first, last] == pytest.approx(expected, abs=1e-4)
    table = found.table()
    assert len(table) == 3 * 15
    apart = table[table["value"] < 0.999]  # the mean before pooling is the global of the one
    assert 20 < len(apart) < len(table)
    assert (apart["low"] < apart["value"]).all()
    assert (apart["value"] < apart["high"]).all()
    assert dict(table.groupby("measure")["n"].first()) == {"cka": IMAGES, "procrustes": 90, "rsa": 90}


def test_neither_the_order_of_the_data_nor_the_batch_size_matters(digits: Dataset, found: Similarities) -> None:
    shuffled = replace(digits, test=digits.test.subset(np.random.default_rng(0).permutation(IMAGES)))
    models = [model("cnn"), model("cnn+mlp")]
    again = similarities(models, shuffled, sites=SITES, measures=["cka", "rsa"], images=90, batch_size=7)
    for name in ("cka", "rsa"):
        np.testing.assert_allclose(again.matrix(name), found.matrix(name), atol=1e-5)
        np.testing.assert_allclose(again.measures[name].low, found.measures[name].low, atol=1e-4)


def test_all_locations_are_the_units_side_by_side(digits: Dataset) -> None:
    """Where a network's map and that of another differ by its layout alone, CKA of all locations is 1, as of means."""
    data = replace(digits, test=digits.test.subset(range(40)))
    one, other = model("cnn"), model("nhwc")
    other.backbone.load_state_dict(one.backbone.state_dict(), strict=False)
    call = {"sites": ["stage1"], "measures": ["cka"]}
    assert similarities([one, other], data, locations="all", **call).matrix().iloc[0, 1] == pytest.approx(1, abs=1e-5)  # type: ignore[arg-type]
    call["sites"] = ["stage1", "global"]
    of_means, of_all = (similarities(one, data, locations=name, **call).matrix() for name in ("mean", "all"))  # type: ignore[arg-type]
    assert abs(of_means.iloc[0, 1] - of_all.iloc[0, 1]) > 0.01


def recorded(digits: Dataset, name: str = "V4", repeats: int = 6) -> Recordings:
    """100 test images in another order: the mean of stage 1 of "cnn" several times, with noise."""
    order = np.random.default_rng(1).permutation(IMAGES)[:100]
    features = ce.extract(model("cnn"), digits.test, sites=["stage1"], cache=False).values["stage1"][order]
    noise = torch.randn(100, repeats, features.shape[1], generator=torch.Generator().manual_seed(0))
    values = features[:, None] + features.std(0) * noise
    return Recordings(name, values, digits.test.ids[order], repeats=True)


def test_recordings_stand_beside_networks_by_their_ids(digits: Dataset) -> None:
    given = recorded(digits)
    call = {"sites": ["stage1", "global"], "measures": ["cka", "rsa", "procrustes"]}
    found = similarities(model("cnn"), digits, recordings=given, **call)  # type: ignore[arg-type]
    assert found.places[-1] == ("V4", "recordings")
    test = digits.test
    mine = test.subset(np.flatnonzero(np.isin(test.ids, given.ids)))
    mine = mine.subset(np.argsort(order_of(mine.ids, "similarity"), kind="stable"))
    rows = [np.flatnonzero(np.asarray(given.ids) == i)[0] for i in mine.ids]
    features = ce.extract(model("cnn"), mine, sites=["stage1"], cache=False).values["stage1"]
    values = torch.as_tensor(given.values)[rows]
    table = found.table().set_index(["measure", "site_a", "site_b"])
    for name, measure in (("rsa", rsa), ("cka", cka)):
        direct = against_recordings(features, values, measure=measure)
        row = table.loc[(name, "stage1", "recordings")]
        assert row["n"] == 100
        assert row["value"] == pytest.approx(direct.value, abs=0.03 if name == "cka" else 1e-5)  # cka: by minibatches
        assert row["ceiling"] == pytest.approx(direct.ceiling, abs=1e-5)
        assert table.loc[(name, "stage1", "global"), "ceiling"] == 1
        assert row["value"] > table.loc[(name, "global", "recordings"), "value"]
    assert np.isnan(table.loc[("procrustes", "stage1", "recordings"), "ceiling"])
    keys = dict(zip(test.ids.tolist(), test.keys, strict=True))
    by_key = Recordings("V4", given.values, [keys[i] for i in np.asarray(given.ids).tolist()], repeats=True)
    again = similarities(model("cnn"), digits, recordings=by_key, **call)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.matrix("rsa"), found.matrix("rsa"))


def test_recorded_locations_are_averaged_or_side_by_side(digits: Dataset, tmp_path: Path) -> None:
    """A network's own map as a recording: it is that site, whichever way locations are taken."""
    data = replace(digits, test=digits.test.subset(range(60)))
    ce.write_features(model("cnn"), data, tmp_path, sites=["stage1"], locations="all")
    maps = np.load(next(tmp_path.rglob("stage1.npy")))
    assert maps.ndim == 3
    given = Recordings("map", maps, np.load(next(tmp_path.rglob("ids.npy"))))
    for locations in ("mean", "all"):
        found = similarities(
            model("cnn"), data, sites=["stage1"], measures=["cka"], recordings=given, locations=locations
        )
        assert found.matrix().iloc[0, 1] == pytest.approx(1, abs=1e-5)
        assert found.table()["ceiling"].isna().all()  # no repeats


def test_a_page_tells_the_share_of_the_ceiling(digits: Dataset, tmp_path: Path) -> None:
    given = recorded(digits)
    found = similarities(model("cnn"), digits, sites=["stage1"], measures=["cka"], recordings=[given])
    found.write(tmp_path)
    row = found.table().iloc[0]
    page = (tmp_path / "report.md").read_text()
    assert "2 representations of 1 network and 1 recordings on digits" in page
    assert f"| {row['ceiling']:.3f} | {row['value'] / row['ceiling']:.3f} |" in page
    assert found.entry["recordings"][0]["shape"] == [100, 6, torch.as_tensor(given.values).shape[2]]


ONE = np.ones((3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ids: Recordings("V1", ONE[:, 0], ids[:3]), r"the shape \(images, units\).*got \(3,\)"),
        (lambda ids: Recordings("V1", ONE, ids[:3], repeats=True), r"2 or more, units\), got \(3, 4\)"),
        (lambda ids: Recordings("V1", np.ones((3, 1, 4)), ids[:3], repeats=True), "2 or more"),
        (lambda ids: Recordings("V1", ONE, ids[:2]), "each of the 3 images, got int64"),
        (lambda ids: Recordings("V1", ONE, [0.5, 1.5, 2.5]), "each of the 3 images, got float64"),
        (lambda ids: Recordings("V1", ONE, ids[[0, 1, 1]]), "have an image twice"),
        (lambda ids: Recordings("V1", ONE * np.nan, ids[:3]), "hold NaN or infinity"),
        (lambda ids: Recordings(" ", ONE, ids[:3]), "need a name"),
        (lambda ids: Recordings("V1", ONE, [1, 2, 3]), "are of 3 images that are not among the 200 test images.*1"),
        (lambda ids: Recordings("V1", ONE, ["a", "b", "c"]), "keys such as 'test/"),
        (lambda ids: Recordings("cnn 0", ONE, ids[:3]), "the name of two things"),
        (lambda ids: [Recordings("a", ONE, ids[:3]), Recordings("b", ONE, ids[3:6])], "a and b have no image in comm"),
        (lambda ids: Recordings("V1", ONE, ids[:3]), "4 images or more, got 3"),
        (lambda ids: Recordings("V1", np.ones((50, 4)), ids[:50]), "V1 recordings does not tell images apart"),
    ],
)
def test_recordings_that_do_not_fit_are_one_line(make: Callable[..., Any], message: str, digits: Dataset) -> None:
    with pytest.raises((UsageError, CossError), match=message) as caught:
        similarities(model("cnn"), digits, sites=["global"], measures=["cka"], recordings=make(digits.test.ids))
    assert "\n" not in str(caught.value)


def test_files_of_recordings(digits: Dataset, tmp_path: Path) -> None:
    given = recorded(digits)
    np.savez(tmp_path / "v4.npz", repeats=torch.as_tensor(given.values).numpy(), ids=np.asarray(given.ids))
    found = read_recordings(f"V4={tmp_path / 'v4.npz'}")
    assert (found.name, found.repeats) == ("V4", True)
    np.testing.assert_array_equal(found.values, given.values)
    np.savez(tmp_path / "both.npz", units=ONE, locations=ONE[:, None], ids=np.arange(3))
    np.savez(tmp_path / "shape.npz", units=ONE[:, None], ids=np.arange(3))
    np.savez(tmp_path / "objects.npz", units=np.array([{}, {}]), ids=np.arange(2))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (
        ("missing", "there is no file"),
        ("both", "needs ids and one of units, locations and repeats; it has ids, units, locations"),
        ("shape", r"units has the shape \(3, 1, 4\)"),
        ("objects", "no .npz of plain arrays"),
        ("text", "no .npz of plain arrays"),
    ):
        with pytest.raises(UsageError, match=message):
            read_recordings(f"V4={tmp_path / name}.npz")
    with pytest.raises(UsageError, match=r"expected --recordings NAME=FILE\.npz"):
        read_recordings("v4.npz")


@pytest.mark.parametrize("images", [4, 16, 159, 160, 161, 451, 2561, 50_000])
def test_minibatches_are_even_and_enough_for_an_interval(images: int) -> None:
    size = minibatch_size(images)
    sizes = [min(size, images - start) for start in range(0, images, size)]
    assert max(sizes) <= 256
    assert len(sizes) >= min(10, images // 16)
    assert min(sizes) >= min(4, images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sites": ["stage9"]}, "cnn 0: no site 'stage9'.*prepool"),
        ({"measures": ["ckaa"]}, "did you mean cka"),
        ({"measures": []}, "cka, rsa, procrustes"),
        ({"sites": ["global"]}, "two sites or two models"),
        ({"locations": "all"}, "--measures cka"),
        ({"images": 5001}, "3 to 5000"),
        ({"limit": 3}, "4 images or more, got 3"),
    ],
)
def test_wrong_calls(call: dict[str, object], message: str, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=message):
        similarities(model("cnn"), digits, **call)  # type: ignore[arg-type]


def test_a_network_that_tells_no_images_apart_is_named(digits: Dataset) -> None:
    dead = model("cnn")
    with torch.no_grad():
        for parameter in dead.backbone.layer2.parameters():
            parameter.zero_()
    with pytest.raises(CossError, match="cnn 0 prepool does not tell images apart"):
        similarities(dead, digits, sites=SITES)
    with torch.no_grad():
        dead.backbone.layer2.skip.bias.fill_(torch.inf)
    with pytest.raises(CossError, match="representations at prepool hold NaN or infinity"):
        similarities(dead, digits, sites=SITES)


@pytest.mark.slow
def test_what_is_written(digits: Dataset, found: Similarities, tmp_path: Path) -> None:
    names = {path.relative_to(tmp_path).as_posix() for path in found.write(tmp_path)}
    for measure in found.measures:
        assert {f"figures/similarity_{measure}.{kind}" for kind in ("png", "pdf")} < names
        assert f"tables/similarity_{measure}.csv" in names
    report = (tmp_path / "report.md").read_text()
    assert "6 representations of 2 networks on digits" in report
    assert digits.test.fingerprint in report
    assert model("cnn").sha256[:16] in report


@pytest.fixture
def limited(digits: Dataset) -> Callable[[], Similarities]:
    return lambda: similarities(model("cnn"), digits, measures=["cka"], limit=50)


def test_a_limit_marks_the_report(limited: Callable[[], Similarities], tmp_path: Path) -> None:
    limited().write(tmp_path)
    assert "LIMITED" in (tmp_path / "report.md").read_text()


def test_a_plain_network_and_arrays_are_compared_as_they_are() -> None:
    """What people have in their hands, without a file: the mean over its locations is this network's global."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    data = ce.as_dataset(test=(pixels, np.arange(40) % 4))
    found = ce.similarities(network, data, sites=["prepool", "global"], measures=["cka"], device="cpu")
    assert found.matrix("cka").to_numpy()[0, 1] == pytest.approx(1, abs=1e-5)

"""Features in files: what any reader of the format finds is what extract gives, with what it is of beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from small_networks import network

import coss_eval as ce
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation.extraction import write_features
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import Model
from coss_eval.similarity import dissimilarities

SITES = ("stage1", "prepool", "global")
Arrays = dict[str, NDArray[Any]]


def model(family: str = "cnn+mlp") -> Model:
    shape = Preprocessing((0.3,) * 3, (0.3,) * 3, img_size=16, said_by="flag")
    return Model(f"small/{family}", family, network(family), None, None, shape, "", "made").identified()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return ce.load_dataset("digits")


def read_npy(path: Path) -> Arrays:
    files = {"features": path, "ids": path.with_name("ids.npy"), "labels": path.with_name("labels.npy")}
    return {name: np.load(file) for name, file in files.items()}


def read_hdf5(path: Path) -> Arrays:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path) as file:
        assert json.loads(file.attrs["coss_eval"])["model"]["sha256"] == model().sha256
        assert file["keys"].asstr()[0].startswith("test/")
        return {name: file[name][:] for name in ("features", "ids", "labels")}


READERS: dict[str, tuple[str, Callable[[Path], Arrays]]] = {
    "npy": (".npy", read_npy),
    "safetensors": (".safetensors", load_file),
    "hdf5": (".h5", read_hdf5),
}


@pytest.mark.parametrize("format", READERS)
def test_files_hold_what_extract_gives(format: str, digits: Dataset, tmp_path: Path) -> None:
    if format == "hdf5":
        pytest.importorskip("h5py")
    suffix, read = READERS[format]
    write_features(model(), digits, tmp_path, sites=SITES, format=format, limit=50, batch_size=16)
    expected = ce.extract(model(), digits.test.limited(50), sites=SITES, cache=False)
    for site in SITES:
        found = read(tmp_path / "small-cnn+mlp" / f"{site}{suffix}")
        assert found["features"].dtype == np.float32
        np.testing.assert_allclose(found["features"], expected.values[site], atol=1e-5)
        assert (found["ids"] == expected.ids.numpy()).all()
        assert (found["labels"] == expected.labels.numpy()).all()
    images = pd.read_csv(tmp_path / "small-cnn+mlp" / "images.csv", dtype={"class": str})
    assert list(images["key"]) == digits.test.limited(50).keys
    assert (images["id"] == expected.ids.numpy()).all()
    assert list(images["class"]) == [digits.classes[label] for label in expected.labels]
    (entry,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert entry["split"] == {
        **{"name": "test", "n": 50, "limit": 50},
        "fingerprint": digits.test.limited(50).fingerprint,
    }


def test_all_locations_have_the_written_mean(digits: Dataset, tmp_path: Path) -> None:
    names = ["cnn+mlp", "nhwc", "class token"]
    for locations in ("mean", "all"):
        out = tmp_path / locations
        write_features([model(name) for name in names], digits, out, sites=SITES, locations=locations, limit=20)  # type: ignore[arg-type]
    for name in names:
        for site in SITES:
            mean, each = (np.load(tmp_path / kind / f"small-{name}" / f"{site}.npy") for kind in ("mean", "all"))
            assert each.ndim == 3
            assert (each.shape[1] > 1) == (site != "global")
            np.testing.assert_allclose(each.mean(1), mean, atol=1e-5)


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_images_left_out_leave_no_empty_rows(format: str, tmp_path: Path) -> None:
    """Two of 12 files are no images; the number of rows is written when the first row has been long ago."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    data = ce.load_dataset(tmp_path / "set", skip_bad_images=True)
    for name in ("a/0", "b/3"):
        (tmp_path / "set" / "val" / f"{name}.png").write_bytes(b"no image")
    data = ce.load_dataset(tmp_path / "set", skip_bad_images=True)
    write_features(model(), data, tmp_path / "out", format=format, batch_size=3)
    suffix, read = READERS[format]
    found = read(tmp_path / "out" / "small-cnn+mlp" / f"global{suffix}")
    assert found["features"].shape == (10, 10)
    assert np.isfinite(found["features"]).all()
    assert (np.abs(found["features"]).sum(1) > 0).all()
    keys = list(pd.read_csv(tmp_path / "out" / "small-cnn+mlp" / "images.csv")["key"])
    assert keys == [key for key in data.test.keys if not key.endswith(("a/0.png", "b/3.png"))]
    (entry,) = json.loads((tmp_path / "out" / "run.json").read_text())["runs"]
    assert "2 of 12 test images" in entry["left_out"][0]


def test_dissimilarities_are_those_of_the_features(digits: Dataset, tmp_path: Path) -> None:
    write_features(model(), digits, tmp_path, sites=["prepool"], dissimilarity="correlation", limit=30, batch_size=7)
    found = np.load(tmp_path / "small-cnn+mlp" / "prepool-dissimilarity.npy")
    expected = dissimilarities(torch.from_numpy(np.load(tmp_path / "small-cnn+mlp" / "prepool.npy")))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"format": "npz"}, "did you mean npy"),
        ({"sites": ["stage9"]}, "small/cnn.mlp: no site 'stage9'"),
        ({"sites": []}, "no site to extract"),
        ({"split": "val"}, "unknown split"),
        ({"locations": "all", "dissimilarity": "cosine"}, "leave out --locations all"),
        ({"locations": "each"}, "choice of locations"),
    ],
)
def test_wrong_calls(call: dict[str, Any], message: str, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        write_features(model(), digits, tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()


def test_nothing_half_done_takes_a_place(digits: Dataset, tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.backbone.mlp[0].bias.fill_(torch.nan)
    with pytest.raises(CossError, match="features at global hold NaN"):
        write_features(broken, digits, tmp_path, sites=SITES, limit=20)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CossError, match="give another --out"):
        write_features(model(), digits, tmp_path / "file", limit=20)


def test_there_is_a_training_split_or_a_line(digits: Dataset, tmp_path: Path) -> None:
    write_features(model(), digits, tmp_path, split="train", limit=20)
    assert pd.read_csv(tmp_path / "small-cnn+mlp" / "images.csv")["key"].str.startswith("train/").all()
    with pytest.raises(UsageError, match="no training split"):
        write_features(model(), replace(digits, train=None), tmp_path, split="train")

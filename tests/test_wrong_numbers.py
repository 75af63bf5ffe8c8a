"""Ways to a wrong, stale or misnamed number, each with its right value computed independently."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import coss_eval as ce
from coss_eval.data import digests
from coss_eval.data.batches import Geometry
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError
from coss_eval.tasks.probe import Probe

# ---- data: class order, labels, decoding, sizes, the fingerprint, images left out ----


def write_images(folder: Path, counts: dict[str, int], seed: int = 0, side: int = 16) -> Path:
    """Class folders of noise, one shade brighter a class, under train/ and val/."""
    draw = np.random.default_rng(seed)
    for split in ("train", "val"):
        for shade, (name, count) in enumerate(counts.items()):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (side, side, 3)) + 100 * (shade % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:03}.png")
    return folder


def png_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_labelled(folder: Path, labels: list[int]) -> Path:
    folder.mkdir()
    for at, split in enumerate(("train", "test")):
        images = [{"bytes": png_bytes(2 * i + at), "path": None} for i in range(len(labels))]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    return folder


NAMES = {
    "integers": (["0", "1", "2", "10", "11", "100"], ["0", "1", "2", "10", "11", "100"]),
    "leading zeros": (["0001", "0010", "0002"], ["0001", "0002", "0010"]),
    "mixed": (["1", "10", "2", "n01"], ["1", "10", "2", "n01"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_integer_class_folders_are_in_the_order_of_their_numbers(case: str, tmp_path: Path) -> None:
    given, expected = NAMES[case]
    data = ce.load_dataset(write_images(tmp_path, dict.fromkeys(given, 1)))
    assert list(data.classes) == expected
    for key, label in zip(data.test.keys, data.test.labels, strict=True):
        assert data.classes[label] == key.split("/")[1]


@pytest.mark.parametrize("values", [[7, 99, 48_484], [1, 2, 3], [0, 2_000_000_000]], ids=str)
def test_sparse_labels_are_classes_by_value(values: list[int], tmp_path: Path) -> None:
    labels = [values[i % len(values)] for i in range(12)]
    data = ce.load_dataset(write_labelled(tmp_path / "set", labels))
    assert data.classes == tuple(map(str, values))
    assert [int(data.classes[label]) for label in data.test.labels] == labels


def test_negative_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CossError, match=r"1 of 3 labels in .* are negative, the first one -5 in row 1"):
        ce.load_dataset(write_labelled(tmp_path / "set", [0, -5, 1]))


def test_deep_grey_is_scaled_by_its_range_and_told(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "val" / "a" / "000.tif")  # 32 bits, of which 8 are used
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "val" / "a" / "001.tif")
    data = ce.load_dataset(tmp_path)
    assert [note for note in data.notes if note.startswith("2 of the 6 test images looked at have more than 8 bits")]
    (batch,) = data.test.batches()
    for key, pixels in zip(data.test.keys, batch.images, strict=True):
        if key.endswith(".tif"):
            assert np.array_equal(pixels[0].numpy(), ramp)


def test_exif_turns_and_is_in_the_protocol(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stored = Image.open(tmp_path / "val" / "a" / "000.png").copy()
    stored.save(tmp_path / "val" / "a" / "000.png", exif=exif)
    plain, turned = (ce.load_dataset(tmp_path, exif=on) for on in (False, True))
    first, upside_down = (next(iter(data.test.batches())).images[0].permute(1, 2, 0) for data in (plain, turned))
    assert np.array_equal(first, np.asarray(stored))
    assert np.array_equal(upside_down, np.asarray(stored)[::-1, ::-1])
    assert "exif" not in plain.test.protocol()
    assert turned.test.protocol() == {**plain.test.protocol(), "exif": True}
    assert turned.test.protocol(Geometry())["exif"] is True
    assert turned.test.fingerprint != plain.test.fingerprint


def test_hidden_folders_inside_classes_are_left_out_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    for hidden in ("val/a/.thumbnails", "val/b/__MACOSX"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "0.png").write_bytes(png_bytes(1))
    data = ce.load_dataset(tmp_path)
    assert len(data.test) == 4
    assert data.notes == (
        "images in hidden folders inside the classes of val are left out: .thumbnails (1), __MACOSX (1)",
    )


def test_a_test_image_that_is_a_training_image_is_told(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "val/b/002.png").write_bytes((tmp_path / "train/a/001.png").read_bytes())
    data = ce.load_dataset(tmp_path)
    assert data.warnings() == []  # nothing has read them yet
    assert data.train.fingerprint
    assert data.test.fingerprint
    assert data.repeated() == {"val/b/002.png": "train/a/001.png"}
    assert data.warnings() == [
        "1 of 6 test images are training images too, byte for byte: val/b/002.png is train/a/001.png"
    ]


def probed(data: Dataset, out: Path) -> tuple[float, ce.Run]:
    """A linear probe's top-1 share on the pixels, with all caches on, as evaluate gives it."""
    run = ce.evaluate(ce.load_model("pixels:8"), data, [Probe()], out=out, device="cpu")
    assert run.failures == ()
    table = run.table()
    return float(table[(table["metric"] == "top1")]["value"].iloc[0]), run


def test_replaced_images_give_new_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 test images the first 64 by id stay, which is all that the fingerprint once read."""
    monkeypatch.setattr(digests, "SETTLED", 0.0)  # so that digests of files just written are kept, too
    folder = write_images(tmp_path / "set", {"a": 150, "b": 150})
    data = ce.load_dataset(folder)
    before, _ = probed(data, tmp_path / "out")
    assert before > 0.95
    stay = {data.test.keys[place] for place in data.test.ids.argsort()[:64]}
    replaced = [key for key in data.test.keys if key not in stay]
    for key in replaced:  # the other class's picture under this name
        other = key.replace("/a/", "/b/") if "/a/" in key else key.replace("/b/", "/a/")
        Image.open(folder / other.replace("val/", "train/")).save(folder / key)
    again = ce.load_dataset(folder)
    assert len(replaced) == 236
    after, _ = probed(again, tmp_path / "out")
    assert after == pytest.approx(64 / 300, abs=0.05)
    assert probed(ce.load_dataset(folder), tmp_path / "new")[0] == after


def test_mended_images_are_used_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"a": 10, "b": 10})
    names = ["val/a/001.png", "val/a/004.png", "val/b/009.png"]
    whole = {name: (folder / name).read_bytes() for name in names}
    for name, content in whole.items():
        (folder / name).write_bytes(content[: len(content) // 2])

    def seen(out: str) -> tuple[int, ce.Run]:
        _, run = probed(ce.load_dataset(folder, skip_bad_images=True), tmp_path / out)
        return int(run.table().query("metric == 'top1'")["n"].iloc[-1]), run

    for out in ("first", "elsewhere"):  # the second reads the kept features, and must tell as well
        count, run = seen(out)
        assert count == 17
        assert run.left_out[0].startswith("3 of 20 test images cannot be read and are left out: val/a/001.png (")
        assert json.loads((run.path / "run.json").read_text())["runs"][-1]["left_out"] == list(run.left_out)
        run.report()
        assert "3 of 20 test images cannot be read and are left out" in (run.path / "report.md").read_text()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    assert seen("first")[0] == seen("new")[0] == 20

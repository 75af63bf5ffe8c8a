"""Images that are arrays already: scikit-learn's digits, plain and scattered, .npz files, MNIST's own idx files."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coss_eval.data.assemble import Part, assemble
from coss_eval.data.choose import Ints, by_value, sample_ids, stratified
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import ArrayImages
from coss_eval.data.layouts import IDX_FILES, ReadOptions, idx_folder
from coss_eval.data.pixels import nchw
from coss_eval.errors import CossError

DIGITS_SIZE = 32
DIGITS_TEST = 0.25  # of the 1,797 images
SCATTERED_SIZE = 64
SCENES = 3  # of each training digit; a test digit stands in one, so that test images are independent
DIGIT_SIDES = 34, 48  # pixels, the smallest and largest
GROUND, CONTRAST = (0.15, 0.85), (0.35, 0.6)  # in each colour, in shares of the range of pixels
CLUTTER = 0.04  # its standard deviation, in the same

# how .npz files name a split's images and labels: Keras, MedMNIST, and both in plain words
ARRAYS = ("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "y_{}"), ("images_{}", "labels_{}")
ALONE = ("images", "labels"), ("x", "y"), ("X", "y"), ("data", "labels")  # of a single split, the test split
UNPACKED, FREE = 200, 2**29  # times its own size that a file may hold, and bytes in any case: drawings pack well
MOST_BYTES = 2**34  # of all arrays of a file; it says its sizes itself, before anything is read
IDX_MAGIC = {3: 2051, 1: 2049}  # by the number of axes, for unsigned bytes


def digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8, up-sampled to 32 px RGB; a quarter of each class is the test split."""
    grey, labels, is_test = _scans()
    large = np.stack([_enlarged(scan, DIGITS_SIZE) for scan in grey])
    pixels = np.repeat(large[:, None], 3, axis=1)  # (N, 3, 32, 32)

    def part(split: str, chosen: Any) -> Part:
        places = np.flatnonzero(chosen)
        return Part(ArrayImages(pixels[places], [f"{split}/{i}" for i in places]), labels[places])

    return assemble("digits", [str(i) for i in range(10)], part("train", ~is_test), part("test", is_test))


def scattered_digits() -> Dataset:
    """scikit-learn's digits at random places and sizes, light or dark, on cluttered grounds of any colour, 64 px RGB.

    Where a digit stands, how large it is and what colours there are says nothing of its class, so that pixels decide
    less than in ``digits``: an untrained network sees the ground's colour above all, and training must look past it. A
    scene is drawn from its number and its digit's: the same on every machine. The test split has the same digits as
    that of ``digits``, one scene each.
    """
    grey, labels, is_test = _scans()

    def part(split: str, chosen: Any, scenes: int) -> Part:
        places = np.repeat(np.flatnonzero(chosen), scenes)
        pairs = [(int(place), number % scenes) for number, place in enumerate(places)]
        pixels = np.stack([_scene(grey[place], place, scene) for place, scene in pairs])
        return Part(ArrayImages(pixels, [f"{split}/{place}-{scene}" for place, scene in pairs]), labels[places])

    train, test = part("train", ~is_test, SCENES), part("test", is_test, 1)
    return assemble("scattered-digits", [str(i) for i in range(10)], train, test)


def _scans() -> tuple[NDArray[np.uint8], Ints, Any]:
    """Grey scans (1797, 8, 8), labels, and which are test images: a quarter of each class, by hashed number."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # from 0..16
    labels = bunch.target.astype(np.int64)
    ids = sample_ids(f"digits/{i}" for i in range(len(labels)))
    return grey, labels, stratified(labels, ids, DIGITS_TEST, "digits")


def _enlarged(scan: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BILINEAR))


def _scene(scan: NDArray[np.uint8], place: int, scene: int) -> NDArray[np.uint8]:
    """uint8 (3, 64, 64): one digit somewhere, light on a dark ground or dark on a light one.

    Over the ground lies clutter: noise of two pixels' width in each colour.
    """
    rng, whole = np.random.default_rng((place, scene)), SCATTERED_SIZE
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    top, left = rng.integers(0, whole - side + 1, 2)
    ground = rng.uniform(*GROUND, 3)
    contrast = rng.uniform(*CONTRAST, 3) * (1 if ground.mean() < 0.5 else -1)
    noise = rng.integers(0, 256, (whole // 2, whole // 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((whole, whole), Image.Resampling.BICUBIC)) / 255.0
    pixels = ground + CLUTTER * (smooth - smooth.mean()) / smooth.std()
    pixels[top : top + side, left : left + side] += contrast * (_enlarged(scan, side) / 255.0)[..., None]
    image: NDArray[np.uint8] = np.round(255 * pixels.clip(0, 1)).astype(np.uint8)
    return image.transpose(2, 0, 1)


def npz(file: Path) -> Dataset:
    """Arrays x_train, y_train, x_test, y_test (Keras), train_images, train_labels, ... (MedMNIST), or images, labels.

    Images are uint8 (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), labels whole numbers (N,) or (N, 1).
    """
    arrays = _read_npz(file)
    splits = {split: found for split in ("train", "test") if (found := _named(arrays, split)) is not None}
    alone = next(((arrays[x], arrays[y]) for x, y in ALONE if x in arrays and y in arrays), None)
    if not splits and alone is not None:
        splits = {"test": alone}
    if "test" not in splits:
        shown = ", ".join(arrays) or "nothing"
        raise CossError(f"{file} has no arrays x_test and y_test, or test_images and test_labels; it has {shown}")
    notes = ("val_images of the file are not used: the test split is test_images",) if "val_images" in arrays else ()
    return _of_arrays(file.stem, {split: _checked(*found, file) for split, found in splits.items()}, notes)


def idx(folder: Path, reading: ReadOptions) -> Dataset:
    """MNIST's own files and those of sets made like it (Fashion-MNIST, KMNIST): train-images-idx3-ubyte[.gz] ..."""
    place = idx_folder(folder)
    assert place is not None
    found = {}
    for split, (images, labels) in IDX_FILES.items():
        files = [_idx_file(place, name) for name in (images, labels)]
        if None not in files:
            pixels, values = (_read_idx(file, axes) for file, axes in zip(files, (3, 1), strict=True) if file)
            found[split] = _checked(pixels, values, place)
    if "test" not in found:
        raise CossError(f"{place} has no t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte: the test split")
    return _of_arrays(folder.name, found)


def _of_arrays(name: str, splits: Mapping[str, tuple[NDArray[np.uint8], Ints]], notes: tuple[str, ...] = ()) -> Dataset:
    classes, _ = by_value(np.concatenate([labels for _, labels in splits.values()]))
    number = {int(value): place for place, value in enumerate(classes)}

    def part(split: str) -> Part:
        pixels, values = splits[split]
        labels = [number[value] for value in values.tolist()]
        return Part(ArrayImages(pixels, [f"{split}/{i}" for i in range(len(pixels))]), labels, notes)

    return assemble(name, classes, part("train") if "train" in splits else None, part("test"))


def holds_images(file: Path) -> bool:
    """Whether an .npz file has the arrays of a test split by name, rather than weights; nothing of them is read."""
    try:
        with zipfile.ZipFile(file) as packed:
            names = {name.removesuffix(".npy") for name in packed.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False
    pairs = [*((images.format("test"), labels.format("test")) for images, labels in ARRAYS), *ALONE]
    return any(set(pair) <= names for pair in pairs)


def _read_npz(file: Path) -> dict[str, NDArray[Any]]:
    """All arrays; nothing pickled is loaded, and no more than MOST_BYTES."""
    try:
        with zipfile.ZipFile(file) as packed:
            _refuse_larger(file, sum(entry.file_size for entry in packed.infolist()))
            for entry in packed.infolist():
                _check_shape(packed, entry)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, LookupError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        pickled = "allow_pickle" in str(error)
        reason = "it holds Python objects: save arrays of numbers" if pickled else str(error).partition("\n")[0]
        raise CossError(f"cannot read {file}: {reason}") from error


def _check_shape(packed: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """ValueError where an array says another size than its entry has: numpy makes room for what it says."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with packed.open(entry) as stream:
        shape, _, dtype = read[np.lib.format.read_magic(stream)](stream)
        said = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and said != entry.file_size - stream.tell():
            raise ValueError(f"{entry.filename} says that it has {said:,} bytes, and has {entry.file_size:,}")


def _refuse_larger(file: Path, size: int) -> None:
    """CossError where a file says that it holds more than is read, or than its own size lets one believe."""
    packed = file.stat().st_size
    if size > MOST_BYTES or size > max(FREE, UNPACKED * packed):
        raise CossError(
            f"{file} unpacks to {size / 2**30:.0f} GiB, from {packed:,} bytes; more than {MOST_BYTES >> 30} GiB or "
            f"{UNPACKED} times its own size are not read: if you trust it, save it without compression"
        )


def _named(arrays: Mapping[str, NDArray[Any]], split: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
    names = ((images.format(split), labels.format(split)) for images, labels in ARRAYS)
    return next(((arrays[x], arrays[y]) for x, y in names if x in arrays and y in arrays), None)


def _checked(images: NDArray[Any], labels: NDArray[Any], where: Path) -> tuple[NDArray[np.uint8], Ints]:
    """uint8 (N, 3, H, W) and int64 (N,); CossError for any other kind of array."""
    values = labels[:, None] if labels.ndim == 1 else labels
    if values.ndim != 2 or values.shape[1] != 1 or not np.issubdtype(values.dtype, np.integer):
        raise CossError(f"expected labels of {where} as whole numbers (N,), got {labels.dtype} {labels.shape}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(values):
        raise CossError(
            f"expected images of {where} as uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W) for its {len(values)} "
            f"labels, got {images.dtype} {images.shape}"
        )
    if len(images) == 0:
        raise CossError(f"{where} holds a split without images")
    if (wrong := np.flatnonzero(values[:, 0].astype(np.int64) < 0)).size:
        raise CossError(
            f"{len(wrong)} of {len(values):,} labels of {where} are negative, the first one {values[wrong[0], 0]} of "
            f"image {wrong[0]}; expected whole numbers of 0 or more: take the unlabelled images out"
        )
    return nchw(images, f"images of {where}"), values[:, 0].astype(np.int64)


def _idx_file(folder: Path, name: str) -> Path | None:
    """The file of that name, packed or not; some write a dot before idx."""
    spellings = (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz")
    return next((folder / one for one in spellings if (folder / one).is_file()), None)


def _read_idx(file: Path, axes: int) -> NDArray[np.uint8]:
    """Unsigned bytes of so many axes: a magic number, the length of each axis, the bytes (LeCun's page on MNIST)."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            head = np.frombuffer(stream.read(4 * (axes + 1)), ">u4").astype(np.int64)
            if len(head) != axes + 1 or head[0] != IDX_MAGIC[axes]:
                raise CossError(f"{file} does not begin as an idx file of unsigned bytes with {axes} axes")
            size = math.prod(head[1:].tolist())
            _refuse_larger(file, size)
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CossError(f"cannot read {file}: {error}") from error
    if len(content) != size:
        found = "more" if len(content) > size else "fewer"
        raise CossError(f"{file} says that it holds {size} bytes and has {found}: copy it again")
    return np.frombuffer(content, np.uint8).reshape(tuple(head[1:]))

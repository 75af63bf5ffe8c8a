"""A Dataset of torch's or of Hugging Face's, read item by item: its images as a source, its labels and class names."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coss_eval.data import layouts
from coss_eval.data.decode import UNREADABLE, open_image, to_rgb
from coss_eval.data.pixels import LabelValues, as_array, as_bytes, as_labels, is_array
from coss_eval.errors import CossError, UsageError

TRIED = 8  # items that are read twice when a set is opened


class Items:
    """Images of a set, encoded as they are read: nothing of it is held here.

    ``image`` is where an item has its image: a column's name, or a place in a tuple.
    """

    place, parallel, blocks = "items of a set in memory", False, None

    def __init__(self, items: Any, image: str | int) -> None:
        self._items, self._image = items, image

    def __len__(self) -> int:
        return len(self._items)

    def signatures(self, indices: NDArray[np.int64], before: float) -> NDArray[np.uint64]:
        """0 for each: nothing on disk tells whether an item has changed, so its digest is not kept."""
        return np.zeros(len(indices), np.uint64)

    def open(self, index: int) -> BinaryIO:
        """The image as a PPM: its pixels after a short header, so that equal pixels have equal bytes."""
        stream = io.BytesIO()
        self.picture(index).save(stream, "PPM")
        stream.seek(0)
        return stream

    def picture(self, index: int) -> Any:
        """The image as PIL's RGB. Raises one of UNREADABLE, whatever the set's own code raises."""
        try:
            return _picture(self._items[index][self._image])
        except UNREADABLE:
            raise
        except CossError as error:
            raise ValueError(str(error)) from error
        except Exception as error:  # the set's own code may fail in any way
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def is_picture(self) -> bool:
        """Whether images come as pictures of any size, not as arrays of a size that somebody chose."""
        return not is_array(self._items[0][self._image])


class LabelledList:
    """Images and labels side by side, as a set of items: a list of PIL images with their labels."""

    def __init__(self, images: Sequence[Any], labels: LabelValues) -> None:
        self.images, self.targets = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.targets[index]


def is_hugging_face(given: Any) -> bool:
    """Whether it has the columns and the types of columns of a Hugging Face Dataset; the package need not be there."""
    return hasattr(given, "column_names") and hasattr(given, "features") and hasattr(given, "__getitem__")


def is_items(given: Any) -> bool:
    """Whether it is a set of items by number: torch's, or anything that counts and gives them."""
    plain = isinstance(given, str | bytes | Mapping | Sequence) or is_array(given)
    return not plain and hasattr(given, "__len__") and hasattr(given, "__getitem__")


def places(given: Any, image: str | None, label: str | None, what: str) -> tuple[str | int, str | int]:
    """Where an item has its image and its label: names of columns, or 0 and 1."""
    if not len(given):
        raise UsageError(f"{what}: holds no items")
    first = _first(given, what)
    names = list(given.column_names) if is_hugging_face(given) else list(first) if isinstance(first, Mapping) else None
    if names is None:
        if not isinstance(first, Sequence) or len(first) < 2:
            raise UsageError(f"{what}: expected items (image, label) or with columns, got {type(first).__name__}")
        return 0, 1
    columns = (("image", image, layouts.IMAGE_COLUMNS), ("label", label, layouts.LABEL_COLUMNS))
    found = [_column(names, kind, asked, usual, what) for kind, asked, usual in columns]
    return found[0], found[1]


def labels_of(given: Any, label: str | int, what: str) -> LabelValues:
    """The labels in order: from the set's own list of them where it agrees with its items, else item by item."""
    if is_hugging_face(given):
        return as_labels(list(given[label]), len(given), what)
    listed = _listed(given)
    if listed is not None and len(listed) == len(given):
        found = as_labels(listed, len(given), what)
        if all(_label(given, i, label, what, found[i]) == found[i] for i in _tried(len(given))):
            return found
    return as_labels([_label(given, i, label, what) for i in range(len(given))], len(given), what)


def classes_of(given: Any, label: str | int) -> tuple[str, ...] | None:
    """The names of the classes, by number, where the set says them."""
    if is_hugging_face(given):
        names = getattr(given.features.get(label), "names", None)
    elif hasattr(given, "datasets"):  # torch's ConcatDataset
        each = {classes_of(one, label) for one in given.datasets}
        names = each.pop() if len(each) == 1 else None
    else:
        names = getattr(given, "classes", None)
        if names is None and hasattr(given, "dataset"):  # torch's Subset
            names = classes_of(given.dataset, label)
    texts = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    return tuple(names) if texts and names else None


def name_of(given: Any) -> str:
    """What a set is called: by itself where it is Hugging Face's, a part as the whole of it, else by its class."""
    if is_hugging_face(given):
        return getattr(getattr(given, "info", None), "dataset_name", None) or "images"
    if hasattr(given, "indices") and hasattr(given, "dataset"):
        return name_of(given.dataset)
    return type(given).__name__


def refuse_unsteady(items: Items, what: str) -> None:
    """UsageError where an image is none, or is another one when it is read again."""
    for index in _tried(len(items)):
        try:
            first, again = (np.asarray(items.picture(index)) for _ in range(2))
        except UNREADABLE as error:
            if isinstance(error.__cause__, UsageError):  # all others will be like it
                raise UsageError(f"{what}, item {index}: {error}") from error
            continue  # counted and named with all that cannot be read
        if first.shape != again.shape or not np.array_equal(first, again):
            raise UsageError(
                f"{what}: item {index} is another image each time it is read: give the set without random transforms"
            )


def _first(given: Any, what: str) -> Any:
    try:
        return given[0]
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{what}: its first item cannot be read ({type(error).__name__}: {reason})") from error


def _column(names: Sequence[str], kind: str, asked: str | None, usual: Sequence[str], what: str) -> str:
    shown = ", ".join(map(str, names))
    if asked is not None and asked not in names:
        raise UsageError(f"{what}: {kind}_column={asked!r} is not there; it has {shown}")
    found = asked or next((name for name in usual if name in names), None)
    if found is None:
        raise UsageError(f"{what}: no column {' or '.join(usual[:2])}; it has {shown}: give {kind}_column=")
    return found


def _listed(given: Any) -> Any:
    """The list of labels that sets of torchvision's keep, also of a part or a chain of such sets; None where none."""
    if hasattr(given, "datasets"):
        each = [_listed(one) for one in given.datasets]
        return None if any(one is None for one in each) else [label for one in each for label in list(one)]
    if hasattr(given, "indices") and hasattr(given, "dataset"):
        inner = _listed(given.dataset)
        return None if inner is None else [inner[i] for i in given.indices]
    found = (getattr(given, name, None) for name in ("targets", "labels", "_labels"))
    return next((labels for labels in found if labels is not None), None)


def _label(given: Any, index: int, place: str | int, what: str, listed: int | str | None = None) -> Any:
    """An item's label as a Python number or text, also one out of a tensor; ``listed`` where it cannot be read."""
    try:
        label = given[index][place]
    except Exception as error:  # the set's own code may fail in any way
        if listed is not None:
            return listed  # its image is counted and named when it is read
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{what}: the label of item {index} cannot be read ({type(error).__name__}: {reason}); leave it out"
        ) from error
    return label.item() if hasattr(label, "item") and np.size(as_array(label)) == 1 else label


def _tried(count: int) -> list[int]:
    """A few evenly spaced places."""
    return sorted(set(np.linspace(0, count - 1, min(TRIED, count)).astype(int).tolist()))


def _picture(image: Any) -> Any:
    """An image of any kind as PIL's RGB; UsageError for what is none."""
    if isinstance(image, Mapping) and image.get("bytes"):  # Hugging Face's, not decoded
        image = open_image(io.BytesIO(image["bytes"]))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not is_array(image):
        raise UsageError(f"expected a PIL image, an array or a tensor, got {type(image).__name__}")
    array = as_array(image)
    if array.ndim == 3 and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise UsageError(f"expected an image (3, H, W), (H, W, 3) or (H, W), got shape {tuple(np.shape(image))}")
    return Image.fromarray(np.array(np.broadcast_to(as_bytes(array, "image"), (*array.shape[:2], 3))))

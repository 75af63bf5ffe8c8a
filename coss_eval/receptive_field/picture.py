"""The effective receptive field as a picture, with the theoretical one as a box around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.measured import PixelBatches, measured
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier
from coss_eval.receptive_field.effective import EFFECTIVE_LEVEL, effective
from coss_eval.receptive_field.theoretical import middle_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class FieldMap(NamedTuple):
    """What a site's middle unit sees of an image (H, W).

    ``map`` (H, W), float64: mean absolute gradient, its peak 1. ``box``: first and last row, first and last column that
    it can see in theory, cut at the image's edges; None where that is not known. ``size``: of the effective field, in
    pixels along a side; ``n`` images.
    """

    map: NDArray[np.float64]
    box: tuple[int, int, int, int] | None
    size: float
    n: int
    site: str


def field_map(
    network: Backbone | Classifier | ModelLike, images: PixelBatches | DatasetLike, *, site: str = "prepool"
) -> FieldMap:
    """``effective`` of what it takes, as an array, with the pixels that the same unit can see in theory.

    >>> import torch
    >>> from coss_eval.checkpoints.load import make_model
    >>> model = make_model("rf9_resnet18", stem="cifar", width=8)
    >>> seen = field_map(model, [torch.rand(2, 3, 32, 32)], site="stage1")
    >>> seen.map.shape, seen.box
    ((32, 32), (12, 20, 12, 20))
    """
    backbone, batches = measured(network, images)
    found = effective(backbone, batches, site=site)
    height, width = found.map.shape
    try:
        box = middle_box(backbone, site, height) if height == width else None
    except UsageError:
        raise
    except CossError:  # an operation whose effect is not known: the map is right all the same
        box = None
    return FieldMap(found.map.numpy(), box, found.size, found.n, site)


def draw(seen: FieldMap, axis: Axes | None = None) -> Axes:
    """The map, the line that its effective size is about, and the theoretical field's box, on a matplotlib axis.

    Colours show the square root of the gradient, without which little but the peak is seen. The box is dashed; without
    one the whole image is in the theoretical field, or it is not known. Without ``axis`` it is drawn on pyplot's.
    """
    if axis is None:
        from matplotlib import pyplot

        axis = pyplot.gca()
    from matplotlib.patches import Rectangle

    axis.imshow(np.sqrt(seen.map), cmap="magma", vmin=0, vmax=1)
    axis.contour(seen.map, levels=[EFFECTIVE_LEVEL], colors="white", linewidths=0.8)
    if seen.box is not None:
        top, bottom, left, right = seen.box
        corner, wide, high = (left - 0.5, top - 0.5), right - left + 1, bottom - top + 1
        box = Rectangle(corner, wide, high, fill=False, edgecolor="cyan", linestyle="--", clip_on=False)
        axis.add_patch(box)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    return axis

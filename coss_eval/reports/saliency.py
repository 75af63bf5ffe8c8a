"""Heat maps of locations over their images, network beside network. Imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from coss_eval.reports.drawing import style


class HeatMaps(NamedTuple):
    """One network's maps on the grid of its locations."""

    each: NDArray[np.float32]  # (n, h, w), of the images shown
    mean: NDArray[np.float32]  # (h, w), over all images that were looked at


def draw(images: NDArray[np.uint8], maps: Mapping[str, HeatMaps], n: int) -> Figure:
    """A row an image (n, H, W, 3), a column a network, in one scale of colours; below, the mean over ``n`` images.

    A square is a location: nothing is smoothed, as a smooth picture would claim a sharpness that the grid has not.
    """
    with style():
        rows, columns = len(images) + 1, len(maps) + 1
        figure = Figure(figsize=(1.35 * columns + 0.9, 1.35 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        low = min(min(float(found.each.min()), float(found.mean.min())) for found in maps.values())
        height, width = images.shape[1:3]
        extent = (0.0, float(width), float(height), 0.0)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for row, image in enumerate(images):
            axes[row, 0].imshow(image, extent=extent)
        axes[-1, 0].axis("off")
        axes[-1, 0].text(0.98, 0.5, f"mean,\nn = {n:,}", ha="right", va="center", transform=axes[-1, 0].transAxes)
        for column, (name, found) in enumerate(maps.items(), 1):
            axes[0, column].set_title(textwrap.fill(name, 20), fontsize=7)
            for row, values in enumerate([*found.each, found.mean]):
                axis = axes[row, column]
                if row < len(images):
                    axis.imshow(images[row].mean(2), cmap="gray", vmin=0, vmax=255, extent=extent)
                alpha = 0.6 if row < len(images) else 1.0
                drawn = axis.imshow(values, vmin=low, vmax=1, cmap="viridis", alpha=alpha, extent=extent)
        figure.colorbar(drawn, ax=axes[:, -1].tolist(), shrink=0.6, label="cosine with the other locations")
        return figure

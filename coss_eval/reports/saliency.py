"""Heat maps of locations over their images, and receptive fields, network beside network. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coss_eval.reports.drawing import WHOLE, Canvas, Figure, style
from coss_eval.reports.layout import broken


class HeatMaps(NamedTuple):
    """One network's maps on the grid of its locations."""

    each: NDArray[np.float32]  # (n, h, w), of the images shown
    mean: NDArray[np.float32]  # (h, w), over all images that were looked at


def draw(
    images: NDArray[np.uint8],
    maps: Mapping[str, HeatMaps],
    n: int,
    *,
    label: str = "cosine with the other locations",
    others: NDArray[np.uint8] | None = None,
    chosen: tuple[int, int] | None = None,
    evidence: bool = False,
) -> Figure:
    """A row an image (n, H, W, 3), a column a network, in one scale of colours; below, the mean over ``n`` images.

    A square is a location: nothing is smoothed, as a smooth picture would claim a sharpness that the grid has not.
    ``label`` says what the colours are. ``others``: the images that each was compared with, in a column of their own;
    ``chosen``: the location (row, column) that all were compared with, which gets a cross. ``evidence``: the values are
    shares of logits, whose scale is centred on 0, and each network has one of its own.
    """
    with style():
        rows, shown = len(images) + 1, [images] if others is None else [images, others]
        first = len(shown)
        columns = len(maps) + first
        figure = Figure(figsize=(1.35 * columns + 0.9, 1.35 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        height, width = images.shape[1:3]
        extent = (0.0, float(width), float(height), 0.0)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for column, pictures in enumerate(shown):
            for row, image in enumerate(pictures):
                axes[row, column].imshow(image, extent=extent)
            axes[-1, column].axis("off")
        if others is not None:
            axes[0, 1].set_title("compared with", fontsize=7)
        axes[-1, 0].text(0.98, 0.5, f"mean,\nn = {n:,}", ha="right", va="center", transform=axes[-1, 0].transAxes)
        low = min(_extremes(found)[0] for found in maps.values())
        for column, (name, found) in enumerate(maps.items(), first):
            axes[0, column].set_title("\n".join(broken(name, 20)), fontsize=7)
            largest = max(map(abs, _extremes(found)))
            scale = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"} if evidence else {
                "vmin": low, "vmax": 1, "cmap": "viridis"
            }  # fmt: skip
            for row, values in enumerate([*found.each, found.mean]):
                axis = axes[row, column]
                if row < len(images):
                    axis.imshow(images[row].mean(2), cmap="gray", vmin=0, vmax=255, extent=extent)
                drawn = axis.imshow(values, alpha=0.6 if row < len(images) else 1.0, extent=extent, **scale)
                if chosen is not None:
                    down, right = ((place + 0.5) / side for place, side in zip(chosen, values.shape, strict=True))
                    axis.plot(right * width, down * height, "kx", markersize=4, markeredgewidth=1)
            if evidence:
                figure.colorbar(drawn, ax=axes[-1, column], location="bottom", shrink=0.9)
        if evidence:
            figure.supxlabel(label, fontsize=7)
        else:
            figure.colorbar(drawn, ax=axes[:, -1].tolist(), shrink=0.6, label=label)
        return figure


def _extremes(found: HeatMaps) -> tuple[float, float]:
    return (
        min(float(found.each.min()), float(found.mean.min())),
        max(float(found.each.max()), float(found.mean.max())),
    )


FIELDS = "receptive_fields_"  # begins the files that coss-eval receptive-field --out writes


def stored_fields(folder: Path, canvas: Canvas = WHOLE) -> Figure | None:
    """The effective receptive fields that are kept in a folder: a row a network, a column a site; None without any.

    Columns go on in further rows where the figure is too narrow for them. Imports torch where there are any.
    """
    files = sorted(folder.glob(f"{FIELDS}*.npz"))
    if not files:
        return None
    from coss_eval.receptive_field.picture import FieldMap, draw

    found = {path.stem.removeprefix(FIELDS): read_fields(path) for path in files}
    width = canvas.inches(min(7.0, 1.15 * max(map(len, found.values())) + 0.2))
    columns = max(1, min(max(map(len, found.values())), int(width / 0.95)))
    rows = {name: math.ceil(len(maps) / columns) for name, maps in found.items()}
    figure = Figure(figsize=(width, (width / columns + 0.3) * sum(rows.values())), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=list(rows.values()))[:, 0]
    for part, (name, maps) in zip(parts, found.items(), strict=True):
        part.suptitle("\n".join(broken(name, int(width * 15))), fontsize=8, x=0.01, ha="left")
        axes = list(part.subplots(rows[name], columns, squeeze=False).flat)
        for axis, (site, (values, box, size, n)) in zip(axes, maps.items(), strict=False):
            draw(FieldMap(values, box, size, n, site), axis).set_title(f"{site}\n{size:.0f} px", fontsize=7)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
    return figure


def read_fields(
    path: Path,
) -> dict[str, tuple[NDArray[np.float64], tuple[int, int, int, int] | None, float, int]]:
    """Each site's map (H, W), theoretical box (None: the whole image, or not known), effective size and images."""
    with np.load(path, allow_pickle=False) as arrays:
        sites = [name for name in arrays.files if "/" not in name]
        return {
            site: (
                arrays[site],
                tuple(map(int, arrays[f"{site}/box"])) if f"{site}/box" in arrays.files else None,  # type: ignore[misc]
                float(arrays[f"{site}/size"]) if f"{site}/size" in arrays.files else math.nan,
                int(arrays[f"{site}/n"]) if f"{site}/n" in arrays.files else 0,
            )
            for site in sites
        }

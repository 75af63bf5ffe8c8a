"""The redundancy of a network's local representations at one site, as a table of measurements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.measured import PixelBatches, measured
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.classifier import Classifier
from coss_eval.models.hooks import captured, device_of
from coss_eval.redundancy import locality, moments, similarity, spectrum
from coss_eval.redundancy.centring import RANK, WIDEST

if TYPE_CHECKING:
    import pandas as pd


def measure(
    backbone: Backbone | Classifier | ModelLike,
    batches: PixelBatches | DatasetLike,
    site: str = "prepool",
    *,
    receptive_field: tuple[int, int] | None = None,
    border: int | None = None,
) -> pd.DataFrame:
    """Redundancy of the local representations at ``site``: one row a metric, columns metric, value, n, low, high.

    ``batches`` are normalised pixels, float (B, 3, H, W) on any device, and are read once; the first 512 images give
    the means that are taken off, so let them come in a random order. ``backbone`` must be in eval mode. In place of a
    Backbone a Classifier or what ``as_model`` takes will do: its ``batches`` are then uint8 or in [0, 1] and normalised
    by it, or a split, or what ``as_dataset`` takes, whose test split it is.

    ``n`` counts images; ``low`` and ``high`` bound a 95 % interval over images (block jackknife). Spectral and
    information rows depend on n: they are those of the first 2,000 images. ``within_at_distance_3`` is the mean cosine
    at the Chebyshev distance 3 on the grid. ``attrs["notes"]`` says where a number is less than its name promises.

    Zero padding marks the places of the grid in all images alike, which is no redundancy: the rows ``..._per_position``
    have the mean of each place taken off where the plain ones take off a single mean, and ``position_share`` is what
    the places make of the variance. The rows ``..._interior``, centred per position too, leave out ``border`` cells at
    each side of the grid (None: one, where more than one location remains; 0: no such rows). ``receptive_field`` (size,
    jump in pixels) adds ``within_overlapping`` and ``within_disjoint``, centred per position. The rows
    ``..._rank_matched`` compare in the first 16 principal directions, scaled alike: rank moves cosines, too.

    A number means little alone: ReLU and overlapping fields move it, so print an untrained network's row beside it.

    >>> import torch
    >>> from coss_eval.checkpoints.load import make_model
    >>> table = measure(make_model("resnet18", stem="cifar", width=8).backbone, [torch.rand(8, 3, 32, 32)])
    >>> table.columns.tolist(), table["metric"].tolist()[:3]
    (['metric', 'value', 'n', 'low', 'high'], ['within', 'between', 'normalised'])
    """
    collected = collect(backbone, batches, site, border=border)
    return table(collected, receptive_field)


def collect(
    backbone: Backbone | Classifier | ModelLike,
    batches: PixelBatches | DatasetLike,
    site: str = "prepool",
    *,
    border: int | None = None,
) -> moments.Moments:
    """What ``table`` and ``each_image`` are made of, in one pass; arguments as of ``measure``."""
    backbone, batches = measured(backbone, batches)
    if backbone.training:
        raise UsageError("redundancy needs the backbone in eval mode, but it is in train mode; call backbone.eval()")
    place = _place(backbone, site)
    source = batches() if callable(batches) else batches
    collected = moments.collect(
        source, lambda pixels: _represent(backbone, pixels, place), 1 if border is None else border
    )
    if border and collected.interior is None:
        shape = " x ".join(map(str, collected.grid or (collected.locations,)))
        raise UsageError(f"border {border} leaves no two of the {shape} locations at {site!r}; lower it")
    return collected


def table(collected: moments.Moments, receptive_field: locality.SizeAndJump | None = None) -> pd.DataFrame:
    """A row a metric: see ``measure``."""
    import pandas as pd  # here: training, which needs no table, saves 40 MB

    missing = float("nan")
    per_position = collected.per_position
    similarities: list[tuple[str, float, float, float]] = [
        *((name, *estimate) for name, estimate in similarity.estimates(collected).items()),
        *((name, *estimate) for name, estimate in similarity.estimates_per_position(collected).items()),
        *((name, *estimate) for name, estimate in locality.by_overlap(per_position, receptive_field).items()),
        ("position_share", collected.position_share, missing, missing),
        *((f"within_at_distance_{d}", *estimate) for d, estimate in locality.by_distance(collected).items()),
        *(
            (f"within_per_position_at_distance_{d}", *estimate)
            for d, estimate in locality.by_distance(per_position).items()
        ),
    ]
    spectral = [(name, *estimate) for name, estimate in spectrum.spectra(collected.covariances).items()]
    frame = pd.DataFrame([*similarities, *spectral], columns=["metric", "value", "low", "high"])
    counts = [collected.images] * len(similarities) + [collected.covariances.images] * len(spectral)
    frame.insert(2, "n", counts)
    frame.attrs["notes"] = _notes(collected)
    return frame


def each_image(collected: moments.Moments, receptive_field: locality.SizeAndJump | None = None) -> dict[str, Tensor]:
    """Each image's own values, (N,) in the order of the images, by the metric of ``table`` whose mean they have."""
    rows = similarity.each_image(collected) | locality.by_overlap_each(collected.per_position, receptive_field)
    return {name: values.cpu() for name, values in rows.items()}


def _notes(collected: moments.Moments) -> list[str]:
    """What a person should know of these numbers beside their names."""
    notes, spectral = [], collected.covariances
    images, width = spectral.images, spectral.means.shape[1]
    if spectral.shrunk:
        notes.append(
            f"{images} images are not more than the {width} dimensions: Gaussian mutual information is shrunk towards "
            f"independence (OAS), and no rank between images exceeds {images - 1}"
        )
    for dim in collected.centre.projections:
        notes.append(f"ranks and information of {dim} dimensions are those of a fixed random projection to {WIDEST}")
    if collected.rank_matched is None:
        notes.append(f"no rank-matched rows: fewer than {RANK} directions vary")
    return notes


def _place(backbone: Backbone, name: str) -> Site:
    sites = {site.name: site for site in backbone.sites.values() if site.layout != "nc"}
    if name not in sites:
        choices = f"expected one of {', '.join(sites)}" if sites else "it has none"
        raise UsageError(f"no site {name!r} with locations in this network; {choices}")
    return sites[name]


@torch.inference_mode()
def _represent(backbone: Backbone, pixels: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The site's output, on its grid, and the global representation, of one forward pass."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UsageError(f"expected batches of pixels (B, 3, H, W), got {shape}; move the channels to the second place")
    with captured(backbone, [site]) as outputs:
        global_ = backbone(pixels.to(device_of(backbone)))
    return _field(outputs[site.name], site), global_


def _field(output: Tensor, site: Site) -> Tensor:
    """A site's output as (B, H, W, D); (B, L, D) for a sequence that is no square of patches."""
    if site.layout == "nchw":
        return output.permute(0, 2, 3, 1)
    if site.layout == "nhwc":
        return output
    local = as_locations(output, site.layout, site.prefix_tokens)
    side = math.isqrt(local.shape[1])
    return local.reshape(len(local), side, side, -1) if side * side == local.shape[1] else local

"""The redundancy of a network's local representations at one site, as a table of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import pandas as pd
import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.measured import PixelBatches, measured
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.classifier import Classifier
from coss_eval.models.hooks import outputs_of
from coss_eval.redundancy import locality, moments, similarity, spectrum


def measure(
    backbone: Backbone | Classifier | ModelLike,
    batches: PixelBatches | DatasetLike,
    site: str = "prepool",
    *,
    receptive_field: tuple[int, int] | None = None,
    border: int | None = None,
) -> pd.DataFrame:
    """Redundancy of the local representations at ``site``: one row a metric, columns metric, value, n, low, high.

    ``batches`` are normalised pixels, float (B, 3, H, W) on any device, and are read TWICE (for the dataset mean, then
    for the moments): pass a list, an object that starts afresh at every iteration, or a function that returns an
    iterator; a generator is refused. ``backbone`` must be in eval mode. In place of a Backbone a Classifier or what
    ``as_model`` takes will do: its ``batches`` are then uint8 or in [0, 1] and normalised by it, or a split, or what
    ``as_dataset`` takes, whose test split it is.

    ``n`` counts images; ``low`` and ``high`` bound a 95 % interval over images (block jackknife) and are NaN for the
    spectral rows. ``within_at_distance_3`` is the mean cosine at the Chebyshev distance 3 on the grid.

    Zero padding marks the places of the grid in all images alike, which is no redundancy: the rows ``..._per_position``
    have the mean of each place taken off where the plain ones take off a single mean, and ``position_share`` is what
    the places make of the variance. The rows ``..._interior``, centred per position too, leave out ``border`` cells at
    each side of the grid (None: one, where more than one location remains; 0: no such rows). ``receptive_field`` (size,
    jump in pixels) adds ``within_overlapping`` and ``within_disjoint``, centred per position.

    A number means little alone: ReLU and overlapping fields move it, so print an untrained network's row beside it.

    >>> import torch
    >>> from coss_eval.checkpoints.load import make_model
    >>> table = measure(make_model("resnet18", stem="cifar", width=8).backbone, [torch.rand(8, 3, 32, 32)])
    >>> table.columns.tolist(), table["metric"].tolist()[:3]
    (['metric', 'value', 'n', 'low', 'high'], ['within', 'between', 'normalised'])
    """
    backbone, batches = measured(backbone, batches)
    if backbone.training:
        raise UsageError("redundancy needs the backbone in eval mode, but it is in train mode; call backbone.eval()")
    place = _place(backbone, site)
    start = batches if callable(batches) else _restartable(batches)
    collected = moments.collect(lambda: _locals_and_globals(backbone, start(), place), 1 if border is None else border)
    if border and collected.interior is None:
        shape = " x ".join(map(str, collected.grid or (collected.locations,)))
        raise UsageError(f"border {border} leaves no two of the {shape} locations at {site!r}; lower it")
    return _table(collected, receptive_field)


def _table(collected: moments.Moments, receptive_field: tuple[int, int] | None) -> pd.DataFrame:
    missing = float("nan")
    rows: list[tuple[str, float, float, float]] = [
        *((name, *estimate) for name, estimate in similarity.estimates(collected).items()),
        *((name, *estimate) for name, estimate in similarity.estimates_per_position(collected).items()),
        *((name, *estimate) for name, estimate in locality.by_overlap(collected.per_position, receptive_field).items()),
        ("position_share", collected.position_share, missing, missing),
        *((name, value, missing, missing) for name, value in spectrum.spectra(collected).items()),
        *((f"within_at_distance_{d}", *estimate) for d, estimate in locality.by_distance(collected).items()),
        *(
            (f"within_per_position_at_distance_{d}", *estimate)
            for d, estimate in locality.by_distance(collected.per_position).items()
        ),
    ]
    frame = pd.DataFrame(rows, columns=["metric", "value", "low", "high"])
    frame.insert(2, "n", collected.images)
    return frame


def _place(backbone: Backbone, name: str) -> Site:
    sites = {site.name: site for site in backbone.sites.values() if site.layout != "nc"}
    if name not in sites:
        choices = f"expected one of {', '.join(sites)}" if sites else "it has none"
        raise UsageError(f"no site {name!r} with locations in this network; {choices}")
    return sites[name]


def _restartable(batches: Iterable[Tensor]) -> Callable[[], Iterable[Tensor]]:
    if iter(batches) is batches:
        raise UsageError(
            "batches are read twice, but got an iterator that ends after one pass; pass a list or a function"
        )
    return lambda: batches


def _locals_and_globals(backbone: Backbone, batches: Iterable[Tensor], site: Site) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels in batches:
        output, global_ = _forward(backbone, pixels, site)
        yield _field(output, site), global_


def _field(output: Tensor, site: Site) -> Tensor:
    """A site's output as (B, H, W, D); (B, L, D) for a sequence that is no square of patches."""
    if site.layout == "nchw":
        return output.permute(0, 2, 3, 1)
    if site.layout == "nhwc":
        return output
    local = as_locations(output, site.layout, site.prefix_tokens)
    side = math.isqrt(local.shape[1])
    return local.reshape(len(local), side, side, -1) if side * side == local.shape[1] else local


@torch.inference_mode()
def _forward(backbone: Backbone, pixels: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The site's output and the global representation, of one forward pass."""
    with outputs_of(backbone, {site.module}) as outputs:
        global_ = backbone(pixels.to(next(backbone.parameters(), pixels).device))
    return outputs[site.module], global_

"""How much of the image a unit sees, in theory: each module's field from one traced forward pass, and that by site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from coss_eval.checkpoints.as_model import ModelLike, as_model
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models.backbone import Backbone
from coss_eval.models.hooks import Hook, hooked
from coss_eval.models.trial import evaluating
from coss_eval.receptive_field.effective import effective
from coss_eval.receptive_field.rules import Field, FieldTracer, Reach


def theoretical(module: ModelLike, size: int = 224) -> pd.DataFrame:
    """The theoretical receptive field of every module's output, in the order in which one forward pass reaches them.

    Columns: ``module`` (dotted path), ``site`` (stage1, ..., prepool, global, where the module is a Backbone),
    ``grid`` (units along a side), ``jump`` (pixels between neighbouring units), ``rf`` (pixels along the longer side),
    ``first`` (the leftmost pixel that unit 0 sees, negative in the padding) and ``covered`` (the share of the image's
    pixels that lie in the field of some unit: fields smaller than the jump leave gaps, and the last may end before the
    edge). ``rf`` is infinite where a unit sees the whole image whatever its size: global pooling, squeeze-and-excite,
    attention. ``module`` is a network, or the path, name or Model of one, whose backbone it then is. It runs once, on
    an image of ``size`` pixels. Raises CossError for an operation whose effect is not known, circular padding among
    them, UsageError for a size that the network does not take.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    >>> theoretical(network, 32).set_index("module").loc["2", ["grid", "jump", "rf"]].astype(float).tolist()
    [14.0, 2.0, 5.0]
    """
    module = module if isinstance(module, nn.Module) else as_model(module).backbone
    names = {site.module: site.name for site in module.sites.values()} if isinstance(module, Backbone) else {}
    rows = []
    for path, (output, reach) in fields(module, size).items():
        field = reach if isinstance(reach, Field) else None
        rows.append(
            {
                "module": path,
                "site": names.get(path, ""),
                "grid": _side(output, field) if field else 1,
                "jump": field.rows.jump if field else size,
                "rf": float(max(field.rows.size, field.columns.size)) if field else float("inf"),
                "first": field.rows.low if field else 0,
                "covered": _covered(output, field, size) if field else 1.0,
            }
        )
    return pd.DataFrame(rows)


def by_site(backbone: Backbone, size: int = 224, batches: Sequence[Tensor] = ()) -> pd.DataFrame:
    """One row a site: ``site``, ``grid``, ``jump``, ``rf``, ``covered`` as in ``theoretical``, and ``effective`` where
    normalised pixels (B, 3, H, W) are given as ``batches``. With them the theory may be unknown (NaN)."""
    sites = backbone.sites
    modules, columns = [site.module for site in sites.values()], ["grid", "jump", "rf", "covered"]
    try:
        table = theoretical(backbone, size).set_index("module").loc[modules, columns].reset_index(drop=True)
    except UsageError:
        raise
    except CossError:  # an operation whose effect is not known
        if not batches:
            raise
        table = pd.DataFrame(math.nan, index=range(len(modules)), columns=columns)
    table.insert(0, "site", list(sites))
    if batches:
        names = {site.module: name for name, site in sites.items()}  # stage4 and prepool are often one module
        sizes = {module: effective(backbone, batches, site=name).size for module, name in names.items()}
        table["effective"] = [sizes[site.module] for site in sites.values()]
    return table


def fields(module: nn.Module, size: int = 224) -> dict[str, tuple[Tensor, Reach]]:
    """Each submodule's last output on one image (1, 3, size, size), with its Field or WHOLE, in order of execution."""
    if size < 1:
        raise UsageError(f"the side of an image must be positive, not {size}")
    parameter = next(module.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    found: dict[str, tuple[Tensor, Reach]] = {}
    tracer = FieldTracer(image)

    def record(path: str) -> Hook:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            reach = tracer.of(output) if isinstance(output, Tensor) else None
            if reach is not None:
                found.pop(path, None)
                found[path] = (output, reach)

        return hook

    try:
        with hooked((part, record(path)) for path, part in module.named_modules()), evaluating(module), tracer:
            module(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the network takes no image of {size} px ({reason}); give another --size") from error
    if "" not in found:
        raise CossError(f"the image could not be followed through {type(module).__name__} (compiled or scripted code?)")
    return found


@dataclass(frozen=True)
class LocationFields:
    """What the locations of a site see of an image of ``image`` pixels a side.

    size, jump: of the theoretical receptive field, in pixels; size is infinite where a location sees the whole image
    whatever its size (``grid`` is None then). border: how many cells at each side of the grid have fields that reach
    over the image's edge into the padding. covered: the share of the pixels that some location sees; seen: the share
    that one sees, on average.
    """

    image: int
    grid: tuple[int, int] | None
    size: float
    jump: int
    border: int
    covered: float
    seen: float

    @property
    def whole(self) -> bool:
        """Every location sees every pixel."""
        return self.seen == 1


def _followed(backbone: Backbone, site: str, size: int) -> tuple[Tensor, Reach]:
    """A site's output on one image, and what of the image it reaches."""
    if site not in backbone.sites:
        raise unknown_name("site", site, backbone.sites)
    found = fields(backbone, size).get(backbone.sites[site].module)
    if found is None:
        raise CossError(f"the image could not be followed to {site!r}; take the effective field (--data)")
    return found


def location_fields(backbone: Backbone, site: str, size: int) -> LocationFields:
    """The theoretical fields of a site's locations. Errors as for ``theoretical``, and for an unknown site."""
    output, reach = _followed(backbone, site, size)
    if not isinstance(reach, Field):
        return LocationFields(size, None, math.inf, size, 0, 1.0, 1.0)
    rows, columns = _spans(output, reach)
    border = max(_border(rows, size), _border(columns, size))
    seen = _mean_length(rows, size) * _mean_length(columns, size) / size**2
    longer = max(reach.rows.size, reach.columns.size)
    grid = (len(rows), len(columns))
    return LocationFields(size, grid, longer, reach.rows.jump, border, _covered(output, reach, size), seen)


def middle_box(backbone: Backbone, site: str, size: int) -> tuple[int, int, int, int]:
    """First and last row, first and last column of an image that a site's middle unit sees in theory.

    Cut at the image's edges. Errors as for ``location_fields``.
    """
    output, reach = _followed(backbone, site, size)
    if not isinstance(reach, Field):
        return (0, size - 1, 0, size - 1)
    spans = _spans(output, reach)
    (top, bottom), (left, right) = ((max(low, 0), min(high, size - 1)) for low, high in (s[len(s) // 2] for s in spans))
    return (top, bottom, left, right)


def _side(output: Tensor, field: Field) -> int:
    return len(_spans(output, field)[0])


def _spans(output: Tensor, field: Field) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first and last pixel that each row and each column of units sees, over the unbounded image."""
    counts = [output.shape[dim] for dim in field.dims]
    if field.dims[0] == field.dims[1]:
        counts = [math.isqrt(counts[0])] * 2
    rows, columns = (
        [(axis.low + i * axis.jump, axis.high + i * axis.jump) for i in range(count)]
        for axis, count in zip((field.rows, field.columns), counts, strict=True)
    )
    return rows, columns


def _covered(output: Tensor, field: Field, size: int) -> float:
    """The share of the image's pixels that lie between the first and last pixel of some unit's field."""
    rows, columns = (
        len({pixel for low, high in spans for pixel in range(max(low, 0), min(high, size - 1) + 1)})
        for spans in _spans(output, field)
    )
    return rows * columns / size**2


def _mean_length(spans: Sequence[tuple[int, int]], size: int) -> float:
    """How many pixels of one axis a unit sees, on average."""
    return sum(max(0, min(high, size - 1) - max(low, 0) + 1) for low, high in spans) / len(spans)


def _border(spans: Sequence[tuple[int, int]], size: int) -> int:
    """How many units at an end of an axis reach over the edge; at the end that has more of them."""
    return max(sum(low < 0 for low, _ in spans), sum(high > size - 1 for _, high in spans))

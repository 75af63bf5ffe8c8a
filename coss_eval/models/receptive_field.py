"""How much of the image a unit sees: in theory, as a gradient probe confirms it, and effectively (Luo et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.field_rules import ACTIVATIONS, Field, FieldTracer, Reach, argument
from coss_eval.models.generic import evaluating, outputs_of

EFFECTIVE_LEVEL = 0.0455  # Luo et al.: what lies within two standard deviations of a Gaussian


def theoretical(module: nn.Module, size: int = 224) -> pd.DataFrame:
    """The theoretical receptive field of every module's output, in the order in which one forward pass reaches them.

    Columns: ``module`` (dotted path), ``site`` (stage1, ..., prepool, global, where the module is a Backbone),
    ``grid`` (units along a side), ``jump`` (pixels between neighbouring units), ``rf`` (pixels along the longer side),
    ``first`` (the leftmost pixel that unit 0 sees, negative in the padding) and ``covered`` (the share of the image's
    pixels that lie in the field of some unit: fields smaller than the jump leave gaps, and the last may end before the
    edge). ``rf`` is infinite where a unit sees the whole image whatever its size: global pooling, squeeze-and-excite,
    attention. The network runs once, on an image of ``size`` pixels. Raises CossError for an operation whose effect is
    not known, circular padding among them, UsageError for a size that the network does not take.
    """
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

    def record(path: str, output: Any) -> None:
        reach = tracer.of(output) if isinstance(output, Tensor) else None
        if reach is not None:
            found.pop(path, None)
            found[path] = (output, reach)

    handles = [
        submodule.register_forward_hook(lambda _m, _args, output, path=path: record(path, output))
        for path, submodule in module.named_modules()
    ]
    try:
        with evaluating(module), tracer:
            module(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the network takes no image of {size} px ({reason}); give another --size") from error
    finally:
        for handle in handles:
            handle.remove()
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


def location_fields(backbone: Backbone, site: str, size: int) -> LocationFields:
    """The theoretical fields of a site's locations. Errors as for ``theoretical``, and for an unknown site."""
    if site not in backbone.sites:
        raise unknown_name("site", site, backbone.sites)
    found = fields(backbone, size).get(backbone.sites[site].module)
    if found is None:
        raise CossError(f"the image could not be followed to {site!r}; take the effective field (--data)")
    output, reach = found
    if not isinstance(reach, Field):
        return LocationFields(size, None, math.inf, size, 0, 1.0, 1.0)
    rows, columns = _spans(output, reach)
    border = max(_border(rows, size), _border(columns, size))
    seen = _mean_length(rows, size) * _mean_length(columns, size) / size**2
    longer = max(reach.rows.size, reach.columns.size)
    grid = (len(rows), len(columns))
    return LocationFields(size, grid, longer, reach.rows.jump, border, _covered(output, reach, size), seen)


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


def gradient_probe(backbone: Backbone, size: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """By site, the pixels that the middle unit of its map really depends on: ((top, bottom), (left, right)).

    The check on ``theoretical``, by another road: with one channel, weights of one and averages for maxima no gradient
    cancels, so that it is non-zero up to the edges of the receptive field, of which the image (``size`` pixels) may
    cut something off. For networks of convolutions, poolings, concatenations and sums.
    """
    image = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    sites = {name: site for name, site in backbone.sites.items() if site.layout == "nchw"}
    paths = {site.module for site in sites.values()}
    with evaluating(backbone), torch.enable_grad(), outputs_of(backbone, paths) as outputs, _PositiveWeights():
        backbone.prepool(backbone.features(image))
    seen = {}
    for name, site in sites.items():
        units = outputs[site.module]  # (1, 1, H, W)
        middle = units[..., units.shape[2] // 2, units.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(middle, image, retain_graph=True)
        touched = gradient[0].ne(0).any(dim=0)  # (H, W)
        seen[name] = (_extent(touched.any(dim=1)), _extent(touched.any(dim=0)))
    return seen


_CONVOLVING = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))  # position, name, default
_AVERAGING = ("kernel_size", "stride", "padding", "ceil_mode")  # what max-pooling and average pooling share


class _PositiveWeights(TorchFunctionMode):
    """Runs a network as if it had one channel, weights of one and averages for maxima."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "conv2d":
            kernel = torch.ones(1, 1, *argument(args, kwargs, 1, "weight").shape[2:], dtype=args[0].dtype)
            steps = {k: argument(args, kwargs, i, k, d) for i, k, d in _CONVOLVING}
            return F.conv2d(args[0].mean(dim=1, keepdim=True), kernel, **steps)
        if name == "max_pool2d":
            return F.avg_pool2d(*args[:4], **{k: v for k, v in kwargs.items() if k in _AVERAGING})
        if name.rstrip("_") in ACTIVATIONS | {"batch_norm", "dropout"}:
            return args[0].clone()  # what follows may write into it
        return func(*args, **kwargs)


def _extent(touched: Tensor) -> tuple[int, int]:
    (where,) = touched.nonzero(as_tuple=True)
    return int(where[0]), int(where[-1])


@dataclass(frozen=True)
class EffectiveField:
    """``map`` (H, W): mean absolute gradient of the middle unit over the images, its peak 1.

    ``sizes`` (n,): of each image's field, in pixels along a side; ``size`` is their median.
    """

    map: Tensor
    sizes: Tensor
    site: str

    @property
    def size(self) -> float:
        return float(self.sizes.quantile(0.5))

    @property
    def n(self) -> int:
        return len(self.sizes)


def effective(backbone: Backbone, batches: Iterable[Tensor], *, site: str = "prepool") -> EffectiveField:
    """The effective receptive field of a site's middle unit (Luo et al., NeurIPS 2016).

    ``batches``: normalised pixels (B, 3, H, W), all of one size, which belongs to the result: rankings of networks
    change with it. A gradient of one goes in at every channel of the middle unit that is positive (as Ding et al., CVPR
    2022, do: the sum of all channels is constant after a layer norm). An image's size is the square root of the number
    of pixels where the gradient's absolute value, summed over colours, is above 4.55 % of its PEAK; the result is the
    median over images. Luo et al. take 4.55 % of the centre's value in the mean map: strided 1x1 convolutions may skip
    the very centre, and the union of many images' fields is larger than that of any.
    """
    if site not in backbone.sites:
        raise unknown_name("site", site, backbone.sites)
    place = backbone.sites[site]
    total, sizes = torch.zeros(()), []
    for pixels in batches:
        leaf = pixels.detach().clone().requires_grad_()
        with evaluating(backbone), torch.enable_grad(), outputs_of(backbone, {place.module}) as outputs:
            backbone(leaf)
        locations = as_locations(outputs[place.module], place.layout, place.prefix_tokens)  # (B, L, D)
        middle = locations[:, _middle(outputs[place.module], place)].relu().sum()
        (gradient,) = torch.autograd.grad(middle, leaf)
        maps = gradient.abs().sum(dim=1).double().cpu()  # (B, H, W)
        above = maps > EFFECTIVE_LEVEL * maps.amax(dim=(1, 2), keepdim=True)
        sizes.append(above.sum(dim=(1, 2)).double().sqrt())
        total = total + maps.sum(dim=0)
    if not sizes:
        raise UsageError("the effective receptive field needs at least one image")
    return EffectiveField(total / total.max(), torch.cat(sizes), site)


def _middle(output: Tensor, site: Site) -> int:
    """The index of the middle location, in the order of as_locations."""
    if site.layout == "nc":
        return 0
    if site.layout == "nlc":
        height = width = math.isqrt(output.shape[1] - site.prefix_tokens)
    else:
        height, width = output.shape[2:] if site.layout == "nchw" else output.shape[1:3]
    return height // 2 * width + width // 2

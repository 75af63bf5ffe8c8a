"""The theoretical field as a gradient finds it: a check of the rules by another way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coss_eval.models.backbone import Backbone
from coss_eval.models.hooks import outputs_of
from coss_eval.models.trial import evaluating
from coss_eval.receptive_field.rules import ACTIVATIONS, argument


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

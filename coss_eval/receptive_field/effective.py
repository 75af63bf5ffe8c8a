"""The effective receptive field: where in the image the gradient of a unit lies (Luo et al. 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.measured import PixelBatches, measured
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.classifier import Classifier
from coss_eval.models.hooks import outputs_of
from coss_eval.models.trial import evaluating

EFFECTIVE_LEVEL = 0.0455  # Luo et al.: what lies within two standard deviations of a Gaussian


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


def effective(
    backbone: Backbone | Classifier | ModelLike, batches: PixelBatches | DatasetLike, *, site: str = "prepool"
) -> EffectiveField:
    """The effective receptive field of a site's middle unit (Luo et al., NeurIPS 2016).

    ``batches``: normalised pixels (B, 3, H, W), all of one size, which belongs to the result: rankings of networks
    change with it. In place of a Backbone a Classifier or what ``as_model`` takes will do: its ``batches`` are then
    uint8 or in [0, 1], or a split, or what ``as_dataset`` takes, whose test split it is.
    A gradient of one goes in at every channel of the middle unit that is positive (as Ding et al., CVPR 2022, do: the
    sum of all channels is constant after a layer norm). An image's size is the square root of the number of pixels
    where the gradient's absolute value, summed over colours, is above 4.55 % of its PEAK; the result is the median over
    images. Luo et al. take 4.55 % of the centre's value in the mean map: strided 1x1 convolutions may skip the very
    centre, and the union of many images' fields is larger than that of any.

    >>> from coss_eval.checkpoints.load import make_model
    >>> backbone = make_model("resnet18", stem="cifar", width=8).backbone
    >>> field = effective(backbone, [torch.rand(2, 3, 32, 32)], site="stage1")
    >>> field.map.shape, field.n, field.size < 32
    (torch.Size([32, 32]), 2, True)
    """
    backbone, batches = measured(backbone, batches)
    if site not in backbone.sites:
        raise unknown_name("site", site, backbone.sites)
    place = backbone.sites[site]
    total, sizes = torch.zeros(()), []
    for pixels in batches() if callable(batches) else batches:
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

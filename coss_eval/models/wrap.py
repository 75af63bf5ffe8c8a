"""Any network taken apart into a Backbone and its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site
from coss_eval.models.families import (
    ConvNeXtBackbone,
    Pooling,
    ResNetBackbone,
    SwinBackbone,
    TimmBackbone,
    ViTBackbone,
    four_groups,
    layout_of,
)
from coss_eval.models.generic import evaluating, find_head, generic_backbone, outputs_of, takes_any_size, try_sizes
from coss_eval.models.rf_resnet import RFResNet

TIMM_INTERFACE = ("forward_features", "forward_head", "feature_info", "pretrained_cfg", "get_classifier")


def wrap(
    network: nn.Module, arch: str = "", *, img_size: int | None = None, pooling: Pooling = "own"
) -> tuple[Backbone, nn.Module | None]:
    """A network as a Backbone and its head: ``head(backbone(x))`` equals what ``network(x)`` was.

    The network is changed: an Identity stands where its head was. The head is None where there is none, and with
    ``pooling`` "mean" (the mean of the patch tokens, for which no head was made). torchvision's ResNets, ConvNeXts,
    ViTs and Swins, RF-ResNets and timm networks have named stages; any other network is taken apart by a traced
    forward pass, and ``backbone.note`` says where. ``img_size``: for networks that take one size only.
    """
    backbone, head = _take_apart(network, img_size, pooling)
    if pooling == "mean":
        if backbone.prepool_layout != "nlc":
            raise UsageError(f"pooling 'mean' is for token sequences; {arch or type(network).__name__} ends in a map")
        head = None
    return backbone.train(network.training), head


def _take_apart(network: Any, img_size: int | None, pooling: Pooling) -> tuple[Backbone, nn.Module | None]:
    if _is(network, ResNet) or _is(network, RFResNet):
        return ResNetBackbone(network), detach(network, network.fc)
    if _is(network, ConvNeXt):
        return ConvNeXtBackbone(network), detach(network, network.classifier[2])
    if _is(network, SwinTransformer):
        return SwinBackbone(network), detach(network, network.head)
    if _is(network, VisionTransformer):
        return ViTBackbone(network, pooling), detach(network, network.heads[-1])
    example, output = try_sizes(network, (img_size,) if img_size else _sides(network))
    if all(hasattr(network, name) for name in TIMM_INTERFACE) and output.ndim == 2:
        taken = _take_timm_apart(network, example, output, pooling)
        if taken is not None:
            return taken
    side = None if img_size is None and takes_any_size(network, example) else example.shape[-1]
    head = detach(network, find_head(network, example))
    backbone = generic_backbone(network, example)
    backbone.img_size = side
    return backbone, head


def _sides(network: Any) -> tuple[int, ...]:
    """The sides of images to try: the one a timm network is made for, or common ones."""
    if not hasattr(network, "pretrained_cfg"):
        return (224, 64, 32, 299)
    embedded = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return ((embedded or network.pretrained_cfg["input_size"][1:])[0],)


def _is(network: nn.Module, family: type[nn.Module]) -> bool:
    """Whether the network is of the family and still computes what the family does (a subclass may not)."""
    methods = [name for name in ("forward", "_forward_impl") if hasattr(family, name)]
    return isinstance(network, family) and all(getattr(type(network), m) is getattr(family, m) for m in methods)


def _take_timm_apart(
    network: Any, example: Tensor, logits: Tensor, pooling: Pooling
) -> tuple[Backbone, nn.Module | None] | None:
    """None where forward_features does not return one tensor."""
    with outputs_of(network, {info["module"] for info in network.feature_info}) as outputs, evaluating(network):
        features = network.forward_features(example)
    if not isinstance(features, Tensor):
        return None
    classifier = network.get_classifier()
    with evaluating(network):
        backbone = TimmBackbone(network, features, timm_sites(network, outputs), pooling)
        backbone.img_size = example.shape[-1] if network.pretrained_cfg.get("fixed_input_size") else None
        head = as_linear(classifier) if isinstance(classifier, nn.Module) else None  # a tuple where there are several
        if head is not None and pooling == "own" and torch.allclose(head(backbone.pool(features)), logits, atol=1e-4):
            return backbone, detach(network, classifier) and head
    if not isinstance(classifier, nn.Identity):
        backbone.note = "its logits are not one linear map of the global representation, so its own head is left out"
    return backbone, None


def timm_sites(network: Any, outputs: dict[str, Any]) -> tuple[Site, ...]:
    """The stages of a timm network from its feature_info; ``outputs`` holds what its modules gave on an example.

    Networks of one resolution (plain ViTs) are cut into four equal groups of blocks. Empty where feature_info names
    modules that do not return a map or sequence of the width it states.
    """
    infos = list(network.feature_info)
    same_resolution = len({info["reduction"] for info in infos}) == 1
    chosen = four_groups(infos) if same_resolution else infos[-4:]
    prefix = getattr(network, "num_prefix_tokens", 0)
    sites = []
    for i, info in enumerate(chosen, start=1):
        output = outputs.get(info["module"])
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or info["num_chs"] not in output.shape[1:]:
            return ()
        layout = layout_of(output, info["num_chs"])
        sites.append(Site(f"stage{i}", f"network.{info['module']}", layout, prefix if layout == "nlc" else 0))
    return tuple(sites)


def detach(network: nn.Module, head: nn.Module | None) -> nn.Module | None:
    """Put an Identity in the place of ``head`` inside ``network``; None where there is no head to take."""
    if head is None or isinstance(head, nn.Identity):
        return None
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is head:
                setattr(parent, name, nn.Identity())
                return head
    raise ValueError("the head is not a part of the network")


def as_linear(classifier: nn.Module) -> nn.Linear | None:
    """A classifier as the Linear that it is (a 1x1 convolution over pooled features too); None for anything else."""
    if isinstance(classifier, nn.Linear):
        return classifier
    if not isinstance(classifier, nn.Conv2d) or classifier.kernel_size != (1, 1):
        return None
    with torch.device("meta"):  # no weights are drawn
        linear = nn.Linear(classifier.in_channels, classifier.out_channels, bias=False)
    linear.weight = nn.Parameter(classifier.weight.detach().flatten(1))
    linear.bias = classifier.bias  # type: ignore[assignment]  # None where it has none
    return linear

"""Any network taken apart into a Backbone and its head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site
from coss_eval.models.choices import Pooling
from coss_eval.models.cifar_resnet import CifarResNet
from coss_eval.models.families import (
    CifarResNetBackbone,
    ConvNeXtBackbone,
    ResNetBackbone,
    SwinBackbone,
    TimmBackbone,
    ViTBackbone,
    four_groups,
    layout_of,
)
from coss_eval.models.find_head import as_linear, find_head
from coss_eval.models.generic import Cut, generic_backbone
from coss_eval.models.hooks import outputs_of
from coss_eval.models.rf_resnet import RFResNet
from coss_eval.models.trial import channels_of, close, evaluating, run, takes_any_size, try_sizes, unsettled

TIMM_INTERFACE = ("forward_features", "forward_head", "feature_info", "pretrained_cfg", "get_classifier")


def wrap(
    network: nn.Module,
    arch: str = "",
    *,
    img_size: int | None = None,
    pooling: Pooling = "own",
    local: str | None = None,
    global_: str | None = None,
) -> tuple[Backbone, nn.Module | None]:
    """A network as a Backbone and its head: ``head(backbone(x))`` equals what ``network(x)`` was.

    The network is changed: an Identity stands where its head was. The head is None where there is none, and with
    ``pooling`` "mean" (the mean of the patch tokens, for which no head was made). torchvision's ResNets, ConvNeXts,
    ViTs and Swins, RF-ResNets and timm networks have named stages; any other network is taken apart by a traced
    forward pass, and ``backbone.note`` says where. ``img_size``: for networks that take one size only. ``local`` and
    ``global_``: the modules whose outputs are the map before pooling and the global representation, named by hand;
    the head is then kept only where it takes that representation.
    """
    cut = Cut(local, global_)
    backbone, head = _take_apart(network, img_size, pooling, cut)
    if pooling == "mean":
        if backbone.prepool_layout != "nlc":
            raise UsageError(f"pooling 'mean' is for token sequences; {arch or type(network).__name__} ends in a map")
        head = None
    backbone.channels = channels_of(network)
    if backbone.channels == 1:
        grey = "takes grey images: of colours it gets the luminance"
        backbone.note = "; ".join(note for note in (grey, backbone.note) if note)
    return backbone.train(network.training), head


def _take_apart(network: Any, img_size: int | None, pooling: Pooling, cut: Cut) -> tuple[Backbone, nn.Module | None]:
    family = None if cut else _family(network, pooling)
    if family is not None:
        backbone, head = family
        if any(_foreign(module) for module in network.modules()):  # blocks of the user's own in a known frame
            backbone.memory_format = safe_format(network, try_sizes(network, (img_size or 224, 64, 32))[0])
        return backbone, detach(network, head)
    with unsettled(network):  # what follows compares outputs
        return _by_trial(network, img_size, pooling, cut)


def _by_trial(network: Any, img_size: int | None, pooling: Pooling, cut: Cut) -> tuple[Backbone, nn.Module | None]:
    """A network of no known family, by what it makes of an example."""
    example, output = try_sizes(network, (img_size,) if img_size else _sides(network))
    memory_format = safe_format(network, example)
    if not cut and all(hasattr(network, name) for name in TIMM_INTERFACE) and output.ndim == 2:
        taken = _take_timm_apart(network, example, output, pooling)
        if taken is not None:
            taken[0].memory_format = memory_format
            return taken
    side = None if img_size is None and takes_any_size(network, example) else example.shape[-1]
    found = find_head(network, example)
    for module in found.modules:
        detach(network, module)
    end = found.end if cut.global_ is None else None  # what comes after the head is left out, too
    backbone, whole = generic_backbone(network, example, cut if end is None else Cut(cut.local, end))
    if end is not None:
        whole, backbone.note = True, backbone.note.removeprefix(f"global representation: {end}, as asked; ")
    backbone.note = "; ".join(note for note in (found.note if whole else "", backbone.note) if note)
    backbone.img_size, backbone.memory_format = side, memory_format
    return backbone, found.head if whole else None


def _family(network: Any, pooling: Pooling) -> tuple[Backbone, nn.Module] | None:
    """torchvision's families and ours, with the head that is still inside; None for any other network."""
    if _is(network, ResNet) or _is(network, RFResNet):
        return ResNetBackbone(network), network.fc
    if _is(network, CifarResNet):
        return CifarResNetBackbone(network), network.fc
    if _is(network, ConvNeXt):
        return ConvNeXtBackbone(network), network.classifier[2]
    if _is(network, SwinTransformer):
        return SwinBackbone(network), network.head
    if _is(network, VisionTransformer):
        return ViTBackbone(network, pooling), network.heads[-1]
    return None


def _foreign(module: nn.Module) -> bool:
    """Whether a module's code is neither torch's, torchvision's nor ours."""
    return type(module).__module__.partition(".")[0] not in ("torch", "torchvision", "coss_eval")


def safe_format(network: nn.Module, example: Tensor) -> torch.memory_format:
    """Channels-last where a copy of the network takes that layout and gives the same output; else contiguous.

    Code that flattens a map with ``.view`` raises on a channels-last one.
    """
    twin: Any = copy.deepcopy(network)
    expected = run(network, example)
    try:
        found = run(twin.to(memory_format=torch.channels_last), example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # about sizes and strides: the same pixels went through in the other layout
        return torch.contiguous_format
    if expected.is_meta:  # a network without weights as yet: shapes are all there is
        return torch.channels_last
    same = torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().nan_to_num(0, 0, 0).max()))
    return torch.channels_last if same or not _repeats(network, example, expected) else torch.contiguous_format


def _repeats(network: nn.Module, example: Tensor, expected: Tensor) -> bool:
    """Whether a second pass gives the same; where it does not (active dropout), outputs say nothing of layouts."""
    return torch.equal(run(network, example), expected)


def _sides(network: Any) -> tuple[int, ...]:
    """The sides of images to try: the one a timm network is made for, or common ones."""
    if not hasattr(network, "pretrained_cfg"):
        return (224, 64, 32, 299, 256, 384)
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
        if head is not None and pooling == "own" and close(head(backbone.pool(features)), logits):
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

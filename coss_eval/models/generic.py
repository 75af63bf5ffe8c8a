"""A Backbone around a network of no known family: cut where it pools, at a module that is named, or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.backbone import Backbone, MapLayout, as_locations
from coss_eval.models.hooks import outputs_of
from coss_eval.models.traced import Truncated, cut_at, split_at_pooling, up_to
from coss_eval.models.trial import evaluating, run
from coss_eval.models.watched import split_by_hooks


class WholeBackbone(Backbone):
    """A network left as it is: its output is the map (mean-pooled here) or, where it is a vector, the global."""

    def __init__(self, network: nn.Module, layout: MapLayout) -> None:
        super().__init__()
        self.network, self.prepool_layout = network, layout

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        return as_locations(features, self.prepool_layout).mean(dim=1)


@dataclass(frozen=True)
class Cut:
    """Where a caller wants a network cut: the modules whose outputs are the map before pooling and the global."""

    local: str | None = None
    global_: str | None = None

    def __bool__(self) -> bool:
        return self.local is not None or self.global_ is not None


def generic_backbone(network: nn.Module, example: Tensor, cut: Cut = Cut()) -> tuple[Backbone, bool]:
    """A Backbone around any network that maps pixels to a vector, a map (B, D, H, W) or a sequence (B, L, D).

    A vector's network is cut at its last global pooling where torch.fx can trace it (control flow that depends on
    the input's values or shape defeats it), or where forward hooks see a map whose mean or maximum the vector is;
    otherwise the vector is its own only local representation. ``note`` says which happened. ``cut`` names the places
    by hand. The second result says whether the global representation is what the network returns.
    """
    backbone, whole = _cut_by_hand(network, example, cut) if cut else (_cut_by_itself(network, example), True)
    with evaluating(backbone):
        local, global_ = backbone.represent(example)
    backbone.local_dim, backbone.dim = local.shape[-1], global_.shape[-1]
    return backbone, whole


def _cut_by_itself(network: nn.Module, example: Tensor) -> Backbone:
    output = run(network, example)
    layouts: dict[int, MapLayout] = {2: "nc", 3: "nlc", 4: "nchw"}
    if output.ndim not in layouts:
        raise UsageError(f"the network must return (B, D), (B, L, D) or (B, D, H, W), not {tuple(output.shape)}")
    backbone: Backbone | None = None
    if output.ndim == 2:
        backbone = split_at_pooling(network, example) or split_by_hooks(network, example)
    if backbone is None:
        backbone = WholeBackbone(network, layouts[output.ndim])
        backbone.note = (
            "found no global pooling to cut it at: the global representation is its own only local one (L = 1)"
            if output.ndim == 2
            else "the output is taken for the map before pooling; its mean is the global representation"
        )
    return backbone


def _cut_by_hand(network: nn.Module, example: Tensor, cut: Cut) -> tuple[Backbone, bool]:
    names = {name for name in (cut.local, cut.global_) if name is not None}
    modules = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in modules:
            raise unknown_name(f"module of {type(network).__name__}", name, modules)
    with outputs_of(network, names) as outputs:
        output = run(network, example)
    for name in names:
        if not isinstance(outputs.get(name), Tensor):
            raise UsageError(f"{name} gives no tensor in a forward pass; name another module")
    whole = cut.global_ is None or _same_vector(outputs[cut.global_], output)
    if cut.local is None:
        ended = network if cut.global_ is None or whole else Truncated(network, cut.global_)
        if cut.global_ is not None and not whole:
            ended = up_to(network, example, cut.global_) or ended
        backbone = _cut_by_itself(ended, example)
        backbone.note = f"global representation: {cut.global_}, as asked; {backbone.note}"
        return backbone, whole
    return cut_at(network, example, cut.local, None if whole else cut.global_), whole


def _same_vector(first: Tensor, second: Tensor) -> bool:
    return first.numel() == second.numel() and torch.equal(first.flatten(1), second.flatten(1))

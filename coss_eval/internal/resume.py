"""From a site's activations on: the rest of the network alone, so that its prefix is computed once for all levels.

The network is traced only as far as the site: every module that does not contain it stays whole, whatever its code.
What follows from the site's output alone becomes the suffix. A network that cannot be traced (its own code branches on
values), or whose output needs more than the site (a skip connection around it), takes the full forward pass instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from coss_eval.models.backbone import Backbone, Site
from coss_eval.models.hooks import captured, replaced


class Resume(NamedTuple):
    """``run``: pixels and the site's activations to the global representation (B, D'); ``note``: why it is slow."""

    run: Callable[[Tensor, Tensor], Tensor]
    note: str = ""


def resume_from(backbone: Backbone, site: Site, pixels: Tensor) -> Resume:
    """How to go on from ``site``; the suffix is compared with the full forward pass on ``pixels`` before it is used."""
    if site.name == "global":
        return Resume(lambda _pixels, activations: activations)
    if site.name == "prepool":
        return Resume(lambda _pixels, activations: backbone.global_(backbone.pool(activations)))
    full = _full_forward(backbone, site)
    try:
        traced = suffix(backbone, site)
    except Exception as error:  # noqa: BLE001 - a network's own code may fail in any way when traced
        reason = str(error).partition("\n")[0].rstrip(".")
        return Resume(full, f"full forward passes from {site.name}: torch.fx cannot cut the network there ({reason})")
    with captured(backbone, [site]) as outputs:
        backbone(pixels)
    probe = outputs[site.name].flip(0) * 0.5  # other activations than those the pixels give
    if not torch.allclose(traced(probe.clone()), full(pixels, probe.clone()), rtol=1e-3, atol=1e-5):
        return Resume(full, f"full forward passes from {site.name}: the traced suffix gives other values")
    return Resume(lambda _pixels, activations: traced(activations))


def suffix(backbone: Backbone, site: Site) -> fx.GraphModule:
    """The network from the site's output on, as a module that shares its weights; ValueError where it cannot be cut."""
    graph = _TailTracer(site.module).trace(backbone)
    places = [node for node in graph.nodes if node.op == "call_module" and node.target == site.module]
    if len(places) != 1:
        raise ValueError(f"{site.module} runs {len(places)} times in a forward pass")
    needed = _needed(graph, places[0])
    if any(node.op == "placeholder" for node in needed):
        raise ValueError(f"the output needs more than {site.module}")
    rest = fx.Graph()
    copies = {places[0]: rest.placeholder("activations")}
    for node in graph.nodes:
        if node in needed:
            copies[node] = rest.node_copy(node, copies.__getitem__)
    return fx.GraphModule(backbone, rest)


class _TailTracer(fx.Tracer):
    """Goes into the modules that contain the site, and leaves all others whole."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self._site = site

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._site.startswith(module_qualified_name + ".")


def _needed(graph: fx.Graph, cut: fx.Node) -> set[fx.Node]:
    """The nodes that the output needs if the node ``cut`` is given."""
    needed: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node is not cut and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _full_forward(backbone: Backbone, site: Site) -> Callable[[Tensor, Tensor], Tensor]:
    """The whole network from the pixels, with the site's output replaced."""

    def run(pixels: Tensor, activations: Tensor) -> Tensor:
        with replaced(backbone, site, lambda _: activations):
            global_: Tensor = backbone(pixels)
        return global_

    return run

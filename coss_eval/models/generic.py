"""Networks of no known family: a traced forward finds the head, and the pooling at which to take the network apart."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Layout, as_locations

HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear")
_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


class SplitBackbone(Backbone):
    """A network cut in two at its last global pooling: ``body`` gives the map, ``tail`` pools it and goes on.

    Both hold the network's own modules, and run its code as it was traced, in eval mode.
    """

    def __init__(self, body: fx.GraphModule, tail: fx.GraphModule, layout: Layout, prefix_tokens: int) -> None:
        super().__init__()
        self.body, self.tail = body, tail
        self.prepool_layout, self.prefix_tokens = layout, prefix_tokens

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.body(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.tail(features)
        return pooled.flatten(1)


class WholeBackbone(Backbone):
    """A network left as it is: its output is the map (mean-pooled here) or, where it is a vector, the global."""

    def __init__(self, network: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.network, self.prepool_layout = network, layout

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        return as_locations(features, self.prepool_layout).mean(dim=1)


def generic_backbone(network: nn.Module, example: Tensor) -> Backbone:
    """A Backbone around any network that maps pixels to a vector, a map (B, D, H, W) or a sequence (B, L, D).

    A vector's network is cut at its last global pooling where torch.fx can trace it (control flow that depends on
    the input's values or shape defeats it); otherwise the vector is its own only local representation. ``note``
    says which happened.
    """
    output = run(network, example)
    layouts: dict[int, Layout] = {2: "nc", 3: "nlc", 4: "nchw"}
    if output.ndim not in layouts:
        raise UsageError(f"the network must return (B, D), (B, L, D) or (B, D, H, W), not {tuple(output.shape)}")
    backbone: Backbone | None = split_at_pooling(network, example) if output.ndim == 2 else None
    if backbone is None:
        backbone = WholeBackbone(network, layouts[output.ndim])
        backbone.note = (
            "no global pooling was found: the global representation is its own only local one (L = 1)"
            if output.ndim == 2
            else "the output is taken for the map before pooling; its mean is the global representation"
        )
    with evaluating(backbone):
        local, global_ = backbone.represent(example)
    backbone.local_dim, backbone.dim = local.shape[-1], global_.shape[-1]
    return backbone


def find_head(network: nn.Module, example: Tensor) -> nn.Linear | None:
    """The last Linear inside a child named fc, classifier, head, heads or linear, if the network returns its output."""
    children = dict(network.named_children())
    for name in HEAD_NAMES:
        linears = [m for m in children[name].modules() if isinstance(m, nn.Linear)] if name in children else []
        if not linears:
            continue
        (path,) = (path for path, module in network.named_modules() if module is linears[-1])
        with outputs_of(network, {path}) as outputs:
            output = run(network, example)
        if outputs.get(path) is output:
            return linears[-1]
    return None


def split_at_pooling(network: nn.Module, example: Tensor) -> SplitBackbone | None:
    """The network cut at its last global pooling, or None where there is none or torch.fx cannot trace the network."""
    with evaluating(network):
        try:
            graph = fx.Tracer().trace(network)
        except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError):
            return None  # the network's own code needs real tensors; what else could be wrong shows in the run itself
        ShapeProp(fx.GraphModule(network, graph)).propagate(example)
    for node in reversed(graph.nodes):
        if not _pools(node, network):
            continue
        cut = node.all_input_nodes[0]
        tail = _tail(network, graph, cut)
        if tail is None:
            continue  # squeeze-and-excite and the like: what follows needs more than this map
        layout: Layout = "nchw" if len(_shape(cut)) == 4 else "nlc"
        picks_token = layout == "nlc" and node.target is operator.getitem
        backbone = SplitBackbone(_body(network, graph, cut), tail, layout, 1 if picks_token else 0)
        backbone.note = f"taken apart at {node.name}: its input is the map before pooling"
        return backbone
    return None


def _pools(node: fx.Node, network: nn.Module) -> bool:
    """Whether this step turns a map (B, D, H, W) or sequence (B, L, D) into one vector, or is an adaptive pooling."""
    inputs = node.all_input_nodes
    if len(inputs) != 1 or len(_shape(inputs[0])) not in (3, 4) or not _shape(node):
        return False
    if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), _POOLINGS[:2]):
        return True
    if node.target in _POOLINGS[2:]:
        return True
    before, after = _shape(inputs[0]), _shape(node)
    channels = before[1] if len(before) == 4 else before[2]
    locations = before.numel() // (before[0] * channels)
    return locations > 1 and after[1:].numel() == channels and after[1] == channels


def _shape(node: fx.Node) -> torch.Size:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return shape if isinstance(shape, torch.Size) else torch.Size()


def _body(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule:
    """Everything up to ``cut``."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
        if node is cut:
            break
    body.output(copies[cut])
    return _pruned(fx.GraphModule(network, body))


def _tail(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule | None:
    """Everything that follows from ``cut`` alone; None if the output needs anything else."""
    tail = fx.Graph()
    copies = {cut: tail.placeholder("features")}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node is cut or node.op == "placeholder" or not all(used in copies for used in inputs):
            continue
        if inputs or node.op == "get_attr":
            copies[node] = tail.node_copy(node, copies.__getitem__)
        if node.op == "output":
            return _pruned(fx.GraphModule(network, tail))
    return None


def _pruned(part: fx.GraphModule) -> fx.GraphModule:
    """Without the steps, and the modules, that its output does not need."""
    part.graph.eliminate_dead_code()
    part.recompile()
    part.delete_all_unused_submodules()
    return part


def try_sizes(network: nn.Module, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One random image (1, 3, S, S) of the first side that the network takes, and what the network makes of it."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    failures = []
    for side in sides:
        example = torch.randn(1, 3, side, side, generator=generator).to(device)
        try:
            return example, run(network, example)
        except (RuntimeError, AssertionError, ValueError) as error:
            failures.append(str(error).partition("\n")[0])
    tried = ", ".join(map(str, sides))
    raise UsageError(f"{type(network).__name__} takes no image of side {tried} ({failures[0]}); give --img-size")


def takes_any_size(network: nn.Module, example: Tensor) -> bool:
    """Whether an image 32 px larger than the example goes through as well."""
    try:
        run(network, F.pad(example, (0, 32, 0, 32)))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def run(network: nn.Module, pixels: Tensor) -> Tensor:
    """One forward pass in eval mode without gradient; the network's mode is put back."""
    with evaluating(network):
        output: Any = network(pixels)
    if not isinstance(output, Tensor):
        raise UsageError(f"{type(network).__name__} must return one tensor in eval mode, not {type(output).__name__}")
    return output


@contextmanager
def outputs_of(network: nn.Module, names: set[str]) -> Iterator[dict[str, Any]]:
    """The last output of each named module, filled in by the forward passes run inside."""
    outputs: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        outputs[name] = output

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, module in network.named_modules()
        if name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

"""A network cut in two where torch.fx can follow it: at its last global pooling, or at a module that somebody names."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, MapLayout, Site
from coss_eval.models.hooks import outputs_of
from coss_eval.models.trial import close, evaluating, run

_RESHAPES = (
    *("view", "reshape", "flatten", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", torch.flatten),
    *("mean", "sum", "amax", torch.mean, torch.sum, torch.amax, torch.reshape, torch.permute, torch.transpose),
)
"""Steps without weights that a pooling may take from a map to one vector, by the names that torch.fx gives them."""

MOST_STAGES = 4  # the map before pooling is the last of them

_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


class SplitBackbone(Backbone):
    """A network cut in two at its last global pooling: ``body`` gives the map, ``tail`` pools it and goes on.

    Both hold the network's own modules, and run its code as it was traced, in eval mode.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        tail: fx.GraphModule,
        layout: MapLayout,
        prefix_tokens: int,
        stages: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.cut = 2
        self.body, self.tail = body, tail
        self.prepool_layout, self.prefix_tokens = layout, prefix_tokens
        self._stages = stages

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.body(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.tail(features)
        return pooled.flatten(1)

    def stage_sites(self) -> tuple[Site, ...]:
        return tuple(Site(f"stage{i}", f"body.{name}", "nchw") for i, name in enumerate(self._stages, start=1))


class Truncated(nn.Module):
    """A network whose output is that of one of its modules."""

    def __init__(self, network: nn.Module, end: str) -> None:
        super().__init__()
        self.network, self.end = network, end

    def forward(self, pixels: Tensor) -> Tensor:
        with outputs_of(self.network, {self.end}) as outputs:
            self.network(pixels)
        output: Tensor = outputs[self.end]
        return output


def split_at_pooling(network: nn.Module, example: Tensor) -> SplitBackbone | None:
    """The network cut at its last global pooling; None where there is none or torch.fx cannot follow the network."""
    graph = traced(network, example)
    if graph is None:
        return None
    for node in reversed(graph.nodes):
        if not _pools(node, network):
            continue
        cut, tail = _cut(network, graph, node)
        if tail is None:
            continue  # squeeze-and-excite and the like: what follows needs more than this map
        layout: MapLayout = "nchw" if len(_shape(cut)) == 4 else "nlc"
        picks_token = layout == "nlc" and node.target is operator.getitem
        ends = _stage_ends(graph, cut) if layout == "nchw" else []
        body = _body(network, graph, cut, ends)
        names = tuple(_site_name(network, i) for i in range(len(ends)))
        backbone = SplitBackbone(body, tail, layout, 1 if picks_token else 0, names)
        backbone.note = f"taken apart at {node.name}: its input is the map before pooling"
        return backbone if same_as(network, backbone, example) else None
    return None


def same_as(network: nn.Module, part: nn.Module, example: Tensor) -> bool:
    """Whether traced code gives what the network does of several images: what its code does besides (a call of
    ``train()``, a branch by the size of the batch) leaves no step in the trace.
    """
    images = torch.cat([example, example.flip(-1), example / 2])
    try:
        expected, found = run(network, images), run(part, images)
    except (RuntimeError, ValueError, AssertionError):
        return False
    if not found.is_meta:  # where both are NaN they are alike: the cells will say what is wrong
        found, expected = found.nan_to_num(), expected.nan_to_num()
    return close(found.flatten(1), expected.flatten(1))


def traced(network: nn.Module, example: Tensor, leaves: frozenset[str] = frozenset()) -> fx.Graph | None:
    """The network's graph with the shapes of the example; ``leaves`` are not entered. None where fx cannot trace it."""
    with evaluating(network):
        try:
            graph = _Tracer(leaves).trace(network)
            ShapeProp(fx.GraphModule(network, graph)).propagate(example)
        except Exception:  # noqa: BLE001  # code that needs real tensors can fail in any way on the tracer's
            return None
    return graph


class _Tracer(fx.Tracer):
    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._leaves or super().is_leaf_module(m, module_qualified_name)


def _cut(network: nn.Module, graph: fx.Graph, pooling: fx.Node) -> tuple[fx.Node, fx.GraphModule | None]:
    """The map that a pooling takes, and what follows from it alone: None if that needs anything else.

    A pooling in several steps (means of rows and then columns, a view as locations) begins at the map before them.
    """
    given = _tensor_inputs(pooling)[0]
    before = _map_before(given)
    if before is None or _is_pooling_of_sequence(given, pooling):
        cut = _before_gem(given)
        tail = _tail(network, graph, cut)
        if tail is not None or before is None:
            return cut, tail
    cut = _before_gem(before)
    return cut, _tail(network, graph, cut)


def _is_pooling_of_sequence(given: fx.Node, pooling: fx.Node) -> bool:
    """Whether the channels of what is pooled stand where they are expected: first in a map, last in a sequence."""
    return _pooled_channels(_shape(given), _shape(pooling), last=len(_shape(given)) == 3)


def _map_before(node: fx.Node) -> fx.Node | None:
    """The map (B, D, H, W) of more than one location that mere reshaping and averaging brought to this; else None."""
    while node.target in _RESHAPES or _is_pick(node):
        inputs = _tensor_inputs(node)
        if len(inputs) != 1:
            return None
        node = inputs[0]
    shape = _shape(node)
    return node if len(shape) == 4 and math.prod(shape[2:]) > 1 else None


def _is_pick(node: fx.Node) -> bool:
    """Whether this takes the values of a maximum over one dimension, ``x.max(3)[0]``."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0].target in ("max", torch.max)


def _stage_ends(graph: fx.Graph, cut: fx.Node) -> list[fx.Node]:
    """The last map of each resolution before ``cut`` from which a smaller map is made; the last few of them."""
    ends: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node is cut:
            break
        side = _locations(node)
        if node.op != "placeholder" and any(1 < _locations(user) < side for user in node.users):
            ends[side] = node
    wanted = sorted(side for side in ends if side > _locations(cut))[: MOST_STAGES - 1]
    return [ends[side] for side in reversed(wanted)]


def _locations(node: fx.Node) -> int:
    """H * W of a map; 0 for anything else."""
    shape = _shape(node)
    return math.prod(shape[2:]) if len(shape) == 4 else 0


def _site_name(network: nn.Module, number: int) -> str:
    """A name for the Identity that ends a stage, none of the network's own."""
    name = f"stage{number + 1}_end"
    while hasattr(network, name):
        name += "_"
    return name


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Those inputs that are tensors: sizes (``F.avg_pool2d(x, x.size(3))``) are none."""
    node = node.args[0] if _is_pick(node) else node  # type: ignore[assignment]  # as it checks
    return [used for used in node.all_input_nodes if _shape(used)]


def _before_gem(node: fx.Node) -> fx.Node:
    """The map that goes into a generalised mean: that before the power (and the clamp) which belong to the pooling."""
    if node.target not in ("pow", "pow_", "__pow__", torch.pow, operator.pow):
        return node
    base = _base(node)
    return _base(base) if base.target in ("clamp", "clamp_min", torch.clamp, torch.clamp_min) else base


def _base(node: fx.Node) -> fx.Node:
    """The first input: the tensor that a step is taken on."""
    return node.all_input_nodes[0]


def _pools(node: fx.Node, network: nn.Module) -> bool:
    """Whether this step turns a map (B, D, H, W) or sequence (B, L, D) into one vector, or is an adaptive pooling."""
    inputs = _tensor_inputs(node)
    if len(inputs) != 1 or len(_shape(inputs[0])) not in (3, 4) or not _shape(node):
        return False
    if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), _POOLINGS[:2]):
        return True
    if node.target in _POOLINGS[2:]:
        return True
    before, after = _shape(inputs[0]), _shape(node)
    if _pooled_channels(before, after, last=len(before) == 3):
        return True
    source = _map_before(inputs[0])
    if source is None or len(before) != 3:
        return False
    return _shape(source)[1] == before[1] and _pooled_channels(before, after, last=False)


def _pooled_channels(before: torch.Size, after: torch.Size, *, last: bool) -> bool:
    """Whether ``after`` is one value for each channel of a map or sequence of more than one location."""
    channels = before[-1] if last else before[1]
    locations = before[1:].numel() // max(1, channels)
    return locations > 1 and after[1:].numel() == channels and after[1] == channels


def _shape(node: fx.Node) -> torch.Size:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return shape if isinstance(shape, torch.Size) else torch.Size()


def _body(network: nn.Module, graph: fx.Graph, cut: fx.Node, ends: Sequence[fx.Node] = ()) -> fx.GraphModule:
    """Everything up to ``cut``, with an Identity after each of ``ends`` (see ``_site_name``) to be hooked."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
        if node in ends:
            copies[node] = body.call_module(_site_name(network, ends.index(node)), (copies[node],))
        if node is cut:
            break
    body.output(copies[cut])
    sites = {_site_name(network, i): nn.Identity() for i in range(len(ends))}
    root = _with(network, sites) if sites else network
    return _pruned(fx.GraphModule(root, body))


def _with(network: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module of the same parts with these besides; the network itself stays as it is."""
    root = nn.Module()
    root.__dict__.update(network.__dict__)
    root._modules = {**network._modules, **modules}
    return root


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


def up_to(network: nn.Module, example: Tensor, end: str) -> fx.GraphModule | None:
    """The network up to the output of one of its modules; None where torch.fx cannot follow it."""
    graph = traced(network, example, frozenset({end}))
    node = None if graph is None else _node_of(graph, end)
    body = None if graph is None or node is None else _body(network, graph, node)
    return body if body is not None and same_as(Truncated(network, end), body, example) else None


def cut_at(network: nn.Module, example: Tensor, local: str, end: str | None) -> SplitBackbone:
    """The network cut at the output of ``local``, as far as the output of ``end`` (None: its own)."""
    graph = traced(network, example, frozenset({local, *([] if end is None else [end])}))
    cut = None if graph is None else _node_of(graph, local)
    if graph is None or cut is None or len(_shape(cut)) not in (3, 4):
        raise UsageError(f"torch.fx cannot cut {type(network).__name__} at a map or sequence of {local}; name another")
    if end is not None:
        node = _node_of(graph, end)
        if node is None:
            raise UsageError(f"torch.fx finds no single call of {end}; name another module")
        graph.output(node)
        graph.erase_node(next(n for n in graph.nodes if n.op == "output"))
    tail = _tail(network, graph, cut)
    if tail is None:
        raise UsageError(f"what follows needs more than the output of {local}; name a module further on")
    layout: MapLayout = "nchw" if len(_shape(cut)) == 4 else "nlc"
    backbone = SplitBackbone(_body(network, graph, cut), tail, layout, 0)
    if not same_as(network if end is None else Truncated(network, end), backbone, example):
        raise UsageError(
            f"{type(network).__name__} gives other outputs where torch.fx cuts it at {local}; leave it out"
        )
    backbone.note = f"local representations: {local}" + (f", global: {end}" if end else "") + ", as asked"
    return backbone


def _node_of(graph: fx.Graph, module: str) -> fx.Node | None:
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == module]
    return nodes[0] if len(nodes) == 1 else None

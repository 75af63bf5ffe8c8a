"""Networks of no known family: a traced forward finds the head, and the pooling at which to take the network apart."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.backbone import Backbone, Layout, as_locations

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


@dataclass(frozen=True)
class Cut:
    """Where a caller wants a network cut: the modules whose outputs are the map before pooling and the global."""

    local: str | None = None
    global_: str | None = None

    def __bool__(self) -> bool:
        return self.local is not None or self.global_ is not None


class Truncated(nn.Module):
    """A network whose output is that of one of its modules; for code that cannot be traced."""

    def __init__(self, network: nn.Module, end: str) -> None:
        super().__init__()
        self.network, self.end = network, end

    def forward(self, pixels: Tensor) -> Tensor:
        with outputs_of(self.network, {self.end}) as outputs:
            self.network(pixels)
        output: Tensor = outputs[self.end]
        return output


def generic_backbone(network: nn.Module, example: Tensor, cut: Cut = Cut()) -> tuple[Backbone, bool]:
    """A Backbone around any network that maps pixels to a vector, a map (B, D, H, W) or a sequence (B, L, D).

    A vector's network is cut at its last global pooling where torch.fx can trace it (control flow that depends on
    the input's values or shape defeats it); otherwise the vector is its own only local representation. ``note``
    says which happened. ``cut`` names the places by hand. The second result says whether the global representation
    is what the network returns.
    """
    backbone, whole = _cut_by_hand(network, example, cut) if cut else (_cut_by_itself(network, example), True)
    with evaluating(backbone):
        local, global_ = backbone.represent(example)
    backbone.local_dim, backbone.dim = local.shape[-1], global_.shape[-1]
    return backbone, whole


def _cut_by_itself(network: nn.Module, example: Tensor) -> Backbone:
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
            ended = _up_to(network, example, cut.global_) or ended
        backbone = _cut_by_itself(ended, example)
        backbone.note = f"global representation: {cut.global_}, as asked; {backbone.note}"
        return backbone, whole
    return _cut_at(network, example, cut.local, None if whole else cut.global_), whole


def _same_vector(first: Tensor, second: Tensor) -> bool:
    return first.numel() == second.numel() and torch.equal(first.flatten(1), second.flatten(1))


def _up_to(network: nn.Module, example: Tensor, end: str) -> fx.GraphModule | None:
    """The network up to the output of one of its modules; None where it cannot be traced."""
    graph = traced(network, example, frozenset({end}))
    node = None if graph is None else _node_of(graph, end)
    return None if graph is None or node is None else _body(network, graph, node)


def _cut_at(network: nn.Module, example: Tensor, local: str, end: str | None) -> SplitBackbone:
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
    layout: Layout = "nchw" if len(_shape(cut)) == 4 else "nlc"
    backbone = SplitBackbone(_body(network, graph, cut), tail, layout, 0)
    backbone.note = f"local representations: {local}" + (f", global: {end}" if end else "") + ", as asked"
    return backbone


def _node_of(graph: fx.Graph, module: str) -> fx.Node | None:
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == module]
    return nodes[0] if len(nodes) == 1 else None


@dataclass(frozen=True)
class FoundHead:
    """``modules``: what is to be taken out of the network; ``head``: the linear map they are, None for several.

    ``end``: the name of the head where the network goes on after it, and is to be cut there.
    """

    modules: tuple[nn.Module, ...] = ()
    head: nn.Linear | None = None
    note: str = ""
    end: str | None = None


def find_head(network: nn.Module, example: Tensor) -> FoundHead:
    """The classifier at a network's end, whatever its name: its last Linear or 1x1 convolution in a forward pass.

    It must give the network's output from what the network returns without it (so a convolution before the pooling is
    found as well), or what goes through a softmax or its logarithm to become it. Where the output is the sum or mean of
    the last two (the heads of a distilled network), both are taken out and none is used as the head. Where none is
    found, the output is taken for the representation, and the note says so.
    """
    output = run(network, example)
    calls = _linear_calls(network, example) if output.ndim == 2 else []
    if calls:
        name, module, last = calls[-1]
        head = as_linear(module)
        softmax = {"softmax": last.flatten(1).softmax(1), "log_softmax": last.flatten(1).log_softmax(1)}
        for word, ending in softmax.items() if last.ndim == 2 and not last.is_meta else ():
            if _close(ending, output):
                size = f"{module.in_features} to {module.out_features}"
                note = f"head: {name} ({size}), its {word} left out; representation: what goes into it"
                return FoundHead((module,), head, note, name)
        features = _without(network, (module,), example)
        if head is not None and features is not None and features.shape[1] == head.in_features:
            with torch.no_grad():
                if _close(head(features), output):
                    size = f"{head.in_features} to {head.out_features}"
                    return FoundHead(
                        (module,), head, f"head: {name} ({size}), found last; representation: what goes into it"
                    )
    if len(calls) > 1:
        (first, one, x), (second, other, y) = calls[-2:]
        both = x.flatten(1) + y.flatten(1) if x.numel() == y.numel() == output.numel() else None
        if both is not None and one is not other and (_close(both, output) or _close(both / 2, output)):
            note = (
                f"two heads, {first} and {second}: left out; representation: their inputs' mean or sum as its code has"
            )
            return FoundHead((one, other), None, note)
    if output.ndim != 2:
        return FoundHead()
    note = f"no linear head found: its output ({output.shape[1]} wide) is taken for the representation"
    return FoundHead(note=f"{note}; if it holds logits, name the module before its head with --global")


def _linear_calls(network: nn.Module, example: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Every call of a Linear or 1x1 convolution in one forward pass, in order, with its output."""
    calls: list[tuple[str, nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, _args, output, name=name: calls.append((name, m, output)))
        for name, module in network.named_modules()
        if as_linear(module) is not None
    ]
    try:
        run(network, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _without(network: nn.Module, modules: tuple[nn.Module, ...], example: Tensor) -> Tensor | None:
    """What the network returns where the modules pass their input on; None where it cannot do without."""
    handles = [module.register_forward_hook(lambda _module, args, _output: args[0]) for module in modules]
    try:
        output = run(network, example)
    except (RuntimeError, UsageError, ValueError, AssertionError):
        return None
    finally:
        for handle in handles:
            handle.remove()
    return output if output.ndim == 2 else None


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.is_meta:  # a network without weights as yet: shapes are all there is
        return found.shape == expected.shape
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def as_linear(classifier: nn.Module) -> nn.Linear | None:
    """A classifier as the Linear that it is (a 1x1 convolution over pooled features too); None for anything else."""
    if isinstance(classifier, nn.Linear):
        return classifier
    if not isinstance(classifier, nn.Conv2d) or classifier.kernel_size != (1, 1) or classifier.groups != 1:
        return None
    with torch.device("meta"):  # no weights are drawn
        linear = nn.Linear(classifier.in_channels, classifier.out_channels, bias=False)
    linear.weight = nn.Parameter(classifier.weight.detach().flatten(1))
    linear.bias = classifier.bias  # type: ignore[assignment]  # None where it has none
    return linear


def split_at_pooling(network: nn.Module, example: Tensor) -> SplitBackbone | None:
    """The network cut at its last global pooling, or None where there is none or torch.fx cannot trace the network."""
    graph = traced(network, example)
    if graph is None:
        return None
    for node in reversed(graph.nodes):
        if not _pools(node, network):
            continue
        cut = _before_gem(_tensor_inputs(node)[0])
        tail = _tail(network, graph, cut)
        if tail is None:
            continue  # squeeze-and-excite and the like: what follows needs more than this map
        layout: Layout = "nchw" if len(_shape(cut)) == 4 else "nlc"
        picks_token = layout == "nlc" and node.target is operator.getitem
        backbone = SplitBackbone(_body(network, graph, cut), tail, layout, 1 if picks_token else 0)
        backbone.note = f"taken apart at {node.name}: its input is the map before pooling"
        return backbone
    return None


def traced(network: nn.Module, example: Tensor, leaves: frozenset[str] = frozenset()) -> fx.Graph | None:
    """The network's graph with the shapes of the example; ``leaves`` are not entered. None where fx cannot trace it."""
    with evaluating(network):
        try:
            graph = _Tracer(leaves).trace(network)
        except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError):
            return None  # the network's own code needs real tensors; what else could be wrong shows in the run itself
        ShapeProp(fx.GraphModule(network, graph)).propagate(example)
    return graph


class _Tracer(fx.Tracer):
    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._leaves or super().is_leaf_module(m, module_qualified_name)


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Those inputs that are tensors: sizes (``F.avg_pool2d(x, x.size(3))``) are none."""
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

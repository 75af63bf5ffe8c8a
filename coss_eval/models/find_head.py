"""The classifier at the end of a network of no known family, found in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.hooks import hooked
from coss_eval.models.trial import close, run


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
            if close(ending, output):
                size = f"{module.in_features} to {module.out_features}"
                note = f"head: {name} ({size}), its {word} left out; representation: what goes into it"
                return FoundHead((module,), head, note, name)
        features = _without(network, (module,), example)
        if head is not None and features is not None and features.shape[1] == head.in_features:
            with torch.no_grad():
                if close(head(features), output):
                    size = f"{head.in_features} to {head.out_features}"
                    return FoundHead(
                        (module,), head, f"head: {name} ({size}), found last; representation: what goes into it"
                    )
    if len(calls) > 1:
        (first, one, x), (second, other, y) = calls[-2:]
        both = x.flatten(1) + y.flatten(1) if x.numel() == y.numel() == output.numel() else None
        if both is not None and one is not other and (close(both, output) or close(both / 2, output)):
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
    names = {module: name for name, module in network.named_modules() if as_linear(module) is not None}
    with hooked((module, lambda m, _args, output: calls.append((names[m], m, output))) for module in names):
        run(network, example)
    return calls


def _without(network: nn.Module, modules: tuple[nn.Module, ...], example: Tensor) -> Tensor | None:
    """What the network returns where the modules pass their input on; None where it cannot do without."""
    try:
        with hooked((module, lambda _module, args, _output: args[0]) for module in modules):
            output = run(network, example)
    except (RuntimeError, UsageError, ValueError, AssertionError):
        return None
    return output if output.ndim == 2 else None


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

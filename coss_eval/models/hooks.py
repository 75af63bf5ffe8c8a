"""Every forward hook on a network: set while open, always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site


@contextmanager
def captured(backbone: Backbone, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """While open, each forward pass leaves a copy of every site's output, by name, in the dictionary that it yields.

    A copy, since the next module may work in place.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        outputs[name] = output.clone()

    with ExitStack() as stack:
        for site in sites:
            module = backbone.get_submodule(site.module)
            hook = module.register_forward_hook(lambda _module, _inputs, output, name=site.name: keep(name, output))
            stack.callback(hook.remove)
        yield outputs


def find_site(backbone: Backbone, name: str) -> Site:
    """The site of that name; a UsageError that lists the network's sites where there is none."""
    sites = backbone.sites
    if name not in sites:
        raise UsageError(f"no site {name!r} in this network; it has {', '.join(sites)}")
    return sites[name]


def device_of(backbone: nn.Module) -> torch.device:
    """Where the network's parameters are; the CPU for one without any."""
    return next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))


@contextmanager
def finite_outputs(*modules: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Watch every output of ``modules`` while open; what is yielded says where the first NaN or infinity was.

    A forward pass adds to a flag on the device; only asking for it, None where all was finite, waits for the device.
    """
    first: dict[int, Any] = {}  # the number of the first bad pass by module, 0 where there is none
    passes = dict.fromkeys(range(len(modules)), 0)

    def watch(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):  # while a tracer looks on
                return
            passes[place] += 1
            before = first.get(place, 0)
            bad = ~output.detach().isfinite().all() & (before == 0)
            first[place] = before + passes[place] * bad

        return hook

    def where() -> str | None:
        for place, number in first.items():
            if found := int(number):
                return f"batch {found} of the {passes[place]} that passed through it"
        return None

    handles = [module.register_forward_hook(watch(place)) for place, module in enumerate(modules)]
    try:
        yield where
    finally:
        for handle in handles:
            handle.remove()

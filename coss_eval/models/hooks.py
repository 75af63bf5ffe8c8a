"""Every forward hook on a network: set while open, always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""Called after a module's forward pass with the module, its arguments and its output; it may return another output."""


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Each module with its hook while open."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def replaced(backbone: Backbone, site: Site, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, every forward pass goes on from the site with ``replace`` of its output."""
    with hooked([(backbone.get_submodule(site.module), lambda _module, _args, output: replace(output))]):
        yield


@contextmanager
def captured(backbone: Backbone, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """While open, each forward pass leaves a copy of every site's output, by name, in the dictionary that it yields.

    A copy, since the next module may work in place.
    """
    outputs: dict[str, Tensor] = {}

    def keep(site: Site) -> Hook:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            outputs[site.name] = output.clone()

        return hook

    with hooked((backbone.get_submodule(site.module), keep(site)) for site in sites):
        yield outputs


@contextmanager
def outputs_of(network: nn.Module, names: set[str]) -> Iterator[dict[str, Any]]:
    """The last output of each named module, filled in by the forward passes run inside; no copies."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Hook:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[name] = output

        return hook

    with hooked((module, keep(name)) for name, module in network.named_modules() if name in names):
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

    def watch(place: int) -> Hook:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
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

    with hooked((module, watch(place)) for place, module in enumerate(modules)):
        yield where


@contextmanager
def counted(module: nn.Module, count: Callable[[int], None]) -> Iterator[None]:
    """While open, ``count`` gets the cost of each pass through ``module``: its images, three times with gradients.

    A backward pass costs about as much as two forward ones.
    """

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):  # a tracer's stand-in is none
            count(len(output) * (3 if output.requires_grad else 1))

    with hooked([(module, hook)]):
        yield

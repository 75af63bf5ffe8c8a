"""A network cut by forward hooks, where torch.fx cannot follow its code: at the module whose map is pooled last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.models.backbone import Backbone, Site
from coss_eval.models.hooks import hooked
from coss_eval.models.trial import run

MOST_STAGES = 3  # before the map itself

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean of its ReLU": lambda x: F.relu(x).mean((2, 3)),
    "maximum": lambda x: x.amax((2, 3)),
    "maximum of its ReLU": lambda x: F.relu(x).amax((2, 3)),
}
"""What code does with its last map, without modules for it."""


class _Reached(Exception):
    """Carries a module's output out of a forward pass, whose rest is not needed."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class WatchedBackbone(Backbone):
    """The network's own code as far as the output of ``end``, which ``pooling`` (see _POOLS) makes a vector."""

    def __init__(self, network: nn.Module, end: str, pooling: str, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.cut = 2
        self.network, self._end, self._pooling, self._stages = network, end, pooling, stages
        self.note = (
            f"torch.fx finds no pooling in its code, forward hooks do: {end} gives the map before pooling, whose "
            f"{pooling} is the global representation"
        )

    def features(self, pixels: Tensor) -> Tensor:
        try:
            with hooked([(self.network.get_submodule(self._end), _leave)]):
                self.network(pixels)
        except _Reached as reached:
            return reached.output
        raise RuntimeError(f"{self._end} did not run")

    def pool(self, features: Tensor) -> Tensor:
        return _POOLS[self._pooling](features)

    def stage_sites(self) -> tuple[Site, ...]:
        return tuple(Site(f"stage{i}", f"network.{name}", "nchw") for i, name in enumerate(self._stages, start=1))


def _leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> NoReturn:
    raise _Reached(output)


def split_by_hooks(network: nn.Module, example: Tensor) -> WatchedBackbone | None:
    """The network cut at the last module whose map gives its output by one of the usual poolings; None without one."""
    maps, output = _maps(network, example)
    if output.is_meta:
        return None
    for name in reversed(maps):
        for pooling, pool in _POOLS.items():
            pooled = pool(maps[name])
            if pooled.shape == output.shape and torch.allclose(pooled, output, rtol=1e-4, atol=1e-5):
                return WatchedBackbone(network, name, pooling, _stages(maps, maps[name]))
    return None


def _maps(network: nn.Module, example: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every map (B, D, H, W) that a module gives in its one call, in the order in which they are finished."""
    calls: Counter[str] = Counter()
    maps: dict[str, Tensor] = {}
    names = {module: name for name, module in network.named_modules() if name}

    def keep(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        calls[names[module]] += 1
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            maps[names[module]] = output.clone()  # the next module may work in place

    with hooked((module, keep) for module in names):
        output = run(network, example)
    return {name: found for name, found in maps.items() if calls[name] == 1}, output


def _stages(maps: dict[str, Tensor], last: Tensor) -> tuple[str, ...]:
    """The last finished module of each resolution above that of the last map; the last few of them."""
    ends = {found.shape[2:].numel(): name for name, found in maps.items()}
    sides = sorted(side for side in ends if side > last.shape[2:].numel())[:MOST_STAGES]
    return tuple(ends[side] for side in reversed(sides))

"""Optimisers, schedules and the moving average of the target network, without a synchronisation in any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from coss_eval.errors import UsageError, unknown_name


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You, Gitman and Ginsburg 2017, arXiv 1708.03888).

    For each adapted parameter the step is lr * trust * ||w|| / ||g + weight_decay w||, or lr where either norm is
    zero: the form of BYOL's and MoCo v3's code (the paper divides by ||g|| + weight_decay ||w||). ``clip`` bounds that
    ratio at 1 (LARC). Groups with ``adapt`` False (biases and normalisation) are plain SGD.
    All arithmetic is over lists of tensors, and the norms stay on the device.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "clip": clip}
        super().__init__(params, defaults | {"adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise UsageError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = _decayed(params, group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(steps, _trust_ratios(params, steps, group))
            buffers = [self._buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _decayed(params: list[Tensor], weight_decay: float) -> list[Tensor]:
    grads = [p.grad for p in params if p.grad is not None]
    return list(torch._foreach_add(grads, params, alpha=weight_decay))


def _trust_ratios(params: list[Tensor], steps: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """One scalar tensor a parameter; 1 where a norm is zero, as for weights that start at zero."""
    norms, step_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, steps))
    ratios = group["trust"] * norms / step_norms
    if group["clip"]:
        ratios = (ratios / group["lr"]).clamp(max=1.0)
    return list(torch.where((norms > 0) & (step_norms > 0), ratios, 1.0).unbind())


def parameter_groups(
    module: nn.Module, weight_decay: float, *, constant: Iterable[nn.Module] = (), vector_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Kernels and matrices with decay and adaptation; biases, normalisation and other vectors with neither.

    Parameters of ``constant`` keep their learning rate at its peak (SimSiam's predictors); that of vectors is scaled
    by ``vector_scale`` (Barlow Twins' biases). ``set_lr`` follows both. Frozen parameters are left out.
    """
    steady = {id(p) for part in constant for p in part.parameters()}
    groups = []
    for is_constant in (False, True):
        params = [p for p in module.parameters() if p.requires_grad and (id(p) in steady) == is_constant]
        for matrices in (True, False):
            chosen = [p for p in params if (p.ndim > 1) == matrices]
            groups.append(
                {
                    "params": chosen,
                    "weight_decay": weight_decay if matrices else 0.0,
                    "adapt": matrices,
                    "constant": is_constant,
                    "scale": 1.0 if matrices else vector_scale,
                }
            )
    return [group for group in groups if group["params"]]


def set_lr(optimizer: Optimizer, lr: float, peak: float) -> None:
    """The schedule's learning rate in every group, or its peak in the constant ones."""
    for group in optimizer.param_groups:
        group["lr"] = (peak if group["constant"] else lr) * group["scale"]


def make_optimizer(name: str, groups: list[dict[str, Any]], *, lr: float, **options: Any) -> Optimizer:
    """The optimiser "lars", "sgd" or "adamw" over ``parameter_groups``."""
    if name == "lars":
        return LARS(groups, lr=lr, **options)
    if name == "sgd":
        return SGD(groups, lr=lr, **{"momentum": 0.9, "foreach": True} | options)
    if name == "adamw":
        return AdamW(groups, lr=lr, **{"foreach": True} | options)
    raise unknown_name("optimiser", name, ["lars", "sgd", "adamw"])


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1 along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warm_up_cosine(peak: float, step: int, *, warm_up: int, total: int) -> float:
    """Learning rate at ``step``: linear from 0 to ``peak`` over ``warm_up`` steps, then a cosine to 0."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return cosine(peak, 0.0, (step - warm_up) / max(1, total - warm_up))


@torch.no_grad()
def ema_update(target: list[Tensor], online: list[Tensor], tau: float) -> None:
    """target = tau target + (1 - tau) online, in place, over parameters only: buffers are the target's own."""
    torch._foreach_lerp_(target, online, 1 - tau)

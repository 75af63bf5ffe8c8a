"""The passes of a step, small images' views included, as a CUDA graph: captured once, replayed with other images.

A step of a small network is some 2,500 launches, and a CPU takes longer over them than the GPU over their work; a
replay is one. What is captured is frozen: shapes, control flow, and every number that Python held. So schedules, the
optimiser and the moving average stay outside, comparisons keep their state in buffers, and code from outside the
package runs as it is written (``refusal``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coss_eval.runtime.processes import world_size
from coss_eval.training.config import Config

Passes = Callable[[Sequence[Tensor]], Tensor]
WARM_UP = 3  # steps before the capture: libraries choose their kernels, torch.compile compiles


def refusal(config: Config, device: torch.device) -> str | None:
    """Why the passes of this run cannot be captured; None where they can."""
    if device.type != "cuda":
        return "graphs are CUDA's"
    if world_size() > 1 or config.accumulate > 1:
        return "gradients of several processes or micro-batches are summed"
    if config.local is not None and config.local.sampling == "subset":
        return "locals are drawn anew in each step"
    if ":" in config.method or ":" in config.arch.removeprefix("torchvision:").removeprefix("timm:"):
        return "what code from outside decides in Python would be frozen"
    return None


class GraphedPasses:
    """``passes`` of some tensors to losses, with gradients in every parameter's ``grad``, as if it were called.

    The first WARM_UP calls call it, the next one captures it; from then on the tensors are copied into those of the
    capture, which is replayed. ``passes`` must do the same in every call. Where it cannot be captured it is called for
    good, ``failed`` says why, and so does ``on_note``.
    """

    def __init__(self, module: nn.Module, device: torch.device, on_note: Callable[[str], None] | None = None) -> None:
        self.on_note, self.failed = on_note, ""
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, passes: Passes, inputs: Sequence[Tensor]) -> Tensor:
        self._calls += 1
        if self._graph is None and (self.failed or self._calls <= WARM_UP or not self._captured(passes, inputs)):
            return self._aside(passes, inputs)
        return self._replayed(inputs)

    def _aside(self, passes: Passes, inputs: Sequence[Tensor]) -> Tensor:
        """The call on the stream of the capture, as what is captured must have run there."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            losses = passes(inputs)
        current.wait_stream(self.stream)
        return losses

    def _captured(self, passes: Passes, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph could be made; its inputs are copies, overwritten before each replay."""
        self._inputs = [tensor.clone() for tensor in inputs]
        self._clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._losses = passes(self._inputs)
        except RuntimeError as error:
            self.failed = (str(error).splitlines() or [type(error).__name__])[0]
            self._clear()
            if self.on_note is not None:
                self.on_note(f"steps are not captured as a CUDA graph, and may be slower: {self.failed}")
            return False
        self._graph, self._gradients = graph, [parameter.grad for parameter in self.parameters]
        return True

    def _replayed(self, inputs: Sequence[Tensor]) -> Tensor:
        assert self._graph is not None
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._losses.clone()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

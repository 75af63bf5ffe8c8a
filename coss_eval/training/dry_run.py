"""What a run would cost, from two real steps: parameters, FLOPs, memory, images a second, time."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from coss_eval.data.dataset import Dataset
from coss_eval.runtime.device import exact_float32
from coss_eval.runtime.processes import process_group
from coss_eval.statistics import median_interval
from coss_eval.training.config import Config
from coss_eval.training.feed import BatchPart
from coss_eval.training.graph import WARM_UP
from coss_eval.training.loop import Trainer, random_layers
from coss_eval.training.pretraining import Pretraining


@dataclass(frozen=True)
class Cost:
    """Measured on two steps; FLOPs count multiplications and additions, of all views of one image."""

    parameters: int  # trained ones
    parameters_target: int
    forward: float  # FLOPs an image, online network and heads
    backward: float
    target: float
    peak_memory: int  # bytes: of the GPU, else of the whole process
    images_per_second: float
    steps: int
    seconds: float  # of the whole run, probes and checkpoints left out

    @property
    def flops(self) -> float:
        """FLOPs an image of a step, all three together."""
        return self.forward + self.backward + self.target

    def lines(self) -> list[str]:
        """For a terminal."""
        giga, hours = 1e9, self.seconds / 3600
        return [
            f"parameters  {self.parameters / 1e6:.2f} M trained, {self.parameters_target / 1e6:.2f} M in the target",
            f"GFLOPs      an image: forward {self.forward / giga:.2f}, backward {self.backward / giga:.2f}, target "
            f"{self.target / giga:.2f}",
            f"memory      {self.peak_memory / 2**30:.2f} GiB at its peak",
            f"speed       {self.images_per_second:,.0f} images/s, so {hours:.2f} h for {self.steps:,} steps",
        ]


def dry_run(config: Config, data: Dataset, *, device: str | torch.device = "auto", steps: int = 1) -> Cost:
    """A first step and ``steps`` timed ones of the run that ``train_config`` would do; nothing is written."""
    with process_group(device) as own, exact_float32(), random_layers(config.seed, 0, own):
        run = Trainer(config, data, Path(), own)
        batches = run.setup.feed.epoch(0)
        first = next(batches)
        forward, backward, target = _flops(run, first)
        if own.type == "cuda":
            torch.cuda.reset_peak_memory_stats(own)
        _warm_up(run, first)
        _wait(own)
        started = time.perf_counter()
        for _ in range(steps):
            run.take_step(next(batches, first))
        _wait(own)
        rate = steps * config.batch_size / (time.perf_counter() - started)
    trained = [p.numel() for p in run.objective.parameters() if p.requires_grad]
    kept = [p.numel() for p in run.objective.parameters() if not p.requires_grad]
    total = run.setup.total
    return Cost(
        parameters=sum(trained),
        parameters_target=sum(kept),
        forward=forward,
        backward=backward,
        target=target,
        peak_memory=_peak_memory(own),
        images_per_second=rate,
        steps=total,
        seconds=total * config.batch_size / rate,
    )


@dataclass(frozen=True)
class Relative:
    """What an image costs, as multiples of another run's: seconds (median over pairs of steps, interval) and FLOPs."""

    seconds: float
    low: float
    high: float
    flops: float

    def epochs(self, plain: int) -> int:
        """The whole number of epochs that takes the time of ``plain`` epochs of the other run, at least one."""
        return max(1, round(plain / self.seconds))


def relative_cost(
    config: Config, plain: Config, data: Dataset, *, pairs: int = 10, device: str | torch.device = "auto"
) -> Relative:
    """The measured cost of an image under ``config`` over that under ``plain``: views, networks, losses, optimiser.

    Steps of the two are timed in turn, so that whatever else the machine does meets both alike, and with one thread in
    the process's own seconds. Both runs are in memory at once.
    """
    with process_group(device) as own, exact_float32(), random_layers(config.seed, 0, own):
        runs = [Trainer(each, data, Path(), own) for each in (config, plain)]
        batches = [run.setup.feed.epoch(0) for run in runs]
        firsts = [next(each) for each in batches]
        flops = [sum(_flops(run, first)) for run, first in zip(runs, firsts, strict=True)]
        for run, first in zip(runs, firsts, strict=True):
            _warm_up(run, first)
        ratios = []
        for _ in range(pairs):
            taken = [_seconds_an_image(*each, own) for each in zip(runs, batches, firsts, strict=True)]
            ratios.append(taken[0] / taken[1])
    seconds, low, high = median_interval(ratios)
    return Relative(seconds, low, high, flops[0] / flops[1])


def _warm_up(run: Trainer, first: BatchPart) -> None:
    """The steps that are not like those after them: the first one, and all up to a capture."""
    for _ in range(1 if run.graphed is None else WARM_UP + 1):
        run.take_step(first)


def _seconds_an_image(run: Trainer, batches: Iterator[BatchPart], first: BatchPart, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    batch = next(batches, first)
    _wait(device)
    started = clock()
    run.take_step(batch)
    _wait(device)
    return (clock() - started) / run.config.batch_size


def _flops(run: Trainer, batch: BatchPart) -> tuple[float, float, float]:
    """FLOPs an image of the online forward pass, the backward pass and the target network, from four images."""
    few = BatchPart([pixels[:4] for pixels in batch.pixels], batch.labels[:4], batch.ids[:4])
    objective: Pretraining = run.objective
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    views, labels = run.setup.views_of(few, 0), few.labels.to(run.device)
    full = len(run.setup.views.full)
    with FlopCounterMode(display=False) as target:
        if objective.target is not None:
            objective.targets(views[:full], [], [])
    with FlopCounterMode(display=False) as forward:
        losses = objective(views, labels, full=full, ids=few.ids)
    with FlopCounterMode(display=False) as backward:
        losses.total.backward()
    for parameter in objective.parameters():
        parameter.grad = None
    objective.after_step(0.0)
    objective.load_state_dict(state)
    n, own = len(few.ids), target.get_total_flops()
    return (forward.get_total_flops() - own) / n, backward.get_total_flops() / n, own / n


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024

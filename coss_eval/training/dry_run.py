"""What a run would cost, from two real steps: parameters, FLOPs, memory, images a second, time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coss_eval.data.dataset import Dataset
from coss_eval.runtime.device import exact_float32
from coss_eval.runtime.memory import bytes_for_gradients, most_resident
from coss_eval.runtime.processes import process_group, world_size
from coss_eval.statistics import median_interval
from coss_eval.training.config import Config
from coss_eval.training.feed import BatchPart, Feed
from coss_eval.training.graph import WARM_UP
from coss_eval.training.loop import Trainer, memory_told, random_layers
from coss_eval.training.pretraining import Pretraining

FEW = 2**28  # bytes that the step of a dry run on the CPU may take beside the networks


@dataclass(frozen=True)
class Cost:
    """Measured on two steps; FLOPs count multiplications and additions, of all views of one image.

    Where a process took ``images`` of its share of a batch only, memory and time are computed from what those took.
    """

    parameters: int  # trained ones
    parameters_target: int
    forward: float  # FLOPs an image, online network and heads
    backward: float
    target: float
    peak_memory: int  # bytes: of the GPU, else of the whole process
    images_per_second: float
    steps: int
    seconds: float  # of the whole run, probes and checkpoints left out
    images: int | None = None  # at a time; None for a process's whole share of a batch

    @property
    def flops(self) -> float:
        """FLOPs an image of a step, all three together."""
        return self.forward + self.backward + self.target

    def lines(self) -> list[str]:
        """For a terminal."""
        giga, hours = 1e9, self.seconds / 3600
        speed = f"{self.images_per_second:,.{0 if self.images_per_second >= 10 else 2}f}"
        about, by = ("", "") if self.images is None else ("about ", f" (by steps of {self.images} images)")
        return [
            f"parameters  {self.parameters / 1e6:.2f} M trained, {self.parameters_target / 1e6:.2f} M in the target",
            f"GFLOPs      an image: forward {self.forward / giga:.2f}, backward {self.backward / giga:.2f}, target "
            f"{self.target / giga:.2f}",
            f"memory      {about}{self.peak_memory / 2**30:.2f} GiB at its peak{by}",
            f"speed       {about}{speed} images/s, so {hours:.2f} h for {self.steps:,} steps",
        ]


def dry_run(
    config: Config, data: Dataset, *, device: str | torch.device = "auto", steps: int = 1, within: int | None = None
) -> Cost:
    """A first step and ``steps`` timed ones of the run that ``train_config`` would do; nothing is written.

    ``within``: bytes that a step on the CPU may take beside the networks. Of a larger one, fewer images are taken.
    """
    with process_group(device) as own, memory_told(config), exact_float32(), random_layers(config.seed, 0, own):
        run = Trainer(config, data, Path(), own)
        micro, an_image = run.setup.feed.share // config.accumulate, 0
        images = micro
        if within is not None and own.type == "cpu":
            an_image = _bytes_an_image(run)
            images = max(2, min(micro, within // an_image))
        whole = images == micro
        batches = (run.setup.feed if whole else _smaller(run, images)).epoch(0)
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
        taken = config.batch_size if whole else images * world_size()
        rate = steps * taken / (time.perf_counter() - started)
    trained = [p.numel() for p in run.objective.parameters() if p.requires_grad]
    kept = [p.numel() for p in run.objective.parameters() if not p.requires_grad]
    total = run.setup.total
    return Cost(
        parameters=sum(trained),
        parameters_target=sum(kept),
        forward=forward,
        backward=backward,
        target=target,
        peak_memory=_peak_memory(own) + (0 if whole else (micro - images) * an_image + _bytes_of_batches(run)),
        images_per_second=rate,
        steps=total,
        seconds=total * config.batch_size / rate,
        images=None if whole else images,
    )


def _smaller(run: Trainer, images: int) -> Feed:
    """A feed of ``images`` a step and process; the run takes them at once."""
    run.config = replace(run.config, accumulate=1)
    setup = run.setup
    return Feed(setup.fit, images * world_size(), run.device, seed=run.config.seed, views=setup.views)


def _bytes_an_image(run: Trainer) -> int:
    """What a step takes for each image of a micro-batch: all that the forward pass keeps for the gradients."""
    feed, full = Feed(run.setup.fit, 2 * world_size(), run.device, seed=0, views=run.setup.views), run.setup.views.full
    pair = next(feed.epoch(0))
    before = {name: value.clone() for name, value in run.objective.named_buffers()}
    views, labels = run.setup.views_of(pair, 0), pair.labels.to(run.device)
    kept = bytes_for_gradients(lambda: run.objective(views, labels, full=len(full), ids=pair.ids))
    _put_back(run.objective, before)
    return max(1, kept // len(pair.ids))


def _bytes_of_batches(run: Trainer) -> int:
    """The images of three batches: the one in use, the next one, and the one that workers are at."""
    sides = [view.size for view in run.setup.views] if run.setup.feed.from_files else []
    return 3 * run.setup.feed.share * sum(3 * side * side for side in sides)


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
    before = {name: value.clone() for name, value in objective.named_buffers()}
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
    _put_back(objective, before)
    n, own = len(few.ids), target.get_total_flops()
    return (forward.get_total_flops() - own) / n, backward.get_total_flops() / n, own / n


def _put_back(objective: Pretraining, buffers: Mapping[str, Tensor]) -> None:
    """Running statistics and centres as they were."""
    for name, value in buffers.items():
        objective.get_buffer(name).copy_(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return most_resident()

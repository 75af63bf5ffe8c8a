"""The one loop of all attacks: a rising list of eps, in which an image is attacked until it breaks, and no longer.

Every image makes its own way: attempt after attempt (restarts, losses) at one eps, then the next eps, until it is
broken or has withstood the largest. When it is done the next waiting image takes its place, so the batch is full as
long as there are images to fill it, and it is never empty. What an image meets depends on its own id only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from coss_eval.attacks.attack import Memory, Stepwise, View
from coss_eval.attacks.inputs import device_of, not_differentiable
from coss_eval.attacks.losses import Objective, Reading
from coss_eval.attacks.seeds import condition, image_keys


@dataclass(frozen=True)
class Schedule:
    """The eps to rise through and the attempts at each: every restart once with each loss.

    ``seed`` and ``place`` (the norm) fix the random numbers, together with eps and restart.
    """

    eps: tuple[float, ...]
    restarts: int
    losses: int
    seed: int
    place: str
    batch_size: int

    @property
    def attempts(self) -> int:
        return self.restarts * self.losses

    @property
    def first_level(self) -> int:
        """eps = 0 leaves the clean image, of which the verdict is known."""
        return int(self.eps[0] == 0)

    def conditions(self) -> list[list[int]]:
        """What names the random numbers, (E, attempts); the losses of one restart share theirs."""
        return [
            [condition(self.seed, self.place, e, attempt // self.losses) for attempt in range(self.attempts)]
            for e in self.eps
        ]


@dataclass(frozen=True)
class Findings:
    """What a sweep found of N images; tensors on the images' device."""

    withstood: Tensor  # int64 (N,), how many eps, from the smallest, each image withstood
    margin: Tensor  # float32 (E, N), the lowest margin up to each eps
    best: Tensor  # float32 (N, 3, H, W), the pixels of the lowest margin of all
    zero_gradients: float | None  # share of gradients that were exactly zero; None without gradients


@dataclass
class _Flight:
    """The images under attack, one row each, on the network's device."""

    row: Tensor  # int64 (B,), which image
    level: Tensor  # int64 (B,), which eps
    attempt: Tensor  # int64 (B,)
    step: Tensor  # int64 (B,)
    clean: Tensor
    pixels: Tensor
    best: Tensor
    best_margin: Tensor  # float32 (B,)
    eps: Tensor  # float32 (B, 1, 1, 1)
    keys: Tensor  # int64 (B,)
    memory: Memory

    def take(self, at: Tensor) -> _Flight:
        """These rows only."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "memory"}
        memory = {name: value[at] for name, value in self.memory.items()}
        return _Flight(**{name: value[at] for name, value in values.items()}, memory=memory)

    def put(self, at: Tensor, part: _Flight) -> None:
        """Overwrite these rows."""
        for f in fields(self):
            if f.name != "memory":
                getattr(self, f.name)[at] = getattr(part, f.name)
        for name, value in self.memory.items():
            value[at] = part.memory[name]


class RisingEps:
    """An attack on images float32 (N, 3, H, W) with ids int64 (N,), which may lie on another device than the network.

    The network must be in evaluation mode with gradients enabled (inputs.held_still).
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        ids: Tensor,
        objective: Objective,
        attack: Stepwise,
        schedule: Schedule,
    ) -> None:
        self.network, self.objective, self.attack, self.schedule = network, objective, attack, schedule
        self.images, self.device = images, device_of(network, images)
        device = self.device
        self.ids = ids.to(device)
        self.eps = torch.tensor(schedule.eps, dtype=torch.float32, device=device)
        self.conditions = torch.tensor(schedule.conditions(), dtype=torch.int64, device=device)
        plain = images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last)
        self.layout = torch.contiguous_format if plain else torch.channels_last

    def run(self, rows: Tensor, margin: Tensor) -> Findings:
        """Attack the images numbered ``rows`` (n,); margin (N,) is every image's margin without an attack.

        Raises UsageError where the pixels get no gradient.
        """
        levels, count = len(self.eps), len(self.images)
        rows = rows.to(self.device, copy=True)  # the flight writes into it
        self.clean_margin = margin.to(self.device)
        self.withstood = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.withstood[rows] = self.schedule.first_level
        self.margin = self.clean_margin.new_full((levels, count), torch.inf)
        self.best = self.images.clone()
        self.zero_gradients = torch.zeros((), dtype=torch.int64, device=self.device)
        self.gradients = 0
        if self.schedule.first_level < levels and len(rows):
            self._fly(rows)
        zero = float(self.zero_gradients) / self.gradients if self.gradients else None
        lowest = torch.minimum(self.margin.cummin(0).values, self.clean_margin)
        home = self.images.device
        return Findings(self.withstood.to(home), lowest.to(home), self.best, zero)

    def _fly(self, waiting: Tensor) -> None:
        flight = self._board(waiting[: self.schedule.batch_size])
        waiting = waiting[self.schedule.batch_size :]
        while len(flight.row):
            reading, gradient = self._look(flight)
            self._note_best(flight, reading)
            ended = (reading.broken | (flight.step == self.attack.steps)).nonzero().flatten()
            if len(ended) < len(flight.row):
                self._advance(flight, reading, gradient)
            if len(ended):
                done = self._settle(flight, ended, reading.broken[ended])
                boarding, waiting = waiting[: len(done)], waiting[len(done) :]
                if len(boarding):
                    flight.put(done[: len(boarding)], self._board(boarding))
                if len(boarding) < len(done):
                    stays = torch.ones_like(flight.row, dtype=torch.bool)
                    stays[done[len(boarding) :]] = False
                    flight = flight.take(stays)

    def _board(self, rows: Tensor) -> _Flight:
        """Images at the beginning of their way."""
        clean = self.images[rows.to(self.images.device)].to(self.device).contiguous(memory_format=self.layout)
        level = torch.full_like(rows, self.schedule.first_level)
        return self._begin(rows, level, torch.zeros_like(rows), clean, clean.clone(), self.clean_margin[rows])

    def _begin(
        self, row: Tensor, level: Tensor, attempt: Tensor, clean: Tensor, best: Tensor, best_margin: Tensor
    ) -> _Flight:
        """Images at the beginning of an attempt."""
        eps = self.eps[level].view(-1, 1, 1, 1)
        keys = image_keys(self.ids[row], self.conditions[level, attempt])
        pixels = self.attack.start(clean, eps, keys)
        memory = self.attack.memory(pixels, eps)
        step = torch.zeros_like(row)
        return _Flight(row, level, attempt, step, clean, pixels, best, best_margin, eps, keys, memory)

    def _look(self, flight: _Flight) -> tuple[Reading, Tensor]:
        """What the network says, and the gradient for pixels; empty where no image needs it."""
        climbing = self.attack.uses_gradient and bool((flight.step < self.attack.steps).any())
        pixels = flight.pixels.detach().requires_grad_(climbing)
        with torch.set_grad_enabled(climbing):
            reading = self.objective(pixels, flight.row, flight.attempt)
        if not climbing:
            return reading, pixels.new_empty(0)
        gradient = None
        if reading.loss.requires_grad:
            (gradient,) = torch.autograd.grad(reading.loss.sum(), pixels, allow_unused=True)
        if gradient is None:
            raise not_differentiable(self.network, flight.pixels[:1])
        gradient = gradient.nan_to_num()
        self.gradients += len(gradient)
        self.zero_gradients += (torch.linalg.vector_norm(gradient, torch.inf, dim=(1, 2, 3)) == 0).sum()
        return reading._replace(loss=reading.loss.detach()), gradient

    @staticmethod
    def _note_best(flight: _Flight, reading: Reading) -> None:
        closer = (reading.margin < flight.best_margin) | reading.broken
        flight.best = torch.where(closer.view(-1, 1, 1, 1), flight.pixels, flight.best)
        flight.best_margin = torch.where(closer, reading.margin, flight.best_margin)

    def _advance(self, flight: _Flight, reading: Reading, gradient: Tensor) -> None:
        view = View(
            flight.clean, flight.pixels, flight.eps, flight.keys, flight.step, reading.loss, reading.margin, gradient
        )
        flight.pixels = self.attack.advance(view, flight.memory)
        flight.step = flight.step + 1

    def _settle(self, flight: _Flight, ended: Tensor, broken: Tensor) -> Tensor:
        """Write down what ended attempts (n,) showed and begin the next ones; returns the rows whose image is done."""
        part = flight.take(ended)
        attempt = part.attempt + 1
        settled = broken | (attempt == self.schedule.attempts)  # the verdict at this eps is known
        self.margin[part.level[settled], part.row[settled]] = part.best_margin[settled]
        level = part.level + (settled & ~broken)
        attempt = torch.where(settled, 0, attempt)

        done = broken | (level == len(self.eps))
        self.withstood[part.row[done]] = level[done]
        self.best[part.row[done].to(self.best.device)] = part.best[done].to(self.best.device)
        if not done.all():
            on = part.take(~done)
            begun = self._begin(on.row, level[~done], attempt[~done], on.clean, on.best, on.best_margin)
            flight.put(ended[~done], begun)
        return ended[done]

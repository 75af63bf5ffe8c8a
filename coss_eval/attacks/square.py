"""Square attack (Andriushchenko et al. 2020, algorithms 1 and 2): random search in the L-infinity ball.

It needs no gradient, so a network that hides its gradients does not hide from it: where it beats PGD, PGD's numbers
are not to be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from coss_eval.attacks.attack import Memory, Stepwise, View, attack
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the square's area, for 10,000 steps


@attack
@dataclass(frozen=True, kw_only=True)
class Square(Stepwise):
    """Paint a random square with +-eps a channel; keep it where the margin falls (Andriushchenko et al. 2020).

    ``steps`` are queries of the network; ``share`` of the pixels are painted at first.
    """

    name = "square"
    about = "random search without gradients (Andriushchenko et al. 2020)"
    norms = ("linf",)
    cost = 1
    uses_gradient = False
    iterated = False

    steps: int = 500
    restarts: int = 1
    share: float = 0.8

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        """Vertical stripes of +-eps."""
        from coss_eval.randomness import uniform

        channels, _, width = clean.shape[1:]
        stripes = _signs(uniform(keys, "stripes", shape=(channels, 1, width)))
        return (clean + stripes * eps).clamp_(0, 1)

    def memory(self, pixels: Tensor, eps: Tensor) -> Memory:
        return {"best": pixels.clone(), "best_margin": pixels.new_full((len(pixels),), torch.inf)}

    def advance(self, view: View, memory: Memory) -> Tensor:
        from coss_eval.attacks.seeds import image_keys
        from coss_eval.randomness import uniform

        better = view.margin < memory["best_margin"]
        memory["best_margin"] = torch.where(better, view.margin, memory["best_margin"])
        memory["best"] = torch.where(better.view(-1, 1, 1, 1), view.pixels, memory["best"])

        count, channels, height, width = view.clean.shape
        device = view.step.device
        conditions = torch.tensor(_conditions(self.steps), device=device)[view.step]
        numbers = uniform(image_keys(view.keys, conditions), "square", shape=(channels + 2,))
        side = torch.tensor(sides(self.steps, self.share, height, width), device=device)[view.step]
        rows = _window(numbers[:, 0], side, height).view(count, 1, height, 1)
        columns = _window(numbers[:, 1], side, width).view(count, 1, 1, width)
        colour = _signs(numbers[:, 2:]).view(count, channels, 1, 1)
        return torch.where(rows & columns, (view.clean + colour * view.eps).clamp(0, 1), memory["best"])


@lru_cache
def sides(steps: int, share: float, height: int, width: int) -> tuple[int, ...]:
    """The square's side at each of ``steps`` + 1 steps."""
    areas = [share * 0.5 ** sum(step * 10_000 > limit * steps for limit in _HALVINGS) for step in range(steps + 1)]
    return tuple(min(max(round((area * height * width) ** 0.5), 1), height, width) for area in areas)


@lru_cache
def _conditions(steps: int) -> tuple[int, ...]:
    """What names each step's random numbers."""
    from coss_eval.attacks.seeds import condition

    return tuple(condition(step) for step in range(steps + 1))


def _signs(numbers: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to -1 or 1."""
    return (numbers < 0.5) * 2.0 - 1.0


def _window(number: Tensor, side: Tensor, length: int) -> Tensor:
    """bool (B, length): a stretch of ``side`` pixels at a place given by a number in [0, 1)."""
    first = (number * (length - side + 1)).long()[:, None]
    place = torch.arange(length, device=number.device)
    return (place >= first) & (place < first + side[:, None])

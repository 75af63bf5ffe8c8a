"""The reference's own draws, recorded and replayed to the native engine, so that only the arithmetic can differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coss_eval.corruptions.draws import Draws
from coss_eval.corruptions.reference import run_published
from coss_eval.corruptions.registry import CORRUPTIONS


class Recorder:
    """Stands for np.random in the published code: draws from a seeded generator and keeps every call and result."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self.calls: list[tuple[dict[str, Any], np.ndarray]] = []

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def draw(*args: Any, **options: Any) -> Any:
            result = getattr(self._random, method)(*args, **options)
            named = dict(zip(("low", "high"), args, strict=False))
            self.calls.append(({**named, **options}, np.asarray(result)))
            return result

        return draw


class Scripted(Draws):
    """Draws that return prepared fields in order; their shapes must be those that are asked for."""

    def __init__(self, *fields: Tensor) -> None:
        self._fields = list(fields)

    def _next(self, *shape: int) -> Tensor:
        field = self._fields.pop(0)
        assert field.shape == (1, *shape)
        return field.clone()

    def normal(self, *shape: int) -> Tensor:
        return self._next(*shape).float()

    def uniform(self, *shape: int) -> Tensor:
        return self._next(*shape).float()

    def signed(self, *shape: int) -> Tensor:
        return (2 * self._next(*shape) - 1).float()

    def integers(self, high: int, *shape: int) -> Tensor:
        field = self._next(*shape)
        assert 0 <= int(field.min()) <= int(field.max()) < high
        return field.long()


def reference_and_draws(image: np.ndarray, name: str, severity: int, seed: int) -> tuple[np.ndarray, Scripted]:
    """imagecorruptions' result on an (H, W, 3) image, and the draws that it used in the native engine's terms."""
    recorder = Recorder(seed)
    result = run_published(image, name, severity, recorder, np.random.default_rng(seed))
    height, width = image.shape[:2]
    convert = _CONVERT.get(name)
    fields = convert(recorder.calls, height, width, severity, seed) if convert else []
    return result, Scripted(*[torch.as_tensor(field)[None] for field in fields])


def _standardised(calls: list[Any], *_: Any) -> list[np.ndarray]:
    options, values = calls[0]
    field = (values - options.get("loc", 0)) / options["scale"]
    return [field.transpose(2, 0, 1) if field.ndim == 3 else field]


def _unit(call: tuple[dict[str, Any], np.ndarray]) -> np.ndarray:
    options, values = call
    return (values - options["low"]) / (options["high"] - options["low"])


def _impulse(calls: list[Any], height: int, width: int, severity: int, seed: int) -> list[np.ndarray]:
    grey = np.full((height, width, 3), 100, np.uint8)
    outcome = run_published(grey, "impulse_noise", severity, None, np.random.default_rng(seed))
    (amount,) = CORRUPTIONS["impulse_noise"].parameters(severity, "imagenet")
    field = np.select([outcome == 255, outcome == 0], [amount / 4, amount * 3 / 4], 1.0)
    return [field.transpose(2, 0, 1)]


def _glass(calls: list[Any], height: int, width: int, severity: int, seed: int) -> list[np.ndarray]:
    _, reach, iterations = (int(value) for value in CORRUPTIONS["glass_blur"].parameters(severity, "imagenet"))
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    drawn = np.stack([values for _, values in calls]).reshape(iterations, len(rows), len(columns), 2)
    fields = np.zeros((iterations, 2, height, width), np.int64) + reach
    fields[:, :, rows[:, None], columns] += drawn.transpose(0, 3, 1, 2)
    return list(fields)


def _snow(calls: list[Any], *_: Any) -> list[np.ndarray]:
    return [_standardised(calls)[0][None], _unit(calls[1])[None]]


def _frost(calls: list[Any], *_: Any) -> list[np.ndarray]:
    which, down, right = calls
    cells = [(which[1] + 0.5) / 5] + [(value + 0.5) / options["high"] for options, value in (down, right)]
    return [np.array(cells)]


_CONVERT: dict[str, Callable[..., list[np.ndarray]]] = {
    "gaussian_noise": _standardised,
    "speckle_noise": _standardised,
    "spatter": _standardised,
    "impulse_noise": _impulse,
    "glass_blur": _glass,
    "motion_blur": lambda calls, *_: [_unit(calls[0])[None]],
    "snow": _snow,
    "frost": _frost,
    "fog": lambda calls, *_: [np.concatenate([_unit(call).ravel() for call in calls])],
    "elastic_transform": lambda calls, *_: [np.stack([_unit(call) for call in calls])],
}

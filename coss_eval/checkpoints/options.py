"""What a caller asks of load_model, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from coss_eval.errors import UsageError
from coss_eval.models.architecture import Stem
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.families import Pooling

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the caller gave; None leaves it to the file, its layout, or the default."""

    arch: str | None = None
    stem: Stem | None = None
    width: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    weights: str | None = None
    pooling: Pooling = "own"
    local: str | None = None
    global_: str | None = None
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std belong together: give both, or neither")
        if self.mean is not None and self.std is not None and not (len(self.mean) == len(self.std) == 3):
            raise UsageError("--mean and --std take three numbers each, for pixels in [0, 1]")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"--std must be positive, not {tuple(self.std)}")
        if self.interpolation not in (None, "bilinear", "bicubic"):
            raise UsageError(f"interpolation must be bilinear or bicubic, not {self.interpolation!r}")
        if self.img_size is not None and self.img_size < 1:
            raise UsageError(f"--img-size must be positive, not {self.img_size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UsageError(f"--crop-pct must lie in (0, 1], not {self.crop_pct}")

    def preprocessing(self, known: Preprocessing) -> Preprocessing:
        """``known`` with the caller's wishes in place of its fields."""
        given = {k: v for k in ("img_size", "crop_pct", "interpolation") if (v := getattr(self, k)) is not None}
        if self.mean is not None and self.std is not None:
            given |= {"mean": tuple(self.mean), "std": tuple(self.std), "source": "flag"}
        return replace(known, **given)

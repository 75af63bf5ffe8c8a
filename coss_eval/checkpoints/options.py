"""How a checkpoint is to be read: what load_model and the command line take; without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError
from coss_eval.models.choices import HeadChoice, Interpolation, Pooling, Stem

if TYPE_CHECKING:
    from coss_eval.models.classifier import Preprocessing


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a file is to be read where it does not say so itself; None leaves it to the file, its layout, or a default.

    The lines below the fields are the help of the command's flags.
    """

    file_layout: str | None = None
    "Layout of the file (see coss-eval list layouts), or package.module:LAYOUT; recognised where it can be."
    arch: str | None = None
    "Architecture (resnet50, timm:..., package.module:factory); inferred from the file where it can be."
    stem: Stem | None = None
    "ResNet stem; the last two are solo-learn's and lightly's own variants of the 3x3 one."
    width: int | None = None
    "Planes of a ResNet's first stage."
    pooling: Pooling = "own"
    "Global representation of a ViT: the network's own (class token), or the mean of its patch tokens."
    local: str | None = None
    "Module whose output is the map before pooling (layer4), where the network is not to be taken apart by itself."
    global_: str | None = None
    "Module whose output is the global representation."
    weights: str | None = None
    "Branch of the file (student, teacher, online, target), or the weights of a named model."
    mean: tuple[float, float, float] | None = None
    "Normalisation mean of pixels in [0, 1]."
    std: tuple[float, float, float] | None = None
    "Normalisation standard deviation."
    img_size: int | None = None
    "Side the network needs; images of another size are resized inside the classifier."
    crop_pct: float | None = None
    "Share of the shorter side that the centre crop keeps, for files of varying size."
    interpolation: Interpolation | None = None
    "Resizing of image files."
    head: HeadChoice = "auto"
    "The checkpoint's own head, a linear probe, or (auto) the own head where its class names match the dataset's."
    allow_partial: bool = False
    "Accept a checkpoint that leaves parts of the backbone at random."

    def __post_init__(self) -> None:
        if self.head not in ("auto", "own", "probe"):
            raise UsageError(f"head must be auto, own or probe, not {self.head!r}")
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
        """``known`` with what is given here in place of its fields."""
        given: dict[str, Any] = {"img_size": self.img_size, "crop_pct": self.crop_pct}
        given |= {"interpolation": self.interpolation, "mean": self.mean, "std": self.std}
        given |= {} if self.mean is None else {"said_by": "flag", "asked": True}
        return replace(known, **{name: value for name, value in given.items() if value is not None})

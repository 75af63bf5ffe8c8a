"""What is done to an image to make a view of it, as plain configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coss_eval.errors import UsageError, unknown_name
from coss_eval.views.random_crop import RandomCrop, refuse


@dataclass(frozen=True, kw_only=True)
class Augmentation(RandomCrop):
    """One view: crop, flip, colour jitter, greyscale, blur, solarisation, in this order; torchvision's definitions.

    ``size`` is the side of the view in pixels; crop and flip are RandomCrop's. ``jitter``, ``greyscale``, ``blur`` and
    ``solarise`` are probabilities. Factors of brightness, contrast and saturation are uniform in
    [max(0, 1 - x), 1 + x], the hue moves by up to ``hue`` of a turn. ``blur_sigma`` is in pixels of the view;
    ``blur_kernel`` None is a tenth of the size, made odd (23 at 224 px, as SimCLR and BYOL have it). Solarisation
    inverts values of 1/2 and more.
    """

    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    greyscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("jitter", "greyscale", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(f"{name} to be a probability from 0 to 1", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                refuse(f"{name} to be at least 0", getattr(self, name))
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            refuse("blur_sigma to be two rising numbers above 0", self.blur_sigma)
        if not 0 <= self.hue <= 0.5:
            refuse("hue from 0 to 0.5 of a turn", self.hue)
        if self.kernel % 2 == 0 or not 0 < self.kernel < 2 * self.size:  # the border is reflected once
            refuse(f"blur_kernel to be odd, above 0 and below {2 * self.size}, twice the size", self.kernel)

    @property
    def kernel(self) -> int:
        """Side of the blur's kernel in pixels."""
        return self.size // 10 | 1 if self.blur_kernel is None else self.blur_kernel


@dataclass(frozen=True)
class Views:
    """The views of every image: ``full`` ones, which any network sees, and ``small`` ones for the student only."""

    full: tuple[Augmentation, ...]
    small: tuple[Augmentation, ...] = ()

    def __iter__(self) -> Iterator[Augmentation]:
        """All views, the full ones first."""
        yield from self.full
        yield from self.small

    def __len__(self) -> int:
        return len(self.full) + len(self.small)


def byol_pair(size: int, crop_min_scale: float = 0.08, *, blur: bool = True) -> Views:
    """BYOL's asymmetric pair: blur always / seldom, solarisation never / one in five (Grill et al. 2020, table 6)."""
    first = Augmentation(size=size, crop_min_scale=crop_min_scale, blur=1.0 if blur else 0.0)
    return Views((first, replace(first, blur=0.1 if blur else 0.0, solarise=0.2)))


def multi_crop(
    pair: Views,
    *,
    small_views: int = 8,
    small_size: int = 96,
    crop_split: float = 0.14,
    small_min_scale: float = 0.05,
    small_blur: float = 0.5,
) -> Views:
    """``pair`` cropped from ``crop_split`` upwards, and small views from there downwards, never solarised (DINO)."""
    small = replace(
        pair.full[0],
        size=small_size,
        crop_min_scale=small_min_scale,
        crop_max_scale=crop_split,
        blur=small_blur,
        solarise=0.0,
    )
    full = tuple(replace(augmentation, crop_min_scale=crop_split) for augmentation in pair.full)
    return Views(full, (small,) * small_views)


Values = Mapping[str, Any]

ASYMMETRIC: tuple[Values, Values] = ({"blur": 1.0}, {"blur": 0.1, "solarise": 0.2})
"""BYOL's pair, which others took over: what ``byol_pair`` makes."""


@dataclass(frozen=True)
class ViewRecipe:
    """The views of a method: for each full one, the fields of its Augmentation that are not at their default.

    ``small_views``: how many small views stand beside them. ``cifar_min_scale``: crop_min_scale of the variant for
    small images; solo-learn's recipes for CIFAR do not blur and crop from .08 upwards, but for VICReg from .2.
    """

    full: tuple[Values, ...]
    small_views: int = 0
    cifar_min_scale: float = 0.08

    def at(
        self,
        size: int,
        *,
        variant: str = "imagenet",
        crop_min_scale: float | None = None,
        small_views: int | None = None,
        small_size: int | None = None,
    ) -> Views:
        """The views at ``size`` pixels.

        ``variant`` "cifar" is for small images: no blur, its own crop_min_scale, no small views. ``crop_min_scale``
        and ``small_views`` replace the recipe's; ``small_size`` None is 96 px for 224, in proportion elsewhere. Small
        views are cropped from .05 of the area up to where the full ones begin, DINO's .14 or ``crop_min_scale``.
        """
        if variant not in ("imagenet", "cifar"):
            raise unknown_name("variant of the views", variant, ["imagenet", "cifar"])
        cifar = variant == "cifar"
        own: dict[str, Any] = {"blur": 0.0, "crop_min_scale": self.cifar_min_scale} if cifar else {}
        if crop_min_scale is not None:
            own["crop_min_scale"] = crop_min_scale
        views = Views(tuple(Augmentation(size=size, **{**values, **own}) for values in self.full))
        if small_views is None:
            small_views = 0 if cifar else self.small_views
        if not small_views:
            return views
        split = 0.14 if crop_min_scale is None else crop_min_scale
        if split <= 0.05:
            raise UsageError(
                f"small views are cropped from 0.05 of the area up to crop_min_scale, which must be above that, got "
                f"{split:g}; with small_views 0 it may be smaller"
            )
        return multi_crop(
            views,
            small_views=small_views,
            small_size=small_size or max(8, round(size * 96 / 224 / 8) * 8),
            crop_split=split,
            small_blur=0.0 if cifar else 0.5,
        )

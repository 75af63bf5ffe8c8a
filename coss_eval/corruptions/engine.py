"""One door to both backends: checks the call, then corrupts a batch of uint8 images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from coss_eval.corruptions import blur, digital, noise, weather
from coss_eval.corruptions.draws import Draws, sample_keys
from coss_eval.corruptions.names import check_name, check_severity
from coss_eval.corruptions.parallel import map_chunks
from coss_eval.corruptions.seeds import condition_key
from coss_eval.corruptions.severity import Condition, Flavour, Table, check_table, table_for
from coss_eval.errors import UsageError, unknown_name

Backend = Literal["native", "reference"]

NATIVE: dict[str, Callable[[Tensor, Condition, Draws], Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": weather.spatter,
    "saturate": digital.saturate,
}

# Most of their time goes into OpenCV, SciPy or look-ups, which run on one core unless several threads of Python call.
_IMAGE_BY_IMAGE = frozenset({"defocus_blur", "zoom_blur", "jpeg_compression", "gaussian_blur", "spatter"})

MIN_SIDE = 32  # imagecorruptions' own limit: below it kernels and textures no longer fit


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    ids: Tensor,
    seed: int = 0,
    table: str | None = None,
    flavour: Flavour = "imagecorruptions",
    backend: Backend = "native",
) -> Tensor:
    """Corrupted copies of ``images``, each with draws of its own that depend on (seed, id, name, severity) alone.

    Args:
        images: uint8 (B, 3, H, W), H and W at least 32, on any device.
        name: one of NAMES.
        severity: 1 to 5.
        ids: int64 (B,), the samples' ids, on the device of the images.
        seed: the run's seed.
        table: "imagenet", "tiny-imagenet" or "cifar"; None chooses as ``resolve_table`` does (record it).
        flavour: "imagecorruptions" follows that package, "imagenet-c" the benchmark's original code where they differ.
        backend: "native" is batched torch; "reference" runs imagecorruptions 1.1.2 itself, which knows its own flavour
            and the "imagenet" table only.

    Returns: uint8 (B, 3, H, W) on the same device. Raises UsageError for a call that does not fit the above.
    """
    check_name(name)
    check_severity(severity)
    _check_batch(images, ids)
    if flavour not in get_args(Flavour):
        raise unknown_name("flavour", flavour, get_args(Flavour))
    resolved = resolve_table(table, (images.shape[-2], images.shape[-1]), backend)
    if backend == "reference":
        if flavour != "imagecorruptions":
            raise UsageError(f'backend "reference" has flavour "imagecorruptions" only, got {flavour!r}; use "native"')
        return _reference(images, name, severity, ids, seed)
    condition = Condition(name, severity, resolved, flavour)
    if images.is_cuda and (name == "jpeg_compression" or (name == "spatter" and severity <= 3)):
        # libjpeg's and OpenCV's work, wherever the pixels are: there the CPU's threads share it
        return corrupt(images.cpu(), name, severity, ids.cpu(), seed, table, flavour).to(images.device)
    function = NATIVE[name]
    keys = sample_keys(ids, condition_key(seed, name, severity))
    return map_chunks(
        lambda part, keys: function(part, condition, Draws(keys)), images, keys, image_by_image=name in _IMAGE_BY_IMAGE
    )


def resolve_table(table: str | None, size: tuple[int, int], backend: Backend) -> Table:
    """The severity table that ``corrupt`` will use for images of ``size`` (height, width).

    Given, it is checked. Not given, the native backend goes by the size, and the reference has "imagenet" only.
    """
    if backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    if table is None:
        return "imagenet" if backend == "reference" else table_for(size)
    checked = check_table(table)
    if backend == "reference" and checked != "imagenet":
        raise UsageError(f'backend "reference" has the "imagenet" table only, got {table!r}; use backend "native"')
    return checked


def _check_batch(images: Tensor, ids: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be a uint8 tensor, got {came}; floats in [0, 1] times 255, rounded, will do")
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if min(images.shape[-2:]) < MIN_SIDE:
        raise UsageError(
            f"corruptions need images of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {images.shape[-2]} x "
            f"{images.shape[-1]}; resize them first"
        )
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != images.shape[:1]:
        came = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(f"ids must be an int64 tensor of shape ({len(images)},), one for each image, got {came}")
    if ids.device != images.device:
        raise UsageError(f"ids must be on the images' device {images.device}, got {ids.device}; move one of them")


def _reference(images: Tensor, name: str, severity: int, ids: Tensor, seed: int) -> Tensor:
    from coss_eval.corruptions.reference import corrupt_batch  # imports OpenCV and scikit-image: only where asked for

    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, H, W, 3)
    corrupted = torch.from_numpy(corrupt_batch(pixels, name, severity, ids.cpu().numpy(), seed))
    return corrupted.permute(0, 3, 1, 2).contiguous().to(images.device)

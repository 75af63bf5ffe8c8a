"""One door to both backends: checks the call, then corrupts a batch of uint8 images."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from coss_eval.corruptions.draws import Draws, sample_keys
from coss_eval.corruptions.filters import to_pixels
from coss_eval.corruptions.names import NAMES, find
from coss_eval.corruptions.parallel import map_chunks
from coss_eval.corruptions.registry import MIN_SIDE, Corruption, Function
from coss_eval.corruptions.seeds import condition_key
from coss_eval.corruptions.severity import Flavour, Setting, TableName, check_severity, check_table, table_for
from coss_eval.errors import UsageError, unknown_name
from coss_eval.randomness import numbered

Backend = Literal["native", "reference"]


def corrupt(
    images: Tensor,
    name: str | Function | Corruption,
    severity: int,
    ids: Tensor | None = None,
    seed: int = 0,
    table: str | None = None,
    flavour: Flavour = "imagecorruptions",
    backend: Backend = "native",
) -> Tensor:
    """Corrupted copies of ``images``, each with draws of its own that depend on (seed, id, name, severity) alone.

    Args:
        images: uint8 (B, 3, H, W), H and W at least 32, or the corruption's ``min_side``, on any device.
        name: one of NAMES or a registered one, "package.module:function", or a function of yours (see ``registry``).
        severity: 1 to 5.
        ids: int64 (B,), the samples' ids, on the device of the images; None is 0, 1, ..., so that images of several
            calls need ids of their own, else the draws of each call are the same.
        seed: the run's seed.
        table: "imagenet", "tiny-imagenet" or "cifar"; None chooses as ``resolve_table`` does (record it).
        flavour: "imagecorruptions" follows that package, "imagenet-c" the benchmark's original code where they differ.
        backend: "native" is batched torch; "reference" runs imagecorruptions 1.1.2 itself, which knows its own flavour
            and the "imagenet" table only.

    Returns: uint8 (B, 3, H, W) on the same device. Raises UsageError for a call that does not fit the above.

    >>> images, ids = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8), torch.tensor([7, 8])
    >>> foggy = corrupt(images, "fog", 3, ids)
    >>> torch.equal(foggy[1:], corrupt(images[1:], "fog", 3, ids[1:]))  # the same, whatever is in the batch
    True
    """
    corruption = find(name)
    check_severity(severity)
    ids = numbered(ids, images) if isinstance(images, Tensor) else ids
    _check_batch(images, ids, corruption.name, MIN_SIDE if backend == "reference" else corruption.min_side)
    if flavour not in get_args(Flavour):
        raise unknown_name("flavour", flavour, get_args(Flavour))
    resolved = resolve_table(table, (images.shape[-2], images.shape[-1]), backend)
    if backend == "reference":
        if flavour != "imagecorruptions":
            raise UsageError(f'backend "reference" has flavour "imagecorruptions" only, got {flavour!r}; use "native"')
        if corruption.name not in NAMES:
            raise UsageError(f'backend "reference" has no {corruption.name}; use backend "native"')
        return _reference(images, corruption.name, severity, ids, seed)
    if images.is_cuda and severity in corruption.on_cpu:
        # libjpeg's and OpenCV's work, wherever the pixels are: there the CPU's threads share it
        return corrupt(images.cpu(), corruption, severity, ids.cpu(), seed, table, flavour).to(images.device)
    setting = corruption.at(severity, resolved, flavour)
    keys = sample_keys(ids, condition_key(seed, corruption.name, severity))
    return map_chunks(
        lambda part, keys: _corrupted(part, corruption, setting, Draws(keys)),
        images,
        keys,
        image_by_image=corruption.image_by_image,
    )


def _corrupted(images: Tensor, corruption: Corruption, setting: Setting, draws: Draws) -> Tensor:
    """What the function makes of a chunk, as uint8; a person's own is given a copy, which it may write into."""
    made = corruption.function(images if corruption.code is None else images.clone(), setting, draws)
    if made.shape != images.shape:
        raise UsageError(
            f"the corruption {corruption.name} made {tuple(made.shape)} of images {tuple(images.shape)}; keep the shape"
        )
    return made if made.dtype == torch.uint8 else to_pixels(made.float())


def resolve_table(table: str | None, size: tuple[int, int], backend: Backend) -> TableName:
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


def _check_batch(images: Tensor, ids: Tensor | None, name: str, min_side: int) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be a uint8 tensor, got {came}; floats in [0, 1] times 255, rounded, will do")
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if min(images.shape[-2:]) < min_side:
        raise UsageError(
            f"{name} needs images of at least {min_side} x {min_side} pixels, got {images.shape[-2]} x "
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

"""imagecorruptions 1.1.2 as it was published, made to run on today's stack, seeded image by image, on all cores.

The package does not import where pkg_resources is gone, and fails on NumPy 2 and current scikit-image. Nothing of it,
nor of any other package, is patched here: its source is compiled once, without its import statements, and run in a
fresh namespace for every image, in which we supply the names it would have imported. ``np.random`` in that namespace
is the image's own generator, so that every draw is controlled and no state is shared between threads.

It always uses ImageNet-C's parameters, whatever the image's size, and this adapter does not change that.
"""

from __future__ import annotations

import ast
import importlib.abc
import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from io import BytesIO
from types import CodeType, ModuleType
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import scipy.ndimage
from PIL import Image

from coss_eval.corruptions.package import package_folder
from coss_eval.corruptions.seeds import sample_sequence
from coss_eval.runtime.imports import needing

with needing("cv2"):
    import cv2
with needing("skimage"):
    import skimage
    import skimage.color
    import skimage.filters
    import skimage.util as skimage_util

Uint8Array = npt.NDArray[np.uint8]

# Below this many pixels (all images together) a batch is done before processes would have been handed their share.
_SERIAL_PIXELS = 2**16


def corrupt_batch(
    images: Uint8Array, name: str, severity: int, ids: npt.NDArray[np.int64], seed: int = 0, workers: int | None = None
) -> Uint8Array:
    """imagecorruptions' ``name`` at ``severity`` on uint8 images (B, H, W, 3), in as many processes as there are cores.

    The outcome of an image depends on (seed, its id, name, severity) alone: not on ``workers`` nor on its neighbours.
    """
    jobs = list(zip(images, ids.tolist(), strict=True))
    workers = workers or joblib.cpu_count()
    if workers == 1 or len(jobs) == 1 or images.size // 3 < _SERIAL_PIXELS:
        done = [corrupt_image(image, name, severity, sample_id, seed) for image, sample_id in jobs]
    else:
        size = math.ceil(len(jobs) / (4 * workers))  # several chunks a process: images take unequal time
        chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        run = joblib.Parallel(n_jobs=workers, backend="loky", max_nbytes=None)
        task = joblib.delayed(_corrupt_chunk)
        done = [image for chunk in run(task(chunk, name, severity, seed) for chunk in chunks) for image in chunk]
    return np.stack(done) if done else images.copy()


def corrupt_image(image: Uint8Array, name: str, severity: int, sample_id: int, seed: int = 0) -> Uint8Array:
    """One uint8 image (H, W, 3) corrupted, with the draws of its (seed, id, name, severity)."""
    bits = np.random.PCG64(sample_sequence(seed, sample_id, name, severity))
    return run_published(image, name, severity, np.random.RandomState(bits), np.random.Generator(bits))


def run_published(
    image: Uint8Array, name: str, severity: int, random: Any, generator: np.random.Generator
) -> Uint8Array:
    """The published function on one image; ``random`` stands for np.random, ``generator`` for scikit-image's own.

    Where it yields NaN (spatter with not one drop of liquid divides by zero) the image's own pixels stay.
    """
    corruption = published_functions(random, generator)[name]
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.asarray(corruption(Image.fromarray(image), severity))
    if result.dtype.kind == "f":
        result = np.where(np.isnan(result), image, result)
    return result.astype(np.uint8)  # truncates, as the published code does


def _corrupt_chunk(jobs: list[tuple[Uint8Array, int]], name: str, severity: int, seed: int) -> list[Uint8Array]:
    cv2.setNumThreads(1)  # in a process of our own: the processes are the parallelism
    return [corrupt_image(image, name, severity, sample_id, seed) for image, sample_id in jobs]


class _WithoutImports(importlib.abc.InspectLoader):
    """Runs the package's source without its import statements, in any number of namespaces; writes no byte code."""

    def get_source(self, fullname: str) -> str:
        return _published_source()

    def get_code(self, fullname: str) -> CodeType:
        return _published_code()


@lru_cache(maxsize=1)
def _published_source() -> str:
    return (package_folder() / "corruptions.py").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _published_code() -> CodeType:
    tree = ast.parse(_published_source())
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    code: CodeType = compile(tree, "imagecorruptions/corruptions.py", "exec")
    return code


class _Overlay:
    """A module with some names replaced, as one namespace sees it; the module itself is left alone."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _gaussian(image: npt.NDArray[Any], sigma: Any, multichannel: bool = False, **options: Any) -> Any:
    """skimage.filters.gaussian with the argument that scikit-image 0.23 removed."""
    return skimage.filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)


def published_functions(random: Any, generator: np.random.Generator) -> dict[str, Callable[..., Any]]:
    """The package's functions in a namespace of their own."""
    module = ModuleType("coss_eval._imagecorruptions")
    folder = package_folder()
    module.__dict__.update(
        np=_Overlay(np, random=random, float_=np.float64),
        math=math,
        os=os,
        Image=Image,
        BytesIO=BytesIO,
        cv2=cv2,
        sk=_Overlay(
            skimage,
            util=_Overlay(skimage_util, random_noise=partial(skimage_util.random_noise, rng=generator)),
        ),
        gaussian=_gaussian,
        scizoom=scipy.ndimage.zoom,
        map_coordinates=scipy.ndimage.map_coordinates,
        resource_filename=lambda package, path: str(folder / path),
        print=lambda *args, **kwargs: None,  # it announces the exceptions that it handles
    )
    _WithoutImports().exec_module(module)
    return module.__dict__

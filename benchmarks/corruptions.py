"""The native corruption engine against imagecorruptions 1.1.2: same images, same cores, one run.

    python benchmarks/corruptions.py                     # the 15 x 5 set and the 4 validation corruptions at 224 px
    python benchmarks/corruptions.py --size 32 --images 256
    python benchmarks/corruptions.py --device cuda --images 64

imagecorruptions runs in as many processes as there are cores, each on images of its own; only the time inside its
functions counts, not that of starting processes or sending images. The native engine is timed as it is called. Where
--device is an accelerator, the CPU side stays as it is and a ResNet-50's forward pass is timed beside. Times are
milliseconds an image, averaged over severities 1 to 5.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import joblib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from coss_eval.corruptions import BENCHMARK, NAMES, corrupt
from coss_eval.corruptions.names import SEVERITIES
from coss_eval.corruptions.reference import published_functions

Pixels = npt.NDArray[np.uint8]


def photographs(count: int, size: int) -> Pixels:
    """uint8 (count, size, size, 3): random crops of the two photographs that scikit-learn ships."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    crops = []
    for index in range(count):
        left, top = rng.integers(0, (320, 200)).tolist()
        crop = sources[index % 2].crop((left, top, left + 227, top + 227))
        crops.append(np.asarray(ImageOps.fit(crop, (size, size))))
    return np.stack(crops)


def time_published(images: Pixels, name: str, severity: int, at_least: float) -> float:
    """Seconds an image in this process: the median over as many images as take ``at_least`` seconds."""
    cv2.setNumThreads(1)
    function = published_functions(np.random.RandomState(0), np.random.default_rng(0))[name]
    function(Image.fromarray(images[0]), severity)
    durations: list[float] = []
    while not durations or sum(durations) < at_least:
        start = time.perf_counter()
        np.uint8(function(Image.fromarray(images[len(durations) % len(images)]), severity))
        durations.append(time.perf_counter() - start)
    return float(np.median(durations))


def time_reference(images: Pixels, name: str, cores: int, at_least: float) -> float:
    """Milliseconds an image with ``cores`` processes at work side by side, averaged over severities."""
    run = joblib.Parallel(n_jobs=cores, backend="loky", max_nbytes=None)
    shares = [images[core::cores] for core in range(cores)]
    task = joblib.delayed(time_published)
    times = [run(task(share, name, severity, at_least) for share in shares) for severity in SEVERITIES]
    return 1000 * float(np.mean([1 / sum(1 / one for one in each) for each in times]))


def time_native(images: Tensor, name: str, at_least: float) -> float:
    """Milliseconds an image, averaged over severities, the median of several repetitions."""
    ids = torch.arange(len(images), device=images.device)
    each = [
        seconds(lambda s=severity: corrupt(images, name, s, ids, table="imagenet"), at_least) for severity in SEVERITIES
    ]
    return 1000 * sum(each) / len(each) / len(images)


def seconds(call: Callable[[], Tensor], at_least: float) -> float:
    """The median duration of a call, repeated for ``at_least`` seconds after one that warms up."""
    call()
    durations: list[float] = []
    while len(durations) < 3 or sum(durations) < at_least:
        start = time.perf_counter()
        if call().device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return float(np.median(durations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--cores", type=int, default=joblib.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="the least time to measure each condition for")
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    pixels = photographs(options.images, options.size)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(options.device)

    print(
        f"{options.images} images of {options.size} px, {options.cores} cores, device {options.device}; ms an image\n"
    )
    print(f"| {'corruption':<26} | imagecorruptions | coss-eval |    ratio |\n|{'-' * 28}|-----------------:|", end="")
    print("----------:|---------:|")
    reference, native = {}, {}
    for name in NAMES:
        reference[name] = time_reference(pixels, name, options.cores, options.seconds)
        native[name] = time_native(images, name, options.seconds)
        row(name, reference[name], native[name])
    for label, names in (
        ("15", BENCHMARK),
        ("15 without glass", [name for name in BENCHMARK if name != "glass_blur"]),
        ("19", NAMES),
    ):
        row(f"total of {label}", sum(reference[n] for n in names), sum(native[n] for n in names))
    if options.device != "cpu":
        print(f"\nResNet-50 forward, float32: {time_forward(images):.3f} ms an image")


def row(label: str, reference: float, native: float) -> None:
    print(f"| {label:<26} | {reference:16.3f} | {native:9.3f} | {reference / native:7.2f}x |", flush=True)


def time_forward(images: Tensor) -> float:
    """Milliseconds an image of a ResNet-50's forward pass in float32, channels-last."""
    from torchvision.models import resnet50

    network = resnet50().eval().to(images.device, memory_format=torch.channels_last)
    pixels = images.float().div_(255).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return 1000 * seconds(lambda: network(pixels), 1) / len(images)


if __name__ == "__main__":
    main()

"""Images a second that come out of our loader and out of a bare torchvision DataLoader, on the same JPEG files.

    python benchmarks/decode.py --data-root ../shared/data              # 2 workers
    python benchmarks/decode.py --data-root ../shared/data --workers 0  # in this process, in CPU seconds: a busy one

Real images of Tiny-ImageNet's subset (``--data``) are written as class folders into a temporary folder, upscaled to
a shorter side of 400 px. Training: one RandomResizedCrop of 224 px and a flip. Evaluation: 256 px, then its centre.
Both sides give uint8 batches (torchvision: ImageFolder, v2's transforms on PIL images, default collation). The rounds
alternate; the ratio is that of the best rounds. Target: at least 0.9 in both.

What it takes to keep a GPU fed: a supervised ResNet-50 in mixed precision uses 2,470 images/s on an A100 (vendor's
page), MLPerf 3.0's about 6,900 on an H100; BYOL's bound is about 925 pairs/s on an A100 and 2,600 on an H100 (2.67
times that work a pair, by arithmetic). A file is decoded once for both views: a pair needs one decoded image. The last
line says how many cores of this machine that is. A decoder on the GPU, as DALI has it, lifts this limit up to its own
rate; it is not compared here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from coss_eval.data.batches import Geometry
from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split
from coss_eval.views.crop_files import crop_batches
from coss_eval.views.random_crop import RandomCrop

SIDE, CROP, BATCH = 400, 224, 32
NEEDED = {"supervised ResNet-50, A100": 2470, "the same, H100": 6900, "BYOL ResNet-50, A100": 925, "H100": 2600}
TARGET = 0.9


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), load_dataset(arguments.data, root=arguments.data_root).test, arguments.images)
        split = load_dataset(folder).test
        jobs = {
            "training": (lambda: ours_training(split, arguments.workers), peer(folder, training(), arguments.workers)),
            "evaluation": (
                lambda: ours_evaluation(folder, arguments.workers),
                peer(folder, evaluation(), arguments.workers),
            ),
        }
        clock = time.perf_counter if arguments.workers else time.process_time
        print(
            f"{len(split)} JPEG files of {SIDE} px, {arguments.workers} workers; images/s (best of {arguments.repeats})"
        )
        rates = {job: compared(job, pair, len(split), arguments.repeats, clock) for job, pair in jobs.items()}
    each = rates["training"] / max(1, arguments.workers)
    cores = ", ".join(f"{what} {rate / each:.0f}" for what, rate in NEEDED.items())
    print(f"cores to keep a GPU fed at {each:.0f} images/s each: {cores}")


def compared(
    job: str, pair: tuple[Callable[[], int], Callable[[], int]], images: int, repeats: int, clock: Callable[[], float]
) -> float:
    """Our images/s, printed beside the peer's; each round counts what came."""
    taken: list[list[float]] = [[], []]
    for _ in range(repeats):
        for seconds, run in zip(taken, pair, strict=True):
            started = clock()
            if (came := run()) != images:
                raise SystemExit(f"{job}: {came} images came, of {images}")
            seconds.append(clock() - started)
    ours, theirs = (images / min(seconds) for seconds in taken)
    verdict = "met" if ours >= TARGET * theirs else "NOT met"
    print(f"{job:11} ours {ours:7.1f}   torchvision {theirs:7.1f}   ratio {ours / theirs:5.2f} ({TARGET}: {verdict})")
    return ours


def ours_training(split: Split, workers: int) -> int:
    order = split.shuffled(np.random.default_rng(0))
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    views = [RandomCrop(size=CROP)]
    return sum(len(batch.views[0]) for batch in crop_batches(split, parts, views, seed=0, epoch=0, workers=workers))


def ours_evaluation(folder: str, workers: int) -> int:
    """A new split each time: what is decoded is kept in memory."""
    batches = load_dataset(folder).test.batches(Geometry(CROP), batch_size=BATCH, workers=workers)
    return sum(len(batch.images) for batch in batches)


def training() -> Any:
    return T.Compose([T.RandomResizedCrop(CROP), T.RandomHorizontalFlip(), T.PILToTensor()])


def evaluation() -> Any:
    return T.Compose([T.Resize(256), T.CenterCrop(CROP), T.PILToTensor()])


def peer(folder: str, transform: Any, workers: int) -> Callable[[], int]:
    files = ImageFolder(f"{folder}/val", transform)

    def run() -> int:
        return sum(len(images) for images, _ in DataLoader(files, BATCH, num_workers=workers))

    return run


def write_jpegs(folder: Path, split: Split, count: int) -> None:
    """``count`` images as class folders under val/, upscaled to a shorter side of SIDE, 4:3, quality 90."""
    chosen = split.limited(min(count, len(split)))
    for label, name in enumerate(chosen.classes):
        if (chosen.labels == label).any():
            (folder / "val" / name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(pictures(chosen)):
        image = Image.fromarray(pixels).resize((SIDE * 4 // 3, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / "val" / chosen.classes[label] / f"{number}.jpg", quality=90)


def pictures(split: Split) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    for batch in split.batches(Geometry(SIDE), batch_size=64):
        yield from zip(batch.images.permute(0, 2, 3, 1).numpy(), batch.labels.tolist(), strict=True)  # (H, W, 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tiny-imagenet-50")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

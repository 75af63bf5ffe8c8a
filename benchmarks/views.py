"""BYOL's pair of views at 32, 64 and 224 px: one process of ours against lightly's transform in a DataLoader.

    pip install "coss-eval[bench]"
    python benchmarks/views.py                    # as many loader workers as threads of ours
    python benchmarks/views.py --threads 1        # both in this process, in CPU seconds: also on a busy machine

Both start from decoded images in memory and end with normalised float32 batches; the rounds of the two alternate.
Without lightly the peer is torchvision.transforms.v2, image by image.
Target: ours is the faster one at each size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coss_eval.views.make import byol_pair, make_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((32, 32, 2048), (64, 64, 2048), (224, 256, 512))  # px of the views, of the images, images a round


def peer_transform(size: int) -> tuple[str, Callable[[Image.Image], list[Tensor]]]:
    """Name and transform of the peer, from a PIL image to its two views."""
    try:
        import lightly
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    except ImportError:
        pair = [torchvision_view(size, 1.0, 0.0), torchvision_view(size, 0.1, 0.2)]
        return f"torchvision {T.__name__}", lambda image: [view(image) for view in pair]
    transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    return f"lightly {lightly.__version__}", transform


def torchvision_view(size: int, blur: float, solarise: float) -> Callable[[Image.Image], Tensor]:
    return T.Compose(
        [
            T.RandomResizedCrop(size),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(size // 10 | 1, (0.1, 2.0))], blur),
            T.RandomSolarize(128, solarise),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )


class Transformed(Dataset[list[Tensor]]):
    def __init__(self, images: list[Image.Image], transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def smooth_images(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return images.clamp(0, 1).mul(255).to(torch.uint8)


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="ours, and the peer's workers")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    alone = arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch_size}, two views an image")
    for size, side, count in SIZES:
        images, ids, views = smooth_images(count, side), torch.arange(count), byol_pair(size)
        name, transform = peer_transform(size)
        pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]
        loader = DataLoader(
            Transformed(pictures, transform),
            arguments.batch_size,
            num_workers=0 if alone else arguments.threads,
            persistent_workers=not alone,  # so that their start is not counted
        )

        def ours(images: Tensor = images, ids: Tensor = ids, views: Any = views) -> None:
            for rows in torch.arange(len(ids)).split(arguments.batch_size):
                make_views(images[rows], ids[rows], views, seed=0, epoch=0, mean=MEAN, std=STD)

        def theirs(loader: Any = loader) -> None:
            for _ in loader:
                pass

        ours()
        theirs()
        pairs = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(arguments.rounds)]
        fast, slow = (sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True))
        ratio = sorted(b / a for a, b in pairs)[len(pairs) // 2]
        print(f"{size} px: ours {count / fast:,.0f} images/s, {name} {count / slow:,.0f} images/s, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()

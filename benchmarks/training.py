"""A BYOL step against lightly's example loop, what the CO term adds, and the views' share of a step.

    pip install "coss-eval[bench]"
    python benchmarks/training.py
    python benchmarks/training.py --only local --threads 1    # in CPU seconds: also on a busy machine
    python benchmarks/training.py --only preset --threads 1 --pairs 12 --preset tiny-imagenet-rf29-r18-laptop

One run, one machine, the same images (smooth noise, decoded, in memory), alternating rounds; medians of ratios.
What the CO term adds is a few percent, less than one step differs from the next: steps in pairs, a 95 % interval.
``--only preset`` says what CO-BYOL and BYOL with small views cost under a preset, and how many epochs of them cost as
much as the preset's of BYOL.
Targets: ResNet-18 at 64 px, batch 256: 1.8 x lightly's images a second. RF29-ResNet18: the extra time of CO-BYOL over
BYOL at most 1.2 x the extra FLOPs. Where an accelerator is at hand: views at most 15 % of the step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from itertools import chain, count, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from coss_eval.data.assemble import Part, assemble
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import ArrayImages
from coss_eval.data.open import load_dataset
from coss_eval.statistics import median_interval
from coss_eval.training.config import resolve
from coss_eval.training.dry_run import dry_run, relative_cost
from coss_eval.training.loop import Trainer

SIZE = 64
HEADS = {"hidden": 1024, "out": 256}


def smooth_images(count: int) -> np.ndarray:
    """uint8 (count, 3, SIZE, SIZE)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1).mul(255).byte().numpy()


def dataset(pixels: np.ndarray) -> Dataset:
    labels = np.arange(len(pixels)) % 2
    part = Part(ArrayImages(pixels, [f"train/{i}" for i in range(len(pixels))]), labels)
    return assemble("smooth-noise", ("a", "b"), part, part)


class Ours:
    """Passes over the images by our own loop."""

    def __init__(self, method: str, data: Dataset, device: torch.device, **fields: object) -> None:
        config = resolve(method, None, holdout=0.0, probe_every=0, epochs=1000, **HEADS, **fields)
        self.run = Trainer(config, data, Path(), device)  # nothing is written
        self.batches = chain.from_iterable(map(self.run.setup.feed.epoch, count()))

    def pass_over(self) -> int:
        return self.take(self.run.setup.feed.steps)

    def step(self) -> int:
        return self.take(1)

    def take(self, steps: int) -> int:
        losses = [self.run.take_step(batch) for batch in islice(self.batches, steps)]
        assert torch.stack(losses).isfinite().all()  # waits for the device
        return len(losses) * self.run.config.batch_size

    def views(self) -> int:
        images = 0
        for batch in self.run.setup.feed.epoch(0):
            views = self.run.setup.views_of(batch, 0)
            images += len(views[0])
        float(views[0].sum())
        return images


class Lightly:
    """BYOL as in lightly's examples (examples/pytorch/byol.py): its modules, transform, loader and order of calls."""

    def __init__(self, pixels: np.ndarray, batch_size: int, workers: int, device: torch.device) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        self.device, self.update = device, update_momentum
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1]).to(device)
        self.projector = BYOLProjectionHead(512, HEADS["hidden"], HEADS["out"]).to(device)
        self.predictor = BYOLPredictionHead(HEADS["out"], HEADS["hidden"], HEADS["out"]).to(device)
        self.target, self.target_projector = copy.deepcopy(self.backbone), copy.deepcopy(self.projector)
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_projector)
        self.compare = NegativeCosineSimilarity()
        online = [*self.backbone.parameters(), *self.projector.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD(online, lr=0.06)
        transform = BYOLTransform(BYOLView1Transform(input_size=SIZE), BYOLView2Transform(input_size=SIZE))
        pictures = [transformed(Image.fromarray(image.transpose(1, 2, 0)), transform) for image in pixels]
        self.loader = DataLoader(
            Calls(pictures), batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
        )

    def pass_over(self) -> int:
        total, count = 0.0, 0
        for first, second in self.loader:
            self.update(self.backbone, self.target, m=0.99)
            self.update(self.projector, self.target_projector, m=0.99)
            a, b = first.to(self.device), second.to(self.device)
            online_a, online_b = (self.predictor(self.projector(self.backbone(x).flatten(1))) for x in (a, b))
            with torch.no_grad():
                target_a, target_b = (self.target_projector(self.target(x).flatten(1)) for x in (a, b))
            loss = 0.5 * (self.compare(online_a, target_b) + self.compare(online_b, target_a))
            total += loss.detach()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            count += len(a)
        assert np.isfinite(float(total))
        return count


def transformed(image: Image.Image, transform: Callable[[Image.Image], list[Tensor]]) -> Callable[[], list[Tensor]]:
    return lambda: transform(image)


class Calls(torch.utils.data.Dataset[list[Tensor]]):
    """What each of some functions returns."""

    def __init__(self, functions: list[Callable[[], list[Tensor]]]) -> None:
        self.functions = functions

    def __len__(self) -> int:
        return len(self.functions)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.functions[index]()


def seconds_an_image(work: Callable[[], int]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    images = work()
    return (clock() - start) / images


def alternate(works: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds an image of each work in every round, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = seconds_an_image(work)
            if number:
                found[name].append(taken)
    return found


def against_lightly(pixels: np.ndarray, batch: int, rounds: int, workers: int, device: torch.device) -> None:
    ours = Ours("byol", dataset(pixels), device, arch="resnet18", stem="imagenet", batch_size=batch, recipe="imagenet")
    works = {"ours": ours.pass_over, "views": ours.views}
    try:
        works["lightly"] = Lightly(pixels, batch, workers, device).pass_over
    except ImportError:
        print('lightly is not installed: pip install "coss-eval[bench]"')
    times = alternate(works, rounds)
    for name, taken in times.items():
        print(f"BYOL, ResNet-18, {SIZE} px, batch {batch}: {name:8} {1 / median(taken):7,.1f} images/s")
    share = median(v / o for v, o in zip(times["views"], times["ours"], strict=True))
    print(f"views alone take {100 * share:.1f} % of the time of a step")
    if "lightly" in times:
        ratio = median(t / o for t, o in zip(times["lightly"], times["ours"], strict=True))
        print(f"ours / lightly: {ratio:.2f} x (target 1.8)")


def local_term(pixels: np.ndarray, batch: int, pairs: int, device: torch.device) -> None:
    data = dataset(pixels)
    options = {"arch": "rf29_resnet18", "stem": "imagenet", "batch_size": batch}
    plain, co = (Ours(name, data, device, **options) for name in ("byol", "co-byol"))
    times = alternate({"byol": plain.step, "co-byol": co.step}, pairs)
    costs = [
        dry_run(resolve(name, None, holdout=0.0, **HEADS, **options), data, device=device)
        for name in ("byol", "co-byol")
    ]
    extra = 100 * (np.array(times["co-byol"]) / np.array(times["byol"]) - 1)
    found, low, high = median_interval(extra)
    predicted = 100 * (costs[1].flops / costs[0].flops - 1)
    for name, cost, taken in zip(times, costs, times.values(), strict=True):
        speed = f"{1 / median(taken):6,.1f} images/s, {cost.flops / 1e9:.2f} GFLOPs an image"
        print(f"{name:8} RF29-ResNet18, {SIZE} px, batch {batch}: {speed}")
    print(f"CO adds {found:.1f} % of time [{low:.1f}, {high:.1f}], {predicted:.1f} % of FLOPs")
    print(f"its time / its FLOPs: {found / predicted:.2f} x (target 1.2)")


def equal_cost(preset: str, data: Dataset, small_views: int, pairs: int, device: torch.device) -> None:
    """Epochs of CO-BYOL and of multi-crop BYOL that take the time of BYOL's under a preset."""
    plain = resolve("byol", preset)
    others = {"co-byol": resolve("co-byol", preset), "multi-crop": resolve("byol", preset, small_views=small_views)}
    for name, config in others.items():
        cost = relative_cost(config, plain, data, pairs=pairs, device=device)
        time_ = f"{cost.seconds:.2f} x BYOL's time [{cost.low:.2f}, {cost.high:.2f}], {cost.flops:.2f} x its FLOPs"
        print(f"{name:10} {time_}: {cost.epochs(plain.epochs)} epochs cost as much as {plain.epochs} of BYOL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=None, help="of lightly's loader; as many as threads by default")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--local-batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=48, help="of steps that tell what the local term adds")
    parser.add_argument("--only", choices=("lightly", "local", "preset"))
    parser.add_argument("--preset", default="tiny-imagenet-rf29-r18-laptop", help="of --only preset, as are the next")
    parser.add_argument("--data", default="tiny-imagenet-50")
    parser.add_argument("--small-views", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads")
    if arguments.only == "preset":
        data = load_dataset(arguments.data)
        equal_cost(arguments.preset, data, arguments.small_views, arguments.pairs, device)
        return
    pixels = smooth_images(arguments.images)
    workers = arguments.threads if arguments.workers is None else arguments.workers
    if arguments.only != "local":
        against_lightly(pixels, arguments.batch_size, arguments.rounds, workers, device)
    if arguments.only != "lightly":
        local_term(pixels, arguments.local_batch_size, arguments.pairs, device)


if __name__ == "__main__":
    main()

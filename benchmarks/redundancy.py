"""All one-pass measures of redundancy, and CKA, against the bare forward passes; redundancy against keeping them all.

    python benchmarks/redundancy.py            # a GPU: 50,000 images of 224 px, ResNet-50 (49 locations of 2,048)
                                               # a CPU: 512 images of 64 px, ResNet-18 with a CIFAR stem (64 of 512)
    python benchmarks/redundancy.py --images 2048 --arch resnet50 --stem imagenet --side 224

Each way runs in a process of its own, after a warm-up pass; memory is the most that it took beyond the network and the
pixels. Goals: 1.2 times the bare passes on a GPU, 1.5 times on a CPU, less than 1 GiB. The naive way holds
N x L x D float32 (20 GB of the large form) and computes the same formulas from all of them at once; the two must agree
where the calibration images are all there are.

    python benchmarks/redundancy.py --cka      # a GPU: 10,240 images of 224 px, two ResNet-50
                                               # a CPU: 320 images of 32 px, two ResNet-18 with a CIFAR stem

CKA between all sites of two networks, six of each, against the bare passes of both over the same images, in turns: the
median of the turns' ratios, and the lowest and the highest. Goal: 1.5 times. What looks once whether a network's
outputs depend on the batch is not of it, as it takes as long for a million images, and has a column of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.evaluation.similarity import minibatch_size, similarities
from coss_eval.models.architecture import Architecture
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import Stem
from coss_eval.models.classifier import to_float
from coss_eval.probes.behaviour import refuse_batch_dependent
from coss_eval.probes.forward import ready
from coss_eval.redundancy import measure
from coss_eval.redundancy.spectrum import effective_rank
from coss_eval.runtime.device import exact_float32

POOL = 4  # batches that take turns: what they show does not change the time


class Size(NamedTuple):
    arch: str
    stem: Stem
    side: int
    images: int
    batch: int
    device: str


class Took(NamedTuple):
    seconds: float
    mebibytes: float
    value: float


def bare(backbone: Backbone, batches: Iterator[Tensor]) -> float:
    with torch.inference_mode():
        for pixels in batches:
            backbone(pixels)
    return float("nan")


def one_pass(backbone: Backbone, batches: Iterator[Tensor]) -> float:
    found = measure(backbone, batches).set_index("metric")["value"]
    return float(found["normalised_per_position"])


def naive(backbone: Backbone, batches: Iterator[Tensor]) -> float:
    """Every representation in memory; the means per position, cosines, variances and four spectra of them."""
    with torch.inference_mode():
        kept = [backbone.represent(pixels) for pixels in batches]
        z = torch.cat([one.local for one in kept]).double()  # (N, L, D)
        n, locations, _ = z.shape
        for x in (z - z.mean((0, 1)), z - z.mean(0)):
            u = torch.nn.functional.normalize(x, dim=-1)
            s = u.sum(1)
            q = float(s.square().sum())
            within = (q - n * locations) / (n * locations * (locations - 1))
            between = (float(s.sum(0).square().sum()) - q) / (n * (n - 1) * locations**2)
            m = x.mean(1)
            for second in (m.T @ m / n, x.flatten(0, 1).T @ x.flatten(0, 1) / (n * locations)):
                effective_rank(second, n)
    return (within - between) / (1 - between)


WAYS: dict[str, Callable[[Backbone, Iterator[Tensor]], float]] = {"bare": bare, "one pass": one_pass, "naive": naive}


def run(way: str, size: Size, repeats: int) -> Took:
    """The fastest of some runs of one way; the most memory that any took beyond what was there before."""
    device = torch.device(size.device)
    # a CPU may be shared: what counts there is the time that this process had
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    backbone = Architecture(size.arch, size.stem).backbone(seed=0).eval()
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
    generator = torch.Generator().manual_seed(0)
    pool = [torch.rand(size.batch, 3, size.side, size.side, generator=generator).to(device) for _ in range(POOL)]

    def batches(count: int) -> Iterator[Tensor]:
        for place in range(0, count, size.batch):
            yield pool[place // size.batch % POOL][: count - place]

    with exact_float32():
        bare(backbone, batches(POOL * size.batch))
        watch = Memory(device)
        seconds, value = [], float("nan")
        for _ in range(repeats):
            start = clock()
            value = WAYS[way](backbone, batches(size.images))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
        return Took(min(seconds), watch.most(), value)


def cka(size: Size, turns: int) -> list[float]:
    """How many times the bare passes of two networks CKA of all their sites takes, a turn after the other."""
    batch = min(256, size.images)
    device = torch.device(size.device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    models = [make_model(size.arch, stem=size.stem, seed=seed) for seed in (0, 1)]
    pixels = np.random.default_rng(0).integers(0, 256, (size.images, size.side, size.side, 3), dtype=np.uint8)
    data = ce.as_dataset(test=(pixels, np.arange(size.images) % 10))
    assert data.test.fingerprint  # the images are hashed once, for any number of calls

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    def passes() -> None:
        with exact_float32(), torch.inference_mode():
            for model in models:
                with ready(encoder := model.encoder(), device):
                    for batch in data.test.batches(batch_size=minibatch_size(size.images)):
                        encoder(to_float(batch.images.to(device)))

    def compared() -> None:
        similarities(models, data, measures=["cka"], device=device, batch_size=batch)

    def looked() -> None:
        for model in models:
            refuse_batch_dependent(model, (size.side, size.side), device, batch)

    seconds(passes)
    ratios = []
    for _ in range(turns):
        bare_seconds = seconds(passes)
        once = seconds(looked)
        ratios.append((seconds(compared) - once) / bare_seconds)
        print(f"bare {bare_seconds:8.2f} s   CKA {ratios[-1]:.2f} times   and once {once:.2f} s", flush=True)
    return ratios


class Memory:
    """The most memory that was taken since it was made, MiB."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, self._now(device)
        self.highest, self.going = self.before, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.going and self.device.type != "cuda":
            self.highest = max(self.highest, self._now(self.device))
            time.sleep(0.02)

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def most(self) -> float:
        self.going = False
        self.thread.join()
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated() / 2**20
        return self.highest - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--arch", default="resnet50" if cuda else "resnet18")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet" if cuda else "cifar")
    parser.add_argument("--side", type=int, default=224 if cuda else 64)
    parser.add_argument("--images", type=int, default=50_000 if cuda else 512)
    parser.add_argument("--batch-size", type=int, default=256 if cuda else 32)
    parser.add_argument("--repeats", type=int, default=1 if cuda else 2)
    parser.add_argument("--cka", action="store_true")
    parser.add_argument("--naive-images", type=int, default=2048 if cuda else 512, help="more would not fit")
    given = parser.parse_args()
    if given.cka:
        small = Size("resnet18", "cifar", 32, 320, 32, "cpu")
        large = Size("resnet50", "imagenet", 224, 10_240, 256, "cuda")
        form = large if cuda else small
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {form}")
        ratios = cka(form, turns=3)
        print(f"CKA: {median(ratios):.2f} times [{min(ratios):.2f}, {max(ratios):.2f}] the bare passes (goal 1.5)")
        return
    size = Size(given.arch, given.stem, given.side, given.images, given.batch_size, "cuda" if cuda else "cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {size}")
    few = size._replace(images=min(given.naive_images, size.images))
    context, found = multiprocessing.get_context("spawn"), dict[str, Took]()
    for way, form in (("bare", size), ("one pass", size), ("naive", few)):
        with context.Pool(1) as pool:
            found[way] = pool.apply(run, (way, form, given.repeats))
        took = found[way]
        print(f"{way:9} {form.images:6} images {took.seconds:8.2f} s {took.mebibytes:8.0f} MiB  {took.value:.6f}")
    ratio = found["one pass"].seconds / found["bare"].seconds
    per_image = found["naive"].seconds / few.images / (found["bare"].seconds / size.images)
    print(f"times the bare passes: one pass {ratio:.2f} (goal {1.2 if cuda else 1.5}), naive {per_image:.2f}")


if __name__ == "__main__":
    main()

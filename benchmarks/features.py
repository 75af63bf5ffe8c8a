"""Feature extraction and clean evaluation against a bare loop of forward passes.

    python benchmarks/features.py --data tiny-imagenet-50 --data-root ../shared/data [--device cuda]

The bare loop runs the same network on normalised float32 channels-last tensors that lie on the device already. The
three take turns; the ratio of their medians is to be at most 1.15. On a machine that others use, too, the ratio of
the best times says more. The first pass, which also decodes the images, is printed apart: later passes find them
decoded where they fit into memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError
from coss_eval.models.architecture import Architecture
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.models.model import Model
from coss_eval.probes import extract, predict, resolve_device
from coss_eval.probes.forward import ready

BATCH = 256


def main() -> None:
    arguments = parse()
    data, device = open_data(arguments.data, arguments.data_root), resolve_device(arguments.device)
    if arguments.limit:
        data = replace(data, test=data.test.limited(arguments.limit))
    architecture = Architecture(arguments.arch)
    backbone, head = architecture.wrap(architecture.network(0, len(data.classes)))
    assert head is not None
    model = Model(arguments.arch, arguments.arch, backbone.eval(), None, None, Preprocessing(), "", "own").identified()
    classifier = Classifier(model.backbone, head, model.preprocessing).eval()
    geometry = model.preprocessing.geometry
    print(
        f"{data.name}: {len(data.test):,} test images; {arguments.arch} on {device}, {torch.get_num_threads()} threads"
    )

    def extraction() -> None:
        extract(model, data.test, batch_size=BATCH, device=device, cache=False)

    def evaluation() -> None:
        predict(classifier, data.test.batches(geometry, batch_size=BATCH), device)

    print(f"first pass, decoding included  {seconds(extraction, device):7.2f} s")
    with ready(classifier, device):
        pixels = [
            classifier.normalise(to_float(batch.images.to(device)))
            for batch in data.test.batches(geometry, batch_size=BATCH)
        ]

        def bare() -> None:
            forward_passes(classifier.backbone, pixels)

        contestants = {"bare loop": bare, "extract": extraction, "predict": evaluation}
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(arguments.repeats):
            for name, contestant in contestants.items():
                taken[name].append(seconds(contestant, device))
    bare_loop = taken["bare loop"]
    print("              median        best   images/s   ratio of medians   of best times   (at most 1.15)")
    for name, values in taken.items():
        ratios = median(values) / median(bare_loop), min(values) / min(bare_loop)
        print(
            f"{name:9} {median(values):9.3f} s {min(values):11.3f} s {len(data.test) / min(values):10,.0f}"
            f" {ratios[0]:14.3f} {ratios[1]:17.3f}"
        )


@torch.inference_mode()
def forward_passes(network: nn.Module, pixels: list[Tensor]) -> None:
    for batch in pixels:
        network(batch)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def open_data(name: str, root: Path | None) -> Dataset:
    try:
        return load_dataset(name, root=root)
    except CossError as error:
        print(f"{error}: falling back on digits")
        return load_dataset("digits")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tiny-imagenet-50")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="so many test images only")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""A sweep of 10 levels over all distinct sites of a ResNet: one clean pass a batch against full forward passes.

    python benchmarks/internal.py                 # ResNet-18 (CIFAR stem) on 64 px and ResNet-50 on 224 px

Both ways give the same verdicts (checked). Target: the full passes take at least 2.5 times as long.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from coss_eval.data.batches import Batch
from coss_eval.internal import corrupted
from coss_eval.internal.sweep import sweep
from coss_eval.models.architecture import Architecture
from coss_eval.models.choices import Stem
from coss_eval.models.classifier import Classifier, Preprocessing, to_float

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SITES = ("stage1", "stage2", "stage3", "stage4", "global")  # prepool is stage4's output


def full_passes(classifier: Classifier, batch: Batch, kind: str, levels: tuple[float, ...]) -> dict[str, Tensor]:
    """The naive way: the whole network again for every site and level. Correctness (E, B) by site."""
    verdicts = {}
    with torch.inference_mode():
        for site in SITES:
            rows = []
            for level in levels:
                with corrupted(classifier, site, kind, level, batch.ids):
                    rows.append(classifier(to_float(batch.images)).argmax(1) == batch.labels)
            verdicts[site] = torch.stack(rows).cpu()
    return verdicts


def one_clean_pass(classifier: Classifier, batch: Batch, kind: str, levels: tuple[float, ...]) -> dict[str, Tensor]:
    found = sweep(classifier, [batch], SITES, [kind], levels={kind: levels}, seeds=[0])
    assert not any(result.notes for result in found.values()), "the fast path was not taken"
    return {site: found[site, kind].correct[0] for site in SITES}


def timed(function: object, *arguments: object, repeats: int) -> tuple[float, dict[str, Tensor]]:
    """Median seconds of some calls after a warm-up, and the last result."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = function(*arguments)  # type: ignore[operator]
        seconds.append(time.perf_counter() - start)  # results are on the CPU: the device has finished
    return sorted(seconds[1:])[repeats // 2], result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {arguments.device}, {threads} threads, batch {arguments.batch_size}")
    networks: tuple[tuple[str, Stem, int], ...] = (("resnet18", "cifar", 64), ("resnet50", "imagenet", 224))
    for arch, stem, side in networks:
        backbone = Architecture(arch, stem).backbone(seed=0)
        classifier = Classifier(backbone, nn.Linear(backbone.dim, 50), Preprocessing()).to(arguments.device).eval()
        images = torch.randint(0, 256, (arguments.batch_size, 3, side, side), dtype=torch.uint8)
        ids = torch.arange(arguments.batch_size)
        batch = Batch(*(tensor.to(arguments.device) for tensor in (images, ids % 50, ids)))
        for kind in ("channel", "element"):
            slow, expected = timed(full_passes, classifier, batch, kind, LEVELS, repeats=arguments.repeats)
            fast, found = timed(one_clean_pass, classifier, batch, kind, LEVELS, repeats=arguments.repeats)
            same = all(torch.equal(expected[site], found[site]) for site in SITES)
            print(
                f"{arch} {side} px, {kind} masking, {len(SITES)} sites x {len(LEVELS)} levels: "
                f"full passes {slow:.2f} s, one clean pass {fast:.2f} s, ratio {slow / fast:.2f}, same verdicts {same}"
            )


if __name__ == "__main__":
    main()

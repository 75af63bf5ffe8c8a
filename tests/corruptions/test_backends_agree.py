"""A network cannot tell the native corruptions from imagecorruptions': another seed of one differs as much."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from coss_eval.checkpoints.load import make_model
from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.engine import Backend
from coss_eval.data.open import load_dataset
from coss_eval.models.classifier import to_float
from coss_eval.probes import fit_classifier

IMAGES, SEEDS, SEVERITY = 120, 5, 3
Verdicts = Callable[[str, Backend, int], np.ndarray]


@pytest.fixture(scope="module")
def verdicts() -> Verdicts:
    """(name, backend, seed) to which digits a ResNet with a linear probe gets right, bool (IMAGES,)."""
    digits = load_dataset("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model("resnet18", stem="cifar", width=16)
    classifier = fit_classifier(model, digits, device="cpu", cache=False)
    batch = next(digits.test.limited(IMAGES, 0).batches(batch_size=IMAGES))

    @torch.inference_mode()
    def of(name: str, backend: Backend, seed: int) -> np.ndarray:
        images = corrupt(batch.images, name, SEVERITY, batch.ids, seed=seed, table="imagenet", backend=backend)
        return (classifier(to_float(images)).argmax(1) == batch.labels).numpy()

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_differs_by_at_most_the_spread_of_seeds(name: str, verdicts: Verdicts) -> None:
    """Each image is right with a probability of its own, estimated over seeds; the package's draws are one seed more.

    The bound is 3.5 standard errors of that difference (1 in 2,000; 19 are tested, with fixed seeds), and one image.
    """
    native = np.stack([verdicts(name, "native", seed) for seed in range(SEEDS)])  # (SEEDS, IMAGES)
    reference = verdicts(name, "reference", 0)
    chance = (native.sum(0) + 0.5) / (SEEDS + 1)
    deviation = np.sqrt((chance * (1 - chance)).sum() * (1 + 1 / SEEDS)) if (native != native[0]).any() else 0.0
    assert abs(reference.sum() - native.mean(0).sum()) <= 3.5 * deviation + 1

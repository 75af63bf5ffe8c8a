"""What the CPU finds, a CUDA device finds too: every part that computes on a device, once through, on small inputs.

On the CPU the same bodies run against themselves, so that they are exercised on every machine.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from build_networks import build
from small_networks import FAMILIES, network, pixels
from torch import Tensor, nn

from coss_eval.data.batches import Batch
from coss_eval.data.open import load_dataset
from coss_eval.internal.sweep import sweep
from coss_eval.models.classifier import Classifier, Preprocessing
from coss_eval.models.rf_resnet import RFResNet
from coss_eval.probes import forward
from coss_eval.probes.linear import fit_probe
from coss_eval.receptive_field.effective import effective
from coss_eval.receptive_field.theoretical import by_site, fields
from coss_eval.redundancy import measure
from coss_eval.training.config import resolve
from coss_eval.training.loop import Trainer, TrainingProgress, train
from coss_eval.training.methods import names

CPU = torch.device("cpu")
RUN = {
    "width": 16, "holdout": 0.1, "batch_size": 32, "warm_up_epochs": 0, "epochs": 2, "lr": 0.02, "precision": "fp32",
    "probe_every": 1, "log_every": 1,
}  # fmt: skip


def labelled() -> tuple[Tensor, Tensor]:
    """Features float32 (120, 6) of three overlapping classes, and their labels."""
    labels = torch.arange(120) % 3
    features = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    features[torch.arange(120), labels] += 1.5
    return features, labels


def few_digits(n: int = 96):
    data = load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(n), test=data.test.limited(50))


@pytest.mark.parametrize("family", FAMILIES)
def test_redundancy(family: str, either_device: torch.device) -> None:
    backbone, images = network(family), pixels(24)
    expected = measure(backbone, images.split(8))
    found = measure(copy.deepcopy(backbone).to(either_device), images.to(either_device).split(8))
    assert list(found["metric"]) == list(expected["metric"])
    for column in ("value", "low", "high"):
        assert np.allclose(found[column], expected[column], rtol=1e-3, atol=1e-4, equal_nan=True), column


def test_a_linear_probe(either_device: torch.device) -> None:
    features, labels = labelled()
    held_out = features[90:], labels[90:]
    options = {"num_classes": 3, "strengths": (1.0, 0.1, 0.01)}
    expected = fit_probe(features[:90], labels[:90], select=held_out, **options)
    found = fit_probe(features[:90], labels[:90], select=held_out, device=either_device, **options)
    assert found.strength == expected.strength
    assert found.path == pytest.approx(expected.path)
    assert torch.allclose(found.weight.cpu(), expected.weight, atol=1e-4)


def test_predictions(either_device: torch.device) -> None:
    backbone, head = build("resnet18", width=16, num_classes=5)
    assert head is not None
    classifier, ids = Classifier(backbone, head, Preprocessing()).eval(), torch.arange(6)
    images = (pixels(6) - pixels(6).amin()).clamp(0, 1).mul(255).byte()
    batches = [Batch(images[rows], ids[rows], ids[rows]) for rows in ids.split(4)]
    expected = forward.predict(classifier, batches, CPU)
    found = forward.predict(classifier, batches, either_device)
    assert torch.equal(found.ids, ids)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)


def test_receptive_fields(either_device: torch.device) -> None:
    """What is propagated and what a gradient reaches, for a network that lies on the device."""
    backbone, images = network(next(iter(FAMILIES))), pixels(4)
    expected, there = effective(backbone, [images]), copy.deepcopy(backbone).to(either_device)
    found = effective(there, [images.to(either_device)])
    assert found.size == expected.size
    assert torch.allclose(found.map.cpu(), expected.map, atol=1e-3)
    by_rules = RFResNet(18, width=8, stem="cifar")
    here = {name: reach for name, (_, reach) in fields(copy.deepcopy(by_rules), 32).items()}
    assert {name: reach for name, (_, reach) in fields(by_rules.to(either_device), 32).items()} == here
    assert by_site(backbone, 32).equals(by_site(there, 32))


@pytest.mark.parametrize("kind", ["channel", "element"])
def test_damage_inside(kind: str, either_device: torch.device) -> None:
    backbone, head = build("resnet18", width=16, num_classes=5)
    assert head is not None
    classifier, ids = Classifier(backbone, head, Preprocessing()).eval(), torch.arange(8)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for device in (CPU, either_device):
        batch = Batch(*(tensor.to(device) for tensor in (images, ids % 5, ids)))
        result = sweep(
            classifier.to(device), [batch], ["stage2", "global"], [kind], levels={kind: (0.2, 0.6)}, seeds=[0]
        )
        found.append(torch.stack([result[site, kind].correct[0].cpu() for site in ("stage2", "global")]))
    assert (found[0] != found[1]).sum() <= 1  # of 32 verdicts, where rounding tips one


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in names() if name in ("byol", "co-byol", "co-dino", "supervised")])
def test_two_steps_of_training(method: str, either_device: torch.device) -> None:
    small = {"co-dino": {"hidden": 32, "bottleneck": 16, "prototypes": 20}, "supervised": {}}
    options = small.get(method, {"hidden": 32, "out": 20})
    losses = []
    for device in (CPU, either_device):
        run = Trainer(resolve(method, **{**RUN, "options": options}), few_digits(), Path(), device)
        with forward.exact_float32():
            losses.append(torch.stack([run.take_step(part) for part in list(run.setup.feed.epoch(0))[:2]]).cpu())
    assert torch.allclose(*losses, rtol=2e-3, atol=2e-3)


class Stop(Exception):
    """What ends a run in its second epoch."""


@pytest.mark.slow
def test_an_interrupted_run_goes_on(either_device: torch.device, tmp_path: Path) -> None:
    def stop(progress: TrainingProgress) -> None:
        if progress.epoch == 2:
            raise Stop

    fields = {**RUN, "options": {"hidden": 32, "out": 20}}
    whole = train("co-byol", few_digits(), out=tmp_path / "whole", device=either_device, **fields)
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        train("co-byol", few_digits(), out=out, device=either_device, on_progress=stop, **fields)
    assert not (out / "model.safetensors").exists()
    resumed = train("co-byol", few_digits(), out=out, device=either_device, resume=True, **fields)
    first, second = (_weights(model.backbone) for model in (whole, resumed))
    assert torch.allclose(first, second, atol=1e-3)  # the same bits on the CPU: test_resume.py


def _weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters()])

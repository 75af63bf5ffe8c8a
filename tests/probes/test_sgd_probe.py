"""The probe by SGD: joint heads equal separate ones, streamed and repeatable, selection on training images alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from probes_models import make_model
from torch import Tensor, nn

from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation import evaluate
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.model import Model
from coss_eval.probes import Compute, extract, fitted_probe, scores
from coss_eval.probes.sgd import ProbeHeads, SgdProtocol, sgd_probe, train_heads
from coss_eval.reports import headline
from coss_eval.reports.results import Results
from coss_eval.store import Store
from coss_eval.tasks.probe.task import Probe
from coss_eval.tasks.task import Subject
from coss_eval.views.crop_files import crop_batches
from coss_eval.views.random_crop import crop, draw_boxes, draw_flips

CPU = torch.device("cpu")
SHORT = SgdProtocol(epochs=2, batch_size=64, lrs=(0.01, 0.1, 1.0))


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Split:
    assert digits.train is not None
    return digits.train.limited(200)


def trained(model: Model, images: Split, protocol: SgdProtocol = SHORT, *, batch_size: int = 256) -> ProbeHeads:
    return train_heads(model, images, protocol, seed=5, device=CPU, batch_size=batch_size)


def by_torch(model: Model, images: Split, lr: float, protocol: SgdProtocol, seed: int) -> nn.Linear:
    """One head and one learning rate, as a training script would have it."""
    (everything,) = images.batches(batch_size=len(images))
    size = everything.images.shape[-1]
    network = Classifier(model.backbone, nn.Identity(), model.preprocessing).eval()
    steps = protocol.epochs * math.ceil(len(images) / protocol.batch_size)
    head: nn.Linear | None = None
    for epoch in range(protocol.epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch, 1]).permutation(len(images)))
        for rows in order.split(protocol.batch_size):
            ids = everything.ids[rows]
            stream = {"seed": seed, "epoch": epoch, "purpose": "probe views"}
            boxes = draw_boxes(protocol.crop(size), ids, (size, size), **stream)
            flips = draw_flips(protocol.crop(size), ids, **stream)
            with torch.no_grad():
                features = network(crop(everything.images[rows], boxes, flips, size))
            if head is None:
                head = nn.Linear(features.shape[1], len(images.classes))
                start = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
                head.weight.data, head.bias.data = start * 0.01, torch.zeros(len(images.classes))
                optimiser = torch.optim.SGD(
                    head.parameters(), lr * protocol.batch_size / 256, momentum=protocol.momentum
                )
                schedule = torch.optim.lr_scheduler.LambdaLR(
                    optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
                )
            optimiser.zero_grad()
            nn.functional.cross_entropy(head(features), everything.labels[rows]).backward()
            optimiser.step()
            schedule.step()
    assert head is not None
    return head


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_heads_trained_together_are_those_trained_alone(model: Model, images: Split, momentum: float) -> None:
    protocol = replace(SHORT, momentum=momentum)
    together = trained(model, images, protocol)
    for place, lr in enumerate(protocol.lrs):
        alone = by_torch(model, images, lr, protocol, seed=5)
        torch.testing.assert_close(together.weight[place], alone.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[place], alone.bias.data, rtol=1e-4, atol=1e-5)


def test_images_stream_through_the_frozen_network(model: Model, images: Split) -> None:
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    sizes: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert not model.backbone.training
        sizes.append(len(inputs[0]))

    handle = model.backbone.register_forward_pre_hook(note)
    model.backbone.train()
    streamed = trained(model, images, batch_size=7)
    assert model.backbone.training
    model.backbone.eval()
    handle.remove()
    assert max(sizes) == 7
    assert sum(sizes) == SHORT.epochs * len(images)  # every image once an epoch, the last batch not left out
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    torch.testing.assert_close(streamed.weight, trained(model, images).weight, rtol=1e-3, atol=1e-5)


def test_a_repeated_run_is_equal_and_another_seed_is_not(model: Model, images: Split) -> None:
    one, two, other = (sgd_probe(model, images, SHORT, Compute(CPU), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.weight, two.weight)
    assert one.path == two.path
    assert not torch.equal(one.weight, other.weight)


INSIDE = replace(SHORT, lrs=(0.1, 1.0, 3.0, 1000.0))  # the best of them is no end


def test_the_last_head_of_the_lr_that_is_best_on_held_out_training_images(model: Model, images: Split) -> None:
    probe = sgd_probe(model, images, INSIDE, Compute(CPU, cache=False), seed=5)
    fit, select = images.holdout(0.1)
    heads = trained(model, fit, INSIDE)  # all epochs, none looked at before the last
    held_out = extract(model, select, device="cpu", cache=False)
    hits = heads.logits(held_out.values["global"]).argmax(2) == held_out.labels[:, None]
    accuracy = hits.double().mean(0).tolist()
    assert probe.path == pytest.approx(dict(zip(INSIDE.lrs, accuracy, strict=True)))
    place = INSIDE.lrs.index(probe.lr)
    assert 0 < place < 3
    assert accuracy[place] == max(accuracy)
    assert torch.equal(probe.weight, heads.weight[place])
    assert (probe.images, probe.held_out) == (len(fit), len(select))
    notes = " ".join(probe.notes())
    assert f"lr {probe.lr:g} for a batch of 256, the best of 4 on {len(select)} held-out" in notes
    assert "of the grid" not in notes
    assert all(f"{lr:g}: {100 * a:.1f}" in notes for lr, a in probe.path.items())


def test_one_lr_is_trained_on_all_training_images(model: Model, images: Split) -> None:
    probe = sgd_probe(model, images, replace(SHORT, lrs=(0.1,)), Compute(CPU), seed=5)
    assert (probe.images, probe.held_out, probe.path) == (len(images), 0, {})
    assert torch.equal(probe.weight, trained(model, images, replace(SHORT, lrs=(0.1,))).weight[0])
    assert probe.notes()[0].endswith("fixed")


class Thumbnail(Backbone):
    """An image's 8 x 8 pixels as its representation: features that SGD reaches the optimum on."""

    dim, local_dim = 192, 3

    def features(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, pixels.shape[-1] // 8)

    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)


@pytest.mark.parametrize(("lrs", "end"), [((0.1, 0.316), "largest"), ((1.0, 3.0), "smallest"), ((0.01, 0.03), None)])
def test_a_grid_whose_best_lr_lies_at_its_end_is_widened_there(
    lrs: tuple[float, float], end: str | None, model: Model, images: Split
) -> None:
    """Heads are independent, so that all of the wider grid trained together have the same accuracies."""
    model, protocol = replace(model, backbone=Thumbnail()).identified(), replace(SHORT, lrs=lrs)
    probe = sgd_probe(model, images, protocol, Compute(CPU, cache=False), seed=5)
    if end is None:  # the two are alike
        assert tuple(probe.path) == lrs
        return
    ratio = lrs[1] / lrs[0]
    beyond = [lrs[1] * ratio**i for i in range(1, 5)] if end == "largest" else [lrs[0] / ratio**i for i in range(1, 5)]
    assert list(probe.path) == pytest.approx(sorted([*lrs, *beyond]))
    assert probe.path[probe.lr] == max(probe.path.values())
    together = sgd_probe(model, images, replace(SHORT, lrs=tuple(probe.path)), Compute(CPU, cache=False), seed=5)
    assert {lr: together.path[lr] for lr in probe.path} == pytest.approx(probe.path)
    torch.testing.assert_close(trained_at(probe.lr, model, images), probe.weight, rtol=1e-4, atol=1e-5)
    assert "the grid of 2 widened to" in " ".join(probe.notes())


def trained_at(lr: float, model: Model, images: Split) -> Tensor:
    return trained(model, images.holdout(0.1)[0], replace(SHORT, lrs=(lr,))).weight[0]


@pytest.mark.slow
def test_on_whole_images_it_comes_close_to_the_optimum(digits: Dataset, model: Model) -> None:
    assert digits.train is not None
    pixels = replace(model, backbone=Thumbnail()).identified()
    whole = SgdProtocol(epochs=20, batch_size=128, crop_min_scale=1.0, flip=0.0)
    test = extract(pixels, digits.test, device="cpu", cache=False)
    by_sgd = sgd_probe(pixels, digits.train, whole, Compute(CPU))
    optimum = fitted_probe(pixels, digits.train, Compute(CPU))
    found = [scores(p.module()(test.values["global"]), test.labels)["top1"] for p in (by_sgd, optimum)]
    assert found[0] == pytest.approx(found[1], abs=0.03)
    assert found[1] > 0.85


@pytest.mark.slow
def test_files_of_any_size_are_cropped_from_the_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (100 + number, 120, 3), np.uint8) // 2 + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "test").symlink_to(tmp_path / "train", target_is_directory=True)
    split = load_dataset(tmp_path).train
    assert split is not None
    assert split.native_size is None
    model = make_model(img_size=16)
    protocol = SgdProtocol(epochs=3, batch_size=5, lrs=(0.1, 1.0))
    one, two = (trained(model, split, protocol, batch_size=size) for size in (5, 2))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-3, atol=1e-5)
    expected = from_files(model, split, protocol)
    torch.testing.assert_close(one.weight, expected.weight, rtol=1e-3, atol=1e-5)
    halved = trained(model, split, replace(protocol, precision="bf16"))
    assert halved.weight.dtype == torch.float32
    assert not torch.equal(halved.weight, one.weight)
    torch.testing.assert_close(halved.weight, one.weight, rtol=0.2, atol=0.02)


def from_files(model: Model, split: Split, protocol: SgdProtocol) -> ProbeHeads:
    """The heads by a plain loop over crops that workers' code makes, new ones in every epoch."""
    heads = ProbeHeads(16, 2, protocol, CPU, seed=5)
    network = Classifier(model.backbone, nn.Identity(), model.preprocessing).eval()
    steps = protocol.epochs * math.ceil(len(split) / protocol.batch_size)
    scales = iter(protocol.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps))
    for epoch in range(protocol.epochs):
        order = np.random.default_rng([5, epoch, 1]).permutation(len(split))
        parts = [order[start : start + protocol.batch_size] for start in range(0, len(order), protocol.batch_size)]
        view = protocol.crop(16)
        for crops in crop_batches(split, parts, [view], seed=5, epoch=epoch, purpose="probe views", workers=0):
            with torch.no_grad():
                features = network(to_float(crops.views[0]))
            heads.step(features, crops.labels, next(scales))
    return heads


def test_of_equally_good_rates_the_smallest(model: Model, images: Split) -> None:
    slow = replace(SHORT, epochs=1, lrs=(1e-12, 2e-12, 3e-12))  # nothing is learnt: all have the accuracy of the start
    assert sgd_probe(model, images, slow, Compute(CPU, cache=False)).lr == 1e-12


def test_a_diverged_probe_is_told(model: Model, images: Split) -> None:
    with pytest.raises(CossError, match=r"diverged at lr 1e\+38; try smaller"):
        sgd_probe(model, images, replace(SHORT, lrs=(1e38,)), Compute(CPU))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 0}, "epochs"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"batch_size": 0}, "batch_size"),
        ({"lrs": ()}, "learning rates"),
        ({"lrs": (0.1, -1.0)}, "learning rates"),
        ({"lrs": (float("nan"),)}, "learning rates"),
        ({"crop_min_scale": 0.0}, "crop_min_scale"),
        ({"flip": 2.0}, "flip"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_what_no_protocol_can_be_is_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        SgdProtocol(**options)  # type: ignore[arg-type]


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="lbfgs"):
        Probe(protocol="lbfg")  # type: ignore[arg-type]


def test_every_field_and_the_seed_are_in_the_key(digits: Dataset, model: Model) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"epochs": 100},
        {"sgd_batch": 256},
        {"lr": (0.1,)},
        {"momentum": 0.0},
        {"crop_min_scale": 0.2},
        {"flip": 0.0},
        {"bf16": True},
    ]
    subject, store = Subject(model, digits, Compute(CPU)), Store("unused")
    tasks = [Probe(protocol="sgd", **change) for change in changes]  # type: ignore[arg-type]
    cells = [task.cells(subject, 0) for task in tasks] + [tasks[0].cells(subject, 1)]
    assert all(len(cell) == 1 for cell in cells)
    assert len({store.key({}, cell) for (cell,) in cells}) == len(cells)
    assert tasks[0].sgd == SgdProtocol()


@pytest.mark.slow
def test_a_report_never_mixes_the_protocols(digits: Dataset, model: Model, tmp_path: Path) -> None:
    small = replace(digits, test=digits.test.limited(50))
    short: dict[str, Any] = {"protocol": "sgd", "sgd_batch": SHORT.batch_size, "lr": SHORT.lrs}
    sgd = [Probe(epochs=epochs, **short) for epochs in (1, 2)]
    run = evaluate(model, small, [Probe(fractions=()), *sgd], out=tmp_path / "run", device="cpu")
    assert not run.failures
    shown = [score.name for score in headline.columns(Results(Store(run.path)))]
    assert shown == ["linear probe", "SGD linear probe, 1 epochs", "SGD linear probe, 2 epochs", "kNN"]
    table = run.table()
    assert set(table["checkpoint"]) == {model.name}
    assert (table["metric"] == "top1").sum() == 1
    assert list(table.loc[table["metric"] == "sgd_top1", "epochs"]) == [1, 2]
    alone = evaluate(model, small, sgd[:1], out=tmp_path / "alone", device="cpu")
    assert [score.name for score in headline.columns(Results(Store(alone.path)))] == ["SGD linear probe, 1 epochs"]
    report = (tmp_path / "alone" / "report.md") if alone.report() else None
    assert report is not None
    assert "SGD linear probe top-1" in report.read_text()

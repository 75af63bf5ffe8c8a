"""The ten things that a new user does in a notebook, with what is in hand there, and with public imports only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import coss_eval as ce
from coss_eval.store import Cell
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.task import Result, Task

RNG = np.random.default_rng(0)
LABELS = np.arange(90) % 3
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
IMAGES = (COLOURS[LABELS][:, None, None] + RNG.integers(-50, 50, (90, 32, 32, 3))).astype(np.uint8)
TRAIN, TEST = (IMAGES[:60], LABELS[:60]), (IMAGES[60:], LABELS[60:])
FOG = Corruptions(("fog",), (3,))

pytestmark = pytest.mark.filterwarnings("ignore::coss_eval.errors.CossWarning")


class MyNetwork(nn.Module):
    """A small network as people write them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class MyDataset(Dataset[tuple[Any, int]]):
    """PIL images with labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def network(seed: int = 0) -> MyNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MyNetwork()


def pixels() -> Tensor:
    """The test images as a network takes them, (30, 3, 32, 32) in [0, 1]."""
    return torch.from_numpy(TEST[0]).permute(0, 3, 1, 2) / 255


def test_1_my_network_on_my_arrays_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ce.evaluate(network(), (TRAIN, TEST), ["probe", FOG], out=tmp_path, device="cpu")
    table = run.table()
    assert run.failures == ()
    assert table["value"][table["metric"] == "accuracy"].max() > 0.9  # colours are easily told apart
    assert set(table["model"]) == {"MyNetwork"}
    assert "cells to compute; estimate" in capfd.readouterr().err
    again = ce.evaluate(network(), (TRAIN, TEST), ["probe", FOG], out=tmp_path, device="cpu")
    assert again.table().equals(table)
    assert capfd.readouterr().err == ""  # nothing was computed


def test_2_arrays_tensors_and_datasets_give_the_same_numbers(tmp_path: Path) -> None:
    def tensors(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels))

    given = {"arrays": (TRAIN, TEST), "pictures": (MyDataset(*TRAIN), MyDataset(*TEST))}
    given["tensors"] = (tensors(*TRAIN), tensors(*TEST))  # type: ignore[assignment]
    tables = [
        ce.evaluate(network(), data, [FOG], out=tmp_path / kind, device="cpu", quiet=True).table()
        for kind, data in given.items()
    ]
    for table in tables[1:]:
        pd.testing.assert_series_equal(table["value"], tables[0]["value"])


def test_3_say_how_my_network_is_normalised_and_use_its_own_head() -> None:
    mine = network().eval()
    model = ce.as_model(mine, mean=(0.5,) * 3, std=(0.25,) * 3, name="mine", head="own")
    classifier = ce.fit_classifier(model, TEST, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(classifier(pixels()), mine((pixels() - 0.5) / 0.25), rtol=1e-4, atol=1e-4)
    assert repr(model).startswith("Model(mine: MyNetwork, 16 features, its own Linear head")


@pytest.mark.slow
def test_4_a_checkpoint_of_mine_and_a_mistake_in_its_name(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.save({"state_dict": resnet18(num_classes=3).state_dict()}, tmp_path / "mine.pth")
    features = ce.extract(tmp_path / "mine.pth", TEST, device="cpu")
    assert features.values["global"].shape == (30, 512)
    with pytest.raises(ce.errors.CossError, match=r"moin\.pth") as caught:
        ce.extract(tmp_path / "moin.pth", TEST, device="cpu")
    assert "\n" not in str(caught.value)


def test_5_attack_my_network_and_look_at_the_images() -> None:
    mine, labels = network().eval(), torch.from_numpy(TEST[1])
    result = ce.attacks.pgd(mine, pixels(), labels, [2 / 255, 8 / 255], steps=3)
    adversarial = result.images(8 / 255)
    assert adversarial.shape == pixels().shape
    assert (adversarial - pixels()).abs().max() <= 8 / 255 + 1e-6
    assert result.robust_accuracy[1] <= result.robust_accuracy[0]


def test_6_corrupt_my_images_also_by_a_function_of_mine(tmp_path: Path) -> None:
    def darker(images: Tensor, condition: Any, draws: Any) -> Tensor:
        return images.float() * (1 - 0.15 * condition.severity)

    batch = torch.from_numpy(TEST[0]).permute(0, 3, 1, 2)
    foggy, dark = (ce.corruptions.corrupt(batch, name, 3) for name in ("fog", darker))
    assert foggy.shape == dark.shape == batch.shape
    torch.testing.assert_close(dark.float(), 0.55 * batch.float(), atol=1, rtol=0)


@dataclass(frozen=True)
class Mirror(Task):
    """Accuracy on mirrored images."""

    name = "mirror"

    def cells(self, subject: Any, seed: int) -> list[Cell]:
        return [Cell(self.name, {})]

    def measure(self, cell: Cell, subject: Any) -> Result:
        ids, right = list[int](), list[bool]()
        for batch in subject.batches():
            ids += batch.ids.tolist()
            right += (subject.classifier(batch.images.flip(-1) / 255).argmax(1) == batch.labels).tolist()
        return Result.of_verdicts("accuracy", np.array(ids), [({}, np.array(right))])


def test_7_a_metric_of_my_own(tmp_path: Path) -> None:
    run = ce.evaluate(network(), (TRAIN, TEST), [Mirror()], out=tmp_path, device="cpu", quiet=True)
    assert run.failures == ()
    assert run.table().set_index("metric")["value"]["accuracy"] > 0.9


def test_8_features_and_how_alike_two_networks_are() -> None:
    first, second = (ce.extract(network(seed), pixels(), device="cpu").values["global"] for seed in (0, 1))
    assert first.shape == second.shape == (30, 16)
    assert ce.similarity.cka(first, first) == pytest.approx(1)
    assert ce.similarity.cka(first, second) < 1


def test_9_look_inside_my_network() -> None:
    mine = network()
    assert ce.receptive_field.theoretical(mine, 32)["rf"].dropna().tolist()[-1] > 1
    assert 0 < ce.receptive_field.effective(mine, [pixels()]).size < 32
    redundancy = ce.redundancy.measure(mine, TEST)
    assert redundancy["n"].unique().tolist() == [30]
    classifier = ce.fit_classifier(mine, (TRAIN, TEST), device="cpu")
    clean = classifier(pixels())
    with ce.internal.corrupted(classifier, "prepool", "channel", 0.5):
        assert not torch.equal(classifier(pixels()), clean)
    assert torch.equal(classifier(pixels()), clean)


@pytest.mark.slow
def test_10_train_a_representation_on_my_images_compare_and_report(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"preset": "digits-tiny", "epochs": 1, "batch_size": 20, "width": 8, "probe_every": 0}
    trained = ce.train("simclr", MyDataset(*TRAIN), out=tmp_path / "run", device="cpu", quiet=True, **tiny)
    runs = [
        ce.evaluate(model, (TRAIN, TEST), ["probe"], out=tmp_path / name, device="cpu", quiet=True)
        for name, model in {"trained": trained, "mine": network()}.items()
    ]
    assert {"difference", "p"} <= set(ce.compare(*runs).columns)
    assert (tmp_path / "trained" / "report.md") in runs[0].report()


MISTAKES: dict[str, tuple[Any, Any, str]] = {
    "normalised pixels": (network, lambda: (IMAGES / 127.5 - 1, LABELS), "leave the normalisation out"),
    "pixels to 255": (network, lambda: (IMAGES.astype(float), LABELS), "divide by 255"),
    "labels forgotten": (network, lambda: IMAGES, "labels are missing"),
    "a loader": (network, lambda: torch.utils.data.DataLoader(MyDataset(*TEST)), "give its dataset"),
    "a class": (lambda: MyNetwork, lambda: TEST, r"MyNetwork\(...\)"),
    "a state dict": (lambda: network().state_dict(), lambda: TEST, "a state dict has no network"),
    "no such name": (lambda: "torchvision:resnet17", lambda: TEST, "resnet18"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake: str, tmp_path: Path) -> None:
    model, data, message = MISTAKES[mistake]
    with pytest.raises(ce.errors.UsageError, match=message) as caught:
        ce.evaluate(model(), data(), ["probe"], out=tmp_path, device="cpu")
    assert "\n" not in str(caught.value)

"""Nothing is decided by a name: networks of one's own whose names say ViT, ResNet or RF-ResNet and are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.errors import UsageError
from coss_eval.models.architecture import Architecture, built_for_a_side, takes_stem
from coss_eval.models.classifier import Preprocessing
from coss_eval.training.config import resolve
from coss_eval.training.setup import Setup

NETWORKS = """
from torch import nn
from torchvision.transforms import Normalize

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def fixed():
    return nn.Sequential(nn.Conv2d(3, 2, 32, 32), nn.Flatten(), nn.Linear(2, 4), nn.Linear(4, 4))

def normalising():
    return nn.Sequential(Normalize((0.5,) * 3, (0.2,) * 3), net())
"""
NAMES = ("activity", "resnet_like", "rf29_resnet18_like", "vit_b_16_like", "untrained_nets")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_trained_as_what_it_is(name: str) -> None:
    config = resolve("dino", "digits-tiny", arch=f"{name}:net", small_views=2)
    assert (config.stem, config.width) == ("imagenet", 64)  # not the preset's, which are a ResNet's
    task = Setup(config, ce.load_dataset("digits"), torch.device("cpu"))
    assert {view.size for view in task.views} == {16, 32}  # it takes any size
    assert task.model.architecture == Architecture(f"{name}:net")
    assert built_for_a_side(f"{name}:fixed", 32)
    assert not built_for_a_side(f"{name}:fixed", 16)
    assert not Architecture(f"{name}:net").is_vit


@pytest.mark.parametrize(
    ("arch", "side", "stem"),
    [
        ("vit_b_16", True, False),
        ("torchvision:vit_d24_l2_h2_p8", True, False),
        ("maxvit_t", False, False),
        ("resnext50_32x4d", False, True),
        ("rf29_resnet18", False, True),
        ("timm:vit_tiny_patch16_224", True, False),
        ("timm:mobilevit_xxs", False, False),
        ("timm:resnet10t", False, False),  # a stem of three convolutions
        ("timm:resnet18", False, True),
    ],
)
def test_known_networks_say_what_they_are(arch: str, side: bool, stem: bool) -> None:
    assert (built_for_a_side(arch, 32), takes_stem(arch)) == (side, stem)


@pytest.mark.usefixtures("own")
def test_a_checkpoint_is_not_what_its_file_is_called(tmp_path: Path) -> None:
    """A file named untrained_then_tuned, with its own normalisation, is no untrained network with an assumed one."""
    model = ce.load_model("pixels:8")
    assert model.preprocessing.said_by is None
    network = Architecture("resnet18", "cifar", 8).network()
    state = network.state_dict() | {"ASSUMED.mean": torch.full((3,), 0.5), "ASSUMED.std": torch.full((3,), 0.25)}
    torch.save(state, tmp_path / "untrained_then_tuned.pth")
    loaded = ce.load_model(tmp_path / "untrained_then_tuned.pth")
    assert (loaded.name, loaded.layout) == ("untrained_then_tuned", "state dict")
    assert loaded.preprocessing.said_by is not None
    assert loaded.untrained(0).layout == "untrained"
    assert Preprocessing(said_by="ASSUMED by a person").source == "ASSUMED by a person"


@pytest.mark.usefixtures("own")
def test_who_says_the_normalisation_is_no_matter_of_words() -> None:
    """A network that normalises by itself refuses a person's mean and std, not a text that says "flag"."""
    worded, asked = Preprocessing(said_by="flag"), Preprocessing(said_by="the paper", asked=True)
    assert make_model("activity:normalising", preprocessing=worded).preprocessing.std == (1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="normalises its input by itself"):
        make_model("activity:normalising", preprocessing=asked)
    assert worded.protocol() == asked.protocol()  # the same numbers, whoever says them

"""Other people's checkpoints, networks, images and data sets: each line is one of a kind that once failed."""

from __future__ import annotations

import pickle
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import wild_files
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from wild_networks import POOLINGS, CifarNet, ForOneSide, Pools, PreActNet, WideNet

import coss_eval as ce
from coss_eval.checkpoints.files import read_checkpoint
from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.errors import CossError, UsageError
from coss_eval.models.hooks import captured, hooked
from coss_eval.models.wrap import wrap
from coss_eval.models.zoo import network as make_network


def pixels(side: int = 32, channels: int = 3, count: int = 2) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def assert_same_logits(model: Any, network: nn.Module, images: Tensor) -> None:
    """The Model's backbone and head against the network's own forward pass."""
    assert model.head is not None
    with torch.no_grad():
        expected = network(images)
        assert expected.std(0).max() > 1e-3
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(model.head(model.backbone(images)), expected, rtol=0, atol=1e-4 * scale)


@cache
def narrow_resnet() -> nn.Module:
    """torchvision's ResNet-18 of width 16 and 10 classes."""
    network: Any = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    network.inplanes = 16
    network.conv1, network.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    for i in range(4):
        setattr(network, f"layer{i + 1}", network._make_layer(BasicBlock, 16 * 2**i, 2, stride=2 if i else 1))
    network.fc = nn.Linear(128, 10)
    return wild_files.randomised(network)


@pytest.mark.parametrize("kind", wild_files.containers(nn.Identity()))
def test_one_network_in_any_container(kind: str, tmp_path: Path) -> None:
    network = narrow_resnet()
    path = wild_files.containers(network)[kind](network.state_dict(), tmp_path)
    model = ce.load_model(path)
    assert_same_logits(model, network, pixels(64))
    assert model.arch == "resnet18"


@pytest.mark.parametrize("kind", wild_files.OTHER_FORMATS)
def test_another_format_is_told_as_what_it_is(kind: str, tmp_path: Path) -> None:
    name, write, message = wild_files.OTHER_FORMATS[kind]
    with pytest.raises(CossError, match=message) as raised:
        ce.load_model(write(tmp_path / name))
    assert "\n" not in str(raised.value)
    assert "damaged" not in str(raised.value)


@pytest.mark.slow
def test_an_archive_that_would_fill_the_disk_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.pth", "w") as file,
    ):
        for _ in range(1100):
            file.write(bytes(2**20))
    with pytest.raises(CossError, match="would unpack to"):
        ce.load_model(path)


def test_a_pickle_that_names_one_container_at_every_depth_ends(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"weight": 1}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "bomb.pth")
    with pytest.raises(CossError, match="more than"):
        flatten(read_checkpoint(tmp_path / "bomb.pth"))


def test_a_plain_pickle_cannot_smuggle_code_into_a_storage(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(_Touch(tmp_path / "it-ran"), 2),)

    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"weight": Payload()}))
    with pytest.raises(CossError):
        ce.load_model(tmp_path / "net.pkl")
    assert not (tmp_path / "it-ran").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/net.pth", "not fetched from here: download it"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf download timm/resnet18.a1_in1k --local-dir FOLDER"),
        ("timm:hf_hub:timm/resnet18.a1_in1k", "hf download timm/resnet18.a1_in1k"),
        ("https://huggingface.co/facebook/dinov2-small", "hf download facebook/dinov2-small"),
        ("facebook/dinov2-small", "hf download facebook/dinov2-small"),
    ],
)
def test_what_is_not_fetched_says_how_to_get_it(source: str, message: str) -> None:
    with pytest.raises(CossError, match=message):
        ce.load_model(source)


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(UsageError, match=r"and \d+ more") as raised:
        ce.load_model("torchvision:zzzzqqqq")
    assert len(str(raised.value)) < 600


CIFAR_NETWORKS = {
    "ResNet-20": (lambda: CifarNet(3), "cifar_resnet20", None),
    "ResNet-32, padded at the end": (
        lambda: CifarNet(5, at_end=True),
        "cifar_resnet32_padend",
        "cifar_resnet32_padend",
    ),
    "ResNet-44, fc": (lambda: CifarNet(7, head="fc"), "cifar_resnet44", None),
    "ResNet-56, option B": (lambda: CifarNet(9, "downsample", "fc"), "cifar_resnet56_projection", None),
    "ResNet-110": (lambda: CifarNet(18), "cifar_resnet110", None),
    "ResNet-20, shortcut B": (lambda: CifarNet(3, "shortcut"), "cifar_resnet20_projection", None),
    "PreResNet-20": (lambda: PreActNet(3), "cifar_preresnet20_rawconv", None),
    "PreResNet-110": (lambda: PreActNet(18), "cifar_preresnet110_rawconv", None),
    "PreActResNet-18": (lambda: PreActNet(2, raw=False, four=True), "cifar_preresnet18_s4_w64_conv_bare", None),
    "WRN-16-2": (WideNet, "cifar_preresnet16_x2_conv", None),
}


@pytest.mark.parametrize("kind", CIFAR_NETWORKS)
def test_cifar_resnets_are_recognised_with_their_locations(kind: str, tmp_path: Path) -> None:
    make, name, flag = CIFAR_NETWORKS[kind]
    network = wild_files.randomised(make())
    torch.save({"state_dict": network.state_dict(), "epoch": 200}, tmp_path / "net.th")
    model = ce.load_model(tmp_path / "net.th", arch=flag)
    assert_same_logits(model, network, pixels())
    assert model.arch == name
    side = 4 if "s4" in name else 8
    assert model.backbone.represent(pixels()).local.shape[1] == side**2
    assert list(model.backbone.sites)[:3] == ["stage1", "stage2", "stage3"]
    assert model.untrained().arch == name
    if "pad" not in name and "conv" not in name and "projection" not in name:
        assert any("shortcuts ASSUMED" in note for note in model.report.notes)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_idiom_of_global_pooling_keeps_the_locations(pooling: str) -> None:
    network = wild_files.randomised(Pools(pooling))
    with torch.no_grad():
        expected = network(pixels())
        units = []
        with hooked([(network.linear, lambda _module, args, _output: units.append(args[0]))]):
            network(pixels())
        backbone, head = wrap(network, img_size=32)
        local, global_ = backbone.represent(pixels())
    assert local.shape == (2, 64, 64)
    torch.testing.assert_close(global_, units[0], rtol=1e-4, atol=1e-5)
    assert head is not None
    torch.testing.assert_close(head(global_), expected, rtol=1e-4, atol=1e-4)
    assert list(backbone.sites) == ["stage1", "stage2", "prepool", "global"]
    with captured(backbone, list(backbone.sites.values())) as seen, torch.no_grad():
        backbone(pixels())
    assert [seen[f"stage{i}"].shape[2:] for i in (1, 2)] == [(32, 32), (16, 16)]
    if pooling in ("einops", "a branch on values", "an int of the shape"):
        assert "forward hooks" in backbone.note


def test_a_network_for_one_unusual_side_is_tried_at_it() -> None:
    backbone, _ = wrap(ForOneSide().eval())
    assert backbone.img_size == 256


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "timm:res2net50_26w_4s", "timm:halonet26t"])
def test_published_networks_inside_ones_own_are_taken_apart(name: str) -> None:
    network = make_network(name).eval()
    own = nn.Sequential(nn.Identity(), network).eval()
    images = pixels({"timm:halonet26t": 256, "inception_v3": 299}.get(name, 224), count=1)
    with torch.no_grad():
        expected = network(images)
        backbone, head = wrap(own)
        assert head is not None
        torch.testing.assert_close(head(backbone(images)), expected, rtol=1e-4, atol=1e-4)
        assert backbone.represent(images).local.shape[1] > 1

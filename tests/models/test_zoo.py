"""Architectures by name, stems and widths, users' factories, published weights from files, and every wrong call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from build_networks import build
from safetensors.torch import save_file
from torch import nn

from coss_eval.checkpoints.load import load_model, make_model, save_model
from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo

FACTORIES = """
import torch
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(6, 4)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
def needs_more(depth): return Small()
def not_a_network(): return 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory."""
    (tmp_path / "zoo_test_networks.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return "zoo_test_networks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options", "dim"),
    [
        ("resnet18", {}, 512),
        ("torchvision:resnet18", {"stem": "cifar"}, 512),
        ("resnet18", {"width": 16}, 128),
        ("resnet34", {"width": 16, "stem": "cifar"}, 128),
        ("rf29_resnet18", {}, 512),
        ("rf29_resnet18", {"width": 16}, 128),
        ("vit_b_32", {"img_size": 64}, 768),
        ("mobilenet_v3_small", {}, 1024),
        ("timm:resnet10t", {}, 512),
        ("timm:resnet18", {"stem": "cifar"}, 512),
        ("timm:vit_tiny_patch16_224", {"img_size": 64}, 192),
        ("timm:convnext_atto", {"img_size": 64}, 320),
    ],
)
def test_build_by_name_from_a_seed_without_touching_the_global_generator(
    arch: str, options: dict[str, Any], dim: int
) -> None:
    state = torch.random.get_rng_state()
    backbone, head = build(arch, num_classes=7, seed=3, **options)
    again, _ = build(arch, num_classes=7, seed=3, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    assert head is not None
    backbone.eval()
    with torch.no_grad():
        global_ = backbone(torch.randn(2, 3, 64, 64))
    assert global_.shape == (2, dim) == (2, backbone.dim)
    assert head(global_).shape == (2, 7)


def test_without_a_number_of_classes_there_is_no_head() -> None:
    assert build("resnet18", width=16)[1] is None


def test_seeds_are_seeds() -> None:
    first, same, other, lent = (zoo.network("resnet18", seed=seed).conv1.weight for seed in (0, 0, 1, None))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(zoo.network("resnet18", seed=None).conv1.weight, first)
    assert not torch.equal(lent, first)


@pytest.mark.parametrize(
    ("stem", "kernel", "padding", "grid"), [("imagenet", 7, 3, 2), ("cifar", 3, 1, 8), ("solo-cifar", 3, 2, 9)]
)
def test_stems(stem: Any, kernel: int, padding: int, grid: int) -> None:
    network = zoo.network("resnet18", stem=stem)
    assert network.conv1.kernel_size == (kernel, kernel)
    assert network.conv1.padding == (padding, padding)
    backbone, _ = build("resnet18", stem=stem)
    assert backbone.eval().features(torch.zeros(1, 3, 64, 64)).shape[-1] == grid


@pytest.mark.parametrize("width", [16, 128])
def test_width_keeps_torchvisions_key_names(width: int) -> None:
    scaled, plain = zoo.network("resnet18", width=width, num_classes=5), zoo.network("resnet18", num_classes=5)
    assert [key for key in scaled.state_dict() if not key.startswith("mlp")] == list(plain.state_dict())
    assert scaled.conv1.out_channels == width
    assert scaled.fc.in_features == 8 * width


def test_an_own_factory_in_the_current_directory(own_module: str) -> None:
    backbone, head = build(f"{own_module}:Small", num_classes=4)
    assert (backbone.dim, backbone.local_dim) == (6, 6)
    assert isinstance(head, nn.Linear)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options", "says"),
    [
        ("resnet81", {}, "did you mean resnet18"),
        ("vit_tiny_patch16_224", {}, "did you mean timm:vit_tiny_patch16_224"),
        ("timm:resnet10", {}, "resnet10t"),
        ("vgg11", {"stem": "cifar"}, "leave --stem out"),
        ("vgg11", {"width": 32}, "leave --width at 64"),
        ("rf99_resnet50", {"stem": "cifar"}, "pass --stem imagenet"),
        ("no_such_package:net", {}, "cannot import no_such_package"),
        ("zoo_test_networks:Smal", {}, "did you mean Small"),
        ("zoo_test_networks:needs_more", {}, "without arguments"),
        ("zoo_test_networks:not_a_network", {}, "not int"),
    ],
)
def test_wrong_names_and_options_are_explained_in_one_line(
    own_module: str, arch: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build(arch, **options)
    assert "\n" not in str(caught.value)


def test_imagenet_wnids() -> None:
    wnids = zoo.imagenet_wnids()
    assert len(set(wnids)) == 1000
    assert wnids == tuple(sorted(wnids))
    assert wnids[:2] == ("n01440764", "n01443537")  # tench, goldfish


def saved(network: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return path


# spec, file name, (img_size, crop fraction, interpolation) of the entry that the file name tells
PUBLISHED = [
    ("torchvision:resnet18", "resnet18-f37072fd.pth", (224, 0.875, "bilinear")),
    ("torchvision:resnet50", "resnet50-0676ba61.pth", (224, 0.875, "bilinear")),
    ("torchvision:resnet50", "any-other-name.safetensors", (224, 224 / 232, "bilinear")),
    ("torchvision:resnet50:IMAGENET1K_V1", "any-other-name.pth", (224, 0.875, "bilinear")),
    ("torchvision:efficientnet_b0", "a.pth", (224, 0.875, "bicubic")),
    ("timm:resnet10t", "a.pth", (176, 0.875, "bicubic")),
    ("timm:vit_tiny_patch16_224", "a.safetensors", (224, 0.9, "bicubic")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "file", "geometry"), PUBLISHED)
def test_published_weights_from_a_local_file(spec: str, file: str, geometry: tuple[Any, ...], tmp_path: Path) -> None:
    source, name = spec.split(":")[:2]
    network: nn.Module = (
        timm.create_model(name) if source == "timm" else torchvision.models.get_model(name, weights=None)
    ).eval()
    backbone, head, classes, preprocessing = zoo.pretrained(spec, saved(network, tmp_path / file))
    assert classes == zoo.imagenet_wnids()
    assert (preprocessing.img_size, preprocessing.crop_pct, preprocessing.interpolation) == geometry
    assert preprocessing.source == "checkpoint"
    assert head is not None
    pixels = torch.randn(1, 3, geometry[0], geometry[0])
    with torch.no_grad():
        assert torch.allclose(head(backbone(pixels)), network(pixels), atol=1e-5)


def test_the_preprocessing_is_the_weights_own_transforms(tmp_path: Path) -> None:
    """A 300 x 200 image through Preprocessing's geometry keeps the size that torchvision's transforms give it."""
    entry = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    path = saved(torchvision.models.resnet50(), tmp_path / Path(entry.url).name)
    preprocessing = zoo.pretrained("torchvision:resnet50", path).preprocessing
    shown = entry.transforms()
    assert round(preprocessing.geometry.size / preprocessing.geometry.crop_pct) == shown.resize_size[0]
    assert (preprocessing.mean, preprocessing.std) == (tuple(shown.mean), tuple(shown.std))


@pytest.mark.slow
def test_old_key_names_of_published_densenets_load(tmp_path: Path) -> None:
    network = torchvision.models.densenet121()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in network.state_dict().items()
    }
    torch.save(old, tmp_path / "a.pth")
    assert zoo.pretrained("torchvision:densenet121", tmp_path / "a.pth").backbone.dim == 1024


def test_published_weights_that_do_not_fit_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = saved(zoo.network("resnet34"), tmp_path / "wrong.pth")
    (tmp_path / "broken.pth").write_bytes(wrong.read_bytes()[:1000])
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "training.pth")
    for name, says in {
        "wrong.pth": r"0 keys missing, \d+ unexpected",
        "broken.pth": "not a readable file",
        "broken.safetensors": "not a readable file",
        "training.pth": "not a plain state dict",
        "absent.pth": "no weights at",
    }.items():
        with pytest.raises(CossError, match=says) as caught:
            zoo.pretrained("torchvision:resnet18", tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "weights", "says"),
    [
        ("torchvision:resnet81", None, "did you mean"),
        ("torchvision:resnet50:IMAGENET1K_V3", None, "did you mean"),
        ("tensorflow:resnet50", None, "torchvision"),
        ("timm:no_such_network", None, "unknown timm architecture"),
    ],
)
def test_wrong_names_of_published_networks(spec: str, weights: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        zoo.pretrained(spec, weights)


def test_without_a_network_it_asks_for_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CossError, match="pass a local file") as caught:
        zoo.pretrained("torchvision:squeezenet1_0", "IMAGENET1K_V1")
    assert "\n" not in str(caught.value)


def test_a_network_asked_for_with_torchvisions_prefix_is_read_back_without_a_flag(tmp_path: Path) -> None:
    made = make_model("torchvision:resnet18", width=8)
    save_model(made, tmp_path / "model.safetensors")
    for arch in (None, "resnet18", "torchvision:resnet18"):
        read = load_model(tmp_path / "model.safetensors", arch=arch)
        assert (read.arch, read.sha256) == ("resnet18", made.sha256)


def test_our_own_files_take_the_mean_of_the_tokens_where_it_is_asked_for(tmp_path: Path) -> None:
    save_model(make_model("vit_d32_l2_h2_p8", img_size=32, classes=["a", "b"]), tmp_path / "vit.safetensors")
    model = load_model(tmp_path / "vit.safetensors", pooling="mean")
    local, global_ = model.backbone.represent(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(global_, local.mean(dim=1))
    assert (model.head, model.classes) == (None, None)  # made for the class token
    assert model.architecture is not None
    assert model.architecture.pooling == "mean"
    save_model(model, tmp_path / "mean.safetensors")
    assert load_model(tmp_path / "mean.safetensors").sha256 == model.sha256


@pytest.mark.parametrize(
    ("arch", "fields", "flags", "says"),
    [
        ("resnet18", {"stem": "cifar", "width": 8}, {"stem": "solo-cifar"}, "its stem is cifar; leave --stem"),
        ("rf29_resnet18", {"width": 8}, {"stem": "solo-cifar"}, "its stem is cifar or imagenet; leave --stem"),
        ("resnet18", {"width": 8}, {"width": 64}, "its width is 8; leave --width 64 out"),
        ("vit_d32_l2_h2_p8", {"img_size": 32}, {"img_size": 48}, "side 32 only; leave --img-size 48 out"),
        ("resnet18", {"width": 8}, {"pooling": "mean"}, "pooling 'mean' is for token sequences"),
    ],
)
def test_what_our_own_files_already_say_is_not_overruled(tmp_path: Path, arch: str, fields, flags, says: str) -> None:
    save_model(make_model(arch, **fields), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=says):
        load_model(tmp_path / "model.safetensors", **flags)


def test_what_our_own_files_say_may_be_said_again(tmp_path: Path) -> None:
    save_model(make_model("rf29_resnet18", width=8), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", stem="cifar", width=8, img_size=64).arch == "rf29_resnet18"

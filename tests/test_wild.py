"""Other people's checkpoints, networks, images and data sets: each line is one of a kind that once failed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import wild_files
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from wild_networks import (
    POOLINGS,
    CifarNet,
    DINOv3,
    ForOneSide,
    GreyNet,
    HuggingFaceViT,
    OpenAIResNet,
    OpenAIViT,
    Pools,
    PreActNet,
    WideNet,
)

import coss_eval as ce
from coss_eval import reports
from coss_eval.checkpoints.files import read_checkpoint
from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.checkpoints.unpickle import HostileCheckpoint
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import Classifier
from coss_eval.models.hooks import captured, hooked
from coss_eval.models.wrap import wrap
from coss_eval.models.zoo import imagenet_wnids
from coss_eval.models.zoo import network as make_network
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions


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


@pytest.mark.slow
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
    with pytest.raises(HostileCheckpoint, match="nothing was run, do not load it"):
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


ODD_TENSORS: dict[str, tuple[Any, str]] = {
    "without values": (lambda t: t.to("meta"), "has a shape and no values"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "quantised to integers: give the weights",
    ),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_without_their_numbers_are_told(kind: str, tmp_path: Path) -> None:
    change, message = ODD_TENSORS[kind]
    state = {key: change(value) if value.ndim == 4 else value for key, value in narrow_resnet().state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CossError, match=f"net.pth: conv1.weight .*{message}"):
        ce.load_model(tmp_path / "net.pth")


def test_sparse_tensors_are_what_they_hold(tmp_path: Path) -> None:
    state = {
        key: value.to_sparse() if value.ndim == 4 else value for key, value in narrow_resnet().state_dict().items()
    }
    torch.save(state, tmp_path / "net.pth")
    assert_same_logits(ce.load_model(tmp_path / "net.pth"), narrow_resnet(), pixels(64))


def test_adapters_single_arrays_and_misspelt_files_say_what_to_do(tmp_path: Path) -> None:
    layer = "encoder.layer.0.attention.attention.query"
    torch.save(
        {f"{layer}.lora_A.weight": torch.zeros(4, 24), f"{layer}.lora_B.weight": torch.zeros(24, 4)}, tmp_path / "a.pth"
    )
    np.save(tmp_path / "b.npy", {"weight": np.zeros(3)}, allow_pickle=True)  # type: ignore[arg-type]
    for name, message in {
        "a.pth": "LoRA adapters alone: merge them",
        "b.npy": r"one array of numpy: save .* numpy\.savez",
        "a.pht": r"does not exist; did you mean a\.pth\?",
    }.items():
        with pytest.raises(CossError, match=message):
            ce.load_model(tmp_path / name)


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
    "PreResNet-20": (lambda: PreActNet((3, 3, 3)), "cifar_preresnet20_rawconv", None),
    "PreResNet-110": (lambda: PreActNet((18, 18, 18)), "cifar_preresnet110_rawconv", None),
    "PreResNet-29, bottlenecks, bn1 at the end": (
        lambda: PreActNet((3, 3, 3), bottleneck=True, norm="bn1"),
        "cifar_preresnet29b_rawconv",
        None,
    ),
    "PreActResNet-18": (
        lambda: PreActNet((2, 2, 2, 2), 64, raw=False, norm=""),
        "cifar_preresnet18_s4_w64_conv_bare",
        None,
    ),
    "PreActResNet-34": (
        lambda: PreActNet((3, 4, 6, 3), raw=False, norm=""),
        "cifar_preresnet34_s3-4-6-3_conv_bare",
        None,
    ),
    "PreActResNet-50": (
        lambda: PreActNet((3, 4, 6, 3), raw=False, bottleneck=True, norm=""),
        "cifar_preresnet50b_s3-4-6-3_conv_bare",
        None,
    ),
    "WRN-16-2": (WideNet, "cifar_preresnet16_x2_conv", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CIFAR_NETWORKS)
def test_cifar_resnets_are_recognised_with_their_locations(kind: str, tmp_path: Path) -> None:
    make, name, flag = CIFAR_NETWORKS[kind]
    network = wild_files.randomised(make())
    torch.save({"state_dict": network.state_dict(), "epoch": 200}, tmp_path / "net.th")
    model = ce.load_model(tmp_path / "net.th", arch=flag)
    assert_same_logits(model, network, pixels())
    assert model.arch == name
    side = 4 if "_s" in name else 8
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
    if pooling == "GeM" and torch.__version__.startswith("2.6."):  # which traces no tuple of sizes
        assert "found no global pooling to cut it at" in backbone.note
        assert local.shape == (2, 1, 64)
        return
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


def hugging_face_folder(network: nn.Module, state: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    mean = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(mean))
    return folder


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2 registers"])
@pytest.mark.parametrize("renamed", [False, True])
def test_transformers_of_hugging_face(kind: str, renamed: bool, tmp_path: Path) -> None:
    network = HuggingFaceViT(kind)
    network.load_state_dict(wild_files.randomised(network).state_dict())
    state = {f"model.{key}" if renamed else key: value for key, value in network.state_dict().items()}
    config = {"hidden_size": 24, "num_attention_heads": 3, "layer_norm_eps": network.eps, "image_size": 32}
    model = ce.load_model(hugging_face_folder(network, state, tmp_path, config))
    assert model.preprocessing.mean == (0.5, 0.4, 0.3)
    if "dinov2" in kind:
        with torch.no_grad():
            torch.testing.assert_close(model.backbone(pixels()), network(pixels()), rtol=1e-4, atol=1e-4)
    else:
        assert_same_logits(model, network, pixels())
    assert model.backbone.represent(pixels()).local.shape == (2, 16, 24)
    assert model.untrained().arch == model.arch


def test_heads_that_no_config_tells_are_asked_for_by_timms_whole_name(tmp_path: Path) -> None:
    network = HuggingFaceViT("deit")
    network.load_state_dict(wild_files.randomised(network).state_dict())
    torch.save(network.state_dict(), tmp_path / "deit.bin")
    with pytest.raises(
        UsageError, match=r"how many attention heads its ViT of 24 channels has.*num_heads=N,"
    ) as caught:
        ce.load_model(tmp_path / "deit.bin")
    asked = re.search(r"--arch '(.*)'", str(caught.value))
    assert asked is not None
    arch = asked[1].replace("num_heads=N", "num_heads=3")
    assert_same_logits(ce.load_model(tmp_path / "deit.bin", arch=arch), network, pixels())


@pytest.mark.parametrize("hugging_face", [False, True])
def test_clips_vit_gives_what_goes_into_its_projection(hugging_face: bool, tmp_path: Path) -> None:
    network = wild_files.randomised(OpenAIViT(hugging_face=hugging_face))
    state = network.state()
    if not hugging_face:
        torch.save(state, tmp_path / "ViT.pt")
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.copy_(tensor.half())
    path = hugging_face_folder(network, state, tmp_path, {}) if hugging_face else tmp_path / "ViT.pt"
    model = ce.load_model(path)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(pixels()), network(pixels()), rtol=1e-3, atol=1e-4)
    assert model.head is None
    assert any("quick GELU ASSUMED" in note for note in model.report.notes)


def test_resnet_of_hugging_face(tmp_path: Path) -> None:
    network = narrow_resnet()
    path = hugging_face_folder(
        network, wild_files.hugging_face_resnet(network.state_dict()), tmp_path, {"model_type": "resnet"}
    )
    model = ce.load_model(path)
    assert_same_logits(model, network, pixels(64))
    assert model.arch == "resnet18"


@pytest.mark.parametrize("biased", [False, True])
def test_dinov3_of_hugging_face(biased: bool, tmp_path: Path) -> None:
    network = wild_files.randomised(DINOv3(biased=biased))
    if not biased:
        network.clear_biases()
    config = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 32, "rope_theta": 100.0}
    model = ce.load_model(hugging_face_folder(network, network.state_dict(), tmp_path, config))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(pixels()), network(pixels()), rtol=1e-3, atol=1e-4)
    assert model.backbone.represent(pixels()).local.shape == (2, 16, 32)


def _swin_under_hugging_faces_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's Swin, both versions: queries, keys and values apart, and the merging of patches one stage earlier."""
    rules = (
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
        (r"^norm\.", "layernorm."),
        (r"^layers\.", "encoder.layers."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.q_bias$", ".attention.self.query.bias"),
        (r"\.attn\.v_bias$", ".attention.self.value.bias"),
        (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
        (r"\.attn\.", ".attention.self."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"blocks\.(\d)\.norm2\.", r"blocks.\1.layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    prefix = "swin" if any("relative_position_bias_table" in key for key in state) else "swinv2"
    result = {}
    for key, value in state.items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name):
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            result |= {f"{prefix}.{match[1]}.{part}.{match[2]}": tensor for part, tensor in parts}
        else:
            result[name.replace("head.fc.", "classifier.") if "head" in name else f"{prefix}.{name}"] = value
    return result


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_of_hugging_face(name: str, tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32}
    timm = pytest.importorskip("timm")
    network = wild_files.randomised(timm.create_model(name, num_classes=6, **options))
    state = _swin_under_hugging_faces_names(network.state_dict())
    model = ce.load_model(hugging_face_folder(network, state, tmp_path, {"image_size": 32, "window_size": 4}))
    assert_same_logits(model, network, pixels())
    assert model.arch.startswith(f"timm:{name}")


def test_windows_of_swin_v2_are_a_guess_that_is_told(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    options = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 8, "img_size": 64}
    network = wild_files.randomised(timm.create_model("swinv2_tiny_window8_256", num_classes=6, **options))
    torch.save(_swin_under_hugging_faces_names(network.state_dict()), tmp_path / "net.pth")
    model = ce.load_model(tmp_path / "net.pth")
    assert_same_logits(model, network, pixels(64))
    assert any("windows of 8 ASSUMED" in note for note in model.report.notes)


class DINOv2(nn.Module):
    """As github.com/facebookresearch/dinov2 names it: the class token, or with it the mean of the patches."""

    def __init__(self, registers: int, dim: int = 64, side: int = 32, patch: int = 8) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.registers, grid = registers, (side // patch) ** 2
        self.blocks = timm.create_model(
            "vit_base_patch14_dinov2", img_size=28, embed_dim=dim, depth=2, num_heads=1
        ).blocks
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, grid + 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        tokens: Tensor = self.norm(self.blocks(x))
        return tokens[:, 0]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_under_its_own_names(registers: int, chunked: bool, tmp_path: Path) -> None:
    network = wild_files.randomised(DINOv2(registers))
    state = {re.sub(r"^blocks\.", "blocks.0.", k) if chunked else k: v for k, v in network.state_dict().items()}
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}} if chunked else state, tmp_path / "net.pth")
    model = ce.load_model(tmp_path / "net.pth")
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(pixels()), network(pixels()), rtol=1e-4, atol=1e-4)
    assert model.backbone.represent(pixels()).local.shape == (2, 16, 64)
    torch.save({"weight": torch.zeros(10, 128), "bias": torch.zeros(10)}, tmp_path / "linear_head.pth")
    with pytest.raises(UsageError, match=r"one linear layer \(128 to 10\) and no network: .* give its backbone's file"):
        ce.load_model(tmp_path / "linear_head.pth")


@pytest.mark.slow
def test_convnext_of_hugging_face(tmp_path: Path) -> None:
    network = wild_files.randomised(make_network("timm:convnext_tiny", num_classes=6))
    rules = (
        (r"^stem\.0\.", "embeddings.patch_embeddings."),
        (r"^stem\.1\.", "embeddings.layernorm."),
        (r"^stages\.(\d)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
        (r"^stages\.(\d)\.blocks\.", r"encoder.stages.\1.layers."),
        (r"^(encoder\.stages\.\d\.layers\.\d+)\.norm\.", r"\1.layernorm."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"\.gamma$", ".layer_scale_parameter"),
        (r"^head\.norm\.", "layernorm."),
    )
    state = {}
    for key, value in network.state_dict().items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        state[key.replace("head.fc.", "classifier.") if "head" in key else f"convnext.{key}"] = value
    model = ce.load_model(hugging_face_folder(network, state, tmp_path, {}))
    assert_same_logits(model, network, pixels(64))
    assert model.arch == "convnext_tiny"


@pytest.mark.slow
def test_clips_resnet_gives_what_goes_into_its_projection(tmp_path: Path) -> None:
    network = wild_files.randomised(OpenAIResNet())
    torch.save({f"visual.{key}": value for key, value in network.state_dict().items()}, tmp_path / "RN50.pt")
    model = ce.load_model(tmp_path / "RN50.pt")
    with torch.no_grad():
        found, expected = model.backbone(pixels(224)), network(pixels(224))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert model.head is None
    assert model.backbone.represent(pixels(224)).local.shape == (2, 49, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "vit_small_patch14_dinov2"])
def test_timm_files_with_another_number_of_classes_in_any_head(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    side = {"img_size": 28} if "dinov2" in name else {}
    network = wild_files.randomised(timm.create_model(name, num_classes=7, **side))
    torch.save(network.state_dict(), tmp_path / "tuned.pth")
    model = ce.load_model(tmp_path / "tuned.pth", arch=f"timm:{name}", img_size=side.get("img_size"))
    images = pixels(side.get("img_size", 224))
    if model.head is not None:
        assert_same_logits(model, network, images)
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone(images), network.forward_head(network.forward_features(images), pre_logits=True)
        )


def images_in(folder: Path, classes: Sequence[str], count: int = 2, side: int = 32) -> None:
    rng = np.random.default_rng(len(folder.as_posix()))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name / f"{i}.png")


def test_corruption_folders_of_any_names_are_evaluated(tmp_path: Path) -> None:
    for name, severities in {"plasma_noise": (1, 3), "sparkles": (2,), "fog": (1, 2)}.items():
        for severity in severities:
            images_in(tmp_path / "bar" / name / str(severity), ["a", "b"])
    for split in ("train", "val"):
        images_in(tmp_path / "clean" / split, ["a", "b"], 6)
    data = ce.load_dataset(tmp_path / "bar", clean=tmp_path / "clean")
    assert {name: tuple(levels) for name, levels in data.severities.items()} == {
        "fog": (1, 2),
        "plasma_noise": (1, 3),
        "sparkles": (2,),
    }
    run = ce.evaluate(ce.load_model("pixels:8"), data, tasks=["corruptions"], out=tmp_path / "out")
    table = run.table()
    seen = {(row.corruption, int(row.severity)) for row in table[table.corruption != "clean"].itertuples()}
    assert seen == {("fog", 1), ("fog", 2), ("plasma_noise", 1), ("plasma_noise", 3), ("sparkles", 2)}


def arrays_in(folder: Path, names: Sequence[str], count: int = 6) -> None:
    """As CIFAR-10-C-bar has them: five severities of the same images one after the other."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in names:
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (5 * count, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(count) % 2, 5))


def test_corruption_arrays_of_any_names_are_evaluated_and_named_alone(tmp_path: Path) -> None:
    arrays_in(tmp_path / "CIFAR-10-C-Bar", ["plasma_noise", "sparkles", "fog"])
    arrays_in(tmp_path / "plain", ["x"])
    np.save(tmp_path / "plain" / "labels.npy", np.arange(30))  # thirty images, and no severities of six
    with pytest.raises(CossError, match="is no dataset"):
        ce.load_dataset(tmp_path / "plain")
    data = ce.load_dataset(tmp_path / "CIFAR-10-C-Bar")
    assert tuple(data.severities) == ("fog", "plasma_noise", "sparkles")
    assert data.classes[:2] == ("airplane", "automobile")
    model = ce.load_model("pixels:8")
    head = nn.Linear(model.backbone.dim, 10).requires_grad_(False)
    model = replace(model, head=head, classes=data.classes)
    run = ce.evaluate(model, data, [Corruptions(names=("sparkles",))], out=tmp_path / "out", quiet=True)
    assert not run.failures
    assert set(run.table().corruption) == {"sparkles"}
    with pytest.raises(UsageError, match="holds no plasma; it has fog, plasma_noise, sparkles"):
        ce.evaluate(model, data, [Corruptions(names=("plasma",))], out=tmp_path / "out")
    for split in ("train", "val"):
        images_in(tmp_path / "clean" / split, ["a", "b"])
    with pytest.raises(UsageError, match="unknown corruption 'fogg'; did you mean fog"):
        ce.evaluate(model, tmp_path / "clean", [Corruptions(names=("fogg",))], out=tmp_path / "out")


def test_folders_of_classes_are_no_corruptions(tmp_path: Path) -> None:
    for name in ("train", "val"):
        images_in(tmp_path / name, ["1", "2"])
    assert ce.load_dataset(tmp_path).classes == ("1", "2")


@pytest.mark.parametrize("named", ["subset", "numbers"])
def test_a_test_set_of_another_distribution_borrows_the_training_split(named: str, tmp_path: Path) -> None:
    wnids = ["n01440764", "n01443537", "n01484850"]
    for split in ("train", "val"):
        images_in(tmp_path / "clean" / split, wnids, 6)
    shown = wnids[1:] if named == "subset" else ["0", "1", "2"]
    images_in(tmp_path / "shifted", shown, 4)
    data = ce.load_dataset(tmp_path / "shifted", clean=tmp_path / "clean")
    assert data.classes == tuple(wnids[1:] if named == "subset" else wnids)
    assert data.train is not None
    assert data.train.classes == data.classes
    assert len(data.test) == 4 * len(shown)
    assert any("another distribution" in line for line in data.warnings())
    model = ce.load_model("pixels:8")
    head = nn.Linear(model.backbone.dim, 1000).requires_grad_(False)
    classifier = ce.fit_classifier(replace(model, head=head, classes=imagenet_wnids()), data)
    images = pixels(32)
    with torch.no_grad():
        every = head(model.encoder()(images))
        places = [imagenet_wnids().index(name) for name in data.classes]
        torch.testing.assert_close(classifier(images), every[:, places], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_images_below_32_px_get_the_corruptions_that_are_defined_there(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images_in(tmp_path / "small" / split, ["a", "b"], 6, side=28)
    run = ce.evaluate(ce.load_model("pixels:28"), tmp_path / "small", tasks=["corruptions"], out=tmp_path / "out")
    names = set(run.table().corruption) - {"clean"}
    assert names == {
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur"),
        *("brightness", "contrast", "saturate", "pixelate", "jpeg_compression"),
    }
    assert any("28 x 28 px are too small for glass_blur" in line.replace("defocus_blur, ", "") for line in run.skipped)
    with pytest.raises(UsageError, match="fog needs images of at least 32"):
        ce.corruptions.corrupt(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "fog", 1, torch.arange(1))


def _grey_resnet() -> nn.Module:
    network: Any = narrow_resnet()
    grey = copy.deepcopy(network)
    grey.conv1 = nn.Conv2d(1, 16, 7, 2, 3, bias=False)
    return wild_files.randomised(grey)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "arch"), [(_grey_resnet, None), (GreyNet, "wild_networks:GreyNet")])
def test_grey_networks_take_grey_images(make: Any, arch: str | None, tmp_path: Path) -> None:
    network = wild_files.randomised(make())
    torch.save(network.state_dict(), tmp_path / "grey.pth")
    model = ce.load_model(tmp_path / "grey.pth", arch=arch, mean=3 * [0.1307], std=3 * [0.3081])
    grey = pixels(32, channels=1)
    with torch.no_grad():
        expected = network((grey - 0.1307) / 0.3081)
        classifier = Classifier(model.backbone, model.head, model.preprocessing)
        torch.testing.assert_close(classifier(grey.expand(-1, 3, -1, -1)), expected, rtol=1e-4, atol=1e-4)
    assert model.backbone.represent(grey.expand(-1, 3, -1, -1)).local.shape[1] > 0
    assert model.untrained().backbone.channels == 1
    for split in ("train", "val"):
        images_in(tmp_path / "data" / split, ["a", "b"], 6, side=32)
    run = ce.evaluate(replace(model, head=None), tmp_path / "data", tasks=["probe"], out=tmp_path / "out")
    assert not run.failures


def test_eps_zero_is_told_or_left_to_the_clean_accuracy() -> None:
    assert Attacks(eps={"linf": (0.0, 0.1), "l2": (0.5,)}).eps == {"linf": (0.1,), "l2": (0.5,)}
    with pytest.raises(UsageError, match="eps 0 is the clean accuracy"):
        Attacks(eps={"linf": (0.0,), "l2": (0.5,)})


@pytest.mark.slow
def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images_in(tmp_path / "data" / split, ["a", "b"], 6)
    models = [replace(ce.load_model(f"pixels:{side}"), name=f"run${side}_$x_100%") for side in (4, 8)]
    run = ce.evaluate(models, tmp_path / "data", tasks=["probe", "redundancy", "corruptions"], out=tmp_path / "out")
    assert not run.failures
    written = reports.write(tmp_path / "out")
    assert {path.suffix for path in written} >= {".md", ".html", ".tex", ".csv", ".png"}
    run.plot("redundancy").savefig(tmp_path / "print.pdf")
    assert "run$4_$x_100%" in (tmp_path / "out" / "report.md").read_text()


def test_names_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images_in(tmp_path / split, ["a", "b"])
    os.rename(tmp_path / "val" / "a" / "0.png", os.fsencode(tmp_path / "val" / "a") + b"/caf\xe9.png")
    with pytest.raises(CossError, match=r"caf\\xe9.png.* is not UTF-8; rename it"):
        ce.load_dataset(tmp_path)


def test_damaged_tiffs_are_counted_without_libtiffs_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        images_in(tmp_path / split, ["a", "b"])
    for path in (tmp_path / "val").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".tif"), compression="tiff_lzw")
        path.unlink()
    broken = tmp_path / "val" / "a" / "0.tif"
    content = bytearray(broken.read_bytes())
    content[1000:1200] = bytes(range(55, 255))
    broken.write_bytes(content)
    data = ce.load_dataset(tmp_path, skip_bad_images=True)
    capfd.readouterr()
    geometry = ce.load_model("pixels:32").preprocessing.geometry
    assert sum(len(batch.ids) for batch in data.test.batches(geometry)) == 3
    assert data.left_out()
    assert "LZW" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "mobilenetv3_small_050", "seresnet18"])
def test_timms_folders_of_the_hub_need_no_flag(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = wild_files.randomised(timm.create_model(name, num_classes=7))
    cfg = {k: network.pretrained_cfg[k] for k in ("mean", "std", "input_size", "crop_pct", "interpolation")}
    config = {"architecture": name, "num_classes": 7, "pretrained_cfg": cfg}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ce.load_model(tmp_path)
    assert model.arch == f"timm:{name}"
    assert any("config.json beside the file says" in note for note in model.report.notes)
    images = pixels(224)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(model.backbone(images), expected, rtol=1e-4, atol=1e-4)


def _table(text: str) -> Any:
    """Images of no class folders, and a table of their classes."""

    def write(folder: Path) -> None:
        images_in(folder, ["images"], 4)
        (folder / "labels.csv").write_text(text)

    return write


TABLES = {
    "names without a suffix": _table("id,label\n" + "".join(f"{i},c{i % 2}\n" for i in range(4))),
    "semicolons": _table("filename;label\n" + "".join(f"{i}.png;c{i % 2}\n" for i in range(4))),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_folder_called_images_is_no_class(kind: str, tmp_path: Path) -> None:
    TABLES[kind](tmp_path)
    data = ce.load_dataset(tmp_path)
    assert data.classes == ("c0", "c1")
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(CossError, match=r"is no dataset: .* got images"):
        ce.load_dataset(tmp_path)


def test_a_link_that_leads_back_is_not_followed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images_in(tmp_path / split, ["a", "b"])
    (tmp_path / "val" / "a" / "again").symlink_to(tmp_path / "val" / "a")
    images_in(tmp_path / "elsewhere", ["more"], 3)
    (tmp_path / "val" / "b" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    assert len(ce.load_dataset(tmp_path).test) == 2 + 5


def test_what_lies_beside_the_dataset_says_where_it_is(tmp_path: Path) -> None:
    images_in(tmp_path / "outer" / "inner" / "train", ["a", "b"])
    images_in(tmp_path / "outer" / "inner" / "val", ["a", "b"])
    (tmp_path / "torchvision" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data.zip").write_bytes(b"PK")
    for name, message in {
        "outer": "give the folder inner/ in it",
        "torchvision": "files of cifar10: give --data cifar10 --data-root",
        "data.zip": "is an archive: unpack it and give the folder",
    }.items():
        with pytest.raises(CossError, match=message):
            ce.load_dataset(tmp_path / name)


def test_arrays_of_one_split(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(20) % 2)
    assert len(ce.load_dataset(tmp_path / "set.npz").test) == 20
    held = ce.load_dataset(tmp_path / "set.npz", holdout=0.2)
    assert held.train is not None
    assert (len(held.train), len(held.test)) == (16, 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/data.zip", "not fetched from here"),
        ("hf://datasets/uoft-cs/cifar10", "hf download --repo-type dataset uoft-cs/cifar10"),
        ("uoft-cs/cifar10", "if it is a name on the Hugging Face hub"),
    ],
)
def test_data_that_is_not_fetched_says_how_to_get_it(source: str, message: str) -> None:
    with pytest.raises(CossError, match=message):
        ce.load_dataset(source)


def test_width_is_not_blamed_where_it_was_not_given(tmp_path: Path) -> None:
    network: Any = ResNet(TorchvisionBottleneck, [3, 4, 6, 3], groups=32, width_per_group=4)
    network.inplanes = 32  # half of what the name stands for
    network.conv1, network.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
    for i, count in enumerate((3, 4, 6, 3)):
        layer = network._make_layer(TorchvisionBottleneck, 32 * 2**i, count, stride=2 if i else 1)
        setattr(network, f"layer{i + 1}", layer)
    state = network.state_dict()
    torch.save(state, tmp_path / "narrow.pth")
    with pytest.raises(CossError, match="--arch") as raised:
        ce.load_model(tmp_path / "narrow.pth")
    assert "--width" not in str(raised.value)


VIT_OPTIONS = {
    **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128},
    **{"image_size": 32, "patch_size": 8},
}
SWIN_OPTIONS = {
    **{"image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
}
OF_TRANSFORMERS = {  # model and configuration of that library, with what it calls the representation
    "ViT": ("cls", VIT_OPTIONS),
    "DeiT": ("cls", VIT_OPTIONS | {"intermediate_size": 256}),
    "Dinov2": ("cls", VIT_OPTIONS),
    "Dinov2WithRegisters": ("cls", VIT_OPTIONS),
    "DINOv3ViT": ("cls", VIT_OPTIONS | {"num_register_tokens": 4}),
    "CLIPVision": ("pooled", VIT_OPTIONS),
    "Swin": ("pooled", SWIN_OPTIONS),
    "Swinv2": ("pooled", SWIN_OPTIONS),
    "ConvNext": ("pooled", {"image_size": 64}),
    "ResNet": ("pooled", {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_what_transformers_saves_is_its_network(kind: str, tmp_path: Path) -> None:
    """Parity with the library itself, where it is installed: random weights, written by it, read by us."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    says, options = OF_TRANSFORMERS[kind]
    network = wild_files.randomised(
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    )
    network.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, options.get("image_size", 64), options.get("image_size", 64))
    with torch.inference_mode():
        output = network.eval()(pixels)
        expected = output.last_hidden_state[:, 0] if says == "cls" else output.pooler_output.flatten(1)
        found = ce.load_model(tmp_path).backbone(pixels)
    assert float((found - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))

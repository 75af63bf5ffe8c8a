"""Any checkpoint to a Model: the same features from every layout, and errors that say which flag would help."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from checkpoint_files import FILES, File, OwnNetwork, extras, headless, mlp, randomised, resnet, save, under, vit
from torch import Tensor, nn
from torch.nn import functional as F

from coss_eval.checkpoints.files import read_checkpoint
from coss_eval.checkpoints.load import TRAINER_STATE, load_model, make_model, normalisation_check, save_model
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.models.model import weights_sha256

made = cache(lambda name: FILES[name]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def moco(folder: Path) -> Path:
    return save(made("MoCo v2").content, folder / "moco.pth.tar")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_equal_features(backbone: nn.Module, reference: nn.Module, pixels: Tensor) -> None:
    with torch.no_grad():
        expected = reference(pixels)
        assert expected.std() > 0.01
        torch.testing.assert_close(backbone(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_features_of_the_network_inside(name: str, tmp_path: Path, pixels: Tensor) -> None:
    file: File = made(name)
    path = save(file.content, tmp_path / "last.ckpt")
    random_state = torch.get_rng_state()
    model = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal_features(model.backbone, file.reference, pixels)
    assert model.report is not None
    assert model.architecture is not None
    assert (model.layout, model.arch, model.architecture.stem) == (file.layout, file.arch, file.stem)
    assert (model.report.branch, model.report.missing) == (file.branch, ())
    assert (model.head.out_features if model.head else None) == file.head
    assert model.preprocessing.source == file.moments
    assert model.preprocessing.img_size == (64 if "vit" in file.arch else None)
    assert not any(p.requires_grad or m.training for m in (model.backbone,) for p in m.parameters())
    if file.other:
        branch, reference = file.other
        assert_equal_features(load_model(path, weights=branch).backbone, reference, pixels)


@pytest.mark.parametrize("name", ["MoCo v2", "DINO, ViT"])
def test_files_from_before_torch_1_6(name: str, tmp_path: Path, pixels: Tensor) -> None:
    path = save(made(name).content | extras(), tmp_path / "old.pth", legacy=True)
    assert_equal_features(load_model(path).backbone, made(name).reference, pixels)


@pytest.mark.slow
def test_the_same_weights_have_one_identity_in_any_wrapping(tmp_path: Path) -> None:
    net = resnet(0)
    names = ["torchvision reference", "bare state dict", "DataParallel", "torch.compile", "a whole pickled module"]
    models = [load_model(save(made(name).content, tmp_path / f"{i}.pth")) for i, name in enumerate(names)]
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net.safetensors")
    counterless = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    models += [load_model(tmp_path / "net.safetensors"), load_model(save(counterless, tmp_path / "counterless.pth"))]
    assert len({model.sha256 for model in models}) == 1
    other = load_model(save(resnet(1).state_dict(), tmp_path / "other.pth"))
    headless_ = load_model(tmp_path / "0.pth", head="probe")
    assert len({models[0].sha256, other.sha256, headless_.sha256}) == 3
    assert headless_.head is None


def test_a_wide_stem_is_read_off_the_shapes(tmp_path: Path) -> None:
    wide = make_model("resnet18", width=32, stem="cifar", seed=1)
    state = {key.removeprefix("network."): value for key, value in wide.backbone.state_dict().items()}
    model = load_model(save(state, tmp_path / "wide.pth"))
    assert model.architecture == wide.architecture
    assert model.protocol()["width"] == 32
    assert model.sha256 == wide.sha256


def test_a_network_of_ones_own(tmp_path: Path, pixels: Tensor) -> None:
    net = randomised(OwnNetwork(), torch.Generator().manual_seed(0))
    content = {"state_dict": under("module.encoder.", net), "args": argparse.Namespace(lr=1)}
    model = load_model(save(content, tmp_path / "own.pth"), arch="checkpoint_files:OwnNetwork")
    reference = nn.Sequential(*list(net.children())[:-1])
    assert_equal_features(model.backbone, reference, pixels)
    assert model.head is not None
    assert model.head.out_features == 5


@pytest.mark.slow
def test_timm_architectures_take_their_own_names(tmp_path: Path, pixels: Tensor) -> None:
    net = randomised(timm.create_model("resnet26", num_classes=3), torch.Generator().manual_seed(0))
    path = save({"state_dict": under("model.", net)}, tmp_path / "timm.pth")
    with pytest.raises(UsageError, match="give --arch"):
        load_model(path)
    model = load_model(path, arch="timm:resnet26")
    net.reset_classifier(0)
    assert_equal_features(model.backbone, net, pixels)


def test_another_number_of_heads_or_another_side_for_a_vit(tmp_path: Path, pixels: Tensor) -> None:
    net = vit(0, heads=6)
    path = save(net.state_dict(), tmp_path / "vit.pth")
    assert_equal_features(load_model(path, arch="vit_d192_l3_h6_p16").backbone, net, pixels)
    smaller = load_model(path, img_size=32)
    assert smaller.preprocessing.img_size == 32
    assert smaller.backbone.represent(pixels[..., :32, :32]).local.shape == (2, 4, 192)
    mean = load_model(path, pooling="mean")
    local, global_ = mean.backbone.represent(pixels)
    torch.testing.assert_close(local.mean(1), global_)
    assert mean.protocol()["pooling"] == "mean"


def by_hand(state: dict[str, Tensor], heads: int, pixels: Tensor) -> Tensor:
    """The class token of a plain ViT under timm's names, in a few lines."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    filters = state["patch_embed.proj.weight"]
    patches = F.conv2d(pixels, filters, state["patch_embed.proj.bias"], stride=filters.shape[-1])
    x = torch.cat([state["cls_token"].expand(len(pixels), 1, -1), patches.flatten(2).mT], 1) + state["pos_embed"]
    for block in sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}):
        q, k, v = linear(norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv").chunk(3, -1)
        mixed = []
        for one in range(heads):  # each head has its own share of the channels
            part = slice(one * x.shape[-1] // heads, (one + 1) * x.shape[-1] // heads)
            weights = (q[..., part] @ k[..., part].mT / (x.shape[-1] / heads) ** 0.5).softmax(-1)
            mixed.append(weights @ v[..., part])
        x = x + linear(torch.cat(mixed, -1), f"blocks.{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_moco_v3s_linear_file_has_its_12_heads_and_not_the_6_of_other_vits(tmp_path: Path, pixels: Tensor) -> None:
    content = FILES["MoCo v3, linear ViT"]().content
    state = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    model = load_model(save(content, tmp_path / "linear.pth.tar"))
    torch.testing.assert_close(model.backbone(pixels), by_hand(state, 12, pixels), rtol=0, atol=1e-4)
    assert not torch.allclose(by_hand(state, 12, pixels), by_hand(state, 6, pixels), atol=1e-2)


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path, pixels: Tensor) -> None:
    """Sine-cosine positions at 384 channels are MoCo v3's or an MAE's; no published ViT has 96 channels."""
    small = {key.removeprefix("module."): v for key, v in FILES["MoCo v3, linear ViT"]().content["state_dict"].items()}
    for state, name in ((small, "vit_d384_l3_hN_p16"), (vit(0, heads=4, dim=96).state_dict(), "vit_d96_l3_hN_p16")):
        path = save(state, tmp_path / "vit.pth")
        with pytest.raises(UsageError, match=f"how many attention heads.*--arch '{name}'"):
            load_model(path)
        for heads in (4, 12):
            backbone = load_model(path, arch=name.replace("N", str(heads))).backbone
            torch.testing.assert_close(backbone(pixels), by_hand(state, heads, pixels), rtol=0, atol=1e-4)
    learned = small | {"pos_embed": 0.02 * torch.randn(small["pos_embed"].shape)}
    assert load_model(save(learned, tmp_path / "learned.pth")).arch == "vit_d384_l3_h6_p16"


def test_flags_come_before_the_layout(moco: Path) -> None:
    assert load_model(moco).preprocessing == Preprocessing(said_by="layout")
    given = load_model(moco, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), img_size=96, crop_pct=1.0)
    assert given.preprocessing == Preprocessing((0.5,) * 3, (0.2,) * 3, 96, 1.0, "bilinear", "flag", asked=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "resnet50"}, CossError, r"does not fill resnet50.*--arch resnet18.*--allow-partial"),
        ({"arch": "resnet81"}, UsageError, r"unknown architecture 'resnet81'; did you mean"),
        ({"arch": "squeezenet1_1"}, CossError, r"does not fill squeezenet1_1.*--arch resnet18"),
        ({"arch": "checkpoint_files:OwnNetwork"}, CossError, r"none of its .* has a name of checkpoint_files"),
        ({"arch": "checkpoint_files:Absent"}, UsageError, "unknown factory"),
        (
            {"stem": "cifar"},
            CossError,
            r"conv1.weight is 16x3x7x7 in the file, 16x3x3x3 in the network.*--stem imagenet",
        ),
        ({"stem": "cifr"}, UsageError, r"unknown stem 'cifr'; did you mean cifar"),
        ({"weights": "projector"}, UsageError, r"no branch 'projector'.*holds: online, target"),
        ({"mean": (0.5, 0.5, 0.5)}, UsageError, "belong together"),
        ({"mean": (0.5,), "std": (0.5,)}, UsageError, "three numbers"),
        ({"mean": (0, 0, 0), "std": (0, 1, 1)}, UsageError, "positive"),
        ({"img_size": 0}, UsageError, "positive"),
        ({"crop_pct": 2}, UsageError, r"\(0, 1\]"),
        ({"interpolation": "nearest"}, UsageError, "bilinear or bicubic"),
        ({"head": "mine"}, UsageError, "auto, own or probe"),
        ({"pooling": "mean"}, UsageError, "token sequences"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    moco: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        load_model(moco, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1")}, "no known name|12 .*missing"),
        (lambda s: {k: v for k, v in s.items() if k != "layer2.0.bn1.weight"}, r"1 \(layer2.0.bn1.weight\) missing"),
        (lambda s: s | {"layer2.0.se.fc1.weight": torch.ones(3)}, r"1 \(layer2.0.se.fc1.weight\) without .*timm:NAME"),
        (lambda s: s | {"layer1.0.conv1.bias": torch.ones(16)}, r"1 \(layer1.0.conv1.bias\) without a place"),
        (lambda s: s | {"bn1.weight": torch.ones(3)}, r"bn1.weight is 3 in the file, 16 in the network"),
    ],
)
def test_the_backbone_must_match_completely(change: Any, message: str, tmp_path: Path) -> None:
    path = save(change(resnet(0).state_dict()), tmp_path / "net.pth")
    with pytest.raises(CossError, match=message):
        load_model(path)
    partial = load_model(path, arch="resnet18", width=16, allow_partial=True)
    assert partial.report is not None
    assert any("PARTIAL" in note for note in partial.report.notes)
    assert partial.sha256 == load_model(path, arch="resnet18", width=16, allow_partial=True).sha256


def test_too_little_is_refused_even_if_partial(tmp_path: Path) -> None:
    few = {k: v for k, v in resnet(0).state_dict().items() if k.startswith(("conv1", "bn1", "layer1"))}
    with pytest.raises(CossError, match="does not fill resnet18"):
        load_model(save(few, tmp_path / "few.pth"), arch="resnet18", width=16, allow_partial=True)


def test_a_deeper_network_does_not_pass_for_a_shallower_one(tmp_path: Path) -> None:
    """Every key of a ResNet-18 of basic blocks is in a ResNet-34."""
    with torch.random.fork_rng(devices=[]):
        path = save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(CossError, match=r"without a place.*--arch resnet34"):
        load_model(path, arch="resnet18")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "no tensors"),
        ({"optimizer": {"state": {"x": torch.ones(3)}}}, "no tensors"),
        ({"weight": torch.ones(3)}, r"no ResNet, ViT, ConvNeXt or Swin among its 1 \(weight\) tensors; give --arch"),
        (lambda: under("a.", resnet(0)) | under("b.", resnet(0)), "--weights: a, b"),
        (lambda: dict.fromkeys(TRAINER_STATE, 0) | under("network.", resnet(0)), "the trainer's .*model.safetensors"),
        (lambda: resnet(0).state_dict() | {"conv1.weight": torch.ones(64, 3, 5, 5)}, r"7x7 nor one 3x3.*--arch"),
    ],
)
def test_files_without_one_known_network(content: Any, message: str, tmp_path: Path) -> None:
    path = save(content() if callable(content) else content, tmp_path / "odd.pth")
    with pytest.raises(CossError, match=f"odd.pth: .*{message}"):
        load_model(path)


def test_several_networks_are_chosen_by_name(tmp_path: Path, pixels: Tensor) -> None:
    nets = {name: resnet(i) for i, name in enumerate("abc")}
    content = {key: value for name, net in nets.items() for key, value in under(f"{name}.", net).items()}
    path = save(content, tmp_path / "three.pth")
    assert_equal_features(load_model(path, weights="b").backbone, headless(nets["b"]), pixels)


def test_our_own_files_need_no_flag(tmp_path: Path, pixels: Tensor) -> None:
    known = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_pct=1.0, interpolation="bicubic", said_by="checkpoint")
    model = make_model("resnet18", stem="solo-cifar", width=32, classes=["cat", "dog"], preprocessing=known, seed=4)
    save_model(model, tmp_path / "run" / "model.safetensors")
    loaded = load_model(tmp_path / "run" / "model.safetensors")
    assert loaded.name == "run"
    for field in ("sha256", "arch", "classes", "architecture", "preprocessing"):
        assert getattr(loaded, field) == getattr(model, field), field
    torch.testing.assert_close(loaded.backbone(pixels), model.backbone(pixels))
    assert loaded.protocol() == model.protocol()
    with pytest.raises(UsageError, match="leave --arch out"):
        load_model(tmp_path / "run" / "model.safetensors", arch="resnet50")


def test_a_file_of_half_the_size_reads_back_as_float32(tmp_path: Path) -> None:
    model = make_model("resnet18", stem="cifar", width=16)
    save_model(model, tmp_path / "whole.safetensors")
    save_model(model, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    whole, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half"))
    assert 0.5 <= half / whole < 0.53
    read = load_model(tmp_path / "half.safetensors").backbone.state_dict()
    for key, tensor in model.backbone.state_dict().items():
        assert read[key].dtype == tensor.dtype
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(read[key], expected, rtol=0, atol=0)


def test_a_checkpoint_of_any_layout_can_be_saved_as_ours(tmp_path: Path) -> None:
    model = load_model(save(made("MoCo v3, ViT").content, tmp_path / "moco.pth"))
    save_model(model, tmp_path / "ours.safetensors")
    loaded = load_model(tmp_path / "ours.safetensors")
    assert (loaded.sha256, loaded.arch) == (model.sha256, model.arch)
    assert loaded.preprocessing == replace(model.preprocessing, said_by="checkpoint")


def test_a_file_cannot_name_code_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory in our own files' metadata is code that somebody else chose."""
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    model = make_model("checkpoint_files:OwnNetwork")
    save_model(model, tmp_path / "own.safetensors")
    content = read_checkpoint(tmp_path / "own.safetensors")
    config = content.pop("__metadata__")["coss_eval"].replace("checkpoint_files:OwnNetwork", "planted:network")
    safetensors.torch.save_file(content, tmp_path / "evil.safetensors", {"coss_eval": config})
    for name in ("evil", "own"):
        with pytest.raises(UsageError, match="a file runs no code: give --arch"):
            load_model(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "ran").exists()
    assert load_model(tmp_path / "own.safetensors", arch="checkpoint_files:OwnNetwork").sha256 == model.sha256


@pytest.mark.parametrize("config", ["{", "{}", '{"architecture": {"arch": "resnet18", "colour": 1}}', "[]"])
def test_our_own_files_with_broken_metadata(config: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(resnet(0).state_dict(), tmp_path / "own.safetensors", {"coss_eval": config})
    with pytest.raises(CossError, match="metadata cannot be read"):
        load_model(tmp_path / "own.safetensors")


def test_untrained_is_the_architecture_with_weights_of_its_seed(moco: Path) -> None:
    model = load_model(moco)
    random_state = torch.get_rng_state()
    first, again, other = model.untrained(0), model.untrained(0), model.untrained(1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first.sha256 == again.sha256
    assert len({model.sha256, first.sha256, other.sha256}) == 3
    assert first.head is None
    assert first.preprocessing == model.preprocessing
    assert {k: v.shape for k, v in first.backbone.state_dict().items()} == {
        k: v.shape for k, v in model.backbone.state_dict().items()
    }


READINGS = {
    "as declared": (lambda pixels, normalise: normalise(pixels), None),
    "255": (lambda pixels, normalise: pixels * 255, "0 to 255"),
    "unnormalised": (lambda pixels, normalise: pixels, r"unnormalised pixels in \[0, 1\]"),
    "-1 to 1": (lambda pixels, normalise: 2 * pixels - 1, r"pixels in \[-1, 1\]"),
    "something else": (lambda pixels, normalise: -9 * pixels - 7, "none of these fits either"),
}


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_a_gross_mismatch_of_the_normalisation_is_seen(reading: str, shared_data: Path) -> None:
    images = next(load_dataset(str(shared_data / "tiny-imagenet-50")).test.batches(batch_size=64, workers=0)).images
    model = make_model("resnet18", seed=1)
    read, expected = READINGS[reading]
    network: Any = model.backbone.network
    with torch.no_grad():  # the statistics of a network trained on pixels read in this way
        normalise = Classifier(model.backbone, nn.Identity(), model.preprocessing).normalise
        seen = network.conv1(read(to_float(images[::2]), normalise))
        network.bn1.running_mean.copy_(seen.mean((0, 2, 3)))
        network.bn1.running_var.copy_(seen.var((0, 2, 3)))
    message = normalisation_check(model, images[1::2])
    assert (message is None) == (expected is None)
    assert message is None or re.search(expected, message)


def test_networks_without_running_statistics_raise_no_alarm() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert normalisation_check(make_model("resnet18"), images) is None
    assert normalisation_check(make_model("vit_d64_l1_h2_p16", img_size=32), images) is None


def test_the_hash_of_weights_stays_what_it_was() -> None:
    """It is in the key of every stored number."""
    layer = nn.BatchNorm1d(2)
    for value in layer.state_dict().values():
        value.fill_(1)
    assert weights_sha256(layer, None) == "c6733a8bea929335a1c5a21d70ee68ce5214ebdef52825cb4dd77486ee564864"


@pytest.mark.slow
def test_published_networks_come_with_their_classes_and_preprocessing(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        net = torchvision.models.squeezenet1_1()
    path = save(net.state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    random_state = torch.get_rng_state()
    model = load_model("torchvision:squeezenet1_1", weights=str(path), std=(0.2, 0.2, 0.2), mean=(0.5, 0.5, 0.5))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (model.layout, model.name, model.arch) == ("torchvision", "squeezenet1_1", "squeezenet1_1")
    assert (model.preprocessing.img_size, model.preprocessing.source) == (224, "flag")
    assert model.untrained(1).sha256 != model.sha256
    with pytest.raises(CossError, match="unknown"):
        load_model("torchvision:squeezenet9")


def test_a_projection_head_is_no_classifier_and_is_named(moco: Path) -> None:
    report = load_model(moco).report
    assert report is not None
    assert report.head is None
    assert report.unexpected == ("fc.0.weight", "fc.2.weight")
    text = "\n".join(report.lines())
    assert "MoCo (ResNet), branch online of online, target" in text
    assert "120 matched, 0 missing, 2 (fc.0.weight, fc.2.weight) unexpected" in text


def test_mlp_helper_makes_what_the_layouts_must_pass_over() -> None:
    assert list(mlp("fc.", 8, 4, 2)) == ["fc.0.weight", "fc.2.weight"]


def test_raw_pixels_are_the_baseline_without_a_network() -> None:
    model = load_model("pixels:8")
    pixels = torch.rand(2, 3, 8, 8)
    local, global_ = model.backbone.represent(pixels)
    assert torch.equal(global_, pixels.flatten(1))
    assert local.shape == (2, 64, model.backbone.local_dim)
    assert model.backbone.dim == global_.shape[1]
    with pytest.raises(UsageError, match="pixels:32"):
        load_model("pixels:big")

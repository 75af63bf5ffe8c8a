"""RF-ResNets: reachable sizes, parameter counts of the reference table, presets, and the MLP after pooling."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from build_networks import build
from gradient_probe import gradient_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18, resnet50

from coss_eval.checkpoints.load import load_model, make_model, save_model
from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.architecture import Architecture
from coss_eval.models.rf_resnet import PRESETS, Kept, RFResNet, Strides, from_name, reachable, rf_of, rf_resnet
from coss_eval.receptive_field.theoretical import theoretical


def unfilled(depth: int, **fields: Any) -> RFResNet:
    """Without memory for its weights, on which neither sizes nor counts depend."""
    with torch.device("meta"):
        return RFResNet(depth, **fields)


def parameters(network: RFResNet) -> int:
    """Of the backbone, without the classifier."""
    return sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in network.fc.parameters())


@pytest.mark.parametrize(
    ("depth", "kept", "strides", "millions"),
    [
        (50, (2, 2, 2, 0), "torchvision", 14.825),
        (50, (2, 2, 1, 1), "torchvision", 16.397),
        (50, (0, 1, 3, 0), "torchvision", 15.152),
        (50, (2, 4, 1, 0), "torchvision", 14.562),
        (50, (3, 4, 0, 0), "v1", 14.071),
    ],
)
def test_choices_for_rf_99(depth: int, kept: Kept, strides: Strides, millions: float) -> None:
    assert rf_of(depth, kept, strides=strides) == 99
    assert parameters(unfilled(depth, kept=kept, strides=strides)) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_the_choice_for_rf_29() -> None:
    assert rf_of(18, (4, 4, 1, 0), stem="cifar") == 29
    assert parameters(unfilled(18, kept=(4, 4, 1, 0), stem="cifar")) / 1e6 == pytest.approx(2.256, abs=5e-4)


@pytest.mark.parametrize(("layers", "millions"), [(0, 0.0), (1, 4.196), (2, 8.393)])
def test_parameters_of_the_mlp(layers: int, millions: float) -> None:
    kept = (2, 2, 2, 0)
    added = parameters(unfilled(50, kept=kept, mlp_layers=layers)) - parameters(unfilled(50, kept=kept))
    assert added / 1e6 == pytest.approx(millions, abs=5e-4)


def test_there_are_eleven_ways_to_rf_99() -> None:
    assert sum(rf_of(50, kept) == 99 for kept in product(range(4), range(5), range(7), range(4))) == 11


@pytest.mark.parametrize(
    ("depth", "stem", "sizes"),
    [
        (18, "imagenet", range(11, 436, 8)),
        (34, "imagenet", range(11, 900, 8)),
        (50, "imagenet", range(11, 428, 8)),
        (18, "cifar", range(3, 110, 2)),
        (50, "cifar", range(3, 108, 2)),
    ],
)
def test_reachable_sizes(depth, stem, sizes: range) -> None:
    found = reachable(depth, stem=stem)
    assert list(found) == list(sizes)
    assert all(rf_of(depth, kept, stem=stem) == rf for rf, kept in found.items())


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, deadline=None)
def test_arithmetic_propagation_and_gradients_agree(data: st.DataObject) -> None:
    depth = data.draw(st.sampled_from([18, 50]))
    counts = (4, 4, 4, 4) if depth == 18 else (3, 4, 6, 3)
    kept: Kept = tuple(data.draw(st.integers(0, count)) for count in counts)  # type: ignore[assignment]
    stem = data.draw(st.sampled_from(["imagenet", "cifar"]))
    strides = data.draw(st.sampled_from(["torchvision", "v1"])) if depth == 50 else "torchvision"
    backbone, _ = zoo.wrap(unfilled(depth, kept=kept, stem=stem, strides=strides))
    expected = rf_of(depth, kept, stem=stem, strides=strides)
    table = theoretical(backbone, 128).set_index("site")
    assert table.rf["prepool"] == expected
    size = expected + 64  # so that the middle unit's field fits in
    (top, bottom), (left, right) = gradient_probe(backbone, size)["prepool"]
    assert (bottom - top + 1, right - left + 1) == (expected, expected)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_in_their_name(name: str) -> None:
    preset = PRESETS[name]
    assert name == f"rf{preset.rf}_resnet{preset.depth}"
    with torch.device("meta"):
        backbone, head = zoo.wrap(preset.network(num_classes=5))
    table = theoretical(backbone, 128).set_index("site")
    assert table.rf["prepool"] == preset.rf
    size = preset.rf + 64
    (top, bottom), (left, right) = gradient_probe(backbone, size)["prepool"]
    assert bottom - top + 1 == right - left + 1 == preset.rf
    assert isinstance(head, nn.Linear)


@pytest.mark.slow
def test_any_other_is_spelt_out_in_its_name() -> None:
    made = from_name("rf_resnet50_k2-1-0-0_mlp3x20_v1", width=8, stem="cifar")
    by_hand = RFResNet(
        50, kept=(2, 1, 0, 0), strides="v1", stem="cifar", width=8, mlp_layers=3, mlp_width=20, num_classes=1000
    )
    assert made is not None
    assert [f"{key} {tuple(v.shape)}" for key, v in made.state_dict().items()] == [
        f"{key} {tuple(v.shape)}" for key, v in by_hand.state_dict().items()
    ]
    assert made.layer2[0].conv1.stride == (2, 2)
    plain = from_name("rf_resnet34_k6-4-1-0")
    assert plain is not None
    assert not len(plain.mlp)
    backbone, _ = build("rf_resnet18_k1-1-0-0_mlp1", stem="cifar", width=8)
    assert theoretical(backbone, 64).set_index("site").rf["prepool"] == rf_of(18, (1, 1, 0, 0), stem="cifar")
    assert from_name("resnet18") is None
    with pytest.raises(UsageError, match="stage 1 has 4"):
        from_name("rf_resnet18_k5-0-0-0")


def test_a_presets_stem_may_be_said_but_no_other() -> None:
    assert from_name("rf29_resnet18", stem="cifar", width=8) is not None
    with pytest.raises(UsageError, match="has the cifar stem of its own; pass --stem imagenet"):
        from_name("rf29_resnet18", stem="solo-cifar", width=8)


def test_the_global_representation_is_the_mlp_of_the_mean_of_the_locals() -> None:
    network = RFResNet(18, kept=(4, 4, 1, 0), stem="cifar", width=8, mlp_layers=2, mlp_width=20).eval()
    mlp = network.mlp
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    backbone, _ = zoo.wrap(network)
    local, global_ = backbone.eval().represent(torch.rand(2, 3, 64, 64))
    assert local.shape == (2, 64, 64)
    assert torch.allclose(mlp(local.mean(dim=1)), global_, atol=1e-6)


@pytest.mark.parametrize(("depth", "plain"), [(18, resnet18), (50, resnet50)])
def test_with_everything_kept_it_is_torchvisions_network(depth, plain) -> None:
    network, state = RFResNet(depth).eval(), plain().eval()
    network.load_state_dict(state.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(network(pixels), state(pixels))


def test_rf_resnet_finds_the_smallest_choice() -> None:
    found = rf_resnet(50, 99, width=8, mlp_layers=1)
    assert [len(stage) for stage in (found.layer1, found.layer2)] == [3, 4]
    kernels = [
        sum(module.kernel_size == (3, 3) for module in stage.modules() if isinstance(module, nn.Conv2d))
        for stage in (found.layer1, found.layer2, found.layer3, found.layer4)
    ]
    assert kernels == [2, 4, 1, 0]
    assert [type(layer) for layer in found.mlp] == [nn.Linear]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rf_resnet(50, 100), "nearest: .*91, 99, 107"),
        (lambda: rf_resnet(18, 29), "imagenet stem cannot .* of 29; nearest: .*27, 35"),
        (lambda: RFResNet(20), "no ResNet of depth 20; known: 18, 34, 50"),
        (lambda: RFResNet(18, kept=(4, 4, 5, 0)), "stage 3 has 4 3x3 convolutions; cannot keep 5"),
        (lambda: RFResNet(18, strides="v1"), "bottleneck"),
        (lambda: RFResNet(50, strides="V1"), "unknown strides 'V1'; did you mean v1"),
        (lambda: RFResNet(18, stem="cifr"), "unknown stem 'cifr'; did you mean cifar"),
        (lambda: RFResNet(18, kept=(1, 1, 1)), "kept must be 4 counts"),
        (lambda: RFResNet(18, width=0), "width .* 1 or more, not 0"),
        (lambda: RFResNet(18, mlp_layers=-1), "mlp_layers .* 0 or more, not -1"),
        (lambda: from_name("rf_resnet18_k1-1-1-1_mlp2x0"), "mlp_width .* 1 or more, not 0"),
        (lambda: rf_of(18, (4, 4, 4, 9)), "stage 4 has 4 3x3 convolutions; cannot keep 9"),
        (lambda: rf_resnet(18, 29), "the cifar stem reaches 29"),
        (lambda: from_name("rf100_resnet50"), "nearest: .*91, 99, 107"),
        (lambda: from_name("rf99_resnet51"), "no ResNet of depth 51"),
    ],
)
def test_what_cannot_be_had_is_said(call, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        call()


@pytest.mark.parametrize(("arch", "stem"), [("rf107_resnet50", "imagenet"), ("rf31_resnet18", "cifar")])
def test_any_reachable_size_by_name_is_saved_and_read_back(tmp_path: Path, arch: str, stem) -> None:
    made = make_model(arch, stem=stem, width=4, classes=["a", "b"])
    rf = int(arch[2:].partition("_")[0])
    assert theoretical(made.backbone, 64).set_index("site").rf["prepool"] == rf
    assert len(made.backbone.network.mlp) == 3  # the presets' two linear layers
    save_model(made, tmp_path / "model.safetensors")
    read = load_model(tmp_path / "model.safetensors")
    assert (read.sha256, read.architecture) == (made.sha256, made.architecture)


def saved(path: Path, architecture: Architecture) -> nn.Module:
    """The network, its plain state dict written to a file."""
    network = architecture.network(num_classes=10).eval()
    torch.save(network.state_dict(), path)
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "inferred"),
    [
        (Architecture("rf109_resnet18", width=8), "rf_resnet18_k4-4-4-4_mlp2"),
        (Architecture("rf29_resnet18", width=8), "rf_resnet18_k4-4-1-0_mlp2"),
        (Architecture("rf427_resnet50", width=4), "rf_resnet50_k3-4-6-3_mlp2"),
        (Architecture("rf_resnet34_k6-4-1-0", width=4), "rf_resnet34_k6-4-1-0"),
        (Architecture("rf_resnet50_k2-1-0-0_mlp3x20", "cifar", width=4), "rf_resnet50_k2-1-0-0_mlp3x20"),
        (Architecture("resnet18", width=8), "resnet18"),
    ],
)
def test_a_plain_state_dict_is_the_network_it_was(tmp_path: Path, made: Architecture, inferred: str) -> None:
    network = saved(tmp_path / "plain.pt", made)
    model = load_model(tmp_path / "plain.pt")
    assert model.arch == inferred
    assert model.head is not None
    assert model.report is not None
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.head(model.backbone(pixels)), network(pixels))
    assert any("strides ASSUMED" in note for note in model.report.notes) == (inferred.startswith("rf_resnet50"))
    named = load_model(tmp_path / "plain.pt", arch=made.arch)  # stem and width as the shapes have them
    assert (named.arch, named.sha256) == (made.arch, model.sha256)


def test_v1_strides_are_told_by_the_name_alone(tmp_path: Path) -> None:
    made = Architecture("rf_resnet50_k2-1-0-0_mlp1_v1", width=4)
    network = saved(tmp_path / "plain.pt", made)
    model = load_model(tmp_path / "plain.pt", arch=made.arch)
    assert model.architecture == replace(made, img_size=None)
    pixels = torch.rand(2, 3, 64, 64)
    assert model.head is not None
    assert torch.equal(model.head(model.backbone(pixels)), network(pixels))


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ({"arch": "rf29_resnet18", "width": 64}, "try --width 16 or"),
        ({"arch": "rf_resnet18_k4-4-1-0_mlp2", "stem": "imagenet"}, "try --stem cifar or"),
        ({"arch": "rf61_resnet18"}, "try --arch rf_resnet18_k4-4-1-0_mlp2 or"),
    ],
)
def test_the_flag_that_would_help_is_named(tmp_path: Path, flags, hint: str) -> None:
    saved(tmp_path / "plain.pt", Architecture("rf29_resnet18", width=16))
    with pytest.raises(CossError, match=hint):
        load_model(tmp_path / "plain.pt", **flags)


def test_a_projection_head_called_mlp_is_no_mlp_of_the_network(tmp_path: Path) -> None:
    network = zoo.network("resnet18", width=8, num_classes=10)
    head = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    torch.save(network.state_dict() | {f"mlp.{key}": value for key, value in head.state_dict().items()}, tmp_path / "p")
    assert load_model(tmp_path / "p").arch == "resnet18"


def test_1x1_convolutions_in_other_places_are_refused(tmp_path: Path) -> None:
    state = zoo.network("resnet18", width=8).state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][..., :1, :1]
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(UsageError, match=r"stage 1 has 1x1 convolutions before 3x3.*give --arch"):
        load_model(tmp_path / "plain.pt")

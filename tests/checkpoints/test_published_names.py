"""Networks of torchvision and timm by their names: each as the library computes it, none taken for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wild_files
from torch import Tensor, nn

import coss_eval as ce
from coss_eval.cli.check import check
from coss_eval.errors import CossError
from coss_eval.models.model import Model
from coss_eval.models.zoo import network as make_network

pytest.importorskip("timm")

QUICK = (
    *("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"),
    *("timm:regnetx_002", "timm:convnext_atto", "timm:efficientvit_m0", "timm:test_vit"),
)
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "squeezenet1_0"),
    *("swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
)
TIMM = (
    # ResNets and their relatives
    *("resnet10t", "resnet18d", "resnet26t", "resnetaa50", "resnetblur18", "resnetrs50", "resnext26ts", "seresnet18"),
    *("skresnet18", "ecaresnet26t", "botnet26t_256", "halonet26t", "lambda_resnet26t", "res2net50_26w_4s"),
    *("resnest14d", "resnetv2_18", "nf_resnet26", "nf_regnet_b0", "regnety_002", "dla34", "dpn48b"),
    *("ese_vovnet19b_dw", "hrnet_w18_small", "cspresnet50", "hgnet_tiny", "selecsls42b"),
    # small and searched ones
    *("efficientnet_lite0", "tf_efficientnetv2_b0", "mixnet_s", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("ghostnet_050", "tinynet_e", "lcnet_050", "rexnet_100", "fbnetc_100", "mobileone_s0", "repvgg_a0", "starnet_s1"),
    *("repvit_m0_9", "efficientformer_l1", "efficientvit_b0", "fastvit_t8", "edgenext_xx_small", "inception_next_atto"),
    # transformers, and what stands between
    *("convnextv2_atto", "mambaout_femto", "visformer_tiny", "coatnet_pico_rw_224", "maxvit_rmlp_pico_rw_256"),
    *("swinv2_cr_tiny_ns_224(depths=(1,1,1,1))", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("deit3_small_patch16_224(depth=3)", "beit_base_patch16_224(depth=1)", "eva02_tiny_patch14_224(num_classes=9)"),
    *(
        "vit_small_patch14_dinov2(depth=2,img_size=56)",
        "vit_tiny_r_s16_p8_224",
        "cait_xxs24_224",
        "xcit_nano_12_p8_224",
    ),
    *("mixer_s32_224", "levit_128s", "pvt_v2_b0", "poolformer_s12", "mobilevit_xxs", "gcvit_xxtiny", "convit_tiny"),
)
NAMES = (*QUICK, *TORCHVISION, *(f"timm:{name}" for name in TIMM))
WITHOUT_FLAGS = {
    *("convnext_tiny", "resnet18", "resnet50", "resnext50_32x4d", "swin_t", "swin_v2_t", "vit_b_32"),
    *("timm:deit_tiny_patch16_224", "timm:vit_small_patch14_dinov2(depth=2,img_size=56)"),
}
SIDES = {"inception_v3": 299, "swin_v2_t": 256}


def own_outputs(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, the representation) as the library itself computes them: what goes into torchvision's last layer."""
    with torch.no_grad():
        logits = network(images)
        if hasattr(network, "forward_features"):
            return logits, network.forward_head(network.forward_features(images), pre_logits=True)
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:  # SqueezeNet's logits go through a ReLU: no linear head, and they are the representation
            return logits, logits
        seen: list[Tensor] = []
        hook = linear[-1].register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
        network(images)
        hook.remove()
    return logits, seen[0]


def same(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected.reshape(found.shape) / scale, rtol=0, atol=1e-4)


def compare(model: Model, images: Tensor, logits: Tensor, representation: Tensor) -> None:
    with torch.no_grad():
        found = model.backbone(images)
        same(found, representation)
        if model.head is not None:
            same(model.head(found), logits)
        elif not torch.equal(logits, representation):
            assert "head" in model.backbone.note


def without_flags(path: Path) -> Model | str:
    """The Model, or what is said in its place."""
    try:
        return ce.load_model(path)
    except CossError as error:
        return str(error)


def test_so_many_names() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 88


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_file_of_a_published_network(name: str, tmp_path: Path) -> None:
    network: Any = wild_files.randomised(make_network(name))
    side = SIDES.get(name, 224)
    if hasattr(network, "pretrained_cfg"):
        embedded = getattr(getattr(network, "patch_embed", None), "img_size", None)
        side = (embedded or network.pretrained_cfg["input_size"][1:])[0]
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    logits, representation = own_outputs(network, images)
    torch.save(network.state_dict(), tmp_path / "net.pth")

    model = ce.load_model(tmp_path / "net.pth", arch=name)
    assert model.arch == name
    compare(model, images, logits, representation)
    plain = without_flags(tmp_path / "net.pth")
    assert isinstance(plain, Model) or name not in WITHOUT_FLAGS
    if isinstance(plain, str):
        assert "--arch" in plain
        assert "\n" not in plain
        return
    assert plain.report is not None
    if not any(f"else give --arch {name}" in note for note in plain.report.notes):  # its tensors are those of another
        compare(plain, images, logits, representation)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "timm:test_convnext"])
def test_check_passes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(make_network(name).state_dict(), tmp_path / "net.pth")
    data = ce.load_dataset("digits").restricted(("0", "1"))
    model = ce.load_model(tmp_path / "net.pth", arch=name)
    assert check([model], data, names=("probe", "redundancy"), device="cpu") == 0
    assert "ok: the same call" in capsys.readouterr().out

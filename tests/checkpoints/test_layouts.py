"""Layouts, dialects and shapes: what is recognised in a checkpoint's keys, apart from any file."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from checkpoint_files import FILES, randomised, resnet, under
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from coss_eval.checkpoints.flat_keys import flatten, plain_key
from coss_eval.checkpoints.key_names import DIALECTS, find_roots
from coss_eval.checkpoints.layouts import recognise
from coss_eval.checkpoints.matching import roots_by_name
from coss_eval.errors import UsageError
from coss_eval.models.architecture import CONVNEXTS, RESNETS, VITS, Architecture, infer

ONE = torch.ones(1)


def on_meta(arch: str, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        state: dict[str, Tensor] = torchvision.models.get_model(arch, **options).state_dict()
    return state


@pytest.mark.parametrize("arch", [*RESNETS.values(), *CONVNEXTS.values(), *VITS.values()])
def test_every_architecture_of_the_tables_is_told_from_its_shapes(arch: str) -> None:
    size = {"image_size": 64 if arch != "vit_h_14" else 28} if arch in VITS.values() else {}
    found = infer(on_meta(arch, **size))
    assert found == Architecture(arch, img_size=size.get("image_size"))


@pytest.mark.parametrize(("dim", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_are_64_channels_each_but_in_vit_h(dim: int, heads: int) -> None:
    with torch.device("meta"):
        net = timm.models.VisionTransformer(img_size=48, patch_size=8, embed_dim=dim, depth=2, num_heads=heads)
    state = net.state_dict()
    (dialect,) = find_roots(state).values()
    assert infer(dialect.to_torchvision(state)) == Architecture(f"vit_d{dim}_l2_h{heads}_p8", img_size=48)
    assert infer(dialect.to_torchvision(state), vit_heads={dim: 2}).arch == f"vit_d{dim}_l2_h2_p8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1")},
            r"blocks \(2, 2, 2, 1\).*no known name",
        ),
        (lambda s: s | {"conv1.weight": torch.ones(16, 3, 5, 5)}, "neither one 7x7 nor one 3x3"),
        (lambda s: {k: v for k, v in s.items() if k != "conv1.weight"}, "neither one 7x7 nor one 3x3"),
        (lambda s: {"conv_proj.weight": torch.ones(8, 3, 4, 4)}, "not one class token and a square grid"),
        (lambda s: {"weight": ONE}, "of no known network"),
    ],
)
def test_unknown_shapes_say_what_they_are(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        infer(change(resnet(0).state_dict()))


def convnext(dialect: str) -> nn.Module:
    if dialect == "torchvision ConvNeXt":
        setting = [
            CNBlockConfig(8, 16, 1),
            CNBlockConfig(16, 24, 2),
            CNBlockConfig(24, 32, 1),
            CNBlockConfig(32, None, 1),
        ]
        net: nn.Module = torchvision.models.ConvNeXt(setting, num_classes=5)
    else:
        net = timm.models.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    randomised(net, torch.Generator().manual_seed(0))
    return net


def facebook_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's ConvNeXt keys under the names of github.com/facebookresearch/ConvNeXt, as timm's own filter undoes it."""
    result = {}
    for key, value in state.items():
        first, number, *rest = key.split(".")
        if first == "stem":
            parts = ["downsample_layers", "0", number, *rest]
        elif first == "stages" and rest[0] == "downsample":
            parts = ["downsample_layers", number, *rest[1:]]
        elif first == "stages":
            name = {"conv_dw": "dwconv", "mlp": f"pwconv{rest[3][-1]}" if len(rest) > 3 else ""}.get(rest[2], rest[2])
            parts = ["stages", number, rest[1], name, *rest[3 + (rest[2] == "mlp") :]]
        else:
            parts = ["norm" if number == "norm" else "head", *rest]
        result[".".join(parts)] = value
    return result


@pytest.mark.parametrize("dialect", ["torchvision ConvNeXt", "timm ConvNeXt", "ConvNeXt"])
def test_convnexts_of_three_dialects(dialect: str) -> None:
    net, target = convnext(dialect), convnext("torchvision ConvNeXt")
    state = facebook_names(net.state_dict()) if dialect == "ConvNeXt" else net.state_dict()
    found = find_roots({f"model.{key}": value for key, value in state.items()})
    assert {root: d.name for root, d in found.items()} == {"model.": dialect}
    target.load_state_dict(found["model."].to_torchvision(state))
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(target(pixels), net(pixels), rtol=1e-5, atol=1e-5)


def test_renaming_loses_no_key() -> None:
    for build in FILES.values():
        content = build().content
        tensors = flatten(content) if not isinstance(content.get("model"), nn.Module) else {}
        for root, dialect in find_roots(tensors).items():
            state = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
            renamed = dialect.to_torchvision(state)
            assert len(renamed) == len(state)
            assert dialect.to_torchvision(renamed).keys() == renamed.keys()  # torchvision's own names stay


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.conv1.weight", "conv1.weight"),
        ("_orig_mod.module.conv1.weight", "conv1.weight"),
        ("encoder.module.conv1.weight", "encoder.conv1.weight"),
        ("_fsdp_wrapped_module.layer1._checkpoint_wrapped_module.0.weight", "layer1.0.weight"),
        ("modules.conv1.weight", "modules.conv1.weight"),
    ],
)
def test_wrappers_leave_no_trace(key: str, plain: str) -> None:
    assert plain_key(key) == plain


def test_flatten_takes_tensors_from_anywhere_but_the_optimiser() -> None:
    content = {
        "a": ONE,
        "state_dict": {"module.b": ONE, "n": 3, 7: {"c": ONE}},
        "optimizer": {"state": {"d": ONE}},
        "lr_scheduler": {"e": ONE},
        "callbacks": {"f": ONE},
        "classy_state_dict": {"base_model": {"g": ONE}, "hooks": {"h": ONE}},
    }
    assert list(flatten(content)) == ["a", "state_dict.b", "classy_state_dict.base_model.g"]


def test_dialects_have_their_names() -> None:
    assert {dialect.name for dialect in DIALECTS} >= {"ResNet", "timm ViT", "torchvision ViT"}


@pytest.mark.parametrize(
    ("roots", "keys", "layout", "branches"),
    [
        (["query_backbone.", "backbone."], [], "lightly, query and key", {"online": 0, "target": 1}),
        (["teacher.backbone."], [], "DINO", {"teacher": 0}),
        (["model.resnet."], ["pytorch-lightning_version"], "network under 'model.resnet.'", {"online": 0}),
        (["model_a.", "model_b."], [], "several networks", {"model_a": 0, "model_b": 1}),
        (["net.", "ema_net."], [], "networks under 'net.' and 'ema_net.'", {"online": 0, "target": 1}),
        (["ema_net.", "target_net."], [], "several networks", {"ema_net": 0, "target_net": 1}),
        (["student_encoder.", "teacher_encoder."], [], None, {"online": 0, "target": 1}),
    ],
)
def test_roots_become_branches(roots: list[str], keys: list[str], layout: str | None, branches: dict[str, int]) -> None:
    found = recognise([*keys, *(f"{root}conv1.weight" for root in roots)], roots)
    assert layout in (None, found.layout.name)
    assert found.roots == {name: roots[i] for name, i in branches.items()}


def test_student_is_online_and_teacher_is_target() -> None:
    moco = recognise([], ["encoder_q.", "encoder_k."])
    assert (moco.branch(None), moco.branch("student"), moco.branch("teacher")) == ("online", "online", "target")
    dino = recognise([], ["student.backbone.", "teacher.backbone."])
    assert (dino.branch(None), dino.branch("online"), dino.branch("target")) == ("teacher", "student", "teacher")
    with pytest.raises(UsageError, match=r"no branch 'teacher' .*SimSiam.* holds: online"):
        recognise(["encoder.fc.0.weight", "predictor.0.weight"], ["encoder."]).branch("teacher")


def test_a_network_is_found_by_its_own_names() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    keys = list(net.state_dict())
    file = [*under("a.net.", net), *under("b.", net), "c.0.weight"]
    assert roots_by_name(file, keys) == ["a.net.", "b."]
    assert roots_by_name(file, ["other.weight"]) == []


def test_the_plain_vit_is_timms() -> None:
    theirs = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    randomised(theirs, torch.Generator().manual_seed(0))
    ours = Architecture("vit_d48_l2_h4_p8", img_size=32).network()
    (dialect,) = find_roots(theirs.state_dict()).values()
    assert ours.load_state_dict(dialect.to_torchvision(theirs.state_dict()), strict=False).missing_keys == [
        "heads.head.weight",
        "heads.head.bias",
    ]
    ours.heads = nn.Identity()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(pixels), theirs(pixels), rtol=1e-5, atol=1e-5)

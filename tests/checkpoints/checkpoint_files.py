"""Checkpoints as the frameworks write them, each made by wrapping a real torchvision or timm network."""

from __future__ import annotations

import argparse
import enum
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from wild_files import hugging_face_resnet

State = dict[str, Tensor]


class Phase(enum.Enum):
    PRETRAIN = 1


DictConfig: Any = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
AttributeDict: Any = type("AttributeDict", (dict,), {"__module__": "lightning.fabric.utilities.data"})
FOREIGN = (DictConfig, AttributeDict)  # classes of packages that are not installed here


class OwnNetwork(nn.Sequential):
    """A network of the user's own; its names are no framework's."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                body=nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2)),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(12, 5),
            )
        )


@dataclass
class File:
    """What torch.save gets, and what the loaded backbone must compute."""

    content: dict[str, Any]
    reference: nn.Module  # pixels to the global representation of the default branch
    layout: str
    branch: str = "online"
    arch: str = "resnet18"
    stem: str = "imagenet"
    head: int | None = None  # the number of its classifier's outputs
    moments: str = "layout"  # where the normalisation comes from
    other: tuple[str, nn.Module] | None = None  # another branch, and what it must compute


@cache
def resnet(seed: int, *, stem: str = "imagenet", width: int = 16, classes: int = 10) -> Any:
    """torchvision's ResNet-18, narrow, with weights and statistics that no two seeds share; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        network: Any = torchvision.models.ResNet(BasicBlock, [2, 2, 2, 2])
        network.inplanes = width
        network.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        network.bn1 = nn.BatchNorm2d(width)
        for i in range(4):
            setattr(network, f"layer{i + 1}", network._make_layer(BasicBlock, width * 2**i, 2, stride=2 if i else 1))
        network.fc = nn.Linear(8 * width, classes)
    if stem != "imagenet":
        network.conv1 = nn.Conv2d(3, width, 3, 1, 2 if stem == "solo-cifar" else 1, bias=False)
        network.maxpool = nn.Identity()
    return randomised(network, torch.Generator().manual_seed(seed))


def randomised(network: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                scale = 0.1 if value.ndim < 2 else (2 / value[0].numel()) ** 0.5
                value.normal_(0, scale, generator=generator)
                if value.ndim == 1 and key.endswith("weight"):
                    value.add_(1)
            else:
                value.fill_(7)
    return network.eval()


def vit(seed: int, heads: int, dim: int = 192) -> Any:
    """A small ViT of timm's, which is DINO's and MoCo v3's too but for the number of heads."""
    with torch.random.fork_rng(devices=[]):
        made = timm.models.VisionTransformer(
            img_size=64, patch_size=16, embed_dim=dim, depth=3, num_heads=heads, num_classes=0
        )
    return randomised(made, torch.Generator().manual_seed(seed))


def headless(network: Any) -> nn.Module:
    """The network up to its global representation, on the same weights."""
    twin = torch.nn.Module.__new__(type(network))
    twin.__dict__ = {**network.__dict__, "_modules": dict(network._modules)}
    twin.fc = nn.Identity()
    return twin.eval()


def under(prefix: str, network: nn.Module | State, *, without: str = "\0") -> State:
    state = network.state_dict() if isinstance(network, nn.Module) else network
    return {f"{prefix}{key}": value for key, value in state.items() if not key.startswith(without)}


def mlp(prefix: str, *widths: int) -> State:
    """A projection head: Linear layers at 0, 2, 4, ..."""
    pairs = pairwise(widths)
    return {f"{prefix}{2 * i}.weight": torch.ones(after, before) for i, (before, after) in enumerate(pairs)}


def extras() -> dict[str, Any]:
    """What real training files carry beside weights, harmless and refused by weights_only."""
    config = DictConfig()
    config._content = {"method": "byol", "lr": 0.3}
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    optimiser.param_groups[0]["params"][0].grad = torch.ones(3)
    optimiser.step()
    return {
        "args": argparse.Namespace(lr=0.3, out=PurePosixPath("runs"), phase=Phase.PRETRAIN),
        "cfg": config,
        "optimizer": optimiser.state_dict(),
        "scheduler": optimiser,
        "best": np.float64(71.3),
        "history": np.arange(3.0),
        "counts": defaultdict(list, {"epoch": [1]}),
        "epoch": 99,
        "phase": Phase.PRETRAIN,
    }


def lightning() -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.4.0",
        "epoch": 9,
        "global_step": 100,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}],
        "hyper_parameters": AttributeDict(lr=0.1),
    }


def save(content: Any, path: Path, *, legacy: bool = False) -> Path:
    """torch.save, in a process where the packages of FOREIGN's classes are installed."""
    modules: dict[str, ModuleType] = {}
    for made in FOREIGN:
        parts = made.__module__.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            modules.setdefault(name, ModuleType(name))
        setattr(modules[made.__module__], made.__name__, made)
    with patch.dict(sys.modules, modules):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _torchvision() -> File:
    net = resnet(0)
    content = {"model": net.state_dict(), **extras()}
    return File(content, headless(net), "state dict", head=10, moments="ASSUMED (ImageNet)")


def _bare() -> File:
    net = resnet(0)
    return File(OrderedDict(net.state_dict()), headless(net), "state dict", head=10, moments="ASSUMED (ImageNet)")


def _data_parallel() -> File:
    net = resnet(0)
    state = nn.DataParallel(net).state_dict()
    return File({"state_dict": state, **extras()}, headless(net), "state dict", head=10, moments="ASSUMED (ImageNet)")


def _compiled() -> File:
    net = resnet(0)
    return File(torch.compile(net).state_dict(), headless(net), "state dict", head=10, moments="ASSUMED (ImageNet)")


def _averaged() -> File:
    net, average = resnet(0), resnet(1)
    content = {"model": net.state_dict(), "model_ema": torch.optim.swa_utils.AveragedModel(average).state_dict()}
    return File(
        content | extras(),
        headless(net),
        "weights with an average",
        head=10,
        moments="ASSUMED (ImageNet)",
        other=("target", headless(average)),
    )


def _solo(stem: str) -> File:
    net, momentum = resnet(0, stem=stem), resnet(1, stem=stem)
    state = {
        **under("backbone.", net, without="fc."),
        **under("momentum_backbone.", momentum, without="fc."),
        **mlp("projector.", 128, 64, 32),
        **mlp("momentum_projector.", 128, 64, 32),
        "classifier.weight": torch.ones(100, 128),
        "classifier.bias": torch.ones(100),
    }
    return File(
        {"state_dict": state, **lightning(), **extras()},
        headless(net),
        "solo-learn",
        stem=stem,
        head=100,
        moments="ASSUMED (ImageNet)",
        other=("target", headless(momentum)),
    )


def _lightly_sequential() -> File:
    net, momentum = resnet(0), resnet(1)
    parts, momentum_parts = (nn.Sequential(*list(n.children())[:-1], nn.Flatten()) for n in (net, momentum))
    state = {
        **under("backbone.", parts),
        **under("backbone_momentum.", momentum_parts),
        **mlp("projection_head.layers.", 128, 64),
        **mlp("prediction_head.layers.", 64, 64),
    }
    content = {"state_dict": state, **lightning()}
    return File(content, parts.eval(), "lightly", other=("target", momentum_parts.eval()))


def _lightly_own_resnet() -> File:
    """lightly.models.ResNetGenerator: shortcut for downsample, and the first ReLU lost in the nn.Sequential."""
    net = resnet(0, stem="cifar")
    parts = nn.Sequential(
        net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    state = {key.replace("downsample", "shortcut"): value for key, value in under("backbone.", parts).items()}
    content = {"state_dict": state | mlp("projection_head.layers.", 128, 64), **lightning()}
    return File(content, parts.eval(), "lightly", stem="lightly-cifar", moments="ASSUMED (ImageNet)")


def _lightly_dino() -> File:
    teacher, student = resnet(0), resnet(1)
    state = {
        **under("backbone.", teacher, without="fc."),
        **under("student_backbone.", student, without="fc."),
        **mlp("projection_head.layers.", 128, 64),
        "online_classifier.linear.weight": torch.ones(1000, 128),
        "online_classifier.linear.bias": torch.ones(1000),
    }
    return File(
        {"state_dict": state, **lightning()},
        headless(teacher),
        "lightly, student and teacher",
        "teacher",
        head=1000,
        other=("student", headless(student)),
    )


def _moco(projection: Callable[[str], State]) -> File:
    query, key = resnet(0), resnet(1)
    state = {
        **under("module.encoder_q.", query, without="fc."),
        **projection("module.encoder_q.fc."),
        **under("module.encoder_k.", key, without="fc."),
        **projection("module.encoder_k.fc."),
        "module.queue": torch.ones(64, 128),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}
    return File(content, headless(query), "MoCo", other=("target", headless(key)))


def _moco_v3_resnet() -> File:
    net, momentum = resnet(0), resnet(1)
    state = {
        **under("module.base_encoder.", net, without="fc."),
        **mlp("module.base_encoder.fc.", 128, 64),
        **under("module.momentum_encoder.", momentum, without="fc."),
        **mlp("module.predictor.", 64, 64),
    }
    content = {"state_dict": state, **extras()}
    return File(content, headless(net), "MoCo v3", other=("target", headless(momentum)))


def _moco_v3_vit() -> File:
    net = vit(0, heads=12, dim=384)
    state = under("module.base_encoder.", net) | mlp("module.base_encoder.head.", 384, 64)
    return File({"state_dict": state, **extras()}, net, "MoCo v3", arch="vit_d384_l3_h12_p16")


def sine_cosine(side: int, dim: int) -> Tensor:
    """moco-v3's fixed positions of a grid of patches, (1, 1 + side^2, dim); those of the class token are zeros."""
    angles = torch.arange(side)[:, None] / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    rows, columns = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
    return F.pad(torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1), (0, 0, 1, 0))[None]


def _moco_v3_linear() -> File:
    """main_lincls.py's: nothing of its keys is moco-v3's own."""
    net = vit(0, heads=12, dim=384)
    net.pos_embed.data = sine_cosine(4, 384)
    state = under("module.", net) | {"module.head.weight": torch.ones(1000, 384), "module.head.bias": torch.ones(1000)}
    content = {"epoch": 90, "arch": "vit_small", "state_dict": state, "best_acc1": torch.tensor(73.2), "optimizer": {}}
    return File(content, net, "MoCo v3, linear", arch="vit_d384_l3_h12_p16", head=1000)


def _dino(student: Any, teacher: Any, reference: tuple[nn.Module, nn.Module], arch: str) -> File:
    content = {
        "student": under("module.backbone.", student, without="fc.") | mlp("module.head.mlp.", 8, 8),
        "teacher": under("backbone.", teacher, without="fc.") | mlp("head.mlp.", 8, 8),
        "dino_loss": {"center": torch.zeros(1, 8)},
        "fp16_scaler": {"scale": 65536.0},
    }
    return File(content | extras(), reference[1], "DINO", "teacher", arch=arch, other=("student", reference[0]))


def _dino_vit() -> File:
    student, teacher = vit(0, heads=3), vit(1, heads=3)
    return _dino(student, teacher, (student, teacher), "vit_d192_l3_h3_p16")


def _dino_resnet() -> File:
    student, teacher = resnet(0), resnet(1)
    return _dino(student, teacher, (headless(student), headless(teacher)), "resnet18")


def _dino_backbone() -> File:
    net = vit(0, heads=3)
    return File(net.state_dict(), net, "state dict", arch="vit_d192_l3_h3_p16", moments="ASSUMED (ImageNet)")


def _byol_pytorch() -> File:
    net, target = resnet(0), resnet(1)
    state = {
        **under("net.", net),
        **under("online_encoder.net.", net),
        **mlp("online_encoder.projector.", 128, 64),
        **under("target_encoder.net.", target),
        **mlp("online_predictor.", 64, 64),
    }
    return File(state, headless(net), "byol-pytorch", other=("target", headless(target)))


def _byol_sthalles() -> File:
    net, target = (nn.Sequential(*list(resnet(i).children())[:-1], nn.Flatten()).eval() for i in (0, 1))
    content = {
        "online_network_state_dict": under("encoder.", net) | mlp("projetion.net.", 128, 64),
        "encoder_state_dict": net.state_dict(),
        "target_network_state_dict": under("encoder.", target) | mlp("projetion.net.", 128, 64),
        "optimizer_state_dict": extras()["optimizer"],
    }
    return File(content, net, "BYOL (PyTorch-BYOL)", other=("target", target))


def _simsiam() -> File:
    net = resnet(0)
    state = {
        **under("module.encoder.", net, without="fc."),
        **mlp("module.encoder.fc.", 128, 128, 128),
        **mlp("module.predictor.", 128, 64),
    }
    return File({"arch": "resnet18", "state_dict": state, **extras()}, headless(net), "SimSiam")


def _simclr_sthalles() -> File:
    net = resnet(0)
    state = under("backbone.", net, without="fc.") | mlp("backbone.fc.", 128, 128, 128)
    return File({"state_dict": state, **extras()}, headless(net), "SimCLR (github.com/sthalles)")


def _simclr_leftthomas() -> File:
    net = resnet(0, stem="cifar")
    parts = [m for m in net.children() if not isinstance(m, nn.Identity | nn.Linear)]
    parts = nn.Sequential(*parts, nn.Flatten()).eval()
    state = under("f.", parts) | mlp("g.", 128, 128, 128)
    return File(state, parts, "SimCLR (github.com/leftthomas)", stem="cifar")


def _supcontrast() -> File:
    net = resnet(0)
    state = under("encoder.module.", net, without="fc.") | mlp("head.", 128, 128, 128)
    content = {"model": state, "opt": extras()["args"]}
    return File(content, headless(net), "network under 'model.encoder.'", moments="ASSUMED (ImageNet)")


def _vissl() -> File:
    net = resnet(0)
    model = {
        "trunk": under("_feature_blocks.", net, without="fc."),
        "heads": {"0.clf.0.weight": torch.ones(1000, 128), "0.clf.0.bias": torch.ones(1000)},
    }
    classy = {"base_model": {"model": model, "meta": {}}, "optimizer": {"momentum": torch.ones(3)}, "loss": {}}
    content = {"phase": 100, "iteration": 9, "classy_state_dict": classy, **extras()}
    return File(content, headless(net), "VISSL", head=1000)


def _mmselfsup() -> File:
    net, key = resnet(0), resnet(1)
    state = {
        **under("encoder_q.0.", net, without="fc."),
        **mlp("encoder_q.1.mlp.", 128, 64),
        **under("backbone.", net, without="fc."),
        **under("encoder_k.0.", key, without="fc."),
        "queue": torch.ones(64, 128),
        "queue2": torch.ones(64, 128),
    }
    content = {"meta": {"mmcv_version": "1.3", "time": "now", "config": "a"}, "state_dict": state, **extras()}
    return File(content, headless(net), "mmselfsup", other=("target", headless(key)))


def _barlow() -> File:
    net = resnet(0)
    state = under("module.backbone.", net, without="fc.") | mlp("module.projector.", 128, 64)
    return File({"epoch": 9, "model": state, **extras()}, headless(net), "Barlow Twins or VICReg")


def _lightning(prefix: str) -> File:
    net = resnet(0, stem="cifar")
    state = under(prefix, net) | {"loss.weight": torch.ones(10)}
    content = {"state_dict": state, **lightning(), **extras()}
    return File(content, headless(net), "Lightning", stem="cifar", head=10, moments="ASSUMED (ImageNet)")


def _student_teacher() -> File:
    net, ema = resnet(0), resnet(1)
    return File(
        {"state_dict": under("student_net.", net) | under("ema_net.", ema), **extras()},
        headless(net),
        "networks under 'state_dict.student_net.' and 'state_dict.ema_net.'",
        head=10,
        moments="ASSUMED (ImageNet)",
        other=("teacher", headless(ema)),
    )


def _whole_module() -> File:
    net = resnet(0)
    return File({"model": net}, headless(net), "state dict", head=10, moments="ASSUMED (ImageNet)")


def _hugging_face() -> File:
    net = resnet(0)
    state = hugging_face_resnet(net.state_dict())
    return File(state, headless(net), "Hugging Face", head=10, moments="ASSUMED (ImageNet)")


FILES: dict[str, Callable[[], File]] = {
    "torchvision reference": _torchvision,
    "bare state dict": _bare,
    "DataParallel": _data_parallel,
    "torch.compile": _compiled,
    "with an average": _averaged,
    "solo-learn": lambda: _solo("imagenet"),
    "solo-learn, CIFAR": lambda: _solo("solo-cifar"),
    "lightly, nn.Sequential": _lightly_sequential,
    "lightly, ResNetGenerator": _lightly_own_resnet,
    "lightly, DINO": _lightly_dino,
    "MoCo v1": lambda: _moco(lambda p: {f"{p}weight": torch.ones(128, 128), f"{p}bias": torch.ones(128)}),
    "MoCo v2": lambda: _moco(lambda p: mlp(p, 128, 128, 128)),
    "MoCo v3, ResNet": _moco_v3_resnet,
    "MoCo v3, ViT": _moco_v3_vit,
    "MoCo v3, linear ViT": _moco_v3_linear,
    "DINO, ViT": _dino_vit,
    "DINO, ResNet": _dino_resnet,
    "DINO, backbone only": _dino_backbone,
    "byol-pytorch": _byol_pytorch,
    "PyTorch-BYOL": _byol_sthalles,
    "SimSiam": _simsiam,
    "SimCLR, sthalles": _simclr_sthalles,
    "SimCLR, leftthomas": _simclr_leftthomas,
    "SupContrast": _supcontrast,
    "VISSL": _vissl,
    "mmselfsup, DenseCL": _mmselfsup,
    "Barlow Twins": _barlow,
    "Lightning, model.": lambda: _lightning("model."),
    "Lightning, encoder.": lambda: _lightning("encoder."),
    "student and EMA of one's own": _student_teacher,
    "a whole pickled module": _whole_module,
    "Hugging Face, ResNet": _hugging_face,
}

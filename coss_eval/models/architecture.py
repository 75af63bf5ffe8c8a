"""What decides a network's function besides its weights, how to build it, and what of it the weights' shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from math import isqrt
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook as on_buffer
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter
from torchvision.models import VisionTransformer

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models import zoo
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import Pooling, Stem
from coss_eval.models.cifar_resnet import CifarSpec, Shortcut
from coss_eval.models.classifier import MOST_SIDE
from coss_eval.models.families import has_resnet_stem
from coss_eval.models.rf_resnet import is_rf_resnet
from coss_eval.models.trial import takes_any_size, try_sizes
from coss_eval.randomness import seeded_init

# (bottleneck, blocks, groups, inner width of stage 1 in units of the stem's) to torchvision's name
RESNETS = {
    (False, (2, 2, 2, 2), 1, 1): "resnet18",
    (False, (3, 4, 6, 3), 1, 1): "resnet34",
    (True, (3, 4, 6, 3), 1, 1): "resnet50",
    (True, (3, 4, 23, 3), 1, 1): "resnet101",
    (True, (3, 8, 36, 3), 1, 1): "resnet152",
    (True, (3, 4, 6, 3), 1, 2): "wide_resnet50_2",
    (True, (3, 4, 23, 3), 1, 2): "wide_resnet101_2",
    (True, (3, 4, 6, 3), 32, 2): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 32, 4): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 64, 4): "resnext101_64x4d",
}
CONVNEXTS = {
    (96, (3, 3, 9, 3)): "convnext_tiny",
    (96, (3, 3, 27, 3)): "convnext_small",
    (128, (3, 3, 27, 3)): "convnext_base",
    (192, (3, 3, 27, 3)): "convnext_large",
}
# (dim, blocks, heads, patch) to torchvision's name
VITS = {
    (768, 12, 12, 16): "vit_b_16",
    (768, 12, 12, 32): "vit_b_32",
    (1024, 24, 16, 16): "vit_l_16",
    (1024, 24, 16, 32): "vit_l_32",
    (1280, 32, 16, 14): "vit_h_14",
}
# (version 2, dim, blocks) to torchvision's name; windows are of 7 in the first version and of 8 in the second
SWINS = {
    (False, 96, (2, 2, 6, 2)): "swin_t",
    (False, 96, (2, 2, 18, 2)): "swin_s",
    (False, 128, (2, 2, 18, 2)): "swin_b",
    (True, 96, (2, 2, 6, 2)): "swin_v2_t",
    (True, 96, (2, 2, 18, 2)): "swin_v2_s",
    (True, 128, (2, 2, 18, 2)): "swin_v2_b",
}
# channels to attention heads, as every published ViT of that width has them but moco-v3's ViT-S (12, see vit_heads)
VIT_HEADS = {
    **{dim: dim // 64 for dim in (192, 384, 512, 640, 768, 1024, 1536)},
    **dict.fromkeys((1152, 1280, 1408, 1664), 16),
}
MOST_WIDTH = 16_384  # planes of a ResNet's first stage
VIT_SPEC = re.compile(r"vit_d(\d+)_l(\d+)_h(\d+)_p(\d+)")


@dataclass(frozen=True)
class Architecture:
    """``arch``: a name that zoo.network knows, or "vit_d384_l12_h6_p16": a plain ViT's dim, blocks, heads and patch.
    "torchvision:NAME" is NAME.

    ``stem``: see ``use_cifar_stem``. ``img_size``: the side a ViT's
    position embedding is made for. ``pooling``: the global representation of token sequences. ``local``, ``global_``:
    the modules whose outputs are the representations, where a caller names them (see ``wrap``). ``channels``: of the
    images, 1 for a grey network.
    """

    arch: str
    stem: Stem = "imagenet"
    width: int = 64
    img_size: int | None = None
    pooling: Pooling = "own"
    local: str | None = None
    global_: str | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", self.arch.removeprefix("torchvision:"))
        if self.stem not in get_args(Stem):
            raise unknown_name("stem", self.stem, get_args(Stem))
        for name, value, most in (("width", self.width, MOST_WIDTH), ("img_size", self.img_size, MOST_SIDE)):
            if value is not None and not (isinstance(value, int) and 0 < value <= most):
                raise UsageError(f"{name} must be a whole number from 1 to {most:,}, not {value!r}")

    @property
    def own(self) -> bool:
        """Whether a person's own factory makes the network."""
        return zoo.is_own(self.arch)

    @property
    def is_vit(self) -> bool:
        """Whether it is torchvision's ViT, which is built for images of one side."""
        return self.arch in VITS.values() or VIT_SPEC.fullmatch(self.arch) is not None

    def network(self, seed: int | None = 0, num_classes: int | None = None) -> nn.Module:
        """The bare network with random weights; ``seed`` None draws from torch's CPU generator as it stands."""
        made = self._network(seed, num_classes)
        if self.channels != 3:
            with seeded_init(seed) if seed is not None else nullcontext():
                _take_channels(made, self.channels)
        return made

    def _network(self, seed: int | None, num_classes: int | None) -> nn.Module:
        spec = VIT_SPEC.fullmatch(self.arch)
        if spec:
            with seeded_init(seed) if seed is not None else nullcontext():
                return _plain_vit(*map(int, spec.groups()), side=self.img_size or 224, classes=num_classes or 1000)
        return zoo.network(
            self.arch, stem=self.stem, width=self.width, img_size=self.img_size, num_classes=num_classes, seed=seed
        )

    def backbone(self, seed: int | None = None) -> Backbone:
        """A Backbone of this architecture with random weights; see ``network``."""
        return self.wrap(self.network(seed))[0]

    def wrap(self, network: nn.Module) -> tuple[Backbone, nn.Module | None]:
        """A network of this architecture as a Backbone and its head; see ``wrap.wrap``."""
        return zoo.wrap(
            network,
            self.arch,
            img_size=self.img_size,
            pooling=self.pooling,
            local=self.local,
            global_=self.global_,
        )

    def options(self) -> dict[str, Any]:
        """What stands beside the name in a protocol: the fields that are not at their default."""
        defaults = asdict(Architecture(self.arch))
        return {key: value for key, value in asdict(self).items() if value != defaults[key] and key != "img_size"}


class _AboveLimit(Exception):
    """More numbers than are asked about."""


@lru_cache(maxsize=256)
def has_more_numbers(architecture: Architecture, most: int, classes: int | None = None) -> bool:
    """Whether a network's parameters and buffers are more than ``most`` numbers; it is built without memory for them.

    A person's own is not built, as its code may do anything.
    """
    if architecture.own:
        return False
    vit = VIT_SPEC.fullmatch(architecture.arch)
    if vit is not None and 12 * int(vit[2]) * int(vit[1]) ** 2 > most:  # weights of its blocks alone: none is built
        return True
    total = 0

    def count(_module: nn.Module, _name: str, added: Tensor | None) -> None:
        nonlocal total
        total += 0 if added is None else added.numel()
        if total > most:
            raise _AboveLimit

    hooks = [register(count) for register in (on_parameter, on_buffer)]
    try:
        with torch.device("meta"):
            architecture.network(num_classes=classes)
    except _AboveLimit:
        return True
    except RuntimeError:  # a constructor that looks at the values it makes, as those of timm 1.0.3 do
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return False


def _take_channels(network: nn.Module, channels: int) -> None:
    """Put a first convolution of so many channels in the place of the network's own."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, own = name.rpartition(".")
            made = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]  # as a tuple of two
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            setattr(network.get_submodule(parent), own, made)
            return


def built_for_a_side(arch: str, side: int) -> bool:
    """Whether a network has to be told the side of its images before it is built, as ViTs do.

    Of torchvision's and timm's that is known; a person's own runs once, at ``side`` and at a larger one.
    """
    architecture = Architecture(arch)
    if architecture.own:
        network = architecture.network()
        try:
            example, _ = try_sizes(network, (side,))
        except UsageError:  # it is for another side, and will say so
            return False
        return not takes_any_size(network, example)
    return architecture.is_vit or (arch.startswith("timm:") and zoo.fixed_side_in_timm(arch.removeprefix("timm:")))


def takes_stem(arch: str) -> bool:
    """Whether a network has the ResNet's stem, for which a preset may name another; a person's own is left as it is."""
    architecture = Architecture(arch)
    if arch.startswith("timm:"):
        return has_resnet_stem(architecture.network())
    return architecture.arch in RESNETS.values() or is_rf_resnet(architecture.arch)


def _plain_vit(dim: int, blocks: int, heads: int, patch: int, *, side: int, classes: int) -> nn.Module:
    if dim % heads or side % patch:
        raise UsageError(f"a ViT's dim {dim} must divide by its {heads} heads, its side {side} by its patch {patch}")
    made: nn.Module = VisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=blocks,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=4 * dim,
        num_classes=classes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return made


class HeadsUnknown(UsageError):
    """Nothing tells how many attention heads a ViT has: no tensor's shape does, and another number computes another
    function.
    """


def heads_of_vit(dim: int, positions: Tensor | None, told: Mapping[int, int], name: str) -> int:
    """The attention heads of a ViT of ``dim`` channels: as ``told`` by width, or as all published ones of it have.

    ``positions``: those of its tokens, (..., dim). Those of moco-v3's ViT-S, which departs from the others, are sines
    and cosines that training leaves alone. ``name``: what --arch takes, with N for the heads, for HeadsUnknown, which
    is raised where nothing tells them.
    """
    if dim in told:
        return told[dim]
    give = f"give --arch '{name}' with their number in the place of N"
    if dim == 384 and positions is not None and _is_sine_cosine(positions):
        raise HeadsUnknown(
            "no tensor tells how many attention heads its ViT of 384 channels has, and its positions are sines and "
            f"cosines, as in MoCo v3's (12 heads) and in MAE's (6): {give}"
        )
    if dim not in VIT_HEADS:
        raise HeadsUnknown(f"no tensor tells how many attention heads its ViT of {dim} channels has: {give}")
    return VIT_HEADS[dim]


def _is_sine_cosine(positions: Tensor) -> bool:
    """Whether nearly every position's squares add up to dim/2, as those of dim/2 pairs of sine and cosine do."""
    if positions.is_meta:  # there is nothing to look at
        return False
    squares = positions.detach().float().reshape(-1, positions.shape[-1]).square().sum(1) / (positions.shape[-1] / 2)
    return bool(((squares - 1).abs() < 0.1).float().mean() > 0.9)  # a class token's are zeros


def infer(
    state: Mapping[str, Tensor], *, vit_heads: Mapping[int, int] | None = None, raw_shortcuts: bool = False
) -> Architecture:
    """The architecture whose shapes these are; ``state`` has torchvision's key names (see dialects).

    ``vit_heads``: heads by width where something but the shapes tells them (see ``heads_of_vit``).
    ``raw_shortcuts``: whether a pre-activation network's shortcuts take the input before it is activated. Raises
    UsageError that says what is not known.
    """
    if "layer1.0.conv1.weight" in state:
        return _infer_resnet(state, raw_shortcuts)
    if "conv_proj.weight" in state:
        return _infer_vit(state, vit_heads or {})
    if "features.1.0.attn.qkv.weight" in state:
        blocks = tuple(_count(state, rf"features\.{i}\.(\d+)\.norm1\.weight") for i in (1, 3, 5, 7))
        dim, second = state["features.0.0.weight"].shape[0], "features.1.0.attn.logit_scale" in state
        kind = f"a Swin{' v2' * second} of width {dim} and blocks {blocks}"
        return Architecture(_known(SWINS, (second, dim, blocks), kind))
    if "features.0.0.weight" in state:
        blocks = tuple(_count(state, rf"features\.{i}\.(\d+)\.block\.0\.weight") for i in (1, 3, 5, 7))
        dim = state["features.0.0.weight"].shape[0]
        return Architecture(_known(CONVNEXTS, (dim, blocks), f"a ConvNeXt of width {dim} and blocks {blocks}"))
    raise UsageError("the shapes are of no known network")


def _infer_resnet(state: Mapping[str, Tensor], raw_shortcuts: bool) -> Architecture:
    cifar = _infer_cifar(state, raw_shortcuts)
    if cifar is not None:
        return Architecture(cifar.name, channels=state["conv1.weight"].shape[1])
    blocks = tuple(_count(state, rf"layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
    stem = state.get("conv1.weight")
    if stem is None or stem.ndim != 4 or stem.shape[2] not in (3, 7):
        raise UsageError("a ResNet whose stem is neither one 7x7 nor one 3x3 convolution")
    bottleneck = "layer1.0.conv3.weight" in state
    spatial = state.get("layer1.0.conv2.weight" if bottleneck else "layer1.0.conv1.weight")
    if spatial is None:
        raise UsageError("a ResNet whose blocks have no conv2 (a Res2Net and the like) has no known name")
    width, inner = stem.shape[0], state["layer1.0.conv1.weight"].shape[0]
    groups = spatial.shape[0] // spatial.shape[1] if bottleneck else 1
    kind = f"a {'bottleneck' if bottleneck else 'basic-block'} ResNet of blocks {blocks} and {groups} groups"
    name = _known(RESNETS, (bottleneck, blocks, groups, inner / width), kind)
    places = ("conv2",) if bottleneck else ("conv1", "conv2")
    kept = tuple(_kept(state, i, count, places) for i, count in enumerate(blocks, start=1))
    mlp = _mlp_suffix(state, channels=8 * width * (4 if bottleneck else 1))
    if mlp or kept != tuple(count * len(places) for count in blocks):
        if name not in zoo.SCALABLE:
            raise UsageError(f"a {name} with 1x1 convolutions for 3x3 ones, or with an MLP, has no known name")
        name = f"rf_{name}_k{'-'.join(map(str, kept))}{mlp}"
    return Architecture(name, "imagenet" if stem.shape[2] == 7 else "cifar", width, channels=stem.shape[1])


def _infer_cifar(state: Mapping[str, Tensor], raw_shortcuts: bool) -> CifarSpec | None:
    """The ResNet for 32 px whose shapes these are: three stages, or pre-activation; None for others."""
    blocks = [count for i in (1, 2, 3, 4) if (count := _count(state, rf"layer{i}\.(\d+)\.conv1\.weight"))]
    stem, first, second = (state.get(k) for k in ("conv1.weight", "layer2.0.conv1.weight", "layer2.0.bn1.weight"))
    if stem is None or first is None or second is None or stem.shape[2:] != (3, 3) or len(blocks) not in (3, 4):
        return None
    preactivation = second.shape[0] == first.shape[1] != first.shape[0]
    if not preactivation and len(blocks) == 4:
        return None
    if first.shape[2] not in (1, 3):
        raise UsageError(f"a ResNet for 32 px of blocks {tuple(blocks)} has no known name")
    bottleneck = "layer1.0.conv3.weight" in state
    planes = state["layer1.0.conv1.weight"].shape[0]
    shortcut: Shortcut = "pad"
    if "layer2.0.downsample.0.weight" in state:
        shortcut = "rawconv" if raw_shortcuts else "conv"
        shortcut = "projection" if "layer2.0.downsample.1.weight" in state else shortcut
    widen = max(1, planes // stem.shape[0])
    return CifarSpec(
        sum(blocks) * (3 if bottleneck else 2) + (2 if widen == 1 else 4),
        preactivation,
        bottleneck,
        len(blocks),
        stem.shape[0],
        widen,
        shortcut,
        preactivation and "bn.weight" not in state,
        tuple(blocks) if len(set(blocks)) > 1 else (),
    )


def plain_resnet(arch: str) -> str:
    """The ResNet whose depth, stem and width an RF-ResNet has: "rf29_resnet18" is a "resnet18". Other names stay."""
    return re.sub(r"^rf\d*_(resnet\d+)(_k.*)?$", r"\1", arch)


def _kept(state: Mapping[str, Tensor], stage: int, blocks: int, places: tuple[str, ...]) -> int:
    """How many of a stage's 3x3 convolutions are none of 1x1; one that is missing counts as 3x3."""
    keys = [f"layer{stage}.{block}.{place}.weight" for block in range(blocks) for place in places]
    spatial = [key not in state or state[key].shape[-1] > 1 for key in keys]
    if spatial != sorted(spatial, reverse=True):
        raise UsageError(f"a ResNet whose stage {stage} has 1x1 convolutions before 3x3 ones has no known name")
    return sum(spatial)


def _mlp_suffix(state: Mapping[str, Tensor], channels: int) -> str:
    """The part of an RF-ResNet's name that stands for its MLP; "" where no ``mlp`` has the shapes of one.

    A projection head of that name has normalisations in it, or another width at its end.
    """
    layers = _count(state, r"mlp\.\d+\.weight")
    keys = {f"mlp.{2 * i}.{kind}" for i in range(layers) for kind in ("weight", "bias")}
    if not layers or keys != {key for key in state if key.startswith("mlp.")}:
        return ""
    units = state["mlp.0.weight"].shape[0]
    shapes = [tuple(state[f"mlp.{2 * i}.weight"].shape) for i in range(layers)]
    if shapes != [(units, channels), *[(units, units)] * (layers - 1)]:
        return ""
    return f"_mlp{layers}" + (f"x{units}" if units != channels else "")


def _infer_vit(state: Mapping[str, Tensor], vit_heads: Mapping[int, int]) -> Architecture:
    dim, _, patch, _ = state["conv_proj.weight"].shape
    blocks = _count(state, r"encoder\.layers\.encoder_layer_(\d+)\.ln_1\.weight")
    positions = state.get("encoder.pos_embedding")
    side = 0 if positions is None else isqrt(positions.shape[1] - 1)
    if positions is None or side**2 + 1 != positions.shape[1]:
        raise UsageError("a ViT whose positions are not one class token and a square grid")
    heads = heads_of_vit(dim, positions, vit_heads, f"vit_d{dim}_l{blocks}_hN_p{patch}")
    name = VITS.get((dim, blocks, heads, patch), f"vit_d{dim}_l{blocks}_h{heads}_p{patch}")
    return Architecture(name, img_size=side * patch)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def _known(table: Mapping[Any, str], signature: Any, description: str) -> str:
    if signature not in table:
        raise UsageError(f"{description} has no known name")
    return table[signature]

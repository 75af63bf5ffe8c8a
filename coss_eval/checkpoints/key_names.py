"""The same network under other names: each family's key names, brought to torchvision's.

A dialect is recognised by one key that every network of its kind has; what stands before that key is the network's
root inside the file ("state_dict.encoder_q.").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coss_eval.models.choices import Stem

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    name: str
    mark: str  # a pattern of the end of one key
    to_torchvision: Callable[[StateDict], StateDict]
    stem: Stem | None = None  # a ResNet's, where the numbering tells it
    needs: str = ""  # another key that must stand beside the mark
    head_channels: int | None = None  # of each attention head of a ViT, where the code that makes such files has one

    def roots(self, keys: Mapping[str, Tensor]) -> list[str]:
        """The prefixes under which the file holds such a network, in the file's order."""
        pattern = re.compile(rf"^(?P<root>(?:.*\.)?){self.mark}$")
        matches = (pattern.match(key) for key in keys)
        return [m["root"] for m in matches if m and (not self.needs or m["root"] + self.needs in keys)]


def renamed(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[StateDict], StateDict]:
    """A dialect's renaming: rules of a pattern in a key and what stands in its place, applied in this order."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(state: StateDict) -> StateDict:
        result = {}
        for key, value in state.items():
            for pattern, replacement in compiled:
                key = pattern.sub(replacement, key, count=1)
            result[key] = value
        return result

    return rename


def _from_sequential(state: StateDict) -> StateDict:
    """nn.Sequential(*resnet.children()): the numbers in rising order are conv1, bn1, layer1, ..., and perhaps fc."""
    numbers = sorted({int(key.partition(".")[0]) for key in state if key.partition(".")[0].isdigit()})
    names, stages = {}, 0
    for number in numbers:
        if f"{number}.0.conv1.weight" in state:
            stages += 1
            names[number] = f"layer{stages}"
        elif f"{number}.running_mean" in state:
            names[number] = "bn1"
        elif state.get(f"{number}.weight", _EMPTY).ndim == 4:
            names[number] = "conv1"
        elif f"{number}.weight" in state:
            names[number] = "fc"
    rules = [(rf"^{number}\.", f"{name}.") for number, name in names.items()]
    return _shortcuts(renamed(*rules)(state))


def _from_resnet(state: StateDict) -> StateDict:
    """Shortcuts by any name; the norm that ends a pre-activation network is bn, whatever it is called."""
    named = _shortcuts(state)
    norm, conv = named.get("layer2.0.bn1.weight"), named.get("layer2.0.conv1.weight")
    if norm is None or conv is None or not norm.shape[0] == conv.shape[1] != conv.shape[0]:
        return named  # a norm of what goes into the block's first convolution comes before it
    last = next((s for i in (4, 3) if (s := named.get(f"layer{i}.0.conv1.weight")) is not None), conv)
    if "bn1.weight" in named and named["bn1.weight"].shape[0] >= last.shape[0]:
        return renamed((r"^bn1\.", "bn."))(named)
    return named


def _from_wide_resnet(state: StateDict) -> StateDict:
    return _from_resnet(_wide_resnet(state))


def _from_timm_convnext(state: StateDict) -> StateDict:
    return from_facebook_convnext(_timm_to_facebook(state))


def from_facebook_convnext(state: StateDict) -> StateDict:
    """github.com/facebookresearch/ConvNeXt: four downsample_layers beside four stages; torchvision alternates them."""

    def alternate(match: re.Match[str]) -> str:
        return f"features.{2 * int(match[2]) + (match[1] == 'stages')}."

    result = {}
    for key, value in state.items():
        name = re.sub(r"^(downsample_layers|stages)\.(\d+)\.", alternate, key)
        for part, number in (("dwconv", 0), ("norm", 2), ("pwconv1", 3), ("pwconv2", 5)):
            name = re.sub(rf"^(features\.[1357]\.\d+)\.{part}\.", rf"\1.block.{number}.", name)
        name = re.sub(r"^(features\.[1357]\.\d+)\.gamma$", r"\1.layer_scale", name)
        name = re.sub(r"^norm\.", "classifier.0.", name)
        name = re.sub(r"^head\.", "classifier.2.", name)
        result[name] = value.view(-1, 1, 1) if name.endswith("layer_scale") else value
    return result


_EMPTY = Tensor()
_shortcuts = renamed((r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample."), (r"^linear\.", "fc."))
_wide_resnet = renamed((r"^block(\d)\.layer\.", r"layer\1."), (r"^(layer\d+\.\d+)\.convShortcut\.", r"\1.shortcut.0."))
_residual_functions = renamed(
    (r"^conv1\.0\.", "conv1."),
    (r"^conv1\.1\.", "bn1."),
    (r"^conv2_x\.", "layer1."),
    (r"^conv3_x\.", "layer2."),
    (r"^conv4_x\.", "layer3."),
    (r"^conv5_x\.", "layer4."),
    (r"\.residual_function\.0\.", ".conv1."),
    (r"\.residual_function\.1\.", ".bn1."),
    (r"\.residual_function\.3\.", ".conv2."),
    (r"\.residual_function\.4\.", ".bn2."),
    (r"\.residual_function\.6\.", ".conv3."),
    (r"\.residual_function\.7\.", ".bn3."),
    (r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample."),
)
timm_vit_to_torchvision = renamed(
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"(encoder_layer_\d+)\.norm([12])\.", r"\1.ln_\2."),
    (r"(encoder_layer_\d+)\.attn\.qkv\.", r"\1.self_attention.in_proj_"),
    (r"(encoder_layer_\d+)\.attn\.proj\.", r"\1.self_attention.out_proj."),
    (r"(encoder_layer_\d+)\.mlp\.fc1\.", r"\1.mlp.0."),
    (r"(encoder_layer_\d+)\.mlp\.fc2\.", r"\1.mlp.3."),
)
_old_vit = renamed((r"(encoder_layer_\d+)\.mlp\.linear_1\.", r"\1.mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3."))
_timm_to_facebook = renamed(
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"^(stages\.\d+\.\d+)\.conv_dw\.", r"\1.dwconv."),
    (r"^(stages\.\d+\.\d+)\.mlp\.fc([12])\.", r"\1.pwconv\2."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)

DIALECTS = (
    Dialect("ResNet", r"layer1\.0\.conv1\.weight", _from_resnet),
    Dialect("Wide ResNet", r"block1\.layer\.0\.conv1\.weight", _from_wide_resnet),
    Dialect("ResNet of residual functions", r"conv2_x\.0\.residual_function\.0\.weight", _residual_functions),
    # An nn.Sequential of torchvision's ResNet has its first stage at 4, or at 3 where the max-pool was dropped.
    # lightly's own CIFAR ResNet applies its first ReLU outside its modules: an nn.Sequential of them computes none,
    # and has its first stage at 2.
    Dialect("nn.Sequential of lightly's ResNet", r"2\.0\.conv1\.weight", _from_sequential, stem="lightly-cifar"),
    Dialect("nn.Sequential of a ResNet", r"3\.0\.conv1\.weight", _from_sequential, stem="cifar"),
    Dialect("nn.Sequential of a ResNet", r"4\.0\.conv1\.weight", _from_sequential),
    Dialect("timm ViT", r"blocks\.0\.attn\.qkv\.weight", timm_vit_to_torchvision, needs="patch_embed.proj.weight"),
    Dialect("torchvision ViT", r"encoder\.layers\.encoder_layer_0\.ln_1\.weight", _old_vit),
    Dialect("torchvision ConvNeXt", r"features\.1\.0\.layer_scale", lambda state: state),
    Dialect("torchvision Swin", r"features\.1\.0\.attn\.relative_position_index", lambda state: state),
    Dialect("timm ConvNeXt", r"stages\.0\.blocks\.0\.conv_dw\.weight", _from_timm_convnext),
    Dialect("ConvNeXt", r"stages\.0\.0\.dwconv\.weight", from_facebook_convnext),
)


def find_roots(tensors: Mapping[str, Tensor], dialects: Sequence[Dialect] = DIALECTS) -> dict[str, Dialect]:
    """Every network in the file by its root, with the first dialect that fits."""
    found: dict[str, Dialect] = {}
    for dialect in dialects:
        for root in dialect.roots(tensors):
            found.setdefault(root, dialect)
    return found

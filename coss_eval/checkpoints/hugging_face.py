"""Key names of Hugging Face's transformers, OpenAI's CLIP and DINOv2, brought to torchvision's or timm's.

What torchvision builds takes torchvision's names (plain ViT, ConvNeXt, ResNet); the others take timm's, and
``timm_arch`` says of which of its networks they are. A config.json beside the file tells what shapes do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from coss_eval.checkpoints.key_names import (
    Dialect,
    StateDict,
    from_facebook_convnext,
    renamed,
    timm_vit_to_torchvision,
)
from coss_eval.errors import UsageError
from coss_eval.models.architecture import heads_of_vit

NetworkConfig = Mapping[str, Any]

DINOV2 = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
DINOV3_HEADS = {1280: 20, 4096: 32}  # by width, where they are not those of other ViTs
CLIP_RESNETS: dict[tuple[int, ...], str] = {  # blocks, and the width of the stem
    (3, 4, 6, 3, 64): "50",
    (3, 4, 23, 3, 64): "101",
    (4, 6, 10, 6, 80): "50x4",
    (6, 8, 18, 8, 96): "50x16",
    (3, 15, 36, 10, 128): "50x64",
}
PROJECTION = "representation: what goes into the projection to the texts' space, which is no classifier"
SWIN_V2_WINDOW = 8
QUICK_GELU_ASSUMED = "quick GELU ASSUMED (as OpenAI's CLIP); else give --arch timm:NAME"


def _fused(state: StateDict, names: tuple[str, str, str], target: str) -> StateDict:
    """Query, key and value as one tensor, as most codes have them."""
    first = re.compile(rf"^(?P<place>.*){re.escape(names[0])}(?P<kind>weight|bias)$")
    result = dict(state)
    for key in state:
        if match := first.match(key):
            parts = [f"{match['place']}{name}{match['kind']}" for name in names]
            if all(part in state for part in parts):
                result[f"{match['place']}{target}{match['kind']}"] = torch.cat([result.pop(part) for part in parts])
    return result


def _without(state: StateDict, pattern: str) -> StateDict:
    return {key: value for key, value in state.items() if not re.match(pattern, key)}


_vit = renamed(
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(register_tokens|distillation_token)$", "reg_token"),
    (r"^(layernorm|norm)\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"(blocks\.\d+)\.attention\.attention\.", r"\1.attn."),
    (r"(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (r"(blocks\.\d+)\.mlp\.weights_in\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.weights_out\.", r"\1.mlp.fc2."),
)
_clip = renamed(
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"(blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"(blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
)
_openai_vit = renamed(
    (r"^class_embedding$", "cls_token"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"(blocks\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"(blocks\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"(blocks\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
_openai_resnet = renamed(
    (r"^conv([123])\.", r"stem.conv\1.conv."),
    (r"^bn([123])\.", r"stem.conv\1.bn."),
    (r"^attnpool\.positional_embedding$", "head.pos_embed"),
    (r"^attnpool\.c_proj\.", "head.proj."),
    (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
    (r"^layer1\.", "stages.0."),
    (r"^layer2\.", "stages.1."),
    (r"^layer3\.", "stages.2."),
    (r"^layer4\.", "stages.3."),
    (r"(stages\.\d\.\d+)\.(conv|bn)1\.", r"\1.conv1_1x1.\2."),
    (r"(stages\.\d\.\d+)\.(conv|bn)2\.", r"\1.conv2_kxk.\2."),
    (r"(stages\.\d\.\d+)\.(conv|bn)3\.", r"\1.conv3_1x1.\2."),
    (r"(stages\.\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv.conv."),
    (r"(stages\.\d\.\d+)\.downsample\.1\.", r"\1.shortcut.conv.bn."),
)
_dinov2 = renamed(
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # its training code keeps them in chunks
    (r"(blocks\.\d+)\.mlp\.w12\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.w3\.", r"\1.mlp.fc2."),
)
_dinov3 = renamed(
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.", "blocks."),
    (r"(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.gamma_\2"),
    (r"(blocks\.\d+)\.mlp\.up_proj\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.down_proj\.", r"\1.mlp.fc2."),
)
_swin = renamed(
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.(query|value)\.bias$", lambda m: f".attn.{m[1][0]}_bias"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_convnext = renamed(
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d)\.layers\.", r"stages.\1."),
    (r"^(stages\.\d\.\d+)\.layernorm\.", r"\1.norm."),
    (r"^(stages\.\d\.\d+)\.layer_scale_parameter$", r"\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def _from_vit(state: StateDict) -> StateDict:
    named = _without(_vit(_fused(state, ("query.", "key.", "value."), "qkv.")), r"pooler\.|embeddings\.mask_token")
    hidden = named.get("blocks.0.mlp.fc1.weight")
    four = hidden is None or hidden.shape[0] == 4 * hidden.shape[1]  # times the width, as torchvision's always are
    if four and not {"reg_token", "blocks.0.ls1.gamma"} & named.keys():
        return timm_vit_to_torchvision(named)
    return _positions_of_patches(named) if "blocks.0.ls1.gamma" in named else named


def _positions_of_patches(state: StateDict) -> StateDict:
    """DINOv2 with registers as timm has it: the class token's position is part of the token."""
    if "reg_token" not in state:
        return state
    position = state["pos_embed"]
    return state | {"cls_token": state["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}


def _from_dinov2(state: StateDict) -> StateDict:
    """github.com/facebookresearch/dinov2, and timm's own files of such networks, which have other registers."""
    named = _without(_dinov2(state), r"mask_token")
    return _positions_of_patches(named) if "register_tokens" in state else named


def _tokens(state: StateDict) -> StateDict:
    """Class token and positions with the batch dimension that timm gives them; CLIP's have none."""
    shapes = {"cls_token": (1, 1, -1), "pos_embed": (1, *state["pos_embed"].shape)}
    return {key: value.reshape(shapes[key]) if key in shapes else value for key, value in state.items()}


def _from_clip(state: StateDict) -> StateDict:
    fused = _fused(state, ("q_proj.", "k_proj.", "v_proj."), "qkv.")
    return _tokens(_without(_clip(fused), r"embeddings\.position_ids|visual_projection"))


def _from_openai_vit(state: StateDict) -> StateDict:
    return _tokens(_without(_openai_vit(state), r"proj$"))


def _from_dinov3(state: StateDict) -> StateDict:
    """Its keys have no bias; where those of queries and values are zero, as published, timm's has none either."""
    state = _without(state, r"embeddings\.mask_token|rope_embeddings|.*\.k_proj\.bias")
    biases = [key for key in state if re.search(r"\.[qv]_proj\.bias$", key)]
    if not any(bool(state[key].any()) for key in biases):
        state = {key: value for key, value in state.items() if key not in biases}
    named = _dinov3(_fused(state, ("q_proj.", "k_proj.", "v_proj."), "qkv."))
    return renamed((r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"))(named)


def _from_swin(state: StateDict) -> StateDict:
    """Both versions; the merging of patches that ends a stage here begins the next one in timm."""
    named = _swin(_fused(state, ("query.", "key.", "value."), "qkv."))
    named = _without(named, r".*\.relative_(position_index|coords_table)$")  # made anew for the windows
    return {
        re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", key): value
        for key, value in named.items()
    }


def _from_convnext(state: StateDict) -> StateDict:
    return from_facebook_convnext(_convnext(state))


def _from_resnet(state: StateDict) -> StateDict:
    parts = {"convolution": "conv", "normalization": "bn"}
    result = {}
    for key, value in state.items():
        name = re.sub(
            r"^encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.(convolution|normalization)\.",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{parts[m[4]]}{int(m[3]) + 1}.",
            key,
        )
        name = re.sub(
            r"^encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.",
            name,
        )
        result[re.sub(r"^embedder\.embedder\.(\w+)\.", lambda m: f"{parts[m[1]]}1.", name)] = value
    return result


DIALECTS = (
    Dialect(
        "Hugging Face ViT",
        r"encoder\.layer\.0\.attention\.attention\.query\.weight",
        _from_vit,
        needs="embeddings.patch_embeddings.projection.weight",
    ),
    Dialect(
        "Hugging Face CLIP",
        r"encoder\.layers\.0\.self_attn\.q_proj\.weight",
        _from_clip,
        needs="embeddings.class_embedding",
        head_channels=64,  # OpenAI's
    ),
    Dialect(
        "Hugging Face DINOv3", r"layer\.0\.attention\.q_proj\.weight", _from_dinov3, needs="embeddings.register_tokens"
    ),
    Dialect(
        "Hugging Face Swin",
        r"encoder\.layers\.0\.blocks\.0\.attention\.self\.(relative_position_bias_table|logit_scale)",
        _from_swin,
    ),
    Dialect("Hugging Face ConvNeXt", r"encoder\.stages\.0\.layers\.0\.dwconv\.weight", _from_convnext),
    Dialect("Hugging Face ResNet", r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight", _from_resnet),
    Dialect("DINOv2", r"blocks\.0\.(0\.)?ls2\.gamma", _from_dinov2, needs="pos_embed", head_channels=64),
    Dialect(
        "OpenAI CLIP ViT",
        r"transformer\.resblocks\.0\.attn\.in_proj_weight",
        _from_openai_vit,
        needs="class_embedding",
        head_channels=64,  # build_model in its model.py, and open_clip's default
    ),
    Dialect(
        "OpenAI CLIP ResNet",
        r"attnpool\.positional_embedding",
        lambda state: _openai_resnet(state),
        needs="layer1.0.conv1.weight",
    ),
)


def timm_arch(
    state: Mapping[str, Tensor], config: NetworkConfig, vit_heads: Mapping[int, int]
) -> tuple[str, int, tuple[str, ...]] | None:
    """timm's name of the network under timm's names, the side of its images, and what was assumed; None for others.

    ``vit_heads``: attention heads by a ViT's channels, where something but the shapes tells them.
    """
    if "head.pos_embed" in state:
        return _clip_resnet(state)
    if "layers.0.blocks.0.attn.relative_position_bias_table" in state:
        return _swin_arch(state, config)
    if "layers.0.blocks.0.attn.logit_scale" in state:
        return _swin_v2_arch(state, config)
    if "blocks.0.attn.qkv.weight" in state or "blocks.0.attn.q_proj.weight" in state:
        return _vit_arch(state, config, vit_heads)
    return None


def _clip_resnet(state: Mapping[str, Tensor]) -> tuple[str, int, tuple[str, ...]]:
    blocks = tuple(_count(state, rf"stages\.{i}\.(\d+)\.conv1_1x1\.conv\.weight") for i in range(4))
    width = state["stem.conv3.conv.weight"].shape[0]
    name = CLIP_RESNETS.get((*blocks, width))
    if name is None:
        raise UsageError(f"a CLIP ResNet of blocks {blocks} and width {width} has no known name")
    side = 32 * isqrt(state["head.pos_embed"].shape[0] - 1)
    return f"timm:resnet{name}_clip", side, (PROJECTION,)


def _swin_arch(state: Mapping[str, Tensor], config: NetworkConfig) -> tuple[str, int, tuple[str, ...]]:
    stages = _stages_of_swin(state)
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"].shape for i in range(stages)]
    window = (isqrt(tables[0][0]) + 1) // 2
    side, assumed = _side_by_windows(state, config, window)
    options = _options_of_swin(state, config, window, [table[1] for table in tables])
    return f"timm:swin_tiny_patch4_window7_224({_written(options)})", side, assumed


def _swin_v2_arch(state: Mapping[str, Tensor], config: NetworkConfig) -> tuple[str, int, tuple[str, ...]]:
    """Positions are computed from coordinates here, so that no tensor has the windows' size."""
    window = int(config.get("window_size") or SWIN_V2_WINDOW)
    side, assumed = _side_by_windows(state, config, window)
    if "window_size" not in config:
        assumed = (f"windows of {window} ASSUMED (no tensor tells); else put its config.json beside", *assumed)
    heads = [state[f"layers.{i}.blocks.0.attn.logit_scale"].shape[0] for i in range(_stages_of_swin(state))]
    options = _options_of_swin(state, config, window, heads)
    if any(trained := tuple(config.get("pretrained_window_sizes") or ())):
        options["pretrained_window_sizes"] = trained
    return f"timm:swinv2_tiny_window8_256({_written(options)})", side, assumed


def _stages_of_swin(state: Mapping[str, Tensor]) -> int:
    return _count(state, r"layers\.\d+\.blocks\.0\.norm1\.weight")


def _side_by_windows(state: Mapping[str, Tensor], config: NetworkConfig, window: int) -> tuple[int, tuple[str, ...]]:
    """The side of a Swin's images, and what was assumed of it: without a config, one window in the last stage."""
    if "image_size" in config:
        return int(config["image_size"]), ()
    side = state["patch_embed.proj.weight"].shape[-1] * window * 2 ** (_stages_of_swin(state) - 1)
    return side, (f"{side} px ASSUMED, by its windows; else give --img-size",)


def _options_of_swin(
    state: Mapping[str, Tensor], config: NetworkConfig, window: int, heads: Sequence[int]
) -> dict[str, Any]:
    patch = state["patch_embed.proj.weight"].shape
    depths = tuple(_count(state, rf"layers\.{i}\.blocks\.\d+\.norm1\.weight") for i in range(len(heads)))
    return {
        "embed_dim": patch[0],
        "depths": depths,
        "num_heads": tuple(heads),
        "window_size": window,
        "patch_size": patch[-1],
        "norm_eps": config.get("layer_norm_eps", 1e-5),
    }


def _vit_arch(
    state: Mapping[str, Tensor], config: NetworkConfig, vit_heads: Mapping[int, int]
) -> tuple[str, int, tuple[str, ...]]:
    dim = state["patch_embed.proj.weight"].shape[0]
    rotary = {} if "pos_embed" in state else DINOV3_HEADS
    asked, _, _ = _vit_of(state, config, "N")
    heads = heads_of_vit(dim, state.get("pos_embed"), {**rotary, **vit_heads}, asked.replace("'N'", "N"))
    name, side, notes = _vit_of(state, config, heads)
    guess = f"{heads} attention heads ASSUMED, as published ViTs of width {dim} have; else give --arch timm:NAME"
    return name, side, notes if dim in vit_heads or "(" not in name else (guess, *notes)


def _vit_of(state: Mapping[str, Tensor], config: NetworkConfig, heads: int | str) -> tuple[str, int, tuple[str, ...]]:
    """``_vit_arch`` of a ViT with so many attention heads."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.\d+\.norm1\.weight")
    notes: tuple[str, ...] = ()
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    options: dict[str, Any] = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }
    if "pos_embed" not in state:  # rotary
        biased = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
        options |= {
            "num_reg_tokens": registers,
            "global_pool": "token",
            "rope_temperature": config.get("rope_theta", 100),
        }
        return f"timm:vit_small_patch16_dinov3{biased}({_written(options)})", int(config.get("image_size", 224)), notes
    eps = config.get("layer_norm_eps")
    options |= {} if eps is None else {"norm_eps": eps}
    if "norm_pre.weight" in state:
        act = config.get("hidden_act", "quick_gelu")
        notes += (PROJECTION,) if "hidden_act" in config else (QUICK_GELU_ASSUMED, PROJECTION)
        base = "vit_base_patch16_clip_quickgelu_224" if act == "quick_gelu" else "vit_base_patch16_clip_224"
        return f"timm:{base}({_written(options)})", _side(state, 1, patch), notes
    if "blocks.0.ls1.gamma" not in state:  # DeiT's distillation token is one more register
        options |= {"reg_tokens": registers}
        return f"timm:vit_base_patch16_224({_written(options)})", _side(state, 1 + registers, patch), notes
    size = DINOV2.get((dim, depth))
    base = f"vit_{size or 'base'}_patch14{f'_reg{registers}' if registers else ''}_dinov2"
    side = _side(state, 0 if registers else 1, patch)
    if size and registers in (0, 4):
        return f"timm:{base}", side, ()
    options |= {"reg_tokens": registers} if registers else {}
    return f"timm:vit_base_patch14{'_reg4' if registers else ''}_dinov2({_written(options)})", side, notes


def _side(state: Mapping[str, Tensor], prefix: int, patch: int) -> int:
    """The side of the images that the positions are for."""
    grid = state["pos_embed"].shape[1] - prefix
    if isqrt(grid) ** 2 != grid:
        raise UsageError("a ViT whose positions are not a square grid")
    return isqrt(grid) * patch


def _written(options: Mapping[str, Any]) -> str:
    """Options as zoo.network reads them in a name: "depth=12,norm_eps=1e-06"."""
    return ",".join(f"{name}={value!r}".replace(" ", "") for name, value in options.items())


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)

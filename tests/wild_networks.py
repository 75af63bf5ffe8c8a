"""Networks as people write them, small; each computes what its kind does, in code of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """A block as in CIFAR repositories: ``shortcut`` None pads (option A), else a convolution with a norm (B)."""

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: str | None, *, at_end: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.missing, self.at_end, self.place = stride, planes - inputs, at_end, shortcut
        if shortcut and (stride > 1 or inputs != planes):
            branch = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            self.add_module(shortcut, branch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.place and hasattr(self, self.place):
            x = getattr(self, self.place)(x)
        elif self.missing:
            sides = (0, self.missing) if self.at_end else (self.missing // 2, self.missing // 2)
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *sides))
        return F.relu(y + x)


class CifarNet(nn.Module):
    """Three stages of n blocks from 16 planes; the head is called ``head``."""

    def __init__(self, n: int = 3, shortcut: str | None = None, head: str = "linear", *, at_end: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        inputs = 16
        for stage, planes in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(n):
                blocks.append(Basic(inputs, planes, 2 if stage > 1 and i == 0 else 1, shortcut, at_end=at_end))
                inputs = planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = head
        self.add_module(head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        logits: Tensor = getattr(self, self.head)(x.view(x.size(0), -1))
        return logits


class PreAct(nn.Module):
    """``raw``: the shortcut ("downsample") takes the input itself; else ("shortcut") the activated one."""

    def __init__(self, inputs: int, planes: int, stride: int, *, raw: bool, bottleneck: bool = False) -> None:
        super().__init__()
        self.outputs = 4 * planes if bottleneck else planes
        if bottleneck:
            self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, self.outputs, 1, bias=False)
        else:
            self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.raw, self.place = raw, "downsample" if raw else "shortcut"
        if stride > 1 or inputs != self.outputs:
            self.add_module(self.place, nn.Sequential(nn.Conv2d(inputs, self.outputs, 1, stride, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = getattr(self, self.place)(x if self.raw else out) if hasattr(self, self.place) else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        if hasattr(self, "conv3"):
            out = self.conv3(F.relu(self.bn3(out)))
        return out + residual


class PreActNet(nn.Module):
    """Three stages with a norm at the end, or kuangliu's: four stages, and none; ``norm`` is what that is called."""

    def __init__(
        self,
        counts: tuple[int, ...] = (2, 2, 2),
        width: int = 16,
        *,
        raw: bool = True,
        bottleneck: bool = False,
        norm: str = "bn",
    ) -> None:
        super().__init__()
        inputs = width
        self.stages, self.norm = len(counts), norm
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        for stage, count in enumerate(counts):
            planes, blocks = width * 2**stage, []
            for i in range(count):
                block = PreAct(inputs, planes, 2 if stage and i == 0 else 1, raw=raw, bottleneck=bottleneck)
                blocks.append(block)
                inputs = block.outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if norm:
            self.add_module(norm, nn.BatchNorm2d(inputs))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = F.relu(getattr(self, self.norm)(x)) if self.norm else x
        logits: Tensor = self.linear(x.mean(3).mean(2))
        return logits


class WideBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, planes, 1, stride, bias=False) if inputs != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        x = x if self.convShortcut is None else self.convShortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideNet(nn.Module):
    """As WRN-10-2 is laid out in the repositories of robust networks."""

    def __init__(self, n: int = 2, widen: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        inputs = 16
        for number, planes in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
            stage = nn.Module()
            blocks = [
                WideBlock(inputs if i == 0 else planes, planes, 2 if number > 1 and i == 0 else 1) for i in range(n)
            ]
            stage.layer = nn.Sequential(*blocks)
            self.add_module(f"block{number}", stage)
            inputs = planes
        self.bn1, self.fc, self.width = nn.BatchNorm2d(inputs), nn.Linear(inputs, 10), inputs

    def forward(self, x: Tensor) -> Tensor:
        stages: list[Any] = [self.block1, self.block2, self.block3]
        x = self.conv1(x)
        for stage in stages:
            x = stage.layer(x)
        logits: Tensor = self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).view(-1, self.width))
        return logits


def _reduce(x: Any) -> Tensor:
    """As einops does: a table of tensor types, KeyError for a tracer's."""
    kind = {Tensor: "torch"}[type(x)]
    mean: Tensor = x.mean((2, 3)) if kind == "torch" else x
    return mean


POOLINGS: dict[str, Callable[[Any], Tensor]] = {
    "a constant": lambda x: F.avg_pool2d(x, 8),
    "x.size()[3]": lambda x: F.avg_pool2d(x, x.size()[3]),
    "x.size()[2:]": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "x.shape[-1]": lambda x: F.avg_pool2d(x, x.shape[-1]),
    "mean(3).mean(2)": lambda x: x.mean(3).mean(2),
    "mean(-1).mean(-1)": lambda x: x.mean(-1).mean(-1),
    "view and mean": lambda x: x.view(x.size(0), x.size(1), -1).mean(2),
    "unpacked shape": lambda x: x.view(*x.shape[:2], -1).mean(2),
    "flatten(2).mean(2)": lambda x: x.flatten(2).mean(2),
    "mean of locations last": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, x.size(1)).mean(1),
    "max of max": lambda x: x.max(3)[0].max(2)[0],
    "GeM": lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(3), (x.size(-2), x.size(-1))).pow(1 / 3),
    "GeM by mean": lambda x: torch.clamp(x, min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
    "einops": _reduce,
    "a branch on values": lambda x: x.mean((2, 3)) if bool(x.isfinite().all()) else x.amax((2, 3)),
    "an int of the shape": lambda x: F.avg_pool2d(x, int(x.shape[2])),
}


class Pools(nn.Module):
    """64 locations of 64 units before a pooling in code; a head called ``linear``."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.conv3 = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.linear, self.pooling = nn.Linear(64, 10), pooling

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))))
        logits: Tensor = self.linear(POOLINGS[self.pooling](x).reshape(x.size(0), -1))
        return logits


class ForOneSide(nn.Module):
    """Takes images of one unusual side alone, as networks with attention over blocks do."""

    def __init__(self, side: int = 256) -> None:
        super().__init__()
        self.side, self.conv, self.head = side, nn.Conv2d(3, 8, 7, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.side
        logits: Tensor = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention in transformers' key names; ``rotary`` turns queries and keys of all but the prefix tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)
        scores = scores if bias is None else scores + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)


def _module(**parts: nn.Module) -> Any:
    """A module that only holds others, under these names."""
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((dim,), 0.5))


class HuggingFaceViT(nn.Module):
    """ViT (cls), DeiT (cls and distillation token) or DINOv2 (layer scale, registers) as transformers names them."""

    def __init__(
        self, kind: str, dim: int = 24, depth: int = 2, heads: int = 3, side: int = 32, patch: int = 8
    ) -> None:
        super().__init__()
        self.kind, self.eps, grid = kind, 1e-6 if "dinov2" in kind else 1e-12, (side // patch) ** 2
        norm = lambda: nn.LayerNorm(dim, eps=self.eps)  # noqa: E731
        blocks = []
        for _ in range(depth):
            attention = _module(attention=Attention(dim, heads), output=_module(dense=nn.Linear(dim, dim)))
            block = _module(attention=attention)
            if "dinov2" in kind:
                block.norm1, block.norm2 = norm(), norm()
                block.layer_scale1, block.layer_scale2 = _Scale(dim), _Scale(dim)
                block.mlp = _module(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim))
            else:
                block.layernorm_before, block.layernorm_after = norm(), norm()
                block.intermediate = _module(dense=nn.Linear(dim, 4 * dim))
                block.output = _module(dense=nn.Linear(4 * dim, dim))
            blocks.append(block)
        embeddings = _module(patch_embeddings=_module(projection=nn.Conv2d(3, dim, patch, patch)))
        extra = {"deit": 1, "dinov2 registers": 2}.get(kind, 0)
        positions = grid + 1 + (extra if kind == "deit" else 0)
        embeddings.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        embeddings.position_embeddings = nn.Parameter(torch.randn(1, positions, dim))
        if extra:
            name = "distillation_token" if kind == "deit" else "register_tokens"
            embeddings.register_parameter(name, nn.Parameter(torch.randn(1, extra, dim)))
        if kind != "deit":
            embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        body = _module(embeddings=embeddings, encoder=_module(layer=nn.ModuleList(blocks)), layernorm=norm())
        self.prefix = kind.split(" ")[0]
        self.add_module(self.prefix, body)
        if "dinov2" not in kind:
            self.classifier = nn.Linear(dim, 7)

    def forward(self, pixels: Tensor) -> Tensor:
        body: Any = getattr(self, self.prefix)
        e = body.embeddings
        x = e.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)
        cls = e.cls_token.expand(len(x), -1, -1)
        if self.kind == "deit":
            x = torch.cat([cls, e.distillation_token.expand(len(x), -1, -1), x], 1) + e.position_embeddings
        else:
            x = torch.cat([cls, x], 1) + e.position_embeddings
        if self.kind == "dinov2 registers":
            x = torch.cat([x[:, :1], e.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in body.encoder.layer:
            attend = block.attention.attention, block.attention.output.dense
            if "dinov2" in self.kind:
                x = x + block.layer_scale1.lambda1 * attend[1](attend[0](block.norm1(x)))
                x = x + block.layer_scale2.lambda1 * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
            else:
                x = x + attend[1](attend[0](block.layernorm_before(x)))
                x = x + block.output.dense(F.gelu(block.intermediate.dense(block.layernorm_after(x))))
        x = body.layernorm(x)[:, 0]
        return self.classifier(x) if hasattr(self, "classifier") else x


class OpenAIViT(nn.Module):
    """CLIP's image tower under OpenAI's names, or transformers'; the output before its projection."""

    def __init__(self, *, hugging_face: bool, dim: int = 128, depth: int = 2, side: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.heads, grid = dim // 64, (side // patch) ** 2
        self.hugging_face = hugging_face
        self.conv = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.token = nn.Parameter(torch.randn(dim))
        self.positions = nn.Parameter(torch.randn(grid + 1, dim))
        self.pre, self.post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.proj = nn.Parameter(torch.randn(dim, 16))
        self.blocks = nn.ModuleList(
            _module(
                attn=nn.MultiheadAttention(dim, self.heads, batch_first=True),
                ln_1=nn.LayerNorm(dim),
                ln_2=nn.LayerNorm(dim),
                fc=nn.Linear(dim, 4 * dim),
                out=nn.Linear(4 * dim, dim),
            )
            for _ in range(depth)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        x = self.pre(torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.positions)
        for block in self.blocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            y = block.fc(block.ln_2(x))
            x = x + block.out(y * torch.sigmoid(1.702 * y))
        normed: Tensor = self.post(x[:, 0])
        return normed

    def state(self) -> dict[str, Tensor]:
        """Its tensors under the names of the files."""
        own = self.state_dict()
        names = {"conv.weight": "conv1.weight", "token": "class_embedding", "positions": "positional_embedding"}
        state = {}
        if not self.hugging_face:
            for key, value in own.items():
                name = names.get(key, re.sub(r"^pre\.", "ln_pre.", re.sub(r"^post\.", "ln_post.", key)))
                name = re.sub(r"^blocks\.", "transformer.resblocks.", name)
                name = name.replace(".fc.", ".mlp.c_fc.").replace(".out.", ".mlp.c_proj.")
                state["visual." + name] = value.half().float()
            text = {
                "transformer.resblocks.0.attn.in_proj_weight": torch.ones(3, 1),
                "positional_embedding": torch.ones(4, 1),
            }
            return state | text | {"logit_scale": torch.ones(())}
        for key, value in own.items():
            name = key.replace("conv.weight", "embeddings.patch_embedding.weight")
            name = {"token": "embeddings.class_embedding", "positions": "embeddings.position_embedding.weight"}.get(
                key, name
            )
            name = re.sub(r"^pre\.", "pre_layrnorm.", re.sub(r"^post\.", "post_layernorm.", name))
            name = re.sub(r"^blocks\.", "encoder.layers.", name).replace(".ln_", ".layer_norm")
            name = (
                name.replace(".fc.", ".mlp.fc1.")
                .replace(".out.", ".mlp.fc2.")
                .replace(".attn.out_proj", ".self_attn.out_proj")
            )
            if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    state[f"vision_model.{match[1]}.self_attn.{letter}_proj.{match[2]}"] = part
            elif key == "proj":
                state["visual_projection.weight"] = value.t().contiguous()
            else:
                state["vision_model." + name] = value
        return state


class DINOv3(nn.Module):
    """Its attention with rotary positions, in transformers' names: queries and keys of patches are turned."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        dim, self.heads, self.patch = 32, 2, 8
        norm = lambda: nn.LayerNorm(dim, eps=1e-5)  # noqa: E731
        self.embeddings = _module(patch_embeddings=nn.Conv2d(3, dim, self.patch, self.patch))
        self.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.embeddings.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.embeddings.register_tokens = nn.Parameter(torch.randn(1, 4, dim))
        blocks = []
        for _ in range(2):
            attention = _module(
                q_proj=nn.Linear(dim, dim),
                k_proj=nn.Linear(dim, dim, bias=False),
                v_proj=nn.Linear(dim, dim),
                o_proj=nn.Linear(dim, dim),
            )
            mlp = _module(up_proj=nn.Linear(dim, 4 * dim), down_proj=nn.Linear(4 * dim, dim))
            parts = {"norm1": norm(), "norm2": norm(), "attention": attention, "mlp": mlp}
            blocks.append(_module(**parts, layer_scale1=_Scale(dim), layer_scale2=_Scale(dim)))
        self.layer, self.norm, self.biased = nn.ModuleList(blocks), norm(), biased

    def clear_biases(self) -> None:
        """As in the published files, whose queries and values have biases of zero."""
        for block in self.layer:
            part: Any = block
            part.attention.q_proj.bias.data.zero_()
            part.attention.v_proj.bias.data.zero_()

    def _angles(self, side: int, width: int) -> tuple[Tensor, Tensor]:
        coords = (torch.arange(side) + 0.5) / side * 2 - 1
        grid = torch.stack(torch.meshgrid(coords, coords, indexing="ij"), -1).flatten(0, 1)  # (L, 2)
        frequencies = 1 / 100 ** torch.arange(0, 1, 4 / width)
        angles = (2 * math.pi * grid[:, :, None] * frequencies).flatten(1).tile(2)
        return angles.cos(), angles.sin()

    def forward(self, pixels: Tensor) -> Tensor:
        e: Any = self.embeddings
        x = e.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([e.cls_token, e.register_tokens], 1).expand(len(x), -1, -1)
        x = torch.cat([tokens, x], 1)
        width = x.shape[-1] // self.heads
        cos, sin = self._angles(pixels.shape[-1] // self.patch, width)

        def turned(y: Tensor) -> Tensor:
            first, rest = y[:, :, :5], y[:, :, 5:]
            half = torch.cat([-rest[..., width // 2 :], rest[..., : width // 2]], -1)
            return torch.cat([first, rest * cos + half * sin], 2)

        for block in self.layer:
            part: Any = block
            y = part.norm1(x)
            q, k, v = (
                layer(y).view(*y.shape[:2], self.heads, width).transpose(1, 2)
                for layer in (part.attention.q_proj, part.attention.k_proj, part.attention.v_proj)
            )
            scores = (turned(q) @ turned(k).transpose(-2, -1) / math.sqrt(width)).softmax(-1)
            x = x + part.layer_scale1.lambda1 * part.attention.o_proj((scores @ v).transpose(1, 2).flatten(2))
            x = x + part.layer_scale2.lambda1 * part.mlp.down_proj(F.gelu(part.mlp.up_proj(part.norm2(x))))
        normed: Tensor = self.norm(x)[:, 0]
        return normed


class Bottleneck(nn.Module):
    """OpenAI's: the stride is an average before the last convolution, and before the shortcut's."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.stride = stride
        if stride > 1 or inputs != 4 * planes:
            shortcut = {"0": nn.Conv2d(inputs, 4 * planes, 1, bias=False), "1": nn.BatchNorm2d(4 * planes)}
            self.downsample = _module(**shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))
        if hasattr(self, "downsample"):
            shortcut: Any = self.downsample
            x = getattr(shortcut, "1")(getattr(shortcut, "0")(F.avg_pool2d(x, self.stride)))
        return F.relu(y + x)


class OpenAIResNet(nn.Module):
    """CLIP's RN50 for 224 px: a stem of three convolutions, and attention that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            planes, blocks = 64 * 2**stage, []
            for i in range(count):
                blocks.append(Bottleneck(inputs, planes, 2 if stage and i == 0 else 1))
                inputs = 4 * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = _module(**{f"{x}_proj": nn.Linear(2048, 1024 if x == "c" else 2048) for x in "kqvc"})
        self.attnpool.positional_embedding = nn.Parameter(torch.randn(50, 2048) / 45)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = F.avg_pool2d(x, 2)
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
        pool: Any = self.attnpool
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
        q, k, v = (
            layer(y).view(len(x), -1, 32, 64).transpose(1, 2)
            for layer, y in ((pool.q_proj, x[:, :1]), (pool.k_proj, x), (pool.v_proj, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
        assert pool.c_proj.in_features == pooled.shape[1]  # left to others: it goes to the texts' space
        return pooled


class GreyNet(nn.Module):
    """For MNIST: one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))
        return logits

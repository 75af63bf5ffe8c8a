"""How each framework lays a checkpoint out: one row per layout, with the branch that its paper evaluates.

A file is flattened to dotted keys first (see flat_keys); key_names.find_roots then finds the networks in it, and the
rows say which root is which branch. Other people's layouts join by ``register``, or are named as "package.module:NAME".
Importing this module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.choices import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Stem
from coss_eval.runtime.imports import imported

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: MeanStd = (IMAGENET_MEAN, IMAGENET_STD)
CIFAR: MeanStd = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
UNNORMALISED: MeanStd = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

SAME_ROLE = {"student": "online", "online": "student", "teacher": "target", "target": "teacher"}


@dataclass(frozen=True)
class Layout:
    """``branches``: for each branch, the possible ends of its network's root; "" is a state dict without prefix.
    ``source``: the code that writes such files.

    ``marks``: patterns that must each be found in some key (the file's own keys count as well, and its short texts as
    "key=text"). ``heads``: where a linear classifier lies, beside the root. ``own_fc``: whether the network's own last
    layer is a classifier; it is a projection head, or untrained, in many. ``moments``: mean and std where the
    framework's code fixes them. ``vit_heads``: attention heads of its ViTs by their channels, which no shape tells.
    """

    name: str
    branches: Mapping[str, tuple[str, ...]]
    source: str = ""
    default: str = "online"
    marks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    own_fc: bool = True
    moments: MeanStd | None = None
    interpolation: Interpolation | None = None
    vit_heads: Mapping[int, int] = field(default_factory=dict)
    cifar_stem: Stem = "cifar"  # what a 3x3 stem is in this framework
    alone: bool = False  # only for a file that holds no other network


LAYOUTS = [
    Layout(
        "Hugging Face",
        {
            "online": (
                *(
                    "vit.",
                    "deit.",
                    "dinov2.",
                    "dinov2_with_registers.",
                    "dinov3_vit.",
                    "convnext.",
                    "swin.",
                    "swinv2.",
                    "resnet.",
                ),
                *("vision_model.", "visual.", ""),
            )
        },
        source="github.com/huggingface/transformers and github.com/openai/CLIP",
        marks=(
            r"embeddings\.patch_embedding|\bembedder\.embedder\.|\bvisual\.|\bln_pre\.weight$|\battnpool\.",
            r"\.attention\.(attention\.query|self\.query|q_proj)\.|\.self_attn\.q_proj\.|\.resblocks\.0\.attn\."
            r"|encoder\.stages\.0\.layers\.0\.(dwconv|layer)\.|\battnpool\.",
        ),
        heads=("classifier.", "classifier.1."),
        own_fc=False,
    ),
    Layout(
        "MoCo v3",
        {"online": ("base_encoder.",), "target": ("momentum_encoder.",)},
        source="github.com/facebookresearch/moco-v3",
        own_fc=False,
        moments=IMAGENET,
        vit_heads={384: 12},  # its ViT-S has 12 heads of 32 channels (vits.py)
    ),
    Layout(
        "MoCo v3, linear",  # by main_lincls.py: the network alone, and its own last layer is trained
        {"online": ("",)},
        source="github.com/facebookresearch/moco-v3",
        marks=(r"^arch=vit_(conv_)?(small|base)$", r"^best_acc1$"),
        moments=IMAGENET,
        vit_heads={384: 12},
        alone=True,
    ),
    Layout(
        "DINO",
        {"student": ("student.backbone.",), "teacher": ("teacher.backbone.",)},
        source="github.com/facebookresearch/dino",
        default="teacher",
        moments=IMAGENET,
        interpolation="bicubic",
        vit_heads={192: 3, 384: 6, 768: 12},
    ),
    Layout(
        "byol-pytorch",
        {"online": ("online_encoder.net.", "net."), "target": ("target_encoder.net.",)},
        source="github.com/lucidrains/byol-pytorch",
        marks=(r"\bonline_encoder\.net\.",),
        own_fc=False,
        moments=IMAGENET,
    ),
    Layout(
        "BYOL (PyTorch-BYOL)",
        {
            "online": ("online_network_state_dict.encoder.", "encoder_state_dict."),
            "target": ("target_network_state_dict.encoder.",),
        },
        source="github.com/sthalles/PyTorch-BYOL",
        marks=(r"^online_network_state_dict\b",),
        own_fc=False,
        moments=UNNORMALISED,  # its transforms end with ToTensor
    ),
    Layout(
        "lightly, student and teacher",
        {"student": ("student_backbone.",), "teacher": ("teacher_backbone.", "backbone.")},
        source="github.com/lightly-ai/lightly",
        default="teacher",
        marks=(r"\bstudent_backbone\.",),
        heads=("online_classifier.linear.",),
        moments=IMAGENET,
    ),
    Layout(
        "lightly, query and key",
        {"online": ("query_backbone.",), "target": ("key_backbone.", "backbone.")},
        source="github.com/lightly-ai/lightly",
        marks=(r"\bquery_backbone\.",),
        heads=("online_classifier.linear.",),
        moments=IMAGENET,
    ),
    Layout(
        "lightly",
        {"online": ("backbone.",), "target": ("backbone_momentum.", "teacher_backbone.", "key_backbone.")},
        source="github.com/lightly-ai/lightly",
        marks=(r"\b(projection|prediction)_head\.",),
        heads=("online_classifier.linear.",),
        moments=IMAGENET,
    ),
    Layout(
        "solo-learn",
        {"online": ("backbone.", "encoder."), "target": ("momentum_backbone.", "momentum_encoder.")},
        source="github.com/vturrisi/solo-learn",
        marks=(r"\bclassifier\.weight$", r"\b(projector|prototypes|predictor|momentum_backbone|momentum_encoder)\b"),
        heads=("classifier.",),
        cifar_stem="solo-cifar",
    ),
    Layout(
        "mmselfsup",
        {
            "online": ("backbone.", "encoder_q.0.", "online_net.0."),
            "target": ("encoder_k.0.", "target_net.0.", "momentum_encoder.0."),
        },
        source="github.com/open-mmlab/mmselfsup",
        marks=(r"^meta$|\bneck\.|\bencoder_q\.0\.|\bonline_net\.0\.",),
        heads=("head.fc.",),
        moments=IMAGENET,
    ),
    Layout(
        "MoCo",
        {"online": ("encoder_q.",), "target": ("encoder_k.",)},
        source="github.com/facebookresearch/moco",
        own_fc=False,
        moments=IMAGENET,
    ),
    Layout(
        "VISSL",
        {"online": ("trunk._feature_blocks.", "_feature_blocks.", "trunk.")},
        source="github.com/facebookresearch/vissl",
        marks=(r"\bclassy_state_dict\b|\b_feature_blocks\.",),
        heads=("heads.0.clf.0.",),
        moments=IMAGENET,
    ),
    Layout(
        "SimSiam",
        {"online": ("encoder.",)},
        source="github.com/facebookresearch/simsiam",
        marks=(r"\bencoder\.fc\.", r"\bpredictor\."),
        own_fc=False,
        moments=IMAGENET,
    ),
    Layout(
        "Barlow Twins or VICReg",
        {"online": ("backbone.",)},
        source="github.com/facebookresearch/barlowtwins and github.com/facebookresearch/vicreg",
        marks=(r"\bprojector\.",),
        moments=IMAGENET,
    ),
    Layout(
        "SimCLR (github.com/sthalles)",
        {"online": ("backbone.",)},
        source="github.com/sthalles/SimCLR",
        marks=(r"\bbackbone\.fc\.[02]\.weight$",),
        own_fc=False,
        moments=UNNORMALISED,  # its transforms end with ToTensor
    ),
    Layout(
        "SimCLR (github.com/leftthomas)",
        {"online": ("f.",)},
        source="github.com/leftthomas/SimCLR",
        marks=(r"\bg\.0\.weight$",),
        moments=CIFAR,
    ),
    Layout(
        "weights with an average",
        {"online": ("model.", "state_dict."), "target": ("model_ema.", "state_dict_ema.")},
        source="timm's and torchvision's training scripts",
        marks=(r"^(model_ema|state_dict_ema)\.",),
    ),
    Layout(
        "Lightning",
        {"online": ("model.", "net.", "network.", "backbone.", "encoder.", "feature_extractor.", "state_dict.")},
        source="github.com/Lightning-AI/pytorch-lightning",
        marks=(r"^pytorch-lightning_version$",),
        heads=("classifier.", "linear.", "fc.", "head."),
        alone=True,
    ),
    Layout("state dict", {"online": ("",)}, source="torch.save(network.state_dict(), ...)", alone=True),
]
_BARE = re.compile(r"((state_dict|model_state_dict|model|net|network|weights|params|base_model)\.)*")
_TEACHER = re.compile(r"teacher|target|momentum|ema|key|_k\b")


@dataclass(frozen=True)
class Recognised:
    """A file's layout, and the root of each branch it holds."""

    layout: Layout
    roots: Mapping[str, str]
    default: str

    def branch(self, weights: str | None) -> str:
        """The branch to read: the one asked for (student is online, teacher is target), or the layout's default."""
        if weights is None:
            if self.default in self.roots:
                return self.default
            which = f"which of its networks? choose with --weights: {', '.join(self.roots)}"
            raise UsageError(f"{which}; or give --arch (timm:NAME, package.module:factory) if they are parts of one")
        for name in (weights, SAME_ROLE.get(weights, weights)):
            if name in self.roots:
                return name
        raise UsageError(f"no branch {weights!r} in its layout ({self.layout.name}); it holds: {', '.join(self.roots)}")

    def head_places(self, branch: str) -> list[str]:
        """Where a classifier's weight and bias may lie, as prefixes of the flat keys."""
        root = self.roots[branch]
        ends = sorted(self.layout.branches.get(branch, ("",)), key=len, reverse=True)
        beside = next((root.removesuffix(end) for end in ends if root.endswith(end)), root)
        return [beside + head for head in self.layout.heads]


def register(layout: Layout) -> Layout:
    """Recognise this layout before all others; one of the same name goes."""
    LAYOUTS[:] = [layout, *(row for row in LAYOUTS if row.name != layout.name)]
    return layout


def layout_named(name: str) -> Layout:
    """The row of that name, or the Layout that "package.module:NAME" is."""
    if ":" in name:
        own = imported(name, "layout", "layout")
        if isinstance(own, Layout):
            return own
        raise UsageError(f"layout {name!r} must be a coss_eval.checkpoints.layouts.Layout, not {type(own).__name__}")
    rows = {layout.name: layout for layout in LAYOUTS}
    if name not in rows:
        raise unknown_name("checkpoint layout", name, rows)
    return rows[name]


def recognise(keys: Iterable[str], roots: Iterable[str], asked: Layout | None = None) -> Recognised:
    """The first row of LAYOUTS that fits; else the roots as they are, named by their words or by themselves.

    ``asked``: this layout and no other, whatever its marks; UsageError where none of its branches is in the file.
    """
    keys, roots = list(keys), list(roots)
    if asked is not None:
        return _as_asked(asked, roots)
    for layout in LAYOUTS:
        if layout.alone and len(roots) > 1:
            continue
        if not all(any(re.search(mark, key) for key in keys) for mark in layout.marks):
            continue
        found = _branches(layout, roots)
        if layout.default in found:
            return Recognised(layout, found, layout.default)
    if len(roots) == 1:
        return Recognised(Layout(f"network under {roots[0]!r}", {}), {"online": roots[0]}, "online")
    teachers = [root for root in roots if _TEACHER.search(root)]
    if len(roots) == 2 and len(teachers) == 1:
        student = next(root for root in roots if root not in teachers)
        layout = Layout(f"networks under {student!r} and {teachers[0]!r}", {})
        return Recognised(layout, {"online": student, "target": teachers[0]}, "online")
    return Recognised(Layout("several networks", {}), {root.rstrip(".") or "top level": root for root in roots}, "")


def _as_asked(layout: Layout, roots: list[str]) -> Recognised:
    found = _branches(layout, roots)
    if not found:
        ends = [end for ends in layout.branches.values() for end in ends]
        raise UsageError(f"it is not laid out as {layout.name}: its networks are at {roots}, not at {ends}")
    return Recognised(layout, found, layout.default)


def _branches(layout: Layout, roots: list[str]) -> dict[str, str]:
    """The root of each of a layout's branches that is there."""
    found = {name: _first(roots, ends) for name, ends in layout.branches.items()}
    return {name: root for name, root in found.items() if root is not None}


def _first(roots: list[str], ends: tuple[str, ...]) -> str | None:
    for end in ends:
        for root in roots:
            if _BARE.fullmatch(root) if end == "" else root == end or root.endswith(f".{end}"):
                return root
    return None

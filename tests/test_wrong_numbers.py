"""One row for each way to a wrong, stale or misnamed number; the right one from a few independent lines."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import torchvision
from build_networks import build
from PIL import Image
from small_networks import Convolutional
from small_networks import network as small_network
from torch import Tensor, nn

import coss_eval as ce
from coss_eval import attacks, evaluation
from coss_eval.attacks import pgd
from coss_eval.checkpoints.load import load_model, make_model, save_model
from coss_eval.checkpoints.normalisation import READINGS, normalisation_check
from coss_eval.checkpoints.preprocessing import beside, of_own_code
from coss_eval.data import digests
from coss_eval.data.batches import Batch, Geometry
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, CossWarning, UsageError
from coss_eval.internal.sweep import sweep
from coss_eval.models.architecture import Architecture
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.models.heads import resolve_head
from coss_eval.models.model import Model
from coss_eval.models.wrap import wrap
from coss_eval.probes.behaviour import apart, batch_dependence, observe
from coss_eval.probes.linear import fit_probe
from coss_eval.receptive_field.effective import effective
from coss_eval.receptive_field.theoretical import fields, location_fields, theoretical
from coss_eval.redundancy import measure, spectrum
from coss_eval.reports.estimates import Estimate, Shares, area, kept
from coss_eval.reports.results import Results
from coss_eval.store import Cell, Measurement, Store
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.crops.task import Crops
from coss_eval.tasks.internal.task import Internal
from coss_eval.tasks.probe.task import Probe
from coss_eval.tasks.redundancy.task import Redundancy

# ------------------------------------------------------------------------------------------------- measures: begin


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fgsm_is_run_at_each_eps_alone() -> None:
    """A network that a short step breaks and a long one, which clips at white, does not: no minimum over the list."""

    class Bump(nn.Module):  # class 1 only near brightness 0.6; climbing from 0.5 passes it
        def forward(self, pixels: Tensor) -> Tensor:
            brightness = pixels.mean((1, 2, 3))
            return torch.stack([0 * brightness, 1 - 200 * (brightness - 0.6).square()], 1)

    images, labels = torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    levels = [0.02, 0.1, 0.4]
    found = attacks.fgsm(Bump(), images, labels, levels)
    by_hand = [Bump()((images + eps).clamp(0, 1)).argmax(1) == labels for eps in levels]
    assert torch.equal(found.robust, torch.stack(by_hand))
    assert found.robust_accuracy == [1.0, 0.0, 1.0]
    assert attacks.BIM()(Bump(), images, labels, levels).robust_accuracy == [1.0, 0.0, 0.0]  # swept


def _fgsm_sees_past_a_saturated_softmax() -> None:
    """Logits 1000 apart: in float32 the cross-entropy is 0 and has no gradient; in float64 its sign is the weights'."""
    weight = torch.randn(2, 48, generator=_generator())
    images, labels = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    weight[1] -= 0.02 * weight.sum(1).abs().max()

    class Confident(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = 1e3 * (pixels.flatten(1) @ weight.T + torch.tensor([5.0, 0.0]))
            return logits

    gap = float((Confident()(images)[0, 0] - Confident()(images)[0, 1]) / 1e3)
    reach = float((weight[1] - weight[0]).abs().sum())  # a step of eps closes eps * reach of the gap
    assert gap > 0.2
    eps = [0.9 * gap / reach, 1.1 * gap / reach]
    assert attacks.fgsm(Confident(), images, labels, eps).robust_accuracy == [1.0, 0.0]


def _kept_is_one_definition() -> None:
    """(accuracy - chance)/(clean - chance), its interval by a bootstrap of the images; the areas are the same ratio."""
    rng = np.random.default_rng(0)
    clean = rng.random(2000) < 0.7
    damaged = [clean, clean & (rng.random(2000) < 0.8), clean & (rng.random(2000) < 0.3)]
    made = [_estimate(part) for part in damaged]
    found = kept(area([0, 0.5, 1], made), made[0], 0.1)
    assert found is not None

    def share(rows: Any) -> float:
        areas = [damaged[1][rows].mean(), (clean[rows].mean() + damaged[2][rows].mean()) / 2]  # trapezoids
        return float((np.mean(areas) - 0.1) / (clean[rows].mean() - 0.1))

    assert found.value == pytest.approx(share(slice(None)))
    again = [share(rng.integers(0, 2000, 2000)) for _ in range(1000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.004)


def _estimate(verdicts: np.ndarray) -> Estimate:
    import pandas as pd

    return Estimate(
        float(verdicts.mean()),
        None,
        None,
        len(verdicts),
        Shares(pd.RangeIndex(len(verdicts)), verdicts.astype(float)),
        "f",
    )


def _nothing_is_kept_of_chance() -> None:
    """12 % of 100 images in 10 classes: the standard error is 3.2 %, and an area of several hundred % was printed."""
    rng = np.random.default_rng(0)
    for clean, n, given in ((0.12, 100, False), (0.12, 10_000, True), (0.25, 100, True), (0.1, 10**6, False)):
        right = rng.permutation(n) < round(clean * n)
        se = math.sqrt(clean * (1 - clean) / n)
        assert (clean - 0.1 > 3 * se) == given
        assert (kept(_estimate(right), _estimate(right), 0.1) is not None) == given


def _old_stores_tell_chance_by_what_they_hold(tmp_path: Path) -> None:
    place = {"site": "prepool", "kind": "channel"}
    store, cell = Store(tmp_path), Cell("internal", place)
    numbers = [("accuracy", 0.0, 0.8), ("accuracy", 0.5, 0.4), ("relative_accuracy", 0.5, (0.4 - 0.02) / (0.8 - 0.02))]
    measured = [Measurement(m, v, 100, condition=place | {"level": level, "seed": 0}) for m, level, v in numbers]
    measured.append(Measurement("auc", 5.06, 100, condition=place | {"seed": 0}))
    record = {"protocol": {"data": {"fingerprint": "f", "name": "d"}}, "cell": cell, "model": "m"}
    store.write(store.key(record["protocol"], cell), record | {"measurements": measured})
    results = Results(store)
    assert results.chance("m") == pytest.approx(1 / 50)


def _a_probe_does_not_stop_at_the_end_of_its_grid() -> None:
    """The class lies in the difference of two features that are nearly the same: only weak penalties reach it."""
    labels = torch.arange(400) % 2
    noise = torch.randn(400, generator=_generator(), dtype=torch.float64)
    features = torch.stack([noise + 0.2 * (2 * labels - 1), noise], 1)
    probe = fit_probe(
        features[:200], labels[:200], num_classes=2, select=(features[200:], labels[200:]), strengths=[0.3, 0.1]
    )
    exact = (features[200:, 0] > features[200:, 1]).long() == labels[200:]
    assert bool(exact.all())
    assert min(probe.path) < 0.1
    assert probe.path[probe.strength] > probe.path[0.1]
    assert "widened to" in probe.describe()


def _lidars_delta_is_the_papers() -> None:
    """(S_W + 1e-4 I)^-1/2 S_B (S_W + 1e-4 I)^-1/2 (arXiv 2312.04000) of features whose variance is near 1e-4."""
    between, within = torch.diag(torch.tensor([4e-4, 1e-4])).double(), torch.diag(torch.tensor([1e-4, 3e-4])).double()
    p = torch.tensor([4e-4 / 2e-4, 1e-4 / 4e-4]).double()
    p = p / p.sum()
    assert spectrum.lidar(between, within) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)


def _share_of_pixels_that_locations_see(rf: int, jump: int, size: int) -> float:
    """Brute force: a unit at i * jump, for each of size / jump, sees (rf - 1) / 2 pixels to each side."""
    seen = np.zeros((size, size), dtype=bool)
    half = (rf - 1) // 2
    for row in range(0, size, jump):
        for column in range(0, size, jump):
            seen[max(row - half, 0) : row + half + 1, max(column - half, 0) : column + half + 1] = True
    return float(seen.mean())


def _the_share_of_covered_pixels_is_given() -> None:
    for depth, rf, stem, size, percent in (
        (18, 9, "cifar", 64, 91),
        (18, 5, "cifar", 64, 35),
        (50, 35, "imagenet", 224, 88),
    ):
        backbone = build(f"rf{rf}_resnet{depth}", stem=stem, width=8)[0].eval()
        found = location_fields(backbone, "prepool", size)
        assert round(100 * found.covered) == percent
        assert found.covered == pytest.approx(_share_of_pixels_that_locations_see(rf, found.jump, size))
        assert theoretical(backbone, size).set_index("site").loc["prepool", "covered"] == found.covered
        assert found.border == -(-((rf - 1) // 2) // found.jump)


def _circular_padding_has_no_theoretical_field() -> None:
    circular = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(CossError, match="circular padding") as caught:
        theoretical(circular, 16)
    assert "\n" not in str(caught.value)
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    assert fields(reflecting, 16)


def _the_effective_field_is_the_median_over_images() -> None:
    """Each image's own field at 4.55 % of its gradient's peak: counted one image at a time."""
    backbone = build("resnet18", stem="cifar", width=8)[0].eval()
    images = torch.randn(5, 3, 32, 32, generator=_generator())
    sizes = []
    for image in images.split(1):
        leaf = image.clone().requires_grad_()
        local = backbone.represent(leaf).local  # (1, 16, D)
        local[:, 2 * 4 + 2].relu().sum().backward()
        assert leaf.grad is not None
        seen = leaf.grad.abs().sum(1)
        sizes.append(float((seen > 0.0455 * seen.max()).sum()) ** 0.5)
    found = effective(backbone, [images])
    assert found.sizes.tolist() == pytest.approx(sizes, abs=0.2)
    assert found.size == pytest.approx(sorted(sizes)[2], abs=0.2)


def _redundancy_is_centred_per_position() -> None:
    """Cosines of what is left of every location when the mean of its own position is taken off; interior likewise."""
    backbone, images = small_network("cnn"), torch.rand(40, 3, 32, 32, generator=_generator())
    frame = measure(backbone, [images]).set_index("metric")["value"]
    with torch.no_grad():
        local = backbone.represent(images).local.double()
    side = math.isqrt(local.shape[1])
    for name, rows in (("per_position", slice(None)), ("interior", slice(1, -1))):
        z = local.unflatten(1, (side, side))[:, rows, rows].flatten(1, 2)
        u = F.normalize(z - z.mean(0), dim=-1)
        cosines = torch.einsum("nld,mkd->nmlk", u, u)  # every pair of locations of every pair of images
        same, count = torch.eye(40, dtype=torch.bool), u.shape[1]
        inside = (cosines[same].sum() - 40 * count) / (40 * count * (count - 1))
        between = cosines[~same].mean()
        expected = float((inside - between) / (1 - between))
        assert frame[f"normalised_{name}"] == pytest.approx(expected, abs=1e-5), name


MEASURES: dict[str, Callable[..., None]] = {
    "9a FGSM": _fgsm_is_run_at_each_eps_alone,
    "9a saturated loss": _fgsm_sees_past_a_saturated_softmax,
    "9b kept": _kept_is_one_definition,
    "9b chance": _nothing_is_kept_of_chance,
    "9b old stores": _old_stores_tell_chance_by_what_they_hold,
    "9c probe": _a_probe_does_not_stop_at_the_end_of_its_grid,
    "9d LiDAR": _lidars_delta_is_the_papers,
    "9e covered": _the_share_of_covered_pixels_is_given,
    "9e circular": _circular_padding_has_no_theoretical_field,
    "9e effective": _the_effective_field_is_the_median_over_images,
    "10 redundancy": _redundancy_is_centred_per_position,
}


@pytest.mark.parametrize("line", MEASURES)
def test_measures(line: str, request: pytest.FixtureRequest) -> None:
    wanted = MEASURES[line].__code__.co_varnames[: MEASURES[line].__code__.co_argcount]
    MEASURES[line](*(request.getfixturevalue(name) for name in wanted))


# --------------------------------------------------------------------------------------------------- measures: end


# --- models: how a file becomes a network -----------------------------------------------------------------------------


class Small(nn.Module):
    """A map, a GeM pooling with an exponent of its own, and a head of some name and kind."""

    def __init__(self, head: str = "linear2", kind: str = "linear", view: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.view = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), view
        self.p, self.head_name = nn.Parameter(torch.tensor(3.0)), head
        setattr(self, head, nn.Conv2d(12, 5, 1) if kind == "conv" else nn.Linear(12 * 64 if view else 12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        head = getattr(self, self.head_name)
        if self.view:
            return head(x.view(x.size(0), -1))
        x = F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(self.p), 1).pow(1 / self.p)
        return head(x).flatten(1) if isinstance(head, nn.Conv2d) else head(x.flatten(1))


class ConvBeforePooling(nn.Sequential):
    """Class maps first, their mean afterwards."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.head_dist = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (self.head(x) + self.head_dist(x)) / 2


class Normalising(nn.Module):
    def __init__(self, mean: float = 0.3, std: float = 0.2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), mean))
        self.register_buffer("std", torch.full((3, 1, 1), std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def fully_connected() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))


def normalised_small() -> nn.Module:
    return nn.Sequential(Normalising(), Small())


def flattens_by_view() -> nn.Module:
    return Small(view=True)


HEADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear2 after GeM": (Small, 12),
    "1x1 convolution after the pooling": (lambda: Small("last_conv", "conv"), 12),
    "1x1 convolution before the pooling": (ConvBeforePooling, 8),
    "the last of three": (fully_connected, 7),
    "after a view": (flattens_by_view, 768),
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def saved(network: nn.Module, path: Path) -> Path:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)  # no factory draws these
    torch.save(network.eval().state_dict(), path)
    return path


def logits(model: Model, images: Tensor) -> Tensor:
    assert model.head is not None
    with torch.no_grad():
        found: Tensor = Classifier(model.backbone, model.head, model.preprocessing)(to_float(images))
    return found


@pytest.mark.parametrize("name", HEADS)
def test_the_last_linear_layer_is_the_head_whatever_its_name(name: str, images: Tensor) -> None:
    make, dim = HEADS[name]
    network = make().eval()
    pixels = images / 255
    with torch.no_grad():
        expected = network(pixels)
        backbone, head = wrap(network)
        assert head is not None
        assert backbone(pixels).shape == (4, dim)
        torch.testing.assert_close(head(backbone(pixels)), expected, rtol=1e-4, atol=1e-5)
    assert "head:" in backbone.note


def test_the_map_before_a_generalised_mean_is_that_before_its_power(images: Tensor) -> None:
    network = Small().eval()
    with torch.no_grad():
        network.p.fill_(2.5)
        expected = F.relu(network.conv2(F.relu(network.conv1(images / 255))))
        backbone, _ = wrap(network)
        found = backbone.represent(images / 255)
        gem = expected.clamp(min=1e-6).pow(2.5).mean((2, 3)).pow(1 / 2.5)
    torch.testing.assert_close(found.local, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.global_, gem)


def test_the_heads_of_a_distilled_network_are_no_representation(images: Tensor) -> None:
    network = TwoHeads().eval()
    with torch.no_grad():
        expected = network.body(images / 255)
        backbone, head = wrap(network)
        assert head is None
        torch.testing.assert_close(backbone(images / 255), expected)
    assert "two heads, head and head_dist" in backbone.note


@pytest.mark.slow
def test_local_and_global_are_named_by_hand(tmp_path: Path, images: Tensor) -> None:
    network = torchvision.models.resnet18(num_classes=5)
    path = saved(network, tmp_path / "net.pth")
    plain = load_model(path, arch="resnet18")
    model = load_model(path, arch="resnet18", local="layer3", global_="avgpool")
    pixels = images / 255
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(pixels))))
        local = network.layer3(network.layer2(network.layer1(x)))
        expected = network.layer4(local).mean((2, 3))
        found = model.backbone.represent(pixels)
    torch.testing.assert_close(found.local, local.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.global_, expected, rtol=1e-4, atol=1e-4)
    assert model.protocol() != plain.protocol()
    assert {"local", "global_"} & plain.protocol().keys() == set()
    early = load_model(path, arch="resnet18", global_="layer2", head="probe")
    with torch.no_grad():
        expected = network.layer2(network.layer1(x)).mean((2, 3))
        torch.testing.assert_close(early.backbone(pixels), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CossError, match="did you mean layer3"):
        load_model(path, arch="resnet18", local="layer33")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_no_number_is_refused_by_name(value: float, tmp_path: Path) -> None:
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, :2] = value
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CossError, match=r"^net.pth: layer2.0.conv1.weight holds 2 of 73,728 values"):
        load_model(tmp_path / "net.pth")


def timm_state(name: str) -> dict[str, Tensor]:
    made: Any = pytest.importorskip("timm").create_model(name, num_classes=5)
    state: dict[str, Tensor] = made.state_dict()
    return state


@pytest.mark.slow
def test_a_damaged_lookalike_is_refused_for_its_damage(tmp_path: Path) -> None:
    state = timm_state("resnetblur18")
    state["conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "resnetblur18.pth")
    with pytest.raises(CossError, match=r"conv1.weight holds 1 of|give --arch timm:resnetblur18"):
        load_model(tmp_path / "resnetblur18.pth")


@pytest.mark.slow
@pytest.mark.parametrize("said", ["file", "entry", "config.json"])
def test_an_anti_aliased_resnet_is_never_a_plain_one(said: str, tmp_path: Path, images: Tensor) -> None:
    name = "resnetblur18"
    content: dict[str, Any] = {"state_dict": timm_state(name)} | ({"arch": name} if said == "entry" else {})
    path = tmp_path / (f"{name}.c1_in1k.pth" if said == "file" else "net.pth")
    torch.save(content, path)
    if said == "config.json":
        (tmp_path / said).write_text(json.dumps({"architecture": name}))
    with pytest.raises(CossError, match="give --arch timm:resnetblur18"):
        load_model(path)
    model = load_model(path, arch=f"timm:{name}", img_size=64, head="probe")
    network: Any = pytest.importorskip("timm").create_model(name, num_classes=5)
    network.load_state_dict(content["state_dict"])
    with torch.no_grad():
        expected = network.eval().forward_features(images / 255).mean((2, 3))
        torch.testing.assert_close(model.backbone(images / 255), expected, rtol=1e-4, atol=1e-4)


def test_what_no_tensor_tells_is_said(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "net.pth")
    report = load_model(tmp_path / "net.pth").report
    assert report is not None
    assert any("no anti-aliasing ASSUMED" in note for note in report.notes)


LEFTOVERS = {
    "GeM's exponent": ("resnet18", "avgpool.p", torch.tensor([3.0])),
    "a norm before the blocks": ("vit_tiny_patch16_224", "norm_pre.weight", torch.ones(192)),
    "layer scale": ("vit_tiny_patch16_224", "blocks.0.ls1.gamma", torch.ones(192)),
    "register tokens": ("vit_tiny_patch16_224", "reg_token", torch.zeros(1, 4, 192)),
    "a fifth stage": ("resnet18", "layer5.0.conv1.weight", torch.zeros(4, 512, 3, 3)),
    "another stem's convolution": ("resnet18", "conv2.weight", torch.zeros(64, 64, 3, 3)),
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_leftover_of_the_backbone_is_named_and_refused(name: str, tmp_path: Path) -> None:
    arch, key, tensor = LEFTOVERS[name]
    torch.save(timm_state(arch) | {key: tensor}, tmp_path / "net.pth")
    with pytest.raises(CossError, match=rf"{key.rpartition('.')[2]}.*without a place.*--arch"):
        load_model(tmp_path / "net.pth")


def test_projection_heads_may_be_left_out(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    extra = {"projector.0.weight": torch.zeros(9, 512), "predictor.norm.weight": torch.zeros(9), "queue": torch.ones(4)}
    torch.save(state | extra | {"decoder_embed.weight": torch.zeros(9, 512)}, tmp_path / "net.pth")
    assert load_model(tmp_path / "net.pth").backbone.dim == 512


def resnet_inside(key: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network that normalises by itself, and its tensors, the constants under other names."""
    network = nn.Sequential(Normalising(), torchvision.models.resnet18(num_classes=5)).eval()
    mean, _, std = key.partition(" ")
    rename = {"0.mean": mean, "0.std": std}
    return network, {rename.get(k, k.replace("1.", "model.", 1)): v for k, v in network.state_dict().items()}


@pytest.mark.parametrize("key", ["0.mean 0.std", "normalizer.new_mean normalizer.new_std", "mu sigma"])
def test_a_normalisation_in_the_file_is_used_once(key: str, tmp_path: Path, images: Tensor) -> None:
    network, state = resnet_inside(key)
    torch.save(state, tmp_path / "net.pth")
    model = load_model(tmp_path / "net.pth")
    with torch.no_grad():
        torch.testing.assert_close(logits(model, images), network(images / 255), rtol=1e-4, atol=1e-4)
    assert key.partition(" ")[0] in model.preprocessing.source


def test_a_normalisation_in_the_network_is_not_applied_again(tmp_path: Path, images: Tensor) -> None:
    network = normalised_small()
    path = saved(network, tmp_path / "net.pth")
    arch = f"{__name__}:normalised_small"
    model = load_model(path, arch=arch)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, images), network(images / 255), rtol=1e-4, atol=1e-4)
    assert "the network's own code" in model.preprocessing.source
    assert make_model(arch).preprocessing.mean == (0, 0, 0)
    with pytest.raises(CossError, match="normalises its input by itself"):
        load_model(path, arch=arch, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.slow
def test_timm_and_hugging_face_say_how_to_prepare_images(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(timm_state("vit_tiny_patch16_224"), path)
    found = load_model(path, arch="timm:vit_tiny_patch16_224").preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (found.img_size, found.crop_pct, found.interpolation) == (224, 0.9, "bicubic")
    config = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2, "do_center_crop": True}
    config |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = load_model(path).preprocessing
    assert (found.mean, found.std, found.crop_pct) == ((0.4,) * 3, (0.3,) * 3, 0.875)
    assert found.interpolation == "bilinear"
    flag = load_model(path, mean=(0.1,) * 3, std=(0.2,) * 3).preprocessing
    assert (flag.mean, flag.source) == ((0.1,) * 3, "flag")


def test_a_network_that_flattens_by_view_takes_channels_last_batches(tmp_path: Path, images: Tensor) -> None:
    network = flattens_by_view()
    model = load_model(
        saved(network, tmp_path / "net.pth"), arch=f"{__name__}:flattens_by_view", mean=(0,) * 3, std=(1,) * 3
    )
    assert model.head is not None
    classifier = Classifier(model.backbone, model.head, model.preprocessing).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = to_float(images).requires_grad_()
    assert not pixels.is_contiguous()
    found = classifier(pixels)
    found.sum().backward()
    assert pixels.grad is not None
    torch.testing.assert_close(found, network(images / 255), rtol=1e-4, atol=1e-5)
    ids, labels = torch.arange(4), found.argmax(1)
    attacked = pgd(classifier, pixels.detach(), labels, [1 / 255], ids, steps=2)
    assert attacked.robust.shape == (1, 4)
    batches = [Batch(images, labels, ids)]
    damaged = sweep(classifier.eval(), batches, ["prepool"], ["element"], levels={"element": [0.0]}, seeds=[0])
    assert [s.correct.all() for s in damaged.values()] == [True]  # at level 0, as labelled


def test_integer_class_names_number_a_heads_outputs() -> None:
    model = make_model("resnet18", width=8, classes=tuple(f"n{i:03}" for i in range(12)))
    names = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: as words
    decision = resolve_head(model, names, "own")
    assert decision.class_map == tuple(map(int, names))
    assert resolve_head(model, [str(i) for i in range(12)], "own").class_map is None
    assert "output 0 is taken for class '0', 11 for '11'" in decision.why
    with pytest.raises(CossError, match="other classes"):
        resolve_head(model, [f"c{i}" for i in range(12)], "own")


class Ending(nn.Module):
    """Code as in tutorials: something comes after the last linear layer."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.end = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(F.relu(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("softmax", [F.softmax, F.log_softmax])
def test_a_softmax_after_the_head_is_no_representation(softmax: Callable[..., Tensor], images: Tensor) -> None:
    network = Ending(lambda y: softmax(y, dim=1)).eval()
    pixels = images / 255
    with torch.no_grad():
        expected, features = network(pixels), F.relu(network.conv(pixels)).mean((2, 3))
        backbone, head = wrap(network)
        assert head is not None
        torch.testing.assert_close(backbone(pixels), features)
        torch.testing.assert_close(softmax(head(backbone(pixels)), dim=1), expected)
        assert backbone.represent(pixels).local.shape == (4, 256, 8)
    assert "head: fc (8 to 5)" in backbone.note


def test_logits_that_are_taken_for_the_representation_are_said_to_be() -> None:
    backbone, head = wrap(Ending(lambda y: 4 * y).eval())
    assert head is None
    assert "its output (5 wide) is taken for the representation" in backbone.note
    assert "--global" in backbone.note


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(dim=1)])
def test_code_that_squeezes_a_single_image_is_told_what_it_does(end: nn.Module) -> None:
    network = nn.Sequential(Ending(lambda y: y[..., None, None].squeeze()), end)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(UsageError, match=r"one image.*\(2, 5\) of two: it works with batches.*\.flatten\(1\)"):
        wrap(network)


def by_channels(x: Tensor) -> Tensor:
    """Each channel by itself, as in code from before broadcasting."""
    return torch.stack([(x[:, channel] - 0.4) / 0.2 for channel in range(3)], 1)


def weights_read_first(x: Tensor) -> Tensor:
    """As layers do that standardise their weights by a function for features."""
    F.batch_norm(torch.arange(12.0).view(1, 3, 4), None, None, training=True)
    return x


def caffe(x: Tensor) -> Tensor:
    return x.flip(1) - torch.tensor([103.9, 116.8, 123.7])[:, None, None]


UNTOUCHED, UNIT, DEEP = (
    (Preprocessing().mean, Preprocessing().std),
    ((0.0,) * 3, (1.0,) * 3),
    ((0.0,) * 3, (1 / 255,) * 3),
)
FIRST_STEPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "constants": (lambda x: (x - 0.4) / 0.2, UNIT),
    "tensors": (lambda x: (x - torch.full((3, 1, 1), 0.4)) / torch.full((3, 1, 1), 0.2), UNIT),
    "to [-1, 1]": (lambda x: 2 * x - 1, UNIT),
    "to 0 to 255": (lambda x: 255 * x, UNIT),
    "torchvision's": (lambda x: torchvision.transforms.functional.normalize(x, [0.4] * 3, [0.2] * 3), UNIT),
    "torchvision's v2": (lambda x: torchvision.transforms.v2.functional.normalize(x, [0.4] * 3, [0.2] * 3), UNIT),
    "by channels": (by_channels, UNIT),
    "after a resize": (lambda x: (F.interpolate(x, 16) - 0.4) / 0.2, UNIT),
    "of 0 to 255": (lambda x: x.float() / 255, DEEP),
    "of 0 to 255, then more": (lambda x: ((x / 255) - 0.4) / 0.2, DEEP),
    "of 0 to 255, to [-1, 1]": (lambda x: x / 127.5 - 1, DEEP),
    "Caffe's": (caffe, DEEP),
    "by their range": (lambda x: x / 255 if x.max() > 1 else x, UNIT),
    "clamped": (lambda x: x.clamp(0, 1), UNIT),
    "after standardised weights": (lambda x: (weights_read_first(x) - 0.4) / 0.2, UNIT),
    "none but those": (lambda x: weights_read_first(x), UNTOUCHED),
    "nothing": (lambda x: x, UNTOUCHED),
    "a clone": (lambda x: x.clone().float().contiguous(), UNTOUCHED),
    "of the image itself": (lambda x: x - x.mean((2, 3), keepdim=True), UNTOUCHED),
    "by the image's own deviation": (lambda x: (x - x.mean()) / x.std(), UNTOUCHED),
}


class FirstStep(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.small = step, Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.step(x))


@pytest.mark.parametrize("case", FIRST_STEPS)
def test_pixels_that_the_code_normalises_are_not_normalised_before(case: str) -> None:
    step, expected = FIRST_STEPS[case]
    found = of_own_code(wrap(FirstStep(step).eval())[0], Preprocessing(), asked=False)
    assert (found.mean, found.std) == expected
    asked = Preprocessing(mean=(0.1,) * 3)
    assert of_own_code(wrap(FirstStep(step).eval())[0], asked, asked=True) is asked


def test_a_network_that_holds_constants_for_0_to_255_is_given_such_pixels() -> None:
    network = nn.Sequential(Normalising(123.7, 58.4), Small()).eval()
    found = of_own_code(wrap(network)[0], Preprocessing(), asked=False)
    assert (found.mean, found.std) == DEEP
    assert "0.mean" in found.source


@pytest.mark.parametrize("trained", READINGS)
def test_the_hint_of_a_mismatch_names_what_the_network_was_trained_with(trained: str) -> None:
    """And nothing that it was not: ImageNet's and CIFAR's constants alone cannot be told apart."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=draw, dtype=torch.uint8)
    declared = Preprocessing(mean=(0.1,) * 3, std=(0.02,) * 3)  # nobody's
    model = replace(make_model("resnet18", stem="cifar", width=8), preprocessing=declared)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in READINGS[trained])
    network: Any = model.backbone.network
    with torch.no_grad():
        seen = network.conv1((images[::2] / 255 - mean) / std)
        network.bn1.running_mean.copy_(seen.mean((0, 2, 3)))
        network.bn1.running_var.copy_(seen.var((0, 2, 3)))
    hint = normalisation_check(model, images[1::2])
    assert hint is not None
    alike = {name for name in READINGS if "constants" in name} if "constants" in trained else {trained}
    named = {name for name in READINGS if name in hint}
    assert trained in named
    assert named <= alike


class Named(nn.Module):
    """A normalisation by constants of some names."""

    def __init__(self, mean: str, std: str, value: float) -> None:
        super().__init__()
        self.small, self.names = Small(), (mean, std)
        self.register_buffer(mean, torch.full((3, 1, 1), 0.3))
        self.register_buffer(std, torch.full((3, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name) for name in self.names)
        return self.small((x - mean) / (std.sqrt() if self.names[1].startswith("var") else std))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "std", "value"), [("mean", "var", 0.04), ("means", "sds", 0.2), ("means", "stds", 0.2), ("m", "s", 0.2)]
)
def test_constants_of_other_names_are_found(mean: str, std: str, value: float, tmp_path: Path) -> None:
    network = Named(mean, std, value).eval()
    assert of_own_code(wrap(network)[0], Preprocessing(), asked=False).mean == (0,) * 3
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    torch.save(state | dict(network.named_buffers()), tmp_path / "net.pth")
    if mean == "m":  # nothing says what they are
        report = load_model(tmp_path / "net.pth").report
        assert report is not None
        assert report.unexpected == ("m", "s")
        return
    found = load_model(tmp_path / "net.pth").preprocessing
    assert (found.mean, found.std) == (pytest.approx((0.3,) * 3), pytest.approx((0.2,) * 3))


def test_the_statistics_of_a_batch_norm_are_no_constants() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), Small()).eval()
    assert of_own_code(wrap(network)[0], Preprocessing(), asked=False) == Preprocessing()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_says_nothing_of_its_normalisation() -> None:
    network: nn.Module = torch.jit.trace(FirstStep(lambda x: (x - 0.4) / 0.2).eval(), torch.rand(1, 3, 32, 32))
    backbone = wrap(network)[0]
    with pytest.raises(UsageError, match="TorchScript does not show"):
        of_own_code(backbone, Preprocessing(), asked=False)
    assert of_own_code(backbone, Preprocessing(), asked=True) == Preprocessing()


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "one number for all": {"image_mean": 0.4, "image_std": [0.2]},
    "no factor": {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "rescale_factor": None},
    "0 to 255": {"image_mean": [102] * 3, "image_std": [51] * 3, "do_rescale": False},
    "image_std": {"image_mean": [0.4] * 3},
    "above 0": {"image_mean": [0.4] * 3, "image_std": [0, 0, 0]},
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_odd_configs_of_hugging_face_are_read_or_refused(case: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "net.pth")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUGGING_FACE[case]))
    if case in ("image_std", "above 0"):
        with pytest.raises(CossError, match=f"image_std.*{case}|{case} in"):
            load_model(tmp_path / "net.pth")
        return
    found = load_model(tmp_path / "net.pth").preprocessing
    assert found.mean == pytest.approx((0.4,) * 3)
    assert found.std == pytest.approx((0.2,) * 3)


SIZES = {
    "number": (224, 224),
    "list": ([224, 224], 224),
    "list of one": ([224], 224),
    "shortest edge": ({"shortest_edge": 224}, 224),
    "square": ({"height": 224, "width": 224}, 224),
    "longest edge": ({"longest_edge": 224}, None),
    "oblong list": ([224, 112], "square is expected"),
    "oblong": ({"height": 224, "width": 112}, "square is expected"),
    "words": ("224", "square is expected"),
}


@pytest.mark.parametrize("case", SIZES)
def test_every_way_to_write_a_size_for_hugging_face_is_read_or_refused(case: str, tmp_path: Path) -> None:
    size, expected = SIZES[case]
    config = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(CossError, match=expected):
            beside(tmp_path / "net.pth")
        return
    found = beside(tmp_path / "net.pth")
    assert found is not None
    assert found.img_size == expected


def test_integer_names_that_the_file_knows_are_not_numbered_anew() -> None:
    """A file with classes sorted as words ("0", "1", "10", ...): its output 2 is class 10."""
    names, numbers = sorted(map(str, range(12))), list(map(str, range(12)))
    model = make_model("resnet18", width=8, classes=names)
    assert resolve_head(model, numbers).class_map == tuple(names.index(name) for name in numbers)
    with pytest.raises(CossError, match="another order; --head auto"):
        resolve_head(model, numbers, "own")
    with pytest.raises(CossError, match="other classes"):
        resolve_head(model, list(map(str, range(1, 13))), "own")


# ---- data: class order, labels, decoding, sizes, the fingerprint, images left out ----


def write_images(folder: Path, counts: dict[str, int], seed: int = 0, side: int = 16) -> Path:
    """Class folders of noise, one shade brighter a class, under train/ and val/."""
    draw = np.random.default_rng(seed)
    for split in ("train", "val"):
        for shade, (name, count) in enumerate(counts.items()):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (side, side, 3)) + 100 * (shade % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:03}.png")
    return folder


def png_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_labelled(folder: Path, labels: list[int]) -> Path:
    folder.mkdir()
    for at, split in enumerate(("train", "test")):
        images = [{"bytes": png_bytes(2 * i + at), "path": None} for i in range(len(labels))]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    return folder


NAMES = {
    "integers": (["0", "1", "2", "10", "11", "100"], ["0", "1", "2", "10", "11", "100"]),
    "leading zeros": (["0001", "0010", "0002"], ["0001", "0002", "0010"]),
    "mixed": (["1", "10", "2", "n01"], ["1", "10", "2", "n01"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_integer_class_folders_are_in_the_order_of_their_numbers(case: str, tmp_path: Path) -> None:
    given, expected = NAMES[case]
    data = ce.load_dataset(write_images(tmp_path, dict.fromkeys(given, 1)))
    assert list(data.classes) == expected
    for key, label in zip(data.test.keys, data.test.labels, strict=True):
        assert data.classes[label] == key.split("/")[1]


@pytest.mark.parametrize("values", [[7, 99, 48_484], [1, 2, 3], [0, 2_000_000_000]], ids=str)
def test_sparse_labels_are_classes_by_value(values: list[int], tmp_path: Path) -> None:
    labels = [values[i % len(values)] for i in range(12)]
    data = ce.load_dataset(write_labelled(tmp_path / "set", labels))
    assert data.classes == tuple(map(str, values))
    assert [int(data.classes[label]) for label in data.test.labels] == labels


def test_negative_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CossError, match=r"1 of 3 labels in .* are negative, the first one -5 in row 1"):
        ce.load_dataset(write_labelled(tmp_path / "set", [0, -5, 1]))


@pytest.mark.parametrize(("count", "labels", "said"), [(3, [0, -1, -1], "2 of 3 .* -1 "), (0, [], "without images")])
def test_arrays_without_labels_or_images_are_refused(count: int, labels: list[int], said: str, tmp_path: Path) -> None:
    """-1 stands for no label, as in STL-10, and was a class of its own."""
    x, y = np.zeros((count, 8, 8, 3), np.uint8), np.array(labels, dtype=np.int64)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(CossError, match=said):
        ce.load_dataset(tmp_path / "a.npz")


def test_deep_grey_is_scaled_by_its_range_and_told(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "val" / "a" / "000.tif")  # 32 bits, of which 8 are used
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "val" / "a" / "001.tif")
    data = ce.load_dataset(tmp_path)
    assert [note for note in data.notes if note.startswith("2 of the 6 test images looked at have more than 8 bits")]
    (batch,) = data.test.batches()
    for key, pixels in zip(data.test.keys, batch.images, strict=True):
        if key.endswith(".tif"):
            assert np.array_equal(pixels[0].numpy(), ramp)


def test_exif_turns_and_is_in_the_protocol(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stored = Image.open(tmp_path / "val" / "a" / "000.png").copy()
    stored.save(tmp_path / "val" / "a" / "000.png", exif=exif)
    plain, turned = (ce.load_dataset(tmp_path, exif=on) for on in (False, True))
    first, upside_down = (next(iter(data.test.batches())).images[0].permute(1, 2, 0) for data in (plain, turned))
    assert np.array_equal(first, np.asarray(stored))
    assert np.array_equal(upside_down, np.asarray(stored)[::-1, ::-1])
    assert "exif" not in plain.test.protocol()
    assert turned.test.protocol() == {**plain.test.protocol(), "exif": True}
    assert turned.test.protocol(Geometry())["exif"] is True
    assert turned.test.fingerprint != plain.test.fingerprint


def test_hidden_folders_inside_classes_are_left_out_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    for hidden in ("val/a/.thumbnails", "val/b/__MACOSX", "val/b/@eaDir", "val/@eaDir"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "0.png").write_bytes(png_bytes(1))
    data = ce.load_dataset(tmp_path)
    assert len(data.test) == 4
    assert data.classes == ("a", "b")
    assert data.notes == (
        "files in hidden folders and of formats that are not read are left out of val: "
        ".thumbnails (1), @eaDir (1), __MACOSX (1)",
    )


def test_a_test_image_that_is_a_training_image_is_told(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "val/b/002.png").write_bytes((tmp_path / "train/a/001.png").read_bytes())
    data = ce.load_dataset(tmp_path)
    assert data.warnings() == []  # nothing has read them yet
    assert data.train.fingerprint
    assert data.test.fingerprint
    assert data.repeated() == {"val/b/002.png": "train/a/001.png"}
    assert data.warnings() == [
        "1 of 6 test images are training images too, byte for byte: val/b/002.png is train/a/001.png"
    ]


def probed(data: Dataset, out: Path) -> tuple[float, ce.Run]:
    """A linear probe's top-1 share on the pixels, with all caches on, as evaluate gives it."""
    run = ce.evaluate(ce.load_model("pixels:8"), data, [Probe()], out=out, device="cpu")
    assert run.failures == ()
    table = run.table()
    return float(table[(table["metric"] == "top1")]["value"].iloc[0]), run


@pytest.mark.slow
def test_replaced_images_give_new_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 test images the first 64 by id stay, which is all that the fingerprint once read."""
    monkeypatch.setattr(digests, "SETTLED", 0.0)  # so that digests of files just written are kept, too
    folder = write_images(tmp_path / "set", {"a": 150, "b": 150})
    data = ce.load_dataset(folder)
    before, _ = probed(data, tmp_path / "out")
    assert before > 0.95
    stay = {data.test.keys[place] for place in data.test.ids.argsort()[:64]}
    replaced = [key for key in data.test.keys if key not in stay]
    for key in replaced:  # the other class's picture under this name
        other = key.replace("/a/", "/b/") if "/a/" in key else key.replace("/b/", "/a/")
        Image.open(folder / other.replace("val/", "train/")).save(folder / key)
    again = ce.load_dataset(folder)
    assert len(replaced) == 236
    after, _ = probed(again, tmp_path / "out")
    assert after == pytest.approx(64 / 300, abs=0.05)
    assert probed(ce.load_dataset(folder), tmp_path / "new")[0] == after


def test_images_replaced_under_an_open_dataset_are_told(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"a": 5, "b": 5})
    data, model = ce.load_dataset(folder), ce.load_model("pixels:8")
    ce.extract(model, data.test, device="cpu")
    Image.new("RGB", (16, 16)).save(folder / "val/b/003.png")
    for call in (
        lambda: ce.extract(model, data.test, device="cpu"),
        lambda: ce.fit_classifier(model, data, device="cpu"),
        lambda: ce.evaluate(model, data, [Probe(fractions=())], out=tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match=r"val/b/003.png has changed on disk"):
            call()
    values = ce.extract(model, ce.load_dataset(folder).test, device="cpu").values["global"]
    assert len(values[8].unique()) == 3  # black: one value a channel


@pytest.mark.slow
def test_mended_images_are_used_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"a": 10, "b": 10})
    names = ["val/a/001.png", "val/a/004.png", "val/b/009.png"]
    whole = {name: (folder / name).read_bytes() for name in names}
    for name, content in whole.items():
        (folder / name).write_bytes(content[: len(content) // 2])

    def seen(out: str) -> tuple[int, ce.Run]:
        _, run = probed(ce.load_dataset(folder, skip_bad_images=True), tmp_path / out)
        return int(run.table().query("metric == 'top1'")["n"].iloc[-1]), run

    for out in ("first", "elsewhere"):  # the second reads the kept features, and must tell as well
        count, run = seen(out)
        assert count == 17
        assert run.left_out[0].startswith("3 of 20 test images cannot be read and are left out: val/a/001.png (")
        assert json.loads((run.path / "run.json").read_text())["runs"][-1]["left_out"] == list(run.left_out)
        run.report()
        assert "3 of 20 test images cannot be read and are left out" in (run.path / "report.md").read_text()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    assert seen("first")[0] == seen("new")[0] == 20


# --- evaluation: identity, finiteness, batches, names, gaps -----------------------------------------------------------

CLEAN = Corruptions(names=())


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(60, 0), test=data.test.limited(40, 0))


def own_head(digits: Dataset, backbone: nn.Module | None = None) -> Model:
    """A small network whose own head has the dataset's classes, its logits told apart by random weights."""
    torch.manual_seed(0)
    if backbone is None:
        return make_model("resnet18", stem="cifar", width=8, classes=digits.classes)
    head, classes = nn.Linear(16, len(digits.classes)), digits.classes
    return Model(
        "hand-made", "hand-made", backbone.eval(), head, classes, Preprocessing(), "", "hand-made"
    ).identified()


def images_and_labels(digits: Dataset) -> tuple[Tensor, Tensor]:
    (batch,) = digits.test.batches(Preprocessing().geometry, batch_size=64)
    return batch.images.float() / 255, batch.labels


@torch.no_grad()
def right_accuracy(model: Model, digits: Dataset, batch_size: int = 64) -> float:
    """By hand: normalise, forward, count."""
    pixels, labels = images_and_labels(digits)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    logits = torch.cat([model.head(model.backbone((part - mean) / std)) for part in pixels.split(batch_size)])
    return (logits.argmax(1) == labels).double().mean().item()


def clean_accuracies(out: Path) -> list[float]:
    return [record["measurements"][0]["value"] for record in Store(out).records()]


@pytest.mark.slow
def test_weights_changed_in_place_are_another_model(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    before, first = ce.extract(model, digits.test, device="cpu").values["global"], right_accuracy(model, digits)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.data.mul_(torch.rand(parameter.shape) > 0.3)  # pruned; torch counts no version of .data
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    assert sorted(clean_accuracies(tmp_path)) == sorted([first, right_accuracy(model, digits)])
    after = ce.extract(model, digits.test, device="cpu").values["global"]
    assert not torch.allclose(before, after)
    classifier = Classifier(model.backbone, nn.Identity(), model.preprocessing)
    torch.testing.assert_close(after, classifier(images_and_labels(digits)[0]), rtol=1e-3, atol=1e-4)


NETWORK = """
from torch import nn
from torchvision.models import resnet18

def factory():
    network = resnet18(num_classes=10)
    network.relu = nn.{act}()
    return network
"""


@pytest.mark.slow
def test_edited_code_of_a_factory_is_another_model(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    protocols = []
    for act in ("ReLU", "GELU", "ReLU"):
        (tmp_path / "edited_net.py").write_text(NETWORK.format(act=act))
        sys.modules.pop("edited_net", None)
        importlib.invalidate_caches()
        protocols.append(make_model("edited_net:factory").identified().protocol())
    assert protocols[0] == protocols[2] != protocols[1]
    assert protocols[0]["sha256"] == protocols[1]["sha256"]
    assert "code" not in own_head(digits).identified().protocol()  # ordinary networks keep their keys


@pytest.mark.slow
@pytest.mark.parametrize("where", ["edited_here", "edited_there"])
def test_code_that_was_edited_after_its_import_is_told_and_not_renamed(
    where: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is what was imported: a model keeps its identity, a second one of that name needs a reload."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("edited_here", "edited_there"):
        sys.modules.pop(name, None)
    texts = {"edited_here": NETWORK.format(act="{act}") + "import edited_there\n", "edited_there": "# {act}\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text.format(act="ReLU"))
    importlib.invalidate_caches()
    model = make_model("edited_here:factory").identified()
    (tmp_path / f"{where}.py").write_text(texts[where].format(act="GELU"))
    assert model.identified().protocol() == model.protocol()
    with pytest.raises(UsageError, match=rf"{where} was edited since .*importlib.reload"):
        make_model("edited_here:factory")
    importlib.reload(sys.modules[where])
    assert make_model("edited_here:factory").identified().protocol() != model.protocol()


TASK = """
from dataclasses import dataclass
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.task import Result, Task

@dataclass(frozen=True)
class Mine(Task):
    name = "mine"
    uses_head = False
    def cells(self, subject, seed):
        return [Cell("mine", {{}})]
    def measure(self, cell, subject):
        return Result([Measurement("mine", {value}, 1)])
"""


def task_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(folder)
    (folder / "edited_task.py").write_text(text)
    sys.modules.pop("edited_task", None)
    importlib.invalidate_caches()
    return importlib.import_module("edited_task").Mine


def test_edited_code_of_a_task_is_another_cell(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_head(digits)
    for value in (1.0, 2.125):
        task = task_of(TASK.format(value=value), tmp_path, monkeypatch)()
        ce.evaluate(model, digits, [task], out=tmp_path / "out")
    assert sorted(clean_accuracies(tmp_path / "out")) == [1.0, 2.125]


ELSEWHERE = {
    "a base class": ("from its_base import Base", TASK.replace("class Mine", "class Base")),
    "a constant": ("from its_base import VALUE", "VALUE = {value}"),
    "through another file": ("import between", "VALUE = {value}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ELSEWHERE)
def test_code_that_a_task_takes_from_other_files_is_in_its_key(
    where: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, base = ELSEWHERE[where]
    value = {"a constant": "VALUE", "through another file": "between.its_base.VALUE"}.get(where)
    own = "class Mine(Base):\n    name = 'mine'\n" if value is None else TASK.format(value=value)
    (tmp_path / "between.py").write_text("import its_base\n")
    for number in (1.0, 2.125):
        (tmp_path / "its_base.py").write_text(base.format(value=number))
        for name in ("its_base", "between"):
            sys.modules.pop(name, None)
        task = task_of(f"{line}\n{own}", tmp_path, monkeypatch)()
        ce.evaluate(own_head(digits), digits, [task], out=tmp_path / "out")
    assert sorted(clean_accuracies(tmp_path / "out")) == [1.0, 2.125]


def test_a_task_without_source_needs_a_version(digits: Dataset, tmp_path: Path) -> None:
    module = types.ModuleType("nowhere")
    sys.modules["nowhere"] = module
    exec(TASK.format(value=1.0), module.__dict__)  # noqa: S102 - code that no file holds, as in a console
    with pytest.raises(UsageError, match="version"):
        evaluation.plan(own_head(digits), digits, tasks=[module.Mine()], out=tmp_path)
    module.Mine.version = 1
    assert evaluation.plan(own_head(digits), digits, tasks=[module.Mine()], out=tmp_path).missing == 1


def twice_as_bright(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (2 * args[0],)


def test_other_outputs_are_never_taken_for_the_stored_ones(digits: Dataset, tmp_path: Path) -> None:
    """Weights, settings and sources are the same, as where code elsewhere was edited."""
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    assert evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path).missing == 0
    with torch.no_grad():  # rounding is no change
        hook = model.backbone.register_forward_pre_hook(lambda _module, args: (args[0] * (1 + 1e-6),))
        assert evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path).missing == 0
        hook.remove()
    hook = model.backbone.register_forward_pre_hook(twice_as_bright)
    with pytest.raises(UsageError, match=r"other outputs.*--out, or --overwrite"):
        evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path, overwrite=True)
    assert clean_accuracies(tmp_path) == [right_accuracy(model, digits)]
    hook.remove()
    with pytest.raises(UsageError, match="other outputs"):  # back to the first: now those are the former ones
        evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path)


@pytest.mark.slow
def test_other_outputs_are_never_taken_from_the_cache(digits: Dataset, tmp_path: Path) -> None:
    """Nor a probe that was fitted on features of before: another folder for the results changes nothing of that."""
    model = replace(own_head(digits), head=None, classes=None)
    ce.extract(model, digits.test, device="cpu")
    assert ce.extract(model, digits.test, device="cpu").cached
    first = ce.fit_classifier(model, digits, device="cpu")
    model.backbone.register_forward_pre_hook(lambda _module, args: (args[0].flip(-1).square(),))
    found = ce.extract(model, digits.test, device="cpu").values["global"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    torch.testing.assert_close(found, model.backbone((images_and_labels(digits)[0] - mean) / std), rtol=1e-3, atol=1e-4)
    second = ce.fit_classifier(model, digits, device="cpu")
    anew = ce.fit_classifier(model, digits, device="cpu", cache=False)
    torch.testing.assert_close(second.head.weight, anew.head.weight)
    assert not torch.allclose(first.head.weight, second.head.weight)


def test_a_store_from_before_is_accepted_and_gets_the_outputs(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path / "now")
    now, before = Store(tmp_path / "now"), Store(tmp_path / "before")
    (record,), (run,) = now.records(), now.runs()
    samples = now.samples(record["key"])
    assert samples is not None
    del record["outputs"], record["samples"], run["models"][0]["outputs"]
    before.write(record["key"], record, samples.reset_index())
    before.record_run(run)
    ce.evaluate(model, digits, [CLEAN], out=before.path)
    (kept,) = before.records()
    assert "outputs" not in kept  # nothing was computed again
    assert kept["seconds"] == record["seconds"]
    model.backbone.register_forward_pre_hook(twice_as_bright)
    with pytest.raises(UsageError, match="other outputs"):
        evaluation.plan(model, digits, tasks=[CLEAN], out=before.path)


EVERY_TASK = [
    Probe(fractions=()),
    CLEAN,
    Attacks((("fgsm", "linf"),), eps={"linf": (1 / 255,)}, checked_images=0),
    Internal(sites=("prepool",), kinds=("channel",), levels=(0.5,), seeds=1),
    Crops((0.4,), (), (), ()),
    Redundancy(),
]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["backbone", "head"])
def test_one_nan_weight_is_a_failed_cell_and_no_number(where: str, digits: Dataset, tmp_path: Path) -> None:
    broken, sound = own_head(digits), replace(make_model("resnet18", stem="cifar", width=8, seed=1), name="sound")
    with torch.no_grad():
        next((broken.backbone if where == "backbone" else broken.head).parameters()).view(-1)[0] = float("nan")
    broken = replace(broken, name="broken", head_choice="own")
    run = ce.evaluate([broken, sound], digits, EVERY_TASK, out=tmp_path)
    records = Store(tmp_path).records()
    measured = {record["task"] for record in records if record["model"] == "broken"}
    assert measured == ({"probe", "redundancy"} if where == "head" else {"redundancy"})
    untrained = [r for r in records if r["model"] == "broken" and r["task"] == "redundancy" and where == "backbone"]
    assert all(record["params"]["weights"] == "untrained" for record in untrained)
    assert {record["task"] for record in records if record["model"] == "sound"} == {t.name for t in EVERY_TASK}
    assert all("broken" in line for line in run.failures)
    assert all("NaN or infin" in line for line in run.failures), run.failures


class BatchStatistics(Convolutional):
    """BatchNorm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None


class Drops(Convolutional):
    def features(self, pixels: Tensor) -> Tensor:
        return F.dropout(super().features(pixels), 0.5, training=True)


class Squeezes(Convolutional):
    """A batch of one is none."""

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3)).squeeze()


class NormalisesTheBatch(Convolutional):
    """As a BatchNorm does that is left in train mode: one value a channel has no deviation."""

    def pool(self, features: Tensor) -> Tensor:
        return F.batch_norm(features.mean((2, 3)), None, None, training=True)


@pytest.mark.parametrize("network", [Squeezes, NormalisesTheBatch])
def test_networks_that_take_no_image_alone_are_refused(
    network: type[nn.Module], digits: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"it takes no image alone.*--allow-batch-dependent"):
        ce.evaluate(own_head(digits, network()), digits, [CLEAN], out=tmp_path)


class Adapts(nn.Module):
    """Test-time adaptation: torch.fx sees no step in a call of train(), and would leave another network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        self.norm.train()
        return self.fc(self.conv(self.norm(pixels)).relu().mean((2, 3)))


def adapting() -> nn.Module:
    return wrap(Adapts())[0]


class Crowded(Convolutional):
    """Large batches only are centred on their own mean."""

    def features(self, pixels: Tensor) -> Tensor:
        return super().features(pixels if len(pixels) <= 16 else pixels - pixels.mean(0))


@pytest.mark.parametrize("network", [BatchStatistics, Drops, adapting, Crowded])
def test_batch_dependent_networks_are_refused(
    network: Callable[[], nn.Module], digits: Dataset, tmp_path: Path
) -> None:
    model = own_head(digits, network())
    for call in (
        lambda: ce.evaluate(model, digits, [CLEAN], out=tmp_path),
        lambda: ce.extract(model, digits.test, device="cpu"),
        lambda: ce.fit_classifier(model, digits, head="probe", device="cpu"),
    ):
        with pytest.raises(UsageError, match=r"differs? by [\d.e+]+ % .*--allow-batch-dependent"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "sizes"), [(BatchStatistics, (8, 20)), (Crowded, (18, 20))])
def test_a_batch_dependent_number_is_kept_with_its_batch_size(
    network: type[nn.Module], sizes: tuple[int, int], digits: Dataset, tmp_path: Path
) -> None:
    model = own_head(digits, network())
    for size in sizes:
        ce.evaluate(model, digits, [CLEAN], out=tmp_path, batch_size=size, allow_batch_dependent=True)
    found = {r["protocol"]["model"]["batch_size"]: r["measurements"][0]["value"] for r in Store(tmp_path).records()}
    assert found == {size: right_accuracy(model, digits, size) for size in sizes}
    assert ce.Run(tmp_path).table()["checkpoint"].nunique() == 2
    plain = own_head(digits)
    planned = evaluation.plan(plain, digits, tasks=[CLEAN], out=tmp_path, allow_batch_dependent=True)
    assert "batch_size" not in planned.subjects[0].model.protocol()


@pytest.mark.parametrize("arch", ["resnet18", "rf29_resnet18", "convnext_tiny", "timm:vit_tiny_patch16_224"])
def test_rounding_is_no_batch_dependence(arch: str) -> None:
    model = make_model(arch, img_size=32 if "vit" in arch else None)
    seen = observe(model, (32, 32), torch.device("cpu"))
    assert batch_dependence(seen) is None
    assert apart(seen.outputs.float().double(), seen.outputs) == 0
    assert apart(seen.outputs.roll(1, 0), seen.outputs) > 0.5


def test_batches_in_which_images_are_independent_are_no_reason_to_refuse(digits: Dataset, tmp_path: Path) -> None:
    """Nor is a network asked again, in batches as large as the run's, where nothing is left to compute."""
    model, sizes = own_head(digits, Crowded()), list[int]()
    for _ in range(2):
        assert ce.evaluate(model, digits, [CLEAN], out=tmp_path, batch_size=16).failures == ()
    plain = own_head(digits)
    ce.evaluate(plain, digits, [CLEAN], out=tmp_path)
    plain.backbone.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    assert evaluation.plan(plain, digits, tasks=[CLEAN], out=tmp_path).missing == 0
    assert max(sizes) == 8


def test_a_pivot_does_not_average_trained_and_untrained(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    run = ce.evaluate(model, digits, [Redundancy()], out=tmp_path)
    table = run.table()
    metric = table["metric"].iloc[0]
    pivot = table[table["metric"] == metric].pivot(index="model", columns="site", values="value")  # twins would raise
    by_weights = {r["params"]["weights"]: r["measurements"] for r in Store(tmp_path).records()}
    for weights, name in (("trained", model.name), ("untrained", f"{model.name}, untrained")):
        (value,) = (m["value"] for m in by_weights[weights] if m["metric"] == metric)
        assert pivot.loc[name].item() == value


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "mean", "img_size", "architecture", "limit"])
def test_networks_that_share_a_name_do_not_share_one_in_the_table(what: str, digits: Dataset, tmp_path: Path) -> None:
    model, limit = own_head(digits), 20 if what == "limit" else None
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    changed: dict[str, Any] = {
        "mean": {"preprocessing": replace(model.preprocessing, mean=(0.5,) * 3)},
        "img_size": {"preprocessing": replace(model.preprocessing, img_size=48)},
        "architecture": {"architecture": Architecture("resnet18", "solo-cifar", 8)},
    }
    other = replace(model, **changed.get(what, {}))
    if what == "weights":
        other.head.weight.data.mul_(-1)
    table = ce.evaluate(other, digits, [CLEAN], out=tmp_path, limit=limit).table()
    table = table[table["metric"] == "accuracy"]
    assert len(table) == 2
    assert table["model"].nunique() == table["checkpoint"].nunique() == 2


def test_one_location_has_no_redundancy_and_that_is_no_failure(digits: Dataset, tmp_path: Path) -> None:
    model = make_model("resnet18", width=8)  # 32 px become 1 x 1
    planned = evaluation.plan(model, digits, out=tmp_path)
    assert planned.skipped == [
        f"redundancy of {model.name}: it compares locations, and the network has one at 32 x 32 px"
    ]
    assert evaluation.plan(model, digits, tasks=["redundancy"], out=tmp_path).skipped == []


def test_the_table_of_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no finished cells in .*typo"):
        ce.Run(tmp_path / "typo").table()


@pytest.mark.parametrize("side", [32, 64])
def test_a_fixed_size_network_is_timed_as_it_is_used(side: int, digits: Dataset, tmp_path: Path) -> None:
    model = make_model("timm:vit_tiny_patch16_224", img_size=side)
    sizes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].shape[-1]))
    planned = evaluation.plan(model, digits, tasks=[Redundancy()], out=tmp_path)
    seconds = planned.seconds()
    assert seconds is not None
    assert seconds > 0
    assert set(sizes) == {side}


def test_a_fixed_size_network_is_measured_on_smaller_images_by_every_task(digits: Dataset, tmp_path: Path) -> None:
    """Digits have 32 px, the network takes 48 px alone: they are brought there, as by torch, and not cropped."""
    model = make_model("vit_d64_l1_h2_p16", img_size=48, classes=digits.classes, name="vit")
    with pytest.raises(AssertionError):
        model.backbone(torch.zeros(1, 3, 32, 32))
    run = ce.evaluate(model, digits, EVERY_TASK, out=tmp_path)
    assert run.failures == ()
    assert {record["task"] for record in Store(tmp_path).records()} == {task.name for task in EVERY_TASK}
    resized = F.interpolate(_normalised(model, digits), size=(48, 48), mode="bilinear", antialias=True)
    features = ce.extract(model, digits.test, device="cpu").values["global"]
    torch.testing.assert_close(features, model.backbone(resized), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_report_says_what_a_number_at_one_eps_is(digits: Dataset, tmp_path: Path) -> None:
    attacked = Attacks((("fgsm", "linf"), ("bim", "linf")), eps={"linf": (1 / 255, 8 / 255)}, checked_images=0)
    run = ce.evaluate(own_head(digits), digits, [attacked], out=tmp_path)
    run.report()
    report = (run.path / "report.md").read_text()
    assert "FGSM: one step, run at each eps alone" in report
    assert "BIM: smallest over this list of eps: an image broken at a smaller eps counts as broken" in report


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "local"), [("rf5_resnet18", True), ("resnet18", False)])
def test_redundancy_says_what_its_locations_see(arch: str, local: bool, digits: Dataset, tmp_path: Path) -> None:
    """Pairs whose fields overlap and pairs whose fields do not have rows of their own; the former headline stays."""
    model = make_model(arch, stem="cifar", width=8)
    ce.evaluate(model, digits, [Redundancy()], out=tmp_path)
    record = next(r for r in Store(tmp_path).records() if r["params"]["weights"] == "trained")
    found = {m["metric"]: m["value"] for m in record["measurements"]}
    assert {"normalised", "normalised_per_position"} <= found.keys()
    assert ("within_disjoint" in found) == local
    notes = " ".join(record["notes"])
    assert ("every location sees the whole image of 32 px" in notes) == (not local)
    seen = theoretical(model.backbone, 32).set_index("site").loc["prepool"]
    jump = int(seen["jump"])
    expected = _share_of_pixels_that_locations_see(5, jump, 32) if local else 1.0
    assert found["pixels_covered"] == pytest.approx(expected)
    if local:
        with torch.no_grad():
            z = model.backbone.represent(_normalised(model, digits)).local.double()
        side = math.isqrt(z.shape[1])
        u = F.normalize(z - z.mean(0), dim=-1)
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart_by = (place[:, None] - place[None]).abs().amax(-1)  # in cells, on the grid
        pairs = torch.einsum("nld,nkd->lk", u, u) / len(u)
        disjoint = apart_by * jump >= 5
        assert found["within_disjoint"] == pytest.approx(float(pairs[disjoint].mean()), abs=1e-4)


def _normalised(model: Model, digits: Dataset) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    return (images_and_labels(digits)[0] - mean) / std


def test_pixels_take_no_cells_of_the_models_after_them(digits: Dataset, tmp_path: Path) -> None:
    pixels, after = ce.load_model("pixels:8"), make_model("resnet18", stem="cifar", width=8)
    run = ce.evaluate([pixels, after], digits, [Redundancy()], out=tmp_path)
    assert run.failures == ()
    found = [(record["model"], record["params"]["weights"]) for record in Store(tmp_path).records()]
    assert sorted(found) == sorted([(pixels.name, "trained"), (after.name, "trained"), (after.name, "untrained")])


def test_a_test_split_alone_measures_what_it_allows(digits: Dataset, tmp_path: Path) -> None:
    alone, model = replace(digits, train=None), own_head(digits)
    planned = evaluation.plan(model, alone, out=tmp_path)
    assert {cell["task"] for cell in planned.cells} == {"corruptions", "attacks", "internal", "crops", "redundancy"}
    assert [line.partition(":")[0] for line in planned.skipped] == [
        f"probe of {model.name}",
        f"internal of {model.name}",  # its noise, which training images are needed for; masking is measured
    ]
    headless = evaluation.plan(model.untrained(0), alone, out=tmp_path)
    assert {cell["task"] for cell in headless.cells} == {"redundancy"}
    assert len(headless.skipped) == 5


@pytest.mark.slow
def test_python_is_told_what_the_command_line_prints(digits: Dataset, tmp_path: Path) -> None:
    save_model(own_head(digits), tmp_path / "own.safetensors")
    torch.save(make_model("resnet18", width=8).backbone.network.state_dict(), tmp_path / "plain.pth")
    with pytest.warns(CossWarning, match="ASSUMED"):
        model = ce.load_model(tmp_path / "plain.pth")
    with pytest.warns(CossWarning) as caught:
        run = ce.evaluate(model, replace(digits, train=None), [CLEAN], out=tmp_path / "out")
    said = [str(warning.message) for warning in caught]
    assert any("ASSUMED" in line for line in said)
    assert any("not done" in line and "no training split" in line for line in said)
    ours = [warning for warning in caught if warning.category is CossWarning]
    assert all(Path(warning.filename) == Path(__file__) for warning in ours)
    assert len(run.failures) == 1
    with pytest.raises(UsageError, match="no training split"):
        run.table()


def test_training_in_python_tells_what_it_left_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"a": 12, "b": 12})
    (folder / "train/a/003.png").write_bytes(b"torn")
    data = ce.load_dataset(folder, skip_bad_images=True)
    fields: dict[str, Any] = {"width": 8, "epochs": 1, "warm_up_epochs": 1.0, "batch_size": 8, "lr": 0.1}
    fields |= {"holdout": 0.0, "probe_every": 0, "precision": "fp32", "hidden": 16}
    with pytest.warns(CossWarning, match=r"1 of 24 images cannot be read and are left out: train/a/003.png") as caught:
        ce.train("simclr", data, out=tmp_path / "run", device="cpu", **fields)
    assert {Path(warning.filename) for warning in caught if warning.category is CossWarning} == {Path(__file__)}


# --- end of evaluation ------------------------------------------------------------------------------------------------

"""The sweep that computes each prefix once against full forward passes under ``corrupted``; scores on known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build_networks import build
from small_networks import FAMILIES, Untraceable, network, pixels, scramble
from torch import Tensor, nn

from coss_eval.data.batches import Batch
from coss_eval.errors import UsageError
from coss_eval.internal import KINDS, Damage, calibrate, corrupted
from coss_eval.internal.resume import resume_from, suffix
from coss_eval.internal.scores import SignalToNoise, area_under_curve, relative_accuracy
from coss_eval.internal.sweep import DamageCurve, sweep, weight_sweep
from coss_eval.models.backbone import Backbone, Site
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.models.hooks import captured

CLASSES, IMAGES = 5, (pixels(40, size=32).sigmoid() * 255).to(torch.uint8)
IDS = torch.arange(40) * 7919
LEVELS = dict.fromkeys(KINDS, (0.0, 0.3, 0.8))


def classify(backbone: Backbone, width: int | None = None) -> Classifier:
    head = nn.Linear(backbone(torch.zeros(1, 3, 32, 32)).shape[1] if width is None else width, CLASSES)
    scramble(head, 1)
    return Classifier(backbone, head, Preprocessing()).eval()


def batches(classifier: Classifier, size: int = 16) -> list[Batch]:
    """Images labelled by the network's own clean answers, every fourth one wrongly."""
    with torch.no_grad():
        labels = classifier(to_float(IMAGES)).argmax(1)
    labels = torch.where(torch.arange(40) % 4 == 0, (labels + 1) % CLASSES, labels)
    return [Batch(*parts) for parts in zip(IMAGES.split(size), labels.split(size), IDS.split(size), strict=True)]


def small(family: str) -> Classifier:
    class_token = "token" in family
    backbone = network(family)
    if class_token:  # 64 patches of a 32 px image
        backbone.positions = nn.Parameter(torch.zeros(1, 64, 12))
    return classify(backbone)


def deviations(classifier: Classifier) -> dict[str, Tensor]:
    return calibrate(classifier.backbone, [classifier.normalise(to_float(IMAGES))])


def naive(classifier: Classifier, site: str, kind: str, seed: int, **options: Any) -> Tensor:
    """Correctness (E, N) from full forward passes, one a level."""
    data = batches(classifier, 40)[0]
    rows = []
    for level in LEVELS[kind]:
        with torch.no_grad(), corrupted(classifier, site, kind, level, IDS, seed, **options):
            rows.append(classifier(to_float(data.images)).argmax(1) == data.labels)
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_equals_full_forward_passes(family: str) -> None:
    classifier = small(family)
    std = deviations(classifier)
    found = sweep(classifier, batches(classifier), levels=LEVELS, seeds=[0, 3], std=std)
    assert {site for site, _ in found} == set(classifier.backbone.sites)
    for (site, kind), result in found.items():
        assert not [note for note in result.notes if "full forward" in note]
        assert result.ids.tolist() == IDS.tolist()
        assert result.baseline.float().mean().item() == pytest.approx(0.75)
        for s, seed in enumerate((0, 3)):
            expected = naive(classifier, site, kind, seed, std=std[site])
            assert (result.correct[s] != expected).sum() <= 1, (site, kind)  # an argmax may flip on a tie
            assert torch.equal(result.correct[s, 0], result.baseline[s])  # level 0


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet18": {"stem": "cifar"},
    "resnet50": {"stem": "cifar"},
    "convnext_tiny": {},
    "swin_t": {},
    "vit_b_16": {"img_size": 32},
    "timm:vit_tiny_patch16_224": {"img_size": 32},
    "timm:resnet18": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_real_networks_go_on_from_every_site_as_the_whole_network_does(arch: str) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    backbone, _ = build(arch, **ARCHITECTURES[arch])
    backbone.eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sites = list(backbone.sites.values())
    with torch.no_grad():
        with captured(backbone, sites) as outputs:
            backbone(images)
        for site in sites:
            resume = resume_from(backbone, site, images)
            assert resume.note == ""
            with corrupted(backbone, site.name, "channel", 0.5, IDS[:2]):
                expected = backbone(images)
            found = resume.run(images, damaged(site, outputs[site.name]))
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), site.name


def damaged(site: Site, activations: Tensor) -> Tensor:
    corruption = Damage(site, "channel")
    return corruption.apply(activations, corruption.draw(activations, IDS[: len(activations)]), 0.5)


def test_a_network_that_cannot_be_traced_takes_full_passes_and_says_so() -> None:
    backbone = Untraceable()
    scramble(backbone, 0)
    classifier = classify(backbone.eval())
    found = sweep(classifier, batches(classifier), kinds=["channel"], levels=LEVELS, seeds=[0])
    for (site, kind), result in found.items():
        assert [note for note in result.notes if "full forward passes" in note] or site in ("prepool", "global")
        assert (result.correct[0] != naive(classifier, site, kind, 0)).sum() <= 1


class Bypass(Backbone):
    """A connection around the first stage: what follows needs more than the stage's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def stage_sites(self) -> tuple[Site, ...]:
        return Site("stage1", "first", "nchw"), Site("stage2", "second", "nchw")

    def features(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.second(torch.relu_(x)) + images.mean((1, 2, 3), keepdim=True)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


def test_a_connection_around_the_site_takes_full_passes() -> None:
    backbone = Bypass().eval()
    with pytest.raises(ValueError, match="needs more than first"):
        suffix(backbone, backbone.sites["stage1"])
    assert "needs more than first" in resume_from(backbone, backbone.sites["stage1"], torch.randn(2, 3, 8, 8)).note
    classifier = classify(backbone)
    found = sweep(classifier, batches(classifier), kinds=["channel"], levels=LEVELS, seeds=[0])
    for (site, kind), result in found.items():  # the in-place ReLU must not spoil the kept activations either
        assert (result.correct[0] != naive(classifier, site, kind, 0)).sum() <= 1


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_changes_no_verdict(size: int) -> None:
    classifier = small("cnn")
    expected = sweep(classifier, batches(classifier, 40), kinds=["element", "location"], levels=LEVELS, seeds=[0])
    found = sweep(classifier, batches(classifier, size), kinds=["element", "location"], levels=LEVELS, seeds=[0])
    for key, result in found.items():
        assert (result.correct != expected[key].correct).sum() <= 1
        assert torch.allclose(result.snr, expected[key].snr, rtol=1e-4)


def test_a_class_map_restricts_the_logits() -> None:
    classifier = small("cnn")
    wide = Classifier(
        classifier.backbone, nn.Linear(16, 9), Preprocessing(), class_map=torch.tensor([8, 2, 4, 6, 1])
    ).eval()
    found = sweep(wide, batches(wide), ["stage2"], ["channel"], levels=LEVELS, seeds=[0])
    assert (found["stage2", "channel"].correct[0] != naive(wide, "stage2", "channel", 0)).sum() <= 1


def test_more_damage_means_more_noise_and_seeds_differ() -> None:
    classifier = small("cnn")
    levels = {"channel": (0.0, 0.1, 0.5, 0.9)}
    result = sweep(classifier, batches(classifier), ["stage1"], ["channel"], levels=levels)["stage1", "channel"]
    assert result.seeds == (0, 1, 2, 3, 4)
    assert result.snr[:, 0].isposinf().all()
    assert (result.snr.diff(dim=1) < 0).all()
    assert len(result.snr[:, 2].unique()) == 5
    table = result.table(chance=0.2)
    assert list(table.columns) == ["site", "kind", "level", "seed", "n", "accuracy", "relative_accuracy", "snr_db"]
    assert len(table) == 20
    assert (table.loc[table["level"] == 0, "relative_accuracy"] == 1).all()


def test_matched_locations_change_the_baseline() -> None:
    classifier = small("cnn")  # 64 locations before pooling
    one: Callable[..., DamageCurve] = lambda **options: sweep(  # noqa: E731
        classifier, batches(classifier), ["prepool"], ["noise"], std=deviations(classifier), **options
    )["prepool", "noise"]
    free, matched = one(), one(match_locations=4)
    assert not torch.equal(matched.baseline, free.baseline)
    assert (free.snr > matched.snr + 3).all()  # noise averages out over 64 locations better than over 4


def test_damage_that_nothing_reads_is_reported() -> None:
    """The patches of a class-token network, before pooling."""
    classifier = small("class token")
    found = sweep(classifier, batches(classifier), ["prepool"], ["location"], levels=LEVELS, seeds=[0])
    assert any("changes nothing" in note for note in found["prepool", "location"].notes)


@pytest.mark.parametrize("kind", [name for name, each in KINDS.items() if each.weights])
def test_weights_swept_equal_full_forward_passes_and_stay(kind: str) -> None:
    classifier = small("cnn")
    before = [p.detach().clone() for p in classifier.parameters()]
    found = weight_sweep(classifier, lambda: batches(classifier), kind, levels=LEVELS[kind], seeds=[0, 3])
    assert found.ids.tolist() == IDS.tolist()
    for s, seed in enumerate((0, 3)):
        expected = naive(classifier, "network", kind, seed)
        assert (found.correct[s] != expected).sum() <= 1
        assert torch.equal(found.correct[s, 0], found.baseline[s])
    assert (found.snr.diff(dim=1) < 0).all()
    assert torch.equal(found.snr[0], found.snr[1]) == KINDS[kind].grid  # nothing is drawn for a grid
    assert all(torch.equal(p, was) for p, was in zip(classifier.parameters(), before, strict=True))
    with pytest.raises(UsageError, match="weight-noise, weight-quantised"):
        weight_sweep(classifier, lambda: batches(classifier), "channel")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown site": ({"sites": ["layer9"]}, "no site 'layer9'"),
    "unknown kind": ({"kinds": ["chanel"]}, "did you mean channel"),
    "noise without calibration": ({"kinds": ["noise"]}, "pass std=calibrate"),
    "location of a vector": ({"sites": ["global"], "kinds": ["location"]}, "needs a site with locations"),
    "level": ({"kinds": ["channel"], "levels": {"channel": [0.1, 1.5]}}, r"in \[0, 1\), but got 1.5"),
    "no level": ({"kinds": ["channel"], "levels": {}}, "at least one level"),
    "no seed": ({"kinds": ["channel"], "seeds": []}, "at least one seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_one_line(name: str) -> None:
    options, message = REFUSED[name]
    classifier = small("cnn")
    with pytest.raises(UsageError, match=message) as caught:
        sweep(classifier, batches(classifier), **options)
    assert "\n" not in str(caught.value)


def test_train_mode_and_no_images_are_refused() -> None:
    classifier = small("cnn")
    with pytest.raises(UsageError, match="at least one batch"):
        sweep(classifier, [], kinds=["channel"])
    with pytest.raises(UsageError, match="eval mode"):
        sweep(classifier.train(), [], kinds=["channel"])


def test_relative_accuracy_is_one_when_clean_and_zero_at_chance() -> None:
    assert relative_accuracy(0.8, 0.8, 0.1, 1000) == 1
    assert relative_accuracy(0.1, 0.8, 0.1, 1000) == 0
    assert relative_accuracy(0.45, 0.8, 0.1, 1000) == pytest.approx(0.5)
    assert math.isnan(relative_accuracy(0.1, 0.1, 0.1, 1000))


@pytest.mark.parametrize(
    ("levels", "values", "area"),
    [
        ((0.5, 1.0), (1.0, 1.0), 1.0),
        ((0.5, 1.0), (0.5, 0.0), 0.5),
        ((1.0, 4.0), (0.0, 0.0), 0.125),  # falls from 1 at level 0 to 0 at level 1, of 4
        ((0.0, 1.0), (0.5, 0.5), 0.5),
    ],
)
def test_area_is_the_mean_height_from_level_zero(levels: tuple[float], values: tuple[float], area: float) -> None:
    assert area_under_curve(levels, values) == pytest.approx(area)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_signal_to_noise_of_known_noise(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = 3 * torch.randn(1000, 16, generator=generator) + 100
    damaged = clean + 0.3 * torch.randn(1000, 16, generator=generator)
    ratio = SignalToNoise()
    for a, b in zip(clean.split(size), damaged.split(size), strict=True):
        ratio.add(a, b)
    assert ratio.decibel() == pytest.approx(20, abs=0.3)  # amplitudes 10 : 1
    same = SignalToNoise()
    same.add(clean, clean)
    assert math.isinf(same.decibel())

"""Numbers that once meant something else than they say, each against a few independent lines."""

from __future__ import annotations

# ------------------------------------------------------------------------------------------------- measures: begin
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import network as small_network
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.errors import CossError
from coss_eval.models.receptive_field import effective, fields, location_fields, theoretical
from coss_eval.models.zoo import build
from coss_eval.probes.linear import fit_probe
from coss_eval.redundancy import measure, spectrum
from coss_eval.reports.results import Estimate, Results, area, kept
from coss_eval.store import Cell, Measurement, Store


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
    assert attacks.bim(Bump(), images, labels, levels).robust_accuracy == [1.0, 0.0, 0.0]  # swept


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

    return Estimate(float(verdicts.mean()), None, None, len(verdicts), pd.Series(verdicts.astype(float)), "f")


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

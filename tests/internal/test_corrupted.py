"""Damage inside real small networks: identities, masks, counts, reproducibility, and hooks that never stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import FAMILIES, network, pixels
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.internal import DEFAULT_LEVELS, KINDS, Damage, calibrate, check_level, corrupted
from coss_eval.internal.damage import to_grid
from coss_eval.internal.hooks import WeightDamage
from coss_eval.models.backbone import Backbone, Site, as_locations

IDS = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
IMAGES = pixels(64)
AT_SITES = [name for name, kind in KINDS.items() if not kind.weights]
DRAWN = [name for name in AT_SITES if not KINDS[name].grid]
OF_WEIGHTS = [name for name, kind in KINDS.items() if kind.weights]
SITE_KINDS = [
    (site, kind)
    for site in ("stage1", "stage2", "prepool", "global")
    for kind in AT_SITES
    if (site, kind) != ("global", "location")
]


def run(
    backbone: Backbone, site: str, kind: str, level: float, size: int = 64, seed: int = 0, **options: Any
) -> Tensor:
    """Global representations of all images under corruption, in batches of ``size``."""
    options |= {"std": calibrate(backbone, [IMAGES], [site])[site]} if kind.startswith("noise") else {}
    with torch.no_grad(), corrupted(backbone, site, kind, level, IDS[:size], seed, **options) as images:
        outputs = []
        for batch, ids in zip(IMAGES.split(size), IDS.split(size), strict=True):
            images.ids = ids
            outputs.append(backbone(batch))
    return torch.cat(outputs)


def activations(kind: str, site: Site, level: float, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """Random positive activations and the same after damage."""
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    corruption = Damage(site, kind, **options)
    return clean, corruption.apply(clean, corruption.draw(clean, IDS[: len(clean)]), level)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("site", "kind"), SITE_KINDS)
def test_level_zero_is_the_identity_and_damage_is_damage(family: str, site: str, kind: str) -> None:
    backbone = network(family)
    with torch.no_grad():
        clean = backbone(IMAGES)
    assert torch.equal(run(backbone, site, kind, 0.0), clean)
    changed = not torch.allclose(run(backbone, site, kind, 0.5), clean, atol=1e-3)
    # a class token is no location: nothing reads the patches after the last block
    unread = family == "class token" and kind == "location" and site in ("stage2", "prepool")
    assert changed != unread


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", AT_SITES)
def test_batch_size_changes_nothing(family: str, kind: str) -> None:
    backbone = network(family)
    whole = run(backbone, "prepool", kind, 0.5)
    for size in (1, 7):
        parts = run(backbone, "prepool", kind, 0.5, size)
        assert torch.allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("kind", DRAWN)
def test_draws_belong_to_seed_image_site_and_kind(kind: str) -> None:
    shape, std = (6, 4, 4), torch.ones(6)

    def draw(name: str = "stage1", seed: int = 0, ids: Tensor = IDS) -> Tensor:
        site = Site(name, name, "nchw")
        return Damage(site, kind, seed, std).draw(torch.zeros(len(ids), *shape), ids).values

    for size in (1, 7):
        assert all(
            torch.equal(draw(ids=ids), part) for ids, part in zip(IDS.split(size), split(draw(), size), strict=True)
        )
    assert not torch.equal(draw(), draw(seed=1))
    assert not torch.equal(draw(), draw("stage2"))
    if kind != "ablation":
        assert torch.equal(draw(ids=IDS.flip(0)), draw().flip(0))
        assert len(draw().flatten(1).unique(dim=0)) == 64  # every image has its own


def split(values: Tensor, size: int) -> list[Tensor]:
    """A draw cut like the ids; the ablation's is one for all images."""
    return list(values.split(size)) if len(values) == 64 else [values] * -(-64 // size)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nlc"])
@pytest.mark.parametrize("kind", ["element", "channel", "location", "ablation"])
def test_masks_zero_the_right_share_in_the_right_pattern_and_are_nested(layout: Any, kind: str) -> None:
    shape = {"nchw": (64, 30, 4, 5), "nhwc": (64, 4, 5, 30), "nlc": (64, 21, 30)}[layout]
    site = Site("stage1", "x", layout, prefix_tokens=int(layout == "nlc"))
    before = torch.ones(64, 20, 30, dtype=torch.bool)
    for level in (0.0, 0.2, 0.5, 0.9):
        clean, damaged = activations(kind, site, level, shape)
        kept = as_locations(damaged, layout, site.prefix_tokens) != 0  # (B, L, C)
        assert torch.equal(damaged[damaged != 0], clean[damaged != 0])  # kept values are untouched
        assert (kept <= before).all()  # what a lower level masks stays masked
        before = kept
        floor = 1 / 20 if kind == "location" else 0.0
        assert kept.float().mean().item() == pytest.approx(max(1 - level, floor), abs=0.04)
        if kind in ("channel", "ablation"):
            assert torch.equal(kept, kept[:, :1].expand_as(kept))
        if kind == "location":
            assert torch.equal(kept, kept[..., :1].expand_as(kept))
            assert kept[..., 0].any(1).all()  # at least one location is kept
        if kind == "ablation":
            assert torch.equal(kept, kept[:1].expand_as(kept))
            assert (~kept[0, 0]).sum() == round(level * 30)
        if layout == "nlc" and kind == "location":
            assert torch.equal(damaged[:, 0], clean[:, 0])  # the class token stays whole


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_rescale_divides_by_what_is_kept(kind: str) -> None:
    clean, damaged = activations(kind, Site("stage1", "x", "nchw"), 0.75, (16, 8, 4, 4), rescale=True)
    kept = damaged != 0
    assert torch.allclose(damaged[kept], 4 * clean[kept])


@pytest.mark.parametrize("family", ["cnn", "cnn+mlp", "nhwc", "mean tokens"])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.999])
def test_location_masking_before_pooling_pools_over_the_kept(family: str, level: float) -> None:
    backbone = network(family)
    site = backbone.sites["prepool"]
    with torch.no_grad():
        features = backbone.features(IMAGES)
    draw = Damage(site, "location").draw(features, IDS)
    local = as_locations(features, site.layout, site.prefix_tokens)
    kept = draw.values >= level  # (B, L)
    mean = torch.stack([image[mask].mean(0) for image, mask in zip(local, kept, strict=True)])
    expected = backbone.mlp(mean) if family == "cnn+mlp" else mean  # type: ignore[operator]
    assert torch.allclose(run(backbone, "prepool", "location", level), expected, atol=1e-5)
    assert (kept.sum(1) == 1).any() or level < 0.9


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nlc"])
def test_noise_has_the_stated_size_and_its_control_is_shared(layout: Any) -> None:
    shape = {"nchw": (64, 8, 5, 5), "nhwc": (64, 5, 5, 8), "nlc": (64, 25, 8)}[layout]
    site, std = Site("stage1", "x", layout), torch.arange(1, 9.0)
    for kind in ("noise", "noise-shared"):
        clean, damaged = activations(kind, site, 0.5, shape, std=std)
        noise = as_locations(damaged - clean, layout)  # (B, L, C)
        assert torch.allclose(noise.flatten(0, 1).std(0) / std, torch.tensor(0.5), rtol=0.25)
        assert (noise.std(1).mean() < 1e-4) == (kind == "noise-shared")
        # under mean pooling the independent noise shrinks by the root of L = 25, its control does not
        pooled = (noise.mean(1) / std).std().item()
        assert pooled == pytest.approx(0.5 if kind == "noise-shared" else 0.1, rel=0.25)
        twice = activations(kind, site, 1.0, shape, std=std)[1] - clean
        assert torch.allclose(twice, 2 * (damaged - clean), atol=1e-4)  # the same noise, only larger


@pytest.mark.parametrize("kind", AT_SITES)
def test_matched_locations_pool_over_exactly_that_many(kind: str) -> None:
    site = Site("prepool", "x", "nchw")
    for level in (0.0, 0.5):
        clean, damaged = activations(kind, site, level, (32, 6, 4, 4), std=torch.ones(6), match_locations=5)
        used = (as_locations(damaged, "nchw") != 0).any(-1).sum(1)
        assert (used == 5).all() if level == 0 or KINDS[kind].noise else (used <= 5).all()
        if level == 0:
            kept = damaged != 0
            assert torch.allclose(damaged[kept], clean[kept] * 16 / 5)


def test_calibration_is_the_deviation_over_images_and_locations() -> None:
    for family in FAMILIES:
        backbone = network(family)
        for name, std in calibrate(backbone, IMAGES.split(9)).items():
            site, outputs = backbone.sites[name], []
            hook = backbone.get_submodule(site.module).register_forward_hook(lambda *a, keep=outputs: keep.append(a[2]))
            with torch.no_grad():
                backbone(IMAGES)
            hook.remove()
            rows = as_locations(outputs[0], site.layout, site.prefix_tokens).flatten(0, 1)
            assert torch.allclose(std, rows.std(0, correction=0), atol=1e-5), (family, name)


def hooks(backbone: Backbone) -> int:
    return sum(len(module._forward_hooks) for module in backbone.modules())


@pytest.mark.parametrize("site", ["stage1", "prepool", "global"])
def test_hooks_are_removed_also_on_error(site: str) -> None:
    backbone = network("cnn")
    with corrupted(backbone, site, "channel", 0.5, IDS):
        assert hooks(backbone) == 1
    assert hooks(backbone) == 0
    with pytest.raises(UsageError, match="64 ids for 3 images"), corrupted(backbone, site, "channel", 0.5, IDS):
        backbone(IMAGES[:3])
    with pytest.raises(KeyError), corrupted(backbone, site, "channel", 0.5, IDS):
        raise KeyError
    with pytest.raises(RuntimeError):
        calibrate(backbone, [torch.zeros(2, 5, 16, 16)])
    assert hooks(backbone) == 0


def test_gradients_pass_through() -> None:
    """Damage is part of the graph: an attack on a damaged network sees it."""
    backbone, images = network("cnn"), IMAGES.clone().requires_grad_()
    with corrupted(backbone, "stage1", "channel", 0.5, IDS):
        (gradient,) = torch.autograd.grad(backbone(images).sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [0.0, 1.0, -3.0, 10.0])
def test_the_grid_is_that_of_affine_quantisation(bits: int, shift: float) -> None:
    """torch's own, with the scale and the zero point of each row's range, 0 in it."""
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(bits)) + shift
    found = to_grid(x, 1 / (2**bits - 1))
    for row, mine in zip(x, found, strict=True):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        expected = torch.fake_quantize_per_tensor_affine(row, scale, round(-low / scale), 0, 2**bits - 1)
        assert torch.isclose(mine, expected, atol=1e-5).float().mean() > 0.95  # halves may be rounded either way
        assert (mine - expected).abs().max() < 1.001 * scale
        assert len(mine.unique()) <= 2**bits
        assert (mine - row).abs().max() < 1.01 * scale  # the zero point is rounded, too
    assert torch.equal(to_grid(torch.zeros(2, 3), 1 / 3), torch.zeros(2, 3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OF_WEIGHTS)
def test_weights_are_damaged_while_open_and_the_very_same_afterwards(family: str, kind: str) -> None:
    backbone = network(family)
    own = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in backbone.named_parameters()}
    clean = run(backbone, "stage1", "channel", 0.0)

    def is_as_it_was() -> bool:
        kept = dict(backbone.named_parameters())
        same = all(kept[name] is p and p.data_ptr() == at and torch.equal(p, was) for name, (p, at, was) in own.items())
        return same and torch.equal(run(backbone, "stage1", "channel", 0.0), clean)

    with torch.no_grad(), corrupted(backbone, "network", kind, 0.2, seed=3):
        changed = {name for name, (p, _, was) in own.items() if not torch.equal(p, was)}
        damaged = backbone(IMAGES)
    assert is_as_it_was()
    assert not torch.allclose(damaged, clean, atol=1e-3)
    matrices = {name for name, (p, _, _) in own.items() if sum(side > 1 for side in p.shape) > 1}
    assert {name for name in matrices if own[name][2].any()} == changed  # positions may be all zero
    assert any(name not in matrices for name in own)
    with pytest.raises(KeyError), corrupted(backbone, "network", kind, 0.2):
        raise KeyError
    assert is_as_it_was()
    with torch.inference_mode(), corrupted(backbone, "network", kind, 0.0):
        assert torch.equal(backbone(IMAGES), clean)
    assert is_as_it_was()


def test_weights_come_back_where_the_network_is_now() -> None:
    """Whatever runs inside may move the network; half of it must not be left behind."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    own = {name: p.detach().clone().double() for name, p in network.named_parameters()}
    with WeightDamage(network, "weight-noise", 0).at(0.5):
        network.double()
    assert all(torch.equal(p, own[name]) for name, p in network.named_parameters())


def test_weight_noise_has_the_stated_size_and_belongs_to_the_seed_and_the_tensor() -> None:
    backbone = network("cnn")
    weights = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.dim() == 4}

    def noise(level: float, seed: int = 0) -> dict[str, Tensor]:
        with corrupted(backbone, "network", "weight-noise", level, seed=seed):
            return {name: p.detach() - weights[name] for name, p in backbone.named_parameters() if name in weights}

    half, whole, other = noise(0.5), noise(1.0), noise(0.5, seed=1)
    for name, weight in weights.items():
        assert float(half[name].std() / weight.std()) == pytest.approx(0.5, rel=0.35 if weight.numel() < 300 else 0.1)
        assert torch.allclose(whole[name], 2 * half[name], atol=1e-6)
        assert not torch.allclose(half[name], other[name], atol=1e-3)
    ours = [half[name].flatten()[:90] for name in list(weights)[:3]]
    assert abs(float(torch.corrcoef(torch.stack(ours))[0, 1])) < 0.4


def bad(site: str = "stage1", kind: str = "channel", level: float = 0.5, **options: Any) -> Callable[[], None]:
    def call() -> None:
        backbone = network("cnn")
        with corrupted(backbone, site, kind, level, IDS, **options):
            backbone(IMAGES)

    return call


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "unknown site": (bad("layer3"), "no site 'layer3' in this network; it has stage1, stage2, prepool, global"),
    "unknown kind": (bad(kind="chanel"), "did you mean channel"),
    "negative level": (bad(level=-0.1), r"channel takes a level in \[0, 1\), but got -0.1"),
    "everything masked": (bad(level=1.0), r"in \[0, 1\), but got 1.0"),
    "ablation above all": (bad(kind="ablation", level=1.1), r"in \[0, 1\], but got 1.1"),
    "endless noise": (bad(kind="noise", level=float("inf"), std=torch.ones(12)), r"in \[0, inf\)"),
    "level that is no number": (bad(level=float("nan")), "but got nan"),
    "noise without calibration": (bad(kind="noise"), r"pass std=calibrate\(...\)\['stage1'\]"),
    "noise of another width": (bad(kind="noise", std=torch.ones(5)), "12 channels, but got 5"),
    "location of a vector": (bad("global", "location"), "needs a site with locations"),
    "weights at a site": (bad(kind="weight-noise"), "its site is 'network'"),
    "a grid of one point": (bad(kind="quantised", level=1.5), r"quantised takes a level in \[0, 1\], but got 1.5"),
    "matching elsewhere": (bad(match_locations=4), "expected site 'prepool'"),
    "matching too many": (bad("prepool", match_locations=17), "1 to 16 locations"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_kind_has_default_levels_within_its_range() -> None:
    assert set(DEFAULT_LEVELS) == set(KINDS)
    for kind, levels in DEFAULT_LEVELS.items():
        for level in levels:
            check_level(kind, level)

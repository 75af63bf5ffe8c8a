"""Every redundancy formula against a naive double loop, on constructed data, and its invariances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.redundancy import centring, locality, measurement, moments, similarity, spectrum

Data = tuple[Tensor, Tensor]


def data(n: int = 23, grid: tuple[int, int] = (3, 4), dim: int = 6, global_dim: int = 6, seed: int = 0) -> Data:
    """Locals (N, H, W, D) that share part of their image's vector, and a global that is no plain mean; float64."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    local = 2 * randn(n, 1, 1, dim) + randn(n, *grid, dim) + 3 * randn(dim)
    return local, torch.tanh(local.mean((1, 2)) @ randn(dim, global_dim))


def collect(local: Tensor, global_: Tensor | None = None, batch: int = 5, border: int = 0) -> moments.Moments:
    global_ = local.flatten(1, -2).mean(1) if global_ is None else global_
    return moments.collect(zip(local.split(batch), global_.split(batch), strict=True), as_it_is, border)


def as_it_is(pair: Data) -> Data:
    return pair


def metrics(m: moments.Moments) -> dict[str, float]:
    values = {name: estimate.value for name, estimate in similarity.estimates(m).items()}
    values |= {f"distance {d}": estimate.value for d, estimate in locality.by_distance(m).items()}
    return values | {name: estimate.value for name, estimate in spectrum.spectra(m.covariances).items()}


def naive(local: Tensor, global_: Tensor) -> dict[str, float]:
    """The definitions, loop by loop, in NumPy."""
    z = local.flatten(1, -2).numpy()
    n, locations, dim = z.shape
    x = z - z.mean((0, 1))
    u = x / np.linalg.norm(x, axis=-1, keepdims=True)
    g = global_.numpy() - global_.numpy().mean(0)
    inside = [u[i, a] @ u[i, b] for i in range(n) for a in range(locations) for b in range(locations) if a != b]
    outside = [np.mean(u[i] @ u[j].T) for i in range(n) for j in range(n) if i != j]
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    rows = {
        "within": np.mean(inside),
        "between": np.mean(outside),
        "normalised": (np.mean(inside) - np.mean(outside)) / (1 - np.mean(outside)),
        "r2": np.trace(np.cov(x.mean(1).T, bias=True)) / np.trace(np.cov(x.reshape(-1, dim).T, bias=True)),
        "local_global_leave_one_out": np.mean(
            [cos(u[i, a], u[i].sum(0) - u[i, a]) for i in range(n) for a in range(locations)]
        ),
        "local_global": np.mean([cos(x[i, a], g[i]) for i in range(n) for a in range(locations)]),
    }
    msb = locations * ((x.mean(1)) ** 2).sum() / (n - 1)
    msw = ((x - x.mean(1, keepdims=True)) ** 2).sum() / (n * (locations - 1))
    rows["icc"] = (msb - msw) / (msb + (locations - 1) * msw)
    height, width = local.shape[1:3]
    places = [(r, c) for r in range(height) for c in range(width)]
    for distance in range(1, max(height, width)):
        rows[f"distance {distance}"] = np.mean(
            [
                u[i, a] @ u[i, b]
                for i in range(n)
                for a, (ra, ca) in enumerate(places)
                for b, (rb, cb) in enumerate(places)
                if max(abs(ra - rb), abs(ca - cb)) == distance
            ]
        )
    s = {
        "between": np.cov(x.mean(1).T, bias=True),
        "within": np.mean([np.cov(x[i].T, bias=True) for i in range(n)], axis=0),
        "total": np.cov(x.reshape(-1, dim).T, bias=True),
    }
    matrices = {"between": x.mean(1), "within": x - x.mean(1, keepdims=True), "total": x}
    for name, covariance in s.items():
        rows[f"participation_ratio_{name}"] = np.trace(covariance) ** 2 / (covariance**2).sum()
        rows[f"effective_rank_{name}"] = rank(np.linalg.svd(matrices[name].reshape(-1, dim), compute_uv=False))
    rows["rankme_global"] = rank(np.linalg.svd(global_.numpy(), compute_uv=False))
    lidar = np.linalg.inv(s["within"] + 1e-4 * np.eye(dim)) @ s["between"]
    rows["lidar"] = rank(np.linalg.eigvals(lidar).real)
    paired = np.repeat(g, locations, axis=0)  # each location beside its image's global
    flat = x.reshape(-1, dim)
    norms = np.linalg.norm(flat.T @ flat) * np.linalg.norm(paired.T @ paired)
    rows["local_global_cka"] = np.linalg.norm(paired.T @ flat) ** 2 / norms
    return {name: float(value) for name, value in rows.items()}


def rank(sigma: np.ndarray) -> float:
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 4)])
def test_every_metric_equals_its_naive_reference(grid: tuple[int, int]) -> None:
    local, global_ = data(grid=grid)
    fast, slow = metrics(collect(local, global_)), naive(local, global_)
    assert set(fast) - set(slow) == {"gaussian_mutual_information"}  # has tests of its own
    for name, value in slow.items():
        precision = 1e-7 if "rank" in name else 1e-9  # small singular values lose digits in a second moment
        assert fast[name] == pytest.approx(value, abs=precision, rel=precision), name


def per_position(m: moments.Moments) -> dict[str, float]:
    return {name: estimate.value for name, estimate in similarity.estimates_per_position(m).items()}


def padded(local: Tensor, size: float = 5.0) -> Tensor:
    """The locals with a vector of its own added at every place, as zero padding adds one."""
    place = torch.randn(local.shape[1:], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return local + size * place


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 4)])
def test_centring_per_position_is_the_same_formulas_on_locals_without_their_place(grid: tuple[int, int]) -> None:
    """Every identity holds: the metrics of z - mu_l by the double loop, whose own single mean is zero then."""
    local, global_ = data(grid=grid)
    places = local.mean(0, keepdim=True)
    slow, found = naive(local - places, global_), per_position(m := collect(padded(local), global_))
    for name in ("within", "between", "normalised", "r2", "icc", "local_global_leave_one_out"):
        assert found[f"{name}_per_position"] == pytest.approx(slow[name], abs=1e-9, rel=1e-9), name
    for distance, estimate in locality.by_distance(m.per_position).items():
        assert estimate.value == pytest.approx(slow[f"distance {distance}"], abs=1e-9)


@pytest.mark.parametrize(("grid", "border"), [((5, 6), 1), ((5, 6), 2), ((4, 4), 1)])
def test_the_interior_is_the_same_formulas_without_the_border(grid: tuple[int, int], border: int) -> None:
    local, global_ = data(grid=grid)
    found = per_position(collect(padded(local), global_, border=border))
    inner = (local - local.mean(0))[:, border:-border, border:-border]
    slow = naive(inner, global_)
    for name in ("within", "between", "normalised"):
        assert found[f"{name}_interior"] == pytest.approx(slow[name], abs=1e-9, rel=1e-9), name


@pytest.mark.parametrize(("grid", "border"), [((2, 2), 1), ((3, 3), 1), ((5, 5), 0), ((1, 9), 1), ((6, 6), 3)])
def test_no_interior_where_no_two_locations_remain(grid: tuple[int, int], border: int) -> None:
    local, global_ = data(grid=grid)
    found = collect(local, global_, border=border)
    assert found.interior is None
    assert not any("interior" in name for name in per_position(found))


def test_a_mark_of_each_place_moves_the_plain_metrics_only() -> None:
    """What padding does: one mean of all places takes it for variance within images; a mean for each does not."""
    local, global_ = data(n=200, grid=(4, 4))
    plain, marked = collect(local, global_), collect(padded(local), global_)
    assert per_position(marked) == pytest.approx(per_position(plain), abs=1e-9)
    assert metrics(marked)["normalised"] < metrics(plain)["normalised"] - 0.2
    x = padded(local).flatten(1, 2)
    x = x - x.mean((0, 1))
    expected = float(x.mean(0).square().sum() / 16 / x.square().sum(-1).mean())
    assert marked.position_share == pytest.approx(expected, rel=1e-9)
    assert marked.position_share > 0.5 > 0.05 > plain.position_share


@pytest.mark.parametrize("delta", [1e-4, 0.3])
def test_lidars_delta_is_absolute(delta: float) -> None:
    local, global_ = data()
    m = collect(1e-2 * local, global_)
    values, vectors = np.linalg.eigh(m.covariances.within.numpy() + delta * np.eye(6))
    half = vectors / values**0.5 @ vectors.T  # (S_W + d I)^-1/2
    expected = rank(np.linalg.eigvalsh(half @ m.covariances.between.numpy() @ half))
    assert spectrum.lidar(m.covariances.between, m.covariances.within, delta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_nothing(batch: int) -> None:
    local, global_ = data(n=41)
    expected, found = metrics(collect(local, global_, 10)), metrics(collect(local, global_, batch))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    intervals = [similarity.estimates(collect(local, global_, size)) for size in (10, batch)]
    for name, estimate in intervals[0].items():
        assert intervals[1][name] == pytest.approx(estimate, rel=1e-9, abs=1e-9)


FIRST = 7  # images that give the means


@pytest.mark.parametrize("batch", [3, 41])
@pytest.mark.parametrize("held", [0, 1 << 28])
def test_the_means_are_those_of_the_first_images(batch: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream longer than the calibration subset, whether its representations were kept or are made anew."""
    monkeypatch.setattr(centring, "CALIBRATION_IMAGES", FIRST)
    monkeypatch.setattr(centring, "_HELD", held)
    monkeypatch.setattr(spectrum, "IMAGES", 20)
    local, global_ = data(n=41)
    m = collect(local, global_, batch)
    found, first = metrics(m), naive(local[:20], global_[:20])
    for name in spectrum.METRICS.keys() & first.keys():
        assert found[name] == pytest.approx(first[name], rel=1e-7), name
    whole = naive(local, global_)  # what is no cosine does not depend on the mean that was taken off first
    assert [found["r2"], found["icc"]] == pytest.approx([whole["r2"], whole["icc"]], rel=1e-9)
    for name, x in (("", local - local[:FIRST].mean((0, 1, 2))), ("_per_position", local - local[:FIRST].mean(0))):
        u = torch.nn.functional.normalize(x.flatten(1, 2), dim=-1)
        cosines = torch.einsum("nld,mkd->nmlk", u, u)
        same = torch.eye(41, dtype=torch.bool)
        estimates = similarity.estimates(m) | similarity.estimates_per_position(m)
        inside = (float(cosines[same].sum()) - 41 * 12) / (41 * 12 * 11)
        assert estimates[f"within{name}"].value == pytest.approx(inside, rel=1e-9, abs=1e-12)
        assert estimates[f"between{name}"].value == pytest.approx(float(cosines[~same].mean()), rel=1e-9, abs=1e-12)


def test_representations_are_made_once_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centring, "CALIBRATION_IMAGES", 12)
    made = []
    for held, again in ((1 << 28, 0), (0, 3)):
        monkeypatch.setattr(centring, "_HELD", held)
        made.clear()
        local, global_ = data()
        pairs = zip(local.split(5), global_.split(5), strict=True)
        moments.collect(pairs, lambda pair: made.append(len(pair[0])) or pair)
        assert len(made) == 5 + again  # the three batches that hold the first 12 images come twice


def test_each_image_has_its_own_numbers_whose_mean_is_the_metric() -> None:
    local, global_ = data(grid=(5, 6))
    m = collect(local, global_, border=1)
    each, rows = measurement.each_image(m, (3, 1)), measurement.table(m, (3, 1)).set_index("metric")["value"]
    assert {"within_per_position", "normalised_interior", "within_disjoint", "r2_per_position"} <= each.keys()
    for name, values in each.items():
        assert values.shape == (23,)
        assert float(values.mean()) == pytest.approx(rows[name], rel=1e-9, abs=1e-12), name
    u = torch.nn.functional.normalize((local - local.mean(0))[4].flatten(0, 1), dim=-1)
    expected = (float((u @ u.T).sum()) - 30) / (30 * 29)
    assert float(each["within_per_position"][4]) == pytest.approx(expected, rel=1e-9)


def test_large_grids_have_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    local, global_ = data(grid=(5, 3))
    pairwise = collect(local, global_).sums.by_distance
    monkeypatch.setattr(moments, "_PAIRWISE", 0)
    assert torch.allclose(collect(local, global_).sums.by_distance, pairwise, atol=1e-9)


def test_rank_matched_rows_are_cosines_of_the_first_components() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    shared = torch.randn(60, 1, 1, 24, generator=generator, dtype=torch.float64)
    local = (shared + torch.randn(60, 3, 3, 24, generator=generator, dtype=torch.float64)) @ mix
    m = collect(local)
    x = (local - local.mean(0)).flatten(1, 2)
    _, _, right = np.linalg.svd(x.reshape(-1, 24).numpy(), full_matrices=False)
    white = x.numpy() @ right[:16].T
    white /= white.reshape(-1, 16).std(0)
    control = torch.tensor(white)
    expected = naive(control[:, None], control[:, 0])["within"]
    assert per_position(m)["within_rank_matched"] == pytest.approx(expected, rel=1e-6)
    sixteen = shared[..., :16] + torch.randn(60, 3, 3, 16, generator=generator, dtype=torch.float64)
    spread, flat = per_position(collect(sixteen)), per_position(collect(sixteen @ mix[:16, :16] ** 3))  # another rank
    assert flat["normalised_rank_matched"] == pytest.approx(spread["normalised_rank_matched"], rel=1e-6)
    assert flat["normalised_per_position"] < 0.95 * spread["normalised_per_position"]
    assert collect(*data()).rank_matched is None  # 6 dimensions


def test_wide_representations_keep_their_cosines_and_are_projected_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(50, 2, 2, 300, generator=generator, dtype=torch.float64)
    local = local + torch.randn(50, 1, 1, 300, generator=generator, dtype=torch.float64)
    full = collect(local)
    monkeypatch.setattr(centring, "WIDEST", 200)
    narrow = collect(local)
    assert narrow.covariances.total.shape == (200, 200)
    assert similarity.estimates(narrow) == similarity.estimates(full)
    assert narrow.covariances.total.trace() == pytest.approx(float(full.covariances.total.trace()), rel=0.05)
    assert any("random projection" in note for note in measurement.table(narrow).attrs["notes"])


@pytest.mark.parametrize("name", spectrum.METRICS)
def test_spectral_intervals_are_the_jackknifes(name: str) -> None:
    """By the derivative and by leaving each group out: half widths agree to first order."""
    local, global_ = data(n=300)
    covariances = collect(local, global_, 300).covariances
    rows = torch.arange(300)
    left_out = []
    for group in range(spectrum.GROUPS):
        kept = rows[rows % spectrum.GROUPS != group]
        part = collect(local[kept], global_[kept], 300).covariances
        left_out.append(spectrum.spectra(part)[name].value)
    expected = 2.262 * (9 * np.var(left_out)) ** 0.5  # t of 9 degrees of freedom
    found = spectrum.spectra(covariances)[name]
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_a_location_that_never_changes_agrees_with_nothing() -> None:
    """A black border, say: without its variance there is no direction, and rounding must not be taken for one."""
    local, global_ = data(grid=(3, 4))
    local[:, 0] = 3.7
    local[:, 0] += 1e-9 * torch.randn(23, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = per_position(collect(local, global_))
    alive = per_position(collect(local[:, 1:], global_))
    assert found["within_per_position"] == pytest.approx(alive["within_per_position"] * 8 * 7 / (12 * 11), rel=1e-9)
    assert all(np.isfinite(value) for value in metrics(collect(local, global_)).values())


def test_degenerate_representations_give_numbers_all_the_same() -> None:
    """A global that never changes; images whose means are all one: no direction, not NaN."""
    local, _ = data()
    constant = metrics(collect(local, torch.ones(23, 6, dtype=torch.float64)))
    assert constant["local_global_cka"] == pytest.approx(0, abs=1e-9)
    found = measurement.table(collect(torch.cat([local, -local], 2))).set_index("metric")["value"]
    assert found.notna().all()
    assert found["r2"] == pytest.approx(0, abs=1e-12)


SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda x: 1000 * x,
    "small scale": lambda x: 1e-4 * x,
    "shift of every location": lambda x: x + torch.arange(x.shape[-1]),
    "rotation": lambda x: x @ torch.linalg.qr(data(6, (1, 1), seed=9)[0].flatten(0, 2))[0],
}


@pytest.mark.parametrize("name", SYMMETRIES)
def test_what_redundancy_is_blind_to(name: str) -> None:
    local, _ = data()
    before, after = metrics(collect(local)), metrics(collect(SYMMETRIES[name](local)))
    for metric, value in before.items():
        # RankMe is not centred, and LiDAR's delta is absolute, as in their papers
        if (metric, "shift" in name) != ("rankme_global", True) and (metric, "scale" in name) != ("lidar", True):
            assert after[metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric


def test_memory_order_of_the_map_changes_nothing() -> None:
    local, global_ = data()
    stored = local.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # an NCHW map seen as (B, H, W, D)
    assert metrics(collect(stored, global_)) == pytest.approx(metrics(collect(local, global_)), rel=1e-12)


def test_identical_locations_are_fully_redundant() -> None:
    image = torch.randn(30, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = metrics(collect(image.expand(30, 3, 3, 8)))
    for name in ("within", "normalised", "r2", "icc", "local_global_leave_one_out", "local_global_cka", "distance 2"):
        assert found[name] == pytest.approx(1), name
    assert abs(found["between"]) < 0.1


def test_independent_locations_are_not_redundant() -> None:
    local = torch.randn(200, 3, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = similarity.estimates(collect(local))
    for name in ("within", "between", "normalised", "icc", "local_global_leave_one_out"):
        assert abs(found[name].value) < 0.01, name
    assert found["r2"].value == pytest.approx(1 / 9, abs=0.01)  # its floor is 1 / L


def test_locality_sees_neighbours_that_share_a_field() -> None:
    """Box-filtered noise: fields of 3 cells overlap up to distance 2 and are disjoint from distance 3."""
    noise = torch.randn(300, 32, 10, 10, generator=torch.Generator().manual_seed(0))
    m = collect(torch.nn.functional.avg_pool2d(noise, 3, 1).permute(0, 2, 3, 1))
    by_distance = {d: e.value for d, e in locality.by_distance(m).items()}
    assert by_distance[1] > by_distance[2] > 0.05
    assert all(abs(by_distance[d]) < 0.02 for d in (3, 4, 5, 6, 7))
    overlap = {name: e.value for name, e in locality.by_overlap(m, (3, 1)).items()}
    assert overlap["within_overlapping"] > 0.2 > 0.02 > abs(overlap["within_disjoint"])
    assert set(locality.by_overlap(m, (1000, 1))) == {"within_overlapping"}  # no disjoint pair: no row
    assert locality.by_overlap(m, None) == {}


def test_sequences_without_a_grid_have_no_distances() -> None:
    local, global_ = data()
    m = collect(local.flatten(1, 2), global_)
    assert locality.by_distance(m) == {}
    assert similarity.estimates(m)["within"].value == pytest.approx(metrics(collect(local, global_))["within"])


def test_global_that_is_the_mean_gives_no_plain_local_global_row() -> None:
    """The trap: such a cosine is the norm of the mean unit vector, and positive even for independent locations."""
    local, global_ = data()
    assert "local_global" not in similarity.estimates(collect(local))
    assert "local_global" in similarity.estimates(collect(local, global_))
    assert "local_global" not in similarity.estimates(collect(*data(global_dim=4)))
    independent = torch.randn(100, 3, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trapped = similarity.local_global(collect(independent).sums.total(), 9)
    assert float(trapped) == pytest.approx(1 / 3, abs=0.02)  # 1 / sqrt(L)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """With a share q of the variance between images, R2 = q + (1 - q) / L: 95 % intervals hold it about that often."""
    q, locations, hits = 0.5, 4, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(60, 1, 1, 8, generator=generator, dtype=torch.float64) * q**0.5
        local = shared + torch.randn(60, 2, 2, 8, generator=generator, dtype=torch.float64) * (1 - q) ** 0.5
        estimate = similarity.estimates(collect(local, batch=60))["r2"]
        hits += estimate.low <= q + (1 - q) / locations <= estimate.high
    assert 0.89 <= hits / 200 <= 0.99


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_gaussian_mutual_information_of_known_gaussians(correlation: float) -> None:
    """Locations that correlate by r in each of D dimensions share -D/2 log(1 - r^2) nats."""
    generator, dim = torch.Generator().manual_seed(0), 4
    shared = torch.randn(4000, 1, 1, dim, generator=generator, dtype=torch.float64) * correlation**0.5
    own = torch.randn(4000, 2, 2, dim, generator=generator, dtype=torch.float64) * (1 - correlation) ** 0.5
    found = metrics(collect(shared + own, batch=500))["gaussian_mutual_information"]
    assert found == pytest.approx(-dim / 2 * np.log(1 - correlation**2), rel=0.05, abs=0.01)


def test_mutual_information_stays_finite_with_fewer_images_than_dimensions() -> None:
    image = torch.randn(5, 1, 1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = collect(image.expand(5, 2, 2, 32))
    assert np.isfinite(metrics(m)["gaussian_mutual_information"])
    notes = measurement.table(m).attrs["notes"]
    assert any("5 images are not more than the 32 dimensions" in note and "shrunk" in note for note in notes)
    assert any("no rank-matched rows" in note for note in notes)  # four directions vary


def test_spectral_ranks_count_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0][:3]
    local = torch.randn(500, 2, 2, 3, generator=generator, dtype=torch.float64) @ basis
    found = metrics(collect(local))
    for name in ("participation_ratio_total", "effective_rank_total", "rankme_global", "lidar"):
        assert found[name] == pytest.approx(3, rel=0.03), name


BROKEN: dict[str, tuple[Tensor, type[CossError], str]] = {
    "one image": (torch.ones(1, 2, 2, 3), UsageError, "at least 2, but got 1"),
    "one location": (torch.ones(4, 1, 1, 3), UsageError, "at least 2 an image, but got 1"),
    "constant": (torch.full((4, 2, 2, 3), 0.3), CossError, "the same in every image"),
    "NaN": (torch.full((4, 2, 2, 3), float("nan")), CossError, "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_line(name: str) -> None:
    local, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        collect(local)
    assert "\n" not in str(caught.value)

"""CKA, RSA and Procrustes against direct formulas, scipy, and what must hold of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from torch import Tensor

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.errors import CossError, UsageError
from coss_eval.similarity import (
    StreamedCKA,
    against_recordings,
    cka,
    dissimilarities,
    noise_ceiling,
    procrustes,
    procrustes_matrix,
    rsa,
    rsa_matrix,
)
from coss_eval.similarity.arrays import Array, Compared

MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cka": cka,
    "plain": lambda x, y: cka(x, y, debiased=False),
    "rsa": rsa,
    "rsa-euclidean": lambda x, y: rsa(x, y, metric="euclidean"),
    "procrustes": procrustes,
}


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int = 60, d: int = 20, e: int = 12, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two representations that share a part."""
    x = normal(n, d) + 3
    return x, x @ normal(d, e, 1) / d**0.5 + noise * normal(n, e, 2)


def hsic_1(k: Tensor, el: Tensor) -> float:
    """Song et al. 2012, equation 5, term by term."""
    n = len(k)
    k, el, one = k - torch.diag(k.diag()), el - torch.diag(el.diag()), torch.ones(n, 1, dtype=k.dtype)
    sums = (one.T @ k @ one) * (one.T @ el @ one) / ((n - 1) * (n - 2))
    return float((torch.trace(k @ el) + sums - 2 / (n - 2) * (one.T @ k @ el @ one)) / (n * (n - 3)))


def test_debiased_cka_is_the_formula() -> None:
    x, y = related()
    k, el = x @ x.T, y @ y.T  # not centred: HSIC_1 does not need it
    expected = hsic_1(k, el) / (hsic_1(k, k) * hsic_1(el, el)) ** 0.5
    assert cka(x, y) == pytest.approx(expected, abs=1e-10)


def test_plain_cka_is_the_formula_in_features() -> None:
    x, y = related()
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(x, y, debiased=False) == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.parametrize("metric", ["correlation", "cosine", "euclidean"])
def test_rsa_is_scipys(metric: str) -> None:
    x, y = related()
    expected = spearmanr(pdist(x.numpy(), metric), pdist(y.numpy(), metric)).statistic
    assert rsa(x, y, metric=metric) == pytest.approx(expected, abs=1e-9)  # type: ignore[arg-type]
    upper = dissimilarities(x, metric=metric)[tuple(torch.triu_indices(60, 60, offset=1))]  # type: ignore[arg-type]
    np.testing.assert_allclose(upper.numpy(), pdist(x.numpy(), metric), atol=1e-7)


@pytest.mark.parametrize(("n", "d"), [(60, 20), (15, 40)])
def test_procrustes_is_scipys(n: int, d: int) -> None:
    x, y = normal(n, d) + 3, normal(n, d) + normal(n, d, 1)
    *_, disparity = scipy_procrustes(x.numpy(), y.numpy())  # 1 - (nuclear norm)^2
    assert procrustes(x, y) == pytest.approx((1 - disparity) ** 0.5, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_identities(measure: Callable[[Tensor, Tensor], float]) -> None:
    """1 of itself; the same for either order of the two, for any order of the images, and as arrays of numpy."""
    x, y = related()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert measure(x, x) == pytest.approx(1, abs=1e-9)
    assert measure(x, y) == pytest.approx(measure(y, x), abs=1e-9)
    assert measure(x[order], y[order]) == pytest.approx(measure(x, y), abs=1e-9)
    assert measure(x.numpy(), y.float().numpy()) == pytest.approx(measure(x, y), abs=1e-5)  # type: ignore[arg-type]
    assert 0 < measure(x, y) < 1


@pytest.mark.parametrize("name", ["cka", "plain", "rsa-euclidean", "procrustes"])
def test_rotation_scale_and_shift_do_not_matter(name: str) -> None:
    x, y = related()
    turn = torch.linalg.qr(normal(12, 12, 5)).Q
    assert MEASURES[name](x, 4 * y @ turn - 7) == pytest.approx(MEASURES[name](x, y), abs=1e-9)


def test_unrelated_representations_of_many_units_have_debiased_cka_near_0() -> None:
    values = [cka(normal(100, 300, seed), normal(100, 200, 1000 + seed)) for seed in range(20)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20**0.5
    assert cka(normal(100, 300), normal(100, 200, 1), debiased=False) > 0.6


def streamed(x: Tensor, y: Tensor, size: int) -> StreamedCKA:
    found = StreamedCKA()
    for a, b in zip(x.split(size), y.split(size), strict=True):
        found.add({"x": a, "y": b})
    return found


def test_one_minibatch_is_the_whole() -> None:
    x, y = related()
    matrix = streamed(x.float(), y.float(), 60).matrix()
    assert matrix[0, 1] == pytest.approx(cka(x, y), abs=1e-5)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(2).double())


def test_minibatches_are_the_mean_of_their_hsic() -> None:
    """Also with a last one that is smaller, which weighs by its pairs of images."""
    x, y = related(100)
    found, sums = streamed(x, y, 30), np.zeros(3)
    for a, b in zip(x.split(30), y.split(30), strict=True):
        k, el, n = a @ a.T, b @ b.T, len(a)
        sums += n * (n - 3) * np.array([hsic_1(k, el), hsic_1(k, k), hsic_1(el, el)])
    assert found.matrix()[0, 1] == pytest.approx(sums[0] / (sums[1] * sums[2]) ** 0.5, abs=1e-5)


def test_minibatches_come_near_the_whole_with_an_interval_that_covers_it() -> None:
    """Over 60 samples of 640 images in ten minibatches, the 95 % interval holds the value of 20,000 images."""
    truth = streamed(*related(20_000), 500).matrix()[0, 1].item()
    covered = 0
    for seed in range(60):
        x = normal(640, 20, 10 + seed) + 3
        y = x @ normal(20, 12, 1) / 20**0.5 + 0.5 * normal(640, 12, 900 + seed)
        value, low, high = streamed(x, y, 64).estimate("x", "y")
        assert low < value < high
        covered += low <= truth <= high
    assert covered >= 51  # of 60; a binomial of .95 is below with probability .0006


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (normal(9, 3), normal(8, 3), "9 images and y 8"),
        (normal(1, 3), normal(1, 3), "images or more, got 1"),
        (normal(9, 3)[:, 0], normal(9, 3), r"\(images, units\)"),
        (normal(9, 3), torch.ones(9, 4), "same for all images"),
        (normal(9, 3), torch.full((9, 4), torch.nan), "NaN"),
    ],
    ids=["counts", "one image", "vector", "constant", "nan"],
)
def test_wrong_arrays(measure: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises((UsageError, CossError), match=message):
        measure(x, y)


def test_wrong_minibatches() -> None:
    found = StreamedCKA()
    with pytest.raises(UsageError, match="no minibatch"):
        found.matrix()
    with pytest.raises(UsageError, match="4 images or more"):
        found.add({"x": normal(3, 2), "y": normal(3, 2)})
    found.add({"x": normal(8, 2), "y": torch.ones(8, 3)})
    with pytest.raises(UsageError, match="the same representations"):
        found.add({"x": normal(8, 2)})
    with pytest.raises(CossError, match="y does not tell images apart"):
        found.matrix()
    with pytest.raises(UsageError, match="take 5000"):
        dissimilarities(normal(5001, 2))


PEAK = """
import sys, torch
from coss_eval.runtime.memory import most_resident
from coss_eval.similarity import many
many.SPOOLED, many.COLUMNS, many.BLOCKS = 2**20, 2**12, 2  # so that a small case takes the way of a large one
many.rsa_matrix([torch.randn(500, 8) for _ in range(3)])  # what is imported and allocated once
x, before = torch.randn(500, 16), most_resident()
many.rsa_matrix([x.roll(i, 0) for i in range(int(sys.argv[1]))])
print((most_resident() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_of_rsa_is_flat_in_the_number_of_representations() -> None:
    """80 of 500 images have 8 bytes for each of 124,750 pairs, 80 MB, on the disk alone: memory is that of 4."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", PEAK, count], capture_output=True, text=True, check=True).stdout)
        for count in ("4", "80")
    )  # KiB
    assert many - few < 20_000


def test_all_pairs_at_once_are_each_pair() -> None:
    """Of CKA in minibatches, RSA and Procrustes; also with units that tie, and in no more images than blocks need."""
    x, y = related(80)
    z = (x[:, :6] > 3).double() + 0.01 * normal(80, 6, 9)
    found = StreamedCKA()
    for parts in zip(x.split(20), y.split(20), z.split(20), strict=True):
        found.add(dict(zip("xyz", parts, strict=True)))
    compared = found.estimates()
    for i, j in ((0, 1), (1, 2), (2, 2)):
        expected = found.estimate("xyz"[i], "xyz"[j])
        assert [float(part[i, j]) for part in compared] == pytest.approx(list(expected), abs=1e-12)
    for matrix, measure in ((rsa_matrix([x, y, z]), rsa), (procrustes_matrix([x, y, z]), procrustes)):
        expected_values = [[measure(a, b) for b in (x, y, z)] for a in (x, y, z)]
        torch.testing.assert_close(matrix.value, torch.tensor(expected_values).double(), rtol=0, atol=1e-6)
        assert (matrix.low <= matrix.value).all()
        assert (matrix.low < matrix.high).sum() == 6
        assert rsa_matrix([x[:39], y[:39]]).low.isnan().sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize("matrix_of", [rsa_matrix, procrustes_matrix])
def test_intervals_of_the_geometry_cover(matrix_of: Callable[[list[Tensor]], Compared]) -> None:
    """Over 60 samples of 60 images, the 95 % interval holds the mean of their values."""
    found = []
    for seed in range(60):
        x = normal(60, 20, 10 + seed) + 3
        y = x @ normal(20, 12, 1) / 20**0.5 + 0.5 * normal(60, 12, 900 + seed)
        found.append([float(part[0, 1]) for part in matrix_of([x, y])])
    value, low, high = np.array(found).T
    covered = int(((low <= value.mean()) & (value.mean() <= high)).sum())
    assert covered >= 51  # of 60, as above
    assert (high - low).mean() < 8 * value.std()  # and not because they are wide: 2 t s is 4.2


def test_pairs_that_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match=r"same images.*\[8, 9\]"):
        rsa_matrix([normal(9, 3), normal(8, 3)])
    corners = torch.eye(8, dtype=torch.float64)
    with pytest.raises(CossError, match="stage1 puts all pairs of images equally far apart"):
        rsa_matrix([normal(8, 3), corners], metric="euclidean", names=["pixels", "stage1"])


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_locations_and_repeats_are_averaged_over(measure: Callable[[Array, Array], float]) -> None:
    x, y = related()
    apart = normal(60, 4 * 20, 5).reshape(60, 4, 20)
    apart = x[:, None] + apart - apart.mean(1, keepdim=True)
    assert measure(apart, y) == pytest.approx(measure(x, y), abs=1e-9)
    assert measure(apart.numpy(), y[:, None].numpy()) == pytest.approx(measure(x, y), abs=1e-9)
    with pytest.raises(UsageError, match="averaged over"):
        measure(apart[..., None], y)


def recorded(noise: float, repeats: int, n: int = 200) -> tuple[Tensor, Tensor]:
    """What a perfect model has (n, 30), and recordings of it (n, repeats, 30)."""
    signal = normal(n, 10, 1) @ normal(10, 30, 2)
    return signal, signal[:, None] + noise * normal(n, repeats * 30, 3).reshape(n, repeats, 30)


@pytest.mark.parametrize("measure", [cka, rsa])
@pytest.mark.parametrize(("noise", "repeats"), [(1.0, 4), (3.0, 10), (3.0, 5)])
def test_a_perfect_model_reaches_the_ceiling(
    measure: Callable[[Array, Array], float], noise: float, repeats: int
) -> None:
    """Within 3 %, for even and odd numbers of repeats, where an unrelated representation does not."""
    signal, recordings = recorded(noise, repeats)
    found = against_recordings(signal, recordings, measure=measure)
    assert found.share == pytest.approx(1, abs=0.03)
    assert found.value == pytest.approx(measure(signal, recordings.mean(1)), abs=1e-9)
    assert found.low < found.value < found.high
    assert found == against_recordings(signal.numpy(), recordings.numpy(), measure=measure)
    other = against_recordings(normal(200, 30, 9), recordings, measure=measure)
    assert other.share < 0.2
    assert other.ceiling == found.ceiling


def test_spearman_and_brown() -> None:
    """Two repeats have one way of halving, and twice as many in all as in a half."""
    _, recordings = recorded(1.0, 2)
    found = noise_ceiling(recordings, splits=3)
    r = cka(recordings[:, 0], recordings[:, 1])
    assert found == pytest.approx((r, 2 * r / (1 + r), (2 * r / (1 + r)) ** 0.5), abs=1e-12)


def test_wrong_recordings() -> None:
    x, recordings = recorded(1.0, 4)
    for wrong in (x, recordings[:, :1]):
        with pytest.raises(UsageError, match=r"\(images, repeats, units\) with 2"):
            noise_ceiling(wrong)
    with pytest.raises(UsageError, match="procrustes is no correlation"):
        noise_ceiling(recordings, measure=procrustes)
    with pytest.raises(UsageError, match="199 images and y 200"):
        against_recordings(x[1:], recordings)
    with pytest.raises(CossError, match="do not agree"):
        noise_ceiling(torch.cat([recordings[:, :1], -recordings[:, :1]], 1), measure=rsa_of_signs)


def rsa_of_signs(x: Array, y: Array) -> float:
    """A measure that can be below 0: the correlation of all values."""
    return float(np.corrcoef(np.asarray(x).ravel(), np.asarray(y).ravel())[0, 1])


def features() -> tuple[Tensor, Tensor]:
    """Two sites of a network on 150 digits, as float64."""
    model = make_model("resnet18", stem="cifar", width=8)
    found = ce.extract(
        model, ce.load_dataset("digits").test.subset(range(150)), sites=["stage2", "global"], cache=False
    )
    return found.values["stage2"].double(), found.values["global"].double()


def test_rsa_is_rsatoolboxs_on_features() -> None:
    rsatoolbox = pytest.importorskip("rsatoolbox", reason="rsatoolbox is not installed")
    pair = features()
    for ours, theirs in (("correlation", "correlation"), ("euclidean", "euclidean")):
        rdms = [rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(one.numpy()), method=theirs) for one in pair]
        expected = float(rsatoolbox.rdm.compare(*rdms, method="spearman").item())  # ties of squares are ties of roots
        assert rsa(*pair, metric=ours) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_plain_cka_is_the_cosine_of_rsatoolboxs_covariances_on_features() -> None:
    """Of the centred inner products, which follow from its squared Euclidean dissimilarities D: -1/2 H D H."""
    rsatoolbox = pytest.importorskip("rsatoolbox", reason="rsatoolbox is not installed")
    grams = []
    for one in features():
        rdm = rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(one.numpy()), method="euclidean").get_matrices()[0]
        centring = np.eye(len(rdm)) - 1 / len(rdm)
        grams.append(centring @ rdm @ centring)
    a, b = grams
    expected = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    assert cka(*features(), debiased=False) == pytest.approx(expected, abs=1e-6)

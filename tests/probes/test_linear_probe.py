"""The linear probe against scikit-learn, its selection, and its folding into one layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from coss_eval.errors import CossError, UsageError
from coss_eval.probes.linear import STRENGTHS, fit_probe
from coss_eval.probes.logistic import Logistic, Rows, standardisation

TIGHT = 1e-13


def digits() -> tuple[Tensor, Tensor]:
    """Raw digits: 64 features, three of them constant."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(images[order]), torch.from_numpy(labels[order])


def correlated(n: int, classes: int, dim: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Badly conditioned features, far from zero mean, of overlapping classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    latent = rng.normal(size=(n, dim)) + rng.normal(size=(classes, dim))[labels]
    mixing = rng.normal(size=(dim, dim)) @ np.diag(np.logspace(0, -3, dim)) @ rng.normal(size=(dim, dim))
    return torch.from_numpy(latent @ mixing + 5), torch.from_numpy(labels)


DATA = {
    "digits": lambda: (*digits(), 10),
    "correlated": lambda: (*correlated(600, 5), 5),
    "two classes": lambda: (*correlated(400, 2), 2),
    "more features than images": lambda: (*correlated(40, 4, dim=100), 4),
}


def sklearn_fit(features: Tensor, labels: Tensor, strength: float, tol: float) -> LogisticRegression:
    penalty = strength * len(features) / (2 if int(labels.max()) == 1 else 1)  # one weight vector for two classes
    scaled = StandardScaler().fit_transform(features.numpy())
    return LogisticRegression(C=1 / penalty, tol=tol, max_iter=20_000).fit(scaled, labels.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", DATA)
def test_coefficients_are_scikit_learns(name: str, strength: float) -> None:
    features, labels, classes = DATA[name]()
    probe = fit_probe(features, labels, num_classes=classes, strengths=[strength], tolerance=TIGHT)
    ours = probe.weight - probe.weight.mean(0)  # equal shifts of all classes change no probability
    theirs = torch.from_numpy(sklearn_fit(features, labels, strength, 1e-9).coef_)
    if classes == 2:
        theirs = torch.cat([-theirs, theirs]) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_accuracy_is_scikit_learns_at_the_default_tolerance_in_float32(name: str) -> None:
    features, labels, classes = DATA[name]()
    for strength in (0.1, 1e-3, 1e-5):
        probe = fit_probe(features.float(), labels, num_classes=classes, strengths=[strength])
        reference = sklearn_fit(features, labels, strength, 1e-6)
        theirs = reference.score(StandardScaler().fit_transform(features.numpy()), labels.numpy())
        ours = (probe.module()(features.float()).argmax(1) == labels).double().mean().item()
        assert abs(ours - theirs) <= 0.002


def test_gradient_is_that_of_the_stated_objective() -> None:
    features, labels = correlated(300, 5)
    problem = Logistic(features, labels, 5)
    point = torch.randn(5, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = 0.3 * torch.cat([torch.ones(24), torch.zeros(1)]).double()
    scaled = torch.from_numpy(StandardScaler().fit_transform(features.numpy()))
    weight, bias = problem.to_standardised(point)
    expected = torch.nn.functional.cross_entropy(scaled @ weight.T + bias, labels) + 0.15 * weight.square().sum()
    expected.backward()
    loss, gradient = problem._loss(point.detach(), penalty)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, point.grad)


def test_loss_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = digits()
    point, penalty = torch.full((10, 65), 0.01, dtype=torch.float64), torch.zeros(65, dtype=torch.float64)
    whole = Logistic(features, labels, 10)._loss(point, penalty)
    monkeypatch.setattr("coss_eval.probes.logistic.CPU_ROWS", 100)
    parts = Logistic(features, labels, 10)._loss(point, penalty)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)


def split_digits() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    features, labels = digits()
    return features[200:].float(), labels[200:], (features[:200].float(), labels[:200])


def test_selection_follows_the_path_and_refits_on_all() -> None:
    features, labels, select = split_digits()
    probe = fit_probe(features, labels, num_classes=10, select=select)
    assert list(probe.path) == list(STRENGTHS)
    assert len(STRENGTHS) >= 12
    best = max(probe.path.values())
    assert probe.strength == max(strength for strength, accuracy in probe.path.items() if accuracy == best)
    together = torch.cat([features, select[0]]), torch.cat([labels, select[1]])
    refit = fit_probe(*together, num_classes=10, strengths=[probe.strength])
    assert torch.equal(probe.mean, refit.mean)
    rows = together[0]
    assert (probe.module()(rows).argmax(1) == refit.module()(rows).argmax(1)).double().mean() >= 0.998
    assert "the best of 15" in probe.describe()
    assert "fixed" in refit.describe()


@pytest.mark.slow
@pytest.mark.parametrize("strength", [10.0, 1e-2, 1e-5])
def test_the_warm_started_path_passes_through_each_cold_fit(strength: float) -> None:
    features, labels, _ = split_digits()
    chain = [s for s in STRENGTHS if s >= strength]
    problem = Logistic(features.double(), labels, 10)
    coefficients = None
    for s in chain:
        coefficients = problem.minimise(s, coefficients, tolerance=TIGHT)
    cold = Logistic(features.double(), labels, 10).minimise(strength, tolerance=TIGHT)
    assert coefficients is not None
    torch.testing.assert_close(coefficients, cold, rtol=1e-2, atol=1e-3)


def test_held_out_images_choose_but_do_not_fit() -> None:
    """Labels of the held-out images that are pure noise change which strength wins, not the fits they judge."""
    features, labels, select = split_digits()
    noise = torch.randint(0, 10, (len(select[1]),), generator=torch.Generator().manual_seed(0))
    honest = fit_probe(features, labels, num_classes=10, select=select)
    noisy = fit_probe(features, labels, num_classes=10, select=(select[0], noise))
    assert max(noisy.path.values()) < 0.3 < max(honest.path.values())


def test_module_folds_the_standardisation() -> None:
    features, labels = correlated(300, 5)
    probe = fit_probe(features, labels, num_classes=5, strengths=[1e-3])
    expected = ((features - probe.mean) / probe.std) @ probe.weight.T + probe.bias
    linear = probe.module()
    assert (linear.in_features, linear.out_features) == (24, 5)
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    folded = features @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-4)


def test_fits_are_deterministic_and_leave_the_generator_alone() -> None:
    features, labels, select = split_digits()
    state = torch.get_rng_state()
    first, second = (fit_probe(features, labels, num_classes=10, select=select) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.path == second.path
    assert torch.equal(first.module().weight, second.module().weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_stops_where_it_can_go_no_lower() -> None:
    """At a tolerance beyond float32's reach the path still ends, near where float64 ends."""
    features, labels = correlated(300, 5)
    for strength in (1e-2, 1e-5):
        single, double = (
            fit_probe(f, labels, num_classes=5, strengths=[strength], tolerance=TIGHT)
            for f in (features.float(), features)
        )
        logits = [probe.module()(features.float()) for probe in (single, double)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 12345.678])
def test_constant_features_count_for_nothing(value: float) -> None:
    features, labels, _ = split_digits()
    constant = torch.full((len(features), 1), value)
    with_it = fit_probe(torch.cat([features, constant], 1), labels, num_classes=10, strengths=[1e-2])
    without = fit_probe(features, labels, num_classes=10, strengths=[1e-2])
    assert with_it.std[-1] == 1
    assert with_it.weight[:, -1].abs().max() < 1e-4
    torch.testing.assert_close(with_it.weight[:, :-1], without.weight, rtol=0, atol=1e-2)


def test_standardisation_is_that_of_scikit_learn() -> None:
    features, _ = digits()
    scaler = StandardScaler().fit(features.numpy())
    mean, std = standardisation(features.float())
    torch.testing.assert_close(mean, torch.from_numpy(scaler.mean_))
    torch.testing.assert_close(std, torch.from_numpy(scaler.scale_))


@pytest.mark.parametrize("labels", [torch.zeros(20, dtype=torch.int64), torch.arange(20) % 3])
def test_classes_without_images_are_never_predicted(labels: Tensor) -> None:
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    probe = fit_probe(features, labels, num_classes=5, strengths=[1e-2])
    assert set(probe.module()(features).argmax(1).tolist()) <= set(labels.tolist())


X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (X[:, 0], Y, {}, "features must be float32 or float64 (N, D)"),
        (X.half(), Y, {}, "got torch.float16"),
        (X[:0], Y[:0], {}, "N > 0"),
        (X, Y[:5], {}, "one label for each of 12 features"),
        (X, Y + 1, {}, "labels must lie in 0 ... 2, got 1 ... 3"),
        (X, Y, {"strengths": [0.0]}, "strengths must be above 0"),
        (X, Y, {"strengths": []}, "at least one"),
        (X, Y, {}, "15 strengths need held-out images"),
    ],
)
def test_wrong_calls(features: Tensor, labels: Tensor, options: dict[str, list[float]], message: str) -> None:
    with pytest.raises(UsageError) as error:
        fit_probe(features, labels, num_classes=3, **options)
    assert message in str(error.value)


def test_features_that_are_not_numbers() -> None:
    broken = X.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(CossError, match="1 of 3 features hold NaN"):
        fit_probe(broken, Y, num_classes=3, strengths=[1.0])


def scores_by_scikit(strengths: list[float]) -> dict[float, float]:
    """Held-out accuracy of scikit-learn's logistic regression on the split digits, standardised by hand."""
    features, labels, (held, truth) = split_digits()
    mean, std = features.double().mean(0), features.double().std(0, correction=0)
    std[std == 0] = 1
    found = {}
    for strength in strengths:
        model = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=5000)
        model.fit(((features - mean) / std).numpy(), labels.numpy())
        found[strength] = float(model.score(((held - mean) / std).numpy(), truth.numpy()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(10.0, 1.0), (1e-4, 1e-5), STRENGTHS])
def test_a_grid_whose_best_lies_at_its_end_is_widened(asked: tuple[float, ...]) -> None:
    """On either side, until the best lies inside, as scikit-learn's accuracies along the same strengths say."""
    features, labels, select = split_digits()
    probe = fit_probe(features, labels, num_classes=10, select=select, strengths=asked)
    expected = scores_by_scikit(list(probe.path))
    assert probe.path[probe.strength] == max(probe.path.values())
    assert probe.path == pytest.approx(expected, abs=0.03)  # fits are only compared: a loose tolerance
    assert len(probe.path) <= len(asked) + 6
    if len(probe.path) > len(asked):
        ratios = np.diff(np.log(list(probe.path)))
        assert np.allclose(ratios, ratios[0])
        assert f"the grid of {len(asked)} widened" in probe.describe()
    else:
        assert "widened" not in probe.describe()
    assert ("END" in probe.describe()) == probe.at_the_end


def planted(weak: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Two classes where weak penalties win (a small, exact direction under a large, noisy one) or strong ones."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    sign = (2 * labels - 1).double()
    if weak:
        noise = torch.randn(400, generator=generator, dtype=torch.float64)
        features = torch.stack([noise + 0.2 * sign, noise], 1)  # their difference tells the class, if amplified
    else:
        features = torch.randn(400, 150, generator=generator, dtype=torch.float64) + 0.12 * sign[:, None]
    return features[:200], labels[:200], (features[200:], labels[200:])


@pytest.mark.parametrize("weak", [True, False])
def test_widening_finds_a_better_strength(weak: bool) -> None:
    features, labels, select = planted(weak)
    asked = (0.3, 0.1) if weak else (1e-4, 1e-5)
    probe = fit_probe(features, labels, num_classes=2, select=select, strengths=asked)
    assert len(probe.path) > 2
    assert (min(probe.path) < min(asked)) if weak else (max(probe.path) > max(asked))
    assert probe.path[probe.strength] > max(probe.path[strength] for strength in asked)
    inside = fit_probe(features, labels, num_classes=2, select=select, strengths=[probe.strength])
    assert torch.allclose(probe.weight, inside.weight, rtol=1e-2, atol=1e-2)


def test_a_plateau_at_the_strong_end_is_left_alone() -> None:
    """Ever stronger penalties shrink the weights and leave the classes as they are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    features = torch.randn(100, 2, generator=generator) + 20 * labels[:, None]
    probe = fit_probe(features, labels, num_classes=2, select=(features, labels))
    assert probe.strength == STRENGTHS[0]
    assert list(probe.path) == list(STRENGTHS)
    assert not probe.at_the_end


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage().data_ptr()) not in given:
                storage = tensor.untyped_storage()
                self.live[place] = StorageWeakRef(storage), storage.nbytes()
        self.live = {place: found for place, found in self.live.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def test_a_fit_makes_one_copy_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is held out, and of whichever rows: one, and chunks."""
    monkeypatch.setattr("coss_eval.probes.logistic.CPU_ROWS", 64)
    features, labels = torch.randn(8_000, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8_000) % 2
    features[:, 0] += labels
    held = torch.arange(0, 8_000, 10)
    fit = torch.from_numpy(np.setdiff1d(np.arange(8_000), held))
    select = Rows((features, held)), labels[held]
    with LiveBytes() as memory:
        found = fit_probe(Rows((features, fit)), labels[fit], num_classes=2, strengths=[1.0, 0.1], select=select)
    copies = memory.peak / features.nbytes
    assert 1 <= copies < 1.5  # a constant feature and the labels beside 16 features in float32 are 3/16
    plain = features[held], labels[held]
    same = fit_probe(features[fit], labels[fit], num_classes=2, strengths=[1.0, 0.1], select=plain)
    assert torch.equal(found.weight, same.weight)
    assert found.path == same.path


def test_rows_of_several_matrices() -> None:
    a, b = torch.arange(10.0).reshape(5, 2), torch.arange(100.0, 106).reshape(3, 2)
    rows = Rows((a, torch.tensor([4, 0]))) + Rows.of(b)
    whole = torch.cat([a[[4, 0]], b])
    assert (len(rows), rows.shape) == (5, (5, 2))
    assert torch.equal(torch.cat([chunk for _, chunk in rows.chunks()]), whole)
    assert all(torch.equal(rows._between(i, j), whole[i:j]) for i in range(5) for j in range(i + 1, 6))
    with pytest.raises(UsageError, match="features of one type and length"):
        rows + Rows.of(b.double())

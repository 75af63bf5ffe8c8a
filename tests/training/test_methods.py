"""Every method's loss against lightly's or its paper's formula, and the traps in which libraries went wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_parts import SMALL

from coss_eval.errors import UsageError
from coss_eval.training.method import Comparison
from coss_eval.training.methods import METHODS, make_method, method_class, names, split_name
from coss_eval.training.methods.dino import DINO, CentredCrossEntropy, PrototypeHead


@pytest.fixture(scope="module")
def lightly() -> Any:
    return pytest.importorskip("lightly.loss", reason="install the bench extra to compare losses with lightly's")


def vectors(n: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both(comparison: Comparison, p: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor]) -> Tensor:
    """The two directions of two views: the first's prediction with the second's target, and the other way round."""
    index = torch.arange(len(p[0]))
    return torch.stack([comparison(p[0], z[1], index), comparison(p[1], z[0], index)])


@pytest.fixture
def views() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (vectors(12, 10, 0), vectors(12, 10, 1)), (vectors(12, 10, 2), vectors(12, 10, 3))


def test_byol_is_two_plus_twice_lightlys_negative_cosine(lightly, views) -> None:
    p, z = views
    reference = lightly.NegativeCosineSimilarity()
    expected = (2 + 2 * reference(p[0], z[1])) + (2 + 2 * reference(p[1], z[0]))
    torch.testing.assert_close(both(make_method("byol").comparison(), p, z).sum(), expected, atol=1e-5, rtol=0)


def test_simsiam_is_lightlys_negative_cosine(lightly, views) -> None:
    p, z = views
    reference = lightly.NegativeCosineSimilarity()
    expected = (reference(p[0], z[1]) + reference(p[1], z[0])) / 2
    torch.testing.assert_close(both(make_method("simsiam").comparison(), p, z).mean(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_is_lightlys(lightly, views, temperature: float) -> None:
    p, _ = views
    ours = both(make_method("simclr", temperature=temperature).comparison(), p, p).mean()
    torch.testing.assert_close(ours, lightly.NTXentLoss(temperature=temperature)(*p), atol=1e-5, rtol=0)


def test_vicreg_is_lightlys(lightly, views) -> None:
    p, _ = views
    ours = both(make_method("vicreg").comparison(), p, p)
    torch.testing.assert_close(ours[0], ours[1])  # symmetric
    torch.testing.assert_close(ours.mean(), lightly.VICRegLoss()(*p), atol=1e-5, rtol=1e-6)


def test_barlow_is_lightlys(lightly, views) -> None:
    p, _ = views
    ours = both(make_method("barlow", scale=1.0, redundancy=0.005).comparison(), p, p).mean()
    torch.testing.assert_close(ours, lightly.BarlowTwinsLoss(lambda_param=5e-3)(*p), atol=1e-5, rtol=1e-6)


def test_dino_is_lightlys_with_its_centre_over_several_steps(lightly) -> None:
    method = make_method("dino", prototypes=10, teacher_temperature=0.06, warm_up_share=0.0)
    comparison = method.comparison()
    reference = lightly.DINOLoss(output_dim=10, teacher_temp=0.06, student_temp=0.1, center_momentum=0.9)
    for step in range(3):
        teacher = [vectors(6, 10, 10 * step + i) for i in range(2)]
        student = [vectors(6, 10, 10 * step + 2 + i) for i in range(4)]  # two full views, two small ones
        index = torch.arange(6)
        pairs = [(s, t) for s in range(4) for t in range(2) if s != t]
        ours = torch.stack([comparison(student[s], teacher[t], index) for s, t in pairs]).mean()
        torch.testing.assert_close(ours, reference(teacher, student, teacher_temp=0.06), atol=1e-5, rtol=0)
        comparison.after_step(0.0)
        torch.testing.assert_close(comparison.centre, reference.center.view(1, -1), atol=1e-6, rtol=0)


def test_mocov3_is_its_algorithm_1(views) -> None:
    p, z = views
    temperature = 0.2

    def contrastive(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q) @ F.normalize(k).T
        return F.cross_entropy(logits / temperature, torch.arange(len(q))) * 2 * temperature

    expected = contrastive(p[0], z[1]) + contrastive(p[1], z[0])
    torch.testing.assert_close(both(make_method("mocov3").comparison(), p, z).sum(), expected, atol=1e-6, rtol=0)


def test_simclr_matches_equation_1_written_out(views) -> None:
    """Without lightly: every anchor against its positive and all 2B - 2 others."""
    p, _ = views
    z, total = F.normalize(torch.cat(p)), 0.0
    for i in range(24):
        scores = [float(z[i] @ z[j]) / 0.2 for j in range(24)]
        positive = scores[(i + 12) % 24]
        total += math.log(sum(math.exp(s) for j, s in enumerate(scores) if j != i)) - positive
    ours = both(make_method("simclr", temperature=0.2).comparison(), p, p).mean()
    assert float(ours) == pytest.approx(total / 24, abs=1e-5)


def test_vicreg_matches_its_equations_written_out(views) -> None:
    (a, b), _ = views

    def variance(z: Tensor) -> Tensor:
        return torch.stack([torch.relu(1 - (z[:, j].var() + 1e-4).sqrt()) for j in range(10)]).mean()

    def covariance(z: Tensor) -> float:
        c = torch.cov(z.T)
        return sum(float(c[i, j]) ** 2 for i in range(10) for j in range(10) if i != j) / 10

    expected = 25 * F.mse_loss(a, b) + 25 * (variance(a) + variance(b)) / 2 + covariance(a) + covariance(b)
    ours = make_method("vicreg").comparison()(a, b, torch.arange(12))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_barlow_matches_its_equation_written_out(views) -> None:
    (a, b), _ = views
    c = torch.corrcoef(torch.cat([a, b], 1).T)[:10, 10:]
    expected = sum(float((1 - c[i, j]) ** 2 if i == j else 0.0051 * c[i, j] ** 2) for i in range(10) for j in range(10))
    ours = make_method("barlow", scale=1.0).comparison()(a, b, torch.arange(12))
    assert float(ours) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_the_two_terms_are_summed(name: str) -> None:
    assert method_class(name).directions == "sum"


@pytest.mark.parametrize("name", METHODS)
def test_a_comparison_is_indifferent_to_the_order_of_the_targets(name: str) -> None:
    """``index`` alone says what belongs to what."""
    comparison = make_method(name, **SMALL[name]).local_comparison()
    online, order = vectors(18, 20, 0), torch.randperm(6, generator=torch.Generator().manual_seed(1))
    target = torch.arange(6) % 5 if name == "supervised" else vectors(6, 20, 1)
    index = torch.arange(6).repeat_interleave(3)
    shuffled = comparison(online, target[order], order.argsort()[index])
    torch.testing.assert_close(comparison(online, target, index), shuffled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_losses_stay_float32_and_finite_for_bf16_vectors(name: str) -> None:
    comparison = make_method(name, **SMALL[name]).comparison()
    online = vectors(8, 20, 0).to(torch.bfloat16).requires_grad_()
    target = torch.arange(8) % 5 if name == "supervised" else vectors(8, 20, 1).to(torch.bfloat16)
    loss = comparison(online, target, torch.arange(8))
    loss.backward()
    assert loss.dtype == torch.float32
    assert online.grad is not None
    assert online.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_heads_take_vectors_and_give_what_the_comparison_takes(name: str) -> None:
    method = make_method(name, **SMALL[name])
    heads = method.heads(14)
    out, projected = heads(vectors(8, 14, 0)), heads.projector(vectors(8, 14, 1))
    assert out.shape == projected.shape
    target = torch.arange(8) % 5 if name == "supervised" else projected.detach()
    assert method.comparison()(out, target, torch.arange(8)).ndim == 0


def test_coupling_is_declared_where_an_image_changes_anothers_loss() -> None:
    for name in METHODS:
        comparison = make_method(name, **SMALL[name]).comparison()
        online = vectors(8, 20, 0).requires_grad_()
        target = torch.arange(8) % 5 if name == "supervised" else vectors(8, 20, 1)
        index = torch.arange(8)
        whole = comparison(online, target, index)
        halves = [comparison(online[rows], target[rows], index[:4]) for rows in (slice(4), slice(4, 8))]
        separable = torch.allclose(whole, torch.stack(halves).mean(), atol=1e-5)
        assert separable != method_class(name).couples_samples, name


def test_mocov3s_heads_are_its_authors() -> None:
    """ResNets: a BatchNorm without affine part ends the projector only. ViTs: one more layer, and both have it."""
    small = make_method("mocov3", **SMALL["mocov3"]).heads(14)
    large = make_method("mocov3", **SMALL["mocov3"], layers=3, predictor_norm=True).heads(14)
    assert isinstance(small.predictor[-1], torch.nn.Linear)
    for part in (small.projector, large.projector, large.predictor):
        assert part[-1].weight is None
    linear = [sum(isinstance(layer, torch.nn.Linear) for layer in heads.projector) for heads in (small, large)]
    assert linear == [2, 3]


def test_byols_predictor_may_have_a_width_of_its_own() -> None:
    heads = make_method("byol", hidden=32, predictor_hidden=48).heads(14)
    assert (heads.projector[0].out_features, heads.predictor[0].out_features) == (32, 48)


def test_dino_freezes_its_last_layer_at_first_and_warms_its_temperature_up() -> None:
    method = DINO(hidden=16, bottleneck=8, prototypes=20, freeze_share=0.1, warm_up_share=0.5)
    heads, comparison = method.heads(14), method.comparison()
    assert isinstance(comparison, CentredCrossEntropy)
    assert isinstance(heads.projector, PrototypeHead)
    for progress, frozen, temperature in ((0.0, True, 0.04), (0.25, False, 0.055), (0.5, False, 0.07)):
        heads(vectors(4, 14, 0)).sum().backward()
        method.before_step(heads, progress)
        comparison.after_step(progress)
        assert (heads.projector.last.weight.grad is None) == frozen
        assert float(comparison.temperature) == pytest.approx(temperature)


def test_dinos_centre_does_not_move_in_evaluation() -> None:
    comparison = DINO(prototypes=10).comparison().eval()
    comparison(vectors(4, 10, 0), vectors(4, 10, 1), torch.arange(4))
    comparison.after_step(0.5)
    assert not comparison.centre.any()


def test_names_and_overrides() -> None:
    assert split_name("co-byol") == ("byol", True)
    assert split_name("dino") == ("dino", False)
    assert {"byol", "co-byol", "supervised"} <= set(names())
    assert make_method("co-byol", hidden=32).hidden == 32
    assert make_method("simclr", temperature=1).temperature == 1.0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("byoll", {}, "did you mean"),
        ("co-byoll", {}, "did you mean"),
        ("co-supervised", {}, "compares two views"),
        ("byol", {"hiden": 3}, "did you mean hidden"),
        ("byol", {"hidden": "wide"}, "expected int, got 'wide'"),
        ("byol", {"hidden": True}, "expected int, got True"),
    ],
)
def test_wrong_names_and_fields_say_what_to_do(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_method(name, **overrides)

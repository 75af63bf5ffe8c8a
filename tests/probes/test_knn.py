"""Nearest neighbours against scikit-learn, and against DINO's formula written out."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from coss_eval.errors import UsageError
from coss_eval.probes import knn


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Train features, train labels, test features of the raw digits, jittered so that no two distances tie."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.from_numpy(images).float()
    rows += 1e-2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    return rows[:1000], torch.from_numpy(labels)[:1000], rows[1000:]


@pytest.mark.parametrize("k", [1, 10, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0, float("inf")])
def test_votes_are_scikit_learns(k: int, temperature: float) -> None:
    train, labels, test = features()
    votes = knn.predict(train, labels, test, num_classes=10, k=k, temperature=temperature)
    peer = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: torch.from_numpy((1 - d) / temperature).exp().numpy()
    ).fit(train.double().numpy(), labels.numpy())
    expected = torch.from_numpy(peer.predict_proba(test.double().numpy())).float()
    torch.testing.assert_close(votes, expected, rtol=0, atol=1e-4)


def test_votes_are_dinos_formula() -> None:
    train, labels, test = features()
    similarity = torch.nn.functional.cosine_similarity(test[:50, None], train[None], dim=2)
    top, nearest = similarity.topk(20, dim=1)
    one_hot = torch.nn.functional.one_hot(labels[nearest], 10)
    expected = (one_hot * (top / 0.07).exp()[..., None]).sum(1)
    votes = knn.predict(train, labels, test[:50], num_classes=10)
    torch.testing.assert_close(votes, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = features()
    whole = knn.predict(train, labels, test, num_classes=10)
    monkeypatch.setattr(knn, "SIMILARITIES", 7_500)
    torch.testing.assert_close(knn.predict(train, labels, test, num_classes=10), whole)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2])
def test_small_temperatures_do_not_overflow(temperature: float) -> None:
    train, labels, test = features()
    votes = knn.predict(train, labels, test, num_classes=10, temperature=temperature)
    torch.testing.assert_close(votes.sum(1), torch.ones(len(test)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k must lie in 1 ... 1000"), ({"k": 1001}, "got 1001"), ({"temperature": 0.0}, "must be above 0")],
)
def test_wrong_calls(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        knn.predict(*features(), num_classes=10, **options)  # type: ignore[arg-type]

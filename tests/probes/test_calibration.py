"""Calibration against a readable reference, its identities, its intervals, and the cells and pages it is in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import coss_eval as ce
from coss_eval import reports
from coss_eval.errors import UsageError
from coss_eval.probes.calibration import Reals, calibration, calibration_error, judge, judged
from coss_eval.tasks.corruptions.task import Corruptions


def logits(n: int, classes: int = 7, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def drawn(of: Tensor, seed: int = 1) -> Tensor:
    """Labels from the probabilities themselves: a classifier that is calibrated."""
    return torch.multinomial(of.softmax(1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def reference(of: Tensor, labels: Tensor, bins: int = 15) -> tuple[float, float, float]:
    """Calibration error, negative log likelihood and Brier score, image by image, from the definitions."""
    rows = []
    for row, label in zip(of.double().tolist(), labels.tolist(), strict=True):
        p = np.exp(row) / np.exp(row).sum()
        one_hot = np.eye(len(row))[label]
        rows.append((p.max(), p.argmax() == label, -np.log(p[label]), ((p - one_hot) ** 2).sum()))
    rows.sort(key=lambda row: row[0])
    error = 0.0
    for b in range(bins):
        mine = [row for i, row in enumerate(rows) if i * bins // len(rows) == b]
        if mine:
            error += abs(sum(row[0] for row in mine) - sum(row[1] for row in mine)) / len(rows)
    return error, float(np.mean([row[2] for row in rows])), float(np.mean([row[3] for row in rows]))


@pytest.mark.parametrize("n", [5, 15, 400])
def test_all_three_equal_the_reference(n: int) -> None:
    of = logits(n)
    labels = drawn(of, seed=3)
    found = {m.metric: m for m in calibration(judged(judge(of, labels).numpy()), {"corruption": "fog"})}
    for metric, expected in zip(("ece", "nll", "brier"), reference(of, labels), strict=True):
        assert found[metric].value == pytest.approx(expected, rel=1e-5)
        assert found[metric].n == n
        assert found[metric].condition == {"corruption": "fog"}
        assert found[metric].low <= found[metric].value <= found[metric].high  # type: ignore[operator]


def test_one_image_has_no_interval_of_its_mean() -> None:
    found = {m.metric: m for m in calibration(judged(judge(logits(1), torch.tensor([2])).numpy()), {})}
    assert found["nll"].low is found["nll"].high is None


def test_identities() -> None:
    sure = torch.tensor([[30.0, 0.0], [0.0, 30.0]])
    right, wrong = (judged(judge(sure, torch.tensor(labels)).numpy()) for labels in ([0, 1], [1, 0]))
    assert right.correct.all()
    assert right.nll == pytest.approx(0, abs=1e-6)
    assert right.brier == pytest.approx(0, abs=1e-6)
    assert not wrong.correct.any()
    assert wrong.nll == pytest.approx(30)
    assert wrong.brier == pytest.approx(2)
    assert calibration_error(wrong.confidence, wrong.correct)[0] == pytest.approx(1)
    guessing = judged(judge(torch.zeros(4, 10), torch.arange(4)).numpy())
    assert guessing.nll == pytest.approx(np.log(10))
    assert guessing.brier == pytest.approx(0.9)
    extreme = judge(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([2]))
    assert extreme.isfinite().all()  # no logarithm of an underflow


def test_order_is_no_matter_but_for_ties() -> None:
    of = logits(200)
    found = judged(judge(of, drawn(of)).numpy())
    order = np.random.default_rng(0).permutation(200)
    assert calibration_error(found.confidence[order], found.correct[order])[0] == pytest.approx(
        calibration_error(found.confidence, found.correct)[0]
    )
    with pytest.raises(UsageError, match="a confidence an image"):
        calibration_error(found.confidence, found.correct[:3])


def drawn_with(error: float, seed: int, n: int = 300) -> tuple[Reals, NDArray[np.bool_]]:
    """Confidences from .5 to 1, each right ``error`` less often than it says."""
    generator = np.random.default_rng(seed)
    confidence = 0.5 + 0.5 * generator.random(n)
    return confidence, generator.random(n) < confidence - error


@pytest.mark.parametrize(("error", "bias"), [(0.0, 0.06), (0.1, 0.01)])
def test_the_interval_holds_the_error_though_the_value_is_biased(error: float, bias: float) -> None:
    found = np.array([calibration_error(*drawn_with(error, seed)) for seed in range(120)])
    assert found[:, 0].mean() > error + bias
    inside = (found[:, 1] <= error) & (found[:, 2] >= error)
    assert 0.84 <= inside.mean() <= 0.995


def test_cells_have_it_and_the_page_shows_it(tmp_path: Path) -> None:
    task = Corruptions(names=("fog", "contrast"), severities=(1, 5))
    run = ce.evaluate("pixels:8", "digits", [task], out=tmp_path, limit=200, cache=False, quiet=True)
    table = run.table()
    for metric in ("ece", "nll", "brier"):
        mine = table[table["metric"] == metric]
        assert len(mine) == 5  # clean, and two corruptions at two severities
        assert mine["value"].between(mine["low"], mine["high"]).all()
    nll = table[table["metric"] == "nll"].set_index("condition")["value"]
    assert nll["corruption=clean,severity=0"] < nll["corruption=contrast,severity=5"]
    reports.write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for expected in ("Calibration", "expected calibration error, %", "negative log likelihood, nats", "all severities"):
        assert expected in page
    fog = table[(table["metric"] == "brier") & (table["corruption"] == "fog")]["value"].mean()
    contrast = table[(table["metric"] == "brier") & (table["corruption"] == "contrast")]["value"].mean()
    assert f"{(fog + contrast) / 2:.3f}" in page[page.index("Brier score") :]

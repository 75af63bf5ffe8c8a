"""One pass over batches: predictions, scores, calibration, devices, and threads that fetch ahead."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread, current_thread

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from probes_models import make_model
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import Tensor, nn

import coss_eval as ce
from coss_eval import reports
from coss_eval.data.batches import Batch
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.probes.calibration import Reals, calibration, calibration_error, judge, judged
from coss_eval.probes.forward import ahead, predict, scores
from coss_eval.runtime.background import in_background
from coss_eval.runtime.device import busy_cores, exact_float32, resolve_device, spare_threads
from coss_eval.tasks.corruptions.task import Corruptions

CPU = torch.device("cpu")


def classifier() -> Classifier:
    model = make_model(seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(16, 10)
    return Classifier(model.backbone, head, model.preprocessing)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_are_the_classifiers_logits(digits: Dataset, batch_size: int) -> None:
    images, network = digits.test.limited(50), classifier()
    found = predict(network.train(), images.batches(batch_size=batch_size), "cpu")
    assert network.training
    network.eval()
    with torch.no_grad():
        expected = network(to_float(next(images.batches()).images))
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.ids, torch.from_numpy(images.ids))
    assert torch.equal(found.labels, torch.from_numpy(images.labels))
    assert not found.logits.is_inference()


def test_no_batches() -> None:
    with pytest.raises(CossError, match="the batches are empty"):
        predict(classifier(), [], "cpu")


def numbered(n: int) -> Iterator[Batch]:
    for i in range(n):
        yield Batch(torch.full((2, 3, 4, 4), i, dtype=torch.uint8), torch.zeros(2), torch.tensor([2 * i, 2 * i + 1]))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_batches_come_in_order_from_the_thread(n: int) -> None:
    assert [int(batch.images[0, 0, 0, 0]) for batch in ahead(numbered(n), CPU)] == list(range(n))


def test_errors_come_from_the_thread() -> None:
    def failing() -> Iterator[Batch]:
        yield from numbered(2)
        raise CossError("image 5 cannot be read")

    batches = ahead(failing(), CPU)
    assert [int(next(batches).ids[0]) for _ in range(2)] == [0, 2]
    with pytest.raises(CossError, match="image 5"):
        next(batches)


def test_processes_forked_in_the_thread_end_well() -> None:
    def exit_codes() -> Iterator[int | None]:
        for _ in range(2):
            process = multiprocessing.get_context("fork").Process(target=int)
            process.start()
            process.join(60)
            yield process.exitcode

    assert list(in_background(exit_codes())) == [0, 0]


def test_the_thread_ends_with_the_generator() -> None:
    def own() -> Iterator[Thread]:
        while True:
            yield current_thread()

    threads = in_background(own())
    first, second = next(threads), next(threads)
    assert first is second is not current_thread()
    assert first.is_alive()
    threads.close()
    assert not first.is_alive()


def test_exact_float32_gives_back_what_was_set() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(8, 500, p=np.arange(8) / 28)  # class 0 does not occur
    logits = rng.normal(size=(500, 8)) + 1.5 * np.eye(8)[labels]
    found = scores(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(8)))
    assert found["mean_per_class"] == pytest.approx(
        recall_score(labels, logits.argmax(1), labels=range(1, 8), average="macro")
    )


def test_scores_of_few_classes_have_no_top5() -> None:
    found = scores(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert found == {"top1": 0.75, "mean_per_class": pytest.approx((0.5 + 1 + 1) / 3)}


@pytest.mark.parametrize("n", [0, 3])
def test_scores_need_labels(n: int) -> None:
    with pytest.raises(UsageError, match="logits for N > 0 labels"):
        scores(torch.eye(4)[: 2 * n], torch.zeros(n, dtype=torch.int64))


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device(CPU) == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert resolve_device("cuda") == torch.ones(1).cuda().device


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used here"):
        resolve_device(name)


def random_logits(n: int, classes: int = 7, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def drawn(of: Tensor, seed: int = 1) -> Tensor:
    """Labels from the probabilities themselves: a classifier that is calibrated."""
    return torch.multinomial(of.softmax(1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def calibration_reference(of: Tensor, labels: Tensor, bins: int = 15) -> tuple[float, float, float]:
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
def test_calibration_equals_the_reference(n: int) -> None:
    of = random_logits(n)
    labels = drawn(of, seed=3)
    found = {m.metric: m for m in calibration(judged(judge(of, labels).numpy()), {"corruption": "fog"})}
    for metric, expected in zip(("ece", "nll", "brier"), calibration_reference(of, labels), strict=True):
        assert found[metric].value == pytest.approx(expected, rel=1e-5)
        assert found[metric].n == n
        assert found[metric].condition == {"corruption": "fog"}
        assert found[metric].low <= found[metric].value <= found[metric].high  # type: ignore[operator]


def test_one_image_has_no_interval_of_its_likelihood() -> None:
    found = {m.metric: m for m in calibration(judged(judge(random_logits(1), torch.tensor([2])).numpy()), {})}
    assert found["nll"].low is found["nll"].high is None


def test_calibration_of_the_sure_and_the_guessing() -> None:
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


def test_calibration_does_not_depend_on_the_order() -> None:
    of = random_logits(200)
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


@pytest.mark.slow
def test_cells_have_the_calibration_and_the_page_shows_it(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("busy", "cores", "expected"), [(0.1, 2, 2), (1.0, 2, 1), (7.9, 2, 1), (1.2, 8, 4), (6.6, 8, 1)]
)
def test_threads_are_left_to_others(busy: float, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has four threads, or two on two cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: min(cores, 4))
    assert spare_threads(busy) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert spare_threads(busy) == min(cores, 4)


def test_a_busy_core_is_seen_at_once() -> None:
    """Whatever the last minute was like."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        busy = busy_cores(1.0)
        other.kill()
    assert 0.5 < busy <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("gap", "wrong", "nll"), [(1e4, 0, 0.0), (1e4, 1, 250.0 * 2), (float("inf"), 1, float("inf"))])
def test_saturated_logits_stay_within_what_the_scores_can_be(gap: float, wrong: int, nll: float) -> None:
    """Two classes, one logit far below the other, or minus infinity as where a head leaves a class out."""
    logits = torch.tensor([[0.0, -gap]] * 40)
    labels = torch.zeros(40, dtype=torch.int64)
    labels[: 2 * wrong] = 1
    found = {m.metric: m for m in calibration(judged(judge(logits, labels).numpy()), {})}
    assert found["nll"].value == pytest.approx(nll)
    assert found["brier"].value == pytest.approx(4 * wrong / 40)
    assert (found["nll"].low is None) == (nll == float("inf"))
    for metric, most in (("nll", float("inf")), ("brier", 2.0), ("ece", 1.0)):
        low, high = found[metric].low, found[metric].high
        assert low is None or high is None or 0 <= low <= high <= most

"""One pass over batches: predictions, scores, devices, and threads that fetch ahead."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from threading import Thread, current_thread

import numpy as np
import pytest
import torch
from probes_models import make_model
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import nn

from coss_eval.data.batches import Batch
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.probes.forward import ahead, predict, scores
from coss_eval.runtime.background import in_background
from coss_eval.runtime.device import exact_float32, resolve_device

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

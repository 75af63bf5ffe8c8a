"""From a model and data to a classifier: own heads, probes, few labels, and what may be looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from probes_models import make_model
from torch import nn

from coss_eval import fit_classifier
from coss_eval.data.dataset import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.evaluation.run import evaluate
from coss_eval.models.model import Model
from coss_eval.probes import Compute, extract, few_label_probe, fitted_probe, predict, scores
from coss_eval.probes.fit import FIXED_STRENGTH, choose_probe
from coss_eval.reports.by_task import task_report
from coss_eval.reports.results import Results
from coss_eval.store import Store
from coss_eval.tasks.probe.task import Probe

ON_CPU = Compute(torch.device("cpu"))
NAMES = tuple(str(i) for i in range(10))


def own_head(classes: tuple[str, ...] | None, outputs: int = 10) -> Model:
    head = nn.Linear(16, outputs)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
        head.bias.zero_()
    return make_model(head=head, classes=classes)


def accuracy(model: Model, data: Dataset) -> float:
    classifier = fit_classifier(model, data, device="cpu")
    found = predict(classifier, data.test.batches(), "cpu")
    return scores(found.logits, found.labels)["top1"]


def test_a_probe_reads_digits_off_random_features(model: Model, digits: Dataset) -> None:
    assert accuracy(model, digits) > 0.5


def test_a_probe_classifies_as_its_features_say(model: Model, digits: Dataset) -> None:
    assert digits.train is not None
    classifier = fit_classifier(model, digits, device="cpu")
    assert not classifier.training
    assert classifier.origin.startswith("linear probe, strength ")
    probe = fitted_probe(model, digits.train, ON_CPU)
    features = extract(model, digits.test, device="cpu").values["global"]
    expected = ((features - probe.mean) / probe.std) @ probe.weight.T + probe.bias
    found = predict(classifier, digits.test.batches(), "cpu").logits
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_a_fitted_probe_is_cached(model: Model, digits: Dataset, cache_folder: Path) -> None:
    assert digits.train is not None
    first = fitted_probe(model, digits.train, ON_CPU)
    for file in cache_folder.glob("features-*"):
        file.unlink()
    again = fitted_probe(model, digits.train, ON_CPU)
    assert not list(cache_folder.glob("features-*")), "a cached probe needs no features"
    assert (again.strength, again.path) == (first.strength, first.path)
    assert all(torch.equal(getattr(again, n), getattr(first, n)) for n in ("weight", "bias", "mean", "std"))
    (file,) = cache_folder.glob("probe-*")
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(fitted_probe(model, digits.train, ON_CPU).weight, first.weight)


@pytest.mark.parametrize(
    ("classes", "outputs", "head", "expected"),
    [
        (NAMES, 10, "auto", list(range(10))),
        (NAMES[::-1], 10, "auto", list(range(9, -1, -1))),
        (("x", *NAMES, "y"), 12, "auto", list(range(1, 11))),
        (None, 10, "own", list(range(10))),
    ],
)
def test_own_heads(
    classes: tuple[str, ...] | None, outputs: int, head: str, expected: list[int], digits: Dataset
) -> None:
    model = own_head(classes, outputs)
    classifier = fit_classifier(model, digits, head=head, device="cpu")  # type: ignore[arg-type]
    assert classifier.origin.startswith("own head")
    assert model.head is not None
    images = digits.test.limited(20)
    features = extract(model, images, device="cpu").values["global"]
    found = predict(classifier, images.batches(), "cpu").logits
    torch.testing.assert_close(found, model.head(features)[:, expected].detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("classes", "head"), [(None, None), (("other", *NAMES[1:]), None), (NAMES, "probe"), (NAMES[:9], "auto")]
)
def test_heads_that_do_not_fit_give_way_to_a_probe(
    classes: tuple[str, ...] | None, head: str | None, digits: Dataset
) -> None:
    classifier = fit_classifier(own_head(classes, len(classes or NAMES)), digits, head=head, device="cpu")  # type: ignore[arg-type]
    assert classifier.origin.startswith("linear probe")


def test_no_training_split_and_no_head(model: Model, digits: Dataset) -> None:
    with pytest.raises(UsageError) as error:
        fit_classifier(model, replace(digits, train=None), device="cpu")
    message = str(error.value)
    assert "digits has no training split" in message
    assert "\n" not in message
    fit_classifier(own_head(NAMES), replace(digits, train=None), device="cpu")


class Watched(Split):
    """A split that fails when its images are read."""

    def batches(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        raise AssertionError("the test split was read")


def test_the_test_split_is_never_read(model: Model, digits: Dataset) -> None:
    test = digits.test
    watched = Watched(test.name, test.classes, test.images, test.indices, test.labels, test.ids, test.native_size)
    fit_classifier(model, replace(digits, test=watched), device="cpu", cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_few_label_probes_look_at_their_labels_alone(model: Model, digits: Dataset, fraction: float) -> None:
    """Every label outside the few is replaced by a wrong one: the probe stays the same."""
    train = digits.train
    assert train is not None
    features = extract(model, train, device="cpu")
    probe = few_label_probe(features, train, fraction, seed=3, device="cpu")
    labelled = train.few_labels(fraction, 3)
    hidden = torch.from_numpy(~np.isin(train.ids, labelled.ids))
    values = {"global": torch.where(hidden[:, None], torch.nan, features.values["global"])}
    wrong = replace(features, labels=torch.where(hidden, (features.labels + 1) % 10, features.labels), values=values)
    again = few_label_probe(wrong, train, fraction, seed=3, device="cpu")
    assert torch.equal(again.weight, probe.weight)
    assert len(labelled) == max(10, round(fraction * len(train)))
    other = few_label_probe(features, train, fraction, seed=4, device="cpu")
    assert not torch.equal(other.weight, probe.weight)


def test_a_single_label_a_class_fixes_the_strength_and_says_so(model: Model, digits: Dataset) -> None:
    assert digits.train is not None
    features = extract(model, digits.train, device="cpu")
    probe = few_label_probe(features, digits.train, 10 / len(digits.train), device="cpu")
    assert (probe.strength, probe.path) == (FIXED_STRENGTH, {})
    assert probe.describe() == "linear probe, strength 1, fixed"
    assert few_label_probe(features, digits.train, 20 / len(digits.train), device="cpu").path


def test_a_site_is_probed_by_name(model: Model, digits: Dataset) -> None:
    assert digits.train is not None
    part = digits.train.limited(300)
    features = extract(model, part, sites=("stage1", "global"), device="cpu")
    assert choose_probe(features, part, site="stage1", device="cpu").weight.shape == (10, 12)
    assert choose_probe(features, part, device="cpu").weight.shape == (10, 16)


def test_few_labels_are_drawn_several_times_and_their_spread_counts(
    model: Model, digits: Dataset, tmp_path: Path
) -> None:
    """The mean over nested label sets, each the probe of its own seed; the interval is wider than over images alone."""
    tasks = [Probe(fractions=(0.02, 0.1), draws=3)]
    run = evaluate(model, digits, tasks, out=tmp_path, device="cpu", seed=2)
    assert run.failures == ()
    cells = {cell["params"].get("labels"): cell for cell in Store(tmp_path).records() if cell["task"] == "probe"}
    assert digits.train is not None
    features, test = extract(model, digits.train, device="cpu"), extract(model, digits.test, device="cpu")
    for fraction in (0.02, 0.1):
        found = {(m["metric"], m["condition"].get("draw")): m for m in cells[fraction]["measurements"]}
        for draw in range(3):
            probe = few_label_probe(features, digits.train, fraction, seed=6 + draw, device="cpu")
            right = probe.module()(test.values["global"]).argmax(1) == test.labels
            assert found["top1", draw]["value"] == pytest.approx(right.double().mean().item())
            few, more = (digits.train.few_labels(share, 6 + draw) for share in (0.02, 0.1))
            assert set(few.ids) < set(more.ids)
        top1 = found["top1", None]
        assert top1["value"] == pytest.approx(np.mean([found["top1", draw]["value"] for draw in range(3)]))
        assert found["mean_per_class", None]["value"] == pytest.approx(top1["value"], abs=0.1)
        assert found["top5", None]["value"] > top1["value"]
    assert cells[0.02]["algorithm_version"] == 2
    assert cells[None]["algorithm_version"] == 1
    results = Results(Store(tmp_path))
    (table,) = task_report("probe").scores(results)
    few_labels = next(s for s in table.scores if s.name == "linear probe top-1, 2 % of the labels")
    assert [s.name for s in table.scores if "draw" in s.name] == []
    score = few_labels.of(results.labels[0])
    assert score is not None
    assert len(score.runs) == 3
    over_images = [run.high - run.low for run in score.runs if run.high is not None and run.low is not None]
    assert score.high is not None
    assert score.low is not None
    assert score.high - score.low > np.mean(over_images)
    assert "new label sets" in table.caption
    with pytest.raises(UsageError, match="one label set or more"):
        Probe(draws=0)

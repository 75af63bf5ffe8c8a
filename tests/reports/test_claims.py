"""Claims over seeds: the score of a run, the contrast of arms and its interval, what is said before there are seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from synthetic_runs import Writer

from coss_eval.cli.app import app
from coss_eval.errors import UsageError
from coss_eval.reports.claims import Claim, claim_lines, claims_table, finding, findings_in, scores_table, verdicts
from coss_eval.reports.results import Results
from coss_eval.statistics import contrast, holm
from coss_eval.store import Cell, Measurement, Store
from coss_eval.sweeps.report import judge

CLAIM = Claim(
    name="corruptions",
    source="table 3",
    task="corruptions",
    metric="accuracy",
    margin=0.01,
    where={"corruption": ["fog", "snow"], "severity": [1, 2], "eps": 0.1},
)


def measurement(value: float, metric: str = "accuracy", **condition: object) -> Measurement:
    return Measurement(metric, value, 60, condition={"eps": 0.1, **condition})


def test_a_score_is_the_mean_over_the_conditions_that_it_names(store: Store, writer: Callable[..., Writer]) -> None:
    run = writer("run")
    assert CLAIM.of(Results(store), "run") is None
    found = [
        measurement(0.5, corruption="fog", severity=1),
        measurement(0.3, corruption="snow", severity=2),
        measurement(0.9, corruption="frost", severity=1),
        measurement(0.9, corruption="fog", severity=3),
        measurement(0.9, "top1", corruption="fog", severity=1),
    ]
    run.put(Cell("corruptions", {"names": "all"}), found)
    run.put(Cell("probe", {}), [measurement(0.9, corruption="fog", severity=1)])
    score = CLAIM.of(Results(store), "run")
    assert score is not None
    assert score.value == pytest.approx(0.4)
    absent = replace(CLAIM, where={"corruption": ["fog", "rain"]})
    assert absent.of(Results(store), "run") is None


def test_few_labels_are_no_part_of_a_plain_score(store: Store, writer: Callable[..., Writer]) -> None:
    run = writer("run")
    run.probe()
    run.put(Cell("probe", {"labels": 0.01}), [Measurement("top1", 0.01, 60, condition={"labels": "0.01"})])
    claim = Claim(name="linear", source="", task="probe", metric="top1", margin=0.0)
    score = claim.of(Results(store), "run")
    assert score is not None
    assert score.value == run.verdicts(0).mean()


def test_two_arms_give_welchs_test() -> None:
    a, b = [0.31, 0.35, 0.29, 0.40], [0.25, 0.26, 0.27]
    found = finding(CLAIM, {"co-byol": a, "byol": b}).difference
    welch = stats.ttest_ind(a, b, equal_var=False)
    low, high = welch.confidence_interval()
    assert found is not None
    assert (found.difference, found.p) == pytest.approx((np.mean(a) - np.mean(b), welch.pvalue))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_contrast_of_four_arms_covers_as_it_should() -> None:
    """95 % of the intervals of (a - b) - (c - d) hold the truth at unequal spreads; binomial noise .35 %."""
    rng = np.random.default_rng(0)
    weights, spreads, hits = (1, -1, -1, 1), (1.0, 2.0, 0.5, 1.0), 0
    for _ in range(4000):
        groups = [(w, rng.normal(0.0, s, 4)) for w, s in zip(weights, spreads, strict=True)]
        found = contrast(groups)
        hits += found.low <= 0 <= found.high
    assert 0.935 <= hits / 4000 <= 0.972


def test_one_seed_says_nothing() -> None:
    found = finding(CLAIM, {"co-byol": [0.3, 0.4], "byol": [0.2]})
    assert found.difference is None
    table = claims_table([found], {"co-byol": 8, "byol": 8})
    assert table.rows[0].entries == ["co-byol − byol", None, "1.0", "undecided", None, "2 of 8, 1 of 8", ""]
    assert "every arm needs two seeds or more" in claim_lines([found])[2]


def test_weights_that_do_not_sum_to_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="sum to 0"):
        Claim(name="x", source="", task="probe", metric="top1", margin=0.0, contrast={"a": 1.0})
    for wrong in ({"contrast": {"a": 0.0, "b": 0.0}}, {"margin": float("nan")}):
        with pytest.raises(UsageError, match="needs a finite margin and finite weights other than 0"):
            replace(CLAIM, **wrong)


def test_a_claim_is_supported_refuted_or_open_with_what_it_still_needs() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 0.01, (2, 4))
    byol, co = 0.5 + seeds[0], 0.6 + seeds[1]
    found = [finding(replace(CLAIM, margin=margin), {"co-byol": co, "byol": byol}) for margin in (0.01, 0.5, 0.1)]
    answers = verdicts(found)
    assert [verdict for verdict, _ in answers] == ["supported", "refuted", "undecided"]
    assert [p for _, p in answers] == pytest.approx(list(holm([each.p for each in found])))
    rows = claims_table(found, {"co-byol": 8, "byol": 8}, {"co-byol": 1.0, "byol": 1.0}).rows
    assert str(rows[0].entries[3]).startswith("supported, p ")
    assert rows[0].entries[-1] == ""
    needed = found[2].needed
    assert rows[2].entries[-1] == (
        "more than 200 each" if needed is None else f"{needed} each, about {2 * (needed - 4)} hours"
    )
    three = finding(CLAIM, {"co-byol": co[:3], "byol": byol[:3]})
    assert claims_table([three]).rows[0].entries[3] == "supported"  # an interval, and no p
    assert not any("p =" in line or "p <" in line for line in claim_lines([three]))


def test_what_is_not_seen_is_said_with_the_most_that_it_may_be() -> None:
    found = finding(CLAIM, {"co-byol": [0.50, 0.52, 0.51, 0.49], "byol": [0.50, 0.51, 0.52, 0.48]})
    assert found.difference is not None
    most = max(abs(found.difference.low), abs(found.difference.high))
    lines = " ".join(claim_lines([found]))
    assert f"no difference seen, at most {100 * most:.1f}" in lines
    assert "equal" not in lines


EFFECTS = {"byol": 0.0, "co-byol": 0.25, "dino": 0.0, "co-dino": 0.0}


def two_datasets(
    store: Store, rng: np.random.Generator, effects: dict[str, float], *, images: int = 60, draws: int = 1
) -> None:
    """4 methods x 3 seeds x 2 datasets: verdicts by image from its difficulty, the method's effect and the seed's.

    Every one of the ``draws`` has seeds and images of its own.
    """
    models = [{"name": f"{method}-{seed}", "group": method, "seed": seed} for method in effects for seed in range(3)]
    store.record_run({"models": models})
    for data in ("one", "two"):
        hard = rng.normal(0.0, 0.15, (draws, images))
        for model in models:
            chance = 0.5 + effects[str(model["group"])] + rng.normal(0.0, 0.02, (draws, 1)) + hard
            right = rng.random((draws, images)) < chance
            run = Writer(store, str(model["name"]), 0.0, data=data)
            run.protocol["data"]["fingerprint"] = data
            run.ids = np.arange(images)
            run.write(Cell("probe", {"seed": 0}), [("top1", {"draw": i}, column) for i, column in enumerate(right)])


def primary(draw: int) -> list[Claim]:
    return [
        Claim(
            name=f"{co} on {data}",
            source="",
            task="probe",
            metric="top1",
            margin=0.0,
            where={"draw": draw},
            data=data,
            contrast={co: 1, base: -1},
        )
        for data in ("one", "two")
        for co, base in (("co-byol", "byol"), ("co-dino", "dino"))
    ]


def test_a_known_effect_gets_the_right_verdict(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed = primary(0)
    two_datasets(store, np.random.default_rng(1), EFFECTS, images=1000)
    found = findings_in(claimed, Results(store))
    assert [verdict for verdict, _ in verdicts(found)] == ["supported", "undecided"] * 2
    for each in found:
        assert each.difference is not None
        truth = EFFECTS["co-byol"] if "byol" in each.claim.name else 0.0
        assert each.difference.low < truth < each.difference.high
    written = {"claims": [{k: v for k, v in vars(claim).items() if k != "percent"} for claim in claimed]}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(written))
    command = ["claim", str(tmp_path / "claims.yaml"), "--results", str(store.path)]
    assert app(command, result_action="return_value") == 0
    said = capsys.readouterr().out
    assert "1 co-byol on one: SUPPORTED" in said
    assert "2 co-dino on one: UNDECIDED" in said
    for wrong, error in (({"data": None}, "needs data: one of one, two"), ({"contrast": {"x": 1, "byol": -1}}, "'x'")):
        with pytest.raises(UsageError, match=error):
            findings_in([replace(claimed[0], **wrong)], Results(store))


@pytest.mark.slow
def test_what_cannot_be_judged_is_said_in_one_line(store: Store, tmp_path: Path) -> None:
    """A claim that lacks a field, and a sweep's claims put to a folder that is none of its own."""
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [{"name": "co helps", "task": "probe"}]}))
    with pytest.raises(UsageError, match=r"claim 1 \(co helps\) lacks source, metric, margin; a claim says name"):
        judge(tmp_path / "claims.yaml", store.path)
    with pytest.raises(UsageError, match="has no run of the sweep co-claims; give what coss-eval sweep wrote"):
        judge("co-claims", tmp_path)


def test_an_arm_is_its_own_runs_and_no_other_images(store: Store) -> None:
    """A run's name is that run, not the method that it is of; and arms of other images say nothing of a method."""
    two_datasets(store, np.random.default_rng(1), EFFECTS)
    results, claimed = Results(store), primary(0)[0]
    found = findings_in([replace(claimed, contrast={"co-byol-1": 1, "byol": -1})], results)[0]
    assert found.seeds == {"co-byol-1": 1, "byol": 3}
    assert found.difference is None
    for wrong, said in (
        ({"task": "prob"}, "unknown task in the claim 'co-byol on one' 'prob'; did you mean probe"),
        ({"metric": "topp1"}, "unknown metric of probe in the claim 'co-byol on one' 'topp1'; did you mean top1"),
    ):
        with pytest.raises(UsageError, match=said):
            findings_in([replace(claimed, **wrong)], results)
    there = findings_in([replace(claimed, where={"draw": 7})], results)
    assert claim_lines(there)[2] == "    no run here has top1 of probe under draw=7"
    with pytest.raises(UsageError, match=r"has byol-0 .*data=one.* in both byol and byol-0; name arms of other runs"):
        findings_in([replace(claimed, contrast={"byol": 1, "byol-0": -1})], results)
    rows = {
        next(label for label in results.labels if label.startswith(f"{method} [data={data}")): weight
        for method, data, weight in (("co-byol", "one", 1.0), ("byol", "two", -1.0))
    }
    with pytest.raises(UsageError, match="compares scores of other images"):
        findings_in([replace(claimed, contrast=rows, data=None)], results)


@pytest.mark.slow
def test_no_effect_is_seldom_declared_one(store: Store) -> None:
    """5 % of 200 families; 16 is two standard errors above."""
    two_datasets(store, np.random.default_rng(2), dict.fromkeys(EFFECTS, 0.0), draws=200)
    results = Results(store)
    answers = [verdicts(findings_in(primary(draw), results)) for draw in range(200)]
    assert sum(any(verdict != "undecided" for verdict, _ in family) for family in answers) <= 16


def test_a_score_of_fewer_seeds_than_its_row_is_named() -> None:
    linear = Claim(name="linear", source="", task="probe", metric="top1", margin=0.0)
    scores = {"corruptions": {"a": [0.2], "b": [0.3, 0.4]}, "linear": {"a": [0.5, 0.6], "b": [0.7, 0.8]}}
    table = scores_table([CLAIM, linear], scores, ["a", "b", "c"])
    assert [row.name for row in table.rows] == ["a (2 seeds)", "b (2 seeds)", "c (0 seeds)"]
    assert "Of fewer seeds than the row's: corruptions of a (1)." in table.caption

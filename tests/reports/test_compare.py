"""Two runs compared: pairing of checkpoints, the numbers, the warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import Writer

from coss_eval.errors import CossError, UsageError
from coss_eval.reports.compare import compare, text, write
from coss_eval.reports.folders import read
from coss_eval.reports.groups import given
from coss_eval.reports.results import Results
from coss_eval.statistics import paired_difference
from coss_eval.store import Store


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Writer]:
    """A checkpoint in a run of its own (or in another's, by the run's name)."""

    def writer(run: str, name: str, skill: float, **options: object) -> Writer:
        return Writer(Store(tmp_path / run), name, skill, **options)

    return writer


def test_two_checkpoints_of_other_names_are_paired(make: Callable[..., Writer]) -> None:
    a, b = make("one", "weak", 0.2).everything(), make("two", "stronger", 1.2).everything()
    frame = compare(a.store.path, b.store.path)
    top1 = frame[(frame["task"] == "probe") & (frame["score"] == "linear probe top-1")].iloc[0]
    expected = paired_difference(b.verdicts(0), a.verdicts(0))
    assert tuple(top1[["difference", "low", "high", "p", "n"]]) == pytest.approx(tuple(expected))
    assert (top1["a"], top1["b"]) == ("weak", "stronger")
    assert (frame["p_holm"].fillna(1) >= frame["p"].fillna(0)).all()
    assert set(frame["task"]) == {"headline", "probe", "corruptions", "attacks", "internal", "redundancy"}
    assert frame.attrs["warnings"] == []
    assert "linear probe top-1" in text(frame)


def test_what_only_stands_beside_a_score_is_not_compared(make: Callable[..., Writer]) -> None:
    """The untrained network's redundancy is a reference: no difference of it, and no other metric's value for it."""
    a, b = make("one", "weak", 0.2), make("two", "stronger", 1.2)
    a.redundancy()
    b.redundancy()
    frame = compare(a.store.path, b.store.path)
    assert {"redundancy", "within", "normalised"} <= set(frame["score"].str.split(",").str[0])
    assert not frame["score"].str.contains("untrained").any()
    assert not frame.duplicated(["table", "group", "score"]).any()
    assert "stronger minus weak" in text(frame)


def test_same_names_pair_among_several(make: Callable[..., Writer]) -> None:
    for run in ("one", "two"):
        for name in ("r18", "r50"):
            make(run, name, 0.5).probe()
    folder = make("one", "x", 0).store.path.parent
    frame = compare(folder / "one", folder / "two")
    assert set(zip(frame["a"], frame["b"], strict=True)) == {("r18", "r18"), ("r50", "r50")}
    assert np.allclose(frame["difference"], 0)
    assert "r18, one" in text(frame)


def test_other_names_among_several_cannot_be_paired(make: Callable[..., Writer]) -> None:
    for run, names in (("one", "ab"), ("two", "cd")):
        for name in names:
            make(run, name, 0.5).probe()
    folder = make("one", "x", 0).store.path.parent
    with pytest.raises(UsageError, match="first run has a, b, the second c, d"):
        compare(folder / "one", folder / "two")


def test_what_makes_two_runs_hard_to_compare_is_said(make: Callable[..., Writer]) -> None:
    a, b = make("one", "m", 0.2), make("two", "m", 0.2, limit=60)
    a.corruptions(["fog"])
    b.corruptions(["fog"], backend="reference")
    a.store.record_run({"device": "cpu"})
    b.store.record_run({"device": "cuda:0"})
    with pytest.raises(UsageError, match=r"limits differ: None and 60; add --force"):
        compare(a.store.path, b.store.path)
    warnings = compare(a.store.path, b.store.path, force=True).attrs["warnings"]
    assert "limits differ: None and 60" in warnings
    assert "device types differ: cpu and cuda" in warnings
    assert "corruptions: backend differs: native and reference" in warnings


def test_a_side_that_was_measured_in_two_ways_is_compared_with_neither(make: Callable[..., Writer]) -> None:
    """Two settings in one folder leave none that all its cells share, and frost is of three severities here."""
    a, b = make("one", "m", 0.2), make("two", "m", 0.2)
    a.corruptions(["fog"], severities=[1, 2])
    a.corruptions(["frost"], severities=[1, 2, 3])
    b.corruptions(["fog", "frost"])
    with pytest.raises(UsageError, match=r"corruptions: severities differs: 1, 2.* and 1, 2, 3, 4, 5"):
        compare(a.store.path, b.store.path)


def test_other_images_give_a_difference_without_an_interval(make: Callable[..., Writer]) -> None:
    a, b = make("one", "m", 0.2), make("two", "m", 0.9)
    b.protocol["data"] = b.protocol["data"] | {"fingerprint": "beef"}
    a.probe()
    b.probe()
    frame = compare(a.store.path, b.store.path, force=True)
    assert frame["difference"].notna().all()
    assert frame[["low", "high", "p", "p_holm"]].isna().all().all()
    assert any("fingerprints" in warning for warning in frame.attrs["warnings"])


def test_runs_without_a_common_task_say_so(make: Callable[..., Writer]) -> None:
    a, b = make("one", "m", 0.2), make("two", "m", 0.9)
    a.redundancy()
    b.attacks()
    with pytest.raises(UsageError, match="no score in common"):
        compare(a.store.path, b.store.path)


def test_an_empty_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CossError, match="no finished cells"):
        compare(tmp_path, tmp_path)


def test_any_two_models_of_any_folders_are_compared(make: Callable[..., Writer], tmp_path: Path) -> None:
    for name, skill in (("weak", 0.2), ("strong", 1.2), ("other", 0.6)):
        make("one", name, skill).probe()
    store = make("one", "x", 0).store
    frame = compare(f"{store.path}::weak", f"{store.path}::strong")
    assert set(zip(frame["a"], frame["b"], strict=True)) == {("weak", "strong")}
    shown = text(frame)
    assert shown.splitlines()[0].split("  ")[:2] == ["headline, n = 60", "weak"]
    assert "compares two checkpoints, not two methods" in shown
    with pytest.raises(UsageError, match="unknown model 'wek'; did you mean weak"):
        compare(f"{store.path}::wek", store.path)
    out = tmp_path / "out"
    paths = {str(path.relative_to(out)) for path in write(frame, out)}
    assert {"comparison.md", "comparison.csv", "figures/comparison.png", "tables/1_probe.tex"} <= paths
    assert "no difference seen, at most" in text(compare(f"{store.path}::weak", f"{store.path}::weak"))


def test_methods_are_compared_over_their_seeds(make: Callable[..., Writer]) -> None:
    for number in range(6):
        run, method = ("one", "byol") if number < 3 else ("two", "co")
        writer = make(run, f"{method}-{number}", 0.2 if number < 3 else 1.4, seed=number)
        writer.probe()
        writer.store.record_run({"models": [{"name": writer.name, "group": method, "seed": number}]})
    folder = make("one", "x", 0).store.path.parent
    frame = compare(f"{folder / 'one'}::byol", f"{folder / 'two'}::co")
    assert set(frame["seeds_a"]) == set(frame["seeds_b"]) == {3}
    assert frame["low"].notna().all()
    assert frame["p"].isna().all()
    assert "  co (3 seeds)  " in text(frame)
    inside = compare(f"{folder}::byol", f"{folder}::co")  # a folder of results folders stands for all of them
    assert inside["difference"].tolist() == frame["difference"].tolist()
    with pytest.raises(UsageError, match="names no model"):
        compare(f"{folder / 'one'}::", folder / "two")


def test_names_of_several_rows_and_globs_are_paired_where_they_are_alike(make: Callable[..., Writer]) -> None:
    """Two rows a network, one a limit; what has no counterpart is said and left out."""
    for limit in (None, 60):
        for name, skill in (("net", 0.4), ("co-1", 1.0), ("co-2", 1.2)):
            make("run", name, skill, limit=limit).probe()
    make("run", "net", 0.4, limit=30, images=30).probe()
    folder = make("run", "net", 0.4).store.path
    for wanted, names in (("co-1", ["co-1"]), ("co-*", ["co-1", "co-2"])):
        frame = compare(f"{folder}::net", f"{folder}::{wanted}")
        expected = {(f"net [limit={n}]", f"{name} [limit={n}]") for n in ("null", "60") for name in names}
        assert set(zip(frame["a"], frame["b"], strict=True)) == expected
        assert [w for w in frame.attrs["warnings"] if "not compared" in w and "net [limit=30]" in w]
    with pytest.raises(UsageError, match="limits differ"):
        compare(f"{folder}::net [limit=30]", f"{folder}::co-*")
    with pytest.raises(UsageError, match=r"x\* matches no model; there are co-1"):
        compare(f"{folder}::x*", folder)


def test_labels_say_whose_runs_they_are_and_old_names_stay(make: Callable[..., Writer]) -> None:
    for number in range(6):
        method = "byol" if number < 3 else "co"
        make("one", f"{method}-seed={number}", 0.2 if number < 3 else 1.4, seed=number).probe()
    folder = make("one", "x", 0).store.path
    groups = given(["BYOL=byol-seed=*", "CO=co-seed=*"])
    frame = compare(f"{folder}::BYOL", f"{folder}::CO", groups=groups)
    assert set(frame["seeds_a"]) == set(frame["seeds_b"]) == {3}
    with pytest.raises(UsageError, match="matches no model"):
        compare(f"{folder}::BYOL", f"{folder}::CO", groups={"X": ["nothing"]})
    renamed = compare(
        f"{folder}::byol-seed=0", f"{folder}::co-*", models=["co-seed=4"], rename={"byol-seed=0": "B", "co-seed=4": "C"}
    )
    assert set(zip(renamed["a"], renamed["b"], strict=True)) == {("B", "C")}


def test_the_job_beside_results_says_whose_run_it_is(make: Callable[..., Writer], tmp_path: Path) -> None:
    """Seed 0 was evaluated when checkpoints did not tell it yet: in its study's folder it is of its method again."""
    for seed in range(3):
        writer = make(f"study/byol-seed={seed}/results", f"byol-seed={seed}", 0.4, seed=seed)
        writer.probe()
        sha256 = writer.protocol["model"]["sha256"]
        known = {"group": "byol", "seed": seed, "recipe": "abc"} if seed else {}
        writer.store.record_run({"models": [{"name": writer.name, "sha256": sha256, "arch": "resnet18"} | known]})
        config = {"method": "byol", "seed": seed, "lr": 0.1}
        (writer.store.path.parent / "job.json").write_text(json.dumps({"config": config, "sha256": sha256}))
    (store,) = read(tmp_path / "study")
    assert Results(store).labels == ["byol (3 seeds)"]
    (tmp_path / "study/byol-seed=0/job.json").write_text(
        json.dumps({"config": {"method": "byol", "seed": 0, "lr": 0.9}, "sha256": "other"})
    )
    (store,) = read(tmp_path / "study")  # a job of other weights says nothing of these
    assert Results(store).labels == ["byol-seed=0", "byol (2 seeds)"]


def test_a_choice_of_pairs_under_other_names_keeps_its_p(make: Callable[..., Writer]) -> None:
    a = make("one", "base", 0.2)
    others = [make("two", name, skill) for name, skill in (("co-1", 1.5), ("co-2", 0.1), ("x", 2.0))]
    for writer in (a, *others):
        writer.probe()
    folders = a.store.path, others[0].store.path
    whole = compare(*folders)
    some = compare(*folders, models=["x", "CO one"], rename={"co-1": "CO one"})
    assert list(dict.fromkeys(some["b"])) == ["x", "CO one"]
    columns = ["table", "score", "difference", "p_holm"]
    expected = whole[whole["b"].isin(["x", "co-1"])].sort_values("b", ascending=False, kind="stable")[columns]
    assert some[columns].values.tolist() == expected.values.tolist()
    for options, message in [({"models": ["y"]}, "unknown model"), ({"rename": {"y": "z"}}, "unknown model to rename")]:
        with pytest.raises(UsageError, match=message):
            compare(*folders, **options)


def test_on_a_narrow_terminal_differences_stay_beside_their_scores(make: Callable[..., Writer]) -> None:
    a, b = (
        make("one", "a_model_with_a_long_name", 0.2).everything(),
        make("two", "another_of_that_kind", 1.2).everything(),
    )
    shown = text(compare(a.store.path, b.store.path), 80).partition("Differences are")[0]
    assert max(map(len, shown.splitlines())) <= 80
    assert "linear probe top-1" in shown

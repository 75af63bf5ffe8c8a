"""Scores over models: rank correlations within families, which models count, what is said of few, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic_runs import IMAGES, Writer

import coss_eval as ce
from coss_eval import reports
from coss_eval.corruptions.names import BENCHMARK
from coss_eval.errors import CossError, CossWarning, UsageError
from coss_eval.evaluation.facts import locations_of
from coss_eval.reports.figures import redundancy_robustness
from coss_eval.reports.relate import relate, spearman
from coss_eval.reports.results import Results
from coss_eval.store import Cell, Measurement, Store


def model(
    path: Path, name: str, redundancy: float | None, skill: float = 0.5, arch: str = "resnet18", *, probe: bool = True
) -> Writer:
    """A checkpoint with one redundancy and, by its skill, a probe's accuracy."""
    writer = Writer(Store(path), name, skill)
    writer.protocol["model"] |= {"arch": arch, "stem": "cifar", "width": 8}
    if redundancy is not None:
        condition = {"site": "prepool", "weights": "trained"}
        found = Measurement("normalised_per_position", redundancy, IMAGES, condition=condition)
        writer.put(Cell("redundancy", condition), [found])
    if probe:
        writer.probe()
    return writer


def family(path: Path, arch: str, redundancies: Sequence[float], skills: Sequence[float]) -> None:
    for i, (value, skill) in enumerate(zip(redundancies, skills, strict=True)):
        model(path, f"{arch} {i}", value, skill, arch)


def test_spearman_is_scipys_ties_included() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (20, 9)), rng.integers(0, 5, (20, 9))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert spearman(x.astype(float), y.astype(float)) == pytest.approx(expected)
    assert np.isnan(spearman(np.ones((1, 4)), rng.random((1, 4))))


def test_models_of_other_protocols_are_told(tmp_path: Path) -> None:
    """Of the tasks that the scores are of."""
    folders = [tmp_path / str(i) for i in range(3)]
    for i, folder in enumerate(folders):
        one = model(folder, f"m{i}", i / 10)
        one.corruptions(BENCHMARK, backend="reference" if i == 1 else "native")
    said = "and may differ by that, too: corruptions: backend differs: native and reference."
    assert said in relate(folders, "redundancy", "corrupted").warnings[-1]
    assert not any(said in line for line in relate(folders, "redundancy", "kNN").warnings)


def test_two_clusters_are_no_correlation_within_families(tmp_path: Path) -> None:
    """Within each family more redundancy goes with less accuracy; together the families make it look otherwise."""
    skills = [-2.5, -2.0, -1.5, -1.0]
    family(tmp_path, "resnet18", [0.1, 0.09, 0.08, 0.07], skills)
    family(tmp_path, "resnet50", [0.9, 0.88, 0.86, 0.84], [skill + 2 for skill in skills])
    found = relate([tmp_path], "redundancy", "kNN")
    ranks = found.ranks().set_index("name")
    assert list(ranks["n"]) == [4, 4, 8, 8]
    assert ranks.loc["within families, together", "value"] == pytest.approx(-1)
    assert ranks.loc["all models, families mixed", "value"] > 0.4
    mixed = ranks.loc["all models, families mixed"]
    table = found.table()
    assert mixed["value"] == pytest.approx(spearmanr(table["x"], table["y"]).statistic)
    assert mixed["low"] < mixed["value"] < mixed["high"]
    assert np.isnan(ranks.loc["resnet18, stem cifar, width 8", "low"])  # all resamples are in perfect order
    assert not any("what it is" in line for line in found.warnings)
    one = relate([tmp_path], "redundancy", "kNN", family="none").ranks()
    assert list(one["name"]) == ["all"]


def test_a_family_stands_under_one_heading_whichever_folder_its_models_are_in(tmp_path: Path) -> None:
    family(tmp_path / "a", "resnet18", [0.1, 0.2], [0, 0.5])
    family(tmp_path / "b", "resnet50", [0.3], [0.2])
    model(tmp_path / "c", "another", 0.4, 0.8, "resnet18")
    page = relate([tmp_path / name for name in "abc"], "redundancy", "kNN").text()
    assert page.count("resnet18, stem cifar, width 8") == 2  # a correlation and a heading


def test_names_of_points_stand_clear_of_intervals(tmp_path: Path) -> None:
    """A wide interval ran through the name beside its point."""
    for i in range(3):
        found = model(tmp_path, f"model {i}", None, i / 2)
        condition = {"site": "prepool", "weights": "trained"}
        wide = Measurement("normalised_per_position", 0.2 * i, IMAGES, 0.2 * i - 0.4, 0.2 * i + 0.4, condition)
        found.put(Cell("redundancy", condition), [wide])
    figure = relate([tmp_path], "redundancy", "kNN").plot()
    figure.draw_without_rendering()
    (axis,) = figure.axes
    names = [text.get_window_extent() for text in axis.texts if text.get_text().startswith("model")]
    assert names
    assert not [name for name in names for bar in axis.lines if name.overlaps(bar.get_window_extent())]


def test_few_models_are_refused_or_said(tmp_path: Path) -> None:
    for i in range(2):
        model(tmp_path, f"m{i}", 0.1 * i)
    model(tmp_path, "no redundancy", None)
    with pytest.raises(
        UsageError, match=r"3 models or more with both 'redundancy' and 'kNN', got 2 \(m0, m1\)"
    ) as error:
        relate([tmp_path], "redundancy", "kNN")
    assert "\n" not in str(error.value)
    model(tmp_path, "m2", 0.5, arch="resnet50")
    found = relate([tmp_path], "redundancy", "kNN")
    assert any("with fewer than 8 do not rely on the interval" in line for line in found.warnings)
    assert any("No family has 3 models" in line for line in found.warnings)
    assert any("1 model lacks one of the scores" in line for line in found.warnings)
    assert list(found.ranks()["name"]) == ["all models, families mixed"]


def test_a_report_of_models_too_few_of_which_have_both_scores_is_without_their_figure(tmp_path: Path) -> None:
    for i in range(3):
        found = model(tmp_path, f"m{i}", 0.1 * i if i else None, i / 2)
        found.corruptions(BENCHMARK)
    results = Results(Store(tmp_path))
    assert len(results.labels) == 3
    assert redundancy_robustness(results) is None
    assert not [path for path in reports.write(tmp_path) if "redundancy_robustness" in path.name]


def test_the_same_weights_count_once_wherever_their_scores_are(tmp_path: Path) -> None:
    for i in range(3):
        model(tmp_path / "a", f"m{i}", 0.1 * i, probe=False)
        model(tmp_path / "b", f"m{i}", None, 0.5 * i)
    with pytest.raises(UsageError, match="unknown score 'kNN'"):
        relate([tmp_path / "a"], "redundancy", "kNN")
    found = relate([tmp_path / "a", tmp_path / "b"], "redundancy", "kNN")
    assert [m.name for m in found.models] == ["m0", "m1", "m2"]
    assert found.table()["x"].tolist() == pytest.approx([0, 0.1, 0.2])


def test_one_run_elsewhere_is_not_its_method(tmp_path: Path) -> None:
    """A method's point has no score from the folder that has its first run alone."""
    for i in range(2):
        model(tmp_path / "a", f"byol-{i}", 0.3, probe=False)
    said = [{"name": f"byol-{i}", "group": "byol", "seed": i} for i in range(2)]
    Store(tmp_path / "a").record_run({"models": said})
    for name in ("byol-0", "x", "y", "z"):
        model(tmp_path / "b", name, None if name == "byol-0" else 0.2, 0.5)
    found = relate([tmp_path / "a", tmp_path / "b"], "redundancy", "kNN")
    assert [m.name for m in found.models] == ["x", "y", "z"]
    assert any("2 models lack" in line for line in found.warnings)


def test_untrained_networks_are_left_out_and_folders_are_searched(tmp_path: Path) -> None:
    for i in range(4):
        folder = tmp_path / f"run{i}" / "results"
        model(folder, f"m{i}", 0.1 * i, 0.3 * i)
        layout = "untrained" if i == 3 else "dino"
        Store(folder).record_run({"models": [{"name": f"m{i}", "layout": layout}]})
    found = relate([tmp_path], "redundancy", "kNN")
    assert [m.name for m in found.models] == ["m0", "m1", "m2"]
    assert "1 untrained network is left out: it would be a cluster of its own." in found.warnings


@pytest.mark.slow
def test_tasks_stand_for_their_first_column_and_the_page_says_what_follows(tmp_path: Path) -> None:
    for i in range(3):
        writer = model(tmp_path / "run", f"m{i}", 0.1 * i, 0.4 * i, "rf29_resnet18", probe=False)
        writer.corruptions(BENCHMARK)
    found = ce.relate(tmp_path / "run")
    assert (found.x.name, found.y.name) == ("redundancy", "corrupted")
    table = found.table()
    assert set(table["receptive_field"]) == {29.0}
    assert set(table["locations"]) == {64}  # 8 x 8 at 64 px
    assert (table["clean"] > 0.4).all()
    written = {str(path.relative_to(tmp_path / "out")) for path in found.write(tmp_path / "out")}
    assert written >= {"relate.csv", "correlations.csv", "report.md", "report.html", "figures/relate.png"}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "explains damage inside the network at most" in page
    assert "1 of 3 cases" in page


def test_a_task_without_a_headline_score_is_said(tmp_path: Path) -> None:
    """Of five corruptions there is no mean, nor a column each; of two, the first stands for the task."""
    few, some = BENCHMARK[:2], BENCHMARK[:5]
    for names, folder in ((few, "few"), (some, "some")):
        for i in range(3):
            model(tmp_path / folder, f"m{i}", 0.1 * i, 0.4 * i, probe=False).corruptions(names)
    found = relate([tmp_path / "few"], "redundancy", "corruptions")
    assert found.y.name == few[0].replace("_", " ")
    with pytest.raises(UsageError, match="corruptions has no score in the headline of these folders; give one"):
        relate([tmp_path / "some"], "redundancy", "corruptions")


def test_locations_of_networks_known_by_name_alone() -> None:
    resnet = locations_of({"arch": "resnet18", "stem": "cifar", "width": 8}, 32)
    assert resnet is not None
    assert (resnet.receptive_field, resnet.number) == (109, 16)
    vit = locations_of({"arch": "vit_d24_l1_h2_p8", "img_size": 32}, 32)
    assert vit is not None
    assert (vit.receptive_field, vit.number) == (float("inf"), 16)
    for unknown in ({"arch": "somebodys.module:factory"}, {"arch": "pixels:32"}, {}):
        assert locations_of(unknown, 32) is None


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ("redundancy", "corruption", "corruption"),
        ("redundancy", "redundancy", "both 'redundancy'"),
    ],
)
def test_wrong_scores_are_one_line(tmp_path: Path, x: str, y: str, message: str) -> None:
    model(tmp_path, "m", 0.1)
    with pytest.raises(UsageError, match=message) as caught:
        relate([tmp_path], x, y)
    assert "\n" not in str(caught.value)


def test_all_in_results_may_be_given_with_what_has_no_cells(tmp_path: Path) -> None:
    """README's results/* names the folders of heatmaps and of leaderboards too."""
    family(tmp_path / "study", "resnet18", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    (tmp_path / "heatmaps-photos").mkdir()
    with pytest.warns(CossWarning, match="left out, without finished cells: .*heatmaps-photos"):
        found = relate(sorted(tmp_path.iterdir()), "redundancy", "kNN")
    assert len(found.table()) == 3


def test_wrong_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which models"):
        relate([])
    with pytest.raises(CossError, match="no finished cells"):
        relate([tmp_path])
    with pytest.raises(CossError, match="there is no folder"):
        relate([tmp_path / "absent"])
    with pytest.raises(UsageError, match="family 'method'"):
        relate([tmp_path], family="method")  # type: ignore[arg-type]

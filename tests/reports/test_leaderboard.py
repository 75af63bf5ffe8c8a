"""Several results folders on one page: who stands beside whom, ranks against a slow reference, gaps, offline."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from synthetic_runs import Writer

from coss_eval.corruptions.names import NAMES
from coss_eval.errors import CossError, UsageError
from coss_eval.reports import leaderboard, write, write_leaderboard
from coss_eval.reports.estimates import difference
from coss_eval.reports.folders import Folders, results_folders
from coss_eval.reports.leaderboard import Board, boards, clearly_better
from coss_eval.statistics import all_pairs, holm, paired_difference
from coss_eval.store import Store


def measured(folder: Path, name: str, skill: float, **options: int) -> Writer:
    """A results folder with one model, its run recorded."""
    writer = Writer(Store(folder), name, skill, **options)
    model = {"name": name, "sha256": writer.protocol["model"]["sha256"], "arch": "resnet18"}
    writer.store.record_run({"started": "2025-01-01T00:00:00+0000", "command": "", "models": [model]})
    return writer


def seeds(folder: Path, method: str, skill: float, count: int) -> None:
    """A results folder with so many runs of one method."""
    models = []
    for seed in range(count):
        writer = Writer(Store(folder), f"{method}-{seed}", skill, seed=seed)
        writer.probe()
        own = {"sha256": writer.protocol["model"]["sha256"], "arch": "resnet18"}
        models.append(own | {"name": f"{method}-{seed}", "group": method, "seed": seed, "recipe": "r"})
    Store(folder).record_run({"started": "2025-01-01T00:00:00+0000", "command": "", "models": models})


def rows_of(path: Path) -> list[list[str]]:
    return [*csv.reader(path.read_text().splitlines())]


def of(root: Path) -> list[Board]:
    return boards(Folders.of(results_folders([root])))


def test_p_of_all_pairs_is_that_of_each_pair() -> None:
    draw = np.random.default_rng(0)
    verdicts = (draw.random((40, 5)) < [0.2, 0.5, 0.5, 0.9, 1.0]).astype(float)
    verdicts[:, 2] = np.maximum(verdicts[:, 1], verdicts[:, 2])  # all that differ go one way
    means = np.column_stack([draw.random((40, 3)), verdicts[:, :2], verdicts[:, 0]])  # the last one equals another
    for values in (verdicts, means, np.ones((6, 2)), draw.random((1, 2))):
        found = all_pairs(values)
        assert np.isnan(np.diag(found)).all()
        for i, j in combinations(range(values.shape[1]), 2):
            expected = paired_difference(values[:, i], values[:, j]).p
            assert found[[i, j], [j, i]] == pytest.approx([expected] * 2, rel=1e-9, nan_ok=True)


def test_ranks_are_those_of_each_comparison_by_itself(tmp_path: Path) -> None:
    """Against what each pair shows by ``difference``, Holm over the whole table."""
    for name, skill in (("poor", -2.0), ("good", 1.0), ("alike", 1.1), ("best", 4.0)):
        writer = measured(tmp_path / name, name, skill)
        writer.probe()
        writer.attacks()
    (board,) = of(tmp_path)
    labels = [*board.called]
    pairs = [(c, a, b) for c in board.columns for a, b in combinations(labels, 2)]
    found = [difference(c.of(a), c.of(b)) for c, a, b in pairs]
    p = holm([one.p for one in found if one is not None])
    for column, better in zip(board.columns, clearly_better(board.columns, labels), strict=True):
        expected = np.zeros((4, 4), dtype=bool)
        for (of_, a, b), one, p_ in zip(pairs, found, p, strict=True):
            if of_ is column and one is not None and p_ < 0.05:
                first, last = (a, b) if one.difference > 0 else (b, a)
                expected[labels.index(first), labels.index(last)] = True
        assert (better == expected).all()
    ranks = dict(zip(labels, board.ranks(labels)["PGD 0.5/255"], strict=True))
    assert ranks == {"best": "1", "alike": "2 to 3 tied", "good": "2 to 3 tied", "poor": "4"}


def test_a_gap_is_shown_and_never_averaged_over(tmp_path: Path) -> None:
    measured(tmp_path / "whole", "whole", 0.5).corruptions()
    measured(tmp_path / "part", "part", 0.9).corruptions([name for name in NAMES if name != "frost"])
    (board,) = of(tmp_path)
    columns = {column.name: column for column in board.columns}
    assert columns["clean top-1"].of("part") is not None
    assert columns["corrupted"].of("part") is None
    whole = board.ranks(["part", "whole"])
    assert whole["corrupted"] == [None, "1"]
    page = write_leaderboard([tmp_path], tmp_path / "out")[0].read_text()
    assert page.count('class="gap"') == 2  # corrupted, as a score and as a rank


def test_other_images_and_other_settings_are_never_ranked_together(tmp_path: Path) -> None:
    """A limit makes another table, a backend another column; the clean images, which know none, are one column."""
    measured(tmp_path / "a", "a", 0.5).corruptions()
    measured(tmp_path / "b", "b", 0.6).corruptions(backend="reference")
    measured(tmp_path / "c", "c", 0.7, limit=60).corruptions()
    found = of(tmp_path)
    assert [board.title for board in found] == ["tiny", "tiny, limit 60"]
    columns = {column.name: column for column in found[0].columns}
    assert {"clean top-1", "corrupted [backend native]", "corrupted [backend reference]"} <= set(columns)
    assert columns["corrupted [backend native]"].of("a") is not None
    assert columns["corrupted [backend native]"].of("b") is None
    assert found[0].ranks(["a", "b"])["corrupted [backend reference]"] == [None, "1"]


def test_one_network_in_two_folders_is_one_row_and_two_of_one_name_are_two(tmp_path: Path) -> None:
    measured(tmp_path / "one", "r18", 0.5).probe()
    measured(tmp_path / "two", "r18", 0.5).attacks()
    (board,) = of(tmp_path)
    assert [*board.called] == ["r18"]
    assert {"kNN", "PGD 0.5/255"} <= {column.name for column in board.columns}
    other = Writer(Store(tmp_path / "three"), "r18", 2.0)
    other.protocol["model"]["sha256"] = "beef" * 16
    other.probe()
    other.store.record_run({"started": "2025", "models": [{"name": "r18", "sha256": "beef" * 16, "arch": "resnet18"}]})
    (board,) = of(tmp_path)
    assert next(iter(board.called)) == "r18 (beefbeef)"
    assert len(board.called) == 2


def test_a_method_of_several_seeds_is_a_row_and_cannot_be_told_from_a_checkpoint(tmp_path: Path) -> None:
    seeds(tmp_path / "strong", "strong", 2.0, 4)
    seeds(tmp_path / "weak", "weak", -2.0, 4)
    measured(tmp_path / "alone", "alone", -9.0).probe()
    (board,) = of(tmp_path)
    labels = ["strong (4 seeds)", "weak (4 seeds)", "alone"]
    assert sorted(board.called) == sorted(labels)
    assert board.ranks(labels)["linear probe"] == ["1 to 2 tied", "2 to 3 tied", "1 to 3 tied"]


def test_models_are_chosen_ordered_and_renamed_and_their_ranks_stay(tmp_path: Path) -> None:
    for name, skill in (("co-poor", -2.0), ("co-good", 1.0), ("best", 4.0)):
        measured(tmp_path / name, name, skill).probe()
    out = tmp_path / "out"
    write_leaderboard([tmp_path], out, models=["co-*"])
    rows = [row[1] for row in rows_of(out / "tables" / "scores_1.csv")[1:]]
    assert rows == ["co-good", "co-poor"]
    assert "co-good,2," in (out / "tables" / "ranks_1.csv").read_text()
    write_leaderboard([tmp_path], out, models=["CO (ours)", "best"], rename={"co-poor": "CO (ours)"})
    rows = [row[1] for row in rows_of(out / "tables" / "scores_1.csv")[1:]]
    assert rows == ["CO (ours)", "best"]
    again = {"models": ["co-good"], "rename": {"co-good": "Ours"}}  # the old name chooses, too
    assert "Ours" in write_leaderboard([tmp_path], tmp_path / "again", **again)[0].read_text()
    wrong = [({"models": ["co-god"]}, "did you mean co-good"), ({"models": ["x*"]}, "x\\* matches no model; there are")]
    wrong += [({"rename": {"co": "x"}}, "unknown model to rename"), ({"rename": {"best": "co-poor"}}, "two models")]
    wrong += [({"groups": {"CO": ["c-*"]}}, "matches no model")]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            write_leaderboard([tmp_path], out, **options)
    with pytest.raises(CossError, match=r"no finished cells in .*out"):
        write_leaderboard([out], out)


def test_a_report_shows_a_choice_under_other_names_with_the_p_of_all(tmp_path: Path) -> None:
    for name, skill in (("a", -1.0), ("b", 1.0), ("c", 0.0), ("d", 0.1)):
        measured(tmp_path / "run", name, skill).probe()
    write(tmp_path / "run")
    before = rows_of(tmp_path / "run" / "tables" / "probe_differences.csv")
    write(tmp_path / "run", models=["a", "B!"], rename={"b": "B!"}, baseline="a")
    after = rows_of(tmp_path / "run" / "tables" / "probe_differences.csv")
    assert after[0][2:] == ["B!", "B! low", "B! high", "B! p"]
    assert [row[2:] for row in after[1:]] == [row[2:6] for row in before[1:]]
    assert "| c |" not in (tmp_path / "run" / "report.md").read_text().partition("## Provenance")[0]
    with pytest.raises(UsageError, match="unknown model"):
        write(tmp_path / "run", models=["z"])


def test_a_baseline_that_lacks_a_task_is_said_where_its_differences_would_be(tmp_path: Path) -> None:
    for name in ("base", "other", "third"):
        writer = measured(tmp_path / "run", name, 0.5)
        writer.probe()
        if name != "base":
            writer.attacks()
    write(tmp_path / "run", baseline="base")
    page = (tmp_path / "run" / "report.md").read_text()
    line = "No differences: the baseline base is not among these; --baseline names another."
    assert page.count(line) == 1
    write(tmp_path / "run", baseline="other")
    assert line not in (tmp_path / "run" / "report.md").read_text()


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_needs_no_other_file_and_can_be_narrowed_to_a_protocol(tmp_path: Path) -> None:
    measured(tmp_path / "a", "<script>alert(1)</script>", 0.5).probe()
    measured(tmp_path / "b", "b", 0.5, limit=60).probe()
    page = write_leaderboard([tmp_path], tmp_path / "out")[0].read_text()
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert text.startswith("# coss-eval leaderboard")
    assert all(f"## Protocol {number}: tiny" in text for number in (1, 2))
    links = Links()
    links.feed(page)
    assert all(link.startswith(("#", "data:", "tables/")) for link in links.found)
    assert "alert(1)</script>" not in page
    ids = re.findall(r'<section id="(protocol-[^"]+)"', page)
    assert len(ids) == 2
    assert leaderboard.SCRIPT in page
    assert "may be tied" in page
    if (node := which("node")) is not None:
        script = leaderboard.SCRIPT.partition("<script>")[2].partition("</script>")[0]
        (tmp_path / "script.js").write_text(script)
        subprocess.run([node, "--check", tmp_path / "script.js"], check=True)


@pytest.mark.slow
def test_fifty_models_take_ten_seconds_and_no_torch(tmp_path: Path) -> None:
    for number in range(50):
        measured(tmp_path / f"{number}", f"m{number:02}", number / 20).everything()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom coss_eval.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
        "status = Path('/proc/self/status')\n"
        "peak = status.read_text().partition('VmHWM:')[2].split()[0] if status.exists() else 0\n"
        "print(time.process_time(), peak)"
    )
    call = [sys.executable, "-c", code, "report", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, kibibytes = map(float, done.stdout.split()[-2:])
    assert seconds < 10
    assert kibibytes < 500 * 1024
    assert (tmp_path / "out" / "tables" / "ranks_1.csv").read_text().count("\n") == 51

"""The whole report on disk: files, HTML that stands alone, errors, and nothing heavy imported."""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from synthetic_runs import CHANCE, Writer

from coss_eval import reports
from coss_eval.corruptions.names import BENCHMARK
from coss_eval.errors import CossError, UsageError
from coss_eval.reports.drawing import MANY, looks, looks_in, style
from coss_eval.reports.figures import draw
from coss_eval.reports.html import COLOURS
from coss_eval.reports.results import Results
from coss_eval.store import Cell, Measurement, Store
from coss_eval.tasks.corruptions.report import by_mean_severity, by_severity

FIGURES = [
    "attacks_by_eps",
    "corruptions_by_severity",
    "corruptions_mean",
    "corruptions_differences",
    "forest",
    "internal_by_level",
    "redundancy",
]


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for the tests that only read it: drawing takes seconds."""
    store = Store(tmp_path_factory.mktemp("report") / "run")
    Writer(store, "b", 0.5).everything()
    Writer(store, "untrained <b> & co", -1.0).everything()
    return store


@pytest.fixture(scope="module")
def written(module_store: Store) -> list[Path]:
    return reports.write(module_store.path)


class Checker(HTMLParser):
    """Open and close tags must match; notes every address the page refers to."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_everything_is_written_and_named(module_store: Store, written: list[Path]) -> None:
    names = {str(path.relative_to(module_store.path)) for path in written}
    assert {
        "report.md",
        "report.html",
        "tables/measurements.csv",
        "tables/headline.csv",
        "tables/headline.tex",
    } <= names
    assert {f"figures/{name}.png" for name in FIGURES} <= names
    assert all(path.stat().st_size > 0 for path in written)


def test_html_stands_alone_and_is_well_formed(module_store: Store, written: list[Path]) -> None:
    page = (module_store.path / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    outside = [source for source in checker.sources if not source.startswith(("data:image/png;base64,", "#"))]
    assert outside
    assert all((module_store.path / source).is_file() for source in outside)  # each table's file
    assert page.count("<img") == len(FIGURES)
    assert "untrained <b>" not in page
    assert "untrained &lt;b&gt; &amp; co" in page


def test_the_headline_stands_on_its_side_where_it_is_wide(module_store: Store, written: list[Path]) -> None:
    page = (module_store.path / "report.html").read_text()
    headline = page[: page.index('id="probes"')]
    assert '<th scope="col" class="number">b</th>' in headline
    assert '<tr><th scope="row">redundancy, untrained</th>' in headline


def test_colours_say_better_or_worse(module_store: Store, written: list[Path]) -> None:
    page = unescape((module_store.path / "report.html").read_text())
    error = page[page.index('id="table-corruptions_error_differences"') :].split("</section>")[0]
    cells = re.findall(r'<td class="signed( \w+)?" data-value="[^"]*"><b>(.)', error)
    assert cells == [(" worse", "+"), (" worse", "+")]
    coloured = [part for part in page.split("</table>") if re.search('class="signed (better|worse|clear)"', part)]
    assert page.count(COLOURS) == len(coloured) > 1
    redundancy = page[page.index('id="table-redundancy_differences"') :].split("</section>")[0]
    assert not re.search("signed (better|worse)", redundancy)


def test_markdown_links_figures_that_exist(module_store: Store, written: list[Path]) -> None:
    page = (module_store.path / "report.md").read_text()
    links = re.findall(r"\]\((figures/[^)]+)\)", page)
    assert len(links) == len(FIGURES)
    assert all((module_store.path / link).exists() for link in links)
    assert page.index("## Verdict") < page.index("## Probes") < page.index("## Provenance")


def test_measurements_csv_has_every_number(module_store: Store, written: list[Path]) -> None:
    with (module_store.path / "tables" / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(record["measurements"]) for record in module_store.records())


@pytest.mark.slow
def test_the_same_store_gives_the_same_report(module_store: Store, written: list[Path], tmp_path: Path) -> None:
    again = {path.name: path for path in reports.write(module_store.path, out=tmp_path)}
    for path in written:
        assert again[path.name].read_bytes() == path.read_bytes(), path.name


def test_a_report_draws_anew_what_was_drawn_for_print(store: Store, writer: Callable) -> None:
    """Else an old figure would stay beside the new numbers."""
    writer("b").corruptions(["fog"])
    folder = store.path / "figures"

    def kinds() -> list[str]:
        return sorted(path.suffix for path in folder.glob("corruptions_by_severity.*"))

    reports.write(store.path)
    assert kinds() == [".png"]
    (folder / "corruptions_by_severity.pdf").write_bytes(b"old")
    reports.write(store.path)
    assert kinds() == [".pdf", ".png"]
    assert (folder / "corruptions_by_severity.pdf").read_bytes().startswith(b"%PDF")


def test_lines_too_many_to_tell_apart_are_one_collection_with_the_same_scale(store: Store, writer: Callable) -> None:
    for i in range(MANY + 3):
        writer(f"m{i}", 0.1 * i).corruptions(["fog"])
    figure = draw(Results(store), "corruptions_by_severity")
    axis = figure.axes[0]
    assert len([line for line in axis.lines if line.get_gid() != "chance"]) == MANY
    (pale,) = [found for found in axis.collections if isinstance(found, LineCollection)]
    assert len(pale.get_segments()) == 3
    low, high = axis.get_ylim()
    assert all(low <= y <= high for segment in pale.get_segments() for _, y in segment)


def test_the_headline_for_a_terminal(module_store: Store) -> None:
    lines = reports.headline_text(module_store).splitlines()
    assert lines[0].split() == ["n", "=", "60", "b", "untrained", "<b>", "&", "co"]
    assert any(line.startswith("clean top-1 %") for line in lines)


def test_figures_leave_the_caller_s_matplotlib_alone(module_store: Store) -> None:
    before = dict(mpl.rcParams)
    with mpl.rc_context({"lines.linewidth": 9.0}):
        with style():
            assert mpl.rcParams["lines.linewidth"] < 2
        assert mpl.rcParams["lines.linewidth"] == 9.0
    assert dict(mpl.rcParams) == before


@pytest.mark.slow
def test_a_gap_breaks_the_line(full: Store) -> None:
    results = Results(full)
    with style():
        mean = by_mean_severity(results)
        panels = by_severity(results)
    assert mean is not None
    assert "a_1" in mean.axes[0].get_title(loc="left")  # left out, and said so
    assert panels is not None
    frost = next(axis for axis in panels.axes if axis.get_title(loc="left") == "frost")
    finite = [sum(y == y for y in line.get_ydata()) for line in frost.lines if line.get_gid() != "chance"]
    chance = [set(line.get_ydata()) for line in frost.lines if line.get_gid() == "chance"]
    assert chance == [{100 * CHANCE}]
    assert finite == [6, 1]  # the second has its clean accuracy only


def test_long_names_stay_inside_the_figure_and_apart(store: Store, writer: Callable) -> None:
    names = [f"untrained rf_resnet18_k4-4-1-0_mlp2x512_v1 (seed {seed})" for seed in range(4)]
    for name in names:
        writer(name).corruptions()
    for name in (f"left-out-rf_resnet34_k6-4-1-0_mlp2-{i}" for i in range(4)):
        writer(name).corruptions(BENCHMARK[:2])
    results = Results(store)
    with style():
        figure = by_mean_severity(results)
        assert figure is not None
        figure.draw_without_rendering()
    axis = figure.axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    title = next(text for text in axis.findobj(Text) if text.get_text().startswith("left out"))
    for box in (*boxes, title.get_window_extent()):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    assert axis.get_position().width > 0.4


def test_legends_name_what_is_drawn_and_looks_stay_the_same(store: Store, writer: Callable) -> None:
    for name in ("a", "b", "c"):
        writer(name).probe()
    writer("b").corruptions()
    results = Results(store)
    with style():
        figure = by_severity(results)
        look = looks(results.labels)["b"]
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b"]
    assert figure.legends[0].get_lines()[0].get_color() == figure.axes[0].lines[0].get_color() == look.color


def test_looks_differ_and_untrained_networks_are_grey() -> None:
    with style():
        found = looks([f"m{i}" for i in range(15)] + ["r18"], untrained=["r18"])
    assert len(set(found.values())) == 16
    assert found["r18"].color == "#8a8a8a"


def test_what_is_untrained_is_not_told_by_a_name(store: Store, writer: Callable) -> None:
    models = [{"name": "untrained_then_tuned", "layout": "timm"}, {"name": "resnet18 (seed 0)", "layout": "untrained"}]
    store.record_run({"models": models})
    for model in models:
        writer(model["name"]).probe()
    results = Results(store)
    assert results.labels == ["untrained_then_tuned", "resnet18 (seed 0)"]
    assert results.untrained == {"resnet18 (seed 0)"}
    with style():
        assert {
            label for label, look in looks_in(results, "probe").items() if look.color == "#8a8a8a"
        } == results.untrained


def test_a_store_of_one_task_is_enough(store: Store, writer: Callable) -> None:
    writer("m").redundancy()
    names = {path.name for path in reports.write(store.path)}
    assert "redundancy.png" in names
    assert "corruptions_mean.png" not in names


def test_a_store_without_a_headline_is_enough(store: Store, writer: Callable) -> None:
    condition = {"attack": "representation:knn", "norm": "linf", "eps": 0.01}
    cell = Cell("attacks", {"attack": "representation"})
    writer("m").put(cell, [Measurement("moved", 0.4, 60, 0.3, 0.5, condition)])
    names = {path.name for path in reports.write(store.path)}
    assert "attacks_representation.tex" in names
    assert not {"headline.tex", "attacks.tex"} & names
    assert reports.headline_text(store).startswith("attacks: nothing measured that the headline shows")


def test_no_cells_is_one_line(tmp_path: Path) -> None:
    for call in (lambda: reports.write(tmp_path), lambda: reports.headline_text(Store(tmp_path))):
        with pytest.raises(CossError, match="no finished cells in"):
            call()


def test_an_unknown_baseline_writes_nothing(module_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown baseline"):
        reports.write(module_store.path, out=tmp_path / "new", baseline="nobody")
    assert not (tmp_path / "new").exists()


def test_an_unwritable_out_is_one_line(module_store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CossError, match="give another --out"):
        reports.write(module_store.path, out=tmp_path / "file" / "report")


@pytest.mark.slow
def test_reports_import_no_torch_and_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, coss_eval.reports; print({'torch', 'pandas', 'matplotlib'} & set(sys.modules));"
        "import coss_eval.reports.compare, coss_eval.reports.figures, coss_eval.reports.html;"
        "import coss_eval.reports.gallery, coss_eval.reports.sweeps;"
        "from coss_eval.reports.by_task import task_report; from coss_eval.tasks import built_in;"
        "print('torch' in sys.modules, len([task_report(e.name) for e in built_in()]) > 5, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\nFalse True False\n"

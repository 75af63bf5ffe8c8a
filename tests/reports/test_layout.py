"""Numbers and tables in each of their forms."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import Writer

from coss_eval.errors import UsageError
from coss_eval.reports import document
from coss_eval.reports.latex import PAGES, escape, latex, text_width
from coss_eval.reports.layout import (
    GAP,
    Number,
    Row,
    Table,
    broken,
    markdown,
    narrow,
    text,
    to_csv,
    transposed,
    with_best,
)
from coss_eval.reports.methods import BIBLIOGRAPHY, methods, references
from coss_eval.reports.results import Results
from coss_eval.store import Store

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (Number(0.7613, 0.752, 0.77), "76.1 [75.2, 77.0]"),
        (Number(0.7613), "76.1"),
        (Number(0.7613, math.nan, math.nan), "76.1"),
        (Number(1.0, 0.99, 1.0), "100.0 [99.0, 100.0]"),
        (Number(0.032, 0.011, 0.053, p=0.0123, signed=True), "+3.2 [+1.1, +5.3] p = .012"),
        (Number(-0.032, -0.053, -0.011, p=1e-9, signed=True), "−3.2 [−5.3, −1.1] p < .001"),
        (Number(-0.0001, signed=True, p=1.0), "−0.01 p = 1.000"),
        (Number(-0.000408, -0.0012, 0.0004, signed=True), "−0.04 [−0.1, +0.04]"),
        (Number(0.0, -0.0, 1e-17, signed=True), "0.0 [0.0, 0.0]"),
        (Number(-0.00004, unit="plain"), "−0.00004"),
        (Number(0.4321, 0.4, 0.5, "plain"), "0.432 [0.400, 0.500]"),
        (Number(35.217, unit="plain"), "35.22"),
        (Number(180.66, unit="plain"), "180.7"),
    ],
)
def test_numbers(number: Number, shown: str) -> None:
    assert str(number) == shown


TABLE = Table(
    "probe",
    "Probes",
    "accuracy %, n = 100, limit",
    ["r18_a", "50 % | x"],
    [
        Row("top-1", [Number(0.5, 0.4, 0.6), None]),
        Row("fog", [Number(0.25), Number(-0.01, -0.02, 0.0, p=0.04, signed=True)], "weather"),
        Row("snow", [Number(0.2), "own head"], "weather"),
    ],
    "Caption.",
)


def test_gaps_are_counted() -> None:
    assert TABLE.gaps == 1
    assert TABLE.footnote == f"Caption. 1 of 6 not measured ({GAP})."
    assert transposed(TABLE).gaps == 1


def test_a_part_of_a_split_table_may_be_all_gaps_in_a_column() -> None:
    rows = [Row(f"row {i}", [Number(0.5), Number(0.25) if i == 0 else None]) for i in range(150)]
    whole = latex(Table("long", "Long", "value", ["a", "b"], rows))
    specs = re.findall(r"\\begin\{tabular\}\{@\{\}(l\S+)@\{\}\}", whole)
    assert len(specs) > 1
    assert specs[0].count("S[") == 2
    assert all(spec.count("S[") == 1 and spec.endswith("c") for spec in specs[1:])


def test_markdown_is_a_table_of_one_width() -> None:
    lines = markdown(TABLE).splitlines()
    assert lines[0] == "| accuracy %, n = 100, limit | r18_a | 50 % \\| x |"
    assert lines[1] == "|:--|--:|--:|"
    assert lines[3] == "| *weather* |  |  |"
    words = Table("runs", "Runs", "started", ["command", "n"], [Row("now", ["`coss-eval list`", Number(1.0)])])
    assert markdown(words).splitlines()[1] == "|:--|:--|--:|"
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}


def test_text_is_aligned() -> None:
    lines = text(TABLE).splitlines()
    assert len({len(line) for line in lines if not line.startswith("weather")}) == 1
    assert lines[-1].startswith("  snow")


def decimals(shown: str) -> Counter[str]:
    """The words with a decimal point or a bracket."""
    return Counter(word for word in shown.split() if {".", "[", "]"} & set(word))


def test_differences_that_stand_are_coloured_as_in_html() -> None:
    """Blue for the better, orange for the worse, whichever way is better; columns stay aligned without the codes."""
    worse = Number(0.03, 0.01, 0.05, p=0.001, signed=True, lower_is_better=True)
    better, unclear = replace(worse, lower_is_better=False), replace(worse, p=0.2)
    table = Table("t", "T", "points", ["a", "b"], [Row("x", [worse, better]), Row("y", [unclear, Number(0.5)])])
    for width in (None, 30):
        shown = text(table, width, coloured=True)
        assert re.findall(r"\x1b\[1;(\d+)m\+3\.0", shown) == ["33", "34"]
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == text(table, width)
    assert better.side == "better"
    assert replace(better, unit="plain").side == "clear"  # redundancy: neither better nor worse


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_gets_blocks_with_every_entry(width: int) -> None:
    """Nothing is cut or lost: each row's name in every block, heads broken between words, headings on their own."""
    columns = ["untrained resnet18 (seed 0)", "byol", "co-byol", "simclr"]
    rows = [Row(f"row {i}", [Number(0.1 * i + 0.01 * j, 0, 0.9) for j in range(4)], "noise") for i in range(3)]
    table = Table("t", "T", "accuracy %, n = 9", columns, rows)
    shown = text(table, width)
    assert max(map(len, shown.splitlines())) <= width < max(map(len, text(table).splitlines()))
    assert decimals(shown) == decimals(text(table))
    blocks = shown.split("\n\n")
    assert width < 80 or len(blocks) == 1  # intervals below their numbers, all four beside one another
    assert all(block.count(f"  {row.name}") == 1 for block in blocks for row in rows)
    assert set(" ".join(columns).split()) <= set(shown.split())
    assert text(table, 200) == text(table)


def test_csv_reads_back() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows[0][:6] == ["group", "accuracy %, n = 100, limit", "r18_a", "r18_a low", "r18_a high", "r18_a p"]
    assert rows[1] == ["", "top-1", "50", "40", "60", "", "", "", "", ""]
    assert rows[2] == ["weather", "fog", "25", "", "", "", "-1", "-2", "0", "0.04"]
    assert {len(row) for row in rows} == {10}


def wide(rows: int, columns: int) -> Table:
    number = Number(-0.123, -0.134, -0.112, p=0.0001, signed=True)
    return Table("t", "T", "n = 9", [f"a method {i}" for i in range(columns)], [Row("x", [number] * columns)] * rows)


def test_only_a_table_that_gets_narrower_is_put_on_its_side() -> None:
    assert len(narrow(wide(2, 9), 8).columns) == 2
    for table in (wide(2, 8), wide(9, 9)):
        assert narrow(table, 8) is table
    grouped = Table("t", "T", "", list("abcde"), [Row("x", [None] * 5, "a heading")])
    assert narrow(grouped, 4) is grouped


def test_a_lower_error_is_better() -> None:
    assert Number(0.02, p=0.01, signed=True).side == "better"
    assert Number(0.02, p=0.01, signed=True, lower_is_better=True).side == "worse"
    assert Number(-0.02, p=0.01, signed=True, lower_is_better=True).side == "better"
    assert Number(-0.02, p=0.2, signed=True).side == ""


def test_the_best_of_each_score_is_marked() -> None:
    shares = [Number(0.5), None, Number(0.7), Number(0.7001), "own head"]
    assert [n.best for n in with_best(shares) if isinstance(n, Number)] == [False, True, True]  # alike as shown
    errors = [Number(0.5, lower_is_better=True), Number(0.7, lower_is_better=True)]
    assert [n.best for n in with_best(errors) if isinstance(n, Number)] == [True, False]
    assert with_best([Number(0.5, unit="plain"), Number(0.7, unit="plain")]) == [
        Number(0.5, unit="plain"),
        Number(0.7, unit="plain"),
    ]
    assert with_best([Number(0.5)]) == [Number(0.5)]


def test_latex_is_a_float_with_booktabs_and_numbers_aligned() -> None:
    lines = latex(TABLE).splitlines()
    spec = [rf"S[table-format={form},retain-explicit-plus,detect-weight]" for form in ("2.1", "-1.1")]
    assert rf"\begin{{tabular}}{{@{{}}l{''.join(spec)}@{{}}}}" in lines
    assert r"top-1 & 50.0 & {\textemdash{}} \\[-.3ex]" in lines
    assert r" & {\scriptsize {[}40.0, 60.0{]}} & {} \\[2pt]" in lines
    assert r"\multicolumn{3}{@{}l@{}}{\emph{weather}} \\" in lines
    assert r"fog & 25.0 & -1.0{\rlap{$^{*}$}} \\[-.3ex]" in lines
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert (lines[1], lines[-1]) == (r"\begin{table}[tp]", r"\end{table}")
    assert any(line.startswith(r"\caption{") and r"\label{tab:" in line for line in lines)
    note = next(line for line in lines if "parbox" in line)
    assert "* p \\textless{} .\\allowbreak{}05" in note
    assert "Holm" in note


def test_the_best_is_bold_and_the_note_says_so() -> None:
    entries = with_best([Number(0.5, 0.4, 0.6), Number(0.7, 0.6, 0.8)])
    text = latex(Table("t", "T", "n = 9", ["a", "b"], [Row("x", entries)]))
    assert r"x & 50.0 & \bfseries 70.0 \\" in text
    assert "Bold: the best." in text


LONG = 'untrained | rf_resnet18 `ticks` \\ 50% & $x$ #1 {y} ~^ 模型 é "<b>" [z] -- ' + "x" * 70


def hard() -> Table:
    number = Number(-0.123, -0.134, -0.112, p=0.0001, signed=True)
    rows = [Row(LONG, [number, LONG], LONG), Row("c", [None, number], LONG), Row("d", ["`a --b=c`", None])]
    return Table("a_b|c", LONG, "n = 9", [LONG, "b"], rows, LONG)


TABLES = {"mixed": TABLE, "2x9": wide(2, 9), "40x30": wide(40, 30), "90x2": wide(90, 2), "hard": hard()}


@pytest.mark.parametrize("style", PAGES)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_latex_is_well_formed(table: Table, style: str) -> None:
    check(latex(table, style))


def check(text: str) -> None:
    """Braces and environments close in order; every row has its tabular's columns; nothing special stands unescaped."""
    text = re.sub(r"(?<!\\)%.*", "", text)  # comments
    bare = re.sub(r"\\[\\{}%&$#_]", "", text)
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in bare))
    assert depth[-1] == 0
    assert min(depth) >= 0
    assert len(re.findall(r"\$", bare)) % 2 == 0
    outside = re.sub(r"\$[^$]*\$|\\(?:label|cosschar)\{[^}]*\}|S\[[^\]]*\]|\\providecommand.*", "", bare)
    assert not re.search(r"[#_^%|<>]", outside), outside
    opened: list[str] = []
    for begin, end in re.findall(r"\\begin\{(\w+\*?)\}|\\end\{(\w+\*?)\}", text):
        if begin:
            opened.append(begin)
        else:
            assert opened.pop() == end
    assert opened == []
    for tabular in _outer(text):
        spec, *rows = tabular
        wanted = 1 + spec.count("S[") + len(re.sub(r"S\[[^\]]*\]|@\{\}", "", spec)[1:])
        for row in rows:
            spans = re.match(r"\s*\\multicolumn\{(\d+)\}", row)
            found = int(spans[1]) if spans else 1 + len(re.findall(r"(?<!\\)&", row))
            assert found == wanted, (wanted, row)


def _outer(text: str) -> Iterator[list[str]]:
    """Each tabular's specification and rows; tabulars inside cells are taken out."""
    inside = re.compile(r"\\begin\{tabular\}\[[tb]\](?:(?!\\begin\{tabular\}).)*?\\end\{tabular\}", re.DOTALL)
    text = inside.sub("", text)
    for body in re.findall(r"\\begin\{tabular\}\{((?:@\{\}|S\[[^\]]*\]|l)*)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        content = re.sub(r"\\(toprule|midrule|bottomrule|addlinespace)", "", body[1])
        yield [body[0], *(row for row in re.split(r"(?<!\\)\\\\(?:\[[^\]]*\])?\n", content) if row.strip())]


def test_a_table_too_wide_for_a_column_goes_over_the_page_then_apart() -> None:
    assert r"\begin{table}[tp]" in latex(wide(6, 2), "cvpr")
    assert r"\begin{table*}[tp]" in latex(wide(6, 6), "cvpr")
    assert r"\begin{table}[tp]" in latex(wide(6, 6), "neurips")
    on_its_side = latex(wide(2, 9), "cvpr")
    assert on_its_side.count(r"\begin{tabular}{@{}l") == 1
    assert "a method 8 & -12.3" in on_its_side
    assert latex(wide(6, 30), "cvpr").count(r"\begin{tabular}{@{}l") > 1
    assert "(continued)" in latex(wide(90, 2))


def test_long_words_are_broken_with_a_hyphen_and_names_as_they_are() -> None:
    assert broken("representation", 10) == ["represent-", "ation"]
    assert broken("a representation", 10) == ["a represe-", "ntation"]
    assert broken("tiny-imagenet-50-supervised", 24) == ["tiny-imagenet-50-", "supervised"]
    assert broken("x1f00ba7c9d", 6) == ["x1f00b", "a7c9d"]
    assert broken("表現の頑健性とは何か", 6) == ["表現の頑健性", "とは何か"]
    for width in range(2, 30):
        lines = broken("Unvoreingenommenheit und representations", width)
        assert max(map(len, lines)) <= width
        assert "".join(lines).replace("-", "").replace(" ", "") == "Unvoreingenommenheitundrepresentations"


def test_any_character_survives() -> None:
    assert escape("a_b & 5% {x} $y$ #1 ~^\\") == (
        r"a\_b \& 5\% \{x\} \$y\$ \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert escape("[limit=1]") == "{[}limit=1{]}"  # after a line's \\ it would be an argument
    assert escape("a|b`c") == r"a\textbar{}b\textasciigrave{}c"
    assert escape("é模") == r"é\cosschar{模}{6A21}"
    text = latex(hard())
    assert text.count(r"\providecommand{\cosschar}") == 1
    assert "XeLaTeX" in text


def test_an_unknown_style_is_one_line() -> None:
    with pytest.raises(UsageError, match="unknown style 'icml'"):
        latex(TABLE, "icml")


PREAMBLES = {
    "plain": r"\documentclass{article}",
    "neurips": r"\documentclass{article}\setlength{\textwidth}{397pt}",
    "cvpr": r"\documentclass[twocolumn]{article}\setlength{\textwidth}{490pt}\setlength{\columnsep}{16pt}",
}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("style", PAGES)
def test_latex_compiles_without_overfull_boxes(style: str, tmp_path: Path) -> None:
    compiles(TABLES.values(), style, tmp_path)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_texts_are_taken_as_wide_as_latex_sets_them(tmp_path: Path) -> None:
    """A little wider at most, and hardly narrower: columns are laid out by it."""
    texts = ["[−0.074, −0.022]", "[0.707, 0.768]", "49.7", "cosine, n = 451", "untrained resnet18", "channels masked"]
    sizes = {10: "normalsize", 9: "small", 8: "footnotesize", 7: "scriptsize"}
    measured = [(text, size) for text in texts for size in sizes]
    lines = [rf"\sbox0{{\{sizes[size]} {escape(text)}}}\typeout{{WIDE \the\wd0}}" for text, size in measured]
    body = "\n".join(lines)
    (tmp_path / "t.tex").write_text(f"\\documentclass{{article}}\\begin{{document}}\n{body}\n\\end{{document}}\n")
    subprocess.run(["pdflatex", "-draftmode", "-interaction=nonstopmode", "t"], cwd=tmp_path, capture_output=True)
    found = [float(width) for width in re.findall(r"WIDE ([\d.]+)pt", (tmp_path / "t.log").read_text(errors="replace"))]
    ratios = {one: text_width(*one) / width for one, width in zip(measured, found, strict=True)}
    assert {one: ratio for one, ratio in ratios.items() if not 0.998 < ratio < 1.03} == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("run", sorted(RESULTS.glob("*/run.json")), ids=lambda path: path.parent.name)
def test_committed_results_compile_without_overfull_boxes(run: Path, tmp_path: Path) -> None:
    tables = document.build(Results(Store(run.parent))).tables
    for style in PAGES:
        compiles(tables, style, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(RESULTS.glob("*/run.json")), ids=lambda path: path.parent.name)
def test_committed_results_are_well_formed(run: Path) -> None:
    for table in document.build(Results(Store(run.parent))).tables:
        for style in PAGES:
            check(latex(table, style))


def compiles(tables: Iterable[Table], style: str, folder: Path) -> None:
    body = "\n\\clearpage\n".join(latex(table, style) for table in tables)
    packages = r"\usepackage{booktabs,siunitx}"
    (folder / "t.tex").write_text(f"{PREAMBLES[style]}\n{packages}\n\\begin{{document}}\n{body}\n\\end{{document}}\n")
    call = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "t"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, errors="replace")
    log = (folder / "t.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert re.findall(r"Overfull.*|Float too large.*", log) == []


def test_methods_name_and_cite_what_was_run_and_nothing_else(store: Store, writer: Callable[..., Writer]) -> None:
    run = writer("a_b")
    run.corruptions()
    run.probe()
    text = methods(Results(store))
    cited = set(re.findall(r"[\w]+", " ".join(re.findall(r"\\cite\{([^}]*)\}", text))))
    assert {"hendrycks2019benchmarking", "he2016deep", "wilson1927probable"} <= cited
    assert not {"madry2018towards", "holm1979simple", "garrido2023rankme"} & cited
    assert "severities 1, 2, 3, 4 and 5" in text
    assert "the 15 of the benchmark and 4 held-out ones" in text
    entries = re.findall(r"^@\w+\{(\w+),", references(text), re.MULTILINE)
    assert set(entries) == cited
    run.attacks()
    writer("other").attacks()
    more = methods(Results(store))
    assert "PGD~\\cite{madry2018towards} in $\\ell_\\infty$ with 20 steps, $\\epsilon$ 0.5/255, 1/255 and 2/255" in more
    assert "holm1979simple" in more
    check_braces(more + references(more))


def check_braces(text: str) -> None:
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in text))
    assert depth[-1] == 0
    assert min(depth) >= 0


def test_every_reference_is_of_use_and_complete() -> None:
    source = Path(methods.__code__.co_filename).read_text().split("BIBLIOGRAPHY = ")[0]
    for key, (_, fields) in BIBLIOGRAPHY.items():
        assert key in source
        assert {"author", "title", "year"} < set(fields)

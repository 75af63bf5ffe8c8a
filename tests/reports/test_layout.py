"""Numbers and tables in each of their forms."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from coss_eval.reports.layout import (
    GAP,
    Number,
    Row,
    Table,
    escape,
    latex,
    markdown,
    narrow,
    text,
    to_csv,
    transposed,
)


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


def test_latex_is_booktabs_and_escaped() -> None:
    lines = latex(TABLE).splitlines()
    assert lines[1] == r"\begin{tabular}{lrr}"
    assert lines[3] == r"accuracy~\%, n~=~100, limit & r18\_a & 50~\% | x \\"
    assert lines[5] == r"top-1 & $50.0$ {\scriptsize $[40.0, 60.0]$} & \textemdash{} \\"
    assert lines[7] == r"\multicolumn{3}{l}{\emph{weather}} \\"
    assert lines[8] == r"fog & $25.0$ & $-1.0$ {\scriptsize $[-2.0, 0.0]$} {\scriptsize $p{=}.040$} \\"
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert all(line.count("&") == 2 for line in lines if line.endswith(r"\\") and "multicolumn" not in line)


def wide(rows: int, columns: int) -> Table:
    number = Number(-0.123, -0.134, -0.112, p=0.0001, signed=True)
    return Table("t", "T", "n = 9", [f"a method {i}" for i in range(columns)], [Row("x", [number] * columns)] * rows)


def test_intervals_go_below_where_a_table_would_be_wide() -> None:
    stacked = r"\begin{tabular}[t]{@{}r@{}}$-12.3$ {\scriptsize $p{<}.001$} \\[-.4ex] {\scriptsize $[-13.4, -11.2]$}"
    assert stacked in latex(wide(6, 6))
    assert "[t]" not in latex(wide(6, 1))


def test_a_table_of_more_columns_than_rows_stands_on_its_side() -> None:
    lines = latex(wide(2, 9)).splitlines()
    assert (lines[1], len(lines)) == (r"\begin{tabular}{lrr}", 5 + 9 + 2)
    assert lines[5].startswith(r"a method 0 & \begin{tabular}[t]{@{}r@{}}$-12.3$")


def test_only_a_table_that_gets_narrower_is_put_on_its_side() -> None:
    assert len(narrow(wide(2, 9), 8).columns) == 2
    for table in (wide(2, 8), wide(9, 9)):
        assert narrow(table, 8) is table
    grouped = Table("t", "T", "", list("abcde"), [Row("x", [None] * 5, "a heading")])
    assert narrow(grouped, 4) is grouped


def test_a_lower_error_is_better() -> None:
    assert Number(0.02, signed=True).better
    assert Number(-0.02, signed=True, lower_is_better=True).better
    assert not Number(0.02, signed=True, lower_is_better=True).better


def test_long_text_is_broken_into_lines() -> None:
    command = "`coss-eval probe --ckpt a_model.safetensors`"
    entries = ["a sentence of several words", command, "3", "3", None]
    lines = latex(Table("t", "T", "model", list("abcde"), [Row("x", entries)] * 5)).splitlines()
    assert lines[1] == r"\begin{tabular}{llllll}"
    assert r"\begin{tabular}[t]{@{}l@{}}a sentence \\ of several \\ words\end{tabular}" in lines[5]
    assert r"\texttt{probe -{}-ckpt} \\ \texttt{a\_model.safe} \\ \texttt{tensors}\end{tabular}" in lines[5]


def test_long_names_are_broken_after_underscores() -> None:
    label = "untrained rf_resnet18_k4-4-1-0_mlp1 (seed 0)"
    columns = [label, "a_name", *(f"model {i}" for i in range(6))]
    text = latex(Table("t", "T", "", columns, [Row("x", [Number(0.5, 0.4, 0.6)] * 8)] * 9))
    assert r"{@{}r@{}}untrained \\ rf\_resnet18\_ \\ k4-4-1-0\_ \\ mlp1 \\ (seed~0)\end{tabular}" in text
    assert r" & a\_name & " in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("table", [TABLE, wide(2, 9), wide(6, 6), wide(9, 2)], ids=["mixed", "2x9", "6x6", "9x2"])
def test_latex_compiles(table: Table, tmp_path: Path) -> None:
    preamble = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{preamble}\n{latex(table)}\n\\end{{document}}\n")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t"], cwd=tmp_path, check=True)


def test_latex_escapes_every_special_character() -> None:
    assert escape("a_b & 5% {x} $y$ #1 ~^\\") == (
        r"a\_b \& 5\% \{x\} \$y\$ \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert escape("[limit=1]") == "{[}limit=1{]}"  # after a line's \\ it would be an argument

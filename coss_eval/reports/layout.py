"""A table ready to be shown, and its forms: terminal text, Markdown and CSV. HTML is in html.py, LaTeX in latex.py."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from coss_eval.runtime.live import BETTER, PLAIN, STRONG, WORSE

GAP = "—"
_NOTHING = 1e-9  # rounding

Unit = Literal["percent", "plain"]


@dataclass(frozen=True)
class Number:
    """A value with its interval; ``p`` (adjusted over its table) and what follows it belong to differences.

    ``best``: of those that it is compared with in its table (see ``with_best``).
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: Unit = "percent"
    p: float | None = None
    signed: bool = False
    lower_is_better: bool = False
    best: bool = False

    @cached_property
    def main(self) -> str:
        """ "76.1", or "+3.2" where signed."""
        return self._format(self.value)

    @cached_property
    def interval(self) -> str:
        """ "[75.2, 77.0]"; empty where there is none."""
        if not (_known(self.low) and _known(self.high)):
            return ""
        return f"[{self._format(self.low)}, {self._format(self.high)}]"  # type: ignore[arg-type]

    @cached_property
    def p_text(self) -> str:
        """ "p = .012"; empty where there is none."""
        if self.p is None or not _known(self.p):
            return ""
        return "p < .001" if self.p < 0.001 else f"p = {self.p:.3f}".replace("0.", ".", 1)

    @property
    def clear(self) -> bool:
        """A difference that stands after adjustment for the table's other rows."""
        return self.p is not None and self.p < 0.05

    @property
    def ranked(self) -> bool:
        """Whether there is a better and a worse: of shares of images, and of what says ``lower_is_better``."""
        return self.unit == "percent" or self.lower_is_better

    @property
    def side(self) -> Literal["better", "worse", "clear", ""]:
        """What a difference that stands is: "clear" where nothing is better or worse; empty for others."""
        if not self.clear:
            return ""
        if not self.ranked:
            return "clear"
        return "better" if (self.value < 0) == self.lower_is_better else "worse"

    @property
    def reading(self) -> str:
        """What a difference shows: "no difference seen, at most 3.2" unless its interval (and p) leave 0 out."""
        if self.low is None or self.high is None or not (_known(self.low) and _known(self.high)):
            return ""
        unclear = self.p is not None and _known(self.p) and not self.clear
        if self.low <= 0 <= self.high or unclear:
            most = replace(self, signed=False)._format(max(abs(self.low), abs(self.high)))
            return f"no difference seen, at most {most}"
        return "higher" if self.value > 0 else "lower"

    def __str__(self) -> str:
        return " ".join(part for part in (self.main, self.interval, self.p_text) if part)

    def _format(self, value: float) -> str:
        sign = "+" if self.signed else ""
        if self.unit == "percent":
            text = f"{100 * value:{sign}.1f}"
        else:
            digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
            text = f"{value:{sign}.{digits}f}"
        if float(text) == 0:
            shown = 100 * value if self.unit == "percent" else value
            if abs(shown) < _NOTHING:
                return text.lstrip("+-")
            digits = -math.floor(math.log10(abs(shown)))
            text = f"{shown:{sign}.{digits}f}"  # -0.04 is not 0: its first digit shows
        return text.replace("-", "−")


Entry = Number | str | None  # None: a gap


@dataclass(frozen=True)
class Row:
    """A line of a table; ``group`` heads the lines that share it."""

    name: str
    entries: Sequence[Entry]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """``name`` is its file's; ``corner`` heads the first column and says what the numbers are, with n and limit."""

    name: str
    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    gap: str = "not measured"  # what a gap in it is

    @property
    def gaps(self) -> int:
        return sum(entry is None for row in self.rows for entry in row.entries)

    @property
    def footnote(self) -> str:
        """The caption, with the gaps counted."""
        gaps = f"{self.gaps} of {sum(len(r.entries) for r in self.rows)} {self.gap} ({GAP})." if self.gaps else ""
        return " ".join(part for part in (self.caption, gaps) if part)

    def grouped(self) -> Iterable[tuple[str, Row]]:
        """Rows, each with the heading that goes before it (empty where the group goes on)."""
        before = ""
        for row in self.rows:
            yield (row.group if row.group != before else "", row)
            before = row.group


def markdown(table: Table) -> str:
    """A pipe table; columns of text are aligned left."""
    sides = "".join("--:|" if number else ":--|" for number in _numeric(table))
    lines = [_pipes([table.corner, *table.columns]), f"|:--|{sides}"]
    for heading, row in table.grouped():
        if heading:
            lines.append(_pipes([f"*{heading}*", *[""] * len(table.columns)]))
        lines.append(_pipes([row.name, *map(_shown, row.entries)]))
    return "\n".join(lines)


def text(table: Table, width: int | None = None, *, coloured: bool = False) -> str:
    """Aligned plain text for a terminal of ``width`` characters; None: as wide as it gets.

    Where it does not fit, heads are broken into lines, and columns stand in blocks below one another, intervals below
    their numbers if the blocks are then fewer. ``coloured``: differences that stand are blue and orange, as in HTML.
    """
    heads, cells = [[name] for name in table.columns], _cells(table, stacked=False)
    if width is None or max(map(len, _block(table, heads, cells).splitlines())) <= width:
        return _block(table, heads, cells, coloured)
    beside, below = (_blocks(table, _cells(table, stacked=stacked), width, coloured) for stacked in (False, True))
    return "\n\n".join(below if len(below) < len(beside) else beside)


_HEAD = 14  # characters: a head is not broken narrower
_WORDS = 20  # characters: nor is text in a column


class _Broken(NamedTuple):
    """An entry as lines, and the colour of the first."""

    lines: list[str]
    colour: str = ""


def _cells(table: Table, *, stacked: bool) -> list[list[_Broken]]:
    """The entries of each row; ``stacked``, with intervals below their numbers and text in short lines."""
    return [[_entry_lines(entry, stacked) for entry in row.entries] for row in table.rows]


def _entry_lines(entry: Entry, stacked: bool) -> _Broken:
    if not isinstance(entry, Number):
        return _Broken((textwrap.wrap(_shown(entry), _WORDS) if stacked else []) or [_shown(entry)])
    colour = {"better": BETTER, "worse": WORSE, "clear": STRONG, "": ""}[entry.side if entry.signed else ""]
    lines = [" ".join(filter(None, [entry.main, entry.p_text])), entry.interval] if stacked else [str(entry)]
    return _Broken([line for line in lines if line], colour)


def _blocks(table: Table, cells: Sequence[Sequence[_Broken]], width: int, coloured: bool) -> list[str]:
    """The columns in as many blocks below one another as ``width`` makes necessary."""
    heads, widths = [], []
    for i, name in enumerate(table.columns):
        longest = max((len(line) for row in cells for line in row[i].lines), default=0)
        pieces = _Lines.wordsep_simple_re.split(name)
        heads.append(
            _Lines(max(longest, _HEAD, *map(len, pieces)), break_long_words=False, break_on_hyphens=False).wrap(name)
        )
        widths.append(2 + max(longest, *map(len, heads[i])))
    room = width - _first_width(table, width)
    blocks: list[list[int]] = []
    for i, needed in enumerate(widths):
        if not blocks or sum(widths[j] for j in blocks[-1]) + needed > room:
            blocks.append([])
        blocks[-1].append(i)
    return [
        _block(table, [heads[i] for i in block], [[row[i] for i in block] for row in cells], coloured, width)
        for block in blocks
    ]


def _stub(row: Row, width: int | None) -> list[str]:
    """A row's name, indented below its group's heading; in lines where it is longer than half of ``width``."""
    indent = "  " if row.group else ""
    if width is None or len(row.name) + len(indent) <= width // 2:
        return [indent + row.name]
    broken = _Lines(width // 2 - 2, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
    return broken.wrap(row.name)


def _first_width(table: Table, width: int | None) -> int:
    """Characters of the first column."""
    return max(len(line) for line in [table.corner, *(line for row in table.rows for line in _stub(row, width))])


def _block(
    table: Table,
    heads: Sequence[Sequence[str]],
    cells: Sequence[Sequence[_Broken]],
    coloured: bool = False,
    width: int | None = None,
) -> str:
    """``cells`` below ``heads``, the lines of each column's name; a group's heading has a line of its own."""
    deep = max(map(len, heads), default=1)
    tops = [[""] * (deep - len(head)) + [*head] for head in heads]
    corner = [""] * (deep - 1) + [table.corner]
    widths = [max(map(len, [*top, *(line for row in cells for line in row[i].lines)])) for i, top in enumerate(tops)]
    first = _first_width(table, width)

    def aligned(name: str, line: Sequence[tuple[str, str]]) -> str:
        shown = [text.rjust(wide) for (text, _), wide in zip(line, widths, strict=True)]
        painted = [
            one.replace(text, f"{colour}{text}{PLAIN}") if coloured and colour and text else one
            for one, (text, colour) in zip(shown, line, strict=True)
        ]
        return "  ".join([name.ljust(first), *painted]).rstrip()

    above = [aligned(corner[i], [(top[i], "") for top in tops]) for i in range(deep)]
    shown = []
    for (heading, row), own in zip(table.grouped(), cells, strict=True):
        shown += [heading] if heading else []
        names = _stub(row, width)
        for i in range(max(len(names), *(len(entry.lines) for entry in own))):
            line = [(e.lines[i] if i < len(e.lines) else "", e.colour if i == 0 else "") for e in own]
            shown.append(aligned(names[i] if i < len(names) else "", line))
    rule = "─" * max(first + sum(2 + wide for wide in widths), *(len(heading) for heading, _ in table.grouped()))
    return "\n".join([*above, rule, *shown])


class _Lines(textwrap.TextWrapper):
    """Breaks after "_" as well: names like rf_resnet18_k4-4-1-0_mlp1 are longer than a column is wide."""

    # what TextWrapper splits at with break_on_hyphens=False; hyphens before letters, as in imagenet-50-supervised
    wordsep_simple_re = re.compile(r"( +|(?<=_)|(?<=[A-Za-z0-9]-)(?=[A-Za-z]))")

    def _handle_long_word(self, reversed_chunks: list[str], cur_line: list[str], cur_len: int, width: int) -> None:
        """Break a word of Latin letters with a hyphen, three letters or more on both sides; what is none, anywhere."""
        word, left = reversed_chunks[-1], width - cur_len
        place = min(left - 1, len(word) - 3)
        if not self.break_long_words or not _LATIN.fullmatch(word):
            super()._handle_long_word(reversed_chunks, cur_line, cur_len, width)
        elif place >= 3 or not cur_line:
            place = max(1, place)
            cur_line.append(f"{word[:place]}-")
            reversed_chunks[-1] = word[place:]


_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]+")


def broken(text: str, width: int, *, words: bool = False) -> list[str]:
    """Text in lines of at most ``width`` characters, broken at spaces, underscores and hyphens, else anywhere.

    ``words``: never inside a word, which may then be longer than a line.
    """
    return _Lines(width, break_on_hyphens=False, break_long_words=not words).wrap(text) or [text]


def transposed(table: Table) -> Table:
    """Rows for columns, for a terminal narrower than the table."""
    rows = [Row(name, [row.entries[i] for row in table.rows]) for i, name in enumerate(table.columns)]
    return replace(table, columns=[row.name for row in table.rows], rows=rows)


def with_best(entries: Sequence[Entry]) -> list[Entry]:
    """One score's numbers of the models compared, the best of two or more marked, ties with it.

    Shares of images are better where they are higher, what says ``lower_is_better`` where it is lower; other scores
    have no best one.
    """
    numbers = [entry for entry in entries if isinstance(entry, Number)]
    ranked = [(-n.value if n.lower_is_better else n.value) for n in numbers]
    if len(numbers) < 2 or not all(n.ranked for n in numbers):
        return [*entries]
    shown = {n.main for n, rank in zip(numbers, ranked, strict=True) if rank == max(ranked)}
    if len({n.main for n in numbers}) < 2:  # all alike
        return [*entries]
    return [replace(e, best=e.main in shown) if isinstance(e, Number) else e for e in entries]


def narrow(table: Table, columns: int) -> Table:
    """The table, on its side where it has more than ``columns``, more columns than rows, and no headings."""
    wide = columns < len(table.columns) > len(table.rows)
    return transposed(table) if wide and not any(row.group for row in table.rows) else table


def to_csv(table: Table) -> str:
    """Percent as in the table but with four more digits; low, high and p beside each value; a gap is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = ["", " low", " high"] + ([" p"] if _has_p(table) else [])
    writer.writerow(["group", table.corner, *(f"{column}{part}" for column in table.columns for part in parts)])
    for row in table.rows:
        cells = [value for entry in row.entries for value in _values(entry, len(parts))]
        writer.writerow([row.group, row.name, *cells])
    return buffer.getvalue()


def _numeric(table: Table) -> list[bool]:
    """Of each column: whether it has numbers."""
    return [any(isinstance(row.entries[i], Number) for row in table.rows) for i in range(len(table.columns))]


def _shown(entry: Entry) -> str:
    return GAP if entry is None else str(entry)


def markdown_safe(text: str) -> str:
    """Text in which nothing is a tag: names such as <script> are shown as they are."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", text)


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_safe(cell).replace("|", "\\|") for cell in cells) + " |"


def _values(entry: Entry, count: int) -> list[str]:
    if not isinstance(entry, Number):
        return [entry or "", *[""] * (count - 1)]
    scale = 100 if entry.unit == "percent" else 1
    bounds = [f"{scale * v:.6g}" if v is not None and _known(v) else "" for v in (entry.value, entry.low, entry.high)]
    return [*bounds, f"{entry.p:.4g}" if entry.p is not None and _known(entry.p) else ""][:count]


def _has_p(table: Table) -> bool:
    return any(isinstance(e, Number) and e.p is not None for row in table.rows for e in row.entries)


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)

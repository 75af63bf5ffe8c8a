"""Tables for papers: floats with caption, label and note, as wide as a page's column or its text, booktabs and siunitx.

Widths are estimated from the metrics of Computer Modern, which is wider than the Times of most styles, so that what
fits here fits there; the tests compile the tables where a LaTeX is installed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from coss_eval.errors import unknown_name
from coss_eval.reports.layout import GAP, Entry, Number, Table, broken, transposed


class Page(NamedTuple):
    """A paper's style: points of a column and of what a float over all columns may take; its tables' type size."""

    column: float
    wide: float
    size: int  # pt

    @property
    def one_column(self) -> bool:
        return self.column == self.wide


PAGES = {
    "plain": Page(345.0, 345.0, 9),  # article, 10 pt
    "neurips": Page(397.0, 397.0, 9),
    "cvpr": Page(237.0, 397.0, 8),  # a column has 237 pt in the newest styles and 248 in others
}
SIZES = {9: r"\small", 8: r"\footnotesize"}
INTERVAL = 7  # pt, \scriptsize
GUTTER = 4.0  # pt, \tabcolsep
HEIGHT = 520.0  # pt: of a float on a page of its own
CAPTION = 40.0  # pt: of a caption of two lines
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
MEANING = "* p < .05, ** p < .01, *** p < .001 after Holm's adjustment over this table, no mark: no difference seen"


def latex(table: Table, style: str = "plain") -> str:
    """A table to \\input; needs \\usepackage{booktabs,siunitx}. Raises UsageError for an unknown ``style``.

    It stands in one column where it fits there, else over the page, else on its side, else its columns are split into
    parts below one another, and its rows over several floats. Intervals stand below their numbers.
    """
    page = page_of(style)
    room, blocks = _arranged(table, page)
    left = HEIGHT - CAPTION - _note_height(f"{table.footnote} {_signs('', blocks)}", room)
    floats = [blocks]
    if sum(map(_height, blocks)) + 8 * len(blocks) > left:
        floats = [[part] for i, block in enumerate(blocks) for part in _parts(block, HEIGHT - CAPTION if i else left)]
    text = "\n".join(_float(table, blocks, page, room, first=i == 0) for i, blocks in enumerate(floats))
    lines = [f"% {_plain(table.title)}; made by coss-eval for {style}; \\usepackage{{booktabs,siunitx}}"]
    if r"\cosschar" in text:
        lines.append(_CHARACTER)
    return "\n".join([*lines, text, ""])


def page_of(style: str) -> Page:
    """The page of a style by its name. Raises UsageError for an unknown one."""
    if style not in PAGES:
        raise unknown_name("style", style, PAGES)
    return PAGES[style]


@dataclass(frozen=True)
class _Tabular:
    """A part of a table that stands beside its row names: cells broken into lines, and what the columns are."""

    columns: tuple[tuple[str, ...], ...]  # the lines of each head
    corner: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...] | Number, ...]], ...]  # group, name, cells
    numeric: tuple[bool, ...]
    size: int

    @cached_property
    def width(self) -> float:
        """Points that it takes."""
        stub = max(_widest(self.corner, self.size), *(_widest(name, self.size) for _, name, _ in self.rows), 0.0)
        return stub + sum(self.column_widths) + 2 * GUTTER * len(self.columns)

    @property
    def column_widths(self) -> list[float]:
        return [
            max(_widest(head, self.size), *(_cell_width(cells[i], self.size) for _, _, cells in self.rows), 0.0)
            for i, head in enumerate(self.columns)
        ]


def _arranged(table: Table, page: Page) -> tuple[float, list[_Tabular]]:
    """The room that the table stands in, in points, and its blocks."""
    grouped = any(row.group for row in table.rows)
    turned = [] if grouped or not table.rows else [transposed(table)]
    for room in dict.fromkeys((page.column, page.wide)):
        for one in (table, *turned):
            block = _block(one, page, room)
            if block.width <= room:
                return room, [block]
    best = turned[0] if turned and len(table.columns) > len(table.rows) else table
    return page.wide, _split(best, page)


def _split(table: Table, page: Page) -> list[_Tabular]:
    """Columns in as few blocks as fit into the page's width."""
    blocks: list[_Tabular] = []
    start = 0
    while start < len(table.columns):
        stop = start + 1
        while stop < len(table.columns) and _block(_only(table, start, stop + 1), page, page.wide).width <= page.wide:
            stop += 1
        blocks.append(_block(_only(table, start, stop), page, page.wide))
        start = stop
    return blocks


def _only(table: Table, start: int, stop: int) -> Table:
    rows = [replace(row, entries=row.entries[start:stop]) for row in table.rows]
    return replace(table, columns=table.columns[start:stop], rows=rows)


def _block(table: Table, page: Page, room: float) -> _Tabular:
    """Names and texts broken to what a column may take of ``room``."""
    letter = 0.5 * page.size  # points: what a letter takes on average
    stub = int(max(14, min(30, 0.3 * room / letter)))
    share = int(max(10, (room - stub * letter) / len(table.columns) / letter - 2)) if table.columns else 10
    numeric = tuple(any(isinstance(row.entries[i], Number) for row in table.rows) for i in range(len(table.columns)))
    heads = tuple(
        _lines(name, max(10, min(share, 18)) if number else share)
        for name, number in zip(table.columns, numeric, strict=True)
    )
    shares = _shares(table, share)
    rows = tuple((row.group, _lines(row.name, stub), tuple(map(_cell, row.entries, shares))) for row in table.rows)
    return _Tabular(heads, _lines(table.corner, stub), rows, numeric, page.size)


def _shares(table: Table, share: int) -> list[int]:
    """Letters that each column's texts may take in a line: a command has what shorter texts leave of theirs."""
    texts = [[row.entries[i] for row in table.rows] for i in range(len(table.columns))]
    longest = [max((len(text) for text in each if isinstance(text, str)), default=share) for each in texts]
    code = [any(isinstance(text, str) and _is_code(text) for text in each) for each in texts]
    left = sum(max(0, share - length) for length, command in zip(longest, code, strict=True) if not command)
    return [share + left // sum(code) if command else min(share, 30) for command in code]


def _lines(text: str, width: int) -> tuple[str, ...]:
    """Text in lines; "n = 100", "50 %" and "(seed 0)" stay together, `code` breaks anywhere."""
    code = _is_code(text)
    for words in (" = ", " %", "(seed ", " < "):
        text = text if code else text.replace(words, words.replace(" ", "\xa0"))
    lines = broken(text.strip("`") if code else text, width)
    return tuple(f"`{line}`" if code else line for line in lines)


def _is_code(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == "`"


def _cell(entry: Entry, width: int) -> tuple[str, ...] | Number:
    if isinstance(entry, Number):
        return entry
    return (GAP,) if entry is None else _lines(entry, width)


def _height(block: _Tabular) -> float:
    """Points on the page, without caption and note."""
    heads = max(len(block.corner), *map(len, block.columns), 1)
    return 1.25 * block.size * heads + 12 + sum(_row_heights(block))


def _row_heights(block: _Tabular) -> list[float]:
    """Points of each row, with what heads its group."""
    found, before = [], ""
    for group, name, cells in block.rows:
        lines = max(len(name), *(len(cell) for cell in cells if isinstance(cell, tuple)), 1)
        interval = any(isinstance(cell, Number) and cell.interval for cell in cells)
        heading = 1.25 * block.size * len(_heading_lines(group, block)) + 6 if group not in ("", before) else 0.0
        before = group
        found.append(heading + 1.25 * block.size * max(lines, 1.9 if interval else 1.0) + 2 * interval)
    return found


def _parts(block: _Tabular, first: float) -> list[_Tabular]:
    """The block's rows in parts, of ``first`` points and then of a page each."""
    heights = _row_heights(block)
    heads = _height(block) - sum(heights)
    parts: list[list[int]] = [[]]
    left = first - heads
    for i, height in enumerate(heights):
        if parts[-1] and height > left:
            parts.append([])
            left = HEIGHT - heads - CAPTION
        parts[-1].append(i)
        left -= height
    return [replace(block, rows=tuple(block.rows[i] for i in part)) for part in parts]


def _note_height(text: str, room: float) -> float:
    """Points of a note in \\scriptsize."""
    return 8.0 * (1 + math.ceil(1.1 * text_width(text, INTERVAL) / room))


def _float(table: Table, blocks: Sequence[_Tabular], page: Page, room: float, *, first: bool) -> str:
    """A float with the blocks below one another."""
    kind = "table" if room == page.column else "table*"
    title = f"{_plain(table.title)}{'' if first else ' (continued)'}"
    lines = [rf"\begin{{{kind}}}[tp]", r"\centering", SIZES[page.size], rf"\setlength{{\tabcolsep}}{{{GUTTER:g}pt}}"]
    label = rf"\label{{tab:{_label(table.name)}}}" if first else ""
    lines.append(rf"\caption{{{escape(title, breaking=True)}.}}{label}")
    bodies = [_tabular(block) for block in blocks]
    lines.append("\n\\par\\medskip\n".join(bodies))
    note = " ".join(filter(None, [table.footnote if first else "", _signs("\n".join(bodies), blocks)]))
    if note:
        width = r"\linewidth"
        lines.append(
            rf"\par\smallskip\parbox{{{width}}}{{\scriptsize\raggedright\sloppy {escape(note, breaking=True)}}}"
        )
    return "\n".join([*lines, rf"\end{{{kind}}}"])


def _label(name: str) -> str:
    """A label that LaTeX takes: letters, digits, hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _signs(body: str, blocks: Sequence[_Tabular]) -> str:
    """What bold numbers, marks and characters in words mean, where there are any."""
    cells = [cell for block in blocks for _, _, row in block.rows for cell in row]
    numbers = [cell for cell in cells if isinstance(cell, Number)]
    parts = ["Bold: the best."] if any(number.best for number in numbers) else []
    if any(number.p is not None for number in numbers):
        parts.append(f"{MEANING}.")
    if any(number.interval for number in numbers):
        parts.append("Brackets: 95 % intervals.")
    if r"\cosschar" in body:
        parts.append("U+ and a number stand for characters that only XeLaTeX and LuaLaTeX can print.")
    return " ".join(parts)


def _tabular(block: _Tabular) -> str:
    spec = "l" + "".join(_spec(block, i) if number else "l" for i, number in enumerate(block.numeric))
    heads = [
        f"{{{_stack(head, 'c', 'b')}}}" if number else _stack(head, "l", "b")
        for head, number in zip(block.columns, block.numeric, strict=True)
    ]
    lines = [rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}", r"\toprule"]
    lines += [" & ".join([_stack(block.corner, "l", "b"), *heads]) + r" \\", r"\midrule"]
    before = ""
    for group, name, cells in block.rows:
        if group not in ("", before):
            lines += [] if lines[-1] == r"\midrule" else [r"\addlinespace"]
            lines += [_heading(part, len(cells) + 1, block) for part in _heading_lines(group, block)]
        before = group
        shown = [_shown(cell, number) for cell, number in zip(cells, block.numeric, strict=True)]
        lines.append(" & ".join([_stack(name, "l", "t"), *shown]) + r" \\")
        if any(isinstance(cell, Number) and cell.interval for cell in cells):
            # a name of several lines already has the room that the intervals below it take
            lift = f"[-{(len(name) - 1) * 1.15 * block.size:.0f}pt]" if len(name) > 1 else "[-.3ex]"
            lines[-1] += lift
            below = [_interval(cell) if isinstance(cell, Number) else "{}" for cell in cells]
            deep = f"[{max(2.0, (len(name) - 2) * 1.15 * block.size + 2):.0f}pt]"
            lines.append(" & ".join(["", *below]) + r" \\" + deep)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _heading_lines(group: str, block: _Tabular) -> tuple[str, ...]:
    """A group's heading in lines no wider than the block."""
    return _lines(group, max(14, int(block.width / (0.55 * block.size))))


def _heading(text: str, columns: int, block: _Tabular) -> str:
    return rf"\multicolumn{{{columns}}}{{@{{}}l@{{}}}}{{\emph{{{escape(text)}}}}} \\"


def _spec(block: _Tabular, column: int) -> str:
    """An S column that has room for every number in it; centred where there is none, as all are gaps."""
    texts = [_digits(cell) for _, _, cells in block.rows if isinstance(cell := cells[column], Number)]
    if not texts:
        return "c"
    whole = max(len(re.sub(r"[+-]|\..*", "", text)) for text in texts)
    part = max(len(text.partition(".")[2]) for text in texts)
    sign = "-" if any(text[0] in "+-" for text in texts) else ""
    return f"S[table-format={sign}{whole}.{part},retain-explicit-plus,detect-weight]"


def _digits(number: Number) -> str:
    return number.main.replace("−", "-")


def _shown(cell: tuple[str, ...] | Number, numeric: bool) -> str:
    """A cell: the number, bold where it is the best, with its mark; text in braces where numbers are aligned."""
    if isinstance(cell, Number):
        mark = _mark(cell)
        bold = r"\bfseries " if cell.best else ""
        return bold + _digits(cell) + (rf"{{\rlap{{$^{{{mark}}}$}}}}" if mark else "")
    text = _stack(cell, "c" if numeric else "l", "t")
    return f"{{{text}}}" if numeric else text


def _mark(number: Number) -> str:
    known = number.p is not None and not math.isnan(number.p)
    return next((mark for least, mark in MARKS if known and number.p is not None and number.p < least), "")


def _interval(number: Number) -> str:
    return rf"{{\scriptsize {escape(number.interval)}}}" if number.interval else "{}"


def _stack(lines: Sequence[str], side: str, align: str) -> str:
    """Lines above one another in a cell, on the baseline of the top one ("t") or the bottom one ("b")."""
    shown = [rf"\texttt{{{escape(line[1:-1])}}}" if _is_code(line) else escape(line) for line in lines]
    if len(shown) < 2:
        return "".join(shown)
    return rf"\begin{{tabular}}[{align}]{{@{{}}{side}@{{}}}}" + r" \\ ".join(shown) + r"\end{tabular}"


_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "[": "{[}", "]": "{]}", "<": r"\textless{}", ">": r"\textgreater{}",  # "[" would be an argument of the \\ before
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}", "\xa0": "~",
    "|": r"\textbar{}", '"': "''", "−": r"$-$", "×": r"$\times$", "±": r"$\pm$", "²": r"$^2$", "—": r"\textemdash{}",
    "–": r"\textendash{}", "…": r"\ldots{}", "·": r"$\cdot$", "≥": r"$\geq$", "≤": r"$\leq$", "’": "'", "‘": "`",
    "“": "``", "”": "''", "°": r"$^\circ$", "µ": r"$\mu$", "\t": " ", "\n": " ",
    "\u200b": r"\allowbreak{}",
}  # fmt: skip
_LETTERS = "øØæÆœŒßłŁıåÅ"  # that pdfLaTeX's own fonts have; accented ones are told by their decomposition
_ACCENTS = {0x300, 0x301, 0x302, 0x303, 0x308, 0x30A, 0x30C, 0x327}
_CHARACTER = r"\providecommand{\cosschar}[2]{\ifdefined\Umathchar #1\else\texttt{U+#2}\fi}"


def escape(text: str, *, breaking: bool = False) -> str:
    """Any text as LaTeX shows it literally; ``breaking`` lets lines end within names and code.

    A character that pdfLaTeX has no letter for is printed by XeLaTeX and LuaLaTeX, elsewhere as its number: U+6A21.
    """
    if breaking:  # a zero-width space is where a line may end
        text = re.sub(r"\S{30,}", lambda word: "\u200b".join(re.findall(".{1,15}", word[0])), text)
    found = "".join(_escaped(character) for character in text).replace("--", "-{}-")
    if breaking:
        found = re.sub(r"(\\_|/|\.(?=\S)|=|-(?=\S))", r"\1\\allowbreak{}", found)
    return found


def _escaped(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if " " <= character <= "~" or character in _LETTERS:
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and ord(parts[1]) in _ACCENTS:
        return character
    return "" if not character.isprintable() else rf"\cosschar{{{character}}}{{{ord(character):04X}}}"


def _plain(text: str) -> str:
    return " ".join(text.split())


_WIDER = {10: 1.0, 9: 1.028, 8: 1.0625, 7: 1.147}  # small type of Computer Modern is wider than a reduction of large
_OTHERS = {
    **dict.fromkeys("−×±<>", 0.778), **dict.fromkeys("\\{}\"^~", 0.5), **dict.fromkeys("\xa0 ", 0.333),
    "—": 1.0, "…": 1.17, "_": 0.36, "|": 0.278, "²": 0.45,
}  # fmt: skip


@lru_cache(maxsize=16384)
def text_width(text: str, size: int) -> float:
    """Points that a text takes in Computer Modern of ``size`` pt."""
    if _is_code(text):
        return 0.54 * size * (len(text) - 2)
    letters = _letter_widths()
    wide = 2.9  # em: U+6A21 in typewriter
    return size * _WIDER[size] * sum(_OTHERS.get(c) or letters.get(c, wide) for c in text)


@cache
def _letter_widths() -> dict[str, float]:
    """Widths of the ASCII characters of cmr10 in em, from the metrics that come with matplotlib."""
    import matplotlib as mpl

    path = Path(mpl.get_data_path()) / "fonts" / "afm" / "cmr10.afm"
    found = re.findall(r"^C (\d+) ; WX ([\d.]+) ;", path.read_text(encoding="latin-1"), re.MULTILINE)
    return {chr(int(code)): float(width) / 1000 for code, width in found if 32 < int(code) < 127}


def _widest(lines: Iterable[str], size: int) -> float:
    return max((text_width(line, size) for line in lines), default=0.0)


def _cell_width(cell: tuple[str, ...] | Number, size: int) -> float:
    if not isinstance(cell, Number):
        return _widest(cell, size)
    number = text_width(cell.main, size) * (1.15 if cell.best else 1.0) + 0.5 * size  # signs of others in the column
    return max(number, text_width(cell.interval, INTERVAL))

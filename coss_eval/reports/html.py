"""report.html: one file that needs no other, light or dark as the reader's system is, on a screen or on paper.

Without its script it is whole: the script (report.js, inlined) makes its tables sortable, filterable and copyable.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from html import escape
from importlib.resources import files as package_files
from string import Template

from coss_eval.reports.document import FOLDED, Document, Section
from coss_eval.reports.latex import latex
from coss_eval.reports.layout import GAP, Entry, Number, Row, Table, narrow, to_csv
from coss_eval.statistics import SEEDS_FOR_P

FITTING = 7  # columns: what the page's width holds of a table of numbers with intervals
DENSITY = 220  # pixels an inch of the figures, coss.mplstyle's; screens show them at half their pixels
HIGH = 5.0  # inches: a figure that would be hard to read if it stood beside text on a landscape page
BESIDE_TEXT, FULL_PAGE = 92, 165  # mm
PRINTED = 12  # columns: what a landscape A4 page holds of it; further ones stand in tables of their own
COLOURS = "Bold: p < .05 after Holm's adjustment; blue: better than the baseline, orange: worse; uncoloured: neither."
WITHOUT_P = f"Without p, and so uncoloured: fewer than {SEEDS_FOR_P} seeds, or no verdict on each image is stored."

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: $subtitle</title>
<style>
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6570; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9;
        --better: #00619a; --worse: #b34700; --flag: #fff4d6; --flag-ink: #5c4300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a3adb8; --line: #333a42; --paper: #14171a; --tint: #1c2126;
          --better: #6cb8ea; --worse: #f0975a; --flag: #3a3015; --flag-ink: #f3d98b; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 76rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1, h2, h3, p, figcaption, summary, li { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
section:first-of-type h2 { margin-top: 1rem; border-top: 0; }
h3 { font-size: .95rem; margin: 0; }
code { font-size: .95em; overflow-wrap: anywhere; }
p { max-width: 52rem; margin: .3rem 0; }
p.sub, p.note, nav, output { color: var(--soft); }
p.note, details, .bar { font-size: .82rem; }
p.flag { background: var(--flag); color: var(--flag-ink); padding: .5rem .8rem; border-radius: .3rem; margin: .8rem 0; }
nav { position: sticky; top: 0; z-index: 3; margin: .8rem 0 0; padding: .5rem 0; font-size: .9rem; overflow-x: auto;
      background: var(--paper); border-bottom: 1px solid var(--line); }
nav a { color: inherit; margin-right: 1rem; display: inline-block; }
a, button, input, summary, [tabindex] { outline-offset: 2px; }
:focus-visible { outline: 2px solid var(--better); }
.block { margin: 1.4rem 0; }
.bar { display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: center; margin: .3rem 0; }
.bar a { color: var(--soft); }
.bar button, .bar input { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--line);
                          border-radius: .25rem; padding: .15rem .5rem; }
button.sort { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: inherit;
              cursor: pointer; overflow-wrap: anywhere; }
[aria-sort=ascending] .sort::after { content: " \\2191"; } [aria-sort=descending] .sort::after { content: " \\2193"; }
div.table { overflow-x: auto; margin: .2rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; white-space: nowrap; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: normal; }
th, td { padding: .26rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th:first-child, .text { text-align: left; } td.text.number { text-align: right; }
thead th, thead td { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom;
                     white-space: normal; overflow-wrap: anywhere; min-width: 6.4rem; max-width: 14rem; }
thead > tr > :first-child { color: var(--soft); font-weight: 400; min-width: 9rem; max-width: 18rem; }
tbody th { font-weight: 400; position: sticky; left: 0; z-index: 1; background: var(--paper); min-width: 7rem;
           max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover > * { background: var(--tint); }
tr.group th { color: var(--soft); font-style: italic; padding-top: .8rem; text-align: left; }
[hidden] { display: none; }
td small { color: var(--soft); font-size: .88em; margin-left: .5em; display: inline-block; text-align: left; }
td small.i { min-width: 7.4em; } td.signed small.i { min-width: 9em; } td small.p { min-width: 4.3em; }
table.many td small { display: block; margin: 0; min-width: 0; text-align: right; }
table.many td, table.many th { padding: .3rem .55rem; } table.many td.text { white-space: normal; min-width: 7rem; }
table.many thead > tr > :first-child, table.many tbody th { max-width: 11rem; }
td.better b { color: var(--better); } td.worse b { color: var(--worse); }
td b { font-weight: 400; } td.better b, td.worse b, td.clear b { font-weight: 600; }
td.gap { color: var(--soft); }
td.wide { white-space: normal; min-width: 14rem; max-width: 34rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; padding: .6rem; border-radius: .3rem;
             border: 1px solid var(--line); }
figure > div { overflow-x: auto; }
figcaption { color: var(--soft); font-size: .82rem; max-width: 52rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); } details ul { margin: .4rem 0; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 3rem; }
  nav { white-space: nowrap; }
  thead > tr > :first-child, tbody th { position: static; min-width: 7.5rem; max-width: 9rem; }
  td.wide { min-width: 10rem; }
  figure img { max-width: none; } }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #fff; --better: #00619a;
          --worse: #b34700; --flag: #fff; --flag-ink: #000; }
  body { max-width: none; padding: 0; font-size: 11px; }
  p { max-width: none; } p.note, details, figcaption { font-size: 9px; } h2 { margin-top: 1.2rem; }
  nav, .bar { display: none; }
  h2, h3, thead { break-after: avoid; } tr, figure, thead { break-inside: avoid; }
  p.flag { border: 1px solid var(--line); }
  div.table { overflow: visible; }
  table { font-size: 9.5px; white-space: normal; max-width: 100%; } table.many { font-size: 8.5px; }
  table :is(th, td), table.many :is(th, td) { min-width: 0; max-width: none; padding: .15rem .35rem; }
  td.wide, table.many td.text { min-width: 0; max-width: none; overflow-wrap: anywhere; }
  tbody th { position: static; }
  button.sort { display: contents; } /* Chromium repeats no head that holds a button on a table's further pages */
  td small, td small.i, td.signed small.i, td small.p { min-width: 0; white-space: nowrap; }
  figure img { max-width: min(100%, var(--wide)); max-height: var(--high); width: auto; border: 0; padding: 0; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="sub">$subtitle</p>
$warnings
</header>
<nav aria-label="Sections">$links</nav>
<main>
$sections
</main>
<script>
$script
</script>
</body>
</html>
""")


def render(document: Document, figures: Mapping[str, bytes], written: Mapping[str, str] | None = None) -> str:
    """The whole page; ``figures`` are PNG files by name and are embedded.

    ``written`` has the tables that lie as tables/<name>.csv beside the page, which links to them, with the LaTeX that
    the page copies of each; of all others it copies the plain style.
    """
    files = written or {}
    ids = _ids(section.title for section in document.sections)
    links = zip(document.sections, ids, strict=True)
    return _PAGE.substitute(
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        warnings="\n".join(f'<p class="flag">{escape(warning)}</p>' for warning in document.warnings),
        links="".join(f'<a href="#{name}">{escape(section.title)}</a>' for section, name in links),
        sections="\n".join(_section(*pair, figures, files) for pair in zip(document.sections, ids, strict=True)),
        script=(package_files("coss_eval.reports") / "report.js").read_text("utf-8").strip(),
    )


def _ids(titles: Iterable[str]) -> list[str]:
    """An id of each title, each once."""
    found: list[str] = []
    for title in titles:
        name = re.sub(r"\W+", "-", title.lower()).strip("-") or "section"
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def _section(section: Section, name: str, figures: Mapping[str, bytes], files: Mapping[str, str]) -> str:
    parts = [f'<section id="{name}" aria-labelledby="{name}-title">']
    parts.append(f'<h2 id="{name}-title">{escape(section.title)}</h2>')
    parts += [f"<p>{_words(paragraph)}</p>" for paragraph in section.paragraphs]
    parts += [_figure(figure, figures[figure], caption) for figure, caption in section.figures.items()]
    parts += [_blocks(table, files, section.title, name) for table in section.tables]
    if section.folded or section.folded_tables:
        lines = "".join(f"<li>{_words(line)}</li>" for line in section.folded)
        parts.append(f"<details><summary>{FOLDED}</summary>" + (f"<ul>{lines}</ul>" if lines else ""))
        parts += [*(_blocks(table, files, section.title, name) for table in section.folded_tables), "</details>"]
    return "\n".join([*parts, "</section>"])


def _words(text: str) -> str:
    """Text of a report, in which commands stand between backticks, as Markdown has them."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _joined(text: str) -> str:
    """ "n = 2500" on one line."""
    return text.replace("n = ", "n\xa0=\xa0")


def _lacks_p(table: Table) -> bool:
    """Whether a difference has an interval alone, which other differences of the table have a p beside."""
    return any(
        isinstance(entry, Number) and entry.signed and entry.interval and not entry.p_text
        for row in table.rows
        for entry in row.entries
    )


def _figure(name: str, png: bytes, caption: str) -> str:
    across, down = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])  # the PNG's own pixels
    wide, high = across / DENSITY, down / DENSITY
    # on paper as wide as it was drawn; one that is high has a page to itself, others leave room for words
    paper = f"--wide: {wide:.2f}in; --high: {FULL_PAGE if high > HIGH else BESIDE_TEXT}mm"
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    image = f'<img src="{source}" alt="{escape(caption)}" width="{across // 2}" style="{paper}">'
    # on a narrow screen it scrolls, as its text could not be read if it were made smaller
    region = f'<div role="region" aria-label="Figure: {escape(name)}" tabindex="0">{image}</div>'
    return f'<figure id="figure-{escape(name)}">{region}<figcaption>{escape(caption)}</figcaption></figure>'


def _blocks(table: Table, files: Mapping[str, str], heading: str, section: str) -> str:
    """A table below a ``heading`` with what can be done with it and its notes; in parts where no page would hold it.

    ``section`` is the heading's id.
    """
    clear = any(isinstance(entry, Number) and entry.clear for row in table.rows for entry in row.entries)
    told = [table.footnote, COLOURS if clear else "", WITHOUT_P if clear and _lacks_p(table) else ""]
    notes = [f'<p class="note">{_words(note)}</p>' for note in told if note]
    copied = {"CSV": to_csv(table), "LaTeX": files.get(table.name) or latex(table)}
    # "<" would end the script, or begin a comment, wherever a name holds it
    texts = json.dumps(copied, ensure_ascii=False).replace("<", "\\u003c")
    link = f'<a href="tables/{escape(table.name)}.csv">{escape(table.name)}.csv</a>' if table.name in files else ""
    parts = enumerate(_parts(narrow(table, FITTING)))
    blocks = (_block(part, i, link, texts, section, titled=part.title != heading) for i, part in parts)
    return "\n".join([*blocks, *notes])


def _parts(table: Table) -> Iterator[Table]:
    """The table, or several with ``PRINTED`` columns each at most."""
    count = -(-len(table.columns) // PRINTED)
    if count < 2:
        yield table
        return
    size = -(-len(table.columns) // count)
    for start in range(0, len(table.columns), size):
        taken = slice(start, start + size)
        rows = [Row(row.name, row.entries[taken], row.group) for row in table.rows]
        columns = table.columns[taken]
        shown = f"columns {start + 1} to {start + len(columns)} of {len(table.columns)}"
        yield replace(table, title=f"{table.title}, {shown}", columns=columns, rows=rows)


def _block(table: Table, part: int, link: str, texts: str, section: str, *, titled: bool) -> str:
    """One table in a region that scrolls, its bar with a ``link``, and the ``texts`` of the whole that buttons copy.

    The region is called after section and table: so no two on a page have one name.
    """
    name = f"table-{escape(table.name)}" + (f"-{part + 1}" if part else "")
    heading = "" if titled else ' class="unseen"'
    return "\n".join(
        [
            f'<div class="block"><h3 id="{name}-title"{heading}>{escape(table.title)}</h3>',
            f'<div class="bar">{link}</div>',
            f'<div class="table" role="region" aria-labelledby="{section}-title {name}-title" tabindex="0">'
            f"{_table(table, name)}</div>",
            f'<script type="application/json">{texts}</script></div>',
        ]
    )


def _table(table: Table, name: str) -> str:
    """Intervals stand beside their values, or below them where there are many columns."""
    sides = [_side(row.entries[i] for row in table.rows) for i in range(len(table.columns))]
    heads = [f'<th scope="col">{escape(_joined(table.corner))}</th>' if table.corner else "<td></td>"]
    heads += [
        f'<th scope="col" class="{side}">{escape(column)}</th>'
        for column, side in zip(table.columns, sides, strict=True)
    ]
    many = ' class="many"' if len(table.columns) > 5 else ""
    lines = [f'<table id="{name}"{many}><caption class="unseen">{escape(table.title)}</caption>']
    lines += [f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
    for i, (heading, row) in enumerate(table.grouped()):
        if heading:
            lines += ["</tbody>", "<tbody>"] if i else []
            across = f'<th scope="rowgroup" colspan="{len(table.columns) + 1}">{escape(heading)}</th>'
            lines.append(f'<tr class="group">{across}</tr>')
        group = f' data-group="{escape(row.group)}"' if row.group else ""
        cells = "".join(map(_cell, row.entries, sides))
        lines.append(f'<tr{group}><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _side(entries: Iterable[Entry]) -> str:
    """Columns of text stand to the left; text among numbers stands with them."""
    kinds = {type(entry) for entry in entries}
    return "text" if str in kinds and Number not in kinds else "number"


def _cell(entry: Entry, side: str) -> str:
    if entry is None:
        return f'<td class="gap"><b>{GAP}</b><small class="i"></small></td>'
    if isinstance(entry, str):
        classes = "text" if side == "text" else "text number"
        return f'<td class="{classes}{" wide" if len(entry) > 40 else ""}">{_words(entry)}</td>'
    small = f'<small class="i">{entry.interval}</small>'
    if entry.signed:
        small += f'<small class="p">{escape(entry.p_text)}</small>'
    return f'<td class="{_classes(entry)}" data-value="{entry.value:.6g}"><b>{entry.main}</b>{small}</td>'


def _classes(number: Number) -> str:
    """Differences that stand after adjustment are coloured where one is better, and bold for who sees no colour."""
    if not number.signed:
        return "number"
    return f"signed {number.side}".strip()

"""report.html: one file that needs no other, light or dark as the reader's system is."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from string import Template

from coss_eval.reports.document import Document, Section
from coss_eval.reports.layout import GAP, Entry, Number, Table, narrow

FITTING = 7  # columns: what the page's width holds of a table of numbers with intervals
COLOURS = "Bold: p < .05 after Holm's adjustment; blue: better than the baseline, orange: worse."

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: $subtitle</title>
<style>
:root { color-scheme: light dark; --ink: #1d2126; --soft: #626b76; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9;
        --better: #00619a; --worse: #b34700; --flag: #fff4d6; --flag-ink: #5c4300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4b0; --line: #333a42; --paper: #14171a; --tint: #1c2126;
          --better: #6cb8ea; --worse: #f0975a; --flag: #3a3015; --flag-ink: #f3d98b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 76rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.6rem 0 .4rem; }
p { max-width: 52rem; margin: .3rem 0; }
p.sub, p.note, nav { color: var(--soft); }
p.note { font-size: .82rem; }
p.flag { background: var(--flag); color: var(--flag-ink); padding: .5rem .8rem; border-radius: .3rem; margin: .8rem 0; }
nav { margin: .8rem 0 0; font-size: .9rem; }
nav a { color: inherit; margin-right: 1rem; }
div.table { overflow-x: auto; margin: .4rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; white-space: nowrap; }
th, td { padding: .26rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th:first-child, .text { text-align: left; } td.text.number { text-align: right; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; white-space: normal; }
thead th:first-child { color: var(--soft); font-weight: 400; min-width: 9rem; max-width: 18rem; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--paper); max-width: 24rem;
           white-space: normal; }
tbody tr:hover > * { background: var(--tint); }
tr.group th { color: var(--soft); font-style: italic; padding-top: .8rem; }
td small { color: var(--soft); font-size: .88em; margin-left: .5em; display: inline-block; text-align: left; }
td small.i { min-width: 7.4em; } td.signed small.i { min-width: 9em; } td small.p { min-width: 4.3em; }
table.many td small { display: block; margin: 0; min-width: 0; text-align: right; }
table.many td, table.many th { padding: .3rem .55rem; } table.many td.text { white-space: normal; min-width: 7rem; }
table.many thead th:first-child, table.many tbody th { min-width: 0; max-width: 11rem; white-space: normal; }
td.better b { color: var(--better); } td.worse b { color: var(--worse); }
td b { font-weight: 400; } td.better b, td.worse b { font-weight: 600; }
td.gap { color: var(--soft); }
td.wide { white-space: normal; min-width: 14rem; max-width: 34rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; padding: .6rem; border-radius: .3rem;
             border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .82rem; max-width: 52rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="sub">$subtitle</p>
$warnings
<nav>$links</nav>
$sections
</body>
</html>
""")


def render(document: Document, figures: Mapping[str, bytes]) -> str:
    """The whole page; ``figures`` are PNG files by name and are embedded."""
    ids = {section.title: section.title.lower().replace(" ", "-") for section in document.sections}
    return _PAGE.substitute(
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        warnings="\n".join(f'<p class="flag">{escape(warning)}</p>' for warning in document.warnings),
        links="".join(f'<a href="#{name}">{escape(title)}</a>' for title, name in ids.items()),
        sections="\n".join(_section(section, ids[section.title], figures) for section in document.sections),
    )


def _section(section: Section, name: str, figures: Mapping[str, bytes]) -> str:
    parts = [f'<section id="{name}">', f"<h2>{escape(section.title)}</h2>"]
    parts += [f'<p class="note">{escape(paragraph)}</p>' for paragraph in section.paragraphs]
    tables = [_titled(table, shown=table.title != section.title) for table in section.tables]
    pictures = [_figure(figures[name], caption) for name, caption in section.figures.items()]
    parts += [*tables[:1], *pictures, *tables[1:]]
    return "\n".join([*parts, "</section>"])


def _figure(png: bytes, caption: str) -> str:
    width = int.from_bytes(png[16:20]) // 2  # the PNG's own width, shown at twice the screen's density
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    image = f'<img src="{source}" alt="{escape(caption)}" width="{width}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _titled(table: Table, *, shown: bool) -> str:
    heading = f"<h3>{escape(table.title)}</h3>" if shown else ""
    clear = any(isinstance(entry, Number) and entry.clear for row in table.rows for entry in row.entries)
    notes = [note for note in (table.footnote, COLOURS if clear else "") if note]
    return "\n".join([heading, _table(narrow(table, FITTING)), *(f'<p class="note">{escape(n)}</p>' for n in notes)])


def _table(table: Table) -> str:
    """Intervals stand beside their values, or below them where there are many columns."""
    sides = [_side(row.entries[i] for row in table.rows) for i in range(len(table.columns))]
    heads = [f"<th>{escape(table.corner)}</th>"]
    heads += [f'<th class="{side}">{escape(name)}</th>' for name, side in zip(table.columns, sides, strict=True)]
    many = ' class="many"' if len(table.columns) > 5 else ""
    lines = [f'<div class="table"><table{many}>', f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
    for heading, row in table.grouped():
        if heading:
            lines.append(f'<tr class="group"><th colspan="{len(table.columns) + 1}">{escape(heading)}</th></tr>')
        lines.append(f"<tr><th>{escape(row.name)}</th>{''.join(map(_cell, row.entries, sides))}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _side(entries: Iterable[Entry]) -> str:
    """Columns of text stand to the left; text among numbers stands with them."""
    kinds = {type(entry) for entry in entries}
    return "text" if str in kinds and Number not in kinds else "number"


def _cell(entry: Entry, side: str) -> str:
    if entry is None:
        return f'<td class="gap"><b>{GAP}</b><small class="i"></small></td>'
    if isinstance(entry, str):
        classes = "text" if side == "text" else "text number"
        return f'<td class="{classes}{" wide" if len(entry) > 40 else ""}">{escape(entry)}</td>'
    small = f'<small class="i">{entry.interval}</small>'
    if entry.signed:
        small += f'<small class="p">{escape(entry.p_text)}</small>'
    return f'<td class="{_classes(entry)}"><b>{entry.main}</b>{small}</td>'


def _classes(number: Number) -> str:
    """Differences that stand after adjustment are coloured, and bold for who sees no colour."""
    if not number.signed:
        return "number"
    return "signed" + ((" better" if number.better else " worse") if number.clear else "")

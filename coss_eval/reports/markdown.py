"""report.md: the document with its tables as pipes and its figures as links."""

from __future__ import annotations

from coss_eval.reports.document import FOLDED, Document, Section
from coss_eval.reports.layout import Table, markdown, markdown_safe


def render(document: Document) -> str:
    """The whole page; figures are expected in figures/ beside it."""
    parts = [f"# {document.title}", markdown_safe(document.subtitle)]
    parts += [f"> **{markdown_safe(warning)}**" for warning in document.warnings]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}", *map(markdown_safe, section.paragraphs)]
    parts += [f"![{caption}](figures/{name}.png)" for name, caption in section.figures.items()]
    for table in section.tables:
        parts += _table(table, titled=table.title != section.title)
    if section.folded or section.folded_tables:
        parts += [
            f"<details><summary>{FOLDED}</summary>",
            "\n".join(f"- {markdown_safe(line)}" for line in section.folded),
        ]
        parts += [part for table in section.folded_tables for part in _table(table, titled=True)]
        parts.append("</details>")
    return [part for part in parts if part]


def _table(table: Table, *, titled: bool) -> list[str]:
    footnote = [f"<sub>{markdown_safe(table.footnote)}</sub>"] if table.footnote else []
    return [*([f"**{markdown_safe(table.title)}**"] if titled else []), markdown(table), *footnote]

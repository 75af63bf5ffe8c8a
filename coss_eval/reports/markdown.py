"""report.md: the document with its tables as pipes and its figures as links."""

from __future__ import annotations

from coss_eval.reports.document import Document, Section
from coss_eval.reports.layout import markdown


def render(document: Document) -> str:
    """The whole page; figures are expected in figures/ beside it."""
    parts = [f"# {document.title}", document.subtitle]
    parts += [f"> **{warning}**" for warning in document.warnings]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}", *section.paragraphs]
    pictures = [f"![{caption}](figures/{name}.png)" for name, caption in section.figures.items()]
    for number, table in enumerate(section.tables):
        if table.title != section.title:
            parts.append(f"**{table.title}**")
        parts.append(markdown(table))
        if table.footnote:
            parts.append(f"<sub>{table.footnote}</sub>")
        if number == 0:
            parts += pictures
    return parts

"""From a store to a report: report.md, report.html, tables/ and figures/. Reads the store only; no torch.

pandas and matplotlib are imported when something is written, so that importing this package costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coss_eval.errors import CossError
from coss_eval.runtime.memory import seldom_collected
from coss_eval.store import Store

if TYPE_CHECKING:
    from coss_eval.reports.results import Results

__all__ = ["headline_html", "headline_text", "write", "write_leaderboard"]


@seldom_collected()
def write(
    store_path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    baseline: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    models: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    style: str = "plain",
) -> list[Path]:
    """Write the report of a results folder into it (or into ``out``); the paths written.

    ``baseline`` names the checkpoint or method that differences refer to (default: the first). ``groups`` names methods
    by patterns of their runs' names: {"CO-BYOL": ["runs/co-*/model.safetensors"]}. ``models`` are names or globs of
    what to show, in that order, which changes no p-value; ``rename`` gives models other names. ``style`` of the LaTeX
    tables: plain, neurips or cvpr. Writes report.md, report.html, tables/<name>.csv and .tex, tables/measurements.csv
    (every number, as fractions), tables/methods.tex with references.bib, and figures/<name>.png, as well as .pdf and
    .svg where an older one lies there: ``figures.write`` draws them for print, as wide as they are wanted.
    Raises CossError for a folder without finished cells or an ``out`` that cannot be written, UsageError for unknown
    names.
    """
    from coss_eval.reports import document, drawing, figures, html, latex, layout, markdown, methods, tables
    from coss_eval.reports.files import write_file
    from coss_eval.reports.folders import own_folder, read

    folder = own_folder(Store(store_path)) if out is None else Path(out)
    (store,) = read(store_path, rename=rename)
    results = _results(store, groups, models)
    base = document.resolve_baseline(results, baseline)
    latex.page_of(style)  # an unknown one fails early
    everything = tables.apart_from_untrained(results.frame).to_csv(index=False, lineterminator="\n")
    paths = [write_file(folder / "tables" / "measurements.csv", everything)]  # first: an unwritable folder fails early
    canvas = drawing.Canvas(baseline=base)
    drawn = figures.write(results, folder / "figures", canvas=canvas, kinds=("png",), renew=True)
    pictures = {path.stem: path.read_bytes() for path in drawn if path.suffix == ".png"}
    page = document.build(results, base, list(pictures))
    tex = {table.name: latex.latex(table, style) for table in page.tables}
    paths.append(write_file(folder / "report.md", markdown.render(page)))
    paths.append(write_file(folder / "report.html", html.render(page, pictures, tex)))
    for table in page.tables:
        paths.append(write_file(folder / "tables" / f"{table.name}.csv", layout.to_csv(table)))
        paths.append(write_file(folder / "tables" / f"{table.name}.tex", tex[table.name]))
    text = methods.methods(results)
    paths.append(write_file(folder / "tables" / "methods.tex", text))
    paths.append(write_file(folder / "tables" / "references.bib", methods.references(text)))
    for table in document.long_tables(results):
        paths.append(write_file(folder / "tables" / f"{table.name}.csv", layout.to_csv(table)))
    return paths + drawn


def headline_text(store: Store, width: int | None = None) -> str:
    """The headline table as plain text for a terminal, a row a measure and a column a checkpoint.

    One line that says so where the store has nothing for the headline.
    """
    from coss_eval.reports import document, headline, layout

    results = _results(store)
    scores = headline.columns(results)
    if not scores:
        return f"{', '.join(results.tasks)}: nothing measured that the headline shows; see the report's tables"
    table = document.headline_table(results, scores)
    shown = layout.text(layout.transposed(table), width)
    return f"{shown}\n{table.gaps} not measured ({layout.GAP})" if table.gaps else shown


def headline_html(store: Store) -> str:
    """The headline as an HTML table for a notebook, a row a measure and a column a checkpoint; empty without one."""
    import pandas as pd

    from coss_eval.reports import document, headline, layout

    results = _results(store)
    scores = headline.columns(results)
    if not scores:
        return ""
    table = layout.transposed(document.headline_table(results, scores))
    cells = [[layout.GAP if entry is None else str(entry) for entry in row.entries] for row in table.rows]
    frame = pd.DataFrame(cells, index=[row.name for row in table.rows], columns=list(table.columns))
    return frame.rename_axis(columns=table.corner).to_html()


def write_leaderboard(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    models: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> list[Path]:
    """Rank the models of several results folders: leaderboard.html and .md with tables in ``out``; the paths written.

    ``out`` is results/leaderboard by default; all else as in ``write``. Ranks stay those among all models.
    """
    from coss_eval.reports import leaderboard

    folder = Path("results") / "leaderboard" if out is None else Path(out)
    return leaderboard.write(folders, folder, groups=groups, models=models, rename=rename)


def _results(store: Store, groups: Mapping[str, Sequence[str]] | None = None, models: Sequence[str] = ()) -> Results:
    from coss_eval.reports.results import Results

    if not store.is_there():
        raise CossError(f"there is no folder {store.path}; give a results folder that coss-eval has evaluated into")
    results = Results(store, groups, models)
    if not results.records:
        raise CossError(f"no finished cells in {store.path}; give a results folder that coss-eval has evaluated into")
    return results

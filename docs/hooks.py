"""The pages of the site that are made of the code, of notebooks/ and of results/: nothing in them is typed by hand.

mkdocs calls ``on_config`` and ``on_files``. Notebooks are shown as they stand; with COSS_DOCS_EXECUTE=1 they are run
first (some six minutes) and shown with what they give.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import griffe

ROOT = Path(__file__).parents[1]
RESULTS, NOTEBOOKS = ROOT / "results", ROOT / "notebooks"
Pages = dict[str, str | bytes]

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """The menus of what is found: a page a notebook, a page a folder of results."""
    filled = {"Tutorials": [*tutorial_sources()], "Results": ["results/index.md", *result_sources()]}
    for entry in config["nav"]:
        (title,) = entry
        entry[title] = filled.get(title, entry[title])
    return config


def on_files(files: Any, config: Any) -> Any:
    """The generated pages beside those of docs/."""
    from mkdocs.structure.files import File

    for path, content in all_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


@cache
def all_pages() -> Pages:
    """Every generated page and picture by its path in the site."""
    return {**reference_pages(), **tutorial_pages(), **results_pages()}


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# reference: of the code


def reference_pages() -> Pages:
    return {
        "reference/commands.md": commands_page(),
        "reference/names.md": names_page(),
        "reference/api.md": api_page(),
    }


def commands_page() -> str:
    """Every command with its flags, as --help has them."""
    from coss_eval import cli
    from coss_eval.cli.app import app

    assert cli.main  # which has registered the commands
    text = app.generate_docs(output_format="markdown")
    text = re.sub(r"## Table of Contents\n.*?(?=\n\*\*)", "", text, flags=re.DOTALL)
    text = text.replace("# coss-eval\n", "# Commands\n", 1)
    # of a list, cyclopts names a flag that empties it, which nobody needs
    return re.sub(r", --empty-[\w-]+`", "`", text)


def names_page() -> str:
    """What each flag that takes a name knows: the registries, as ``coss-eval list`` has them."""
    parts = [
        "# Names and tables",
        "Made of the registries, which the command line, the reports and the tests read, too. `coss-eval list` prints "
        "the same, and the data sets of your own `--data-root`; what you register yourself is an equal.",
    ]
    for title, text in name_tables().items():
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def name_tables() -> dict[str, str]:
    """A table a registry."""
    from coss_eval import sweeps, tasks
    from coss_eval.attacks.attack import ATTACKS
    from coss_eval.checkpoints.layouts import LAYOUTS
    from coss_eval.cli.describe import ARCHITECTURES, OTHER_METHODS
    from coss_eval.corruptions.names import NAMES
    from coss_eval.corruptions.registry import CORRUPTIONS
    from coss_eval.data import layouts as data_layouts
    from coss_eval.data.open import BUILT_IN
    from coss_eval.training import presets
    from coss_eval.training.methods import METHODS

    task_rows = [
        (f"[{name}](commands.md#coss-eval-{name})", entry.about, entry.source)
        for name, entry in tasks.entries().items()
    ]
    corruption_rows = [
        (code(name), c.category, c.set, ", ".join(c.severities)) for name in NAMES if (c := CORRUPTIONS[name])
    ]
    attack_rows = [(code(name), ", ".join(kind.norms), kind.about) for name, kind in ATTACKS.items()]
    layout_rows = [(one.name, ", ".join(one.branches), _moments(one.moments), _source(one.source)) for one in LAYOUTS]
    return {
        "Tasks": table(("task", "what is measured", "source"), task_rows),
        "Corruptions": table(("corruption", "kind", "set", "severities published for"), corruption_rows),
        "Attacks": table(("attack", "norms", "what it is"), attack_rows),
        "Methods": two_columns("method", METHODS | OTHER_METHODS),
        "Presets": two_columns("preset", presets()),
        "Sweeps": two_columns("sweep", sweeps.shipped()),
        "Checkpoint layouts": table(
            ("layout", "branches", "mean and std that its code fixes", "written by"), layout_rows
        ),
        "Architectures": two_columns("architecture", ARCHITECTURES),
        "Data sets": two_columns("--data", BUILT_IN),
        "Data layouts": two_columns("layout", {one.name: one.about for one in data_layouts.LAYOUTS}),
    }


def code(name: str) -> str:
    return f"`{name}`"


def two_columns(kind: str, entries: Mapping[str, str]) -> str:
    return table((kind, "what it is"), ((code(name), about) for name, about in entries.items()))


def _moments(moments: tuple[tuple[float, ...], tuple[float, ...]] | None) -> str:
    return "" if moments is None else "; ".join(" ".join(f"{value:g}" for value in values) for values in moments)


def _source(text: str) -> str:
    """GitHub's repositories as links; code as code."""
    linked = re.sub(r"github\.com/[\w./-]+", lambda found: f"[{found[0]}](https://{found[0]})", text)
    return f"`{text}`" if "(" in text and "github.com" not in text else linked


def api_page() -> str:
    """The public surface: the names of coss_eval, and those of its rooms that people call."""
    import coss_eval as ce

    own = {name: getattr(ce, name) for name in ce.__all__ if name != "__version__"}
    rooms = {
        "corruptions": ("corrupt", "corruption", "register"),
        "attacks": ("pgd", "fgsm"),
        "internal": ("corrupted",),
        "redundancy": ("measure", "heatmap"),
        "receptive_field": ("theoretical", "effective"),
        "similarity": ("cka", "rsa", "procrustes"),
    }
    parts = ["# Python", "`import coss_eval as ce` is quick: torch and pandas are imported when something needs them."]
    parts += [_entry(f"ce.{name}", found) for name, found in own.items()]
    for room, names in rooms.items():
        parts += [_entry(f"ce.{room}.{name}", getattr(getattr(ce, room), name)) for name in names]
    return "\n\n".join(parts) + "\n"


def _entry(title: str, found: Any) -> str:
    """Signature and docstring under the name by which people call it."""
    found = getattr(found, "__wrapped__", found)
    options = [f'heading: "{title}"', f'toc_label: "{title}"', f"members: {str(isinstance(found, type)).lower()}"]
    lines = [f"::: {found.__module__}.{found.__qualname__}", "    options:", *(f"      {one}" for one in options)]
    return "\n".join(lines)


class Fenced(griffe.Extension):
    """For mkdocstrings: the examples of docstrings as code, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Each example (from >>> to the next empty line) between fences."""
    return re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda found: f"```pycon\n{found[0]}\n```", text)


# tutorials: of the notebooks


def tutorial_sources() -> list[str]:
    return [f"tutorials/{path.stem}.md" for path in sorted(NOTEBOOKS.glob("*.py"))]


def tutorial_pages(folder: Path = NOTEBOOKS, *, execute: bool | None = None) -> Pages:
    """The notebooks as pages, pictures beside them; ``execute`` None: run first if COSS_DOCS_EXECUTE=1 says so."""
    import jupytext
    from nbconvert import MarkdownExporter

    execute = os.environ.get("COSS_DOCS_EXECUTE") == "1" if execute is None else execute
    pages: Pages = {}
    with tempfile.TemporaryDirectory() as work:  # one for all: the first trains what the others look at
        for path in sorted(folder.glob("*.py")):
            notebook = jupytext.read(path)
            if execute:
                _execute(notebook, work)
            body, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": f"{path.stem}_files"})
            pages |= {f"tutorials/{name}": content for name, content in resources["outputs"].items()}
            shown = "with what it gave" if execute else "without its outputs; run it to see them"
            note = f"*This is `notebooks/{path.name}`, {shown}: `jupyter lab notebooks/{path.stem}.ipynb`.*"
            body = re.sub(r"(\]\(\w+)\.ipynb\)", r"\1.md)", body)
            pages[f"tutorials/{path.stem}.md"] = _with_note(body, note)
    return pages


def _execute(notebook: Any, folder: str) -> None:
    """Run its cells in ``folder``, on this checkout, with pictures in the page."""
    from nbconvert.preprocessors import ExecutePreprocessor

    searched = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    runner = ExecutePreprocessor(timeout=1200, kernel_name="python3")
    with patch.dict(os.environ, PYTHONPATH=searched, MPLBACKEND="module://matplotlib_inline.backend_inline"):
        runner.preprocess(notebook, {"metadata": {"path": folder}})


def _with_note(body: str, note: str) -> str:
    """The note below the page's title."""
    title, _, rest = body.lstrip().partition("\n")
    return f"{title}\n\n{note}\n{rest}"


# results: of results/


def result_sources() -> list[str]:
    return [f"results/{folder.name}.md" for folder, _ in _results()]


def _results() -> Iterator[tuple[Path, Path]]:
    """Each folder of results/ with its page."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for name in ("report.md", "README.md"):
            if (folder / name).is_file():
                yield folder, folder / name
                break


def results_pages() -> Pages:
    """The index of results/ with links to a page a folder, each as it is kept there."""
    known = {folder.name: page for folder, page in _results()}
    index = re.sub(
        r"^\| `([\w-]+)` \|",
        lambda found: f"| [`{found[1]}`]({found[1]}.md) |" if found[1] in known else found[0],
        (RESULTS / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    pages: Pages = {"results/index.md": _local(index, RESULTS, known)}
    for name, page in known.items():
        figures = (
            f"; `coss-eval report results/{name}` draws its figures" if (page.parent / "run.json").exists() else ""
        )
        note = f"*As kept in `results/{name}/`{figures}.*"
        text = re.sub(r"\A# .*", f"# {name}", page.read_text().lstrip())
        pages[f"results/{name}.md"] = _with_note(_local(text, page.parent, known), note)
    return pages


def _local(text: str, folder: Path, known: Mapping[str, Path]) -> str:
    """Links to other pages of results as the site has them; to what it has not, the words alone; no missing picture."""

    def replaced(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if target.startswith(("https://", "http://", "#")) or target.removesuffix(".md") in known:
            return found[0]
        path = posixpath.normpath((folder / target).relative_to(RESULTS).as_posix()) if not picture else ""
        other = path.partition("/")[0]
        return f"[{words}]({other}.md)" if other in known and not picture else "" if picture else words

    return _LINK.sub(replaced, text).replace("<details>", "<details markdown>")  # whose inside is Markdown, too

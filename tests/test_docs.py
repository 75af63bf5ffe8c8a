"""The documentation site: its commands and snippets do what the pages say, its tables are whole, it builds strictly.

A block of commands is marked in its page: ``<!-- run -->`` (run here, in the page's order, in one folder a page) or
``<!-- parse -->`` (read by the real command's parser, where running takes minutes, data or machines that a test has
not). Python is always run; with a title it is a file of that name. A block ``text`` after one is what it prints, with
... for what varies.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import pytest
import yaml

from coss_eval import attacks, cli, tasks
from coss_eval.cli.app import app
from coss_eval.corruptions.names import NAMES
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.errors import CossWarning

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(
    r"(?ms)^(?:<!-- (?P<kind>\w+) -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>[\w.]+)\")?\n(?P<text>.*?)^```$"
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHELL = {"cd", "export", "git", "ray", "srun"}  # of whose words nothing is checked
KINDS = {"bash": {"run", "parse"}, "python": {None}, "text": {None}, "yaml": {None}, "bibtex": {None}}


class Block(NamedTuple):
    """One fenced block; ``expected`` is the block of text right after it."""

    line: int
    kind: str | None
    language: str
    title: str | None
    text: str
    expected: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    made = []
    for one, after in zip(found, [*found[1:], None], strict=False):
        follows = after is not None and after["language"] == "text" and not text[one.end() : after.start()].strip()
        expected = after["text"] if after is not None and follows else None
        line = text.count("\n", 0, one.start()) + 1
        made.append(Block(line, one["kind"], one["language"], one["title"], one["text"], expected))
    return made


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> str:
    """What the command prints, run in this process; it must end well."""
    assert words[0] == "coss-eval", f"only coss-eval is run, not {words[0]}"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0, f"{shlex.join(words)}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def parse_command(words: list[str]) -> None:
    """Read what the real command would be given; nothing runs."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "sbatch":
        parse_command(shlex.split(words[-1].replace("$SLURM_ARRAY_TASK_ID", "1")))
    elif "coss-eval" in words or "coss_eval" in words:
        place = words.index("coss-eval") if "coss-eval" in words else words.index("coss_eval")
        flags = words[place + 1 :]
        if flags != ["--version"]:
            app.parse_args(flags, exit_on_error=False, print_error=False)
    elif words[:2] == ["pip", "install"]:
        asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {name for text in asked for name in text.split(",")} <= set(EXTRAS)
    else:
        assert words[0] in SHELL, f"no test knows how to read {shlex.join(words)}"


def run_python(block: Block, names: dict[str, Any]) -> str:
    """What the snippet prints; a titled one is a file, and is imported."""
    if block.title is not None:
        Path(block.title).write_text(block.text)
        importlib.invalidate_caches()
        importlib.import_module(Path(block.title).stem)
        return ""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, "snippet", "exec"), names)  # noqa: S102 - the page's own, which is what is tested
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder without data of this machine; what a page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("COSS_DATA_ROOT", raising=False)
    monkeypatch.setenv("COSS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    before = dict(attacks.ATTACKS), dict(CORRUPTIONS)
    yield tmp_path
    for registry, known in zip((attacks.ATTACKS, CORRUPTIONS), before, strict=True):
        registry.clear()
        registry.update(known)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_what_comes(page: Path, folder: Path) -> None:
    checker, names = doctest.OutputChecker(), dict[str, Any]()
    for block in blocks(page):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CossWarning)
            if block.kind == "run":
                got = "".join(map(run_command, commands(block)))
            elif block.language == "python":
                got = run_python(block, names)
            elif block.language == "yaml" and block.title is not None:
                Path(block.title).write_text(block.text)
                continue
            else:
                continue
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        shown = block.expected is None or checker.check_output(block.expected, got, options)
        assert shown, f"{page.name}, line {block.line}, gives\n{got}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_checked_in_one_way(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        assert block.kind in KINDS.get(block.language, ()), f"{where}: {block.language} marked {block.kind}"
        if block.kind == "parse":
            for words in commands(block):
                parse_command(words)
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), where
    assert len(blocks(page)) == page.read_text().count("\n```") // 2  # none that the pattern passes over


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which needs what the extra docs has."""
    pytest.importorskip("griffe", reason="pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_have_every_entry(hooks: ModuleType) -> None:
    from coss_eval.checkpoints.layouts import LAYOUTS
    from coss_eval.training.methods import METHODS

    tables = hooks.name_tables()
    wanted = {
        "Tasks": tasks.entries(),
        "Corruptions": NAMES,
        "Attacks": attacks.ATTACKS,
        "Methods": METHODS,
        "Checkpoint layouts": [layout.name for layout in LAYOUTS],
    }
    for title, names in wanted.items():
        assert [name for name in names if f"{name}" not in tables[title]] == []


def test_the_page_of_commands_has_every_command_and_flag(hooks: ModuleType) -> None:
    text = hooks.commands_page()
    for name in app:
        if not name.startswith("-"):
            assert f"\n## coss-eval {name}\n" in text
    assert "* `--ckpt STR...`" in text
    assert "--empty-" not in text


NOTEBOOK = """
# %% [markdown]
# # 1. Small
#
# Go on with [the next](02_next.ipynb).

# %%
import matplotlib.pyplot as plt
import coss_eval

print("of", coss_eval.__name__)
plt.plot([0, 1]);
"""


@pytest.mark.slow
@pytest.mark.parametrize("execute", [False, True])
def test_notebooks_become_pages_with_what_they_gave_where_they_are_run(
    execute: bool, hooks: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("nbconvert", reason="pip install '.[docs]'")
    (tmp_path / "01_small.py").write_text(NOTEBOOK.lstrip())
    pages = hooks.tutorial_pages(tmp_path, execute=execute)
    text = pages.pop("tutorials/01_small.md")
    assert text.startswith("# 1. Small\n\n*This is `notebooks/01_small.py`")
    assert "[the next](02_next.md)" in text
    assert ("of coss_eval" in text) is execute
    pictures = [name for name, content in pages.items() if content[:4] == b"\x89PNG"]
    assert len(pictures) == int(execute)
    assert all(name.removeprefix("tutorials/") in text for name in pictures)


class Links(HTMLParser):
    """The targets of a page's links, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loaded, self.anchors = list[str](), list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {str(given[name]) for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(str(given["src"]))
        elif tag == "link" and given.get("href"):
            self.loaded.append(str(given["href"]))


@pytest.mark.slow
def test_the_site_builds_strictly_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    """Without a warning; nothing is fetched when a page is read, and every link within the site has its target."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 15
    api = re.sub(r"<[^>]+>", "", (site / "reference/api.html").read_text())
    for name in ("ce.evaluate", "ce.attacks.pgd", "ce.Run"):
        assert re.search(rf"{re.escape(name)}¶?\s", api)
    unread = [path.name for path in pages if "|--" in re.sub(r"(?s)<(pre|code).*?</\1>", "", path.read_text())]
    assert unread == []  # no table that stayed Markdown
    assert re.search(r"evaluate\(\s*models: [^)]*limit: int \| None = None", api)  # signatures, typed
    wrong = []
    for path, page in pages.items():
        wrong += [f"{path.name} loads {target}" for target in page.loaded if urlparse(target).netloc]
        for target in [*page.links, *page.loaded]:
            parts = urlparse(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            anchors = pages[file].anchors if file in pages else None
            if not file.is_file() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                wrong.append(f"{path.name} links to {target}")
    assert wrong == []


def test_the_readmes_table_of_the_study_is_its_pages() -> None:
    """Each of its rows has the numbers that stand in the page's row of that method."""
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "results" / "co-claims-gpu" / "report.md").read_text()
    table = readme.partition("<!-- of results/co-claims-gpu/report.md -->\n")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == 2
    assert [row for row in rows if row not in page] == []


def test_the_arithmetic_of_scale_is_of_the_measured_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """Its rates are those of results/gpu and results/speed, and its figures follow from them."""
    block = next(block for block in blocks(ROOT / "docs" / "scale.md") if block.language == "python")
    names: dict[str, Any] = {}
    exec(compile(block.text, "scale.md", "exec"), names)  # noqa: S102 - the page's own, which is what is tested
    assert capsys.readouterr().out == block.expected
    gpu, speed = ((ROOT / "results" / name / "README.md").read_text() for name in ("gpu", "speed"))
    measured = {
        rf"\| byol, ResNet-50, 224 px: training step \| {names['byol']:,} images/s": gpu,
        rf"\| co-byol, ResNet-50, 224 px: training step \| {names['co_byol']:,} images/s": gpu,
        rf"224 px, mean, .* {64e3 * names['corruption']:.3f} ms a batch .* fp32, {64e3 * names['forward']:.3g} ms": gpu,
        rf"redundancy of .* a bare forward pass, .* \| {names['redundancy']} \|": gpu,
        rf"a step of PGD that breaks nothing .* {names['pgd_step']} of its time": speed,
        rf"10 levels at every site .* {names['sharing']} x \(ResNet-50\)": speed,
    }
    assert [pattern for pattern, text in measured.items() if not re.search(pattern, text)] == []

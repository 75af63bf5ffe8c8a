"""The page: its structure, its script, what a real browser makes of it on a screen, a telephone and paper."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from coss_eval.reports import html
from coss_eval.reports.document import Document, Section, build
from coss_eval.reports.latex import latex
from coss_eval.reports.layout import Number, Row, Table, to_csv
from coss_eval.reports.markdown import render as markdown_page
from coss_eval.reports.results import Results
from coss_eval.store import Store

NASTY = [
    "</script><script>document.title='owned'</script>",
    "<!-- <script>",
    "a|b`c\\d_%{x}$&\"'",
    "表現の頑健性とは何か",
    "an_exceedingly_long_name_" + "x" * 125,
]
VOID = ("meta", "img", "br", "hr", "input", "link")
NODE, CHROMIUM = (
    shutil.which("node"),
    next(
        (
            found
            for name in (os.environ.get("COSS_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
            if name and (found := shutil.which(name))
        ),
        None,
    ),
)
AXE = find_spec("axe_core_python")
with_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here (COSS_CHROMIUM=PATH)")


class Page(HTMLParser):
    """Elements in order, as (tag, attributes, what is open); text by the element that it is in; all must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append((tag, found, [name for name, _ in self.open]))
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1][0] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def nasty() -> Document:
    """Names that break pages, in every place where a name stands; more columns than a sheet of paper has."""
    number = Number(0.123, 0.1, 0.2, p=0.001, signed=True)
    wide = [f"{name} {i}" for i in range(3) for name in NASTY]
    rows = [
        Row(f"{name} {i}", [Number(0.01 * (i - len(name))), *[number] * 14], f"group {name}")
        for name in NASTY
        for i in range(3)
    ]
    few = Table("few", NASTY[0], "n = 9", NASTY, [Row(name, [number, None, "text", *[number] * 2]) for name in NASTY])
    command = "`coss-eval " + "--ckpt some/long/path.pth " * 20 + "`"
    runs = Table("runs", "Runs", "", ["a command"], [Row("1", [command])])
    sections = [
        Section("Verdict", [NASTY[0], NASTY[4]], [few], folded=[NASTY[1]]),
        Section("Verdict", [], [Table("wide", "Wide", "n = 9", wide, rows)], folded_tables=[runs]),
    ]
    return Document("coss-eval report", f"on {NASTY[0]}", [NASTY[4], NASTY[1]], sections)


@pytest.fixture(params=["nasty", "store"])
def page(request: pytest.FixtureRequest, writer: Callable[..., Any], store: Store) -> tuple[str, Document]:
    if request.param == "nasty":
        document = nasty()
    else:
        for name in ("a", "b"):
            writer(name, len(name)).everything()
        document = build(Results(store))
    return html.render(document, {}, {table.name: latex(table) for table in document.tables}), document


def test_the_page_keeps_the_rules_of_access(page: tuple[str, Document]) -> None:
    """What axe asks of a static page: names, captions, ids once, headings in order, scopes, regions reached by keys."""
    found = Page(page[0])
    ids = Counter(attributes["id"] for _, attributes, _ in found.elements if "id" in attributes)
    assert max(ids.values()) == 1, ids.most_common(3)
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("main")) == len(found.all("title")) == len(found.all("h1")) == 1
    levels = [int(tag[1]) for tag, _, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image["alt"] for image in found.all("img"))
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(head["scope"] in ("col", "row", "rowgroup") for head in found.all("th"))
    for name in ("aria-labelledby", "aria-describedby"):
        named = [attributes[name].split() for _, attributes, _ in found.elements if name in attributes]
        assert all(one in ids for names in named for one in names)
    regions = [a for _, a, _ in found.elements if a.get("class") == "table"]
    assert len(regions) == len(found.all("table"))
    assert all((a["tabindex"], a["role"]) == ("0", "region") for a in regions)
    named = Counter(a["aria-labelledby"] for _, a, _ in found.elements if "aria-labelledby" in a)
    assert max(named.values()) == 1
    inside = {"main", "nav", "header"}  # all that is seen lies in a landmark
    assert all(inside & set(parents) for tag, _, parents in found.elements if tag in ("p", "table", "a", "h2", "img"))


def test_links_resolve_and_nothing_is_asked_for(page: tuple[str, Document]) -> None:
    found, names = Page(page[0]), {table.name for table in page[1].tables}
    ids = {attributes.get("id") for _, attributes, _ in found.elements}
    sources = [a[name] for _, a, _ in found.elements for name in ("src", "href", "srcset", "data") if name in a]
    inner = [source.removeprefix("#") for source in sources if source.startswith("#")]
    files = [re.fullmatch(r"tables/(\w+)\.csv", source) for source in sources if not source.startswith(("#", "data:"))]
    assert set(inner) <= ids
    assert len(inner) == len(page[1].sections)
    assert {file[1] for file in files if file} == names
    assert all(files)
    assert not found.all("link")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?://", page[0])


def test_names_are_shown_and_never_run(page: tuple[str, Document]) -> None:
    """Two scripts a table at most, all of them ours; what the buttons copy is the file's text."""
    text, document = page
    found = Page(text)
    kinds = [script.get("type", "ours") for script in found.all("script")]
    assert Counter(kinds) == {"application/json": len(found.all("table")), "ours": 1}
    assert kinds[-1] == "ours"
    copied = [json.loads(data) for tag, data in found.texts if tag == "script" and data.startswith("{")]
    by_text = {to_csv(table) for table in document.tables}
    assert {texts["CSV"] for texts in copied} == by_text
    assert all(texts["LaTeX"].startswith("%") for texts in copied)
    if document.subtitle == nasty().subtitle:
        heads = [data for tag, data in found.texts if tag == "th"]
        assert all(name in heads for name in NASTY)
        assert "<script>" not in re.sub(r"\\<script", "", markdown_page(document))


def test_tables_that_no_sheet_holds_are_in_parts() -> None:
    page = html.render(nasty(), {}, {"few": "the LaTeX of few"})
    assert page.count('"LaTeX": "the LaTeX of few"') == 1  # in the style that its file has
    found = Page(page)
    wide = [table["id"] for table in found.all("table") if table["id"].startswith("table-wide")]
    assert wide == ["table-wide", "table-wide-2"]
    heads = [parents.count("thead") for tag, _, parents in found.elements if tag == "th" and "thead" in parents]
    assert len(heads) > 15
    assert [link["href"] for link in found.all("a") if "tables/" in link["href"]] == ["tables/few.csv"]


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_script_is_javascript() -> None:
    subprocess.run([str(NODE), "--check", str(Path(html.__file__).with_name("report.js"))], check=True, timeout=60)


def browse(page: str, script: str, width: int, *, seconds: int = 5) -> Any:
    """What ``script`` returns, now or as a promise, in a window of ``width`` pixels, by way of the page's title."""
    run = f"<script>Promise.resolve((() => {{ {script} }})()).then((found) => {{"
    run += " document.title = 'done ' + JSON.stringify(found); });</script>"
    with tempfile.TemporaryDirectory() as folder:  # a browser from a store of applications sees no hidden ones
        path = Path(folder) / "page.html"
        path.write_text(page.replace("</body>", f"{run}</body>"))
        # narrower windows than 500 pixels are not given: a frame is as narrow as it is asked to be
        frame = f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
        outer = f"{frame}<script>setInterval(() => {{ document.title = frames[0].document.title; }}, 50);</script>"
        (Path(folder) / "outer.html").write_text(f"<!doctype html><title>-</title>{outer}")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
        profile = f"--user-data-dir={folder}/profile"
        command = [
            str(CHROMIUM),
            *flags,
            profile,
            "--dump-dom",
            f"--virtual-time-budget={1000 * seconds}",
            (Path(folder) / "outer.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>done (.*?)</title>", done.stdout)
    assert found, done.stdout[:500]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@with_browser
@pytest.mark.slow
def test_a_browser_sorts_filters_and_copies() -> None:
    found = browse(
        html.render(nasty(), {}),
        """
        const table = document.getElementById("table-wide");
        const rows = () => [...table.querySelectorAll("tbody tr:not(.group)")]
          .map((row) => Number(row.cells[1].dataset.value));
        const head = table.tHead.rows[0].cells[1];
        const before = rows();
        const orders = [1, 2, 3].map(() => {
          head.querySelector("button").click();
          return [head.getAttribute("aria-sort"), rows()];
        });
        const input = table.closest(".block").querySelector("input");
        input.value = "exceedingly";
        input.dispatchEvent(new Event("input"));
        const shown = [...table.tBodies].flatMap((body) => [...body.rows]).filter((row) => !row.hidden)
          .map((row) => row.cells[0].textContent);
        const buttons = [...document.querySelectorAll("button")];
        return {
          before, orders, shown,
          unnamed: buttons.filter((one) => !one.textContent.trim()).length,
          copies: buttons.filter((one) => one.textContent.startsWith("copy")).length,
        };
        """,
        1200,
    )
    ways = [way for way, _ in found["orders"]]
    falling, rising, again = (rows for _, rows in found["orders"])
    assert ways == ["descending", "ascending", "none"]
    assert again == found["before"]
    for i in range(0, len(again), 3):  # rows stay in their groups
        before = sorted(found["before"][i : i + 3])
        assert rising[i : i + 3] == before
        assert falling[i : i + 3] == before[::-1]
    assert found["shown"] == [f"group {NASTY[4]}", *(f"{NASTY[4]} {i}" for i in range(3))]
    assert found["unnamed"] == 0
    assert found["copies"] == 2 * 4


@with_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen_or_printed_over(width: int) -> None:
    """The page itself never scrolls sideways, its tables do; no text lies over another; the menu stays in view."""
    found = browse(
        html.render(nasty(), {}),
        """
        const seen = (one) => one.getClientRects().length && !one.closest(".unseen");
        const boxes = [...document.querySelectorAll("h1, h2, h3, p, .bar, div.table, summary")].filter(seen)
          .map((one) => one.getBoundingClientRect());
        const apart = (a, b) => a.bottom - 1 <= b.top || b.bottom - 1 <= a.top
          || a.right - 1 <= b.left || b.right - 1 <= a.left;
        const over = boxes.filter((one, i) => !boxes.slice(i + 1).every((other) => apart(one, other))).length;
        const spilt = [...document.querySelectorAll("th, td")].filter(seen)
          .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.textContent);
        scrollTo(0, 1e6);
        const menu = document.querySelector("nav").getBoundingClientRect().top;
        return { width: document.documentElement.scrollWidth, over, spilt, menu };
        """,
        width,
    )
    assert found == {"width": width, "over": 0, "spilt": [], "menu": 0}


@with_browser
@pytest.mark.skipif(AXE is None, reason="axe-core-python is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_axe_finds_no_violation(width: int, store: Store, writer: Callable[..., Any]) -> None:
    """Of a page with all tasks, a figure, and what is folded away unfolded."""
    for name in ("a", "b"):
        writer(name, len(name)).everything()
    buffer = io.BytesIO()
    Figure((7, 2)).savefig(buffer, format="png", dpi=220)
    page = html.render(build(Results(store), figures=["forest"]), {"forest": buffer.getvalue()})
    assert AXE is not None
    assert AXE.origin is not None
    axe = Path(AXE.origin).with_name("axe.min.js").read_text("utf-8")
    found = browse(
        page.replace("</head>", f"<script>{axe}</script></head>"),
        """
        document.querySelectorAll("details").forEach((one) => { one.open = true; });
        return axe.run(document).then((all) => ({
          passed: all.passes.length,
          violations: all.violations.map((one) => [one.id, one.nodes.map((node) => node.html.slice(0, 200))]),
        }));
        """,
        width,
        seconds=60,
    )
    assert found["violations"] == []
    assert found["passed"] > 10


@with_browser
@pytest.mark.slow
def test_on_a_narrow_screen_a_figure_scrolls_at_its_own_size(store: Store) -> None:
    """Made smaller, its text could not be read."""
    buffer = io.BytesIO()
    Figure((7, 2)).savefig(buffer, format="png", dpi=220)
    page = html.render(
        Document("t", "s", [], [Section("Verdict", figures={"forest": "c"})]), {"forest": buffer.getvalue()}
    )
    script = """
        const image = document.querySelector("figure img"), region = image.parentElement;
        return [image.getBoundingClientRect().width, region.scrollWidth > region.clientWidth,
                document.documentElement.scrollWidth];
        """
    assert browse(page, script, 390) == [770, True, 390]
    wide, scrolls, _ = browse(page, script, 1200)
    assert (wide, scrolls) == (770, False)


@with_browser
@pytest.mark.slow
def test_no_column_is_cut_on_paper() -> None:
    """Under the rules for print, on a landscape A4 sheet less its margins, no table is wider than the sheet."""
    page = html.render(nasty(), {})
    sheet = round((297 - 24) / 25.4 * 96)
    found = browse(
        page.replace("@media print", "@media all"),
        """
        const cut = [...document.querySelectorAll("th, td")]
          .filter((one) => one.getBoundingClientRect().right > innerWidth + 1);
        return { width: document.documentElement.scrollWidth, cut: cut.length };
        """,
        sheet,
    )
    assert found == {"width": sheet, "cut": 0}


@with_browser
@pytest.mark.slow
def test_words_of_heads_are_whole_and_a_long_menu_is_seen() -> None:
    """Where columns are narrow "receptive" was broken; a menu wider than the window hid its last entries."""
    narrow = Table("t", "T", "n = 25", ["receptive field", "(baseline)"], [Row("a", ["29", "64"])])
    page = html.render(
        Document("t", "s", [], [Section(f"A long name of section {i}", [], [narrow]) for i in range(9)]), {}
    )
    script = """
        const lines = (one) => one.getClientRects().length;
        const range = document.createRange();
        const split = [...document.querySelectorAll("thead button")].flatMap((one) => {
          const text = one.firstChild, found = [];
          for (const { index, 0: word } of text.data.matchAll(/\\S+/g)) {
            range.setStart(text, index);
            range.setEnd(text, index + word.length);
            if (lines(range) > 1) found.push(word);
          }
          return found;
        });
        const menu = document.querySelector("nav");
        return { split, hidden: menu.scrollWidth > menu.clientWidth };
        """
    assert browse(page, script, 800) == {"split": [], "hidden": False}
    assert browse(page, script, 390) == {"split": [], "hidden": True}  # one line that scrolls: it stays in view


@with_browser
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="poppler's pdftotext is not installed")
@pytest.mark.slow
def test_a_head_stands_on_every_printed_page_of_its_table(tmp_path: Path) -> None:
    table = Table("t", "T", "rows", ["the head"], [Row(f"row {i}", ["x"]) for i in range(150)])
    (tmp_path / "page.html").write_text(html.render(Document("t", "s", [], [Section("S", [], [table])]), {}))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--print-to-pdf={tmp_path}/page.pdf", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    text = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True).stdout
    pages = [page for page in text.split("\f") if "row" in page]
    assert len(pages) > 2
    assert all("the head" in page for page in pages)


def test_commands_are_code_and_differences_without_p_are_explained() -> None:
    p, none = (Number(0.2, 0.1, 0.3, p=p, signed=True) for p in (0.01, None))
    tables = [
        Table("t", "T", "", ["a", "b"], [Row("r", [p, other]), Row("s", ["`run --x <y>`", ""])]) for other in (p, none)
    ]
    pages = [html.render(Document("t", "s", [], [Section("S", [], [table])]), {}) for table in tables]
    assert all("<code>run --x &lt;y&gt;</code>" in page for page in pages)
    assert [html.WITHOUT_P in page for page in pages] == [False, True]


def test_a_figure_is_as_wide_on_paper_as_it_was_drawn_and_a_high_one_has_a_page() -> None:
    sizes = []
    for high in (2, 6):
        buffer = io.BytesIO()
        Figure((7, high)).savefig(buffer, format="png", dpi=220)
        page = html.render(Document("t", "s", [], [Section("S", figures={"f": "c"})]), {"f": buffer.getvalue()})
        sizes += re.findall(r'style="(--wide.*?)"', page)
    assert sizes == ["--wide: 7.00in; --high: 92mm", "--wide: 7.00in; --high: 165mm"]

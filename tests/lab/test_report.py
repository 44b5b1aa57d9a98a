"""The Markdown and the page of an evaluation: what they say, and that nothing in a file becomes markup."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hybridkv.errors import UsageError
from hybridkv_lab import plots
from hybridkv_lab.report import COLUMNS, markdown, page, write_report
from tests.lab.evaluation import CONDITIONS, FLOOR, REFERENCE, RESULTS, result

CANDIDATES = RESULTS[2:]
EVIL = "<script>alert(1)</script>-->]]>\"'&$x^2$ | `a` *b* \x00\n{}"
HOSTILE = replace(
    result("q4_0", 4.5, 1e-3),
    label=EVIL,
    config=EVIL,
    kld_max=math.inf,
    n_non_finite=2,
    worst=((3, math.inf, EVIL),),
    layers=((3, math.nan), (7, 0.1), (11, 0.0)),
    positions=((0, math.nan, 4), (256, 0.0, 4), (512, 1e-3, 4), (768, 2e-3, 4)),
)
FIGURES = ("quality", "positions", "layers", "histogram")


class Elements(HTMLParser):
    """Every element and attribute of a page, and whether all are closed."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    return page(CONDITIONS, RESULTS)


def test_markdown_says_all() -> None:
    text = markdown(CONDITIONS, RESULTS)
    for r in RESULTS:
        assert f"{r.label}" in text
    table = [line for line in text.split("\n") if line.startswith("|")][: len(RESULTS) + 2]
    assert len({line.count("|") for line in table}) == 1
    assert "f32 (reference)" in table[2]
    assert "f32 again (noise floor)" in table[3]
    q4 = next(line for line in table if line.startswith("| q4_0 |")).split(" | ")
    assert "1728" in q4
    assert "3.40e-03 ± 8e-05" in q4
    assert "1.0034 ± 0.0011" in q4
    for c in COLUMNS:
        assert (f"- **{c.head}**: {c.meaning}." in text) == (c.head != "not finite")
    for fact in (CONDITIONS.cpu, CONDITIONS.torch, CONDITIONS.commit, "8192", "32764", CONDITIONS.date):
        assert str(fact) in text
    assert "stopped early" not in text


def test_optional_columns_appear_with_their_figures() -> None:
    bare = [replace(r, greedy_agreement=None, greedy_first_divergence=None, decode_tok_s=None) for r in RESULTS]
    text = markdown(CONDITIONS, bare)
    assert "greedy |" not in text
    assert "decode tok/s" not in text
    assert "prefill tok/s" in text


def test_a_run_that_was_stopped_or_broken_says_so_first() -> None:
    broken = replace(result("q4_0", 4.5, 1e-3), n_non_finite=3, kld_mean=math.nan, kld_max=math.inf)
    for text in (
        markdown(replace(CONDITIONS, complete=False), (REFERENCE, broken)),
        page(replace(CONDITIONS, complete=False), (REFERENCE, broken)),
    ):
        assert text.index("stopped early") < text.index("not finite: q4_0") < text.index("12288")


def test_the_page_loads_nothing(html: str) -> None:
    assert "http:" not in html
    assert "https:" not in html
    elements = Elements(html)
    assert not {"script", "img", "link", "iframe", "object", "image", "foreignobject"} & set(elements.names)
    links = [value for name, value in elements.attributes if name in ("src", "href", "xlink:href", "data")]
    assert links
    assert all(str(value).startswith("#") for value in links)
    assert re.findall(r"url\((?!#)|@import", html) == []


def test_the_page_is_accessible(html: str) -> None:
    elements = Elements(html)
    assert ("lang", "en") in elements.attributes
    assert elements.names.count("svg") == 2 * len(FIGURES)
    assert elements.attributes.count(("role", "img")) == 2 * len(FIGURES)
    labels = [value for name, value in elements.attributes if name == "aria-label"]
    assert len(labels) == 2 * len(FIGURES) + 1
    assert all(labels)
    assert f"q4_0 rot kv: 4.5 bits, {0.0019:.2g} nats" in str(labels)
    ids = [value for name, value in elements.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    targets = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert targets
    assert targets <= set(ids)


def test_ink_is_the_pages(html: str) -> None:
    assert "currentColor" in html
    assert not re.search(r"#0{6}\b|fill: black|#010203", html.partition("</style>")[2])


def test_deterministic(html: str) -> None:
    assert page(CONDITIONS, RESULTS) == html
    assert not re.search(r"dc:date|<metadata", html)


def test_nothing_from_a_file_becomes_markup() -> None:
    conditions = replace(CONDITIONS, model=EVIL, text=EVIL, cpu=EVIL, commit=EVIL, reference=EVIL)
    html = page(conditions, (REFERENCE, HOSTILE))
    assert "<script" not in html
    assert "\x00" not in html
    elements = Elements(html)
    assert "script" not in elements.names
    assert any("<script>alert(1)</script>" in word for word in elements.words)  # shown as what it is
    text = markdown(conditions, (REFERENCE, HOSTILE))
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"(?<!\\)`|(?<!\\)\$", text)
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:4]}) == 1


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
def test_figures_are_xml_of_their_width(draw: str, width: int) -> None:
    for results in (RESULTS, (REFERENCE, FLOOR, CANDIDATES[0]), (REFERENCE, HOSTILE)):
        svg = getattr(plots, draw)(results, width)
        root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert float(root.attrib["width"]) == width
        assert 80 < float(root.attrib["height"]) < 1000
        assert "nan" not in svg.partition(">")[2].replace("nanmean", "")


@pytest.mark.parametrize("draw", FIGURES)
def test_no_figure_without_data(draw: str) -> None:
    bare = replace(CANDIDATES[0], kld_mean=math.nan, positions=(), layers=(), histogram=())
    for results in ((), (REFERENCE, FLOOR), (bare,)):
        assert getattr(plots, draw)(results, plots.WIDE) is None


@pytest.mark.parametrize("results", [(), (REFERENCE,), (REFERENCE, FLOOR)], ids=["nothing", "reference", "floor"])
def test_a_run_stopped_before_its_first_candidate(results: Any) -> None:
    assert "<svg" not in page(CONDITIONS, results)
    assert markdown(CONDITIONS, results).startswith("# KV cache types")


def test_a_candidate_equal_to_the_reference() -> None:
    """A divergence of 0 has no place on a logarithmic axis, yet is drawn."""
    same = replace(CANDIDATES[0], label="same", kld_mean=0.0, kld_mean_se=0.0)
    for results in ((same,), (same, CANDIDATES[1])):
        svg = plots.quality(results, plots.WIDE)
        assert svg is not None
        assert ">same</text>" in svg


@pytest.mark.parametrize("label", ["q4_0 模型", "x" * 300, "$", "$x$", "_q", '#010203 id="a"'])
def test_labels_of_every_kind(label: str) -> None:
    svg = plots.quality((replace(CANDIDATES[0], label=label), CANDIDATES[1]), plots.NARROW)
    assert svg is not None
    ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


def test_labels_cover_neither_points_nor_labels() -> None:
    """Positions as the SVG has them; widths by a narrow estimate of the letters."""
    svg = plots.quality(RESULTS, plots.WIDE)
    assert svg is not None
    boxes = []
    for style, text in re.findall(r"<text ([^>]*)>([^<]*)</text>", svg):
        if text in {r.label for r in CANDIDATES}:
            x, y = (float(v) for v in re.search(r'x="([-\d.]+)" y="([-\d.]+)"', style).groups())  # type: ignore[union-attr]
            width = 5.0 * len(text)
            x -= width if "text-anchor: end" in style else 0
            boxes.append((x, x + width, y - 7, y))
    assert len(boxes) == len(CANDIDATES)
    for i, (a0, a1, b0, b1) in enumerate(boxes):
        for c0, c1, d0, d1 in boxes[:i]:
            assert min(a1, c1) <= max(a0, c0) or min(b1, d1) <= max(b0, d0)


def test_picture_for_a_readme() -> None:
    svg = plots.quality_svg(RESULTS)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in svg
    assert plots.quality_svg(RESULTS) == svg
    with pytest.raises(UsageError, match="nothing to draw"):
        plots.quality_svg((REFERENCE,))


def test_written_beside_each_other(tmp_path: Path) -> None:
    written = write_report(CONDITIONS, RESULTS[:4], tmp_path / "a" / "b", "run.2")
    assert [p.name for p in written] == ["run.2.md", "run.2.html"]
    assert written[0].read_text(encoding="utf-8") == markdown(CONDITIONS, RESULTS[:4])
    assert written[1].read_text(encoding="utf-8") == page(CONDITIONS, RESULTS[:4])


def test_without_matplotlib_the_markdown_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hybridkv_lab.plots")
    monkeypatch.delattr("hybridkv_lab.plots")
    with pytest.raises(UsageError, match="matplotlib") as caught:
        write_report(CONDITIONS, RESULTS, tmp_path, "run")
    assert caught.value.hint == "pip install matplotlib"
    assert [p.name for p in tmp_path.iterdir()] == ["run.md"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as p:
        running = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_in_a_browser(browser: Any, tmp_path: Path, scheme: str, width: int, height: int) -> None:
    hostile = replace(HOSTILE, label="w" * 200)
    _, path = write_report(CONDITIONS, (*RESULTS, HOSTILE, hostile), tmp_path, "run")
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    assert tab.evaluate("[document.documentElement.scrollWidth <= innerWidth, matchMedia('(width: 1px)').matches]") == [
        True,
        False,
    ]
    sizes = tab.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())"
        ".filter(r => r.width).map(r => [r.left, r.right, r.height])"
    )
    assert len(sizes) == len(FIGURES)
    assert all(0 <= left < right <= width and high > 100 for left, right, high in sizes)
    table = tab.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(inner > outer for inner, outer in table)
    ink = "rgb(230, 230, 224)" if scheme == "dark" else "rgb(36, 41, 47)"
    assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink
    assert len(tab.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000
    context.close()
    assert said == []
    assert asked == [path.as_uri()]

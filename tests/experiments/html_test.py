"""Tests of the HTML reports and of the figures."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from etfzoo.experiments import html, plots
from testing import Page


def figure():
    rows = [{"epoch": i, "top1": i / 4} for i in range(4)]
    return plots.learning_curves({"source: etf": rows, "source: linear": rows, "far: etf": rows})


@pytest.fixture
def page(tmp_path):
    html.write(
        tmp_path / "index.html",
        "A <b> & 'c'",
        [
            ("Text <u>", "5 < 6 & <script>alert(1)</script>"),
            ("Table", [["name", "top-1 <u>"], ["<i>x</i>", 61.5], ["y", None]]),
            ("Figure", figure()),
            ("Commands", ("python a.py --x='<u>'", "python b.py")),
        ],
    )
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    return Page((tmp_path / "index.html").read_text(encoding="utf-8"))


def test_page_is_well_formed(page):
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags and ("meta", {"charset": "utf-8"}) in page.tags
    assert page.texts("title") == page.texts("h1") == ["A <b> & 'c'"]
    assert page.texts("h2") == ["Text <u>", "Table", "Figure", "Commands"]


def test_page_escapes_what_it_is_given(page):
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert page.texts("p") == ["5 < 6 & <script>alert(1)</script>"]
    assert page.texts("th") == ["name", "top-1 <u>"]
    assert page.texts("td") == ["<i>x</i>", "61.5", "y", "None"]
    assert page.texts("pre") == ["python a.py --x='<u>'\npython b.py"]


def test_page_is_self_contained(page):
    links = [value for _, attrs in page.tags for k, value in attrs.items() if k in ("src", "href")]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", "".join(page.texts("style")))
    image = Image.open(io.BytesIO(base64.b64decode(links[0].split(",")[1], validate=True)))
    assert image.format == "PNG" and min(image.size) > 200
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_blocks_of_a_report(tmp_path):
    links = [("<u> 0:", html.Link("a&b", 'x"/y.json'))]
    links = html.Cell("<u>61", "<u>60 to 62", "<u>2 seeds", links)
    rows = [["<u>name", "one", "two"], [html.Link("<i>", "z"), links, html.Cell("5")]]
    sections = [
        ("<u>Head", html.Table('Cap "<u>', rows, [("", 1), ("group & <u>", 2)])),
        (None, html.Gallery("<u>Pictures", [(figure(), 'alt "<u>'), (figure(), "alt 2")])),
        (None, "<u>text"),
    ]
    html.write(tmp_path / "a.html", "t", sections)
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.texts("h2") == ["<u>Head"] and page.texts("p") == ["<u>text"]
    assert page.texts("figcaption") == ['Cap "<u>', "<u>Pictures"]
    assert page.texts("th") == ["group & <u>", "<u>name", "one", "two"]
    assert [a["colspan"] for t, a in page.tags if t == "th" and "colspan" in a] == ["1", "2"]
    assert page.texts("td") == ["<u>61", "5"] and page.texts("small") == ["<u>60 to 62"]
    assert page.texts("details") == ["<u> 0: "]
    assert page.texts("summary") == ["<u>2 seeds"] and page.texts("a") == ["<i>", "a&b"]
    assert [a["href"] for t, a in page.tags if t == "a"] == ["z", 'x"/y.json']
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ['alt "<u>', "alt 2"]
    content = base64.b64decode(images[0]["src"].split(",")[1], validate=True)
    assert abs(Image.open(io.BytesIO(content)).width - 2 * int(images[0]["width"])) <= 1
    assert [a["aria-label"] for _, a in page.tags if a.get("role") == "region"] == ['Cap "<u>']


def test_text_table():
    rows = [["name", "top-1"], ["a longer name", 1.5], ["b", "100.25"]]
    assert [line.rstrip() for line in html.text_table(rows).splitlines()] == [
        "name           top-1",
        "-------------  ------",
        "a longer name  1.5",
        "b              100.25",
    ]


def test_text_table_of_a_header_only():
    assert html.text_table([["a", "bc"]]).splitlines() == ["a  bc", "-  --"]


@pytest.mark.parametrize("classes", [2, 40, 120])
def test_confusion_png(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    counts[0] = 0  # a class without examples
    names = [f"class {i}" for i in range(classes)]
    plots.confusion_png(tmp_path / "confusion.png", counts, names)
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.png"]
    image = Image.open(tmp_path / "confusion.png")
    assert image.format == "PNG" and min(image.size) > 300
    assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_learning_curves_draw_what_they_are_given():
    axes = figure().axes
    assert [a.get_title() for a in axes] == ["source", "far"]
    assert [line.get_label() for line in axes[0].lines] == ["etf", "linear"]
    np.testing.assert_array_equal(axes[1].lines[0].get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), [0, 25, 50, 75])


def test_accuracy_by_domain_draws_what_it_is_given(tmp_path):
    lines = {
        "etf": [(0.8, 0.7, 0.85), (0.5, 0.4, 0.6)],
        "linear": [(0.7, 0.6, 0.8), (0.3, 0.1, 0.4)],
    }
    drawn = plots.accuracy_by_domain(["near", "far"], lines)
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["near", "far"]
    first = axes.containers[0]
    np.testing.assert_allclose(first[0].get_ydata(), [80, 50])
    places = [container[0].get_xdata() for container in axes.containers]
    np.testing.assert_allclose(places, [[-0.06, 0.94], [0.06, 1.06]])  # side by side
    bars = [segment[:, 1] for segment in first[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[70, 85], [40, 60]])
    plots.save_png(drawn, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert (tmp_path / "a.png").stat().st_size > 5000

"""Self-contained HTML reports: tables, figures and text in one file."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etfzoo import files
from etfzoo.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, p, figcaption { overflow-wrap: anywhere; max-width: 60rem }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.25 }
figure { margin: 1rem 0 }
figcaption { font-weight: 600; margin-bottom: 0.3rem }
.scroll { overflow-x: auto }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
/* Collapsed borders would not stick with the first column. */
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #8886; text-align: left }
th, td { vertical-align: top; white-space: nowrap }
th:first-child, td:first-child {
  position: sticky; left: 0; background: Canvas; white-space: normal; overflow-wrap: anywhere;
  min-width: 9rem; max-width: 16rem; padding-left: 0
}
th[colspan]:not(:first-child) { border-left: 1px solid #8886 }
td:not(:first-child) { font-variant-numeric: tabular-nums }
details, small { font-size: 0.8rem }
summary { cursor: pointer }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
pre { overflow-x: auto; background: #8882; padding: 0.8rem }
@media (max-width: 40rem) {
  th:first-child, td:first-child { min-width: 7.5rem; max-width: 7.5rem }
  th, td { padding: 0.3rem 0.5rem }
}
"""


@dataclasses.dataclass(frozen=True)
class Link:
    """Text that leads to a relative address."""

    text: str
    href: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell of more than a value.

    Attributes:
        value: what is seen.
        note: small print below it.
        summary: the line below that unfolds `details`.
        details: lines of str and Link.
    """

    value: str
    note: str = ""
    summary: str = ""
    details: Sequence[Sequence] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a caption.

    Attributes:
        caption: above it.
        rows: of cells: Link, Cell, or what `str` shows; the first row is the header.
        groups: pairs of a text and a number of columns, for a line above the header.
    """

    caption: str
    rows: Sequence[Sequence]
    groups: Sequence[tuple[str, int]] = ()


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Small pictures side by side, as many as fit.

    Attributes:
        caption: above them.
        pictures: pairs of a Figure and the text for those who do not see it.
    """

    caption: str
    pictures: Sequence[tuple["Figure", str]]


def write(path, title: str, sections) -> None:
    """Writes a report, atomically.

    Args:
        path: HTML file.
        title: headline.
        sections: pairs of a heading (None: the section before goes on) and its content: a str
            (paragraph), a matplotlib Figure, a Gallery, a Table, a list of rows (the first one is
            the header), or a tuple of commands.
    """
    body = "".join(_heading(heading) + _block(content, heading) for heading, content in sections)
    title = html.escape(title)
    files.write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{title}</h1>\n{body}</html>\n",
    )


def text_table(rows) -> str:
    """Rows of strings as aligned columns; the first row is the header."""
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _heading(text):
    return "" if text is None else f"<h2>{html.escape(text)}</h2>\n"


def _block(content, heading) -> str:
    if isinstance(content, str):
        return f"<p>{html.escape(content)}</p>\n"
    if isinstance(content, Gallery):
        images = "\n".join(_image(figure, alt, 2) for figure, alt in content.pictures)
        return _captioned(content.caption, f'<div class="gallery">\n{images}\n</div>')
    if isinstance(content, Table):
        return _captioned(content.caption, _table(content.rows, content.groups, content.caption))
    if isinstance(content, tuple):
        return f"<pre>{html.escape(chr(10).join(content))}</pre>\n"
    if isinstance(content, list):
        return _table(content, (), heading or "") + "\n"
    return _image(content, heading or "") + "\n"


def _captioned(caption, inner):
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>\n{inner}\n</figure>\n"


def _image(figure, alt, density=None):
    """A PNG; with a density (pixels of the picture for one of the page) of the figure's size."""
    buffer = io.BytesIO()
    width = ""
    if density:
        figure.savefig(buffer, format="png", dpi=96 * density)
        width = f' width="{96 * figure.get_figwidth():.0f}"'
    else:
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}"{width} src="data:image/png;base64,{data}">'


def _table(rows, groups, label) -> str:
    head, *rows = rows
    above = "".join(f'<th colspan="{n}">{html.escape(text)}</th>' for text, n in groups)
    above = f"<tr>{above}</tr>" if groups else ""
    header = "".join(f"<th>{_cell(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    # A box that scrolls must be reachable with the keyboard.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label)}">'
        f"<table>{above}<tr>{header}</tr>{body}</table></div>"
    )


def _cell(cell) -> str:
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.href)}">{html.escape(cell.text)}</a>'
    if isinstance(cell, Cell):
        text = html.escape(cell.value)
        if cell.note:
            text += f"<br><small>{html.escape(cell.note)}</small>"
        if cell.details:
            lines = "<br>".join(" ".join(map(_cell, line)) for line in cell.details)
            text += f"<details><summary>{html.escape(cell.summary)}</summary>{lines}</details>"
        return text
    return html.escape(str(cell))

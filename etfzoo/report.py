"""Self-contained HTML reports: tables, figures and text in one file."""

import base64
import html
import io

from matplotlib.figure import Figure

from etfzoo import files

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #8886; text-align: left }
td:not(:first-child) { font-variant-numeric: tabular-nums }
img { max-width: 100%; background: #fff }
pre { overflow-x: auto; background: #8882; padding: 0.8rem }
"""


def write(path, title: str, sections) -> None:
    """Writes a report, atomically.

    Args:
        path: HTML file.
        title: headline.
        sections: pairs of a heading and its content: a str (paragraph), a matplotlib Figure, a
            list of rows (the first one is the header), or a tuple of commands.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{_block(c)}" for heading, c in sections)
    title = html.escape(title)
    files.write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{title}</h1>\n{body}</html>\n",
    )


def text_table(rows) -> str:
    """Rows of strings as aligned columns; the first row is the header."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _block(content) -> str:
    if isinstance(content, Figure):
        buffer = io.BytesIO()
        content.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="" src="data:image/png;base64,{data}">\n'
    if isinstance(content, tuple):
        return f"<pre>{html.escape(chr(10).join(content))}</pre>\n"
    if isinstance(content, list):
        head, *rows = [[html.escape(str(cell)) for cell in row] for row in content]
        lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        header = "".join(f"<th>{cell}</th>" for cell in head)
        return f"<table><tr>{header}</tr>{''.join(f'<tr>{x}</tr>' for x in lines)}</table>\n"
    return f"<p>{html.escape(content)}</p>\n"

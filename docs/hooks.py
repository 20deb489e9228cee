"""For MkDocs: each notebook of docs/notebooks, which is kept as text, becomes a page."""

import jupytext
from mkdocs.structure.files import File


def on_files(files, config):
    """Adds the pages; the .py files stay beside them."""
    for file in list(files):
        if file.src_uri.startswith("notebooks/") and file.src_uri.endswith(".py"):
            page = file.src_uri.removesuffix(".py") + ".md"
            files.append(File.generated(config, page, content=_markdown(file.content_string)))
    return files


def _markdown(text):
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in jupytext.reads(text, "py:percent").cells
    ]
    return "\n\n".join(cells) + "\n"

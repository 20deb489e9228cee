"""The notebooks, which are kept as text: Jupyter reads them, and they run without the internet."""

import os
import subprocess
import sys

import jupytext
import pytest

from testing import CHECKOUT

FOLDER = CHECKOUT / "docs/notebooks"
# Of each, what it ends with and what it writes.
ENDS = {
    "etf_layer": ("gives the same logits, bit for bit: True", "digits.keras"),
    "transfer": (
        "gives the same logits, bit for bit: True",
        "models/rn18_linear.photos/1/README.md",
    ),
    "collapse": ("linear: tr(C°)/p ", "figure3.png"),
}


def test_all_notebooks_are_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == ENDS.keys()


@pytest.mark.parametrize("name", ENDS)
def test_jupyter_reads_it(name, tmp_path):
    notebook = jupytext.read(FOLDER / f"{name}.py")
    jupytext.write(notebook, tmp_path / f"{name}.ipynb")
    cells = jupytext.read(tmp_path / f"{name}.ipynb").cells
    pairs = ["markdown", "code"] * (len(cells) // 2)
    assert [cell.cell_type for cell in cells] == [*pairs, "markdown"] and len(cells) > 10
    assert cells[0].source.startswith("# ") and "**Go on.**" in cells[-1].source
    assert f"# {cells[0].source.splitlines()[0]}\n" in (FOLDER / f"{name}.py").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_it_runs(name, embedded_dir, tmp_path):
    environment = {"PYTHONPATH": str(CHECKOUT), "TFDS_DATA_DIR": str(embedded_dir)}
    environment |= {"MPLBACKEND": "agg", "ETFZOO_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    printed, written = ENDS[name]
    assert printed in run.stdout.splitlines()[-1] and (tmp_path / written).is_file()

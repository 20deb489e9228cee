"""What lets a checkout's recipes run without installing it: see etfzoo/cli for the commands."""

import importlib
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(name):
    """Runs a command of etfzoo/cli."""
    sys.path.insert(0, ROOT)
    try:
        command = importlib.import_module(f"etfzoo.cli.{name}")
    except ImportError as error:
        sys.exit(
            f"error: {error}. Run `make demo` once in {ROOT}, then start recipes with "
            ".venv/bin/python"
        )
    command.run()

"""`etfzoo COMMAND --flags`, also as `python -m etfzoo.cli`: all recipes from an installed wheel."""

import ast
import importlib
import pathlib
import sys

from etfzoo.cli.app import show

_SHARED = ("app", "configs", "flags", "sweeps")


def commands() -> dict[str, str]:
    """What each command does, by name."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem not in _SHARED:
            found[path.stem] = ast.get_docstring(ast.parse(path.read_text("utf-8"))).splitlines()[0]
    return found


def main():
    """Runs the command that the first argument names."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        lines = ["etfzoo COMMAND --flags; `etfzoo COMMAND --help` lists the flags", ""]
        lines += [f"  {command:16} {text}" for command, text in known.items()]
        show("\n".join(lines))
        return
    if name not in known:
        print(f"error: no command {name!r}; there are {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"etfzoo {name}"]
    importlib.import_module(f"etfzoo.cli.{name}").run()


if __name__ == "__main__":
    main()

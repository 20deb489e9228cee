"""How a command runs: flags parsed, readable help, errors in one line."""

import importlib
import logging
import os
import sys

from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging

import etfzoo
from etfzoo import internals
from etfzoo.cli.flags import FLAGS, GROUPS, as_flags, as_started
from etfzoo.errors import printable

_LONGEST = 2000  # letters of an error
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def run(main, doc, arguments=False, extra="jax"):
    """Parses the flags and runs a recipe; bad input ends it with one line and exit code 2.

    Args:
        main: the recipe.
        doc: what `--help` prints above the flags.
        arguments: whether `main` takes a list of what is written beside the flags.
        extra: of pyproject.toml, that brings the JAX which the recipe needs.
    """

    def guarded(argv):
        if len(argv) > 1 and not arguments:
            _fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(message)s"))
        logger = logging.getLogger("etfzoo")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        # TFDS and TensorFlow warn about each other's deprecations; no user can act on these.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        absl_logging.set_verbosity(absl_logging.ERROR)
        if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
            _import_backend(os.environ["KERAS_BACKEND"], extra)
        internals.import_quietly("tensorflow")
        try:
            main(argv[1:]) if arguments else main()
        except etfzoo.EtfzooError as error:
            _fail(error)
        except KeyboardInterrupt:
            sys.exit(130)

    def parse(argv):
        if {"--help", "-h", "-help", "--helpshort"} & set(argv):
            show(_help(doc))
            sys.exit(0)
        try:
            return read_flags(argv)
        except etfzoo.EtfzooError as error:
            _fail(error)

    app.run(guarded, flags_parser=parse)


def read_flags(argv) -> list[str]:
    """Reads and checks the flags; what is written beside them comes back.

    Raises:
        EtfzooError: no such flag, or a value that it does not take.
    """
    try:
        return FLAGS(argv)
    except absl_flags.Error as error:
        raise etfzoo.EtfzooError(f"{error}; --help lists the flags") from error
    except UnicodeDecodeError as error:
        raise etfzoo.EtfzooError(f"the file of --flagfile is no text in UTF-8: {error}") from error


def _import_backend(name, extra):
    try:
        importlib.import_module("keras")
    except (ImportError, ValueError) as error:
        hint = f"pip install 'etfzoo[{extra}]'" if name == "jax" else "tensorflow and jax can train"
        _fail(f"KERAS_BACKEND={name} cannot be used: {error}; {hint}")


class _Formatter(logging.Formatter):
    def format(self, record):
        return as_flags(printable(super().format(record)))


def _fail(error):
    line = as_flags(printable(" ".join(str(error).split())))
    print("error: " + (line if len(line) <= _LONGEST else line[:_LONGEST] + "..."), file=sys.stderr)
    sys.exit(2)


def _help(doc) -> str:
    lines = [as_started(doc.strip())]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:"]
        for name in names:
            flag = FLAGS[name]
            default = "" if flag.default is None else f" (default: {flag.default_as_str})"
            lines.append(f"  --{name}: {flag.help.strip()}{default.replace(chr(39), '')}")
    return "\n".join(lines)


def show(text: str) -> None:
    """Prints a page of help; who reads it may stop early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

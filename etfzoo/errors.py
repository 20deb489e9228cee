"""Errors that a user can act on: one line saying what was wrong and what to do."""

import contextlib
import difflib
import re

_SHOWN = 120  # letters of a value in a message


class EtfzooError(ValueError):
    """Bad input or a broken environment; recipes print the message and exit with code 2.

    Args:
        message: shown as `printable` has it, as names and reasons in it may be a stranger's.
    """

    def __init__(self, message=""):
        super().__init__(printable(str(message)))


class TrainingDiverged(EtfzooError):
    """The loss or a weight is not finite any more; the last good checkpoint is kept."""


class NotInstalled(EtfzooError, ImportError):
    """A package is missing that one of the extras of pyproject.toml brings."""


@contextlib.contextmanager
def extra(name: str):
    """Around the imports of packages that an extra brings: what is missing is one line.

    Args:
        name: of the extra, e.g. `"train"`.

    Raises:
        NotInstalled: an import in the block fails.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise NotInstalled(f"{missing} is not installed: pip install 'etfzoo[{name}]'") from error


def unknown(kind: str, name: str, choices) -> EtfzooError:
    """The error for a name that is not in a table, with close matches.

    Args:
        kind: what the name stands for, e.g. `"backbone"`.
        name: what the user wrote.
        choices: the names that exist.
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name)[:_SHOWN], choices, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(choices)}"
    return EtfzooError(f"unknown {kind} {shown(name)}; {hint}")


def shown(value) -> str:
    """A value as a message shows it: not all of a very long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def printable(text: str) -> str:
    """A text without what a terminal would obey or could not show: escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def first_line(error) -> str:
    """The first line of an exception's message, or its type where it has none.

    Of an error of TensorFlow what the operation says, without where it stands in a graph.
    """
    text = str(getattr(error, "message", None) or error).partition("\n\t [[")[0].strip()
    if text.startswith("Graph execution error"):
        text = text.splitlines()[-1]
    text = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", text)
    text = re.sub(r"^Error in user-defined function passed to .* iterator: [\w:\[\]]+: ", "", text)
    text = re.sub(r"^RuntimeError: (?=.*\nTraceback)", "", text)  # of a function in Python
    if text.startswith("assertion failed: ["):
        text = text[len("assertion failed: [") : -1].replace("] [", " ")
    lines = text.splitlines()
    return lines[0] if lines else type(error).__name__

"""The commands that the pages name: read out of them by the shell itself."""

import ast
import dataclasses
import re
import shlex
import subprocess
import tempfile

from testing import CHECKOUT

_RECIPE = re.compile(r"recipes/(\w+)\.py")
# A block without a language holds commands; output and drawings are marked as `text`.
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
_PROGRAM = re.compile(
    r"(\w+=\S+ )*(python|etfzoo|make|pip|srun|docker|curl|wget|jupyter|jupytext|\.) \S"
)
# No program is on this PATH: bash finds no command, and writes it down.
_SHELL = r"""
note() { printf '%s\0' "${KERAS_BACKEND:+KERAS_BACKEND=$KERAS_BACKEND}" "$@" $'\n' >>"$FOUND"; }
command_not_found_handle() { note "$@"; }
cd() { note cd "$@"; }
.() { note . "$@"; }
PATH=/nowhere
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: its path in the checkout.
        backend: what the page sets KERAS_BACKEND to, or "".
        words: the program and its arguments.
    """

    page: str
    backend: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page}: {self.text}"

    @property
    def text(self) -> str:
        return self.backend + " " * bool(self.backend) + shlex.join(self.words)

    @property
    def recipe(self) -> str | None:
        """The name of the recipe that it starts, if it does."""
        if self.words[0] == "etfzoo":
            return self.words[1]
        return next((m[1] for m in map(_RECIPE.fullmatch, self.words) if m), None)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the recipe."""
        start = 1 if self.words[0] == "etfzoo" else self.words.index(f"recipes/{self.recipe}.py")
        return self.words[start + 1 :]


def of_page(page: str) -> list[Command]:
    """The commands on a page: in its blocks, and in its sentences."""
    text = (CHECKOUT / page).read_text("utf-8")
    scripts = [body for _, language, body in _BLOCK.findall(text) if not language]
    sentences = re.sub(r"``.+?``", "", _BLOCK.sub("", text), flags=re.S)
    spans = [" ".join(span.split()) for span in _SPAN.findall(sentences)]
    scripts += filter(_PROGRAM.match, spans)
    return [command for script in scripts for command in of_script(page, script)]


def of_help(page: str) -> list[Command]:
    """The commands in the docstring of a command's module, which `--help` shows."""
    text = ast.get_docstring(ast.parse((CHECKOUT / page).read_text("utf-8")))
    script = "\n".join(line for line in text.splitlines() if line.startswith("  "))
    return of_script(page, script)


def of_script(page: str, script: str) -> list[Command]:
    """The commands that a shell would start, its variables and loops carried out."""
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(
            ["bash", "-c", f"{_SHELL}\n{script}"],
            env={"FOUND": file.name, "DATA": "DATA"},
            cwd=CHECKOUT / "docs",  # without a file that a pattern of the pages matches
            capture_output=True,
            check=True,
        )
        lines = file.read().decode().split("\0\n\0")[:-1]
    return [Command(page, *_parts(line)) for line in lines]


def _parts(line):
    backend, *words = line.split("\0")
    return backend, tuple(words)

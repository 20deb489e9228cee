"""Flags of the commands, in groups of the help page.

What a flag takes is declared with it: its type, its limits or choices. It is checked when the
command line is read, before anything is imported or opened.
"""

import dataclasses
import os
import re
import sys
import typing

from absl import flags

from etfzoo import files
from etfzoo.errors import EtfzooError, shown
from etfzoo.models.table import MAX_VERSION
from etfzoo.training.config import TrainConfig
from etfzoo.training.protocols import PROTOCOLS, settings_of_rows
from etfzoo.training.settings import IMAGE_SIZES, MOST_IMAGES, SEEDS, check, checked, kind_of

FLAGS = flags.FLAGS
# Settings that some protocol gives.
FROM_PROTOCOL = settings_of_rows()
VERSIONS = {"low": 1, "high": MAX_VERSION}
GROUPS: dict[str, list[str]] = {}


class _Parser(flags.ArgumentParser):
    """Reads a flag's text by a function, whose ValueError absl turns into the flag's error."""

    syntactic_help = ""

    def __init__(self, read):
        self._read = read

    def parse(self, argument):
        # A default that is no text is a value already.
        return self._read(argument) if isinstance(argument, str) else argument


class _Serializer(flags.ArgumentSerializer):
    """Writes a value as the command line has it."""

    def serialize(self, value):
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _define(group, name, default, help_text, read):
    flags.DEFINE(_Parser(read), name, default, help_text, FLAGS, _Serializer())
    GROUPS.setdefault(group, []).append(name)


def as_flags(text: str) -> str:
    """A text of the library with its settings, in backticks, as this command's flags.

    ``pass `batch_size=4` or less`` becomes `pass --batch_size=4 or less`; what is no flag stays.
    Commands in it become those of `as_started`.
    """

    def flag(match):
        name, equals, value = match[1].partition("=")
        if name not in FLAGS:
            return match[0]
        if FLAGS[name].boolean:
            return f"--no{name}" if value == "False" else f"--{name}"
        return f"--{name}{equals}{value}"

    return as_started(re.sub(r"`(\w+(?:=[^\s`]*)?)`", flag, text))


def as_started(text: str) -> str:
    """A text with its commands as this process was started: as recipes or with `etfzoo`."""
    if sys.argv[0].startswith("etfzoo "):  # see etfzoo/cli/__main__.py
        return re.sub(r"python recipes/(\w+)\.py", r"etfzoo \1", text)
    return text


def _several(name, read_one):
    """Reads values between commas, each of which may occur once."""

    def read(text):
        values = [read_one(part) for part in text.split(",")] if text else []
        for number, value in enumerate(values):
            if value in values[:number]:
                raise EtfzooError(f"{name} has {shown(value)} twice")
        return values

    return read


def _number(kind, name, low, high):
    def read(text):
        value = _converted(name, kind, text)
        check(name, kind, value, low, high)
        return value

    return read


def _choice(name, choices):
    def read(text):
        check(name, str, text, choices=choices)
        return text

    return read


def string(group, name, default, help_text, choices=None):
    """Defines a flag of one line of text, which may be empty, or of one of some choices."""
    read = _choice(name, choices) if choices else lambda text: text and _text(name)(text)
    _define(group, name, default, help_text, read)


def strings(group, name, default, help_text, choices=None):
    """Defines a flag that takes one name or several, separated by commas."""
    one = _choice(name, choices) if choices else _text(name)
    _define(group, name, default, help_text, _several(name, one))


def _text(name):
    def read(text):
        check(name, str, text)
        return text

    return read


def integer(group, name, default, help_text, *, low, high):
    """Defines a flag of a whole number from `low` to `high`."""
    _define(group, name, default, help_text, _number(int, name, low, high))


def integers(group, name, default, help_text, *, low, high):
    """Defines a flag that takes one whole number or several, separated by commas."""
    _define(group, name, default, help_text, _several(name, _number(int, name, low, high)))


def real(group, name, default, help_text, *, low, high):
    """Defines a flag of a number from `low` to `high`."""
    _define(group, name, default, help_text, _number(float, name, low, high))


def numbers(group, name, default, help_text, *, low, high):
    """Defines a flag that takes one number or several, separated by commas."""
    _define(group, name, default, help_text, _several(name, _number(float, name, low, high)))


def boolean(group, name, default, help_text):
    """Defines a flag that is switched with --name or --noname."""
    flags.DEFINE_bool(name, default, help_text)
    FLAGS[name].parser = _TrueOrFalse(name)
    GROUPS.setdefault(group, []).append(name)


class _TrueOrFalse(flags.BooleanParser):
    """absl's, whose own message is a tuple."""

    def __init__(self, name):
        self.name = name

    def parse(self, argument):
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError(f"{self.name} must be true or false; got {argument!r}") from None


def path(group, name, default, help_text):
    """Defines a flag of a file or folder; `~` is expanded, and empty is none."""
    _define(group, name, default, help_text, lambda text: _expanded(text) if text else "")


def handle(group, name, default, help_text):
    """Defines a flag of a model: a workdir, a published folder, or a name of the zoo."""
    _define(group, name, default, help_text, lambda text: _handle(text) if text else "")


def handles(group, name, default, help_text):
    """Defines a flag of several models, separated by commas."""
    _define(group, name, default, help_text, _several(name, _handle))


def _expanded(text):
    return os.fspath(files.expand(text))


def _handle(text):
    expanded = _expanded(text)
    return expanded if text.startswith("~") else text  # an address is no path


def settings(*names, lists=(), **defaults):
    """Defines flags of settings of a run, as `TrainConfig` declares them.

    Left alone they are None, and the value comes from the protocol, the data set's row or the
    declaration (see `etfzoo.cli.configs.train_config`).

    Args:
        *names: of fields of TrainConfig.
        lists: those of them that take one value or several to pick from.
        **defaults: of flags that have one, by name.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in names:
        field, default = fields[name], defaults.get(name)
        text = field.metadata["help"]
        if name == "protocol":
            text = f"{', '.join(PROTOCOLS)}: {text}"
        if name in lists:
            text += "; or several to pick from, separated by commas"
        if default is None and "(default" not in text and field.default is not dataclasses.MISSING:
            given = _shown(field.default) if name not in FROM_PROTOCOL else "the protocol's"
            text += f" (default: {given})" if given != "" else ""
        group, (kind, _) = field.metadata["group"], kind_of(field)
        if kind is bool:
            boolean(group, name, default, text)
        else:
            read = _setting(field)
            _define(group, name, default, text, _several(name, read) if name in lists else read)


def _setting(field):
    """Reads a setting's value, as its declaration says."""
    kind, _ = kind_of(field)
    parts = typing.get_args(kind)

    def read(text):
        if not parts:
            value = text if kind is str else _converted(field.name, kind, text)
        elif typing.get_args(parts[0]):
            pairs = [part.split(":") for part in text.split(",") if part]
            value = [[_converted(field.name, int, n) for n in pair] for pair in pairs]
        else:
            value = [_converted(field.name, parts[0], n) for n in text.split(",") if n]
        value = checked(field, value)
        return _expanded(value) if field.metadata["path"] else value

    return read


def _converted(name, kind, text):
    try:
        return kind(text)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise EtfzooError(f"{name} must be {wanted}; got {shown(text)}") from error


def _shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value


def training_flags(protocol, dataset, lists=(), **defaults):
    """Flags of a training run: all settings but what the model is, and where its files are.

    Args:
        protocol, dataset: defaults of the flags of these names.
        lists, **defaults: see `settings`.
    """
    names = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.metadata["group"] != "Model"
    ]
    settings(*names, lists=lists, protocol=protocol, dataset=dataset, **defaults)
    path("Files", "workdir", None, "directory of this run (default: one below runs/)")
    path("Files", "config", None, "config.json of an earlier run to repeat; flags override it")


def model_flag():
    """Which model."""
    handle("Model", "model", None, "a workdir, a published folder or a name of the zoo")


def batch_flag(default, text="images a step, over all devices"):
    """How many images at a time."""
    integer("Machine", "batch_size", default, text, low=1, high=MOST_IMAGES)


def class_names_flag():
    """Whether classes of other names are meant."""
    text = "take the data set's classes as the model's, in their order, whatever they are called"
    boolean("Data", "ignore_class_names", False, text)


def image_size_flag(default):
    """The size of the images, where it is not the default."""
    text = f"height and width in pixels (default: {default})"
    integer("Data", "image_size", None, text, **IMAGE_SIZES)


def data_flags(dataset):
    """Which images, and where they are."""
    settings("dataset", "data_dir", "skip_corrupt", dataset=dataset)


def strategy_flags():
    """Where to compute."""
    settings("strategy", "tpu", "num_virtual_devices", strategy="auto")


def feature_cache_flag():
    """Where features of frozen networks are kept."""
    path(
        "Files",
        "feature_cache",
        "runs/features",
        "directory of features by hash of weights, images and preprocessing; empty keeps none",
    )


def profile_flag():
    """Whether a run is measured and not made."""
    boolean(
        "Machine",
        "profile",
        False,
        "only measure what the run would wait for: step or images",
    )


def seed_flag(text):
    """The seed of what is drawn."""
    integer("Training", "seed", 0, text, **SEEDS)

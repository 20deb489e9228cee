"""Flags of the commands, in groups of the help page."""

import dataclasses

from absl import flags

from etfzoo.training.config import TrainConfig, kind_of
from etfzoo.training.protocols import PROTOCOLS, settings_of_rows

FLAGS = flags.FLAGS
DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}
# Settings that some protocol gives.
FROM_PROTOCOL = settings_of_rows()
GROUPS: dict[str, list[str]] = {}


def _define(group, define, name, default, help_text, **kwargs):
    define(name, default, help_text, **kwargs)
    GROUPS.setdefault(group, []).append(name)


def string(group, name, default, help_text):
    """Defines a string flag in a group of the help page."""
    _define(group, flags.DEFINE_string, name, default, help_text)


def numbers(group, name, default, help_text):
    """Defines a flag that takes one number or several, separated by commas."""
    _define(group, flags.DEFINE_list, name, default, help_text)


def strings(group, name, default, help_text):
    """Defines a flag that takes one name or several, separated by commas."""
    _define(group, flags.DEFINE_list, name, default, help_text)


def integer(group, name, default, help_text):
    """Defines a whole-number flag."""
    _define(group, flags.DEFINE_integer, name, default, help_text)


def real(group, name, default, help_text):
    """Defines a real-number flag."""
    _define(group, flags.DEFINE_float, name, default, help_text)


def boolean(group, name, default, help_text):
    """Defines a flag that is switched with --name or --noname."""
    _define(group, flags.DEFINE_bool, name, default, help_text)


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
        kind, _ = kind_of(field)
        text = field.metadata["help"]
        if name == "protocol":
            text = f"{', '.join(PROTOCOLS)}: {text}"
        if name in lists:
            text += "; or several to pick from, separated by commas"
        several = name in lists or kind not in DEFINE
        define = flags.DEFINE_list if several else DEFINE[kind]
        if default is None and "(default" not in text and field.default is not dataclasses.MISSING:
            shown = _shown(field.default) if name not in FROM_PROTOCOL else "the protocol's"
            text += f" (default: {shown})" if shown != "" else ""
        _define(field.metadata["group"], define, name, default, text)


def _shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


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
    string("Files", "workdir", None, "directory of this run (default: one below runs/)")
    string("Files", "config", None, "config.json of an earlier run to repeat; flags override it")


def data_flags(dataset):
    """Which images, and where they are."""
    settings("dataset", "data_dir", "skip_corrupt", dataset=dataset)


def strategy_flags():
    """Where to compute."""
    settings("strategy", "tpu", "num_virtual_devices", strategy="auto")


def feature_cache_flag():
    """Where features of frozen networks are kept."""
    string(
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

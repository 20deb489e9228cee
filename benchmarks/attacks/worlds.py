"""What is attacked: a trained run, published models and data, and readers of flags."""

import contextlib
import importlib
import shutil
import sys
from pathlib import Path
from unittest import mock

CLASSES = tuple("0123456789")


def config(folder, **changes):
    """A training of a second, but for the time that it takes to build its step."""
    from etfzoo.training.config import TrainConfig

    values = {"backbone": "rn18", "image_size": 8, "epochs": 2, "augment": "none", "crop": 1.0}
    values |= {"batch_size": 50, "keep_checkpoints": 3, "checkpoint_every": 1}
    return TrainConfig("digits", data_dir=str(folder), **(values | changes))


def data(folder):
    from etfzoo.data import shapes

    shapes.prepare(folder, ["digits"])
    return folder


def make(folder):
    """`run`, `zoo` with `rn18_etf.x`, `data` with digits, `photos` and an `index.json`."""
    import etfzoo
    import testing
    from etfzoo.training import loop

    folder = Path(folder)
    settings = config(data(folder / "data"), epochs=1, checkpoint_every=500)
    loop.train_and_evaluate(settings, folder / "run")
    model = testing.make_classifier()
    etfzoo.publish(model, folder / "zoo" / "rn18_etf.x")
    testing.make_image_folder(folder / "photos", dict.fromkeys(testing.CLASS_NAMES, 5), (20, 16))
    (folder / "index.json").write_text("{}")
    return folder


def flag_names():
    """The flags of each command."""
    from etfzoo.cli.__main__ import commands

    return {name: _defined(name, lambda flags: _names(flags)) for name in commands()}


def _names(flags):
    return [name for group in flags.GROUPS.values() for name in group]


def parsed(command, given):
    """The TrainConfig that the flags of a command mean."""
    from etfzoo.cli import app, configs

    def read(flags):
        app.read_flags(["command", *given])
        rates = flags.FLAGS.learning_rate
        known = {"learning_rate": rates[0]} if rates else {}
        return configs.train_config(command, **known)

    return _defined(command, read)


def _defined(command, then):
    from absl.testing import flagsaver

    from etfzoo.cli import app, flags

    with (
        flagsaver.flagsaver(),
        mock.patch.dict(flags.GROUPS, clear=True),
        mock.patch.dict("os.environ"),
        mock.patch.object(sys, "argv", ["command"]),
        mock.patch.object(app, "run", lambda *args, **options: None),
    ):
        importlib.import_module(f"etfzoo.cli.{command}").run()
        return then(flags)


@contextlib.contextmanager
def copied(folder, place):
    """A copy that goes at the end."""
    yield Path(shutil.copytree(folder, place, symlinks=True))
    shutil.rmtree(place, ignore_errors=True)

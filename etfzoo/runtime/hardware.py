"""What a training ran on and how long, for the model card."""

import json
import logging
import os
import platform
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import keras
import tensorflow as tf

from etfzoo import files
from etfzoo.errors import EtfzooError
from etfzoo.runtime.strategy import get_strategy, num_workers
from etfzoo.workdir import Workdir, is_number

log = logging.getLogger("etfzoo")

# Where a run reads and writes is nobody's business but its owner's.
_PRIVATE = ("workdir", "data_dir")
_ROOT = Path(__file__).absolute().parents[2]


def describe(strategy=None) -> str:
    """The devices that a strategy computes on, e.g. `2 x NVIDIA H100` or `AMD EPYC, 2 cores`."""
    strategy = strategy or get_strategy("one_device")
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return f"TPU, {strategy.num_replicas_in_sync} cores"
    if isinstance(strategy, tf.distribute.Strategy):
        used = tf.config.get_visible_devices("GPU")[: strategy.num_replicas_in_sync]
        names = [tf.config.experimental.get_device_details(g).get("device_name") for g in used]
    else:
        names = strategy.accelerators
    text = ", ".join(f"{n} x {name or 'GPU'}" for name, n in Counter(names).items())
    text = text or f"{_processor()}, {os.cpu_count()} cores"
    workers = num_workers(strategy)
    return f"{workers} machines with {text} each" if workers > 1 else text


def read(workdir) -> dict:
    """What `write` recorded: `hardware`, `seconds`, `command`; without what was damaged since."""
    path = Workdir(workdir).machine
    if not os.path.lexists(path):
        return {}
    try:
        document = files.read_json(path)
    except EtfzooError as error:
        log.warning("%s", error)
        return {}
    good = {
        "hardware": lambda value: isinstance(value, str) and value.isprintable(),
        "seconds": lambda value: is_number(value, 0, 1e12),
        "command": _is_command,
    }
    found = document if isinstance(document, dict) else {}
    kept = {name: found[name] for name, is_good in good.items() if is_good(found.get(name))}
    if kept.keys() != good.keys() & found.keys() or kept == {}:
        log.warning("%s is damaged: the run's hardware or time is not known any more", path)
    return kept


def write(workdir, seconds: float, strategy=None) -> None:
    """Records the hardware of a run, the seconds that it took so far, and its command.

    The command is that of the process that began it, without the places on this machine. Where the
    file cannot be written there is a warning: no run needs it.
    """
    first = read(workdir).get("command")
    document = {"hardware": describe(strategy), "seconds": round(seconds, 1)}
    document["command"] = first or _command(sys.argv)
    path = Workdir(workdir).machine
    try:
        files.write_text(path, json.dumps(document, indent=2) + "\n")
    except EtfzooError as error:
        log.warning("the run goes on without %s: %s", path, error)


def _is_command(value):
    try:
        return isinstance(value, str) and value.isprintable() and bool(shlex.split(value))
    except ValueError:  # a quotation that does not end
        return False


def _command(argv):
    script = Path(argv[0]).absolute()
    if argv[0].startswith("etfzoo "):
        start = argv[0].split()
    elif script.is_relative_to(_ROOT / "recipes"):
        start = ["python", str(script.relative_to(_ROOT))]
    else:
        start = ["python", script.name]
    kept, skip = [], False
    for argument in argv[1:]:
        if skip:
            skip = False
        elif argument[:1] == "-" and argument.lstrip("-").partition("=")[0] in _PRIVATE:
            skip = "=" not in argument
        else:
            kept.append(argument)
    backend = keras.backend.backend()
    return ("" if backend == "tensorflow" else f"KERAS_BACKEND={backend} ") + shlex.join(
        [*start, *kept]
    )


def _processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()

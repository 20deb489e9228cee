"""Images a second and peak memory of training and inference, on whatever device is here.

  python recipes/benchmark.py --backbone=rn50 --image_size=224 --batch_size=32
  python recipes/benchmark.py --backbone=rn50,rn101 --method=linear,etf,sw --image_size=64
  KERAS_BACKEND=jax python recipes/benchmark.py --mixed_precision=none,bfloat16 --output=here.json

One batch of random pixels lies in memory: no input is measured here, but by --profile of
recipes/pretrain.py. The step is that of a training: forward, backward, L2, SGD with momentum.
Several values (comma separated): all combinations, each in a process of its own; --output is
written after each. Rates are medians over rounds, with the lowest and highest; memory is the
device's where the backend tells it, else that of the whole process. Under TensorFlow XLA compiles
at most the training step, under JAX always both.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.models.table import METHODS

GRID = ("backbone", "method", "mixed_precision", "image_size", "batch_size", "jit_compile")
COMPILED = {"auto": None, "true": True, "false": False}
HEADER = [
    "model", "precision", "px", "batch", "step by XLA", "training, images/s", "inference, images/s",
    "peak memory, MB", "first step, s",
]  # fmt: skip


def main():
    import etfzoo
    from etfzoo import files

    cells = _combinations()
    configs = [_config(cell) for cell in cells]  # all checked before the first is measured
    if FLAGS.output:
        files.destination(FLAGS.output)  # said before minutes of measuring
    document, failed = {}, []
    for cell, config in zip(cells, configs, strict=True):
        found = _measured(cell, config) if len(cells) == 1 else _in_a_process(cell)
        if found is None:
            failed.append(" ".join(map(str, cell.values())))
            continue
        document = document or found | {"rows": []}
        document["rows"] += found["rows"]
        if FLAGS.output:
            files.write_text(FLAGS.output, json.dumps(document, indent=2) + "\n")
    if document:
        versions = ", ".join(f"{name} {v}" for name, v in document["versions"].items())
        print(f"\n{document['hardware']}; {versions}\n")
        for line in (HEADER, ["---"] * len(HEADER), *map(_cells, document["rows"])):
            print(f"| {' | '.join(line)} |")
    if failed:
        raise etfzoo.EtfzooError(
            f"{len(failed)} of {len(cells)} combinations failed, each with what is said above: "
            + "; ".join(failed)
        )


def _combinations():
    """All combinations of the flags, by name, as values; checks where the figures go."""
    import etfzoo

    for name in GRID:
        if not FLAGS[name].value:
            raise etfzoo.EtfzooError(f"--{name} is empty")
    if FLAGS.output:
        path = pathlib.Path(FLAGS.output)
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise etfzoo.EtfzooError(f"cannot write {path}: it must be a file in a folder of yours")
    return [
        dict(zip(GRID, values, strict=True))
        for values in itertools.product(*(FLAGS[name].value for name in GRID))
    ]


def _config(cell):
    """The TrainConfig of one combination."""
    import keras

    import etfzoo
    from etfzoo.training.config import TrainConfig

    if keras.backend.backend() == "jax" and cell["jit_compile"] == "false":
        raise etfzoo.EtfzooError(
            "XLA compiles all that JAX computes: leave out --jit_compile=false"
        )
    head, norm = METHODS[cell["method"]]
    return TrainConfig(
        dataset="random pixels",
        backbone=cell["backbone"],
        head=head,
        norm=norm,
        image_size=cell["image_size"],
        batch_size=cell["batch_size"],
        mixed_precision=cell["mixed_precision"],
        jit_compile=COMPILED[cell["jit_compile"]],
        deterministic=False,
        strategy=FLAGS.strategy,
        tpu=FLAGS.tpu,
        num_virtual_devices=FLAGS.num_virtual_devices,
    )


def _measured(cell, config):
    """The document of one combination."""
    import keras

    import etfzoo
    from etfzoo.runtime import hardware
    from etfzoo.training import throughput

    strategy = configs.open_strategy(config)
    print(f"measuring {' '.join(map(str, cell.values()))}", flush=True)
    found = throughput.synthetic(config, FLAGS.num_classes, FLAGS.rounds, FLAGS.seconds)
    row = cell | {name: getattr(config, name) for name in ("image_size", "batch_size")}
    for name in ("training", "inference"):
        row[name] = vars(found[name])
    row |= {name: found[name] for name in ("peak_memory", "memory_of", "jit_compile")}
    backend = keras.backend.backend()
    modules = {"etfzoo": etfzoo, "keras": keras, backend: sys.modules[backend]}
    return {
        "hardware": hardware.describe(strategy),
        "versions": {name: module.__version__ for name, module in modules.items()},
        "rows": [row],
    }


def _in_a_process(cell):
    """The document of one combination, measured in a process of its own; None if it failed."""
    from etfzoo.experiments.runner import python_path

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cell.json")
        given = [f"--{name}={value}" for name, value in (cell | {"output": path}).items()]
        kept = ("strategy", "tpu", "num_virtual_devices", "num_classes", "rounds", "seconds")
        given += [f"--{n}={FLAGS[n].value}" for n in kept if FLAGS[n].value is not None]
        print(f"measuring {' '.join(map(str, cell.values()))}", flush=True)
        process = subprocess.run(
            [sys.executable, "-m", "etfzoo.cli", "benchmark", *given],
            env=os.environ | {"PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            print(process.stdout + process.stderr, end="", flush=True)
            return None
        print(process.stdout.splitlines()[-1], flush=True)
        sys.stderr.write(process.stderr)
        with open(path) as file:
            return json.load(file)


def _cells(row):
    def rate(name):
        found = row[name]
        return f"{found['median']:.1f} ({found['lowest']:.1f} to {found['highest']:.1f})"

    return [
        f"{row['backbone']}_{row['method']}",
        row["mixed_precision"].replace("none", "float32"),
        str(row["image_size"]),
        str(row["batch_size"]),
        "yes" if row["jit_compile"] else "no",
        rate("training"),
        rate("inference"),
        f"{row['peak_memory'] / 1e6:.0f} ({row['memory_of']})",
        f"{row['training']['first_seconds']:.1f}",
    ]


def run():
    """Defines the flags and runs the command."""
    grid = ("backbone", "image_size", "batch_size", "mixed_precision")
    defaults = {"backbone": "rn50", "image_size": "224", "batch_size": "32"}
    flags.settings(*grid, lists=grid, mixed_precision="none", **defaults)
    flags.strings("Model", "method", "etf", "linear, etf or sw, or several", choices=METHODS)
    flags.integer("Model", "num_classes", 1000, "classes", low=2, high=10**6)
    text = "auto (one GPU), true, false, or several"
    flags.strings("Machine", "jit_compile", "auto", text, choices=COMPILED)
    flags.strategy_flags()
    flags.integer(
        "Measuring", "rounds", 3, "rounds of training and inference in turns", low=1, high=1000
    )
    flags.real("Measuring", "seconds", 5.0, "of each in a round, roughly", low=0.001, high=3600)
    flags.path("Files", "output", None, "JSON file for the figures")
    app.run(main, __doc__)

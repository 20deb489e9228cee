"""Images a second and peak memory of training and inference, on whatever device is here.

  python recipes/benchmark.py --backbone=rn50 --image_size=224 --batch_size=32
  python recipes/benchmark.py --backbone=rn50,rn101 --method=linear,etf,sw --image_size=64
  KERAS_BACKEND=jax python recipes/benchmark.py --mixed_precision=none,bfloat16 --output=here.json

One batch of random pixels lies on the device: no input is measured here, but by --profile of
recipes/pretrain.py. The step is that of a training: forward, backward, L2, SGD with momentum.
Several values (comma separated): all combinations, each in a process of its own. Rates are medians
over rounds, with the lowest and highest; memory is the device's where the backend tells it, else
that of the whole process.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile

import cli
from cli import FLAGS

METHODS = {"linear": ("linear", "bn"), "etf": ("etf", "bn"), "sw": ("linear", "sw")}
GRID = ("backbone", "method", "mixed_precision", "image_size", "batch_size", "jit_compile")
HEADER = [
    "model", "precision", "px", "batch", "XLA", "training, images/s", "inference, images/s",
    "peak memory, MB", "first step, s",
]  # fmt: skip


def main():
    from etfzoo import files

    cells = [
        dict(zip(GRID, values, strict=True))
        for values in itertools.product(*(FLAGS[name].value for name in GRID))
    ]
    if len(cells) == 1:
        documents = [_measured(cells[0])]
    else:
        documents = [_in_a_process(cell) for cell in cells]
    document = {name: documents[0][name] for name in ("hardware", "versions")}
    document["rows"] = [row for d in documents for row in d["rows"]]
    if FLAGS.output:
        files.write_text(FLAGS.output, json.dumps(document, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    print(f"\n{document['hardware']}; {versions}\n")
    for line in (HEADER, ["---"] * len(HEADER), *map(_cells, document["rows"])):
        print(f"| {' | '.join(line)} |")


def _measured(cell):
    """The document of one combination."""
    import keras

    import etfzoo
    from etfzoo import machine, throughput
    from etfzoo.config import TrainConfig
    from etfzoo.errors import unknown

    if cell["method"] not in METHODS:
        raise unknown("method", cell["method"], METHODS)
    head, norm = METHODS[cell["method"]]
    compiled = {"auto": None, "true": True, "false": False}
    if cell["jit_compile"] not in compiled:
        raise unknown("value of --jit_compile", cell["jit_compile"], compiled)
    sizes = {
        name: int(cli.parse_numbers(name, [cell[name]])[0]) for name in ("image_size", "batch_size")
    }
    config = TrainConfig(
        dataset="random pixels",
        backbone=cell["backbone"],
        head=head,
        norm=norm,
        **sizes,
        mixed_precision=cell["mixed_precision"],
        jit_compile=compiled[cell["jit_compile"]],
        deterministic=False,
        strategy=FLAGS.strategy,
        tpu=FLAGS.tpu,
        num_virtual_devices=FLAGS.num_virtual_devices,
    )
    strategy = cli.open_strategy(config)
    print(f"measuring {' '.join(map(str, cell.values()))}", flush=True)
    found = throughput.synthetic(config, FLAGS.num_classes, FLAGS.rounds, FLAGS.seconds)
    row = cell | sizes
    for name in ("training", "inference"):
        row[name] = vars(found[name])
    row |= {name: found[name] for name in ("peak_memory", "memory_of")}
    backend = keras.backend.backend()
    modules = {"etfzoo": etfzoo, "keras": keras, backend: sys.modules[backend]}
    return {
        "hardware": machine.describe(strategy),
        "versions": {name: module.__version__ for name, module in modules.items()},
        "rows": [row],
    }


def _in_a_process(cell):
    """The document of one combination, measured in a process of its own."""
    import etfzoo

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cell.json")
        given = [f"--{name}={value}" for name, value in (cell | {"output": path}).items()]
        kept = ("strategy", "tpu", "num_virtual_devices", "num_classes", "rounds", "seconds")
        given += [f"--{n}={FLAGS[n].value}" for n in kept if FLAGS[n].value is not None]
        process = subprocess.run(
            [sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True
        )
        if process.returncode:
            raise etfzoo.EtfzooError(
                f"measuring {' '.join(cell.values())} failed, with what is said above; exit code "
                f"{process.returncode}"
            )
        print(process.stdout.splitlines()[-1], flush=True)
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
        row["jit_compile"],
        rate("training"),
        rate("inference"),
        f"{row['peak_memory'] / 1e6:.0f} ({row['memory_of']})",
        f"{row['training']['first_seconds']:.1f}",
    ]


if __name__ == "__main__":
    cli.strings("Model", "backbone", "rn50", "rn18, rn34, rn50 or rn101, or several")
    cli.strings("Model", "method", "etf", "linear, etf or sw, or several")
    cli.integer("Model", "num_classes", 1000, "classes")
    cli.strings("Data", "image_size", "224", "height and width in pixels, or several")
    cli.strings("Training", "batch_size", "32", "images a step over all devices, or several")
    cli.strings("Machine", "mixed_precision", "none", "none, bfloat16, float16, or several")
    cli.strings("Machine", "jit_compile", "auto", "auto (one GPU), true, false, or several")
    cli.strategy_flags()
    cli.integer("Measuring", "rounds", 3, "rounds of training and inference in turns")
    cli.real("Measuring", "seconds", 5.0, "of each in a round, roughly")
    cli.string("Files", "output", None, "JSON file for the figures")
    cli.run(main, __doc__)

"""Table 1: backbones x methods x targets x seeds from one command, as tables and a report.

  python recipes/table1.py --quick                   # small embedded data, without any download
  python recipes/table1.py --dry_run                 # the plan: cells, steps, time, commands
  python recipes/table1.py --source=imagenet2012 --data_dir=DIR --workdir=runs/table1
  python recipes/table1.py --source=tiny_imagenet --targets=oxford_flowers102,cifar10 \\
    --backbones=rn18 --protocol=quickstart --data_dir=DIR

Methods: a trainable classifier (linear), one with Switchable Whitening (sw), a fixed ETF (etf), all
under the same settings and with the same search. Each cell is a workdir and a process of its own;
stop it at any moment, and the same command goes on.
"""

import os
import shlex
import sys

from etfzoo.cli import app, flags
from etfzoo.cli.finetune import MODES
from etfzoo.cli.flags import FLAGS, as_started
from etfzoo.models.table import BACKBONES, METHODS
from etfzoo.training.protocols import PROTOCOLS
from etfzoo.training.settings import MOST_IMAGES, SEEDS

# Few epochs at the rates of the demo, and a search of the fine-tuning's rate in each cell.
QUICK = {
    "source": "shapes/source",
    "targets": ["digits"],
    "backbones": ["rn18"],
    "seeds": [0, 1],
    "protocol": "quickstart",
    "epochs": 3,
    "batch_size": 64,
    "finetune_epochs": 3,
    "learning_rate": [0.003, 0.01, 0.03],
    "finetune_batch_size": 32,
    "eval_every": 3,
    "jobs": 2,
}
LISTS = ("backbones", "methods", "targets", "modes", "seeds")
RATES = {"low": 1e-12, "high": 10**6}
SETTINGS = (
    "source", "protocol", "data_dir", "source_search_epochs", "epochs", "batch_size",
    "finetune_epochs", "finetune_batch_size", "image_size", "eval_every", "mixed_precision",
    "cache", "deterministic",
)  # fmt: skip


def main():
    import tensorflow as tf

    from etfzoo.experiments import report, runner
    from etfzoo.runtime.interruption import Stopped

    settings = _settings()
    jobs = _value("jobs")
    gpus = tf.config.list_physical_devices("GPU")
    tf.config.set_visible_devices([], "GPU")  # their memory is for the cells
    if FLAGS.dry_run:
        _print_plan(settings, jobs)
        return
    command = as_started(shlex.join(["python", "recipes/table1.py", *sys.argv[1:]]))
    try:
        failures = runner.run(settings, command, jobs, len(gpus))
    except Stopped:
        report.write(settings.root)
        raise
    print(f"report: {report.write(settings.root)}", flush=True)
    if failures:
        print("not finished:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def _value(name):
    """Of a flag; with --quick another default."""
    quick = FLAGS.quick and name in QUICK and not FLAGS[name].present
    return QUICK[name] if quick else FLAGS[name].value


def _settings():
    from etfzoo import files
    from etfzoo.experiments import sweep

    root = FLAGS.workdir or ("runs/table1_quick" if FLAGS.quick else "runs/table1")
    given = {name: _value(name) for name in SETTINGS}
    given["image_size_schedule"] = FLAGS.image_size_schedule or ()
    if FLAGS.quick and not FLAGS.data_dir:
        given["data_dir"] = os.path.join(root, "data")
        if not FLAGS.dry_run:
            files.make_directory(given["data_dir"])
    rates = {
        f"{name}s": tuple(_value(name) or ()) for name in ("learning_rate", "source_learning_rate")
    }
    return sweep.Sweep(
        root=root,
        **{name: tuple(_value(name)) for name in LISTS},
        **given,
        **rates,
    )


def _print_plan(settings, jobs):
    from etfzoo.experiments import sweep
    from etfzoo.experiments.runner import clock

    cells = sweep.cells(settings)
    rates = sweep.measured_rates(cells)
    total, seconds, unknown, states = 0, 0.0, 0, {}
    for number, cell in enumerate(cells, 1):
        state = sweep.state(cell)
        states[state] = states.get(state, 0) + 1
        left, rate = sweep.remaining_images(cell), rates.get(sweep.kind(cell))
        steps = sum(sweep.steps(config) for _, config in cell.runs())
        total += steps
        if not left:
            time = "done"
        elif rate:
            time = f"about {clock(left / rate)}"
            seconds += left / rate
        else:
            time, unknown = "no measurement yet", unknown + 1
        command = as_started(f"python recipes/{cell.job.command}.py {_arguments(cell)}")
        print(f"{number}/{len(cells)} {cell.name}: {state}, {steps:,} steps, {time}\n    {command}")
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    print(
        f"\n{len(cells)} cells: {counts}\n{total:,} training steps in all, without what a "
        "search may be widened by"
    )
    if seconds:
        print(f"about {clock(seconds / jobs)} with --jobs={jobs}, where it is known")
    if unknown:
        print(f"{unknown} cells of a kind (backbone, norm, size, mode) that was not measured yet")
    if len(settings.source_learning_rates) > 1:
        print(
            f"the pretraining's rate is searched with {settings.backbones[0]} and seed "
            f"{settings.seeds[0]}, for each method, and taken for the others"
        )


def _arguments(cell):
    from etfzoo.experiments import sweep

    arguments = cell.ready_job().arguments()
    if cell.rate_of is not None and sweep.picked_rate(cell.rate_of) is None:
        arguments = [text for text in arguments if not text.startswith("--learning_rate=")]
        arguments.append(f"--learning_rate=(as picked in {cell.rate_of.name})")
    return shlex.join(arguments)


def run():
    """Defines the flags and runs the command."""
    data, training = "Data", "Training"
    flags.string(data, "source", "imagenet2012", "data set of the pretraining")
    flags.strings(data, "targets", "cifar100,cifar10,stl10,svhn_cropped,oxford_iiit_pet,"
                "oxford_flowers102,dtd", "data sets that models are transferred to")  # fmt: skip
    flags.path(data, "data_dir", None, "TFDS data directory (default: TFDS's own)")
    flags.image_size_flag("the protocol's")
    flags.settings("image_size_schedule")
    text = "rn18, rn34, rn50 or rn101"
    flags.strings("Model", "backbones", "rn50,rn101", text, choices=BACKBONES)
    text = "linear, sw (linear with whitening) or etf"
    flags.strings("Model", "methods", "linear,sw,etf", text, choices=METHODS)
    text = "what is done on targets"
    flags.strings("Model", "modes", ",".join(MODES), text, choices=MODES)
    text = f"{', '.join(PROTOCOLS)}: where unset flags take their values from"
    flags.string(training, "protocol", "paper_lowres", text, choices=PROTOCOLS)
    flags.integers(training, "seeds", "0", "of pretraining and of what follows it", **SEEDS)
    flags.numbers(
        training, "learning_rate", None, "grid of the fine-tuning, widened where the best lies at "
        "its edge (default: a third, once and three times the protocol's)", **RATES
    )  # fmt: skip
    flags.numbers(
        training, "source_learning_rate", None, "one for the pretraining, or several that are "
        "searched with the first backbone and seed (default: the protocol's)", **RATES
    )  # fmt: skip
    for name, text, high in (
        ("source_search_epochs", "of each of several (default: all)", 10**6),
        ("epochs", "of the pretraining", 10**6),
        ("finetune_epochs", "of the fine-tuning", 10**6),
        ("batch_size", "of the pretraining", MOST_IMAGES),
        ("finetune_batch_size", "of the fine-tuning", MOST_IMAGES),
        ("eval_every", "epochs between evaluations (default: 1)", 10**6),
    ):
        flags.integer(training, name, None, text, low=1, high=high)
    flags.settings("mixed_precision", "cache", "deterministic")
    text = "cells at a time; they share the cores, and GPUs one each"
    flags.integer("Machine", "jobs", 1, text, low=1, high=1024)
    flags.boolean("Sweep", "dry_run", False, "print the plan, and run nothing")
    flags.boolean("Sweep", "quick", False, "small embedded data, rn18, two seeds")
    flags.path("Files", "workdir", None, "directory of the sweep (default: runs/table1)")
    app.run(main, __doc__)

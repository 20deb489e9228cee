"""What the commands of the sweeps share: flags, plan, run and report."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping

from etfzoo.cli import flags
from etfzoo.cli.flags import FLAGS, as_started
from etfzoo.experiments.methods import METHODS, VARIANTS
from etfzoo.models.table import BACKBONES
from etfzoo.training.job import MODES
from etfzoo.training.protocols import PROTOCOLS
from etfzoo.training.settings import MOST_IMAGES, SEEDS

RATES = {"low": 1e-12, "high": 10**6}
_TRANSFER = ("targets", "modes", "finetune_epochs", "finetune_batch_size")
_LISTS = (
    "backbones", "methods", "targets", "modes", "seeds", "imbalances", "ood_datasets",
)  # fmt: skip
_SETTINGS = (
    "source", "protocol", "data_dir", "source_search_epochs", "epochs", "batch_size",
    "finetune_epochs", "finetune_batch_size", "image_size", "eval_every", "mixed_precision",
    "cache", "deterministic",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that sweeps for one table: its flags, and what it does.

    Attributes:
        table: a key of `etfzoo.experiments.methods.TABLES`; also the command's name.
        defaults: of flags that have one. Those for targets, imbalances and data sets of other
            things are there where they have one; methods without are all that fit.
        quick: other defaults with `--quick`.
    """

    table: str
    defaults: Mapping
    quick: Mapping

    def settings(self):
        """The sweep that the flags describe."""
        from etfzoo import files
        from etfzoo.experiments import sweep

        root = FLAGS.workdir or f"runs/{self.table}{'_quick' if FLAGS.quick else ''}"
        given = {name: self._value(name) for name in _SETTINGS if name in FLAGS}
        given["image_size_schedule"] = FLAGS.image_size_schedule or ()
        if FLAGS.quick and not FLAGS.data_dir:
            given["data_dir"] = os.path.join(root, "data")
            if not FLAGS.dry_run:
                files.make_directory(given["data_dir"])
        lists = {name: tuple(self._value(name) or ()) for name in _LISTS if name in FLAGS}
        if "targets" not in FLAGS:
            lists["targets"] = ()
        if FLAGS["methods"].value is None and not FLAGS.quick:
            known = given["source"], lists["backbones"], VARIANTS, given["data_dir"]
            lists["methods"] = tuple(sweep.fitting(*known))
        rates = {
            f"{name}s": tuple(self._value(name) or ())
            for name in ("learning_rate", "source_learning_rate")
            if name in FLAGS
        }
        return sweep.Sweep(root=root, table=self.table, **lists, **given, **rates)

    def _value(self, name):
        """Of a flag; with --quick another default."""
        quick = FLAGS.quick and name in self.quick and not FLAGS[name].present
        return self.quick[name] if quick else FLAGS[name].value

    def main(self) -> None:
        """Runs the sweep, or prints its plan."""
        import tensorflow as tf

        from etfzoo.experiments import report, runner
        from etfzoo.runtime.interruption import Stopped

        settings = self.settings()
        jobs = self._value("jobs")
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices([], "GPU")  # their memory is for the cells
        if FLAGS.dry_run:
            _print_plan(settings, jobs)
            return
        command = shlex.join(["python", f"recipes/{self.table}.py", *sys.argv[1:]])
        try:
            failures = runner.run(settings, as_started(command), jobs, len(gpus))
        except Stopped:
            report.write(settings.root)
            raise
        path = report.write(settings.root)
        if settings.evaluates:
            print(report.text(settings.root))
        print(f"report: {path}", flush=True)
        if failures:
            print("not finished:", *failures, sep="\n  ", file=sys.stderr)
            sys.exit(1)

    def define(self) -> None:
        """Defines the flags."""
        data, model, training, default = "Data", "Model", "Training", self.defaults.get
        flags.string(data, "source", default("source"), "data set of the pretraining")
        if "targets" in self.defaults:
            text = "data sets that models are transferred to"
            flags.strings(data, "targets", default("targets"), text)
        if "imbalances" in self.defaults:
            text = "largest class by smallest of the long tails that are made of the source"
            flags.numbers(data, "imbalances", default("imbalances"), text, low=1, high=10**6)
        if "ood_datasets" in self.defaults:
            text = "data sets of other things, that models tell from the source"
            flags.strings(data, "ood_datasets", default("ood_datasets"), text)
        flags.path(data, "data_dir", None, "TFDS data directory (default: TFDS's own)")
        flags.image_size_flag("the protocol's")
        flags.settings("image_size_schedule")
        text = "rn18, rn34, rn50 or rn101"
        flags.strings(model, "backbones", default("backbones"), text, choices=BACKBONES)
        text = f"of {', '.join(METHODS)}"
        if default("methods") is None:
            text += " (default: the variants that fit the source)"
        flags.strings(model, "methods", default("methods"), text, choices=METHODS)
        if "targets" in self.defaults:
            text = "what is done on targets: full, linear_probe or knn"
            flags.strings(model, "modes", default("modes"), text, choices=MODES)
        text = f"{', '.join(PROTOCOLS)}: where unset flags take their values from"
        flags.string(training, "protocol", default("protocol"), text, choices=PROTOCOLS)
        text = "of pretraining and of what follows it"
        flags.integers(training, "seeds", default("seeds"), text, **SEEDS)
        around = "a third, once and three times the protocol's"
        if "targets" in self.defaults:
            text = "grid of the fine-tuning, widened where the best lies at its edge (default: "
            flags.numbers(training, "learning_rate", None, f"{text}{around})", **RATES)
        text = (
            "one for the pretraining, or several that are searched with the first backbone and seed"
        )
        around = "the protocol's" if self.table == "table1" else around
        flags.numbers(
            training, "source_learning_rate", None, f"{text} (default: {around})", **RATES
        )
        for name, text, high in (
            ("source_search_epochs", "of each of several (default: all)", 10**6),
            ("epochs", "of the pretraining", 10**6),
            ("finetune_epochs", "of the fine-tuning", 10**6),
            ("batch_size", "of the pretraining", MOST_IMAGES),
            ("finetune_batch_size", "of the fine-tuning", MOST_IMAGES),
            ("eval_every", "epochs between evaluations (default: 1)", 10**6),
        ):
            if name not in _TRANSFER or "targets" in self.defaults:
                flags.integer(training, name, None, text, low=1, high=high)
        flags.settings("mixed_precision", "cache", "deterministic")
        text = "cells at a time; they share the cores, and GPUs one each"
        flags.integer("Machine", "jobs", 1, text, low=1, high=1024)
        flags.boolean("Sweep", "dry_run", False, "print the plan, and run nothing")
        flags.boolean("Sweep", "quick", False, "small embedded data, rn18, in some minutes")
        text = f"directory of the sweep (default: runs/{self.table})"
        flags.path("Files", "workdir", None, text)


def _print_plan(settings, jobs):
    from etfzoo.experiments import costs, sweep
    from etfzoo.experiments.runner import clock

    cells = sweep.cells(settings)
    rates = costs.measured_rates(cells)
    total, seconds, unknown, states = 0, 0.0, 0, {}
    for number, cell in enumerate(cells, 1):
        state = sweep.state(cell)
        states[state] = states.get(state, 0) + 1
        left, rate = costs.remaining_images(cell), rates.get(costs.kind(cell))
        steps = sum(costs.steps(config) for _, config in cell.runs())
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
        tails = " and imbalance" if len(settings.imbalances) > 1 else ""
        print(
            f"the pretraining's rate is searched with {settings.backbones[0]} and seed "
            f"{settings.seeds[0]}, for each method{tails}, and taken for the others"
        )


def _arguments(cell):
    from etfzoo.experiments import sweep

    arguments = cell.ready_job().arguments()
    if cell.rate_of is not None and sweep.picked_rate(cell.rate_of) is None:
        arguments = [text for text in arguments if not text.startswith("--learning_rate=")]
        arguments.append(f"--learning_rate=(as picked in {cell.rate_of.name})")
    return shlex.join(arguments)

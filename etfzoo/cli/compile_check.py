"""Compiles the real training step for a TPU ahead of time, on a machine without one.

  python recipes/compile_check.py --topology=v5e:2x2 --backbone=rn50 --head=etf
  python recipes/compile_check.py --topology=v5e:2x2 --backbone=rn101 --head=linear --norm=sw

The step is the one that KERAS_BACKEND=jax trains with, its batch split over the chips of the
topology: XLA's TPU compiler says whether it can be run and what memory it takes. Nothing is run,
so that it tells nothing about speed. Needs pip install 'etfzoo[tpu-check]' (Linux), best in an
environment of its own: where libtpu is, JAX looks for a TPU first and complains that there is none.
"""

import math
import os
import re
import sys
import time

# All before JAX, Keras and libtpu are imported; libtpu would look for a TPU otherwise.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so others may
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

from etfzoo.cli import app, flags
from etfzoo.cli.flags import FLAGS

# Memory a chip in GiB, and the name that libtpu has for the machine; by kind of chip.
CHIPS = {"v5e": (16, "v5litepod"), "v6e": (32, "v6e")}
PRECISIONS = ("none", "bfloat16")


def main():
    import etfzoo

    kind, chips = _topology(FLAGS.topology)
    memory, machine = CHIPS[kind]
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{machine}-{chips}")
    if FLAGS.batch_size < chips or FLAGS.batch_size % chips:
        raise etfzoo.EtfzooError(
            f"--batch_size={FLAGS.batch_size} is the batch of all {chips} chips together and must "
            f"be a multiple of {chips}"
        )
    stepper = _stepper(_devices(FLAGS.topology))
    size = FLAGS.image_size
    precision = FLAGS.mixed_precision.replace("none", "float32")
    print(
        f"compiling {FLAGS.backbone} ({FLAGS.head} head, {FLAGS.norm}), {FLAGS.num_classes} "
        f"classes, {size} px, global batch {FLAGS.batch_size}, {precision} precision, for {chips} "
        f"chips of {FLAGS.topology}; this takes minutes",
        flush=True,
    )
    start = time.monotonic()
    compiled = stepper.compile_ahead((FLAGS.batch_size, size, size, 3))
    seconds = time.monotonic() - start
    found = compiled.memory_analysis()
    parts = {
        "weights, slots and batch": found.argument_size_in_bytes,
        "results that take new memory": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    print(f"compiled in {seconds:.0f} s; memory a chip:")
    for name, count in (*parts.items(), ("together", total)):
        print(f"  {name}: {count / 2**30:.3f} GiB")
    cost = compiled.cost_analysis() or {}
    if cost.get("flops"):
        print(f"  operations a step and chip, as XLA counts them: {cost['flops'] / 1e9:.1f} GFLOP")
    reductions, size = _reductions(compiled.as_text())
    print(f"  all-reduce operations: {reductions}, of {size / 1e6:.2f} MB together")
    fits = total <= memory * 2**30
    print(f"{'fits' if fits else 'does not fit'} into the {memory} GiB of a {kind} chip")
    if not fits:
        sys.exit(1)


def _topology(text):
    import etfzoo

    match = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", text)
    if not match or match[1] not in CHIPS:
        raise etfzoo.EtfzooError(
            f"--topology is {' or '.join(CHIPS)} and its chips, as in v5e:2x2; got {text!r}"
        )
    return match[1], int(match[2]) * int(match[3])


def _devices(name):
    import etfzoo
    from etfzoo.errors import extra, first_line

    with extra("tpu-check"):
        import libtpu  # noqa: F401
        from jax.experimental import topologies
    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:  # libtpu raises errors of many kinds
        raise etfzoo.EtfzooError(f"no topology {name}: {first_line(error)}") from error


def _reductions(program):
    """Number of all-reduces in a compiled program, and bytes of what they add up over the chips."""
    shapes = re.findall(r" = (.*?) all-reduce(?:-start)?\(", program)  # as in (f32[64], bf16[3,3])
    arrays = re.findall(r"[a-z](\d+)\[([\d,]*)\]", " ".join(shapes))
    sizes = [
        int(bits) // 8 * math.prod(int(n) for n in axes.split(",") if n) for bits, axes in arrays
    ]
    return len(shapes), sum(sizes)


def _stepper(devices):
    import keras

    import etfzoo
    from etfzoo.runtime.step_jax import Stepper, use_full_float32
    from etfzoo.runtime.strategy_jax import DataParallel

    if FLAGS.norm == "sw":
        use_full_float32()
    precision, size = FLAGS.mixed_precision, FLAGS.image_size
    try:
        model = etfzoo.build_classifier(
            FLAGS.backbone,
            FLAGS.num_classes,
            FLAGS.head,
            FLAGS.norm,
            input_shape=(size, size, 3),
            dtype="float32" if precision == "none" else f"mixed_{precision}",
        )
    except ValueError as error:
        raise etfzoo.EtfzooError(str(error)) from error
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return Stepper(model, optimizer, DataParallel(devices), weight_decay=1e-4)


def run():
    """Defines the flags and runs the command."""
    flags.string("Machine", "topology", "v5e:2x2", "v5e or v6e and its chips, as in v5e:2x2")
    flags.string("Machine", "mixed_precision", "bfloat16", "none or bfloat16", choices=PRECISIONS)
    flags.settings("backbone", "head", "norm", backbone="rn50", head="etf", norm="bn")
    flags.integer("Model", "num_classes", 1000, "classes", low=2, high=10**6)
    flags.settings("image_size", image_size=224)
    flags.batch_flag(256, "images a step, over all chips")
    app.run(main, __doc__, extra="tpu-check")

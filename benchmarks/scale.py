"""What data parallelism costs: bytes of the all-reduce, and step times from 1 to 256 chips.

  python benchmarks/scale.py                                   # the volumes, and three machines
  python benchmarks/scale.py --tflops=80 --gbits=1600 --images_per_chip=32 --size=224
  python benchmarks/scale.py --measure --rounds=5              # 1 and 2 worker processes, here

Volumes are counted from the variables of the real models. Times of more chips are COMPUTED, for a
ring: each chip sends 2 (n - 1) / n times the gradients (Patarasuk and Yuan 2009), while its own
work is 6 operations a multiply-accumulate of the forward pass (forward, and twice that backward).
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

CHIPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = [(b, m) for b in ("rn50", "rn101") for m in ("linear", "etf", "sw")]
# Vendors' peak TFLOP/s (bfloat16) and Gbit/s a chip; how much of the peak a ResNet reaches is a
# guess, which --tflops replaces by your own measurement.
MACHINES = {"TPU v5e, ICI": (197, 1600), "A100, NVLink": (312, 2400), "A100, Ethernet": (312, 25)}
REACHED = 0.4


def build(backbone, method, size, num_classes=1000):
    import etfzoo

    return etfzoo.build_classifier(
        backbone,
        num_classes,
        "etf" if method == "etf" else "linear",
        "sw" if method == "sw" else "bn",
        input_shape=(size, size, 3),
    )


def volumes(model):
    """Floats that one step reduces: those of gradients, and those of the norms' statistics.

    Statistics go both ways: values forward, their gradients backward. Batch norm has two a channel
    (mean and square), whitening 1 + 16 (mean and a row of the covariance).
    """
    import keras

    from etfzoo.layers import SwitchableWhitening

    gradients = sum(math.prod(v.shape) for v in model.trainable_variables)
    batch_norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    whitenings = [x for x in model.layers if isinstance(x, SwitchableWhitening)]
    norms = sum(2 * x.moving_mean.shape[0] for x in batch_norms)
    norms += sum((1 + x.group_size) * x.moving_mean.shape[0] for x in whitenings)
    return gradients, 2 * norms


def macs(model):
    """Multiply-accumulates of the convolutions and of the classifier, an image."""
    total = 0
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        total += math.prod(layer.output.shape[1:-1]) * math.prod(kernel.shape)
    return total


def print_volumes(args):
    found = {}
    print(f"all-reduce of one step in float32, K = 1000; forward pass at {args.size} px\n")
    print("| model | gradients, MB | statistics, MB | GMAC an image |\n|---|---|---|---|")
    for backbone, method in MODELS:
        model = build(backbone, method, args.size)
        gradients, norms = volumes(model)
        found[backbone, method] = 4 * (gradients + norms), macs(model)
        print(
            f"| {backbone}_{method} | {4e-6 * gradients:.2f} | {4e-6 * norms:.2f} | "
            f"{1e-9 * macs(model):.2f} |",
            flush=True,
        )
    return found


def print_times(found, args):
    machines = MACHINES
    if args.tflops and args.gbits:
        machines = {"your machine": (args.tflops / REACHED, args.gbits)}
    for name, (peak, gbits) in machines.items():
        tflops = REACHED * peak
        print(
            f"\n{name}: {tflops:.0f} TFLOP/s reached, {gbits:g} Gbit/s a chip, "
            f"{args.images_per_chip} images a chip. COMPUTED: ms of work + ms of all-reduce\n"
        )
        print("| model | " + " | ".join(map(str, CHIPS)) + " |\n|---|" + "---|" * len(CHIPS))
        for (backbone, method), (size, work) in found.items():
            own = 6e3 * work * args.images_per_chip / (1e12 * tflops)
            sent = [2 * (n - 1) / n * size for n in CHIPS]
            cells = [f"{own:.1f} + {8e3 * bytes_ / (1e9 * gbits):.2f}" for bytes_ in sent]
            print(f"| {backbone}_{method} | " + " | ".join(cells) + " |")


def worker(args):
    """One process of `--measure`: prints the median wall milliseconds of a step."""
    import keras
    import numpy as np
    import tensorflow as tf

    from etfzoo.runtime import step_tf, strategy

    several = "TF_CONFIG" in os.environ
    threads = 1 if several else 2
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    found = strategy.get_strategy("multiworker" if several else "one_device")
    keras.utils.set_random_seed(0)
    with found.scope():
        model = build(args.backbone, args.method, 64)
        step_tf.synchronize(model, several)
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(model.trainable_variables)
    stepper = step_tf.Stepper(model, optimizer, found)
    share = args.batch // found.num_replicas_in_sync
    rng = np.random.default_rng(0)
    images = tf.constant(rng.integers(256, size=(share, 64, 64, 3), dtype=np.uint8))
    labels = tf.constant(rng.integers(1000, size=share), tf.int32)
    data = tf.data.Dataset.from_tensors((images, labels)).repeat()
    batches = iter(step_tf.distribute(found, lambda _: data))
    times = []
    for _ in range(2 + args.rounds):
        start = time.perf_counter()
        stepper.train(batches).numpy()
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps(statistics.median(times[2:])), flush=True)
    strategy.wait_for_all(found)


def measure(args):
    print(f"\nmeasured here, 64 px, global batch {args.batch}, median ms of {args.rounds} steps\n")
    print(
        "| model | 1 process, 2 threads | 2 processes, 1 thread each | ratio |\n|---|---|---|---|"
    )
    for backbone in ("rn50", "rn101"):
        for method in ("linear", "etf", "sw"):
            one, two = (_run(n, backbone, method, args) for n in (1, 2))
            print(f"| {backbone}_{method} | {one:.0f} | {two:.0f} | {two / one:.2f} |", flush=True)


def _run(workers, backbone, method, args):
    command = [sys.executable, __file__, "--worker", f"--backbone={backbone}"]
    command += [f"--method={method}", f"--batch={args.batch}", f"--rounds={args.rounds}"]
    hosts = [f"127.0.0.1:{_free_port()}" for _ in range(workers)]
    processes = []
    for index in range(workers):
        environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        if workers > 1:
            task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
            environment["TF_CONFIG"] = json.dumps(task)
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a worker failed")
    return max(json.loads(output.splitlines()[-1]) for output in outputs)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="image height and width in pixels")
    parser.add_argument("--images_per_chip", type=int, default=32)
    parser.add_argument("--tflops", type=float, help="TFLOP/s that your chip reaches")
    parser.add_argument("--gbits", type=float, help="Gbit/s that your chip sends")
    parser.add_argument("--measure", action="store_true", help="time 1 and 2 processes here")
    parser.add_argument("--batch", type=int, default=32, help="images a step, with --measure")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--backbone", default="rn50", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="etf", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
    elif args.measure:
        measure(args)
    else:
        print_times(print_volumes(args), args)


if __name__ == "__main__":
    main()

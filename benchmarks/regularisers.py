"""What mixup, cutmix, RandAugment and averaged weights (EMA) cost.

  python benchmarks/regularisers.py --what=pipeline --rounds=5
  python benchmarks/regularisers.py --what=step --rounds=5

`pipeline` reads an epoch of photographs (JPEG, 500 x 375, made here) at 224 px, with resized crops
and flips, and gives images/s of the whole machine and CPU milliseconds an image. `step` is that of
etfzoo's training of a ResNet50 on data in memory, in CPU seconds on one thread. All kinds live in
one process and take turns in every round; the ratios are to the kind without any, as medians over
rounds: they mean something on a busy machine, the other figures do not.
"""

import argparse
import functools
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

KINDS = {
    "none": {},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "mixup + cutmix": {"mixup": 0.2, "cutmix": 1.0},
    "RandAugment": {"rand_augment": 7.0},
    "all three": {"mixup": 0.2, "cutmix": 1.0, "rand_augment": 7.0},
}


def write_photographs(folder, count):
    """JPEG files of smooth shapes with noise, which take about as long to decode as photographs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        noisy = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
        path = Path(folder) / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def pipelines(folder, batch):
    """`epoch(number)` by kind: reads all batches, and returns the number of images."""
    from etfzoo.data.augmentation import Augmentation
    from etfzoo.data.mixing import Mixing
    from etfzoo.data.pipeline import Pipeline
    from etfzoo.data.sources import resolve

    source = resolve(f"folder:{folder}")

    def reader(rand_augment=0.0, **mixing):
        augmentation = Augmentation(rand_augment=rand_augment)
        pipeline = Pipeline(
            source, 224, 224, 0.875, batch, augmentation, 0, mixing=Mixing(**mixing)
        )

        def epoch(number):
            return sum(len(images) for images, _ in pipeline.training("train", number))

        return epoch

    return {name: reader(**kind) for name, kind in KINDS.items()}


def measure_pipelines(args):
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, args.images)
        readers = pipelines(folder, args.batch)
        for read in readers.values():
            read(0)  # traces, and fills the file cache
        walls, cpus = (np.empty((args.rounds, len(readers))) for _ in range(2))
        for turn in range(args.rounds):
            for column, read in enumerate(readers.values()):
                wall, cpu = time.perf_counter(), time.process_time()
                images = read(1 + turn)
                walls[turn, column] = (time.perf_counter() - wall) / images
                cpus[turn, column] = (time.process_time() - cpu) / images
    for column, name in enumerate(readers):
        ratios = cpus[:, column] / cpus[:, 0]
        speeds = walls[:, 0] / walls[:, column]
        print(
            f"{name}: {1 / np.median(walls[:, column]):.0f} images/s, {np.median(speeds):.3f} of "
            f"those with none (rounds {speeds.min():.3f} to {speeds.max():.3f}); "
            f"{1e3 * np.median(cpus[:, column]):.2f} CPU ms an image, ratio "
            f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})",
            flush=True,
        )


def stepper(size, batch, soft, ema):
    """`step()` of a ResNet50 on labels or soft targets, with or without averaged weights."""
    import keras
    import tensorflow as tf

    import etfzoo
    from etfzoo.runtime import losses, step_tf
    from etfzoo.runtime.averaging import WeightAverage

    keras.utils.set_random_seed(0)
    rng = np.random.RandomState(0)
    images = tf.constant(rng.randint(256, size=(batch, size, size, 3), dtype=np.uint8))
    labels = tf.constant(rng.randint(1000, size=batch), tf.int32)
    if soft:
        labels = tf.one_hot(labels, 1000)
    strategy = tf.distribute.get_strategy()
    model = etfzoo.build_classifier("rn50", 1000, "linear", input_shape=(size, size, 3))
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, name="sgd")
    optimizer.build(model.trainable_variables)  # otherwise the second step is traced again
    average = WeightAverage(model, 0.9999, strategy) if ema else None
    loss = functools.partial(losses.cross_entropy, label_smoothing=0.1)
    train = step_tf.Stepper(model, optimizer, strategy, 1e-4, loss, average=average).train
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    for _ in range(2):
        train(batches).numpy()
    return lambda: train(batches).numpy()


def measure_steps(args):
    kinds = {"none": (False, False), "soft targets": (True, False), "EMA": (False, True)}
    steps = {name: stepper(args.size, args.batch, *kind) for name, kind in kinds.items()}
    times = np.empty((args.rounds, len(steps)))
    for turn in range(args.rounds):
        for column, step in enumerate(steps.values()):
            start = time.process_time()
            step()
            times[turn, column] = time.process_time() - start
    for column, name in enumerate(steps):
        ratios = times[:, column] / times[:, 0]
        fastest = times[:, column].min() / times[:, 0].min()
        print(
            f"rn50, {args.size} px, batch {args.batch}, {name}: "
            f"{1e3 * np.median(times[:, column]):.0f} CPU ms a step, ratio {np.median(ratios):.3f} "
            f"(rounds {ratios.min():.3f} to {ratios.max():.3f}), of the fastest {fastest:.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=["pipeline", "step"], default="pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1280, help="photographs of the pipeline")
    parser.add_argument("--size", type=int, default=224, help="image size of the step")
    parser.add_argument("--batch", type=int, default=None, help="default: 64, of the step 8")
    args = parser.parse_args()
    args.batch = args.batch or (64 if args.what == "pipeline" else 8)

    import tensorflow as tf

    if args.what == "step":
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    with open("/proc/cpuinfo") as info:
        cpu = re.search(r"model name\s*: (.*)|$", info.read())[1]
    print(f"{cpu}, {os.cpu_count()} cores, TensorFlow {tf.__version__}", flush=True)
    measure_steps(args) if args.what == "step" else measure_pipelines(args)


if __name__ == "__main__":
    main()

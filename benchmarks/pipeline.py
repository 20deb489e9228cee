"""Images per CPU second of the input pipeline, beside decoding alone and beside its options.

  python benchmarks/pipeline.py                       # 500 x 375 JPEGs of some 56 KB, drawn here
  python benchmarks/pipeline.py --images=photos --size=224 --rounds=5

One thread; medians of rounds in which the candidates take turns, so that the ratios to `decode`
mean something on a shared machine. `etfzoo` is the training pipeline as pretrain.py uses it at
224 px: a random window decoded from the JPEG, an antialiased resize where it becomes smaller, flip,
uint8 batches (normalisation is the model's first layer, on the device), of a data set that says
that its images are JPEGs; `any format` is that of all others. `one call` resizes both axes in one
call of TensorFlow's. `--noantialias` filters only windows of more than twice the target.
`evaluation` decodes exactly. `without branches` is for JPEGs alone, whose headers nobody checks,
and never antialiased; those below it change one thing of it.
"""

import argparse
import os
import pathlib
import time
from unittest import mock

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BATCH = 32
BYTES = 56_000  # mean size of ImageNet's photographs, when shrunk to about 500 x 375


def photographs(count, rng):
    """JPEGs with a photograph's spectrum (1/f in each channel) of about BYTES."""
    import tensorflow as tf

    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(500), np.fft.fftfreq(375)))
    frequency[0, 0] = 1
    found = []
    for _ in range(count):
        noise = np.fft.fft2(rng.standard_normal((375, 500, 3)), axes=(0, 1))
        image = np.fft.ifft2(noise / frequency[..., None] ** 1.1, axes=(0, 1)).real
        image = 128 + 50 * (image - image.mean()) / image.std()
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        encoded = (tf.io.encode_jpeg(pixels, quality=q).numpy() for q in range(97, 10, -3))
        found.append(next(e for e in encoded if len(e) <= BYTES))
    return found


def candidates(size):
    """Functions `(encoded, key) -> image` by name; `etfzoo` is training_image itself."""
    import tensorflow as tf

    from etfzoo.data import augment

    def decode(encoded, key):
        return tf.io.decode_jpeg(encoded, channels=3)[:size, :size]

    def ours(encoded, key, jpegs=True, resample=augment._resample, **options):
        options = {"crop": "resized_crop", "min_area": 0.08} | options
        with mock.patch.object(augment, "_resample", resample):
            image = augment.training_image(
                encoded, key, size, size, augment.Augmentation(**options), 0.875, jpegs
            )
        return tf.cast(image, tf.uint8)

    def one_call(pixels, window, height, width):
        scale = [float(height), float(width)] / window[2:]
        image = tf.raw_ops.ScaleAndTranslate(
            images=pixels[None], size=[height, width], scale=scale, translation=-window[:2] * scale,
            kernel_type="triangle", antialias=True,
        )  # fmt: skip
        return tf.round(image[0])

    def evaluation(encoded, key, jpegs=True):
        return tf.cast(augment.evaluation_image(encoded, size, size, 0.875, jpegs), tf.uint8)

    def floats(encoded, key):
        image = augment.training_image(
            encoded, key, size, size, augment.Augmentation(), 0.875, True
        )
        return (image - 127.5) / 58.0

    def window(encoded, key, whole=False, antialias=False, exact=False, flip=True, area=True):
        crop_key, flip_key = tf.unstack(tf.random.split(key, 2))
        shape = tf.image.extract_jpeg_shape(encoded)
        if area:
            numbers = tf.random.stateless_uniform([augment.TRIES + 1, 2], crop_key)
            corners = augment.random_window(shape[:2], numbers, 0.08)
        else:
            begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
                shape, tf.zeros([1, 0, 4]), crop_key, 0.0, (3 / 4, 4 / 3), (0.08, 1.0), 10, True
            )
            corners = tf.concat([begin[:2], extent[:2]], 0)
        dct = "INTEGER_ACCURATE" if exact else "INTEGER_FAST"
        if whole:
            image = tf.io.decode_jpeg(encoded, 3, dct_method=dct)
            image = tf.slice(image, [*tf.unstack(corners[:2]), 0], [*tf.unstack(corners[2:]), 3])
        else:
            image = tf.io.decode_and_crop_jpeg(encoded, corners, 3, dct_method=dct)
        image = tf.image.resize(image, [size, size], antialias=antialias)
        if flip:
            image = tf.image.stateless_random_flip_left_right(image, flip_key)
        return tf.cast(tf.round(image), tf.uint8)

    return {
        "decode": decode,
        "etfzoo": ours,
        "etfzoo, any format": lambda e, k: ours(e, k, jpegs=False),
        "etfzoo, one call": lambda e, k: ours(e, k, resample=one_call),
        "etfzoo, any format, one call": lambda e, k: ours(e, k, False, one_call),
        "etfzoo --noantialias": lambda e, k: ours(e, k, antialias=False),
        "etfzoo --rand_augment=7": lambda e, k: ours(e, k, rand_augment=7.0),
        "etfzoo --random_erasing=1": lambda e, k: ours(e, k, random_erasing=1.0),
        "etfzoo, evaluation": evaluation,
        "etfzoo, evaluation, any format": lambda e, k: evaluation(e, k, jpegs=False),
        "float32 batches, normalised": floats,
        "without branches": window,
        "decode all, then crop": lambda e, k: window(e, k, whole=True),
        "INTEGER_ACCURATE": lambda e, k: window(e, k, exact=True),
        "TensorFlow's smaller windows": lambda e, k: window(e, k, area=False),
        "no flip": lambda e, k: window(e, k, flip=False),
        "always antialiased": lambda e, k: window(e, k, antialias=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=pathlib.Path, help="folder of JPEGs (default: drawn)")
    parser.add_argument("--count", type=int, default=64, help="different images")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    if args.images:
        encoded = [p.read_bytes() for p in sorted(args.images.rglob("*.jp*g"))[: args.count]]
    else:
        encoded = photographs(args.count, np.random.default_rng(0))
    keys = np.arange(2 * len(encoded), dtype=np.int32).reshape(-1, 2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices((encoded, keys)).cache().with_options(options)
    found = candidates(args.size)
    batches = {name: data.map(f).batch(BATCH) for name, f in found.items()}

    def rate(name):
        start = time.process_time()
        for _ in batches[name]:
            pass
        return len(encoded) / (time.process_time() - start)

    for name in found:  # traces, and fills the caches
        rate(name)
    rates = np.array([[rate(name) for name in found] for _ in range(args.rounds)])
    size = sum(map(len, encoded)) / len(encoded) / 1000
    print(f"{len(encoded)} JPEGs of {size:.0f} KB -> {args.size} px, {args.rounds} rounds\n")
    print("| pipeline | images a CPU second | against decoding |\n|---|---|---|")
    for name, column in zip(found, rates.T, strict=True):
        ratio = np.median(column / rates[:, 0])
        print(f"| {name} | {np.median(column):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

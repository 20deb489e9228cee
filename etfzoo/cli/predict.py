"""Says what is on images: the five likeliest classes of each, with a model of the zoo or of yours.

  python recipes/predict.py --model=rn18_etf.shapes photo.jpg folder/
  python recipes/predict.py --model=runs/flowers_etf photos/ --output=predictions.csv

Images are read, cropped and resized as in evaluation, as they are stored: the orientation that a
camera notes in EXIF is not applied. Folders are searched however deep.
"""

import codecs
import contextlib
import csv
import os
import sys

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS

TOP = 5
SHOWN = 20  # rows of the table on the screen, where all go to a file


def main(arguments):
    import etfzoo
    from etfzoo import files

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    paths = configs.image_arguments(arguments)
    model = etfzoo.load(FLAGS.model)
    if model.spec.head is None:
        raise etfzoo.EtfzooError(f"{FLAGS.model} has no classifier: it gives features only")
    if None in model.spec.input_shape:
        raise etfzoo.EtfzooError(f"{FLAGS.model} has no image size to bring the images to")
    shown, count = [], 0
    with contextlib.ExitStack() as stack:
        table = None
        if FLAGS.output:
            file = stack.enter_context(files.atomic(FLAGS.output))
            # The names of files need not be UTF-8, and are written as they are.
            table = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"))
            ranks = range(1, min(TOP, model.spec.num_classes) + 1)
            table.writerow(["image", *(f"{what}{i}" for i in ranks for what in ("class", "score"))])
        for path, classes in _predict(model, paths):
            if table:
                table.writerow([path, *(x for name, p in classes for x in (name, f"{p:.6f}"))])
            if not table or count < SHOWN:
                shown.append((path, classes))
            count += 1
    if shown:
        configs.print_predictions(*zip(*shown, strict=True))
    if FLAGS.output:
        print(f"written to {FLAGS.output}: {count} images")


def _predict(model, paths):
    """Yields `(path, [(label, score), ...])` of the readable images, in order."""
    import tensorflow as tf

    import etfzoo
    from etfzoo.data.augment import evaluation_image
    from etfzoo.data.pipeline import PARALLEL
    from etfzoo.data.source import reading
    from etfzoo.progress import Progress

    height, width = model.spec.input_shape[:2]

    def read(number, path):
        return number, evaluation_image(tf.io.read_file(path), height, width, model.spec.crop)

    # What cannot be read is missing in the batches and told by the gap in the numbers.
    images = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in paths]).enumerate()
    images = images.with_options(reading()).map(read, PARALLEL).ignore_errors()
    progress = Progress("predicting", len(paths))
    expected = 0
    for numbers, batch in images.batch(FLAGS.batch_size).prefetch(1):
        probabilities = tf.nn.softmax(tf.cast(model.predict_on_batch(batch.numpy()), tf.float32))
        found = etfzoo.decode_predictions(model, probabilities, TOP, from_logits=False)
        for number, classes in zip(numbers.numpy(), found, strict=True):
            _unreadable(paths[expected:number])
            expected = number + 1
            yield paths[number], [(label, score) for _, label, score in classes]
        progress.update(int(expected))
    _unreadable(paths[expected:])
    progress.finish()


def _unreadable(paths):
    """Stops at an image that cannot be read, or names what is left out."""
    import etfzoo
    from etfzoo import files
    from etfzoo.data.readable import why_unreadable

    for path in paths:
        try:
            reason = why_unreadable(files.read_bytes(path))
            reason = f"{path} is not a readable image: {reason}"
        except etfzoo.EtfzooError as error:
            reason = str(error)
        if not FLAGS.skip_corrupt:
            raise etfzoo.EtfzooError(f"{reason}; --skip_corrupt leaves such images out")
        print(f"left out: {reason}", file=sys.stderr, flush=True)


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.boolean(
        "Data", "skip_corrupt", False, "leave out images that cannot be read, naming them"
    )
    flags.batch_flag(32, "images a step")
    flags.path("Files", "output", None, "CSV file of all predictions")
    app.run(main, __doc__, arguments=True)

"""Data sets for Keras's own `fit` and `evaluate`; the recipes have a training loop of their own."""

import itertools

import tensorflow as tf

from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.readable import readable
from etfzoo.data.source import reading
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, shown

_CROP = 0.875  # of models that don't say theirs


def load(
    dataset: str,
    split: str,
    model=None,
    image_size=None,
    batch_size: int = 32,
    training: bool = False,
    *,
    augmentation: Augmentation | None = None,
    data_dir: str | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> tf.data.Dataset:
    """Batches of a data set, as Keras's `fit`, `evaluate` and `predict` take them.

    For evaluation it has every image of the split once, in file order, with the crop and filter of
    `etfzoo.preprocess`. For training each pass over it is the next epoch, with an order and draws
    of its own: the images are shuffled, augmented and cut into whole batches, of which the rest is
    left out. It ends after each epoch, so that `fit` needs no `steps_per_epoch`; `repeat()` goes
    on with the epochs.

    Args:
        dataset: a name of TFDS, which is downloaded if it has to be, or of the embedded sets
            (`"digits"`), `folder:PATH`: one subfolder of images a class, optionally below
            `train`, `val` and `test`, `csv:FILE`: a table with the columns `path`, `label` and
            optionally `split`, or `hf:NAME`: a data set of the package `datasets`.
        split: `"train"`, `"test"`, `"fit"` and `"select"` (two parts of the training data, to pick
            settings by) or a split of the data set, e.g. `"train[:10%]"` of TFDS.
        model: gives the image size, and where it is a classifier of etfzoo the crop; then its
            classes are compared, too. Any Keras model with one input, or an `etfzoo.spec`.
        image_size: pixels, `(height, width)` or one number for both; instead of the model's.
        batch_size: images a batch, over all replicas of a strategy.
        training: whether it is for training.
        augmentation: what training draws, e.g. `etfzoo.data.Augmentation("shift", flip=False)`;
            None is a random resized crop, and mirroring where a mirrored image keeps its class.
        data_dir: TFDS data directory; None is TFDS's own default.
        seed: of order and augmentation.
        skip_corrupt: whether images that cannot be decoded are looked for and left out first.

    Returns:
        A data set of `(images float32 [B, H, W, 3], RGB in 0..255; labels int32 [B])`, with the
        label names as its attribute `class_names`.

    Raises:
        EtfzooError: no such data set or split, no image size, other classes than the model's, or
            fewer training images than one batch.

    Examples:
        >>> import etfzoo, os
        >>> os.makedirs("data", exist_ok=True)
        >>> train = etfzoo.data.load(
        ...     "digits", "train", image_size=32, batch_size=64, training=True, data_dir="data"
        ... )
        >>> train.class_names[3], len(train)
        ('3', 3)
        >>> images, labels = next(iter(train))
        >>> images.shape.as_list(), labels.dtype.name
        ([64, 32, 32, 3], 'int32')
    """
    if type(batch_size) is not int or batch_size < 1:
        raise EtfzooError(f"batch_size must be a positive integer; got {shown(batch_size)}")
    height, width = _size(model, image_size)
    source = resolve(dataset, data_dir)
    _check_classes(getattr(model, "spec", None), source)
    if skip_corrupt:
        source = readable(source)
    pipeline = Pipeline(
        source,
        height,
        width,
        getattr(getattr(model, "spec", model), "crop", _CROP),
        batch_size,
        augmentation or Augmentation(flip=source.row.flip),
        seed,
    )
    batches = _epochs(pipeline, split) if training else pipeline.evaluation(split)
    batches = batches.map(lambda images, labels: (tf.cast(images, tf.float32), labels))
    size = pipeline.size(split)
    steps = size // batch_size if training else -(-size // batch_size)
    batches = batches.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)
    batches = batches.with_options(reading())
    batches.class_names = source.class_names
    return batches


def class_names(dataset: str, data_dir: str | None = None) -> tuple[str, ...]:
    """The label names of a data set by class number, see `load`.

    Args:
        dataset, data_dir: as for `load`.

    Raises:
        EtfzooError: no such data set.
    """
    return resolve(dataset, data_dir).class_names


def _size(model, image_size):
    if image_size is not None:
        size = (image_size, image_size) if type(image_size) is int else tuple(image_size)
        if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            raise EtfzooError(
                f"image_size must be pixels, or (height, width); got {shown(image_size)}"
            )
        return size
    if model is None:
        raise EtfzooError("say how large the images are to be: give a model or an image_size")
    shape = getattr(getattr(model, "spec", model), "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) < 3 or None in shape[-3:-1]:
        raise EtfzooError(f"a model with inputs {shown(shape)} has no image size; give image_size")
    return shape[-3:-1]


def _check_classes(spec, source):
    if getattr(spec, "head", None) is None:
        return
    names = spec.class_names or source.class_names
    if spec.num_classes != source.num_classes or names != source.class_names:
        raise EtfzooError(
            f"the model has {_list(spec.num_classes, spec.class_names)} and the data set "
            f"{source.name} {_list(source.num_classes, source.class_names)}: give the model a new "
            "head (etfzoo.replace_head), or image_size in place of the model"
        )


def _list(count, names):
    some = ", ".join((names or ())[:3])
    return f"{count} classes" + (f" ({some}{', ...' if count > 3 else ''})" if some else "")


def _epochs(pipeline, split):
    """A data set that is another epoch each time it is read; read by TensorFlow, not by Python."""
    if pipeline.size(split) < pipeline.batch_size:
        raise EtfzooError(
            f"the split {split} of {pipeline.source.name} has {pipeline.size(split)} images, fewer "
            f"than one batch; pass batch_size={max(1, pipeline.size(split) // 4)} or less"
        )
    epochs = itertools.count()
    spec = pipeline.training(split, 0).element_spec

    def begin():
        return tf.data.experimental.to_variant(pipeline.training(split, next(epochs)))

    def epoch(_):
        variant = tf.py_function(begin, [], tf.variant)
        return tf.data.experimental.from_variant(tf.ensure_shape(variant, []), spec)

    return tf.data.Dataset.from_tensors(0).flat_map(epoch)

"""From a source's records to batches of uint8 images.

What an image looks like is a function of (seed, epoch, example), with mixing also of its neighbour
in the epoch's order: resuming at a step shows exactly what the uninterrupted run would have shown.
Records that were seen already are skipped encoded, and not read at all where a source is read by
index; see `etfzoo.data.source.Places`.
"""

import contextlib
import dataclasses
import hashlib
import os

import numpy as np
import tensorflow as tf

from etfzoo.data import augment
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.mixing import Mixing, mix_pair
from etfzoo.data.readable import why_unreadable
from etfzoo.data.source import Places, Source, naming_source
from etfzoo.errors import EtfzooError

PARALLEL = os.cpu_count()  # examples at a time


@dataclasses.dataclass(frozen=True)
class InputShare:
    """What one input pipeline of a `tf.distribute` strategy reads of each global batch.

    Attributes:
        index, count: this input pipeline (one a worker), and how many there are.
        replicas: replicas of all pipelines together; each takes an equal part of a batch.
    """

    index: int = 0
    count: int = 1
    replicas: int = 1


class Pipeline:
    """Batches of one data set at one image size.

    Args:
        source: where the records come from.
        height, width: image size in pixels.
        crop: share of the shorter side that evaluation keeps.
        batch_size: examples a batch, over all devices.
        augmentation: what training draws at random.
        seed: seed of order and augmentation.
        mixing: how training mixes images and labels; None mixes nothing.
    """

    def __init__(
        self,
        source: Source,
        height: int,
        width: int,
        crop: float,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        mixing: Mixing | None = None,
    ):
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.mixing = mixing or Mixing()
        self.preprocessing = (height, width, crop)  # of evaluation
        self.augmentation = augmentation
        # Traced once here, so that making an epoch's data set costs milliseconds.
        self._train = tf.function(
            lambda encoded, key: augment.training_image(
                encoded, key, height, width, augmentation, crop, source.jpegs
            ),
            input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)],
        )
        self._evaluate = tf.function(
            lambda encoded: augment.evaluation_image(encoded, height, width, crop, source.jpegs),
            input_signature=[tf.TensorSpec([], tf.string)],
        )
        self._draw = tf.function(lambda key: self.mixing.draw(key, height, width))
        self._mix = tf.function(
            lambda images, labels, draws: mix_pair(images, labels, draws, source.num_classes)
        )

    def at_size(self, height: int, width: int) -> "Pipeline":
        """The same examples, order and draws at another image size in pixels."""
        return Pipeline(
            self.source,
            height,
            width,
            self.preprocessing[2],
            self.batch_size,
            self.augmentation,
            self.seed,
            self.mixing,
        )

    def size(self, split: str) -> int:
        """Number of examples of a split or role that training or evaluation will see."""
        return self.source.size(split)

    def training(
        self, split: str, epoch: int, start_step: int = 0, share: InputShare | None = None
    ) -> tf.data.Dataset:
        """One epoch of `(images uint8 [B, H, W, 3], labels int32 [B])`; a rest is dropped.

        With mixing, targets float32 `[B, K]` take the place of the labels.

        With a share these are the batches of its replicas, one after the other. The order of the
        examples is the same whatever the number of replicas, and records of others' shares are
        left out encoded, or not read at all.

        Args:
            split: split or role.
            epoch: number of the epoch, from 0; every epoch has its own order and draws.
            start_step: global batches at the start that are skipped.
            share: None is all of it, in whole batches.

        Raises:
            EtfzooError: mixing, and an odd number of images for a replica.
        """
        self.mixing.check_batch_size(self.batch_size, share.replicas if share else 1)
        seed = self.draw_seed(epoch)

        def example(record):
            key = seed(record)
            image = tf.cast(self._train(record["image"], key), tf.uint8)
            if not self.mixing:
                return image, record["label"]
            return image, record["label"], self._draw(key)

        records = self.training_records(split, epoch, start_step, share)
        examples = records.map(example, PARALLEL)
        if self.mixing:
            pairs = examples.batch(2, drop_remainder=True)
            examples = pairs.map(self._mix, PARALLEL).unbatch()
        return self.batched(examples, share, drop_remainder=True)

    def training_records(
        self,
        split: str,
        epoch: int,
        start_step: int = 0,
        share: InputShare | None = None,
        images: bool = True,
    ) -> tf.data.Dataset:
        """The records that `training` makes its images of, in its order.

        `images`: see `etfzoo.data.source.Source.records`.
        """
        whole = None
        if share is not None:
            whole = self.size(split) // self.batch_size * self.batch_size
        places = self._places(share, start_step * self.batch_size, whole)
        return self.source.records(split, self._epoch_seeds(epoch)[0], images, places)

    def draw_seed(self, epoch: int):
        """A function from a record to the stateless seed, int32 `[2]`, of its draws in an epoch."""
        draws = tf.constant(self._epoch_seeds(epoch)[1], tf.int32)
        return lambda record: tf.stack([draws, tf.cast(record["key"], tf.int32)])

    def evaluation(self, split: str, share: InputShare | None = None) -> tf.data.Dataset:
        """All examples of a split or role, in file order; the last batch may be smaller.

        With a share all batches are whole: the last one is filled up with images of label -1.
        """

        def example(record):
            return tf.cast(self._evaluate(record["image"]), tf.uint8), record["label"]

        examples = self.evaluation_records(split, share).map(example, PARALLEL)
        return self.batched(examples, share, drop_remainder=False)

    def evaluation_records(
        self, split: str, share: InputShare | None = None, images: bool = True
    ) -> tf.data.Dataset:
        """The records that `evaluation` makes its images of, in its order.

        `images`: see `etfzoo.data.source.Source.records`.
        """
        places = self._places(share)
        records = self.source.records(split, images=images, places=places)
        size = self.size(split)
        filled = size + -size % self.batch_size
        missing = places.number_of(filled) - places.number_of(size)
        if share is None or not missing:
            return records
        fill = self.source.records(split, images=images, places=Places(0, 1)).repeat(missing)
        fill = fill.map(lambda record: record | {"label": tf.constant(-1, tf.int32)})
        return records.concatenate(fill)

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the encoded images and labels of a split or role, in file order."""
        digest = hashlib.sha256()
        with naming_source(self.source.name):
            for record in self.source.records(split).batch(64).as_numpy_iterator():
                for image, label in zip(record["image"], record["label"], strict=True):
                    digest.update(f"{label} {len(image)} ".encode())
                    digest.update(image)
        return digest.hexdigest()

    @contextlib.contextmanager
    def naming_corrupt_records(self, split: str, epoch: int | None = None, start_step: int = 0):
        """Turns a decoding error into one that names the record.

        Args:
            split, epoch, start_step: what is being read; an epoch of None is evaluation.

        Raises:
            EtfzooError: naming the first record that cannot be decoded, or the missing or
                damaged file.
        """
        name = self.source.name
        try:
            with naming_source(name, records=False):
                yield
        except tf.errors.InvalidArgumentError as error:
            order = None if epoch is None else self._epoch_seeds(epoch)[0]
            left = self._places(None, start_step * self.batch_size)
            records = self.source.records(split, order, places=left)
            with naming_source(name):
                for record in records:
                    reason = why_unreadable(record["image"], self.source.jpegs)
                    if reason is not None:
                        raise EtfzooError(
                            f"{os.fsdecode(record['record'].numpy())} ({split} split of {name}) is "
                            f"not a readable image ({reason}); replace it, or leave such images "
                            "out with `skip_corrupt`"
                        ) from error
            raise

    def _epoch_seeds(self, epoch):
        """Seeds of the epoch's order and of its draws."""
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(2)
        return tuple(int(s) & 0x7FFFFFFF for s in state)

    def _places(self, share, start=0, stop=None):
        """Those of a share from `start` to `stop`: a run of neighbours in each global batch."""
        share = share or InputShare()
        return Places(start, stop, self.batch_size, share.index, share.count)

    def batched(self, examples, share: InputShare | None, drop_remainder: bool) -> tf.data.Dataset:
        """Batches of a share of examples, prefetched; in the order of the examples."""
        size = self.batch_size // (share.replicas if share else 1)
        batches = examples.batch(size, drop_remainder=drop_remainder or share is not None)
        return batches.prefetch(2)


def evaluation_pipeline(spec, source: Source, batch_size: int) -> Pipeline:
    """A pipeline that only evaluates, at the image size and with the crop of a model.

    Args:
        spec: the model's ClassifierSpec.
        source: where the records come from.
        batch_size: examples a batch, over all devices.

    Raises:
        EtfzooError: the model has no image size.
    """
    height, width, _ = spec.input_shape
    if height is None or width is None:
        raise EtfzooError("the model has no image size; load it with input_shape=(224, 224, 3)")
    nothing_drawn = Augmentation("none", flip=False)
    return Pipeline(source, height, width, spec.crop, batch_size, nothing_drawn, seed=0)

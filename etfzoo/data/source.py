"""What a source of encoded images is.

A source knows its classes and splits, and yields records `{image, label, key, record}`: the
encoded bytes, the class number, a number that identifies the example for ever (the seed of its
augmentation) and its readable name (for error messages); where the source is held in memory, or
read by index, also `index`, its place in file order.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from etfzoo.data.datasets import Dataset
from etfzoo.errors import EtfzooError, first_line

log = logging.getLogger("etfzoo")

KEYS = 2**31 - 1
ROLES = ("train", "fit", "select", "test")

# What TensorFlow raises of files that are missing, locked, damaged, or of fewer records than said.
_FILE_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.DataLossError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnknownError,
)


@dataclasses.dataclass(frozen=True)
class Places:
    """Places in an order of records: all of them, or what one of several readers takes.

    Attributes:
        start, stop: the first place, and the one behind the last; None is the end of the split.
        batch: places of a batch; batches are counted from `start`.
        index, count: of each batch the run number `index` of `count` runs of equal length.
    """

    start: int = 0
    stop: int | None = None
    batch: int = 1
    index: int = 0
    count: int = 1

    def number_of(self, size: int) -> int:
        """How many places these are in a split of `size` examples."""
        stop = size if self.stop is None else self.stop
        whole, rest = divmod(max(stop - self.start, 0), self.batch)
        return whole * self._run + min(max(rest - self.index * self._run, 0), self._run)

    def numbers(self, size: int) -> tf.data.Dataset:
        """The places in a split of `size` examples, int64, ascending; nothing is skipped."""
        count, run = self.number_of(size), self._run
        if self.count == 1:
            return tf.data.Dataset.range(self.start, self.start + count)
        first = self.start + self.index * run
        return tf.data.Dataset.range(count).map(lambda n: first + n // run * self.batch + n % run)

    def of(self, records: tf.data.Dataset) -> tf.data.Dataset:
        """The records at these places, of a source that can only be read from its start on."""
        if self.start:
            records = records.skip(self.start)
        if self.stop is not None:
            records = records.take(max(self.stop - self.start, 0))
        if self.count == 1:
            return records

        def mine(number, record):
            return number % self.batch // self._run == self.index

        return records.enumerate().filter(mine).map(lambda number, record: record)

    @property
    def _run(self):
        return self.batch // self.count


ALL = Places()


@dataclasses.dataclass(frozen=True)
class Source:
    """A resolved data set.

    Attributes:
        name: as the user wrote it.
        row: splits, statistics and conventions; for a data set that has no row of its own they
            are derived from the splits that it has.
        class_names: label names by class number.
    """

    name: str
    row: Dataset
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_descriptions(self) -> tuple[str, ...] | None:
        """What the class names mean, by class number; None where they speak for themselves."""
        return None

    @property
    def jpegs(self) -> bool:
        """Whether the data set says that its images are JPEGs, see `decoding.opened`."""
        return False

    def fingerprint(self) -> dict:
        """What tells the data set from a changed one, at little cost: JSON values by name.

        Where it is stored is no part of it. Sources add what they know to the names of classes.
        """
        return {"classes": list(self.class_names)}

    def split(self, role: str) -> str:
        """The split that plays a role (`train`, `fit`, `select`, `test`); else the name itself."""
        return getattr(self.row, role) if role in ROLES else role

    def size(self, split: str) -> int:
        """Number of examples in a split or role.

        Raises:
            EtfzooError: no such split.
        """
        raise NotImplementedError

    def by_index(self, split: str) -> bool:
        """Whether records are read by their place, so that those between them cost nothing."""
        return False

    def read(self, split: str, numbers: tf.data.Dataset, images: bool = True) -> tf.data.Dataset:
        """Records at places in file order, int64; of a source that is read by index.

        `split`, `images`: see `records`.
        """
        raise NotImplementedError

    def find(self, split: str, names: list[str]) -> np.ndarray:
        """Places in file order of records by name, int64; of a source that is read by index."""
        raise NotImplementedError

    def records(
        self,
        split: str,
        shuffle_seed: int | None = None,
        images: bool = True,
        places: Places = ALL,
    ) -> tf.data.Dataset:
        """Encoded records of a split or role, in file order or in the order of a seed.

        Args:
            split: split or role.
            shuffle_seed: None is file order.
            images: False leaves the encoded images out where the source is held in memory or read
                by index, which is faster.
            places: which of the records, by their places in that order.
        """
        size = self.size(split)
        numbers = places.numbers(size)
        if shuffle_seed is not None:
            numbers = shuffled(numbers, shuffle_seed, size)
        records = tf.data.Dataset.zip(numbers, self.read(split, numbers, images))
        records = records.map(lambda number, record: record | {"index": number})
        return records.with_options(reading())

    def class_counts(self, split: str) -> np.ndarray:
        """Number of examples of each class in a split or role, int64 `[K]`.

        No image is decoded, but one that is not held in memory is read.

        Raises:
            EtfzooError: no such split, or a file is missing or damaged.
        """
        log.info("counting the classes of the %s split of %s", split, self.name)
        labels = self.records(split, images=False).map(lambda record: record["label"])
        counts = np.zeros(self.num_classes, np.int64)
        with naming_source(self.name):
            for some in labels.batch(4096).as_numpy_iterator():
                counts += np.bincount(some, minlength=self.num_classes)
        return counts


@contextlib.contextmanager
def naming_source(name: str, *, records: bool = True):
    """Turns what TensorFlow raises while a data set is read into one line that names it.

    Args:
        name: of the data set.
        records: whether nothing but records is read, so that a bad argument is one of theirs.

    Raises:
        EtfzooError: a file is missing, locked or damaged, or a record is not as it should be.
    """
    errors = (*_FILE_ERRORS, tf.errors.InvalidArgumentError) if records else _FILE_ERRORS
    try:
        yield
    except errors as error:
        raise EtfzooError(f"data set {name} cannot be read: {first_line(error)}") from error


def ordered(
    columns: Mapping[str, tf.Tensor], shuffle_seed: int | None, places: Places = ALL
) -> tf.data.Dataset:
    """Records from columns in memory, in the given order or in that of a seed, with `index`."""
    order = tf.constant(permutation(len(columns["record"]), shuffle_seed))

    def record(place):
        index = tf.gather(order, place)
        return {"index": index} | {name: tf.gather(c, index) for name, c in columns.items()}

    records = places.numbers(len(order)).map(record, num_parallel_calls=2)
    return records.with_options(reading())


def permutation(count: int, shuffle_seed: int | None) -> np.ndarray:
    """Places in file order of records in memory: as they are, or in the order of a seed."""
    order = np.arange(count)
    return order if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(order)


def shuffled(numbers: tf.data.Dataset, seed: int, size: int) -> tf.data.Dataset:
    """What stands at these places when 0 to `size` - 1 are in the order of a seed, int64.

    The order is a permutation that a block cipher computes, place by place, without a table.
    `tf.random.experimental.index_shuffle` takes 4 rounds of it, which leaves neighbours correlated
    by up to 0.05 (benchmarks/records.py); with 16 no bias was found.
    """
    key = np.random.SeedSequence(seed).generate_state(3)

    def shuffle(places):
        return tf.raw_ops.RandomIndexShuffle(
            index=places,
            seed=tf.constant(key),
            max_index=tf.constant(size - 1, tf.int64),
            rounds=16,
        )

    return numbers.batch(256).map(shuffle).unbatch()


def same_name(record: tf.Tensor) -> tf.Tensor:
    """The name of a record of TFDS, in all formats the one that it has as `tfrecord`.

    What hangs on names (draws, long tails) stays when a data set is converted.
    """
    return tf.strings.regex_replace(record, r"\.array_record(-\d+-of-\d+__\d+)$", r".tfrecord\1")


def reading() -> tf.data.Options:
    """How data sets are read: in order, and with parallelism and buffers as they are set.

    Autotuning is off: with it, letting go of an iterator may block until the tuner wakes up again,
    up to a minute later, at the end of each epoch (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return options

"""What a source of encoded images is.

A source knows its classes and splits, and yields records `{image, label, key, record}`: the
encoded bytes, the class number, a number that identifies the example for ever (the seed of its
augmentation) and its readable name (for error messages); where the source is held in memory also
`index`, its place in file order.
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

    def records(
        self, split: str, shuffle_seed: int | None = None, images: bool = True
    ) -> tf.data.Dataset:
        """Encoded records of a split or role, in file order or in the order of a seed.

        Args:
            split: split or role.
            shuffle_seed: None is file order.
            images: False leaves the encoded images out where the source is held in memory, which
                is faster.
        """
        raise NotImplementedError

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


def ordered(columns: Mapping[str, tf.Tensor], shuffle_seed: int | None) -> tf.data.Dataset:
    """Records from columns in memory, in the given order or in that of a seed, with `index`."""
    order = permutation(len(columns["record"]), shuffle_seed)
    records = tf.data.Dataset.from_tensor_slices(order).map(
        lambda i: {"index": i} | {name: tf.gather(c, i) for name, c in columns.items()},
        num_parallel_calls=2,
    )
    return records.with_options(reading())


def permutation(count: int, shuffle_seed: int | None) -> np.ndarray:
    """Places in file order of records in memory: as they are, or in the order of a seed."""
    order = np.arange(count)
    return order if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(order)


def reading() -> tf.data.Options:
    """How data sets are read: in order, and with parallelism and buffers as they are set.

    Autotuning is off: with it, letting go of an iterator may block until the tuner wakes up again,
    up to a minute later, at the end of each epoch (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return options

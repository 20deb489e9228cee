"""Records of array_record files by their number; the package comes with TFDS on Linux.

Grain is not used: the place in an epoch is (epoch, step) in each checkpoint already, the order is
a permutation without a table (`etfzoo.data.source.shuffled`), and images are decoded by TensorFlow
in this process. What is left is this reader. (`ArrayRecordDataSource.__getitems__` of the package
starts a pool of threads a call, which takes 2 to 4 times the CPU of the reading itself.)
"""

import contextlib
import os
import threading

import numpy as np
import tensorflow as tf

from etfzoo.errors import EtfzooError, first_line

FORMAT = "array_record"
_CHUNK = 16  # records a call of Python
_AHEAD = max(8, os.cpu_count())  # calls at a time: waiting for a disk takes no CPU
_SPARE = 256  # open files beside the shards


class Shards:
    """The records of a split, numbered in file order.

    Files are opened when one of their records is first read, and stay open.

    Args:
        name: of the data set.
        files: file instructions of TFDS: `filename`, and which of its records (`skip`, `take`).
        lengths: number of records of each whole file by its name.

    Raises:
        EtfzooError: the package is missing.
    """

    def __init__(self, name: str, files, lengths: dict[str, int]):
        self._module = _package()
        self._name = name
        self._paths = [os.fspath(f.filename) for f in files]
        self._lengths = [lengths[os.path.basename(path)] for path in self._paths]
        self._skips = np.array([f.skip for f in files], np.int64)
        self._ends = np.cumsum([f.take for f in files], dtype=np.int64)
        self._readers: list = [None] * len(files)
        self._lock = threading.Lock()
        # Traced once: TensorFlow keeps the Python function of each trace for ever.
        self._examples = tf.function(
            self._examples_at, input_signature=[tf.TensorSpec([None], tf.int64)]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, numbers: tf.data.Dataset) -> tf.data.Dataset:
        """`{example, record}` (serialized example, name) by number, in the order of the numbers."""
        return numbers.batch(_CHUNK).map(self._examples, _AHEAD, deterministic=True).unbatch()

    def names(self, numbers: tf.Tensor) -> tf.Tensor:
        """Names of records `[N]`, as TFDS calls them: `file__position`."""
        return self._names(*self._places(numbers))

    def find(self, names) -> np.ndarray:
        """Numbers of the records of these names.

        Raises:
            EtfzooError: there is no such record.
        """
        found = np.zeros(len(names), np.int64)
        files = [os.path.basename(path) for path in self._paths]
        starts = np.concatenate([[0], self._ends[:-1]])
        for i, name in enumerate(names):
            file, _, position = name.rpartition("__")
            within = (
                start + int(position) - skip
                for other, start, end, skip in zip(
                    files, starts, self._ends, self._skips, strict=True
                )
                if other == file and 0 <= int(position) - skip < end - start
            )
            found[i] = next(within, -1)
            if found[i] < 0:
                raise EtfzooError(f"data set {self._name} has no record {name!r}")
        return found

    def _places(self, numbers):
        """File and position in it of each number."""
        ends = tf.constant(self._ends)
        file = tf.searchsorted(ends, numbers, side="right")
        starts = tf.constant(np.concatenate([[0], self._ends[:-1]]) - self._skips)
        return file, numbers - tf.gather(starts, file)

    def _names(self, file, position):
        files = tf.constant([os.path.basename(path) for path in self._paths])
        return tf.strings.join([tf.gather(files, file), tf.strings.as_string(position)], "__")

    def _examples_at(self, numbers):
        file, position = self._places(numbers)
        examples = tf.numpy_function(self._bytes, [file, position], tf.string)
        return {
            "example": tf.ensure_shape(examples, [None]),
            "record": self._names(file, position),
        }

    def _bytes(self, files, positions):
        places = zip(files.tolist(), positions.tolist(), strict=True)
        try:
            return np.array([self.record(*place) for place in places], object)
        except EtfzooError as error:
            # To TensorFlow any ValueError is a bad argument, as an image that is none.
            raise RuntimeError(str(error)) from error

    def record(self, file: int, position: int) -> bytes:
        """The record at a position of a file.

        Raises:
            EtfzooError: the file is missing, damaged, or of another number of records than told.
        """
        reader = self._readers[file] or self._open(file)
        try:
            return reader.read([position])[0]
        except RuntimeError as error:
            raise EtfzooError(
                f"{self._paths[file]} is damaged at record {position}: {first_line(error)}"
            ) from error

    def _open(self, file):
        path, length = self._paths[file], self._lengths[file]
        with self._lock:
            if self._readers[file] is None:
                _allow_open_files(len(self._paths) + _SPARE)
                self._readers[file] = open_file(path, length, self._module)
            return self._readers[file]


def open_file(path: str, length: int, module=None):
    """A reader of a file, for records in any order.

    Args:
        path: of the file.
        length: records that it must have.
        module: of the package; None imports it.

    Raises:
        EtfzooError: it cannot be read, or has another number of records.
    """
    module = module or _package()
    try:
        reader = module.ArrayRecordReader(
            path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15
        )
        if not reader.ok():  # it would have no records, or empty ones
            reader.close()  # raises why
    except RuntimeError as error:
        why = first_line(error) if str(error) else "it was cut, or is something else"
        raise EtfzooError(f"{path} is damaged: {why}") from error
    found = reader.num_records()
    if found != length:
        raise EtfzooError(
            f"{path} has {found} records, and dataset_info.json tells of {length}: prepare it again"
        )
    return reader


def _package():
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise EtfzooError(
            f"{FORMAT} files need the package array_record, which there is for Linux: "
            "pip install array_record; or prepare the data set as tfrecord"
        ) from error
    return array_record_module


def _allow_open_files(number):
    """Raises this process's limit of open files, as far as it may be."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < number and soft != resource.RLIM_INFINITY:
            most = number if hard == resource.RLIM_INFINITY else min(number, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

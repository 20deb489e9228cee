"""Records of a data set that tensorflow_datasets (TFDS) has prepared."""

import contextlib
import dataclasses
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import tensorflow as tf

from etfzoo.data.array_record import FORMAT, Shards
from etfzoo.data.source import ALL, KEYS, Source, naming_source, ordered, reading, same_name
from etfzoo.errors import EtfzooError, first_line

# Splits up to this size are kept in memory, encoded; of larger ones as much is shuffled at a time.
MEMORY_BYTES = 1 << 30
# A file beside the records of a TFDS data set: its lines end with a class name, a tab, its meaning.
WORDS = "words.txt"


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A prepared data set of TFDS.

    As tfrecord it is read from its start on: a small split into memory, a larger one as a stream
    that is shuffled through a buffer. As array_record it is read by index.

    Attributes:
        builder: of TFDS.
        image_key, label_key: names of the features.
        memory: what is held of each split.
    """

    builder: Any
    image_key: str
    label_key: str
    memory: dict = dataclasses.field(default_factory=dict)

    @property
    def class_descriptions(self):
        try:
            text = Path(self.builder.data_dir, WORDS).read_text("utf-8")
        except (OSError, ValueError):
            return None
        words = dict(line.split("\t")[-2:] for line in text.splitlines() if "\t" in line)
        found = tuple(words.get(name) for name in self.class_names)
        return None if None in found else found

    @property
    def jpegs(self):
        return self.builder.info.features[self.image_key].encoding_format == "jpeg"

    def fingerprint(self):
        info = self.builder.info
        splits = {
            f"split {name}": {
                "images": split.num_examples,
                "bytes": split.num_bytes,
                "files": hashlib.sha256(repr(tuple(split.shard_lengths)).encode()).hexdigest(),
            }
            for name, split in sorted(info.splits.items())
        }
        # Its order is another one than that of the same data set as tfrecord.
        format_ = {"format": FORMAT} if self._indexed else {}
        return super().fingerprint() | {"name": info.full_name} | format_ | splits

    def size(self, split):
        return self._info(split).num_examples

    def _info(self, split):
        split = self.split(split)
        try:
            info = self.builder.info.splits[split]
        except (KeyError, ValueError, AssertionError) as error:
            known = ", ".join(self.builder.info.splits)
            raise EtfzooError(
                f"data set {self.name} has no split {split!r}; it has: {known}"
            ) from error
        if info.num_examples <= 0:
            raise EtfzooError(f"split {split!r} of data set {self.name} is empty")
        return info

    @property
    def _indexed(self):
        return self.builder.info.file_format.value == FORMAT

    def by_index(self, split):
        return self._indexed

    def find(self, split, names):
        return self._shards(split).find(names)

    def read(self, split, numbers, images=True):
        shards = self._shards(split)
        if not images:
            labels = self._labels(split)

            def known(number):
                return tf.gather(labels, number), shards.names(number[None])[0]

            return numbers.map(lambda n: self._record(*known(n)))

        def record(read):
            example = self._example(read["example"])
            return self._record(example[self.label_key], read["record"]) | {
                "image": example[self.image_key]
            }

        return shards.read(numbers).map(record, num_parallel_calls=2)

    def _shards(self, split):
        if ("shards", split) not in self.memory:
            self.check_files(split)
            known = self.builder.info.splits.values()
            lengths = {
                os.path.basename(path): length
                for info in known
                for path, length in zip(info.filepaths, info.shard_lengths, strict=True)
            }
            files = self._info(split).file_instructions
            self.memory["shards", split] = Shards(self.name, files, lengths)
        return self.memory["shards", split]

    def _labels(self, split):
        """The labels of a split in file order; all records are read, once."""
        if ("labels", split) not in self.memory:
            numbers = tf.data.Dataset.range(self.size(split)).with_options(reading())
            with naming_source(self.name):
                labels = [b["label"] for b in self.read(split, numbers).batch(4096)]
            self.memory["labels", split] = tf.concat(labels, axis=0)
        return self.memory["labels", split]

    def _example(self, serialized):
        import tensorflow_datasets as tfds

        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        return self.builder.info.features.deserialize_example(serialized, decoders=decoders)

    def records(self, split, shuffle_seed=None, images=True, places=ALL):
        if self._indexed:
            return super().records(split, shuffle_seed, images, places)
        if self._bytes(split) > MEMORY_BYTES:
            return places.of(self._stream(split, shuffle_seed))
        if split not in self.memory:
            with naming_source(self.name), _naming_damaged(self._files(split)):
                self.memory[split] = _in_memory(self._stream(split, None))
        columns = self.memory[split]
        if not images:
            columns = {name: column for name, column in columns.items() if name != "image"}
        return ordered(columns, shuffle_seed, places)

    def _stream(self, split, shuffle_seed):
        import tensorflow_datasets as tfds

        info = self._info(split)
        shuffle = shuffle_seed is not None
        dataset = self.builder.as_dataset(
            split=self.split(split),
            shuffle_files=shuffle,
            decoders={self.image_key: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(
                options=reading(),
                shuffle_seed=shuffle_seed,
                # One file after the other is what makes file order an order.
                interleave_cycle_length=16 if shuffle else 1,
                try_autocache=False,
                add_tfds_id=True,
                skip_prefetch=True,
            ),
        )

        def record(example):
            image = {"image": example[self.image_key]}
            return image | self._record(example[self.label_key], example["tfds_id"])

        dataset = dataset.map(record, num_parallel_calls=2)
        if shuffle:
            per_example = max(self._bytes(split) / max(info.num_examples, 1), 1)
            buffer = max(1, min(info.num_examples, int(MEMORY_BYTES / per_example)))
            dataset = dataset.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)
        return dataset

    def _record(self, label, name):
        """What is known of a record without its image."""
        label = tf.cast(label, tf.int32)
        known = (label >= 0) & (label < self.num_classes)
        message = f"the labels are 0 to {self.num_classes - 1}; of record", name, "it is", label
        with tf.control_dependencies([tf.debugging.Assert(known, message)]):
            label = tf.identity(label)
        key = tf.strings.to_hash_bucket_fast(same_name(name), KEYS)
        return {"label": label, "key": key, "record": name}

    def _files(self, split):
        info = self._info(split)
        try:
            return sorted(set(info.filepaths))
        except ValueError as error:
            raise EtfzooError(
                f"dataset_info.json of data set {self.name} does not tell the names of its files: "
                f"{first_line(error)}"
            ) from error

    def check_files(self, split: str) -> None:
        """Raises EtfzooError where a file of a split is missing, or outside of the folder."""
        self._bytes(split)

    def _bytes(self, split):
        """Bytes of the files that a split is read from.

        Raises:
            EtfzooError: one is missing, no regular file, or outside of the data set's folder.
        """
        folder = self.builder.data_dir
        return sum(file_size(path, folder, self.name) for path in self._files(split))


def file_size(path, folder, name) -> int:
    """Bytes of a file of a data set.

    Raises:
        EtfzooError: it is missing, no regular file, or outside of the data set's folder.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise EtfzooError(f"{path} of data set {name}: {error.strerror or error}") from error
    folder = os.path.realpath(folder)
    inside = os.path.commonpath([folder, os.path.realpath(path)]) == folder
    if not stat.S_ISREG(found.st_mode) or not inside:
        raise EtfzooError(f"{path} of data set {name} is no file in the folder of the data set")
    return found.st_size


@contextlib.contextmanager
def _naming_damaged(paths):
    """Names the file in which TensorFlow finds a damaged record."""
    try:
        yield
    except tf.errors.DataLossError as error:
        for path in paths:
            try:
                for _ in tf.data.TFRecordDataset(os.fspath(path)):
                    pass
            except tf.errors.DataLossError:
                raise EtfzooError(f"{path} is damaged: {first_line(error)}") from error
        raise


def _in_memory(records: tf.data.Dataset) -> dict:
    batches = list(records.batch(4096))
    return {k: tf.concat([b[k] for b in batches], axis=0) for k in batches[0]}

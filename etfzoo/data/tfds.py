"""Data sets of tensorflow_datasets (TFDS) as sources; TFDS is imported when one is opened."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import stat
from pathlib import Path

import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.data.datasets import DATASETS, EMBEDDED, WORDS, Dataset
from etfzoo.data.source import KEYS, Source, naming_source, ordered, reading
from etfzoo.errors import EtfzooError, first_line, unknown

log = logging.getLogger("etfzoo")

# Splits up to this size are kept in memory, encoded; of larger ones as much is shuffled at a time.
MEMORY_BYTES = 1 << 30
# Names are made of what a file says is their number.
_MOST_CLASSES = 10**6


def open_tfds(name: str, data_dir: str | None = None, prepare: bool = True) -> Source:
    """The source of a TFDS name or prepared folder, see `etfzoo.data.sources.resolve`."""
    # Importing TFDS costs a second; folders do without.
    import tensorflow_datasets as tfds

    if data_dir is not None and not os.path.isdir(data_dir):
        raise EtfzooError(f"data directory {data_dir} does not exist; check `data_dir`")
    if ":" in name and not re.fullmatch(r"[\w/]+:[\d.*]+", name):
        raise EtfzooError(
            f"{name!r} is no data set: before a colon stands a name of TFDS, behind it a version; "
            "what TFDS calls namespaces would run the code of others"
        )
    row = DATASETS.get(name)
    _check_documents(_prepared_folder(_place(row.tfds if row else name, data_dir)), name)
    with _own_features_alone(tfds):
        if name in EMBEDDED and prepare:
            from etfzoo.data import shapes

            shapes.prepare(data_dir, [name])
        if name == "tiny_imagenet":
            from etfzoo.data import tiny_imagenet  # noqa: F401 - TFDS knows it from here on
        builder = _tfds_builder(tfds, name, row, data_dir, prepare)
    image_key, label_key = _feature_keys(tfds, name, builder)
    label = builder.info.features[label_key]
    if not 0 < (label.num_classes or 0) <= _MOST_CLASSES:
        raise EtfzooError(
            f"data set {name} says in features.json that it has {label.num_classes} classes"
        )
    names = tuple(label.names) if label.num_classes == len(label.names or ()) else ()
    if not names:
        names = tuple(str(i) for i in range(label.num_classes))
    return _TfdsSource(
        name=name,
        row=row or _derived_row(name, builder),
        class_names=names,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
    )


@dataclasses.dataclass(frozen=True)
class _TfdsSource(Source):
    builder: object
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
        return super().fingerprint() | {"name": info.full_name} | splits

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

    def records(self, split, shuffle_seed=None, images=True):
        if self._bytes(split) > MEMORY_BYTES:
            return self._stream(split, shuffle_seed)
        if split not in self.memory:
            with naming_source(self.name), _naming_damaged(self._files(split)):
                self.memory[split] = _in_memory(self._stream(split, None))
        columns = self.memory[split]
        if not images:
            columns = {name: column for name, column in columns.items() if name != "image"}
        return ordered(columns, shuffle_seed)

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
            label, name = tf.cast(example[self.label_key], tf.int32), example["tfds_id"]
            known = (label >= 0) & (label < self.num_classes)
            message = f"the labels are 0 to {self.num_classes - 1}; of record", name, "it is", label
            with tf.control_dependencies([tf.debugging.Assert(known, message)]):
                label = tf.identity(label)
            return {
                "image": example[self.image_key],
                "label": label,
                "key": tf.strings.to_hash_bucket_fast(name, KEYS),
                "record": name,
            }

        dataset = dataset.map(record, num_parallel_calls=2)
        if shuffle:
            per_example = max(self._bytes(split) / max(info.num_examples, 1), 1)
            buffer = max(1, min(info.num_examples, int(MEMORY_BYTES / per_example)))
            dataset = dataset.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)
        return dataset

    def _files(self, split):
        info = self._info(split)
        try:
            return sorted(set(info.filepaths))
        except ValueError as error:
            raise EtfzooError(
                f"dataset_info.json of data set {self.name} does not tell the names of its files: "
                f"{first_line(error)}"
            ) from error

    def _bytes(self, split):
        """Bytes of the files that a split is read from.

        Raises:
            EtfzooError: one is missing, no regular file, or outside of the data set's folder.
        """
        folder = self.builder.data_dir
        return sum(_size(path, folder, self.name) for path in self._files(split))


def _size(path, folder, name) -> int:
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


def _tfds_builder(tfds, name, row, data_dir, prepare):
    folder = None if row else _prepared_folder(_place(name, data_dir))
    if folder is not None:
        try:
            return tfds.builder_from_directory(str(folder))
        except Exception as error:  # TFDS raises whatever its parsers raise
            raise EtfzooError(
                f"{folder} is no prepared TFDS data set that can be read: {first_line(error)}"
            ) from error
    try:
        builder = tfds.builder(row.tfds if row else name, data_dir=data_dir)
    except Exception as error:  # as above
        if row is None:
            known = set(DATASETS) | _folder_names(data_dir)
            raise unknown("data set", name, known) from error
        raise EtfzooError(f"data set {name} cannot be opened: {first_line(error)}") from error
    if builder.info.splits:
        return builder
    where = f"under {builder.data_dir}"
    if row is not None and row.manual:
        raise EtfzooError(f"data set {name} is not prepared {where}. {row.manual}")
    if not prepare:
        raise EtfzooError(f"data set {name} is not prepared {where}")
    log.info("downloading and preparing %s %s", name, where)
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises whatever its download library raises
        raise EtfzooError(
            f"data set {name} is not prepared {where} and could not be downloaded: "
            f"{first_line(error)}; connect to the internet or pass `data_dir`"
        ) from error
    return builder


def _place(name, data_dir) -> Path:
    """Where the versions of a data set are, or a prepared folder itself.

    Below the data directory; a path from the current folder where there is nothing.
    """
    bare = name.partition(":")[0]
    below, here = files.expand(os.path.join(data_dir or ".", bare)), files.expand(bare)
    return here if "/" in bare and not below.exists() and _prepared_folder(here) else below


def _check_documents(folder, name):
    """Raises EtfzooError where TFDS would read a file elsewhere, or wait for a FIFO for ever."""
    for path in (*folder.glob("*.json"), *folder.glob("*.txt")) if folder else ():
        if not path.is_dir():
            _size(path, folder, name)


@contextlib.contextmanager
def _own_features_alone(tfds):
    """Lets TFDS make its own features and no others.

    It imports the module of any class that features.json names, and so runs its code.
    """
    own = {
        f"{c.__module__}.{c.__qualname__}": c
        for c in (getattr(tfds.features, name) for name in tfds.features.__all__)
        if isinstance(c, type)
    }
    connector = tfds.features.FeatureConnector
    imported = connector.__dict__["cls_from_name"]

    def known(cls, name):
        if name not in own:
            raise EtfzooError(f"features.json names {name[:100]!r}, which is no feature of TFDS")
        return own[name]

    connector.cls_from_name = classmethod(known)
    try:
        yield
    finally:
        connector.cls_from_name = imported


def _prepared_folder(path: Path) -> Path | None:
    """The folder with `dataset_info.json`: the path itself or its last version."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = [p.parent for p in path.glob("*.*.*/dataset_info.json")]
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], default=None)


def _folder_names(data_dir):
    if data_dir is None:
        return set()
    return {p.name for p in Path(data_dir).iterdir() if _prepared_folder(p)}


def _feature_keys(tfds, name, builder):
    features = builder.info.features
    images = [
        k
        for k, f in features.items()
        if isinstance(f, tfds.features.Image) and np.dtype(f.np_dtype).name in ("uint8", "uint16")
    ]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for keys, kind, usual in ((images, "image", "image"), (labels, "class label", "label")):
        if not keys:
            raise EtfzooError(
                f"data set {name} has no {kind} feature: it is not for image classification"
            )
        keys.sort(key=lambda k, usual=usual: k != usual)
    return images[0], labels[0]


def _derived_row(name, builder) -> Dataset:
    """Roles for a data set without a row, from the splits that it has."""
    splits = set(builder.info.splits)
    if "train" not in splits:
        raise EtfzooError(f"data set {name} has no train split; it has: {', '.join(splits)}")
    roles: dict = {}
    if {"validation", "test"} <= splits:
        roles = {"fit": "train", "select": "validation", "test": "test"}
    elif "validation" in splits:
        roles = {"test": "validation"}
    elif "test" not in splits:
        roles = {"train": "train[:80%]", "fit": "train[:70%]", "select": "train[70%:80%]"}
        roles["test"] = "train[80%:]"
    if any("[" in s for s in roles.values()) or "fit" not in roles:
        if builder.info.disable_shuffling:
            raise EtfzooError(
                f"data set {name} was written without shuffling, so a slice of its train split is "
                "no fair held-out set; prepare it with shuffling or with a validation split"
            )
    return Dataset(builder.info.full_name, 0, **roles)

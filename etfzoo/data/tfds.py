"""Data sets of tensorflow_datasets (TFDS) as sources; TFDS is imported when one is opened."""

import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path

import tensorflow as tf

from etfzoo.data.datasets import DATASETS, EMBEDDED, Dataset
from etfzoo.data.source import KEYS, Source, ordered, reading
from etfzoo.errors import EtfzooError, unknown

log = logging.getLogger("etfzoo")

# Splits up to this size are kept in memory, encoded; of larger ones as much is shuffled at a time.
MEMORY_BYTES = 1 << 30
# A file beside the records of a TFDS data set: its lines end with a class name, a tab, its meaning.
WORDS = "words.txt"


def open_tfds(name: str, data_dir: str | None = None, prepare: bool = True) -> Source:
    """The source of a TFDS name or prepared folder, see `etfzoo.data.sources.resolve`."""
    # Importing TFDS costs a second; folders do without.
    import tensorflow_datasets as tfds

    if data_dir is not None and not os.path.isdir(data_dir):
        raise EtfzooError(f"data directory {data_dir} does not exist; check `data_dir`")
    row = DATASETS.get(name)
    if name in EMBEDDED and prepare:
        from etfzoo.data import shapes

        shapes.prepare(data_dir, [name])
    if name == "tiny_imagenet":
        from etfzoo.data import tiny_imagenet  # noqa: F401 - TFDS knows it from here on
    builder = _tfds_builder(tfds, name, row, data_dir, prepare)
    image_key, label_key = _feature_keys(tfds, name, builder)
    label = builder.info.features[label_key]
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
        if info.num_examples == 0:
            raise EtfzooError(f"split {split!r} of data set {self.name} is empty")
        return info

    def records(self, split, shuffle_seed=None):
        if self._bytes(split) > MEMORY_BYTES:
            return self._stream(split, shuffle_seed)
        if split not in self.memory:
            self.memory[split] = _in_memory(self._stream(split, None))
        return ordered(self.memory[split], shuffle_seed)

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
            return {
                "image": example[self.image_key],
                "label": tf.cast(example[self.label_key], tf.int32),
                "key": tf.strings.to_hash_bucket_fast(example["tfds_id"], KEYS),
                "record": example["tfds_id"],
            }

        dataset = dataset.map(record, num_parallel_calls=2)
        if shuffle:
            per_example = max(self._bytes(split) / max(info.num_examples, 1), 1)
            buffer = max(1, min(info.num_examples, int(MEMORY_BYTES / per_example)))
            dataset = dataset.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)
        return dataset

    def _bytes(self, split):
        names = [n for n in self.builder.info.splits if n in self.split(split)]
        return sum(self.builder.info.splits[n].num_bytes for n in names)


def _in_memory(records: tf.data.Dataset) -> dict:
    batches = list(records.batch(4096))
    return {k: tf.concat([b[k] for b in batches], axis=0) for k in batches[0]}


def _tfds_builder(tfds, name, row, data_dir, prepare):
    folder = None if row else _prepared_folder(Path(data_dir or ".") / name)
    try:
        if folder is not None:
            return tfds.builder_from_directory(str(folder))
        builder = tfds.builder(row.tfds if row else name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        if row is None:
            known = set(DATASETS) | _folder_names(data_dir)
            raise unknown("data set", name, known) from error
        raise EtfzooError(f"data set {name} cannot be opened: {_first_line(error)}") from error
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
            f"{_first_line(error)}; connect to the internet or pass `data_dir`"
        ) from error
    return builder


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


def _first_line(error) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _feature_keys(tfds, name, builder):
    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
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

"""Image data sets of Hugging Face, through the package `datasets`, as sources read by index.

Arrow files are mapped into memory, so that a record is read by its number and a worker reads its
own ones only. Nothing is decoded here, and `datasets` runs no code that comes with a data set.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.data.datasets import Dataset
from etfzoo.data.file_source import SPLITS, complete_splits
from etfzoo.data.source import KEYS, Source
from etfzoo.errors import EtfzooError, extra, first_line

_CHUNK, _AHEAD = 16, max(8, os.cpu_count() or 1)  # records a call of Python, calls at a time


@dataclasses.dataclass(frozen=True)
class HuggingFaceSource(Source):
    """The splits of a data set, numbered one after the other.

    Attributes:
        splits: number of records of each split as it is stored, by name, in their order.
        images: of each split an Arrow column of `{bytes, path}`.
        labels: class numbers of all records, int32.
        parts: numbers of the records of each split and role, int64.
    """

    splits: Mapping[str, int]
    images: tuple
    labels: np.ndarray
    parts: Mapping[str, np.ndarray]

    def _numbers(self, split):
        if split == "all":
            return np.arange(len(self.labels))
        parts = self.split(split).split("+")
        for part in parts:
            if part not in self.parts:
                raise EtfzooError(
                    f"{self.name} has no split {part!r}; it has: {', '.join(self.parts)}, and all "
                    "or several with + between them"
                )
        found = np.concatenate([self.parts[part] for part in parts])
        _, first = np.unique(found, return_index=True)
        return found[np.sort(first)]

    def fingerprint(self):
        found = super().fingerprint()
        sizes = np.concatenate([_sizes(column) for column in self.images])
        for split in ("train", "test"):
            numbers = self.parts[split]
            digest = hashlib.sha256(np.stack([self.labels, sizes], 1)[numbers].tobytes())
            found[f"split {split}"] = {
                "images": len(numbers),
                "labels and sizes": digest.hexdigest(),
            }
        return found

    def size(self, split):
        return len(self._numbers(split))

    def class_counts(self, split):
        return np.bincount(self.labels[self._numbers(split)], minlength=self.num_classes)

    def by_index(self, split):
        return True

    def read(self, split, numbers, images=True):
        of_split = tf.constant(self._numbers(split))
        labels = tf.constant(self.labels)
        ends = np.cumsum(list(self.splits.values()))
        starts = tf.constant(ends - list(self.splits.values()))
        names = tf.constant(list(self.splits))

        def records(numbers):
            numbers = tf.gather(of_split, numbers)
            part = tf.searchsorted(tf.constant(ends), numbers, side="right")
            row = numbers - tf.gather(starts, part)
            name = tf.strings.join([tf.gather(names, part), tf.strings.as_string(row)], "__")
            found = {"record": name, "label": tf.gather(labels, numbers)}
            found["key"] = tf.strings.to_hash_bucket_fast(name, KEYS)
            if images:
                image = tf.numpy_function(self._bytes, [part, row], tf.string)
                found["image"] = tf.ensure_shape(image, [None])
            return found

        return numbers.batch(_CHUNK).map(records, _AHEAD, deterministic=True).unbatch()

    def find(self, split, names):
        place = {number: place for place, number in enumerate(self._numbers(split).tolist())}
        starts = dict(
            zip(self.splits, np.cumsum([0, *self.splits.values()]).tolist(), strict=False)
        )
        found = []
        for name in names:
            part, _, row = name.rpartition("__")
            number = starts[part] + int(row) if part in starts and row.isdecimal() else -1
            if number not in place:
                raise EtfzooError(f"data set {self.name} has no record {name!r}")
            found.append(place[number])
        return np.array(found, np.int64)

    def _bytes(self, parts, rows):
        return np.array(
            [self._image(p, r) for p, r in zip(parts.tolist(), rows.tolist(), strict=True)], object
        )

    def _image(self, part, row):
        image = self.images[part][row].as_py() or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            return b""  # which is no image, and is said to be none
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            # To TensorFlow any ValueError is a bad argument, as an image that is none.
            raise RuntimeError(first_line(error)) from error


def open_hugging_face(name: str) -> Source:
    """The source of `hf:NAME[:CONFIG][@REVISION]`, of a data set on the hub, or of `hf:PATH`.

    A path is a folder that `save_to_disk` wrote, or one that `datasets.load_dataset` reads, as
    one of parquet files. The image is the column `image` or the first of that kind, the label the
    column `label` or the first ClassLabel; labels that are text or whole numbers will do. A test
    split that is missing is the validation split or a fifth of each class, a split to select on
    that is missing a tenth of each class of the training split, drawn once for ever.

    Raises:
        EtfzooError: `datasets` is missing, no such data set, no images or labels in it, examples
            without a label, or classes without a training image.
    """
    tables = {split: table for split, table in _load(name).items() if len(table)}
    train = next((split for split in SPLITS["train"] if split in tables), None)
    if train is None:
        raise EtfzooError(f"data set {name} has no train split; it has: {', '.join(tables)}")
    image, label = _columns(name, tables[train].features)
    arrow = {split: table.with_format("arrow")[:] for split, table in tables.items()}
    for split, table in arrow.items():
        if not {image, label} <= set(table.column_names):
            raise EtfzooError(f"the {split} split of {name} lacks the column {image} or {label}")
    names, labels = _labels(
        name, tables[train].features[label], {s: t.column(label) for s, t in arrow.items()}
    )
    splits = {split: len(table) for split, table in arrow.items()}
    numbers = np.concatenate(list(labels.values()))
    return HuggingFaceSource(
        name=name,
        row=Dataset("", len(names), train="train", fit="fit", select="select", test="test"),
        class_names=names,
        splits=splits,
        images=tuple(table.column(image) for table in arrow.values()),
        labels=numbers,
        parts=_parts(name, splits, numbers, len(names)),
    )


def _load(name):
    handle = name.removeprefix("hf:")
    if not handle:
        raise EtfzooError("hf: stands before a data set: write hf:NAME or hf:PATH")
    path = files.expand(handle)
    with extra("hf"):
        import datasets
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.exists():
            found = datasets.load_dataset(str(path))
        else:
            handle, _, revision = handle.partition("@")
            repo, _, config = handle.partition(":")
            found = datasets.load_dataset(repo, config or None, revision=revision or None)
    except Exception as error:  # `datasets` raises whatever its readers and its client raise
        raise EtfzooError(f"data set {name} cannot be opened: {first_line(error)}") from error
    return found if isinstance(found, dict) else {"train": found}


def _columns(name, features):
    """The columns of images and labels."""
    import datasets

    images = [key for key, f in features.items() if isinstance(f, datasets.Image)]
    labels = [key for key, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if "label" in features and isinstance(features["label"], datasets.Value):
        labels.append("label")
    for keys, kind in ((images, "image"), (labels, "label")):
        if not keys:
            raise EtfzooError(
                f"data set {name} has no column of {kind}s: it is not for image classification; "
                f"its columns: {', '.join(features)}"
            )
    return tuple(
        usual if usual in keys else keys[0]
        for keys, usual in ((images, "image"), (labels, "label"))
    )


def _labels(name, feature, columns):
    """Names of the classes, and class numbers by split."""
    found = {split: np.asarray(column.to_numpy()) for split, column in columns.items()}
    names = getattr(feature, "names", None)
    if names is None:  # text or numbers
        values = np.unique(found["train"] if "train" in found else next(iter(found.values())))
        if values.dtype.kind not in "iuOSU" or any(value is None for value in values):
            raise EtfzooError(f"the labels of data set {name} are neither text nor whole numbers")
        names = [str(value) for value in values]
        strange = {str(v) for f in found.values() for v in np.unique(f)} - set(names)
        if strange:
            raise EtfzooError(
                f"data set {name} has labels that its training split lacks: "
                f"{', '.join(sorted(strange)[:3])}"
            )
        found = {split: np.searchsorted(values, f) for split, f in found.items()}
    for split, numbers in found.items():
        known = numbers.dtype.kind in "iu" and ((numbers >= 0) & (numbers < len(names))).all()
        if not known:
            raise EtfzooError(
                f"the {split} split of data set {name} has examples without a label: leave it out"
            )
    return tuple(names), {split: numbers.astype(np.int32) for split, numbers in found.items()}


def _parts(name, splits, labels, num_classes):
    """Numbers of the records of each split and role."""
    ends = np.cumsum(list(splits.values()))
    parts = {
        split: np.arange(end - splits[split], end, dtype=np.int64)
        for split, end in zip(splits, ends.tolist(), strict=True)
    }
    spelled = {
        role: parts[split] for role, names in SPLITS.items() for split in names if split in parts
    }
    parts |= complete_splits(spelled, lambda numbers, share: _hold_out(numbers, labels, share))
    counts = np.bincount(labels[parts["train"]], minlength=num_classes)
    if num_classes < 2 or not counts.all():
        raise EtfzooError(
            f"data set {name} needs at least two classes, each with training images; of its "
            f"{num_classes}, {int((counts == 0).sum())} have none"
        )
    return parts


def _hold_out(numbers, labels, share):
    """Numbers that stay and that are held out, a share of each class that leaves one at least."""
    labels = labels[numbers]
    order = np.lexsort((np.random.RandomState(0).permutation(len(labels)), labels))
    counts = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    most = np.maximum(1, np.round(share * counts).astype(int))
    held = rank < np.minimum(most, counts - 1)[labels]
    return numbers[~held], numbers[held]


def _sizes(column) -> np.ndarray:
    """Bytes of each image, int32; -1 of one that is missing."""
    import pyarrow.compute as compute

    sizes = compute.fill_null(compute.binary_length(compute.struct_field(column, "bytes")), -1)
    sizes = np.array(sizes.to_numpy(), np.int32)
    for row in np.flatnonzero(sizes < 0):
        with contextlib.suppress(OSError, TypeError):
            sizes[row] = os.path.getsize(column[int(row)]["path"].as_py())
    return sizes

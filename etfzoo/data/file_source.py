"""Images in files of their own, of which it is known which class each has."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from etfzoo.data.datasets import Dataset
from etfzoo.data.source import ALL, KEYS, Source, ordered
from etfzoo.errors import EtfzooError

# How users spell the splits.
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """Images in files below a folder.

    Attributes:
        root: the folder.
        files: `(path below the folder, class number)` of the images, by split.
    """

    root: Path
    files: Mapping[str, tuple[tuple[str, int], ...]]

    def _files(self, split):
        parts = list(self.files) if split == "all" else split.split("+")
        for part in parts:
            if part not in self.files:
                raise EtfzooError(
                    f"{self.name} has no split {part!r}; it has: {', '.join(self.files)}, and all "
                    "or several with + between them"
                )
        return tuple(dict.fromkeys(item for part in parts for item in self.files[part]))

    def fingerprint(self):
        found = super().fingerprint()
        for split in ("train", "test"):
            digest = hashlib.sha256()
            for path, label in self.files[split]:
                size = os.stat(self.root / path).st_size
                digest.update(f"{path}\0{label} {size}\n".encode("utf-8", "surrogateescape"))
            found[f"split {split}"] = {
                "images": len(self.files[split]),
                "names and sizes": digest.hexdigest(),
            }
        return found

    def size(self, split):
        return len(self._files(split))

    def records(self, split, shuffle_seed=None, images=True, places=ALL):
        items = self._files(split)
        columns = {
            "record": tf.constant([os.fsencode(path) for path, _ in items]),
            "label": tf.constant([label for _, label in items], tf.int32),
        }
        columns["key"] = tf.strings.to_hash_bucket_fast(columns["record"], KEYS)
        records = ordered(columns, shuffle_seed, places)
        if not images:
            return records
        root = os.fsencode(self.root) + os.sep.encode()
        return records.map(
            lambda r: r | {"image": tf.io.read_file(tf.strings.join([root, r["record"]]))},
            num_parallel_calls=2,
        )


def file_source(
    name: str,
    where: Path,
    root: Path,
    classes: Mapping[str, Sequence[str]],
    found: Mapping[str, Sequence[tuple[str, str]]],
    kind: str,
    expected: str,
    left_out: str = "",
) -> FileSource:
    """A source of the images that were found; splits that are missing are held out of the others.

    Args:
        name: of the data set, as the user wrote it.
        where: what tells of the images, for messages.
        root: the folder that paths start in.
        classes: class names by split, `train` and maybe `val` and `test`; the order of those of
            `train` is that of the class numbers.
        found: `(path, class name)` of the images in file order, by split.
        kind: what a class is there, in the plural.
        expected: what was expected where there are no images.
        left_out: what was not read, as the end of a message.

    Raises:
        EtfzooError: no images, fewer than two classes, some without images to train on, or nothing
            to test on.
    """
    numbers = {label: number for number, label in enumerate(classes["train"])}
    for split, names in classes.items():
        strange = set(names) - set(numbers)
        if strange:
            raise EtfzooError(
                f"the {split} split of {where} has {kind} that the training split lacks: "
                f"{some(sorted(strange))}"
            )
    for label in numbers:
        if os.fsencode(label).decode("utf-8", "replace") != label:
            raise EtfzooError(f"the name of class {label} of {where} is not UTF-8: rename it")
    for split, items in found.items():
        if not items:
            raise EtfzooError(f"no images in {where} ({split}): expected {expected}{left_out}")
    present = {label for _, label in found["train"]}
    empty = [label for label in numbers if label not in present]
    if len(numbers) < 2 or empty:
        raise EtfzooError(
            f"{where} needs at least two {kind}, each with training images; found "
            f"{len(numbers)}{f', empty: {some(empty)}' if empty else ''}{left_out}"
        )
    numbered = {
        split: tuple((path, numbers[label]) for path, label in items)
        for split, items in found.items()
    }
    return FileSource(
        name=name,
        row=Dataset("", len(numbers), train="train", fit="fit", select="select", test="test"),
        class_names=tuple(numbers),
        root=root,
        files=complete_splits(numbered, _hold_out),
    )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def complete_splits(found: Mapping, hold_out: Callable) -> dict:
    """The splits `train`, `test` and, where it can be, `fit` and `select`, of those that exist.

    Args:
        found: examples by split: `train`, and maybe `val` and `test`. `val` is to select on, and
            to test on where there is no `test`.
        hold_out: `(examples, share) -> (kept, held out)`, that share of each class.

    Raises:
        EtfzooError: nothing to test on.
    """
    splits = dict(found)
    if "test" not in splits:
        if "val" in splits:
            splits["test"] = splits.pop("val")
        else:
            splits["train"], splits["test"] = hold_out(splits["train"], 0.2)
    if "val" in splits:
        splits["fit"], splits["select"] = splits["train"], splits["val"]
    else:
        fit, select = hold_out(splits["train"], 0.1)
        if len(select):
            splits["fit"], splits["select"] = fit, select
    if not len(splits["test"]):
        raise EtfzooError(
            "no class has two images, so none can be held out for testing: add images, or train/ "
            "and test/ folders"
        )
    return splits


def _hold_out(items, share):
    """By the hash of a file's name: the same on every machine, whatever the other classes are."""
    by_class = {}
    for path, label in items:
        by_class.setdefault(label, []).append(path)
    kept, held = [], []
    for label, paths in by_class.items():
        order = sorted(paths, key=lambda p: hashlib.sha256(os.fsencode(p)).digest())
        # Training comes first: a class with one image has none to hold out.
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held += [(p, label) for p in sorted(order[:count])]
        kept += [(p, label) for p in sorted(order[count:])]
    return tuple(kept), tuple(held)

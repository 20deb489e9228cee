"""Folders of images: one subfolder a class."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from etfzoo import files
from etfzoo.data.datasets import Dataset
from etfzoo.data.decoding import SUFFIXES
from etfzoo.data.source import ALL, KEYS, Source, ordered
from etfzoo.errors import EtfzooError

log = logging.getLogger("etfzoo")

# How the folders of a split are spelled; of others that mean one it is said what is expected.
_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_MEANT = {"training", "testing", "dev", "eval", "evaluation"}.union(*_SPLITS.values())


@dataclasses.dataclass(frozen=True)
class _FolderSource(Source):
    root: Path
    files: Mapping[str, tuple[tuple[str, int], ...]]

    def _files(self, split):
        parts = list(self.files) if split == "all" else split.split("+")
        for part in parts:
            if part not in self.files:
                raise EtfzooError(
                    f"{self.root} has no split {part!r}; it has: {', '.join(self.files)}, and all "
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


def open_folder(name: str) -> Source:
    """The source of `folder:PATH`, see `etfzoo.data.sources.resolve`.

    Raises:
        EtfzooError: no such folder, no images, fewer than two classes, or nothing to test on.
    """
    root = files.expand(name.removeprefix("folder:"))
    if not os.path.isdir(root):
        raise EtfzooError(f"image folder {root} does not exist")
    left_out = LeftOut(root)
    folders = _split_folders(root, left_out)
    names = {split: _subfolders(path, left_out) for split, path in folders.items()}
    classes = names["train"]
    for split, path in folders.items():
        strange = set(names[split]) - set(classes)
        if strange:
            raise EtfzooError(
                f"{path} has class folders that the training split lacks: {_some(sorted(strange))}"
            )
    found = {
        split: tuple(
            (str(file.relative_to(root)), classes.index(name))
            for name in names[split]
            for file in _images_below(path / name, left_out)
        )
        for split, path in folders.items()
    }
    for split, items in found.items():
        if not items:
            raise EtfzooError(
                f"no images in {root} ({split}): expected one subfolder a class with "
                f"{', '.join(SUFFIXES)} files{left_out.told()}"
            )
    present = {label for _, label in found["train"]}
    if len(classes) < 2 or len(present) < len(classes):
        empty = [c for i, c in enumerate(classes) if i not in present]
        raise EtfzooError(
            f"{root} needs at least two class folders, each with training images; found "
            f"{len(classes)}{f', empty: {_some(empty)}' if empty else ''}{left_out.told()}"
        )
    left_out.warn()
    return _FolderSource(
        name=name,
        row=Dataset("", len(classes), train="train", fit="fit", select="select", test="test"),
        class_names=tuple(classes),
        root=root,
        files=_complete_splits(found),
    )


class LeftOut:
    """What is not read of a folder: counted, and some of it named."""

    def __init__(self, root: Path):
        self.root = root
        self._names: dict[str, list[str]] = {}

    def add(self, why: str, path) -> None:
        """Counts a file or folder.

        Args:
            why: what it is, in the plural.
            path: where it is.
        """
        self._names.setdefault(why, []).append(os.path.relpath(path, self.root))

    def told(self) -> str:
        """What is left out, as the end of a sentence; nothing where nothing is."""
        kinds = (f"{len(names)} {why} ({_some(names)})" for why, names in self._names.items())
        return f"; left out there: {', '.join(kinds)}" if self._names else ""

    def warn(self) -> None:
        """Says it where there is something to say."""
        if self._names:
            log.warning("images of %s%s", self.root, self.told())


def _some(names, most=3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _entries(path: Path) -> list[Path]:
    """What is in a folder, sorted."""
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise EtfzooError(f"folder {path} cannot be read: {error.strerror or error}") from error


def _split_folders(root: Path, left_out: LeftOut) -> dict[str, Path]:
    """The folder of each split; all is for training where they are not told apart."""
    names = [p.name for p in _entries(root) if os.path.isdir(p) and not p.name.startswith(".")]
    meant = [name for name in names if name.lower() in _MEANT]
    folders = {
        split: [name for name in names if name in spellings] for split, spellings in _SPLITS.items()
    }
    strange = set(meant).difference(*folders.values())
    if meant and (strange if folders["train"] else len(meant) > 1 or meant == names):
        raise EtfzooError(
            f"{root} has the folders {', '.join(names[:10])}; expected train/ and val/ or test/ or "
            "both, spelled so, with one subfolder a class in each; or one subfolder a class alone"
        )
    if not folders["train"]:
        return {"train": root}
    for found in folders.values():
        if len(found) > 1:
            raise EtfzooError(f"{root} has {' and '.join(found)}, which mean the same split")
    for path in _entries(root):
        if path.name not in set().union(*folders.values()):
            left_out.add("files and folders beside those of the splits", path)
    return {split: root / found[0] for split, found in folders.items() if found}


def _subfolders(path: Path, left_out: LeftOut) -> list[str]:
    """The names of the classes of a split."""
    names = []
    for entry in _entries(path):
        if not os.path.isdir(entry):
            left_out.add("files outside of the folders of the classes", entry)
        elif entry.name.startswith("."):
            left_out.add("hidden files and folders", entry)
        else:
            names.append(entry.name)
    for name in names:
        if os.fsencode(name).decode("utf-8", "replace") != name:
            raise EtfzooError(f"the name of class folder {path / name} is not UTF-8: rename it")
    return names


def image_files(paths) -> list[Path]:
    """The images that a user named: files of any name, and those in folders, however deep.

    Raises:
        EtfzooError: no such file or folder, or no image in a folder.
    """
    found = []
    for path in map(files.expand, paths):
        if not os.path.exists(path):
            raise EtfzooError(f"no such file or folder: {path}")
        if not os.path.isdir(path):
            if not os.path.isfile(path):
                raise EtfzooError(f"{path} is neither a file nor a folder")
            found.append(path)
            continue
        left_out = LeftOut(path)
        images = _images_below(path, left_out)
        if not images:
            raise EtfzooError(f"no images in {path} ({', '.join(SUFFIXES)}){left_out.told()}")
        left_out.warn()
        found += images
    return found


def _images_below(path: Path, left_out: LeftOut) -> list[Path]:
    """The images in a folder, however deep, sorted; links are followed, but not in circles."""
    images = []

    def search(folder, above):
        above = {*above, os.path.realpath(folder)}
        for entry in _entries(folder):
            if entry.name.startswith("."):
                left_out.add("hidden files and folders", entry)
            elif os.path.isdir(entry):
                if os.path.realpath(entry) in above:
                    left_out.add("links to a folder that they lie in", entry)
                else:
                    search(entry, above)
            elif not os.path.exists(entry):
                left_out.add("links that lead nowhere", entry)
            elif not os.path.isfile(entry):
                left_out.add("FIFOs, devices and sockets", entry)
            elif entry.suffix.lower() not in SUFFIXES:
                left_out.add(f"files that are not {', '.join(SUFFIXES)}", entry)
            else:
                images.append(entry)

    search(path, set())
    return sorted(images)


def _complete_splits(found) -> dict:
    """Adds what is missing: a fixed share of each class, chosen by the hash of the file's name.

    The choice is the same on every machine and does not depend on the other classes.
    """
    splits = dict(found)
    if "test" not in splits:
        if "val" in splits:
            splits["test"] = splits.pop("val")
        else:
            splits["train"], splits["test"] = _hold_out(splits["train"], 0.2)
    if "val" in splits:
        splits["fit"], splits["select"] = splits["train"], splits["val"]
    else:
        fit, select = _hold_out(splits["train"], 0.1)
        if select:
            splits["fit"], splits["select"] = fit, select
    if not splits["test"]:
        raise EtfzooError(
            "no class has two images, so none can be held out for testing: add images, or train/ "
            "and test/ folders"
        )
    return splits


def _hold_out(items, share):
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

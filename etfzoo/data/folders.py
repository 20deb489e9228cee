"""Folders of images: one subfolder a class."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from etfzoo.data.datasets import Dataset
from etfzoo.data.source import KEYS, Source, ordered
from etfzoo.errors import EtfzooError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


@dataclasses.dataclass(frozen=True)
class _FolderSource(Source):
    root: Path
    files: Mapping[str, tuple[tuple[str, int], ...]]

    def _files(self, split):
        split = self.split(split)
        if split not in self.files:
            raise EtfzooError(
                f"{self.root} has no split {split!r}; it has: {', '.join(self.files)}"
            )
        return self.files[split]

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

    def records(self, split, shuffle_seed=None):
        files = self._files(split)
        columns = {
            "record": tf.constant([path for path, _ in files]),
            "label": tf.constant([label for _, label in files], tf.int32),
        }
        root = str(self.root) + os.sep
        return ordered(columns, shuffle_seed).map(
            lambda r: (
                r
                | {
                    "image": tf.io.read_file(tf.strings.join([root, r["record"]])),
                    "key": tf.strings.to_hash_bucket_fast(r["record"], KEYS),
                }
            ),
            num_parallel_calls=2,
        )


def open_folder(name: str) -> Source:
    """The source of `folder:PATH`, see `etfzoo.data.sources.resolve`.

    Raises:
        EtfzooError: no such folder, no images, fewer than two classes, or nothing to test on.
    """
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise EtfzooError(f"image folder {root} does not exist")
    if (root / "train").is_dir():
        folders = {"train": root / "train"}
        for split, spellings in (("val", ("val", "validation", "valid")), ("test", ("test",))):
            found = [root / s for s in spellings if (root / s).is_dir()]
            if found:
                folders[split] = found[0]
        classes = _subfolders(folders["train"])
        files = {split: _list_images(root, path, classes) for split, path in folders.items()}
    else:
        classes = _subfolders(root)
        files = {"train": _list_images(root, root, classes)}
    for split, items in files.items():
        if not items:
            raise EtfzooError(
                f"no images in {root} ({split}): expected one subfolder a class with "
                f"{', '.join(_IMAGE_SUFFIXES)} files"
            )
    present = {label for _, label in files["train"]}
    if len(classes) < 2 or len(present) < len(classes):
        empty = [c for i, c in enumerate(classes) if i not in present]
        raise EtfzooError(
            f"{root} needs at least two class folders, each with training images; found "
            f"{len(classes)}" + (f", empty: {', '.join(empty[:5])}" if empty else "")
        )
    return _FolderSource(
        name=name,
        row=Dataset("", len(classes), train="train", fit="fit", select="select", test="test"),
        class_names=tuple(classes),
        root=root,
        files=_complete_splits(files),
    )


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_images(root: Path, path: Path, classes) -> tuple[tuple[str, int], ...]:
    strange = set(_subfolders(path)) - set(classes)
    if strange:
        raise EtfzooError(
            f"{path} has class folders that the training split lacks: "
            f"{', '.join(sorted(strange)[:5])}"
        )
    return tuple(
        (str(file.relative_to(root)), label)
        for label, name in enumerate(classes)
        for file in _images_below(path / name)
    )


def image_files(paths) -> list[Path]:
    """The images that a user named: files of any name, and those in folders, however deep.

    Raises:
        EtfzooError: no such file or folder, or no image in a folder.
    """
    found = []
    for path in map(Path, paths):
        images = _images_below(path) if path.is_dir() else [path]
        if not path.exists():
            raise EtfzooError(f"no such file or folder: {path}")
        if not images:
            raise EtfzooError(f"no images in {path} ({', '.join(_IMAGE_SUFFIXES)})")
        found += images
    return found


def _images_below(path: Path) -> list[Path]:
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in _IMAGE_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def _complete_splits(files) -> dict:
    """Adds what is missing: a fixed share of each class, chosen by the hash of the file's name.

    The choice is the same on every machine and does not depend on the other classes.
    """
    files = dict(files)
    if "test" not in files:
        if "val" in files:
            files["test"] = files.pop("val")
        else:
            files["train"], files["test"] = _hold_out(files["train"], 0.2)
    if "val" in files:
        files["fit"], files["select"] = files["train"], files["val"]
    else:
        fit, select = _hold_out(files["train"], 0.1)
        if select:
            files["fit"], files["select"] = fit, select
    if not files["test"]:
        raise EtfzooError(
            "no class has two images, so none can be held out for testing: add images, or train/ "
            "and test/ folders"
        )
    return files


def _hold_out(items, share):
    by_class = {}
    for path, label in items:
        by_class.setdefault(label, []).append(path)
    kept, held = [], []
    for label, paths in by_class.items():
        order = sorted(paths, key=lambda p: hashlib.sha256(p.encode()).digest())
        # Training comes first: a class with one image has none to hold out.
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held += [(p, label) for p in sorted(order[:count])]
        kept += [(p, label) for p in sorted(order[count:])]
    return tuple(kept), tuple(held)

"""Folders of images: one subfolder a class."""

import logging
import os
from pathlib import Path

from etfzoo import files
from etfzoo.data.decoding import SUFFIXES
from etfzoo.data.file_source import SPLITS, file_source, some
from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError

log = logging.getLogger("etfzoo")

# Folders that mean a split; of those spelled otherwise it is said what is expected.
_MEANT = {"training", "testing", "dev", "eval", "evaluation"}.union(*SPLITS.values())


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
    found = {
        split: [
            (str(file.relative_to(root)), name)
            for name in names[split]
            for file in _images_below(path / name, left_out)
        ]
        for split, path in folders.items()
    }
    source = file_source(
        name,
        root,
        root,
        names,
        found,
        kind="class folders",
        expected=f"one subfolder a class with {', '.join(SUFFIXES)} files",
        left_out=left_out.told(),
    )
    left_out.warn()
    return source


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
        kinds = (f"{len(names)} {why} ({some(names)})" for why, names in self._names.items())
        return f"; left out there: {', '.join(kinds)}" if self._names else ""

    def warn(self) -> None:
        """Says it where there is something to say."""
        if self._names:
            log.warning("images of %s%s", self.root, self.told())


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
        split: [name for name in names if name in spellings] for split, spellings in SPLITS.items()
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

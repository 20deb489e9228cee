"""A data set without the images that cannot be decoded."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.data import decoding
from etfzoo.data.source import ALL, Source, naming_source
from etfzoo.errors import EtfzooError, first_line

log = logging.getLogger("etfzoo")


def why_unreadable(encoded: tf.Tensor, jpegs: bool = False) -> str | None:
    """Why an encoded image cannot be decoded, None where it can; `jpegs`: see `decoding.opened`."""
    try:
        if jpegs:
            decoding.opened(encoded, jpegs)
        decoding.decode(encoded)
    except tf.errors.InvalidArgumentError as error:
        return first_line(error)
    return None


@dataclasses.dataclass(frozen=True)
class ReadableSource(Source):
    """A source whose splits are decoded once, when first asked for, and have lost what cannot be.

    Attributes:
        source: the data set with all of its images.
        path: JSON file that keeps the names of the lost images by split; None keeps them in memory.
        write: whether this process writes the file.
    """

    source: Source
    path: Path | None = None
    write: bool = True
    lost: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def class_descriptions(self):
        return self.source.class_descriptions

    @property
    def jpegs(self):
        return self.source.jpegs

    def size(self, split):
        return self.source.size(split) - len(self._lost(split))

    def by_index(self, split):
        return self.source.by_index(split)

    def read(self, split, numbers, images=True):
        lost = np.sort(self.source.find(split, self._lost(split)))
        # Before the i-th that is lost stand as many as are kept.
        kept = tf.constant(lost - np.arange(len(lost)), tf.int64)
        numbers = numbers.map(lambda n: n + tf.searchsorted(kept, [n], "right", tf.int64)[0])
        return self.source.read(split, numbers, images)

    def records(self, split, shuffle_seed=None, images=True, places=ALL):
        if self.by_index(split):
            return super().records(split, shuffle_seed, images, places)
        lost = self._lost(split)
        if not lost:
            return self.source.records(split, shuffle_seed, images, places)
        records = self.source.records(split, shuffle_seed, images)
        lost = tf.constant([os.fsencode(name) for name in lost])
        return places.of(records.filter(lambda r: tf.reduce_all(r["record"] != lost)))

    def _lost(self, split):
        split = self.split(split)
        if not self.lost and self.path is not None and self.path.exists():
            self.lost.update(_read(self.path))
        if split in self.lost:
            return self.lost[split]
        lost = {}
        with naming_source(self.name):
            for record in self.source.records(split):
                reason = why_unreadable(record["image"], self.source.jpegs)
                if reason is not None:
                    lost[os.fsdecode(record["record"].numpy())] = reason
        size = self.source.size(split)
        if lost:
            first = "; ".join(f"{name}: {reason}" for name, reason in [*lost.items()][:3])
            more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
            log.warning(
                "left out %d corrupt images of the %d of split %s of %s (%s%s)%s",
                len(lost), size, split, self.name, first, more,
                f", listed in {self.path}" if self.path is not None else "",
            )  # fmt: skip
        if len(lost) == size:
            raise EtfzooError(
                f"none of the {size} images of split {split} of {self.name} is readable"
            )
        self.lost[split] = list(lost)
        if self.path is not None and self.write:
            files.make_directory(self.path.parent)
            files.write_text(self.path, json.dumps(self.lost, indent=2) + "\n")
        return self.lost[split]


def _read(path):
    lost = files.read_json(path)
    if not isinstance(lost, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in lost.values()
    ):
        raise EtfzooError(f"{path} is no list of images by split: delete it, and it is made again")
    return lost


def readable(source: Source, path=None, write: bool = True) -> Source:
    """The source without the images that cannot be decoded, see `ReadableSource`."""
    kept = (source.name, source.row, source.class_names)
    return ReadableSource(*kept, source, path and Path(path), write)

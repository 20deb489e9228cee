"""A data set whose training images are an exponential long tail."""

import dataclasses
import logging
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from etfzoo.data.source import ALL, Source, naming_source, same_name
from etfzoo.errors import EtfzooError

log = logging.getLogger("etfzoo")

_RANKS = 2**62  # so many that no two examples share one


def tail_counts(counts, imbalance: float) -> np.ndarray:
    """Number of examples that each class of a long tail keeps, int64 `[K]`.

    Class k has at most floor(n * imbalance^(-k / (K - 1))), with n the largest of the counts (Cui
    et al. 2019, "Class-balanced loss based on effective number of samples"; Cao et al. 2019,
    "Learning imbalanced datasets with label-distribution-aware margin loss"). Both make it of
    classes of one size, which n is there.

    Args:
        counts: examples of each class `[K]`, in the order of the classes; one that has fewer than
            its place in the tail keeps all.
        imbalance: largest class by smallest, at least 1.

    Returns:
        zeros where the tail has no whole example left: the imbalance is larger than n.
    """
    counts = np.asarray(counts, np.int64)
    place = np.arange(len(counts)) / max(len(counts) - 1, 1)
    # Rounding must not lose an example where the number is whole.
    most = np.floor(counts.max() * float(imbalance) ** -place * (1 + 1e-12))
    return np.minimum(counts, most.astype(np.int64))


class _Tail(NamedTuple):
    """Of one split: what its classes keep, and the ranks and places of what is kept."""

    counts: np.ndarray  # [K]
    last: np.ndarray  # [K]: the largest rank that is kept of a class
    kept: np.ndarray  # the places in file order that are kept
    places: np.ndarray | None  # [N]: the new `index` by the old one, if there is one


@dataclasses.dataclass(frozen=True)
class LongTailSource(Source):
    """A source some of whose splits have lost images until they are a long tail.

    Which examples of a class stay is told by the hash of their names: it depends on nothing but
    these, and what a larger imbalance keeps is a part of what a smaller one keeps. The labels of a
    split are read once, when it is first asked for; no image is decoded.

    Attributes:
        source: the data set with all of its images.
        imbalance: see `tail_counts`.
        splits: names of the splits that are long tails; all others stay as they are.
    """

    source: Source
    imbalance: float
    splits: frozenset[str]
    tails: dict = dataclasses.field(default_factory=dict)

    @property
    def class_descriptions(self):
        return self.source.class_descriptions

    @property
    def jpegs(self):
        return self.source.jpegs

    def fingerprint(self):
        return self.source.fingerprint() | {"imbalance": self.imbalance}

    def size(self, split):
        tail = self._tail(split)
        return self.source.size(split) if tail is None else int(tail.counts.sum())

    def class_counts(self, split):
        tail = self._tail(split)
        return self.source.class_counts(split) if tail is None else tail.counts.copy()

    def by_index(self, split):
        return self.source.by_index(split)

    def read(self, split, numbers, images=True):
        tail = self._tail(split)
        if tail is not None:
            kept = tf.constant(tail.kept)
            numbers = numbers.map(lambda n: tf.gather(kept, n))
        return self.source.read(split, numbers, images)

    def records(self, split, shuffle_seed=None, images=True, places=ALL):
        if self.by_index(split):
            return super().records(split, shuffle_seed, images, places)
        tail = self._tail(split)
        if tail is None:
            return self.source.records(split, shuffle_seed, images, places)
        return places.of(self._filtered(tail, self.source.records(split, shuffle_seed, images)))

    def _filtered(self, tail, records):
        last = tf.constant(tail.last)
        records = records.filter(lambda r: _rank(r) <= tf.gather(last, r["label"]))
        if tail.places is None:
            return records
        places = tf.constant(tail.places)
        return records.map(lambda r: r | {"index": tf.gather(places, r["index"])})

    def _tail(self, split):
        name = self.split(split)
        if name not in self.splits:
            return None
        if name not in self.tails:
            self.tails[name] = self._made(split, name)
        return self.tails[name]

    def _made(self, split, name):
        def facts(record):
            found = {"label": record["label"], "rank": _rank(record)}
            return found | ({"index": record["index"]} if "index" in record else {})

        records = self.source.records(split, images=False).map(facts)
        with naming_source(self.name):
            batches = list(records.batch(4096).as_numpy_iterator())
        if not batches:
            raise EtfzooError(f"split {name!r} of data set {self.name} is empty")
        columns = {c: np.concatenate([b[c] for b in batches]) for c in batches[0]}
        labels, ranks = columns["label"], columns["rank"]
        present = np.bincount(labels, minlength=self.num_classes)
        wanted = tail_counts(present, self.imbalance)
        self._check(name, present, wanted)
        order = np.lexsort((ranks, labels))  # by class, then by rank
        ends = (np.cumsum(present) - present + wanted - 1)[wanted > 0]
        last = np.full(self.num_classes, -1, np.int64)
        last[wanted > 0] = ranks[order][ends]
        kept = ranks <= last[labels]
        counts = np.bincount(labels[kept], minlength=self.num_classes)
        log.info(
            "long tail of split %s of %s: %d of its %d images, %d of the largest class and %d of "
            "the smallest", name, self.name, counts.sum(), len(labels), counts.max(), counts.min(),
        )  # fmt: skip
        places = None
        if "index" in columns:
            places = np.zeros(1 + columns["index"].max(), np.int64)
            places[columns["index"]] = np.cumsum(kept) - 1
        return _Tail(counts, last, np.flatnonzero(kept), places)

    def _check(self, name, present, wanted):
        empty = np.flatnonzero((present > 0) & (wanted == 0))
        if len(empty):
            raise EtfzooError(
                f"`imbalance={self.imbalance:g}` leaves class {self.class_names[empty[0]]} of "
                f"split {name!r} of {self.name} without an image: its largest class has "
                f"{present.max()}; pass `imbalance={present.max()}` or less"
            )


def _rank(record):
    return tf.strings.to_hash_bucket_fast(same_name(record["record"]), _RANKS)


def long_tailed(source: Source, imbalance: float, split: str) -> Source:
    """The source with a long tail of its training images, see `LongTailSource`.

    Args:
        source: the data set.
        imbalance: see `tail_counts`; 1 leaves the source as it is.
        split: split or role that is trained on. The role `fit`, which a search trains on, becomes
            a long tail too, of its own classes; what is tested or selected on stays as it is.
    """
    if imbalance == 1:
        return source
    kept = (source.name, source.row, source.class_names)
    splits = frozenset({source.split(split), source.split("fit")})
    return LongTailSource(*kept, source, imbalance, splits)

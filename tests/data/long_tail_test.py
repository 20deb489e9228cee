"""Tests of long tails that are made of a data set's training images."""

import dataclasses
import json
import logging
from fractions import Fraction

import numpy as np
import pytest

from etfzoo.data import augment, decoding, sources
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.long_tail import long_tailed, tail_counts
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.data.readable import readable
from etfzoo.errors import EtfzooError
from testing import make_image_folder

IMBALANCE = 8


@pytest.fixture(scope="module")
def digits(embedded_dir):
    return sources.resolve("digits", str(embedded_dir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    counts = {"a": 40, "b": 20, "c": 40, "d": 30}
    root = make_image_folder(tmp_path_factory.mktemp("images"), counts)
    return sources.resolve(f"folder:{root}")


@pytest.fixture(params=["digits", "folder", "streamed"])
def source(request, embedded_dir, monkeypatch):
    if request.param != "streamed":
        return request.getfixturevalue(request.param)
    half = request.getfixturevalue("digits")._bytes("train") // 2
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", half)
    return sources.resolve("digits", str(embedded_dir))


def records(source, split, *args, **kwargs):
    return list(source.records(split, *args, **kwargs).as_numpy_iterator())


def names(source, split, *args):
    return [r["record"] for r in records(source, split, *args)]


def by_class(source, split):
    return np.bincount([r["label"] for r in records(source, split)], minlength=source.num_classes)


def formula(present, imbalance):
    """In whole numbers: the largest m with (m / n)^(K - 1) <= imbalance^-k."""
    most, steps = max(present), len(present) - 1
    return [
        max(m for m in range(n + 1) if m**steps * imbalance**k <= most**steps)
        for k, n in enumerate(present)
    ]


@pytest.mark.parametrize(
    "classes, each, imbalance, images, smallest",
    [
        # The sizes of CIFAR10-LT and CIFAR100-LT.
        (10, 5000, 100, 12406, 50),
        (10, 5000, 50, 13996, 100),
        (10, 5000, 10, 20431, 500),
        (100, 500, 100, 10847, 5),
        (100, 500, 50, 12608, 10),
        (100, 500, 10, 19573, 50),
        (3, 5000, 100, 5550, 50),  # 500 in the middle, which a root that is rounded may miss
        (1, 7, 5, 7, 7),
    ],
)
def test_counts_of_equal_classes(classes, each, imbalance, images, smallest):
    found = tail_counts([each] * classes, imbalance)
    assert (found[0], found[-1], found.sum()) == (each, smallest, images)
    assert found.tolist() == formula([each] * classes, imbalance)


def test_counts_of_other_classes():
    present = [30, 100, 0, 5, 60, 2]
    assert tail_counts(present, 16).tolist() == formula(present, 16) == [30, 57, 0, 5, 10, 2]
    assert tail_counts(present, 1).tolist() == present
    assert tail_counts([10, 10, 10], 1000).tolist() == [10, 0, 0]


def test_a_source_has_the_counts_of_the_formula(source):
    tail = long_tailed(source, IMBALANCE, "train")
    for split in ("train", "fit"):
        wanted = formula(by_class(source, split).tolist(), IMBALANCE)
        assert by_class(tail, split).tolist() == tail.class_counts(split).tolist() == wanted
        assert tail.class_counts(split).dtype == np.int64
        assert tail.size(split) == sum(wanted) < source.size(split)
        assert set(names(tail, split)) <= set(names(source, split))
    for split in ("select", "test"):
        assert names(tail, split) == names(source, split)
        assert tail.size(split) == source.size(split)
        assert (tail.class_counts(split) == source.class_counts(split)).all()
    assert not set(names(tail, "fit")) & set(names(tail, "select"))


def test_nothing_but_the_names_chooses(source, digits, embedded_dir):
    kept = set(names(long_tailed(source, IMBALANCE, "train"), "train"))
    assert len(kept) == long_tailed(source, IMBALANCE, "train").size("train")
    assert kept == set(names(long_tailed(source, IMBALANCE, "train"), "train", 3))
    # More of a tail is a part of less of it; and the first of a class are not the ones.
    assert kept < set(names(long_tailed(source, 3, "train"), "train"))
    order, label = names(source, "train"), source.num_classes - 1
    of_last = [r["record"] for r in records(source, "train") if r["label"] == label]
    chosen = [name for name in of_last if name in kept]
    assert order.index(chosen[-1]) > order.index(of_last[len(chosen) - 1])
    if source.name == "digits":
        again = sources.resolve("digits", str(embedded_dir))
        assert kept == set(names(long_tailed(again, IMBALANCE, "train"), "train"))


def test_the_order_is_that_of_the_source(source):
    tail = long_tailed(source, IMBALANCE, "train")
    for seed in (None, 5):
        kept = names(tail, "train", seed)
        assert kept == [name for name in names(source, "train", seed) if name in set(kept)]
    assert names(tail, "train", 5) != names(tail, "train", 6)


def test_places_in_memory_have_no_gaps(digits, folder):
    for source in (digits, folder):
        tail = long_tailed(source, IMBALANCE, "train")
        in_order = records(tail, "train")
        assert [r["index"] for r in in_order] == list(range(tail.size("train")))
        place = {r["record"]: r["index"] for r in in_order}
        bare = records(tail, "train", 7, images=False)
        assert all("image" not in r and place[r["record"]] == r["index"] for r in bare)
        assert names(tail, "train", 7) == [r["record"] for r in bare]


@pytest.mark.parametrize("split", ["train", "fit", "train[:50%]"])
def test_the_split_that_is_trained_on_and_fit(digits, split):
    tail = long_tailed(digits, 4, split)
    thinned = {s for s in ("train", "fit", "train[:50%]") if tail.size(s) < digits.size(s)}
    wanted = {"train": {"train", "fit"}, "fit": {"train", "fit"}}  # which are one of digits
    assert thinned == wanted.get(split, {"train", "fit", split})


def test_without_imbalance_the_source_stays_itself(digits):
    assert long_tailed(digits, 1.0, "train") is digits


def test_shares_are_parts_of_the_same_batches(folder):
    tail = long_tailed(folder, IMBALANCE, "train")
    pipeline = Pipeline(tail, 8, 8, 0.875, 6, Augmentation(), 2)

    def batches(start=0, **share):
        which = InputShare(**share) if share else None
        return [
            (images.numpy(), labels.numpy())
            for images, labels in pipeline.training("train", 1, start, which)
        ]

    whole, (one, two) = batches(), (batches(index=i, count=2, replicas=2) for i in (0, 1))
    assert len(whole) == len(one) == len(two) == tail.size("train") // 6 > 3
    for batch, *parts in zip(whole, one, two, strict=True):
        for both, *columns in zip(batch, *parts, strict=True):
            np.testing.assert_array_equal(both, np.concatenate(columns))
    for (images, labels), (images2, labels2) in zip(whole[2:], batches(2), strict=True):
        np.testing.assert_array_equal(images, images2)
        np.testing.assert_array_equal(labels, labels2)


def test_broken_images_are_left_out_before(tmp_path):
    root = make_image_folder(tmp_path / "images", {"a": 40, "b": 40})
    source = sources.resolve(f"folder:{root}")
    kept = names(long_tailed(source, 4, "train"), "train")
    broken = next(name for name in kept if name.startswith(b"b/")).decode()
    (root / broken).write_bytes(b"no image")
    tail = long_tailed(readable(source, tmp_path / "corrupt.json"), 4, "train")
    assert tail.class_counts("train").tolist() == [32, 8]  # another takes its place
    assert broken.encode() not in names(tail, "train") and len(names(tail, "train")) == 40
    assert json.loads((tmp_path / "corrupt.json").read_text())["train"] == [broken]
    assert [r["index"] for r in records(tail, "train")] == list(range(40))


def test_labels_are_read_once_and_nothing_is_decoded(folder, monkeypatch, caplog):
    for module, name in ((decoding, "decode"), (augment, "training_image")):
        monkeypatch.setattr(module, name, None)
    read = []
    real = type(folder).records

    def noted(self, split, shuffle_seed=None, images=True):
        read.append((split, images))
        return real(self, split, shuffle_seed, images)

    monkeypatch.setattr(type(folder), "records", noted)
    tail = long_tailed(folder, IMBALANCE, "train")
    with caplog.at_level(logging.INFO, "etfzoo"):
        assert tail.size("train") == tail.class_counts("train").sum() == tail.size("train")
    assert read == [("train", False)]
    (line,) = (r.getMessage() for r in caplog.records if "long tail" in r.getMessage())
    counts = tail.class_counts("train")
    assert f": {counts.sum()} of its 104 images, {counts.max()} of the largest class" in line
    assert line.endswith(f"{counts.min()} of the smallest")


def test_it_says_what_the_source_says(digits):
    tail = long_tailed(digits, 3, "train")
    assert tail.fingerprint() == digits.fingerprint() | {"imbalance": 3}
    assert tail.class_names == digits.class_names and tail.name == digits.name
    assert tail.class_descriptions == digits.class_descriptions
    plain = Pipeline(digits, 8, 8, 1.0, 4, Augmentation(), 0)
    thinned = Pipeline(tail, 8, 8, 1.0, 4, Augmentation(), 0)
    assert plain.fingerprint("test") == thinned.fingerprint("test")
    assert plain.fingerprint("train") != thinned.fingerprint("train")


def test_a_class_that_would_be_empty(folder):
    most = max(by_class(folder, "train"))
    assert long_tailed(folder, most, "train").class_counts("train")[-1] == 1
    with pytest.raises(EtfzooError) as error:
        long_tailed(folder, most + 1, "train").size("train")
    assert str(error.value) == (
        f"`imbalance={most + 1}` leaves class d of split 'train' of {folder.name} without an "
        f"image: its largest class has {most}; pass `imbalance={most}` or less"
    )


def test_a_class_without_examples_is_no_error(digits):
    few = dataclasses.replace(digits, memory={})
    present = by_class(few, "train[:5%]")
    assert 0 in present
    tail = long_tailed(few, 1.5, "train[:5%]")
    assert tail.class_counts("train[:5%]").tolist() == formula(present.tolist(), Fraction(3, 2))
    with pytest.raises(EtfzooError, match="has no split 'nope'"):
        long_tailed(few, 2, "nope").size("nope")

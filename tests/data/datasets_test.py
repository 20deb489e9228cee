"""Tests of the table of data sets against TFDS, the literature and the embedded builders."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from etfzoo.data import datasets, tiny_imagenet  # noqa: F401 - a builder for TFDS
from etfzoo.data.datasets import DATASETS, EMBEDDED
from etfzoo.data.tfds import _feature_keys

OFFICIAL = sorted(DATASETS.keys() - set(EMBEDDED))
IMAGENET_FIGURES = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

# The data sets' own papers and pages, as the TFDS catalogue lists them: classes and split sizes,
# and whether the transfer literature reports mean per-class accuracy (Kornblith et al. 2019, table
# 1: "mean per-class" of Oxford-IIIT Pets and Oxford 102 Flowers, "top-1" of DTD and CIFAR).
FACTS = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}, False),
    "imagenet_resized/64x64": (1000, {"train": 1_281_167, "validation": 50_000}, False),
    "tiny_imagenet": (100, {"train": 50_000, "validation": 5_000}, False),
    "cifar100": (100, {"train": 50_000, "test": 10_000}, False),
    "cifar10": (10, {"train": 50_000, "test": 10_000}, False),
    "stl10": (10, {"train": 5_000, "test": 8_000, "unlabelled": 100_000}, False),
    "svhn_cropped": (10, {"train": 73_257, "test": 26_032, "extra": 531_131}, False),
    "oxford_iiit_pet": (37, {"train": 3_680, "test": 3_669}, True),
    "oxford_flowers102": (102, {"train": 1_020, "validation": 1_020, "test": 6_149}, True),
    "dtd": (47, {"train": 1_880, "validation": 1_880, "test": 1_880}, False),
    "shapes/source": (18, {"train": 2_880, "validation": 360, "test": 900}, False),
    "shapes/textures": (10, {"train": 300, "validation": 100, "test": 500}, False),
    "shapes/outlines": (10, {"train": 300, "validation": 100, "test": 500}, False),
    "digits": (10, {"train": 200, "validation": 300, "test": 1_297}, False),
}

# Channel means and deviations of the training images in 0..1, as published with many recipes.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def intervals(expression, counts):
    """Examples of a split expression such as `train[:90%]+validation`, as a set of pairs."""
    chosen = set()
    for part in expression.split("+"):
        name, low, high = re.fullmatch(r"(\w+)(?:\[(\d*)%?:(\d*)%?\])?", part).groups()
        size = min(counts[name], 1000)  # a thousand stand for all
        low, high = int(low or 0), int(high or 100)
        chosen |= {(name, i) for i in range(size * low // 100, size * high // 100)}
    return chosen


@pytest.mark.parametrize("name", OFFICIAL)
def test_row_against_the_builder_of_tfds(name, tmp_path):
    row = DATASETS[name]
    # Resolves offline; it raises if this version of TFDS has no such major version.
    builder = tfds.builder(row.tfds, data_dir=tmp_path)
    major = int(re.fullmatch(rf"{name}:(\d+)\.\*\.\*", row.tfds)[1])
    assert builder.version.major == major
    assert isinstance(builder.info.features["image"], tfds.features.Image)
    assert builder.info.features["label"].num_classes == row.num_classes
    # Coarse labels, species and masks are not what is learnt.
    assert _feature_keys(tfds, name, builder) == ("image", "label")
    with pytest.raises((tfds.core.DatasetNotFoundError, AssertionError, ValueError)):
        tfds.builder(f"{name}:{major + 7}.*.*", data_dir=tmp_path)


def test_every_row_is_checked():
    assert FACTS.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_row_against_published_facts(name):
    row, (classes, counts, per_class) = DATASETS[name], FACTS[name]
    assert row.num_classes == classes
    assert dict(row.counts) == counts
    assert row.metric == ("mean_per_class" if per_class else "top1")


@pytest.mark.parametrize("name", DATASETS)
def test_roles(name):
    row = DATASETS[name]
    roles = {
        role: intervals(getattr(row, role), row.counts)
        for role in ("train", "fit", "select", "test")
    }
    assert all(roles.values())
    for role in ("train", "fit", "select"):
        assert not roles[role] & roles["test"], f"{role} sees test examples"
    assert not roles["fit"] & roles["select"]
    assert roles["fit"] <= roles["train"]
    # Unlabelled and extra images are not part of the protocol.
    assert {split for part in roles.values() for split, _ in part} <= {
        "train",
        "validation",
        "test",
    }


def test_roles_of_the_transfer_protocol():
    flowers, dtd = DATASETS["oxford_flowers102"], DATASETS["dtd"]
    for row in (flowers, dtd):
        assert (row.train, row.fit, row.select, row.test) == (
            *("train+validation", "train", "validation", "test"),
        )
    imagenet = DATASETS["imagenet2012"]
    assert (imagenet.train, imagenet.test) == ("train", "validation")
    # A data set without a validation split selects on a slice of the training images.
    for name in ("cifar10", "cifar100", "stl10", "svhn_cropped", "oxford_iiit_pet"):
        row = DATASETS[name]
        union = intervals(row.fit, row.counts) | intervals(row.select, row.counts)
        assert union == intervals(row.train, row.counts) and row.test == "test"


def test_every_row_states_the_terms_of_its_images():
    assert all(row.licence and row.licence.isprintable() for row in DATASETS.values())
    for name in ("imagenet2012", "imagenet_resized/64x64", "tiny_imagenet", "stl10"):
        assert "ImageNet's terms: non-commercial research" in DATASETS[name].licence


@pytest.mark.parametrize("name", DATASETS)
def test_inputs(name):
    row = DATASETS[name]
    native = 64 if "imagenet" in name else 32
    for protocol in ("paper", "standard"):
        assert row.inputs(protocol) == (224, *IMAGENET_FIGURES)
    for protocol in ("paper_lowres", "quickstart"):
        size, mean, std = row.inputs(protocol)
        assert size == native
        assert len(mean) == len(std) == 3 and min(std) > 20 and max(mean) < 200
    assert datasets.IMAGENET_STATISTICS == IMAGENET_FIGURES


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name):
    for values, published in zip(DATASETS[name].statistics, STATISTICS[name], strict=True):
        np.testing.assert_allclose(values, np.multiply(255, published), atol=0.1)


def test_mirrored_characters_are_other_characters():
    assert {name for name, row in DATASETS.items() if not row.flip} == {"svhn_cropped", "digits"}

"""Tests of the embedded data sets."""

import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from datasets_test import intervals

from etfzoo.data import shapes
from etfzoo.data.datasets import DATASETS, EMBEDDED

CONFIGS = {config.name: config for config in shapes.Shapes.BUILDER_CONFIGS}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All embedded data sets, prepared on a machine where every connection fails."""

    def refuse(*args):
        raise AssertionError(f"network access: {args}")

    directory = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        shapes.prepare(directory)
    return directory


@pytest.fixture(scope="module")
def small_sets():
    return {
        (name, split): np.stack([shapes.render(name, split, index) for index in range(100)])
        for name in CONFIGS
        for split in shapes.SPLITS
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_render_is_deterministic(name, small_sets):
    again = [shapes.render(name, "train", index) for index in reversed(range(20))]
    np.testing.assert_array_equal(again[::-1], small_sets[name, "train"][:20])
    assert again[0].shape == (32, 32, 3) and again[0].dtype == np.uint8


def test_rendered_images_are_pinned(small_sets):
    # The data must not drift between releases; statistics tolerate last-bit rounding.
    means = [small_sets[name, "test"].mean() for name in CONFIGS]
    stds = [small_sets[name, "test"].std() for name in CONFIGS]
    np.testing.assert_allclose(means, [92.892, 104.8, 147.113], atol=0.01)
    np.testing.assert_allclose(stds, [65.038, 66.031, 83.474], atol=0.01)


def test_no_image_is_in_two_places(small_sets):
    images = np.concatenate(list(small_sets.values()))
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_lie_inside_the_image_and_differ(name):
    # Drawn upright and alone, no two classes may share a silhouette.
    axis = np.linspace(-1.2, 1.2, 61)
    z = axis[None, :] - 1j * axis[:, None]
    masks = np.stack([distance(z) < 0 for distance in CONFIGS[name].shapes.values()])
    assert not masks[:, [0, -1]].any() and not masks[:, :, [0, -1]].any()
    areas = masks.mean((1, 2))
    assert areas.min() > 0.1
    intersection = (masks[:, None] & masks[None]).mean((2, 3))
    overlap = intersection / (areas[:, None] + areas[None] - intersection)
    assert (overlap - np.eye(len(masks))).max() < 0.9


def test_label_is_index_modulo_classes():
    # Source shapes are light on dark: how much is light must follow the area of the class.
    axis = np.linspace(-1.5, 1.5, 61)
    z = axis[None, :] - 1j * axis[:, None]
    areas = [(distance(z) < 0).mean() for distance in CONFIGS["source"].shapes.values()]
    images = np.stack([shapes.render("source", "test", index) for index in range(18 * 10)])
    light = (images.mean(-1) > 130).reshape(10, 18, -1).mean((0, 2))
    assert np.corrcoef(areas, light)[0, 1] > 0.95


def test_classes_of_the_domains_are_disjoint():
    names = [name for config in CONFIGS.values() for name in config.shapes]
    assert len(names) == len(set(names)) == 38


@pytest.mark.parametrize(
    "name, classes, per_class",
    [
        ("shapes/source", 18, (160, 20, 50)),
        ("shapes/textures", 10, (30, 10, 50)),
        ("shapes/outlines", 10, (30, 10, 50)),
    ],
)
def test_prepared_shapes_read_back(data_dir, name, classes, per_class):
    builder = tfds.builder(name, data_dir=data_dir)
    config = CONFIGS[name.split("/")[1]]
    assert builder.info.features["label"].names == list(config.shapes)
    assert builder.info.supervised_keys == ("image", "label")
    for split, count in zip(shapes.SPLITS, per_class, strict=True):
        images, labels = _read(builder, split)
        assert images.shape == (classes * count, 32, 32, 3) and images.dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(labels), [count] * classes)
        # TFDS shuffles, so look the first few renderings up.
        where = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        assert len(where) == len(images)
        for index in (0, 1, classes + 2):
            assert where[shapes.render(config.name, split, index).tobytes()] == index % classes


@pytest.mark.parametrize("name", EMBEDDED)
def test_row_against_the_embedded_builder(name, data_dir):
    row = DATASETS[name]
    builder = tfds.builder(row.tfds, data_dir=data_dir)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == row.counts
    assert builder.info.features["label"].num_classes == row.num_classes
    for role in ("train", "fit", "select", "test"):
        wanted = len(intervals(getattr(row, role), row.counts))
        assert min(1000, builder.info.splits[getattr(row, role)].num_examples) == wanted
    assert builder.info.features["image"].shape[0] == row.native


def test_prepared_digits_read_back(data_dir):
    from sklearn import datasets

    scans, targets = datasets.load_digits(return_X_y=True)
    builder = tfds.builder("digits", data_dir=data_dir)
    parts = [_read(builder, split) for split in shapes.SPLITS]
    assert [len(labels) for _, labels in parts] == [200, 300, 1297]
    for (_, labels), count in zip(parts, (20, 30), strict=False):
        np.testing.assert_array_equal(np.bincount(labels), [count] * 10)
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(targets))
    # Shrunk again (by the middle of each 4x4 block, which the interpolation blurs least), the
    # images are the scans, each of them once and with its label.
    blocks = images[..., 0].reshape(-1, 8, 4, 8, 4)[:, :, 1:3, :, 1:3]
    shrunk = blocks.mean((2, 4)).reshape(-1, 64) / 255 * 16
    gaps = (shrunk**2).sum(1)[:, None] - 2 * shrunk @ scans.T + (scans**2).sum(1)
    nearest = gaps.argmin(1)
    assert len(set(nearest)) == len(scans)
    np.testing.assert_array_equal(labels, targets[nearest])


def test_prepare_twice_changes_nothing(data_dir, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise AssertionError("rendered again")

    monkeypatch.setattr(shapes, "render", fail)
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*.tfrecord*")}
    assert len(before) == 3 * len(shapes.EMBEDDED)
    assert shapes.prepare(data_dir) is None
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*.tfrecord*")} == before
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_prepare_only_what_is_named(tmp_path, capfd):
    shapes.prepare(tmp_path, names=["digits"])
    assert (tmp_path / "digits").exists() and not (tmp_path / "shapes").exists()
    captured = capfd.readouterr()
    assert captured.out == "" and "it/s" not in captured.err


def _read(builder, split):
    examples = list(tfds.as_numpy(builder.as_dataset(split=split, as_supervised=True)))
    images, labels = zip(*examples, strict=True)
    return np.stack(images), np.array(labels)

"""Data sets as Keras's fit takes them."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.data import Augmentation, sources
from etfzoo.data.pipeline import Pipeline
from etfzoo.errors import EtfzooError
from testing import make_image_folder, smooth_image

SIZES = {"ant": 13, "bee": 9, "cat": 11}
SHAPE = (12, 16, 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return f"folder:{make_image_folder(tmp_path_factory.mktemp('photos'), SIZES, (20, 30))}"


def classifier(**changes):
    """What `load` asks of a classifier."""
    known = {"input_shape": SHAPE, "crop": 0.9, "head": "etf", "num_classes": 3}
    return types.SimpleNamespace(
        spec=types.SimpleNamespace(**known | {"class_names": None} | changes)
    )


def read(batches):
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_evaluation_has_each_image_once_as_preprocess_gives_it(tmp_path):
    paths = []
    for name in SIZES:
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            paths.append(tmp_path / "test" / name / f"{i}.png")
            keras.utils.save_img(paths[-1], smooth_image(20, 30, i), scale=False)
            keras.utils.save_img(tmp_path / "train" / name / f"{i}.png", smooth_image(9, 9, i))
    model = classifier(class_names=tuple(SIZES))
    data = etfzoo.data.load(f"folder:{tmp_path}", "test", model, batch_size=4)
    assert data.class_names == tuple(SIZES) and len(data) == 3
    assert data.element_spec[0].dtype == tf.float32 and data.element_spec[1].dtype == tf.int32
    found = read(data)
    images, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.testing.assert_array_equal(images, etfzoo.preprocess(model, paths))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert_same(read(data), found)


def test_each_pass_of_training_is_the_next_epoch_of_the_pipeline(photos):
    augmentation = Augmentation("shift", flip=False)
    data = etfzoo.data.load(
        photos, "train", classifier(), batch_size=5, training=True, seed=3,
        augmentation=augmentation,
    )  # fmt: skip
    pipeline = Pipeline(sources.resolve(photos), 12, 16, 0.9, 5, augmentation, 3)
    size = pipeline.size("train")
    assert size % 5 and len(data) == size // 5
    first, second = read(data), read(data)
    for epoch, found in enumerate((first, second)):
        assert_same(found, read(pipeline.training("train", epoch)))
    assert not np.array_equal(first[0][0], second[0][0])
    repeated = etfzoo.data.load(
        photos, "train", classifier(), batch_size=5, training=True, seed=3,
        augmentation=augmentation,
    ).repeat(2)  # fmt: skip
    assert_same(read(repeated), first + second)


def test_fit_sees_another_epoch_each_time(photos):
    seen = []

    class Watch(keras.Model):
        def call(self, images):
            tf.py_function(lambda x: seen.append(x.numpy().sum()), [images], [])
            return images[:, 0, 0]

    model = Watch()
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = etfzoo.data.load(photos, "train", image_size=8, batch_size=9, training=True)
    history = model.fit(
        data, epochs=3, verbose=0, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, validation_data=data
    )
    assert len(history.history["loss"]) == 3
    assert len(set(seen)) == len(seen) >= 3 * 2 * len(data)


@pytest.mark.parametrize(
    "model, image_size, size",
    [
        (classifier(), None, (12, 16)),
        (classifier(), (7, 9), (7, 9)),
        (classifier().spec, None, (12, 16)),
        (keras.Sequential([keras.Input((6, 5, 3)), keras.layers.Flatten()]), None, (6, 5)),
        (classifier(input_shape=(None, None, 3)), 11, (11, 11)),
    ],
)
def test_image_sizes(photos, model, image_size, size):
    data = etfzoo.data.load(photos, "test", model, image_size)
    assert next(iter(data))[0].shape[1:] == (*size, 3)


def test_mirroring_is_left_out_where_it_changes_the_class(embedded_dir):
    found = etfzoo.data.load(
        "digits", "train", image_size=8, batch_size=20, training=True, data_dir=embedded_dir
    )
    source = sources.resolve("digits", embedded_dir)
    pipeline = Pipeline(source, 8, 8, 0.875, 20, Augmentation(flip=False), 0)
    assert_same(read(found.take(2)), read(pipeline.training("train", 0).take(2)))
    assert etfzoo.data.class_names("digits", embedded_dir) == tuple("0123456789")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give a model or an image_size"),
        ({"image_size": 0}, "image_size must be pixels, or .*got 0"),
        ({"image_size": (8, 8, 3)}, "image_size must be pixels"),
        ({"image_size": 8, "batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"image_size": 8, "batch_size": True}, "batch_size must be a positive integer"),
        ({"model": classifier(input_shape=(None, 8, 3))}, "has no image size; give image_size"),
        ({"model": keras.Sequential([])}, "has no image size"),
        ({"image_size": 8, "split": "tset"}, "no split 'tset'"),
        (
            {"image_size": 8, "training": True, "batch_size": 99},
            "split train of .* has 26 images, fewer than one batch; pass batch_size=6 or less",
        ),
        ({"model": classifier(num_classes=4)}, "has 4 classes and .* 3 classes .ant, bee, cat.: "),
        ({"model": classifier(class_names=("cat", "bee", "ant"))}, "3 classes .cat, bee, ant. and"),
    ],
)
def test_bad_input_is_one_line(photos, options, message):
    with pytest.raises(EtfzooError, match=message) as caught:
        etfzoo.data.load(photos, **{"split": "train"} | options)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_read(tmp_path):
    make_image_folder(tmp_path, {"ant": 5, "bee": 5})
    (tmp_path / "ant" / "000.png").write_bytes(b"no image")
    name = f"folder:{tmp_path}"
    kept = {
        split: sum(len(y) for _, y in etfzoo.data.load(name, split, None, 8, skip_corrupt=True))
        for split in ("train", "test")
    }
    assert sum(kept.values()) == 9

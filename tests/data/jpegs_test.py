"""The reader without branches, of data sets that say that their images are JPEGs."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from etfzoo.data import augment, decoding
from etfzoo.data.augmentation import CROPS, Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.readable import readable
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from testing import claiming, smooth_image

SIDE = 24


def encode(suffix, mode="RGB", height=50, width=61, seed=0, **options):
    noise = np.random.default_rng(seed).normal(smooth_image(height, width, seed), 20)
    file = io.BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert(mode).save(file, suffix, **options)
    return file.getvalue()


FILES = {
    "JPEG": encode("JPEG"),
    "grey": encode("JPEG", "L"),
    "CMYK": encode("JPEG", "CMYK"),
    "progressive": encode("JPEG", progressive=True),
    "whole colours": encode("JPEG", subsampling=0),
    "large": encode("JPEG", height=400, width=300),
    "one pixel": encode("JPEG", height=1, width=1),
    "PNG": encode("PNG"),
    "grey PNG": encode("PNG", "L"),
    "PNG of a palette": encode("PNG", "P"),
    "PNG of one pixel": encode("PNG", height=1, width=1),
}


def reader(jpegs, crop, erasing=0.0):
    augmentation = Augmentation(crop, random_erasing=erasing)
    return tf.function(
        lambda encoded, key: (
            augment.training_image(encoded, key, SIDE, SIDE, augmentation, 0.875, jpegs),
            augment.evaluation_image(encoded, SIDE, SIDE, 0.875, jpegs),
        ),
        input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)],
    )


@pytest.mark.parametrize("crop", CROPS)
def test_the_pixels_are_those_of_the_reader_of_any_format(crop):
    fast, plain = reader(True, crop), reader(False, crop)
    for name, encoded in FILES.items():
        for number in range(6):
            found, wanted = fast(encoded, [3, number]), plain(encoded, [3, number])
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)


def test_regions():
    for name, encoded in FILES.items():
        size, read = decoding.opened(tf.constant(encoded), jpegs=True)
        np.testing.assert_array_equal(size, decoding.image_size(encoded))
        for region in ([0, 0, *size.numpy()], [*(size.numpy() // 2), 1, 1]):
            for fast in (False, True):
                wanted = decoding.decode_region(encoded, region, fast)
                np.testing.assert_array_equal(read(tf.constant(region), fast), wanted, name)


@pytest.mark.parametrize(
    "encoded, message",
    [
        (encode("GIF"), "a data set of JPEGs has an image that is no JPEG or PNG"),
        (encode("BMP"), "a data set of JPEGs has an image that is no JPEG or PNG"),
        (b"", "a data set of JPEGs has an image that is no JPEG or PNG"),
        (b"not an image", "a data set of JPEGs has an image that is no JPEG or PNG"),
        (FILES["JPEG"][:3], "Invalid JPEG"),
        (claiming(FILES["JPEG"], 2**13, 2**13 + 1), "are its height, width and passes"),
        (claiming(FILES["PNG"], 2**13, 2**13 + 1), "are its height, width and passes"),
        (claiming(FILES["PNG"], 0, 8), "are its height, width and passes"),
    ],
)
def test_what_is_refused(encoded, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        reader(True, "none")(encoded, [0, 0])


def tfds_folder(path, images):
    """A data set whose features say JPEG, whatever the images are."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
    )
    columns = {"image": images, "label": np.arange(len(images)) % 2}
    records = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="photographs",
        version="1.0.0",
        features=features,
        split_datasets={"train": records, "test": records},
        data_dir=path,
    )
    return resolve(str(path / "photographs"))


def photographs(count=12):
    return [encode("JPEG", height=30 + n, width=60 - n, seed=n) for n in range(count)]


def test_a_data_set_of_jpegs_with_a_png_among_them(tmp_path, monkeypatch, embedded_dir):
    source = tfds_folder(tmp_path, [*photographs(), FILES["PNG"], FILES["grey PNG"]])
    assert source.jpegs and readable(source).jpegs
    assert not resolve("digits", embedded_dir).jpegs

    def batches():
        pipeline = Pipeline(source, SIDE, SIDE, 0.875, 7, Augmentation(), seed=1)
        train = [images for images, _ in pipeline.training("train", 2).as_numpy_iterator()]
        test = [images for images, _ in pipeline.evaluation("train").as_numpy_iterator()]
        return np.concatenate(train), np.concatenate(test)

    found = batches()
    monkeypatch.setattr(type(source), "jpegs", False)
    for one, other in zip(found, batches(), strict=True):
        assert len(one) == 14
        np.testing.assert_array_equal(one, other)


def test_another_format_is_named_in_one_line_and_can_be_left_out(tmp_path):
    source = tfds_folder(tmp_path, [*photographs(), encode("GIF")])
    pipeline = Pipeline(source, SIDE, SIDE, 0.875, 13, Augmentation(), seed=1)
    with pytest.raises(EtfzooError, match="train.*is not a readable image .a data set of JPEGs"):
        with pipeline.naming_corrupt_records("train", 0):
            list(pipeline.training("train", 0))
    assert readable(source).size("train") == 12

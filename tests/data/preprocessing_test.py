"""Tests of preprocessing and of labels."""

import io
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import etfzoo
from etfzoo.data import augment
from etfzoo.models.classifier import ClassifierSpec
from testing import smooth_image

NAMES = ("ant", "bee", "cat")


class Spec:
    """All that both functions look at; a network is not needed."""

    def __init__(self, **changes):
        values = {"backbone": "rn18", "num_classes": 3, "class_names": NAMES}
        self.spec = ClassifierSpec(**(values | {"input_shape": (16, 24, 3), "crop": 0.9} | changes))


MODEL = Spec()
SHAPES = [(40, 56), (56, 40), (16, 24), (7, 9), (1, 1), (300, 3)]


def encoded(image, suffix="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, suffix)
    return file.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_images_take_the_path_of_evaluation(shape, tmp_path):
    image = smooth_image(*shape)
    wanted = augment.evaluation_image(encoded(image), 16, 24, 0.9).numpy()
    (tmp_path / "image.png").write_bytes(encoded(image))
    for given in (
        image,
        image.astype("float32"),
        image.astype("float64"),
        tf.constant(image),
        keras.ops.convert_to_tensor(image.astype("float32")),
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        image[None],
        [image],
        (Image.fromarray(image),),
    ):
        batch = etfzoo.preprocess(MODEL, given)
        assert batch.dtype == np.float32 and batch.shape == (1, 16, 24, 3)
        np.testing.assert_array_equal(batch[0], wanted)


def test_jpeg_files_take_the_path_of_evaluation(tmp_path):
    content = encoded(smooth_image(90, 61), "JPEG")
    (tmp_path / "image.jpg").write_bytes(content)
    wanted = augment.evaluation_image(content, 16, 24, 0.9)
    np.testing.assert_array_equal(etfzoo.preprocess(MODEL, tmp_path / "image.jpg")[0], wanted)


def test_several_images_of_different_kinds_and_sizes(tmp_path):
    images = [smooth_image(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    alone = np.concatenate([etfzoo.preprocess(MODEL, image) for image in images])
    (tmp_path / "0.png").write_bytes(encoded(images[0]))
    mixed = [tmp_path / "0.png", *images[1:3], Image.fromarray(images[3]), *images[4:]]
    np.testing.assert_array_equal(etfzoo.preprocess(MODEL, mixed), alone)
    same = np.stack([smooth_image(20, 30, seed=i) for i in range(3)])
    assert etfzoo.preprocess(MODEL, tf.constant(same)).shape == (3, 16, 24, 3)
    np.testing.assert_array_equal(
        etfzoo.preprocess(MODEL, same), etfzoo.preprocess(MODEL, list(same))
    )


def test_iterables_of_images(tmp_path):
    images = [smooth_image(20, 30, seed=i) for i in range(3)]
    wanted = etfzoo.preprocess(MODEL, images)
    paths = []
    for i, image in enumerate(images):
        paths.append(str(tmp_path / f"{i}.png"))
        (tmp_path / f"{i}.png").write_bytes(encoded(image))
    objects = np.empty(3, object)
    objects[:] = [images[0], paths[1], Image.fromarray(images[2])]
    for given in (
        np.array(paths),
        np.array(paths, object),
        objects,
        (image for image in images),
        map(Image.fromarray, images),
        tf.data.Dataset.from_tensor_slices(images),
    ):
        np.testing.assert_array_equal(etfzoo.preprocess(MODEL, given), wanted)


def test_inside_of_tf_data_it_says_what_to_write():
    images = [smooth_image(20, 30, seed=i) for i in range(2)]
    dataset = tf.data.Dataset.from_tensor_slices(images)
    for given in (dataset, dataset.batch(2), dataset.padded_batch(2)):
        with pytest.raises(Exception, match="write tf.numpy_function"):
            given.map(lambda image: etfzoo.preprocess(MODEL, image))
    with pytest.raises(etfzoo.EtfzooError, match="KerasTensor, has no values here"):
        etfzoo.preprocess(MODEL, keras.Input((20, 30, 3)))

    def said(image):
        return tf.numpy_function(lambda i: etfzoo.preprocess(MODEL, i), [image], tf.float32)

    (found,) = dataset.batch(2).map(said)
    np.testing.assert_array_equal(found, etfzoo.preprocess(MODEL, images))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_is_the_same_by_path_and_from_pillow(order, tmp_path):
    grey = (smooth_image(40, 56)[..., 0].astype(order) * 257).astype(order)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    by_path = etfzoo.preprocess(MODEL, tmp_path / "grey.png")
    assert 50 < by_path.mean() < 200
    opened = Image.open(tmp_path / "grey.png")
    assert opened.mode.startswith("I;16")
    for given in (opened, Image.fromarray(grey)):
        np.testing.assert_array_equal(etfzoo.preprocess(MODEL, given), by_path)


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with pytest.raises(etfzoo.EtfzooError, match="fifo.jpg cannot be read: it is no regular file"):
        etfzoo.preprocess(MODEL, tmp_path / "fifo.jpg")
    with pytest.raises(etfzoo.EtfzooError, match="/dev/zero cannot be read: it is no regular file"):
        etfzoo.preprocess(MODEL, "/dev/zero")
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(encoded(smooth_image(20, 30)))
    assert etfzoo.preprocess(MODEL, os.fsdecode(name)).shape == (1, 16, 24, 3)


def test_floats_are_not_cut_to_bytes_before_they_are_resized():
    image = np.full((20, 30, 3), 99.5, np.float32)
    image[:, 15:] = 100.5
    batch = etfzoo.preprocess(MODEL, image)
    assert set(np.unique(batch)) <= {100.0, 101.0, 99.0}
    assert etfzoo.preprocess(MODEL, np.zeros((9, 9, 3), "float32")).max() == 0


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "there is no image"),
        (np.zeros((0, 8, 8, 3), np.uint8), "there is no image"),
        (np.zeros((8, 8), np.uint8), r"image 0 has the shape \[8, 8\]; it must be \[height, wid"),
        (np.zeros((8, 8, 1), np.uint8), r"shape \[8, 8, 1\]"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \[8, 8, 4\]"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \[0, 8, 3\]"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], r"shape \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.int64), "image 0 has the type int64"),
        (np.zeros((8, 8, 3), bool), "the type bool"),
        (np.zeros((8, 8, 3), complex), "the type complex128"),
        (np.full((8, 8, 3), 256.0), "values from 256 to 256; they must lie in 0..255"),
        (np.full((8, 8, 3), -1.0), "values from -1 to -1"),
        (np.full((8, 8, 3), np.nan), "must lie in 0..255"),
        (np.full((8, 8, 3), np.inf), "must lie in 0..255"),
        (np.full((8, 8, 3), 0.7), "largest value of image 0 is 0.7: multiply it by 255"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros(8)], "image 1 has the shape"),
        (b"bytes", "image 0 is encoded"),
        (None, "image 0 is a NoneType; give an array"),
        (object(), "image 0 is a object; give an array"),
        ("no/such/file.jpg", "no/such/file.jpg cannot be read: No such file"),
        ("/", "/ cannot be read: it is no regular file"),
        ("", "'' is no path"),
        ("\0", "is no path"),
        ("~nobody-of-this-name/x", "no home folder is known for ~nobody-of-this-name"),
        ({}, "there is no image"),
        ([b"x"], "image 0 is encoded"),
        (np.array([b"x"], object), "image 0 is encoded"),
        (Image.new("F", (9, 9)), "PIL image of mode F, whose values have no range"),
        (Image.new("I", (9, 9)), "PIL image of mode I, whose values have no range"),
        (Image.open(io.BytesIO(encoded(smooth_image(9, 9))[:80])), "image 0 cannot be decoded"),
        (__file__, "preprocessing_test.py is no image that can be read"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(etfzoo.EtfzooError, match=message) as error:
        etfzoo.preprocess(MODEL, images)
    assert "\n" not in str(error.value)


def test_a_model_of_any_size():
    with pytest.raises(etfzoo.EtfzooError, match="has no image size; load it with"):
        etfzoo.preprocess(Spec(input_shape=(None, None, 3)), np.zeros((8, 8, 3), np.uint8))


def test_predictions_of_logits():
    logits = np.log([[0.2, 0.7, 0.1], [0.25, 0.25, 0.5]]) + 3
    first, second = etfzoo.decode_predictions(MODEL, logits, top=2)
    assert [(i, name) for i, name, _ in first] == [(1, "bee"), (0, "ant")]
    np.testing.assert_allclose([s for *_, s in first], [0.7, 0.2])
    assert [i for i, *_ in second] == [2, 0]  # the lower number first where they are equal
    assert isinstance(first[0][0], int) and isinstance(first[0][2], float)
    for given in (tf.constant(logits), logits.astype("float32"), logits.tolist()):
        found = etfzoo.decode_predictions(MODEL, given)
        assert [len(row) for row in found] == [3, 3] and found[0][0][:2] == (1, "bee")
    assert etfzoo.decode_predictions(MODEL, logits[0], top=2) == [first]
    (huge,) = etfzoo.decode_predictions(MODEL, [[1e4, -1e4, 0]])
    assert [s for *_, s in huge] == [1, 0, 0]


def test_predictions_of_probabilities():
    shares = np.array([[0.2, 0.7, 0.1]])
    (row,) = etfzoo.decode_predictions(MODEL, shares, top=1, from_logits=False)
    assert row == [(1, "bee", 0.7)]
    unnamed = Spec(class_names=None)
    assert etfzoo.decode_predictions(unnamed, shares, 1, from_logits=False) == [[(1, "1", 0.7)]]


@pytest.mark.parametrize(
    "model, outputs, options, message",
    [
        (MODEL, [[0.2, 0.7, 0.1]], {}, "look like probabilities: pass from_logits=False"),
        (MODEL, [[2.0, 7, 1]], {"from_logits": False}, "are no probabilities: leave out"),
        (MODEL, [[2.0, 7]], {}, r"must be \[N, 3\] for this model; got \[1, 2\]"),
        (MODEL, np.zeros((1, 2, 3)), {}, r"got \[1, 2, 3\]"),
        (MODEL, [[np.nan, 1, 2]], {}, "must be finite"),
        (MODEL, [[3.0, 1, 2]], {"top": 0}, "top must be a positive integer"),
        (Spec(head=None, num_classes=None, class_names=None), [[1.0]], {}, "has no head"),
    ],
)
def test_bad_predictions(model, outputs, options, message):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        etfzoo.decode_predictions(model, outputs, **options)


def test_from_an_image_to_labels():
    model = etfzoo.build_classifier(
        "rn18", 3, head="linear", input_shape=(32, 32, 3), class_names=NAMES
    )
    logits = model(etfzoo.preprocess(model, [smooth_image(50, 40), smooth_image(30, 90, seed=1)]))
    rows = etfzoo.decode_predictions(model, logits)
    assert len(rows) == 2 and all(sum(s for *_, s in row) == pytest.approx(1) for row in rows)

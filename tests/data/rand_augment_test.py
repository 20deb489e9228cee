"""RandAugment: each operation against Pillow, and the draws."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from etfzoo.data import augment, rand_augment
from etfzoo.data.augmentation import CROPS, Augmentation
from testing import smooth_image

FACTORS = (0.1, 0.37, 0.91, 1.0, 1.09, 1.63, 1.9)
ANGLES = (-30.0, -21.0, -3.0, 0.0, 9.0, 30.0)


def images():
    """Noise, a smooth image, little contrast, one colour, few colours, and two of odd sizes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 52, 3), np.uint8)
    flat = np.full((16, 16, 3), 77, np.uint8)
    spot = flat.copy()
    spot[3, 4] = (78, 0, 255)
    return [
        noise,
        smooth_image(61, 45, seed=1),
        60 + smooth_image(32, 32, seed=2) // 8,
        flat,
        spot,
        noise[:17, :3],
        noise[:3, :3],
    ]


def apply(operation, image, *arguments, **keywords):
    result = operation(tf.constant(image, tf.float32), *arguments, **keywords).numpy()
    assert result.dtype == np.float32 and result.shape == image.shape
    whole = result.astype(np.uint8)
    np.testing.assert_array_equal(whole, result)  # whole numbers in 0..255
    return whole


def pillow(operation, image, *arguments):
    return np.asarray(operation(Image.fromarray(image), *arguments))


@pytest.mark.parametrize("number", range(len(images())))
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histogram_operations_equal_pillow(name, number):
    image = images()[number]
    expected = pillow(getattr(ImageOps, name), image)
    np.testing.assert_array_equal(apply(getattr(rand_augment, name), image), expected)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histogram_operations_equal_pillow_on_many_random_images(name):
    rng = np.random.default_rng(1)
    for _ in range(60):
        low, high = sorted(rng.integers(0, 257, 2))
        shape = (*rng.integers(1, 40, 2), 3)
        image = rng.integers(low, max(high, low + 1), shape).astype(np.uint8)
        expected = pillow(getattr(ImageOps, name), image)
        np.testing.assert_array_equal(apply(getattr(rand_augment, name), image), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_equals_pillow(bits):
    for image in images():
        expected = pillow(ImageOps.posterize, image, bits)
        np.testing.assert_array_equal(apply(rand_augment.posterize, image, bits), expected)


@pytest.mark.parametrize("threshold", [0, 1, 76.8, 77, 128, 255, 256])
def test_solarize_equals_pillow(threshold):
    for image in images():
        expected = pillow(ImageOps.solarize, image, threshold)
        np.testing.assert_array_equal(apply(rand_augment.solarize, image, threshold), expected)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_equal_pillow(name, factor):
    for image in images():
        expected = np.asarray(getattr(ImageEnhance, name)(Image.fromarray(image)).enhance(factor))
        found = apply(getattr(rand_augment, name.lower()), image, factor)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 2)])
def test_sharpness_of_a_few_pixels_changes_nothing(shape):
    image = tf.constant(np.random.default_rng(0).integers(256, size=(*shape, 3)), tf.float32)
    np.testing.assert_array_equal(rand_augment.sharpness(image, 1.9), image)


def assert_same_but_for_ties(image, found, matrix):
    """Compares a transformed image with Pillow's of `matrix`, as `Image.transform` takes it.

    Where the place lies within 1/1000 of the border of two pixels either of them is right.
    """
    height, width = image.shape[:2]
    expected = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST,
        fillcolor=(128, 128, 128),
    )  # fmt: skip
    y, x = np.mgrid[:height, :width] + 0.5
    a, b, c, d, e, f = matrix
    places = np.stack([a * x + b * y + c, d * x + e * y + f])
    clear = (np.abs(places - np.rint(places)) > 1e-3).all(0)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], np.asarray(expected)[clear])


@pytest.mark.parametrize("amount", [-0.3, -0.21, 0.0, 0.011, 0.3])
def test_shear_equals_pillow(amount):
    for image in images():
        x = apply(rand_augment.shear, image, x=amount)
        assert_same_but_for_ties(image, x, (1, amount, 0, 0, 1, 0))
        y = apply(rand_augment.shear, image, y=amount)
        assert_same_but_for_ties(image, y, (1, 0, 0, amount, 1, 0))


@pytest.mark.parametrize("degrees", ANGLES)
def test_rotate_equals_pillow(degrees):
    for image in images():
        height, width = image.shape[:2]
        angle = np.deg2rad(degrees)
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = width / 2, height / 2
        matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        found = apply(rand_augment.rotate, image, degrees)
        if min(height, width) > 3:  # in tiny ones many places lie on borders
            assert_same_but_for_ties(image, found, matrix)
        # Pillow's own matrix of that angle, and the direction.
        turned = Image.fromarray(image).rotate(degrees, fillcolor=(128, 128, 128))
        assert (found == np.asarray(turned)).all(-1).mean() > 0.97


@pytest.mark.parametrize("share", [-0.45, -0.1, 0.0, 0.2, 0.45])
def test_translate_moves_whole_pixels(share):
    for image in images():
        height, width = image.shape[:2]
        shift = round(np.float32(share) * np.float32(width))
        padded = np.pad(image, [(0, 0), (width, width), (0, 0)], constant_values=128)
        expected = padded[:, width + shift :][:, :width]
        np.testing.assert_array_equal(apply(rand_augment.translate, image, x=share), expected)
        swapped = apply(rand_augment.translate, image.swapaxes(0, 1), y=share)
        np.testing.assert_array_equal(swapped.swapaxes(0, 1), expected)


def test_every_operation_grows_with_the_magnitude():
    image = 60 + smooth_image(48, 48, seed=3) // 2 + images()[0][:1, :48] // 16
    unchanging = {"identity", "autocontrast", "equalize"}
    for sign in (1.0, -1.0):
        changes = {}
        for magnitude in (0, 2.5, 5, 10):
            for name, operation in rand_augment.operations(magnitude).items():
                difference = apply(operation, image, sign).astype(int) - image
                changes.setdefault(name, []).append(np.abs(difference).mean())
        assert len(changes) == 14
        for name, change in changes.items():
            if name not in unchanging:
                assert change[0] == 0 and change == sorted(change) and change[-1] > 0.5, name


def test_operations_are_drawn_evenly_and_by_the_key_alone(monkeypatch):
    names = list(rand_augment.operations(5))

    def recording(magnitude):
        def operation(number):
            return lambda image, sign: image * 100 + 2 * number + (sign + 1) / 2

        return {name: operation(number) for number, name in enumerate(names)}

    monkeypatch.setattr(rand_augment, "operations", recording)
    draw = tf.function(lambda key: rand_augment.rand_augment(tf.zeros([1, 1, 1]), key, 5.0))
    keys = [tf.constant([5, n]) for n in range(1000)]
    drawn = [int(draw(key)[0, 0, 0]) for key in keys]
    assert [int(draw(key)[0, 0, 0]) for key in reversed(keys)] == drawn[::-1]
    first, second = np.array(drawn) // 100, np.array(drawn) % 100
    counts = np.bincount(np.concatenate([first, second]))
    assert len(counts) == 28 and counts.min() > 40 and counts.max() < 110  # 71 expected
    both = np.histogram2d(first // 2, second // 2, bins=(range(15), range(15)))[0]
    assert (both > 0).mean() > 0.95  # all pairs: 5 expected of each
    other = [int(draw(tf.constant([6, n]))[0, 0, 0]) for n in range(100)]
    assert np.mean(np.array(other) == drawn[:100]) < 0.2


def test_compiled_it_does_the_same():
    image = tf.constant(images()[0], tf.float32)
    compiled = tf.function(lambda key: rand_augment.rand_augment(image, key, 9.0))
    for number in range(60):
        key = tf.constant([7, number])
        expected = rand_augment.rand_augment(image, key, 9.0)
        np.testing.assert_array_equal(compiled(key), expected)


def test_training_images_are_augmented_after_crop_and_flip():
    encoded = tf.io.encode_png(smooth_image(60, 50))
    key = tf.constant([1, 2])
    for crop in CROPS:
        plain = augment.training_image(encoded, key, 32, 24, Augmentation(crop), 0.9)
        strong = Augmentation(crop, rand_augment=9.0)
        found = augment.training_image(encoded, key, 32, 24, strong, 0.9)
        expected = rand_augment.rand_augment(plain, key, 9.0)
        np.testing.assert_array_equal(found, expected)
        assert found.shape == (32, 24, 3)
    changed = 0
    for number in range(20):
        key = tf.constant([3, number])
        found = augment.training_image(encoded, key, 32, 24, strong, 0.9).numpy()
        np.testing.assert_array_equal(found, np.clip(np.rint(found), 0, 255))
        plain = augment.training_image(encoded, key, 32, 24, Augmentation(crop), 0.9)
        changed += not np.array_equal(found, plain)
    assert changed >= 15


@pytest.mark.parametrize("magnitude", [-1, 10.5])
def test_a_magnitude_out_of_range_is_refused(magnitude):
    with pytest.raises(ValueError, match="rand_augment must be between 0 and 10"):
        Augmentation(rand_augment=magnitude)

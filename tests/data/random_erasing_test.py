"""Random erasing: what is drawn against torchvision's rules, and what becomes of the pixels."""

import importlib.util
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from etfzoo.data import augment, random_erasing
from etfzoo.data.augmentation import CROPS, Augmentation
from etfzoo.errors import EtfzooError
from testing import fresh_python, smooth_image

COUNT = 4000


def erased(height, width, probability=1.0, count=COUNT, seed=0):
    """Windows of as many keys, `[count, 4]`."""
    keys = tf.constant(np.stack([np.full(count, seed), np.arange(count)], 1), tf.int32)
    numbers = tf.map_fn(random_erasing.random_numbers, keys, fn_output_signature=tf.float32)
    numbers = tf.ensure_shape(numbers, [count, random_erasing.TRIES + 2, 2])
    return random_erasing.erased_window(numbers, height, width, probability).numpy()


def by_torchvisions_rules(height, width, count=COUNT, seed=1):
    """top, left, height and width of RandomErasing with the paper's limits, `[count, 4]`."""
    rng = np.random.default_rng(seed)

    def window():
        for _ in range(10):
            area = height * width * rng.uniform(0.02, 1 / 3)
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
        return 0, 0, 0, 0

    return np.array([window() for _ in range(count)])


def with_sizes(windows):
    """Top, left, height and width of top, left, bottom and right."""
    return np.concatenate([windows[:, :2], windows[:, 2:] - windows[:, :2]], 1)


@pytest.mark.parametrize("height, width", [(224, 224), (64, 64), (96, 200), (200, 96), (8, 90)])
def test_rectangles_are_distributed_as_torchvision_draws_them(height, width):
    ours, theirs = with_sizes(erased(height, width)), by_torchvisions_rules(height, width)
    for some in (ours, theirs):
        assert (some >= 0).all() and (some[:, :2] + some[:, 2:] <= (height, width)).all()
        assert (some[:, 2:] < (height, width)).all()

    def measured(w):
        yield w[:, 2:].prod(1) == 0  # nothing is erased
        w = w[w[:, 2:].prod(1) > 0]
        places = (w[:, :2] + 0.5) / ((height, width) - w[:, 2:] + 1)
        yield w[:, 2] * w[:, 3] / (height * width)
        yield w[:, 2] / w[:, 3]
        yield from places.T

    for one, other in zip(measured(ours), measured(theirs), strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-4


def test_areas_and_places_have_their_laws():
    w = with_sizes(erased(1000, 1000))
    fits = w[:, 2:].prod(1) > 0
    assert fits.all()
    area, ratio = w[:, 2] * w[:, 3] / 1e6, np.log(w[:, 2] / w[:, 3])
    assert stats.kstest(area, stats.uniform(0.02, 1 / 3 - 0.02).cdf).pvalue > 1e-4
    low, high = math.log(0.3), math.log(3.3)
    # Where all areas fit, as a ratio r does with area / r and area r below 1.
    assert stats.kstest(ratio, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    for places in ((w[:, :2] + 0.5) / (1001 - w[:, 2:])).T:
        assert stats.kstest(places, stats.uniform.cdf).pvalue > 1e-4
    assert abs(stats.spearmanr(area, ratio).statistic) < 0.08


_TORCHVISION = """
import json, sys, torch
from torchvision.transforms import RandomErasing
torch.manual_seed(0)
image = torch.zeros(3, 96, 120)
draw = lambda: RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3), [0.0])[:4]
print(json.dumps([draw() for _ in range(4000)]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
def test_rectangles_are_distributed_as_those_of_torchvision_itself():
    # In a process of its own: torch and TensorFlow do not always get on in one.
    theirs = np.array(json.loads(fresh_python(_TORCHVISION)))
    theirs = theirs[(theirs[:, 2:] < (96, 120)).all(1)]  # the whole image: nothing is erased
    ours = with_sizes(erased(96, 120))
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_its_probability(probability):
    always, found = erased(64, 64), erased(64, 64, probability)
    some = found.any(1)
    assert abs(some.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / COUNT)
    np.testing.assert_array_equal(found[some], always[some])  # what, and whether: apart
    areas = [with_sizes(always[which])[:, 2:].prod(1) for which in (some, ~some)]
    assert stats.ks_2samp(*areas).pvalue > 1e-4


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 2), (3, 200)])
def test_tiny_and_long_images(height, width):
    w = with_sizes(erased(height, width, count=200))
    assert (w >= 0).all() and (w[:, :2] + w[:, 2:] <= (height, width)).all()
    assert ((w[:, 2:] < (height, width)) | (w[:, 2:] == 0)).all()


def test_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 57, 3)).astype(np.float32)
    for window in erased(40, 57, 0.7, count=30):
        top, left, bottom, right = window
        wanted = image.copy()
        wanted[top:bottom, left:right] = (124, 0, 255)
        found = random_erasing.erase(tf.constant(image), tf.constant(window), (124, 0, 255))
        np.testing.assert_array_equal(found, wanted)


def training_images(augmentation, count, seed=0):
    encoded = tf.io.encode_png(smooth_image(50, 60))
    draw = tf.function(
        lambda key: augment.training_image(encoded, key, 24, 32, augmentation, 0.875)
    )
    return np.stack([draw(tf.constant([seed, number])) for number in range(count)])


@pytest.mark.parametrize("crop", CROPS)
def test_all_else_is_as_without_it(crop):
    plain = training_images(Augmentation(crop, rand_augment=4.0), 40)
    found = training_images(
        Augmentation(crop, rand_augment=4.0, random_erasing=0.5, mean=(1.4, 2.6, 300 / 2)), 40
    )
    changed = (found != plain).any(3)
    assert 10 < changed.any((1, 2)).sum() < 30
    assert (found[changed] == (1, 3, 150)).all()  # after RandAugment, and rounded
    for number, window in enumerate(erased(24, 32, 0.5, count=40)):
        top, left, bottom, right = window
        inside = np.zeros((24, 32), bool)
        inside[top:bottom, left:right] = True
        assert not changed[number][~inside].any()


def test_it_is_a_function_of_the_key():
    erasing = Augmentation("none", flip=False, random_erasing=1.0)
    images = training_images(erasing, 20)
    np.testing.assert_array_equal(training_images(erasing, 20), images)
    assert len({image.tobytes() for image in images}) == 20
    other = training_images(erasing, 20, seed=1)
    assert (other != images).any((1, 2, 3)).sum() >= 19


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_refused(probability):
    with pytest.raises(EtfzooError, match="random_erasing must be between 0 and 1; got"):
        Augmentation(random_erasing=probability)

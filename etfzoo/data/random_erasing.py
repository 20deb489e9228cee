"""Random erasing as pure TensorFlow functions of a stateless key.

Zhong et al., "Random Erasing Data Augmentation", AAAI 2020: a rectangle of an image is filled. It
is drawn as torchvision's RandomErasing and timm's draw theirs, after all else is done to the image.
"""

import math

import numpy as np
import tensorflow as tf

TRIES = 10  # draws of a rectangle until one is smaller than the image
AREAS = (0.02, 1 / 3)  # of the image's
RATIOS = (0.3, 3.3)  # of height to width

_RANDOM_ERASING = 3  # tells the draws here from others of the same key


def random_numbers(key: tf.Tensor) -> tf.Tensor:
    """The random numbers of one image, of which `erased_window` makes the rectangle.

    Args:
        key: int `[2]`, the stateless seed of this image in this epoch.

    Returns:
        float32 `[TRIES + 2, 2]`: area and ratio of each try, the place, and whether any.
    """
    return tf.random.stateless_uniform([TRIES + 2, 2], tf.random.fold_in(key, _RANDOM_ERASING))


def erased_window(numbers: tf.Tensor, height: int, width: int, probability: float) -> tf.Tensor:
    """What is erased of images: nothing, or a rectangle.

    Its area is uniform in `AREAS` of the image's, the logarithm of its ratio of height to width
    uniform between those of `RATIOS`, its place uniform. Where in ten draws none is both lower and
    narrower than the image, nothing is erased.

    Args:
        numbers: of `random_numbers`, `[..., TRIES + 2, 2]`.
        height, width: of the images in pixels.
        probability: of a rectangle.

    Returns:
        int32 `[..., 4]`: top, left, bottom and right; all 0 for nothing.
    """
    tries, place, chance = numbers[..., :TRIES, :], numbers[..., TRIES, :], numbers[..., -1, :1]
    area = height * width * (AREAS[0] + (AREAS[1] - AREAS[0]) * tries[..., 0])
    low, high = map(math.log, RATIOS)
    root = tf.exp((low + (high - low) * tries[..., 1]) / 2)  # of height / width
    sizes = tf.round(tf.sqrt(area)[..., None] * tf.stack([root, 1 / root], -1))
    sides = tf.constant([height, width], tf.float32)
    fits = tf.reduce_all(sizes < sides, -1)
    first = tf.argmax(fits, -1, output_type=tf.int32)
    size = tf.gather(sizes, first, axis=-2, batch_dims=fits.shape.rank - 1)
    start = tf.floor(place * (sides - size + 1))
    erased = tf.reduce_any(fits, -1, keepdims=True) & (chance < probability)
    window = tf.concat([start, start + size], -1)
    return tf.cast(tf.where(erased, window, tf.zeros_like(window)), tf.int32)


def erase(image: tf.Tensor, window: tf.Tensor, fill: tuple[int, ...]) -> tf.Tensor:
    """An image `[H, W, 3]` with a window of `erased_window` filled with a colour."""
    top, left, bottom, right = tf.unstack(window)
    filled = tf.constant(np.broadcast_to(fill, image.shape), image.dtype)
    rows = image[top:bottom]
    rows = tf.concat([rows[:, :left], filled[top:bottom, left:right], rows[:, right:]], axis=1)
    # Copies alone, as a choice of pixels takes some ten times as long.
    return tf.ensure_shape(tf.concat([image[:top], rows, image[bottom:]], axis=0), image.shape)

"""Crops, sizes and augmentation as pure TensorFlow functions: the same inputs give the same pixels.

Every random draw takes a stateless key, so that an image depends on its key alone and neither on
the order nor on the number of threads.
"""

import math

import tensorflow as tf

from etfzoo.data import random_erasing
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.decoding import opened
from etfzoo.data.rand_augment import rand_augment

MAX_RATIO = 4 / 3  # of the longer to the shorter side of a resized crop
TRIES = 10  # draws of a resized crop until one fits into the image


def _resample(pixels, window, height, width):
    """A window at fractional places, resized with a triangle filter as wide as its pixels need.

    Args:
        pixels: `[H, W, 3]`.
        window: float `[4]`, top, left, height and width; the filter also reads pixels around it.
        height, width: target size in pixels.
    """
    # Both axes as rows: TensorFlow adds up whole rows at a time, but columns pixel by pixel. The
    # sums are those of one call for both, bit for bit.
    rows, columns = tf.unstack(tf.shape(pixels)[:2])
    pixels = tf.reshape(pixels, [rows, columns * 3])
    pixels = tf.reshape(_resample_rows(pixels, window[0::2], height), [height, columns, 3])
    pixels = tf.reshape(tf.transpose(pixels, [1, 0, 2]), [columns, height * 3])
    pixels = tf.reshape(_resample_rows(pixels, window[1::2], width), [width, height, 3])
    return tf.round(tf.transpose(pixels, [1, 0, 2]))


def _resample_rows(rows, window, count):
    """Rows `[N, M]` as `count` rows; the window is float `[2]`, first row and number of rows."""
    scale = count / window[1]
    return tf.raw_ops.ScaleAndTranslate(
        images=rows[None, :, None],
        size=[count, 1],
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([-window[0] * scale, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )[0, :, 0]


def _interpolate(pixels, height, width):
    """All pixels resized without a filter against aliasing."""
    image = tf.image.resize(pixels, [height, width], method="bilinear")
    return tf.round(tf.ensure_shape(image, [height, width, 3]))


def evaluation_image(
    encoded: tf.Tensor, height: int, width: int, crop: float, jpegs: bool = False
) -> tf.Tensor:
    """The deterministic image of evaluation and serving.

    What resizing with an antialiased bilinear filter and then cropping the centre shows, at a cost
    that very long images cannot blow up: the largest centred window of the target's aspect, shrunk
    by `crop`, at fractions of a pixel where it falls there. torchvision's Resize and CenterCrop
    round the sides and the origin to whole pixels in between, so that its window may lie up to half
    a target pixel beside this one.

    Args:
        encoded: scalar string. JPEGs are decoded exactly, see `etfzoo.data.decoding`.
        height, width: target size in pixels.
        crop: share of the shorter side that is kept, e.g. 0.875.
        jpegs: see `etfzoo.data.decoding.opened`.

    Returns:
        float32 `[height, width, 3]`, whole numbers in 0..255.
    """
    size, read = opened(encoded, jpegs)
    region, window = evaluation_window(size, height, width, crop)
    pixels = read(region)
    return _resample(pixels, _inside(window, region), height, width)


def evaluation_pixels(image: tf.Tensor, height: int, width: int, crop: float) -> tf.Tensor:
    """As `evaluation_image`, of a decoded image `[H, W, 3]` in 0..255."""
    region, window = evaluation_window(tf.shape(image)[:2], height, width, crop)
    top, left, rows, columns = tf.unstack(region)
    pixels = tf.slice(image, [top, left, 0], [rows, columns, 3])
    return _resample(pixels, _inside(window, region), height, width)


def _inside(window, region):
    """A window counted from the corner of a region."""
    return tf.concat([window[:2] - tf.cast(region[:2], tf.float32), window[2:]], 0)


def evaluation_window(
    shape: tf.Tensor, height: int, width: int, crop: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """What evaluation shows of an image, and the pixels that it reads for that.

    Args:
        shape: of the image, int32 `[..., H, W]`.
        height, width, crop: see `evaluation_image`.

    Returns:
        `region`: int32 `[..., 4]`, top, left, height and width of the window and of what the filter
        reads around it; `window`: float32 `[..., 4]`, the same of what is shown.
    """
    shape = tf.cast(shape, tf.float32)
    scale = crop * tf.reduce_min(shape / [float(height), float(width)], -1, keepdims=True)
    size = scale * [float(height), float(width)]
    start = (shape - size) / 2
    reach = tf.maximum(scale, 1.0)  # of the filter, to each side of the middle of a target pixel
    first = tf.maximum(tf.floor(start - reach), 0.0)
    last = tf.minimum(tf.math.ceil(start + size + reach), shape)
    region = tf.cast(tf.concat([first, last - first], -1), tf.int32)
    return region, tf.concat([start, size], -1)


def random_window(shape: tf.Tensor, numbers: tf.Tensor, min_area: float) -> tf.Tensor:
    """The window of a random resized crop, as torchvision's RandomResizedCrop draws it.

    Its area is uniform in `[min_area, 1]` of the image's, the logarithm of its ratio of width to
    height uniform between those of 3/4 and 4/3, its place uniform. Where ten draws do not fit into
    the image, it is the largest centred window of a ratio that is allowed.

    Args:
        shape: of the image, int32 `[..., H, W]`.
        numbers: uniform in `[0, 1)`, float32 `[..., TRIES + 1, 2]`: area and ratio of each try, and
            the place.
        min_area: in (0, 1].

    Returns:
        int32 `[..., 4]`: top, left, height and width.
    """
    sides = tf.cast(shape, tf.float32)
    tries = numbers[..., :TRIES, :]
    area = tf.reduce_prod(sides, -1, keepdims=True) * (min_area + (1 - min_area) * tries[..., 0])
    root = tf.exp((tries[..., 1] - 0.5) * math.log(MAX_RATIO))  # of width / height
    sizes = tf.round(tf.sqrt(area)[..., None] * tf.stack([1 / root, root], -1))
    fits = tf.reduce_all((sizes > 0) & (sizes <= sides[..., None, :]), -1)
    largest = tf.minimum(sides, tf.round(sides[..., ::-1] * MAX_RATIO))
    any_fits = tf.reduce_any(fits, -1, keepdims=True)
    first = tf.argmax(fits, -1, output_type=tf.int32)
    size = tf.where(any_fits, tf.gather(sizes, first, axis=-2, batch_dims=fits.ndim - 1), largest)
    free = sides - size
    start = tf.floor(tf.where(any_fits, numbers[..., TRIES, :] * (free + 1), free / 2))
    return tf.cast(tf.concat([start, size], -1), tf.int32)


def training_image(
    encoded: tf.Tensor,
    key: tf.Tensor,
    height: int,
    width: int,
    augmentation: Augmentation,
    crop: float,
    jpegs: bool = False,
) -> tf.Tensor:
    """A randomly augmented training image.

    Args:
        encoded: scalar string.
        key: int `[2]`, the stateless seed of this image in this epoch.
        height, width: target size in pixels.
        augmentation: what is drawn.
        crop: evaluation crop, where `augmentation.crop` is `"none"`.
        jpegs: see `etfzoo.data.decoding.opened`.

    Returns:
        float32 `[height, width, 3]`, whole numbers in 0..255.
    """
    numbers = random_numbers(key, augmentation)
    size, read = opened(encoded, jpegs)
    region, window, antialias, shift, flip, erased = draws(
        size, numbers, height, width, augmentation, crop
    )
    pixels = read(region, fast=True)
    if augmentation.crop == "resized_crop":
        image = tf.cond(
            antialias,
            lambda: _resample(pixels, _inside(window, region), height, width),
            lambda: _interpolate(pixels, height, width),
        )
    else:
        image = _resample(pixels, _inside(window, region), height, width)
    if augmentation.crop == "shift":
        pad_h, pad_w = padding(height, width)
        image = tf.pad(image, [[pad_h, pad_h], [pad_w, pad_w], [0, 0]])
        image = tf.slice(image, [shift[0], shift[1], 0], [height, width, 3])
    if augmentation.flip:
        image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    if augmentation.rand_augment:
        image = rand_augment(image, key, augmentation.rand_augment)
    if augmentation.random_erasing:
        image = random_erasing.erase(image, erased, augmentation.erased_pixel)
    return image


def random_numbers(key: tf.Tensor, augmentation: Augmentation) -> tuple[tf.Tensor, ...]:
    """The random numbers of one image, of which `draws` makes windows and flips.

    They are apart because each image has its own key, and the rest can be done for a whole batch.

    Args:
        key: int `[2]`, stateless seed.
        augmentation: what is drawn.

    Returns:
        of the crop, float32 `[TRIES + 1, 2]` for resized crops and int32 `[2]` for shifts, else
        `[0]`; of the mirror, float32 `[]`; and of random erasing, see there, or `[0]` without it.
    """
    crop_key, flip_key = tf.unstack(tf.random.split(key, 2))
    crop, flip, erasing = tf.zeros([0]), tf.constant(1.0), tf.zeros([0])
    if augmentation.crop == "resized_crop":
        crop = tf.random.stateless_uniform([TRIES + 1, 2], crop_key)
    elif augmentation.crop == "shift":
        # Of three numbers, of which the channels' is not used: what
        # tf.image.stateless_random_crop draws.
        crop = tf.random.stateless_uniform([3], crop_key, 0, tf.int32.max, tf.int32)[:2]
    if augmentation.flip:
        flip = tf.random.stateless_uniform([], flip_key)
    if augmentation.random_erasing:
        erasing = random_erasing.random_numbers(key)
    return crop, flip, erasing


def draws(
    shape: tf.Tensor,
    numbers: tuple[tf.Tensor, ...],
    height: int,
    width: int,
    augmentation: Augmentation,
    crop: float,
) -> tuple[tf.Tensor, ...]:
    """What is drawn for training images, but for RandAugment; the axes of a batch come first.

    Args:
        shape: of the image, int32 `[..., H, W]`.
        numbers: of `random_numbers`.
        height, width, augmentation, crop: see `training_image`.

    Returns:
        `region`, `window`: what is read and what is shown of the image, see `evaluation_window`; a
        resized crop reads nothing outside of its window; `antialias`: whether the filter grows with
        the window; `shift`: int32 `[..., 2]`, top and left of what is then kept of the padded
        image, where the crop is `"shift"`; `flip`: whether the image is mirrored; `erased`: see
        `etfzoo.data.random_erasing.erased_window`.
    """
    crop_numbers, flip_number, erasing_numbers = numbers
    antialias, shift = tf.ones(tf.shape(shape)[:-1], bool), tf.zeros_like(shape)
    if augmentation.crop == "resized_crop":
        region = random_window(shape, crop_numbers, augmentation.min_area)
        window = tf.cast(region, tf.float32)
        # Interpolation alone still reads every pixel of a crop of at most twice the target.
        factor = 1 if augmentation.antialias else 2
        antialias = tf.reduce_any(region[..., 2:] > [factor * height, factor * width], -1)
    elif augmentation.crop == "shift":
        region, window = evaluation_window(shape, height, width, crop=1.0)
        shift = crop_numbers % (2 * tf.constant(padding(height, width)) + 1)
    else:
        region, window = evaluation_window(shape, height, width, crop)
    erased = tf.zeros_like(region)
    if augmentation.random_erasing:
        erased = random_erasing.erased_window(
            erasing_numbers, height, width, augmentation.random_erasing
        )
    return region, window, antialias, shift, flip_number < 0.5, erased


def padding(height: int, width: int) -> tuple[int, int]:
    """Black rows and columns on each side of an image that is shifted."""
    return height // 8, width // 8

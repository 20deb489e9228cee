"""Decoding and augmentation as pure TensorFlow functions: the same inputs give the same pixels.

Every random draw takes a stateless key, so that an image depends on its key alone and neither on
the order nor on the number of threads.
"""

import dataclasses

import tensorflow as tf

from etfzoo.data.rand_augment import MAX_MAGNITUDE, rand_augment
from etfzoo.errors import EtfzooError, unknown

CROPS = ("resized_crop", "shift", "none")
MAX_PIXELS = 2**26  # of an image from a stranger; decoding takes up to some 6 bytes a pixel


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn at random for a training image.

    Attributes:
        crop: `"resized_crop"` (a random window, resized: Szegedy et al. 2015; antialiased where it
            is more than twice the target), `"shift"` (the whole image resized, then moved by up to
            an eighth of its side over black: the usual CIFAR augmentation) or `"none"` (the
            evaluation crop).
        min_area: smallest share of the image in a resized crop.
        flip: whether half of the images are mirrored left to right.
        rand_augment: magnitude of RandAugment's two operations, in 0..10; 0 is none.
    """

    crop: str = "resized_crop"
    min_area: float = 0.08
    flip: bool = True
    rand_augment: float = 0.0

    def __post_init__(self):
        if self.crop not in CROPS:
            raise unknown("augmentation", self.crop, CROPS)
        if not 0 < self.min_area <= 1:
            raise EtfzooError(f"min_area must be in (0, 1]; got {self.min_area}")
        if not 0 <= self.rand_augment <= MAX_MAGNITUDE:
            raise EtfzooError(f"rand_augment must be between 0 and 10; got {self.rand_augment}")


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """An encoded JPEG, PNG, BMP or GIF string as uint8 RGB `[H, W, 3]`."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def check_size(encoded: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """The encoded image itself, if its header says that it is safe to decode.

    Some kilobytes may unfold to gigabytes, so the size is read before anything is decoded.

    Args:
        encoded: scalar string.
        max_pixels: largest height times width.

    Raises:
        tf.errors.InvalidArgumentError: when it runs: neither JPEG nor PNG, no readable header, or
            more pixels.
    """

    def size_of_png():
        start = tf.strings.substr(encoded, 0, 24) + 24 * "\0"  # of a short file as well
        # 8 bytes signature, 4 length, then the first chunk, which libpng wants to be IHDR
        first = tf.strings.substr(start, 0, 8) + tf.strings.substr(start, 12, 4)
        is_png = tf.debugging.Assert(
            first == b"\x89PNG\r\n\x1a\nIHDR", ["neither a JPEG nor a PNG image"]
        )
        with tf.control_dependencies([is_png]):
            sides = tf.strings.substr(start, 16, 8)
        return tf.cast(tf.io.decode_raw(sides, tf.int32, little_endian=False), tf.int64)

    size = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64),
        size_of_png,
    )
    # A side below zero is one above 2**31 - 1, which no PNG has.
    bearable = (tf.reduce_min(size) > 0) & (tf.reduce_prod(size) <= max_pixels)
    message = f"the image has no pixels or more than {max_pixels}; its sides are"
    with tf.control_dependencies([tf.debugging.Assert(bearable, [message, size])]):
        return tf.identity(encoded)


def _decode_window(encoded, window):
    """The given window as uint8; a JPEG's other rows and columns are not decoded."""
    top, left, height, width = tf.unstack(window)
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_and_crop_jpeg(encoded, window, channels=3),
        lambda: tf.slice(decode(encoded), [top, left, 0], [height, width, 3]),
    )


def image_shape(encoded: tf.Tensor) -> tf.Tensor:
    """Height, width and channels of an encoded image, int32; of a JPEG without decoding it."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.image.extract_jpeg_shape(encoded),
        lambda: tf.shape(decode(encoded)),
    )


def _resize(image, height, width, antialias=True):
    image = tf.image.resize(image, [height, width], method="bilinear", antialias=antialias)
    return tf.round(tf.ensure_shape(image, [height, width, 3]))


def evaluation_image(encoded: tf.Tensor, height: int, width: int, crop: float) -> tf.Tensor:
    """The deterministic image of evaluation and serving.

    The largest centred window of the target's aspect, shrunk by `crop`, is resized with an
    antialiased bilinear filter. It is what resizing first and cropping then shows, to less than a
    pixel, at a cost that very long images cannot blow up.

    Args:
        encoded: scalar string.
        height, width: target size in pixels.
        crop: share of the shorter side that is kept, e.g. 0.875.

    Returns:
        float32 `[height, width, 3]`, whole numbers in 0..255.
    """
    window = evaluation_window(image_shape(encoded), height, width, crop)
    return _resize(_decode_window(encoded, window), height, width)


def evaluation_pixels(image: tf.Tensor, height: int, width: int, crop: float) -> tf.Tensor:
    """As `evaluation_image`, of a decoded image `[H, W, 3]` in 0..255."""
    top, left, rows, columns = tf.unstack(evaluation_window(tf.shape(image), height, width, crop))
    return _resize(tf.slice(image, [top, left, 0], [rows, columns, 3]), height, width)


def evaluation_window(shape: tf.Tensor, height: int, width: int, crop: float) -> tf.Tensor:
    """Top, left, height and width of what evaluation keeps of an image, int32 `[4]`.

    Args:
        shape: of the image, int32 `[H, W, ...]`.
        height, width, crop: see `evaluation_image`.
    """
    shape = tf.cast(shape[:2], tf.float32)
    scale = crop * tf.minimum(shape[0] / height, shape[1] / width)
    size = tf.clip_by_value(tf.round(scale * [float(height), float(width)]), 1.0, shape)
    return tf.cast(tf.concat([(shape - size) / 2, size], 0), tf.int32)


def training_image(
    encoded: tf.Tensor,
    key: tf.Tensor,
    height: int,
    width: int,
    augmentation: Augmentation,
    crop: float,
) -> tf.Tensor:
    """A randomly augmented training image.

    Args:
        encoded: scalar string.
        key: int `[2]`, the stateless seed of this image in this epoch.
        height, width: target size in pixels.
        augmentation: what is drawn.
        crop: evaluation crop, where `augmentation.crop` is `"none"`.

    Returns:
        float32 `[height, width, 3]`, whole numbers in 0..255.
    """
    window, antialias, shift, flip = draw(
        image_shape(encoded), key, height, width, augmentation, crop
    )
    pixels = _decode_window(encoded, window)
    if augmentation.crop == "resized_crop":
        image = tf.cond(
            antialias,
            lambda: _resize(pixels, height, width),
            lambda: _resize(pixels, height, width, antialias=False),
        )
    else:
        image = _resize(pixels, height, width)
    if augmentation.crop == "shift":
        pad_h, pad_w = padding(height, width)
        image = tf.pad(image, [[pad_h, pad_h], [pad_w, pad_w], [0, 0]])
        image = tf.slice(image, [shift[0], shift[1], 0], [height, width, 3])
    if augmentation.flip:
        image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    if augmentation.rand_augment:
        image = rand_augment(image, key, augmentation.rand_augment)
    return image


def draw(
    shape: tf.Tensor,
    key: tf.Tensor,
    height: int,
    width: int,
    augmentation: Augmentation,
    crop: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """What is drawn for a training image, but for RandAugment.

    Args:
        shape: of the image, int32 `[H, W, ...]`.
        key, height, width, augmentation, crop: see `training_image`.

    Returns:
        `window`: int32 `[4]`, top, left, height and width of what is resized; `antialias`: whether
        the filter grows with the window, which takes about as long as decoding. A resized crop of
        at most twice the target does without: interpolation still reads every pixel of it;
        `shift`: int32 `[2]`, top and left of what is then kept of the padded image, where the crop
        is `"shift"`; `flip`: whether the image is mirrored.
    """
    crop_key, flip_key = tf.unstack(tf.random.split(key, 2))
    antialias, shift = tf.constant(True), tf.zeros([2], tf.int32)
    if augmentation.crop == "resized_crop":
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.zeros([1, 0, 4]),
            seed=crop_key,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(augmentation.min_area, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        antialias = tf.reduce_any(window[2:] > [2 * height, 2 * width])
    elif augmentation.crop == "shift":
        window = evaluation_window(shape, height, width, crop=1.0)
        positions = 2 * tf.constant(padding(height, width)) + 1
        # Of three numbers, of which the channels' is not used: what
        # tf.image.stateless_random_crop draws.
        numbers = tf.random.stateless_uniform([3], crop_key, 0, tf.int32.max, tf.int32)
        shift = numbers[:2] % positions
    else:
        window = evaluation_window(shape, height, width, crop)
    flip = tf.constant(False)
    if augmentation.flip:
        flip = tf.random.stateless_uniform([], flip_key) < 0.5
    return window, antialias, shift, flip


def padding(height: int, width: int) -> tuple[int, int]:
    """Black rows and columns on each side of an image that is shifted."""
    return height // 8, width // 8

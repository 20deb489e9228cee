"""Encoded images: what their headers say, checked before anything is decoded, and their pixels.

All readers of images are here: training, evaluation, `etfzoo.preprocess`, the recipes and serving.
The orientation that a camera notes in EXIF is applied by none of them.
"""

import functools
import os

import tensorflow as tf

from etfzoo.errors import EtfzooError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
MAX_PIXELS = 2**26  # of one image; decoding takes up to some 6 bytes a pixel
MAX_PIXELS_TOGETHER = 2**29  # of the images of a request: 44 photos of 12 megapixels
# A progressive JPEG is built up in passes over all pixels; libjpeg writes 10 of them. So many may
# go over the largest image, more over smaller ones.
_SCANS = 16


def max_pixels() -> int:
    """The largest height times width that is decoded: ETFZOO_MAX_PIXELS, else `MAX_PIXELS`.

    A published model keeps the limit that it was published with.

    Raises:
        EtfzooError: the variable is no positive whole number.
    """
    text = os.environ.get("ETFZOO_MAX_PIXELS") or str(MAX_PIXELS)
    if not text.isdecimal() or not 0 < int(text) < 2**40:
        raise EtfzooError(f"ETFZOO_MAX_PIXELS must be a whole number from 1 on; got {text!r}")
    return int(text)


def decode(encoded: tf.Tensor, fast: bool = False) -> tf.Tensor:
    """An encoded JPEG, PNG, BMP or GIF string as uint8 RGB `[H, W, 3]`.

    Args:
        encoded: scalar string.
        fast: whether a JPEG is decoded with the fast approximation of the cosine transform, some
            levels of 255 off; otherwise its pixels are those of Pillow.

    Raises:
        tf.errors.InvalidArgumentError: when it runs: no image, or one of too many pixels.
    """
    with tf.control_dependencies([image_size(encoded)]):
        return _decode(tf.identity(encoded), fast)


def _decode(encoded, fast=False):
    image = tf.case(
        [
            (
                tf.io.is_jpeg(encoded),
                lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_dct_method(fast)),
            ),
            (_is_bmp_with_palette(encoded), lambda: _bmp_with_palette(encoded)),
        ],
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, [None, None, 3])


def decode_region(encoded: tf.Tensor, region: tf.Tensor, fast: bool = False) -> tf.Tensor:
    """The given rows and columns as uint8; a JPEG's others are not decoded.

    Args:
        encoded: scalar string that `image_size` has passed.
        region: int32 `[4]`, top, left, height and width.
        fast: see `decode`.
    """
    top, left, height, width = tf.unstack(region)
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_and_crop_jpeg(
            encoded, region, channels=3, dct_method=_dct_method(fast)
        ),
        lambda: tf.slice(_decode(encoded), [top, left, 0], [height, width, 3]),
    )


def opened(encoded: tf.Tensor, jpegs: bool = False):
    """Size of an encoded image, and a function that gives a region of its pixels.

    Args:
        encoded: scalar string.
        jpegs: whether the data set says that all of its images are JPEGs. They are then read
            without branches, which takes much less time. A PNG among them is read all the same.

    Returns:
        what `image_size` gives; and a function of `region` and `fast`, see `decode_region`.

    Raises:
        tf.errors.InvalidArgumentError: when it runs, as `image_size`; with `jpegs` also a BMP or a
            GIF.
    """
    if not jpegs:
        return image_size(encoded), functools.partial(decode_region, encoded)
    # Of the two decoders one gets the image, and the other a pixel of which it keeps nothing.
    is_jpeg = tf.io.is_jpeg(encoded)
    jpeg, png = (
        tf.where(is_jpeg, encoded, _pixel("jpeg")),
        tf.where(is_jpeg, _pixel("png"), encoded),
    )
    header = _Header(png)
    png = _checked(png, header.is_png(), "a data set of JPEGs has an image that is no JPEG or PNG")
    size = tf.cast(tf.image.extract_jpeg_shape(jpeg)[:2], tf.int64)
    size = tf.where(is_jpeg, size, header.size_of_png())
    scans = _passes(tf.strings.substr(jpeg, 0, _searched(jpeg, size)))
    size = _within_limits(tf.concat([size, [scans]], 0))
    with tf.control_dependencies([size]):  # before anything is decoded
        jpeg, png = tf.identity(jpeg), tf.identity(png)

    def read(region, fast=False):
        nothing = tf.zeros_like(region)
        of_jpeg = tf.io.decode_and_crop_jpeg(
            jpeg, tf.where(is_jpeg, region, [0, 0, 1, 1]), 3, dct_method=_dct_method(fast)
        )
        of_jpeg = tf.reshape(of_jpeg, [-1])[: tf.where(is_jpeg, tf.size(of_jpeg), 0)]
        top, left, height, width = tf.unstack(tf.where(is_jpeg, nothing, region))
        of_png = tf.slice(tf.io.decode_png(png, 3), [top, left, 0], [height, width, 3])
        pixels = tf.concat([of_jpeg, tf.reshape(of_png, [-1])], 0)
        return tf.reshape(pixels, [region[2], region[3], 3])

    return tf.cast(size[:2], tf.int32), read


@functools.cache
def _pixel(suffix):
    """An encoded image of one pixel."""
    with tf.init_scope():
        encode = tf.io.encode_jpeg if suffix == "jpeg" else tf.io.encode_png
        return encode(tf.zeros([1, 1, 3], tf.uint8)).numpy()


def _dct_method(fast):
    return "INTEGER_FAST" if fast else "INTEGER_ACCURATE"


def image_size(encoded: tf.Tensor) -> tf.Tensor:
    """Height and width of an encoded image, int32 `[2]`, from its header.

    Some kilobytes may unfold to gigabytes: what this lets pass is safe to decode.

    Args:
        encoded: scalar string.

    Raises:
        tf.errors.InvalidArgumentError: when it runs: none of the formats, no readable header, more
            pixels than `max_pixels()`, or a JPEG of so many passes that it takes as long.
    """
    return tf.cast(_size_and_passes(encoded)[:2], tf.int32)


def _size_and_passes(encoded, always=False):
    """Height, width and passes over the pixels, int64 `[3]`, checked as `image_size` says.

    Passes are 1 where they need not be counted, unless they are `always`.
    """
    return _within_limits(
        tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: _size_of_jpeg(encoded, always),
            lambda: tf.concat([_size_in_header(encoded), [1]], 0),
        )
    )


def _within_limits(size):
    """Height, width and passes, int64 `[3]`, where they are allowed."""
    limit = max_pixels()
    height, width, scans = found = tf.unstack(size)
    # Divided, as products of 64 bits may overflow.
    allowed = (tf.minimum(height, width) > 0) & (height <= limit // tf.maximum(width, 1))
    allowed &= scans <= limit * _SCANS // tf.maximum(height * width, 1)
    message = f"are its height, width and passes: more than {limit} pixels, or none"
    return _checked(size, allowed, found, message)


def check_request(images: tf.Tensor) -> tf.Tensor:
    """The encoded images of a request themselves, if all of them together are allowed.

    Args:
        images: strings `[N]`.

    Raises:
        tf.errors.InvalidArgumentError: when it runs: one that is neither JPEG nor PNG or that
            `image_size` refuses, or more than `MAX_PIXELS_TOGETHER` pixels; those of a JPEG of many
            passes count as often as it takes longer.
    """

    def pixels(encoded):
        known = tf.io.is_jpeg(encoded) | (tf.strings.substr(encoded, 0, 4) == b"\x89PNG")
        encoded = _checked(encoded, known, "neither a JPEG nor a PNG image")
        height, width, scans = tf.unstack(_size_and_passes(encoded, always=True))
        return height * width * tf.maximum(scans, _SCANS) // _SCANS

    total = tf.reduce_sum(tf.map_fn(pixels, images, fn_output_signature=tf.int64))
    limit = max(MAX_PIXELS_TOGETHER, max_pixels())
    return _checked(images, total <= limit, f"the images have more than {limit} pixels together")


def _checked(value, condition, *message):
    """The value; raises an InvalidArgumentError of the message where the condition is false."""
    # tf.debugging.Assert has another message when it runs eagerly.
    check = tf.raw_ops.Assert(condition=condition, data=message, summarize=3)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(value)


class _Header:
    """The first bytes of an encoded image, of a short file as well."""

    def __init__(self, encoded):
        self._start = tf.strings.substr(encoded, 0, 34) + 34 * "\0"

    def has(self, *parts):
        """Whether given bytes are at their places."""
        found = [tf.strings.substr(self._start, at, len(part)) == part for at, part in parts]
        return functools.reduce(tf.logical_and, found)

    def number(self, at, count, big_endian=False):
        """An unsigned number of at most four bytes, int64."""
        zeros = (8 - count) * b"\0"
        digits = tf.strings.substr(self._start, at, count)
        digits = zeros + digits if big_endian else digits + zeros
        return tf.io.decode_raw(digits, tf.int64, little_endian=not big_endian)[0]

    def is_png(self):
        """Whether it is a PNG that libpng takes, whose first chunk is IHDR."""
        return self.has((0, b"\x89PNG\r\n\x1a\n"), (12, b"IHDR"))

    def size_of_png(self):
        """Height and width, int64 `[2]`."""
        return tf.stack([self.number(at, 4, big_endian=True) for at in (20, 16)])

    def signed(self, at):
        """A number of four bytes with a sign."""
        value = self.number(at, 4)
        return tf.where(value < 2**31, value, value - 2**32)


def _size_of_jpeg(encoded, always):
    """Height, width and passes over the pixels, int64 `[3]`; see `_size_and_passes`."""
    size = tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)
    worth = always | (_searched(encoded, size) > 0)
    scans = tf.cond(worth, lambda: _passes(encoded), lambda: tf.constant(1, tf.int64))
    return tf.concat([size, [scans]], 0)


def _searched(encoded, size):
    """How many bytes of a JPEG are searched for its passes: all or, of most, none.

    A pass takes more than ten bytes. A file too short for more than four times the passes that are
    let through is not searched: to search every photograph would cost more than it saves.
    """
    most = max_pixels() * _SCANS // tf.maximum(tf.reduce_prod(size), 1)
    length = tf.strings.length(encoded)
    return tf.where(tf.cast(length, tf.int64) > 40 * most, length, 0)


def _passes(jpeg):
    # In compressed data 0xff is followed by 0, so that this marker is one wherever it is.
    content = tf.io.decode_raw(jpeg, tf.uint8)
    found = tf.where(content[:-1] == 0xFF)[:, 0]
    return tf.math.count_nonzero(tf.gather(content, found + 1) == 0xDA)


def _size_in_header(encoded):
    """Height and width, int64 `[2]`, of an image that is no JPEG."""
    header = _Header(encoded)
    return tf.cond(header.is_png(), header.size_of_png, lambda: _size_in_other_header(header))


def _size_in_other_header(header):
    is_gif, is_bmp = header.has((0, b"GIF8")), header.has((0, b"BM"))
    number = header.number
    # Rows of a BMP of negative height are stored from the top.
    bmp = tf.stack([tf.abs(header.signed(22)), header.signed(18)])
    size = tf.where(is_gif, tf.stack([number(8, 2), number(6, 2)]), bmp)
    # TensorFlow would take WebP as well, whose animations damage its memory (2.21).
    return _checked(size, is_gif | is_bmp, f"it is none of {' '.join(SUFFIXES)}")


def _is_bmp_with_palette(encoded):
    header = _Header(encoded)
    return header.has((0, b"BM")) & (header.number(28, 2) <= 8)


def _bmp_with_palette(encoded):
    """TensorFlow gives the indices as if they were grey."""
    header = _Header(encoded)
    plain = (header.number(28, 2) == 8) & (header.number(30, 4) == 0) & (header.number(14, 4) >= 40)
    encoded = _checked(
        encoded, plain, "a BMP with a palette must have 8 bits a pixel, uncompressed"
    )
    start = tf.cast(14 + header.number(14, 4), tf.int32)
    colours = tf.cast(header.number(10, 4), tf.int32) - start
    palette = tf.io.decode_raw(tf.strings.substr(encoded, start, colours), tf.uint8)
    palette = tf.reshape(palette, [-1, 4])[:, 2::-1]  # blue, green, red and nothing
    return tf.gather(palette, tf.cast(tf.io.decode_bmp(encoded)[..., 0], tf.int32))

"""RandAugment as pure TensorFlow functions of a stateless key.

Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space",
2020: some of 14 operations, picked evenly and one after the other, all at one magnitude. The
operations do to a pixel what Pillow's do, which the authors' AutoAugment was written with. As in
timm and torchvision, and unlike the authors' code, each of them grows with the magnitude. (timm
also leaves out each drawn operation half of the time, and can draw the magnitude: not here.)
"""

import math

import tensorflow as tf

from etfzoo.data.augmentation import MAX_MAGNITUDE

LAYERS = 2  # the authors' number for ImageNet
GREY = 128.0  # of pixels from outside, as in the authors' code

_RAND_AUGMENT = 2  # tells the draws here from others of the same key


def rand_augment(image: tf.Tensor, key: tf.Tensor, magnitude: float):
    """Applies LAYERS operations that are drawn evenly.

    Args:
        image: float32 `[H, W, 3]`, whole numbers in 0..255.
        key: int `[2]`, the stateless seed of this image in this epoch.
        magnitude: in 0..10; see `operations`.

    Returns:
        as `image`.
    """
    available = operations(magnitude).values()
    for layer_key in tf.unstack(tf.random.split(tf.random.fold_in(key, _RAND_AUGMENT), LAYERS)):
        operation_key, sign_key = tf.unstack(tf.random.split(layer_key, 2))
        number = tf.random.stateless_uniform([], operation_key, 0, len(available), tf.int32)
        up = tf.random.stateless_uniform([], sign_key) < 0.5
        sign = tf.where(up, 1.0, -1.0)
        branches = [lambda f=f, i=image, s=sign: f(i, s) for f in available]
        image = tf.ensure_shape(tf.switch_case(number, branches), image.shape)
    return image


def operations(magnitude: float) -> dict:
    """The 14 operations at a magnitude: functions of an image and a sign, 1.0 or -1.0, by name.

    Rotation by up to 30 degrees, shear by up to 0.3, translation by up to 0.45 of the side;
    colour, contrast, brightness and sharpness times 1 ± 0.9; posterize keeps 8 to 4 bits,
    solarize inverts what is at least 256 to 0. The sign counts where there is ±.
    """
    level = magnitude / MAX_MAGNITUDE
    change = 0.9 * level
    return {
        "identity": lambda image, sign: image,
        "autocontrast": lambda image, sign: autocontrast(image),
        "equalize": lambda image, sign: equalize(image),
        "rotate": lambda image, sign: rotate(image, sign * 30 * level),
        "solarize": lambda image, sign: solarize(image, 256 - 256 * level),
        "color": lambda image, sign: color(image, 1 + sign * change),
        "posterize": lambda image, sign: posterize(image, 8 - round(4 * level)),
        "contrast": lambda image, sign: contrast(image, 1 + sign * change),
        "brightness": lambda image, sign: brightness(image, 1 + sign * change),
        "sharpness": lambda image, sign: sharpness(image, 1 + sign * change),
        "shear_x": lambda image, sign: shear(image, x=sign * 0.3 * level),
        "shear_y": lambda image, sign: shear(image, y=sign * 0.3 * level),
        "translate_x": lambda image, sign: translate(image, x=sign * 0.45 * level),
        "translate_y": lambda image, sign: translate(image, y=sign * 0.45 * level),
    }


# Below, images are float32 [H, W, 3] of whole numbers in 0..255, and so is what comes out.


def autocontrast(image):
    """Stretches each channel so that its darkest pixel becomes 0 and its brightest 255."""
    rows = _rows(image)
    low, high = (
        tf.cast(extreme(tf.reshape(extreme(rows, 0), [-1, 3]), 0), tf.float64)
        for extreme in (tf.reduce_min, tf.reduce_max)
    )
    width = image.shape[1]
    scale = tf.math.divide_no_nan(tf.constant(255.0, tf.float64), high - low)
    # In this order and precision, whose rounding errors decide between two grey values.
    stretched = tf.cast(rows, tf.float64) * tf.tile(scale, [width]) - tf.tile(low * scale, [width])
    stretched = tf.clip_by_value(tf.cast(tf.floor(stretched), tf.float32), 0.0, 255.0)
    return tf.reshape(tf.where(tf.tile(high > low, [width]), stretched, rows), image.shape)


def equalize(image):
    """Maps each channel so that its histogram becomes as even as it can."""
    values = tf.cast(_rows(image), tf.int32) + tf.tile([0, 256, 512], [image.shape[1]])
    counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, [3, 256])
    brightest = 255 - tf.argmax(tf.reverse(counts > 0, [1]), axis=1, output_type=tf.int32)
    last = tf.gather(counts, brightest, batch_dims=1)
    step = (tf.reduce_sum(counts, axis=1) - last) // 255
    before = tf.cumsum(counts, axis=1, exclusive=True)
    table = (step[:, None] // 2 + before) // tf.maximum(step, 1)[:, None]
    table = tf.where(step[:, None] > 0, tf.minimum(table, 255), tf.range(256))
    found = tf.gather(tf.cast(tf.reshape(table, [-1]), tf.float32), values)
    return tf.reshape(found, image.shape)


def solarize(image, threshold):
    """Inverts what is at least the threshold."""
    # Sums of whole numbers are exact, and take a fifth of the time of a choice.
    return image + tf.cast(image >= threshold, image.dtype) * (255 - 2 * image)


def posterize(image, bits: int):
    """Keeps the upper bits of each value."""
    step = 2.0 ** (8 - bits)
    return tf.floor(image / step) * step


def color(image, factor):
    """Takes colours away (factor 0 is grey) or strengthens them."""
    grey = tf.matmul(_grey(image), tf.ones([1, 3]))
    return _enhance(tf.reshape(grey, image.shape), image, factor)


def contrast(image, factor):
    """Moves values towards the mean grey (factor 0) or away from it."""
    grey = _grey(image)
    mean = tf.floor(tf.reduce_mean(tf.cast(grey, tf.float64)) + 0.5)
    return _enhance(tf.cast(mean, tf.float32), image, factor)


def brightness(image, factor):
    """Scales all values; factor 0 is black."""
    return _enhance(0.0, image, factor)


def sharpness(image, factor):
    """Blurs (factor 0: by a 3x3 kernel, centre 5/13, else 1/13) or sharpens."""
    if min(image.shape[:2]) < 3:
        return image  # all pixels are outermost ones
    rows = image[:-2] + image[1:-1] + image[2:]
    blurred = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    inner = _enhance(tf.floor(blurred / 13 + 0.5), image[1:-1, 1:-1], factor)
    # The outermost pixels have no complete neighbourhood and stay.
    middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)


def rotate(image, degrees):
    """Turns about the centre, counterclockwise."""
    angle = degrees * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    # Centres of pixels are whole numbers here.
    y, x = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    return _affine(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def shear(image, x=0.0, y=0.0):
    """Moves rows (x) or columns (y) by so much a pixel from the top left corner."""
    return _affine(image, [1.0, x, x / 2, y, 1.0, y / 2])


def translate(image, x=0.0, y=0.0):
    """Moves by shares of the width and height, in whole pixels; to the left and up if positive."""
    height, width = image.shape[:2]
    moved = tf.cast(tf.round(tf.stack([y * height, x * width, 0.0])), tf.int32)
    before, after = tf.maximum(-moved, 0), tf.maximum(moved, 0)
    padded = tf.pad(image, tf.stack([before, after], 1), constant_values=GREY)
    return tf.ensure_shape(tf.slice(padded, after, image.shape), image.shape)


def _rows(image):
    """`[H, 3 W]`: broadcasting over a last axis of 3 is slow."""
    return tf.reshape(image, [image.shape[0], -1])


def _affine(image, coefficients):
    """The pixel at x, y is the one nearest to a x + b y + c, d x + e y + f; grey from outside.

    What ImageProjectiveTransformV3 gives, bit for bit, which takes twice the time.
    """
    height, width = image.shape[:2]
    a, b, c, d, e, f = coefficients
    x, y = tf.range(width, dtype=tf.float32)[None], tf.range(height, dtype=tf.float32)[:, None]
    column, row = _nearest(a * x + b * y + c), _nearest(d * x + e * y + f)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = tf.concat([tf.reshape(image, [-1, 3]), tf.fill([1, 3], GREY)], 0)
    numbers = tf.where(inside, row * width + column, height * width)
    return tf.gather(pixels, tf.cast(numbers, tf.int32))


def _nearest(x):
    """The nearest whole number; halves go away from zero."""
    size = tf.abs(x)
    whole = tf.floor(size)
    # The sum with 0.5 would be rounded itself.
    return tf.sign(x) * (whole + tf.cast(size - whole >= 0.5, x.dtype))


def _grey(image):
    """Luma `[H W, 1]` of ITU-R 601 in whole numbers, by Pillow's weights in 1/65536."""
    weights = tf.constant([[19595.0], [38470.0], [7471.0]])
    # All sums are whole and below 2^24: float32 holds them exactly.
    return tf.floor((tf.matmul(tf.reshape(image, [-1, 3]), weights) + 32768) / 65536)


def _enhance(degenerate, image, factor):
    """Between the degenerate image (factor 0) and the image (1), or beyond; rounded down."""
    blended = degenerate + factor * (image - degenerate)
    return tf.floor(tf.clip_by_value(blended, 0.0, 255.0))

"""Tests of decoding and augmentation."""

import functools
import importlib.util
import io
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from etfzoo.data import augment, decoding
from etfzoo.data.augmentation import CROPS, Augmentation
from etfzoo.errors import EtfzooError
from testing import fresh_python, smooth_image

CROP = 0.875


def encode(image, suffix="PNG", **kwargs):
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, suffix, **kwargs)
    return buffer.getvalue()


def triangle_filter(old, new, antialias=True, start=0.0, length=None):
    """Bilinear resampling of a window of `old` pixels to `new` as a matrix, in float64."""
    scale = (old if length is None else length) / new
    centres = start + (np.arange(new)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres) / (max(scale, 1) if antialias else 1)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


def resize(image, height, width, antialias=True):
    rows = triangle_filter(image.shape[0], height, antialias)
    columns = triangle_filter(image.shape[1], width, antialias)
    return np.einsum("hy,wx,yxc->hwc", rows, columns, image.astype(np.float64), optimize=True)


def resized_centre(image, height, width, crop):
    """The largest centred window of the target's aspect, shrunk by `crop`, resized in float64."""
    scale = crop * min(image.shape[0] / height, image.shape[1] / width)
    rows, columns = (
        triangle_filter(old, new, start=(old - scale * new) / 2, length=scale * new)
        for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    return np.einsum("hy,wx,yxc->hwc", rows, columns, image.astype(np.float64), optimize=True)


def evaluated(encoded, height, width, crop=CROP):
    image = augment.evaluation_image(encoded, height, width, crop)
    assert image.dtype == tf.float32 and image.shape == (height, width, 3)
    image = image.numpy()
    np.testing.assert_array_equal(image, np.rint(image))
    assert image.min() >= 0 and image.max() <= 255
    return image


@functools.cache
def trainer(side, augmentation):
    """Training images `[N, side, side, 3]` of one encoded image and keys `(seed, n)`, n < N."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([None, 2], tf.int32)])
    def images(encoded, keys):
        return tf.map_fn(
            lambda key: augment.training_image(encoded, key, side, side, augmentation, CROP),
            keys,
            fn_output_signature=tf.TensorSpec([side, side, 3], tf.float32),
        )

    return lambda encoded, count, seed=0: images(encoded, [[seed, n] for n in range(count)]).numpy()


@pytest.mark.parametrize(
    "shape, target, crop",
    [
        ((96, 96), (32, 32), 0.875),
        ((60, 131), (32, 32), 0.875),
        ((131, 60), (24, 40), 0.8),
        ((16, 20), (48, 48), 1.0),
        ((2000, 3), (32, 32), 0.875),
        ((3, 2000), (32, 32), 1.0),
        ((40, 1), (8, 8), 1.0),
    ],
)
def test_evaluation_image(shape, target, crop):
    image = smooth_image(*shape)
    wanted = resized_centre(image, *target, crop)
    # Float32 may round the last bit of a tie the other way, but no more.
    np.testing.assert_allclose(evaluated(encode(image), *target, crop), wanted, atol=0.501)


@pytest.mark.parametrize(
    "shape, target", [((200, 300), (64, 64)), ((300, 200), (64, 48)), ((72, 99), (224, 224))]
)
def test_evaluation_image_is_that_of_pillow(shape, target):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    scale = CROP * min(shape[0] / target[0], shape[1] / target[1])
    h, w = scale * target[0], scale * target[1]
    left, top = (shape[1] - w) / 2, (shape[0] - h) / 2
    wanted = Image.fromarray(image).resize(
        target[::-1], Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )
    # Pillow also rounds to whole numbers between rows and columns.
    np.testing.assert_allclose(evaluated(encode(image), *target), wanted, atol=1)


@pytest.mark.parametrize("shape", [(72, 72), (72, 108), (333, 500), (500, 375), (64, 64)])
@pytest.mark.parametrize("target", [224, 56])
def test_evaluation_image_beside_resize_and_centre_crop(shape, target):
    # What torchvision does, with Pillow alone: whole pixels for the sides and for the origin.
    image = smooth_image(*shape)
    side = round(target / CROP)
    short, long = min(shape), max(shape)
    sides = {short: side, long: int(side * long / short)}
    whole = Image.fromarray(image).resize(
        (sides[shape[1]], sides[shape[0]]), Image.Resampling.BILINEAR
    )
    top, left = (round((n - target) / 2) for n in (whole.height, whole.width))
    wanted = np.asarray(whole, np.float64)[top : top + target, left : left + target]
    error = np.abs(evaluated(encode(image), target, target) - wanted)
    # At most half a pixel to the side; where both sides fit, no more than rounding.
    exact = (np.asarray(shape) * target / CROP % short == 0).all() and side * CROP == target
    assert error.max() <= (1 if exact and (whole.width - target) % 2 == 0 else 20)
    assert error.mean() < 1.5


def test_identity_size_is_exact():
    image = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    np.testing.assert_array_equal(evaluated(encode(image), 32, 24, 1.0), image)
    np.testing.assert_array_equal(augment.evaluation_pixels(image, 32, 24, 1.0), image)
    # Whole pixels of the centre, without any filtering.
    np.testing.assert_array_equal(evaluated(encode(image), 16, 12, 0.5), image[8:24, 6:18])


@pytest.mark.parametrize("quality", [50, 90])
@pytest.mark.parametrize("kwargs", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg(quality, kwargs):
    noisy = np.random.default_rng(1).normal(smooth_image(90, 120), 20).clip(0, 255)
    encoded = encode(noisy.astype(np.uint8), "JPEG", quality=quality, **kwargs)
    decoded = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decoding.decode(encoded), decoded)
    error = np.abs(np.asarray(decoding.decode(encoded, fast=True), int) - decoded)
    assert 0 < error.mean() < 2 and error.max() < 12
    for target in ((32, 32), (120, 160), (40, 70)):
        # The part that is read is decoded alone: its first and last row and column of coarser
        # colours lack their neighbours.
        error = np.abs(evaluated(encoded, *target) - resized_centre(decoded, *target, CROP))
        assert error.max() <= (0.501 if "subsampling" in kwargs else 8) and error.mean() < 0.5


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("L", "BMP"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "BMP"),
        ("RGB", "GIF"),
    ],
)
def test_other_pixel_formats_become_rgb(mode, suffix):
    image = Image.fromarray(smooth_image(40, 56)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(smooth_image(40, 56, seed=1)[..., 0]))
    encoded = encode(image, suffix)
    # Alpha is dropped, not blended.
    wanted = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    decoded = decoding.decode(encoded)
    assert decoded.dtype == tf.uint8 and decoded.shape == (40, 56, 3)
    np.testing.assert_allclose(decoded, wanted, atol=6 if suffix == "JPEG" else 0)
    wanted = resized_centre(wanted, 16, 16, CROP)
    np.testing.assert_allclose(evaluated(encoded, 16, 16), wanted, atol=6)


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(smooth_image(20, 20, seed=s)) for s in range(3)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    wanted = Image.open(io.BytesIO(encoded)).convert("RGB")
    np.testing.assert_array_equal(decoding.decode(encoded), wanted)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_one_pixel(suffix):
    encoded = encode(np.full((1, 1, 3), (200, 100, 50), np.uint8), suffix, quality=100)
    colour = decoding.decode(encoded).numpy()[0, 0]
    np.testing.assert_allclose(colour, (200, 100, 50), atol=3)
    np.testing.assert_array_equal(evaluated(encoded, 8, 8), np.tile(colour, (8, 8, 1)))
    for crop in CROPS:
        images = trainer(8, Augmentation(crop))(encoded, 5)
        inside = images[:, 1:-1, 1:-1]  # a shift brings in a border of black
        np.testing.assert_array_equal(inside, np.broadcast_to(colour, inside.shape))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(2000, 3), (3, 2000)])
def test_extreme_shapes_train(shape, crop):
    images = trainer(16, Augmentation(crop))(encode(smooth_image(*shape)), 3)
    assert images.shape == (3, 16, 16, 3) and images.std() > 1


def damaged():
    png, jpeg = (encode(smooth_image(40, 40), suffix) for suffix in ("PNG", "JPEG"))
    return {
        "empty": b"",
        "text": b"not an image",
        "jpeg magic alone": jpeg[:3],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "half a png": png[: len(png) // 2],
        "png with a changed byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }


@pytest.mark.parametrize("name", damaged())
def test_corrupt_bytes(name):
    encoded = damaged()[name]
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoding.decode(encoded)
    with pytest.raises(tf.errors.InvalidArgumentError):
        augment.evaluation_image(encoded, 16, 16, CROP)
    for crop in CROPS:
        with pytest.raises(tf.errors.InvalidArgumentError):
            trainer(16, Augmentation(crop))(encoded, 1)


@pytest.mark.parametrize("crop", ["resized_crop", "shift"])
def test_training_image_is_a_function_of_its_key(crop):
    encoded, augmentation = encode(smooth_image(50, 60)), Augmentation(crop)
    draw = trainer(24, augmentation)
    images = draw(encoded, 30)
    np.testing.assert_array_equal(draw(encoded, 30), images)
    # Alone, eagerly and after other draws the pixels are the same.
    tf.random.uniform([7])
    for n in (29, 3):
        alone = augment.training_image(encoded, tf.constant([0, n]), 24, 24, augmentation, CROP)
        np.testing.assert_array_equal(alone, images[n])
    # 162 draws of a shift with flip exist; of a crop far more.
    assert len({image.tobytes() for image in images}) >= 25
    assert (draw(encoded, 30, seed=1) != images).any((1, 2, 3)).sum() >= 25
    assert images.min() >= 0 and images.max() <= 255
    np.testing.assert_array_equal(images, np.rint(images))


def test_flip_is_an_exact_mirror_of_half_the_images():
    image = smooth_image(40, 40)
    straight = evaluated(encode(image), 16, 16)
    images = trainer(16, Augmentation("none", flip=True))(encode(image), 400)
    same = (images == straight).all((1, 2, 3))
    mirrored = (images == straight[:, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(same.sum() - 200) < 50  # five standard deviations


def test_none_is_the_evaluation_image():
    encoded = encode(smooth_image(50, 41))
    images = trainer(16, Augmentation("none", flip=False))(encoded, 3)
    np.testing.assert_array_equal(images, np.stack([evaluated(encoded, 16, 16)] * 3))


def test_crop_and_flip_are_independent():
    # Both come from one key: a flip must not go with certain offsets.
    images = trainer(16, Augmentation("shift"))(encode(coordinates(16)), 800)
    flipped = images[:, 8, 8, 0] < images[:, 8, 7, 0]
    left = np.where(flipped, images[:, 8, 7, 0], images[:, 8, 8, 0]) < coordinates(16)[8, 8, 0]
    assert 0.4 < flipped.mean() < 0.6
    assert abs(flipped[left].mean() - flipped[~left].mean()) < 0.2


def coordinates(side):
    """An image whose red grows with x and green with y: two levels a pixel from 10 on."""
    y, x = np.mgrid[:side, :side]
    return np.stack([10 + 2 * x, 10 + 2 * y, np.full_like(x, 77)], axis=-1).astype(np.uint8)


def test_shift_covers_every_offset_evenly():
    side, pad, count = 32, 4, 3000
    image = coordinates(side)
    images = trainer(side, Augmentation("shift", flip=False))(encode(image), count)
    padded = np.pad(image, [(pad, pad), (pad, pad), (0, 0)])
    # The centre pixel tells where the window lies in the padded image.
    tops, lefts = (
        ((images[:, side // 2, side // 2, c] - 10) / 2 - side // 2 + pad).astype(int)
        for c in (1, 0)
    )
    for window, top, left in zip(images, tops, lefts, strict=True):
        np.testing.assert_array_equal(window, padded[top : top + side, left : left + side])
    cells = np.bincount(tops * (2 * pad + 1) + lefts, minlength=81)
    assert len(cells) == 81 and cells.min() > 0
    # Chi-square with 80 degrees of freedom: 80 +- 12.6.
    assert ((cells - count / 81) ** 2 / (count / 81)).sum() < 80 + 5 * 12.6


def test_shift_takes_an_eighth_of_each_side():
    image = np.full((40, 40, 3), 255, np.uint8)
    for side, pad in ((7, 0), (8, 1), (47, 5)):
        images = trainer(side, Augmentation("shift"))(encode(image), 60)
        black = (images == 0).all((1, 3)).sum(1)
        assert black.max() == pad and black.min() == 0


def torchvision_windows(height, width, min_area, count, seed):
    """top, left, height, width of RandomResizedCrop by torchvision's formulas, `[count, 4]`."""
    rng = np.random.default_rng(seed)

    def window():
        for _ in range(10):
            area = height * width * rng.uniform(min_area, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
        w, h = width, height
        if width / height < 3 / 4:
            h = round(w / (3 / 4))
        elif width / height > 4 / 3:
            w = round(h * 4 / 3)
        return (height - h) // 2, (width - w) // 2, h, w

    return np.array([window() for _ in range(count)])


@tf.function(
    input_signature=[
        tf.TensorSpec([2], tf.int32),
        tf.TensorSpec([None, 2], tf.int32),
        tf.TensorSpec([], tf.float32),
    ]
)
def drawn_windows(shape, keys, min_area):
    return tf.map_fn(
        lambda key: augment.random_window(
            shape, tf.random.stateless_uniform([augment.TRIES + 1, 2], key), min_area
        ),
        keys,
        fn_output_signature=tf.TensorSpec([4], tf.int32),
    )


def windows(height, width, min_area, count, seed=0):
    keys = np.stack([np.full(count, seed), np.arange(count)], 1).astype(np.int32)
    return drawn_windows([height, width], keys, min_area).numpy()


@pytest.mark.parametrize(
    "height, width, min_area",
    [(256, 256, 0.08), (64, 64, 0.25), (375, 500, 0.08), (500, 375, 0.5), (40, 90, 0.08)],
)
def test_resized_crops_are_distributed_as_torchvision_draws_them(height, width, min_area):
    count = 4000
    ours = windows(height, width, min_area, count)
    theirs = torchvision_windows(height, width, min_area, count, seed=1)
    for some in (ours, theirs):
        assert (some >= 0).all() and (some[:, 2:] > 0).all()
        assert (some[:, :2] + some[:, 2:] <= (height, width)).all()

    def measured(w):
        free = np.stack([height - w[:, 2], width - w[:, 3]], 1)
        inner = free > 8
        places = (w[:, :2] + 0.5) / (free + 1)
        yield w[:, 2] * w[:, 3] / (height * width)
        yield w[:, 3] / w[:, 2]
        yield places[inner[:, 0], 0]
        yield places[inner[:, 1], 1]

    for one, other in zip(measured(ours), measured(theirs), strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-4
    if height == width:  # area against its law itself, but for what does not fit and rounding
        area = ours[:, 2] * ours[:, 3] / (height * width)
        assert abs(np.mean(area) - theirs[:, 2:].prod(1).mean() / (height * width)) < 0.02


def test_mean_area_of_a_square():
    # The area is drawn, and not the height: 0.402 then.
    w = windows(256, 256, 0.08, 4000)
    area = w[:, 2] * w[:, 3] / 256**2
    assert 0.47 < area.mean() < 0.49 and 0.46 < np.median(area) < 0.50


@pytest.mark.parametrize("height, width", [(10, 250), (250, 10), (1, 1), (1, 7), (3, 4)])
def test_long_and_tiny_images_take_the_largest_centred_crop(height, width):
    # None of ten draws of at least nine tenths fits, unless the image is nearly a square.
    found = windows(height, width, 0.9, 50)
    expected = torchvision_windows(height, width, 0.9, 50, seed=0)
    if max(height, width) > 2 * min(height, width):
        np.testing.assert_array_equal(found, expected)
    assert {tuple(w) for w in found} >= {tuple(w) for w in expected[:1]}
    assert (found[:, 2:] <= (height, width)).all() and (found >= 0).all()


_TORCHVISION = """
import json, torch
from torchvision.transforms import RandomResizedCrop
torch.manual_seed(0)
image = torch.zeros(3, 120, 150)
draws = [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
print(json.dumps(draws))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
def test_resized_crops_are_distributed_as_those_of_torchvision_itself():
    # In a process of its own: torch and TensorFlow do not always get on in one.
    theirs = np.array(json.loads(fresh_python(_TORCHVISION)))
    ours = windows(120, 150, 0.08, 4000)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_pixels_of_a_resized_crop(suffix, antialias):
    target = 24
    augmentation = Augmentation("resized_crop", min_area=0.1, antialias=antialias)
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    encoded = encode(image, suffix, **({} if suffix == "PNG" else {"subsampling": 0}))
    image = decoding.decode(encoded, fast=True).numpy()
    kinds = set()
    for n, shown in enumerate(trainer(target, augmentation)(encoded, 60)):
        numbers = augment.random_numbers(tf.constant([0, n]), augmentation)
        region, window, filtered, _, flip, _ = augment.draws(
            tf.constant(image.shape[:2]), numbers, target, target, augmentation, CROP
        )
        np.testing.assert_array_equal(region, window)
        top, left, height, width = region.numpy()
        larger = max(height, width) > (target if antialias else 2 * target)
        assert filtered == larger
        wanted = resize(image[top : top + height, left : left + width], target, target, larger)
        np.testing.assert_allclose(shown, wanted[:, ::-1] if flip else wanted, atol=0.502)
        kinds.add((larger, bool(flip)))
    assert len(kinds) == 4


def test_resized_crop_of_a_jpeg_shows_the_same_window_as_of_a_png():
    image = smooth_image(80, 100)
    draw = trainer(24, Augmentation("resized_crop"))
    jpeg = encode(image, "JPEG", quality=95, subsampling=0)
    np.testing.assert_allclose(draw(jpeg, 20), draw(encode(image), 20), atol=6)


def test_bad_augmentations():
    with pytest.raises(EtfzooError, match="unknown augmentation 'resize_crop'; did you mean resi"):
        Augmentation("resize_crop")
    for min_area in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(EtfzooError, match=r"min_area must be in \(0, 1\]"):
            Augmentation(min_area=min_area)

"""Tests of what is read of encoded images: which files, of which sizes, with which pixels."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import etfzoo
from etfzoo.data import augment, decoding
from etfzoo.errors import first_line
from testing import claiming, smooth_image


def encode(image, suffix="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(
        file, suffix, **options
    )
    return file.getvalue()


PICTURE = Image.fromarray(smooth_image(40, 56))
FILES = {
    "PNG": encode(PICTURE),
    "PNG of a palette": encode(PICTURE.convert("P")),
    "JPEG": encode(PICTURE, "JPEG"),
    "progressive JPEG": encode(PICTURE, "JPEG", progressive=True),
    "GIF": encode(PICTURE, "GIF"),
    "BMP": encode(PICTURE, "BMP"),
    "BMP of a palette": encode(PICTURE.convert("P", palette=Image.ADAPTIVE), "BMP"),
    "BMP of greys": encode(PICTURE.convert("L"), "BMP"),
    "BMP from the top": b"",
}
_BMP = bytearray(FILES["BMP"])
_BMP[22:26] = (-40).to_bytes(4, "little", signed=True)
FILES["BMP from the top"] = bytes(_BMP)


@pytest.fixture(scope="module")
def image_size():
    return tf.function(decoding.image_size, input_signature=[tf.TensorSpec([], tf.string)])


def refusal(function, encoded):
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        function(tf.constant(encoded))
    line = first_line(error.value)
    assert "\n" not in line and "node" not in line and "[Op" not in line
    return line


@pytest.mark.parametrize("name", FILES)
def test_size_from_the_header_and_pixels_as_pillow_has_them(name, image_size):
    encoded = FILES[name]
    assert image_size(encoded).numpy().tolist() == [40, 56]
    wanted = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    decoded = decoding.decode(encoded)
    np.testing.assert_array_equal(decoded, wanted)
    region = decoding.decode_region(encoded, [3, 5, 20, 30])
    np.testing.assert_allclose(region, wanted[3:23, 5:35], atol=12 if "JPEG" in name else 0)


@pytest.mark.parametrize("mode", ["1", "4 bits"])
def test_palettes_of_few_bits_are_refused_and_not_taken_for_grey(mode):
    encoded = bytearray(encode(PICTURE.convert("1"), "BMP"))
    encoded[28] = {"1": 1, "4 bits": 4}[mode]
    assert "a BMP with a palette must have 8 bits" in refusal(decoding.decode, bytes(encoded))


@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_the_limit_of_pixels(suffix, image_size):
    encoded = encode(smooth_image(8, 8), suffix)
    for size in ((8, 8), (2**13, 2**13), (2, 2**15)):
        assert tuple(image_size(claiming(encoded, *size)).numpy()) == size
    for size in ((2**13, 2**13 + 1), (65500, 65500), (0, 8), (8, 0)):
        refusal(image_size, claiming(encoded, *size))


def sized(name, size):
    """A file of a kind whose header claims other sides."""
    encoded = bytearray(FILES[name])
    width, height = size
    if name == "GIF":
        encoded[6:10] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    else:
        encoded[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(encoded)


@pytest.mark.parametrize("name", ["GIF", "BMP"])
def test_the_limit_holds_for_every_format(name, image_size):
    assert image_size(sized(name, (8191, 8190))).numpy().tolist() == [8190, 8191]
    for function in (image_size, decoding.decode):
        assert "8193 8194 1 are its height" in refusal(function, sized(name, (8194, 8193)))


def test_the_limit_is_one_for_all_readers(monkeypatch, tmp_path):
    encoded = FILES["PNG"]
    (tmp_path / "image.png").write_bytes(encoded)
    model = etfzoo.build_classifier("rn18", 3, head="linear", input_shape=(32, 32, 3))
    readers = {
        "evaluation": lambda: augment.evaluation_image(encoded, 8, 8, 0.875),
        "training": lambda: augment.training_image(
            encoded, tf.constant([0, 0]), 8, 8, etfzoo.data.augmentation.Augmentation(), 0.875
        ),
        "path": lambda: etfzoo.preprocess(model, tmp_path / "image.png"),
        "PIL": lambda: etfzoo.preprocess(model, PICTURE),
        "serving": lambda: decoding.check_request(tf.constant([encoded])),
    }
    for limit, fits in (("2240", True), ("2239", False)):
        monkeypatch.setenv("ETFZOO_MAX_PIXELS", limit)
        for name, read in readers.items():
            if fits:
                read()
                continue
            with pytest.raises((tf.errors.InvalidArgumentError, etfzoo.EtfzooError)) as error:
                read()
            assert "more than 2239" in str(error.value), name
    for bad in ("0", "-5", "many", "1e6", "9" * 99):
        monkeypatch.setenv("ETFZOO_MAX_PIXELS", bad)
        with pytest.raises(etfzoo.EtfzooError, match="ETFZOO_MAX_PIXELS must be a whole number"):
            decoding.max_pixels()


def scan_bomb(side, passes):
    """A progressive JPEG that claims a size, with its last pass many times over."""
    encoded = encode(PICTURE.convert("L"), "JPEG", progressive=True)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    return claiming(encoded[:-2] + last * passes + encoded[-2:], side, side)


def test_passes_of_a_jpeg_are_limited_by_its_size(image_size):
    libjpeg = encode(PICTURE, "JPEG", progressive=True)
    assert libjpeg.count(b"\xff\xda") == 10
    assert image_size(claiming(libjpeg, 8192, 8192)).numpy().tolist() == [8192, 8192]
    assert image_size(scan_bomb(64, 1000)).numpy().tolist() == [64, 64]
    assert "8192 8192 1006 are its height" in refusal(image_size, scan_bomb(8192, 1000))


NOTHING = [
    b"",
    b"x",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF89a" + bytes(99),
    b"BM" + bytes(99),
]
# An animation of WebP would end the process.
NOTHING += [
    encode(PICTURE, "WEBP"),
    encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE]),
]
NOTHING += [claiming(FILES["PNG"], 2**n - 1, 2**n - 1) for n in (31, 32)]


@pytest.mark.parametrize("encoded", NOTHING)
def test_what_is_no_image(encoded, image_size):
    assert refusal(decoding.decode, encoded)
    assert refusal(image_size, encoded) == refusal(decoding.image_size, encoded)


def test_the_pixels_of_a_request_are_limited_together():
    large = claiming(encode(smooth_image(8, 8)), 2**13, 2**13)
    check = tf.function(decoding.check_request, input_signature=[tf.TensorSpec([None], tf.string)])
    images = tf.constant([large] * 8)
    np.testing.assert_array_equal(check(images), images)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 536870912 pixels together"):
        check(tf.constant([large] * 8 + [FILES["PNG"]]))
    for other in ("GIF", "BMP"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="neither a JPEG nor a PNG"):
            check(tf.constant([FILES["PNG"], FILES[other]]))


def test_the_passes_of_a_request_are_limited_together():
    """Small files of which each alone may be decoded, but not so many of them."""
    check = tf.function(decoding.check_request, input_signature=[tf.TensorSpec([None], tf.string)])
    bomb = scan_bomb(1024, 1000)
    assert len(bomb) < 70_000
    images = tf.constant([bomb] * 8)  # of 63 times as many pixels each
    np.testing.assert_array_equal(check(images), images)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 536870912 pixels together"):
        check(tf.constant([bomb] * 9))
    libjpeg = claiming(encode(PICTURE, "JPEG", progressive=True), 8192, 8192)
    check(tf.constant([libjpeg] * 8))  # what libjpeg writes counts as its pixels


def test_orientation_is_applied_nowhere(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    encoded = encode(PICTURE, "JPEG", exif=exif, quality=95)
    (tmp_path / "image.jpg").write_bytes(encoded)
    model = etfzoo.build_classifier("rn18", 3, head="linear", input_shape=(20, 28, 3))
    plain = decoding.decode(encode(PICTURE, "JPEG", quality=95))
    np.testing.assert_array_equal(decoding.decode(encoded), plain)
    wanted = etfzoo.preprocess(model, plain)
    for given in (tmp_path / "image.jpg", Image.open(tmp_path / "image.jpg")):
        np.testing.assert_allclose(etfzoo.preprocess(model, given), wanted, atol=3)

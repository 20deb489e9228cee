"""Requests that a server must refuse, drawn from a seed, and legal ones that only look strange."""

import io

import numpy as np
from PIL import Image

from c_api import DTYPES, StatusError
from etfzoo.data.decoding import MAX_PIXELS
from testing import claiming, smooth_image

REFUSALS = {"INVALID_ARGUMENT", "FAILED_PRECONDITION"}


def encode(pixels, suffix, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, suffix, **options)
    return buffer.getvalue()


def strings(*values):
    """A string tensor `[N]`."""
    return np.array([*values, None], object)[:-1]


def legal_images():
    """Images that training takes as well, so that serving has to."""
    pixels = smooth_image(45, 60)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    return {
        "grey JPEG": encode(pixels, "JPEG", "L"),
        "CMYK JPEG": encode(pixels, "JPEG", "CMYK"),
        "progressive JPEG": encode(pixels, "JPEG", progressive=True),
        "bytes after the end": encode(pixels, "JPEG") + b"more",
        "PNG with alpha": encode(pixels, "PNG", "RGBA"),
        "PNG with a palette": encode(pixels, "PNG", "P"),
        "black and white PNG": encode(pixels, "PNG", "1"),
        "16 bit PNG": buffer.getvalue(),
        # libjpeg warns, and fills up with grey: in training, evaluation and here
        "JPEG that claims more than it has": claiming(encode(pixels, "JPEG"), 80, 80),
        "one pixel": encode(pixels[:1, :1], "PNG"),
        "a line": encode(pixels[:1], "PNG"),
    }


def _image(rng, suffix):
    height, width = rng.integers(20, 120, 2)
    return encode(smooth_image(height, width, int(rng.integers(1000))), suffix)


def _truncated(rng, suffix, most):
    image = _image(rng, suffix)
    return image[: int(rng.uniform(0.001, most) * len(image))]


def _too_large(rng, suffix):
    limit = 2**16 - 1 if suffix == "JPEG" else 2**31 - 1
    height = int(rng.integers(2**11, 2**16))
    width = int(rng.integers(MAX_PIXELS // height + 1, min(limit, 64 * MAX_PIXELS // height)))
    return claiming(_image(rng, suffix), *rng.permutation([height, width]))


def _changed(rng):
    image = bytearray(_image(rng, "PNG"))
    image[int(rng.integers(50, len(image) - 30))] ^= int(rng.integers(1, 256))
    return bytes(image)


def _bomb(rng):
    """Some kilobytes that unfold to more than MAX_PIXELS pixels, without a lie in the header."""
    side = int(rng.integers(MAX_PIXELS**0.5 + 1, 12000))
    return encode(np.zeros((side, side), np.uint8), "PNG", "1")


def _pixels(rng, side, poison):
    images = rng.uniform(0, 255, (2, side, side, 3)).astype(np.float32)
    images[tuple(rng.integers(0, images.shape))] = poison
    return images


# kind: the bytes of one image
IMAGES = {
    "empty": lambda rng: b"",
    "random bytes": lambda rng: rng.bytes(int(rng.integers(1, 5000))),
    "text": lambda rng: b"not an image" * int(rng.integers(1, 50)),
    "signature alone": lambda rng: (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n")[rng.integers(2)],
    "truncated JPEG": lambda rng: _truncated(rng, "JPEG", 0.6),
    "truncated PNG": lambda rng: _truncated(rng, "PNG", 0.95),
    "PNG with a changed byte": _changed,
    "JPEG that claims too many pixels": lambda rng: _too_large(rng, "JPEG"),
    "PNG that claims too many pixels": lambda rng: _too_large(rng, "PNG"),
    "PNG that claims 2^32 pixels a side": lambda rng: claiming(
        _image(rng, "PNG"), 2**32 - 1, 2**32 - 1
    ),
    "PNG that claims more than it has": lambda rng: claiming(_image(rng, "PNG"), 999, 999),
    "no pixels": lambda rng: claiming(_image(rng, ("JPEG", "PNG")[rng.integers(2)]), 0, 50),
    "decompression bomb": _bomb,
    "GIF": lambda rng: _image(rng, "GIF"),
    "BMP": lambda rng: _image(rng, "BMP"),
    "WebP": lambda rng: _image(rng, "WEBP"),
}

# kind: signature and inputs, given a random generator and the side of the model's images
REQUESTS = {
    "one bad image of three": lambda rng, side: (
        "serving_bytes",
        {"image_bytes": strings(_image(rng, "PNG"), b"bad", _image(rng, "JPEG"))},
    ),
    "no strings": lambda rng, side: ("serving_bytes", {"image_bytes": strings()}),
    "scalar string": lambda rng, side: (
        "serving_bytes",
        {"image_bytes": strings(_image(rng, "PNG")).reshape(())},
    ),
    "strings of rank 2": lambda rng, side: (
        "serving_bytes",
        {"image_bytes": strings(_image(rng, "PNG")).reshape(1, 1)},
    ),
    "pixels for bytes": lambda rng, side: (
        "serving_bytes",
        {"image_bytes": _pixels(rng, side, 0)},
    ),
    "bytes for pixels": lambda rng, side: (
        _pixels_signature(rng),
        {"images": strings(_image(rng, "PNG"))},
    ),
    "wrong dtype": lambda rng, side: (
        _pixels_signature(rng),
        {"images": _pixels(rng, side, 0).astype(rng.choice(list(DTYPES.values())[1:]))},
    ),
    "an image without a batch": lambda rng, side: (
        _pixels_signature(rng),
        {"images": _pixels(rng, side, 0)[0]},
    ),
    "wrong rank": lambda rng, side: (
        _pixels_signature(rng),
        {
            "images": np.ones(
                [(), (9,), (side, 3), (1, 1, side, side, 3)][rng.integers(4)], np.float32
            )
        },
    ),
    "wrong sides": lambda rng, side: (
        _pixels_signature(rng),
        {"images": np.ones((1, side + int(rng.integers(1, 9)), side, 3), np.float32)},
    ),
    "wrong channels": lambda rng, side: (
        _pixels_signature(rng),
        {"images": np.ones((1, side, side, rng.choice([0, 1, 2, 4])), np.float32)},
    ),
    "empty batch": lambda rng, side: (
        _pixels_signature(rng),
        {"images": np.ones((0, side, side, 3), np.float32)},
    ),
    "not finite": lambda rng, side: (
        _pixels_signature(rng),
        {"images": _pixels(rng, side, rng.choice([np.nan, np.inf, -np.inf]))},
    ),
    "unknown signature": lambda rng, side: (
        rng.choice(["", "serving", "Serving_Default", "__saved_model_init_op"]),
        {"images": _pixels(rng, side, 0)},
    ),
    "missing input": lambda rng, side: (_pixels_signature(rng), {}),
    "another input": lambda rng, side: (_pixels_signature(rng), {"x": _pixels(rng, side, 0)}),
    "one input too many": lambda rng, side: (
        _pixels_signature(rng),
        {"images": _pixels(rng, side, 0), "training": np.array(True)},
    ),
}


def _pixels_signature(rng):
    return str(rng.choice(["serving_default", "features"]))


def bad_requests(seed: int, count: int, side: int):
    """Yields `count` times `(kind, signature, inputs)`, all kinds in turn."""
    rng = np.random.default_rng(seed)
    kinds = [*IMAGES, *REQUESTS]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind in IMAGES:
            yield kind, "serving_bytes", {"image_bytes": strings(IMAGES[kind](rng))}
        else:
            signature, inputs = REQUESTS[kind](rng, side)
            yield kind, str(signature), inputs


def answer(loader, signature, inputs) -> tuple[str, str]:
    """`("OK", "")`, or code and message of the status."""
    try:
        loader.run(signature, **inputs)
    except StatusError as error:
        return error.code, error.message
    return "OK", ""

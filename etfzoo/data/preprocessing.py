"""From images of any kind to a model's batch, and from its logits to labels."""

import os

import keras
import numpy as np

from etfzoo import files
from etfzoo.errors import EtfzooError, first_line


def preprocess(model, images) -> np.ndarray:
    """Brings images to the size of a model, with the same crop and filter as evaluation.

    Args:
        model: an ImageClassifier (or what has its `spec`).
        images: one image or several, which may differ in size and kind: a list, a generator, an
            array of paths, a tf.data.Dataset of images. An image is a NumPy array or tensor
            `[H, W, 3]`, RGB, uint8 or floating point in 0..255; a PIL image; or the path of a
            JPEG, PNG, BMP or GIF file. An array `[N, H, W, 3]` is N images. The orientation
            that a camera notes in EXIF is not applied, as in training and serving.

    Returns:
        float32 `[N, height, width, 3]`, whole numbers in 0..255; the normalisation is a layer of
        the model.

    Raises:
        EtfzooError: no image, another shape, type or range, a file that cannot be read, or a model
            without an image size.

    Examples:
        >>> import etfzoo, numpy as np
        >>> model = etfzoo.build_classifier("rn18", 7, input_shape=(32, 32, 3))
        >>> photo, drawing = np.zeros((48, 64, 3), np.uint8), np.full((90, 60, 3), 255.0)
        >>> etfzoo.preprocess(model, [photo, drawing]).shape
        (2, 32, 32, 3)
    """
    from etfzoo.data import augment

    height, width, _ = model.spec.input_shape
    if height is None or width is None:
        raise EtfzooError("the model has no image size; load it with input_shape=(224, 224, 3)")
    target = height, width, model.spec.crop
    batch = []
    for number, image in enumerate(_listed(images)):
        if isinstance(image, str | os.PathLike):
            batch.append(_from_file(image, target))
        else:
            pixels = _pixels(image, f"image {number}")
            batch.append(augment.evaluation_pixels(pixels, *target).numpy())
    if not batch:
        raise EtfzooError("there is no image to preprocess")
    return np.stack(batch)


def decode_predictions(
    model, outputs, top: int = 5, *, from_logits: bool = True
) -> list[list[tuple[int, str, float]]]:
    """The likeliest classes of each image.

    Args:
        model: the classifier; its `spec.labels` are the labels: what its class names mean where
            that is known, else the names, or the class numbers where it has none.
        outputs: `[N, K]` or `[K]`: what the model gives.
        top: number of classes an image, at most K.
        from_logits: True says that these are logits, to which softmax is applied, as the models of
            etfzoo give them; False that they are probabilities already.

    Returns:
        For each image `(class_id, label, score)`, best first; score is a probability.

    Raises:
        EtfzooError: a model without head, another number of classes, values that are not finite,
            or that contradict `from_logits`.

    Examples:
        >>> import etfzoo
        >>> names = ("ant", "bee", "cat")
        >>> model = etfzoo.build_classifier(
        ...     "rn18", 3, input_shape=(32, 32, 3), class_names=names
        ... )
        >>> for class_id, label, score in etfzoo.decode_predictions(model, [[0, 3, 1]], top=2)[0]:
        ...     print(class_id, label, round(score, 3))
        1 bee 0.844
        2 cat 0.114
    """
    spec = model.spec
    if spec.head is None:
        raise EtfzooError("the model has no head and gives features, which no label belongs to")
    scores = np.atleast_2d(keras.ops.convert_to_numpy(outputs)).astype(np.float64)
    if scores.ndim != 2 or scores.shape[1] != spec.num_classes:
        raise EtfzooError(
            f"outputs must be [N, {spec.num_classes}] for this model; got {list(scores.shape)}"
        )
    if not isinstance(top, int) or top < 1:
        raise EtfzooError(f"top must be a positive integer; got {top!r}")
    if not np.isfinite(scores).all():
        raise EtfzooError("outputs must be finite numbers")
    are_shares = scores.min(initial=0) >= 0 and np.allclose(scores.sum(-1), 1, atol=1e-2)
    if from_logits and are_shares and spec.num_classes > 1 and len(scores):
        raise EtfzooError("outputs look like probabilities: pass from_logits=False")
    if not from_logits and not are_shares:
        raise EtfzooError("outputs are no probabilities: leave out from_logits=False")
    if from_logits:
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :top]
    return [
        [(int(i), spec.labels[i], float(row[i])) for i in best]
        for row, best in zip(scores, order, strict=True)
    ]


def _listed(images):
    """The images one by one."""
    if isinstance(images, np.ndarray) and (images.dtype == object or images.dtype.kind in "US"):
        return images.ravel()
    shape = getattr(images, "shape", None)
    if shape is not None:
        return list(_values(images, "this")) if len(shape) == 4 else [images]
    one = isinstance(images, str | bytes | os.PathLike) or not hasattr(images, "__iter__")
    return [images] if one else images


def _from_file(path, target):
    import tensorflow as tf

    from etfzoo.data import augment

    content = files.read_bytes(files.expand(path))
    try:
        return augment.evaluation_image(content, *target).numpy()
    except tf.errors.InvalidArgumentError as e:
        raise EtfzooError(f"{path} is no image that can be read: {first_line(e)}") from e


def _pixels(image, what):
    """A decoded image as `[H, W, 3]`, uint8 or float32."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return _pixels_of_pil(image, what)
    if isinstance(image, bytes):
        raise EtfzooError(f"{what} is encoded; write it to a file, or decode it first")
    pixels = _values(image, what)
    if pixels.dtype == object:
        raise EtfzooError(
            f"{what} is a {type(image).__name__}; give an array, a PIL image or a path"
        )
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise EtfzooError(
            f"{what} has the shape {list(pixels.shape)}; it must be [height, width, 3], RGB"
        )
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) and pixels.dtype.name != "bfloat16":
        raise EtfzooError(f"{what} has the type {pixels.dtype}; it must be uint8 or floating point")
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255):  # NaN ends here too
        raise EtfzooError(f"{what} has values from {low:g} to {high:g}; they must lie in 0..255")
    if 0 < high <= 1:
        raise EtfzooError(
            f"the largest value of {what} is {high:g}: multiply it by 255, or give it as uint8"
        )
    return pixels


def _values(image, what):
    """What is in an array or tensor of any library."""
    try:
        return np.asarray(keras.ops.convert_to_numpy(image))
    except Exception as e:  # TensorFlow, JAX and Keras each raise another one
        raise EtfzooError(
            f"{what}, a {type(image).__name__}, has no values here. In a function that is traced, "
            "as in dataset.map, write tf.numpy_function(lambda image: etfzoo.preprocess(model, "
            "image), [image], tf.float32)"
        ) from e


def _pixels_of_pil(image, what):
    """As the decoder of files gives them: the upper 8 bits of 16, and alpha dropped."""
    from etfzoo.data import decoding

    if image.mode in ("I", "F"):
        raise EtfzooError(
            f"{what} is a PIL image of mode {image.mode}, whose values have no range; give it as "
            "an array [height, width, 3] in 0..255"
        )
    if image.width * image.height > decoding.max_pixels():
        raise EtfzooError(
            f"{what} has {image.height} x {image.width} pixels, more than {decoding.max_pixels()}"
        )
    try:
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.stack([grey] * 3, axis=-1)
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as e:  # Pillow decodes a file only here
        raise EtfzooError(f"{what} cannot be decoded: {first_line(e)}") from e

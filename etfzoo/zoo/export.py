"""Files for other programs: ONNX, and `.keras` files that plain Keras loads.

For TensorFlow and TF Serving see `etfzoo.publish`.
"""

import dataclasses
import importlib
import json
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.errors import EtfzooError, extra
from etfzoo.models import backbones, weights
from etfzoo.models.classifier import ImageClassifier

OPSET = 18


def export_onnx(model: ImageClassifier, path) -> None:
    """Writes a classifier as ONNX: `images` to `logits` (without a head `features`), float32.

    `images` is float32 `[N, H, W, 3]`, RGB in 0..255, as everywhere; normalisation is in the graph
    and batch norm is folded into the convolutions. Class names and the whole spec are in the
    file's metadata, as JSON.

    Args:
        model: the classifier; TensorFlow backend.
        path: of the file.

    Raises:
        EtfzooError: another backend, tf2onnx is not installed, or the file cannot be written.
    """
    if keras.backend.backend() != "tensorflow":
        raise EtfzooError("ONNX export needs the TensorFlow backend: set KERAS_BACKEND=tensorflow")
    with extra("onnx"):
        tf2onnx = importlib.import_module("tf2onnx")
    single = _in_float32(model)
    output = "features" if model.spec.head is None else "logits"
    images = tf.TensorSpec([None, *model.spec.input_shape], tf.float32, name="images")
    function = tf.function(
        lambda images: {output: single(images, training=False)}, input_signature=[images]
    )
    onnx_model, _ = tf2onnx.convert.from_function(function, input_signature=[images], opset=OPSET)
    spec = dataclasses.asdict(model.spec)
    for key in ("spec", "class_names"):
        value = spec if key == "spec" else spec["class_names"]
        onnx_model.metadata_props.add(key=key, value=json.dumps(value))
    with files.atomic(path) as file:
        file.write(onnx_model.SerializeToString())


def onnx_difference(model: ImageClassifier, path) -> float | None:
    """How far an ONNX file is from its model on random images.

    Args:
        model: what was exported.
        path: of the ONNX file.

    Returns:
        The largest difference, relative to the largest output; None without ONNX Runtime.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = [side or 64 for side in model.spec.input_shape]
    images = np.random.default_rng(0).uniform(0, 255, [2, *size]).astype("float32")
    (outputs,) = session.run(None, {"images": images})
    expected = keras.ops.convert_to_numpy(_in_float32(model)(images, training=False))
    return float(np.abs(outputs - expected).max() / np.abs(expected).max())


def export_keras(model: ImageClassifier, path) -> None:
    """Writes a `.keras` file of Keras's own layers where it has such (see `backbones.stock`).

    Without Switchable Whitening and feature norms, `keras.saving.load_model` reads it where etfzoo
    is not installed.

    Args:
        model: the classifier.
        path: of the file, which ends in `.keras`.

    Raises:
        EtfzooError: another suffix, or the file cannot be written.
    """
    path = files.destination(path)
    if path.suffix != ".keras":
        raise EtfzooError(f"Keras reads files whose name ends in .keras; got {path}")
    stock = backbones.stock(model)
    try:  # Keras writes to names that end in .keras only: hence a folder
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
            stock.save(Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise EtfzooError(f"cannot write {path}: {error.strerror or error}") from error


def _in_float32(model):
    if model.spec.dtype == "float32":
        return model
    single = ImageClassifier(dataclasses.replace(model.spec, dtype="float32"))
    weights.assign(single.variables, weights.as_arrays(model.variables))
    return single

"""Files for other programs: ONNX, LiteRT, OpenVINO, and `.keras` files that plain Keras loads.

For TensorFlow and TF Serving see `etfzoo.publish`. LiteRT (once TensorFlow Lite) and OpenVINO can
compute in int8: each layer's range is then taken from images (post-training quantization).
"""

import dataclasses
import importlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.errors import EtfzooError, extra, first_line, unknown
from etfzoo.models import backbones, weights
from etfzoo.models.classifier import ImageClassifier

OPSET = 18
# How LiteRT and OpenVINO store the weights; of int8 the activations are int8, too.
STORAGES = ("float32", "float16", "int8")


class Comparison(NamedTuple):
    """How far an exported file is from its model.

    Attributes:
        difference: the largest one, relative to the largest output.
        agreement: share of the images whose largest output is the same one.
        images: number of images.
    """

    difference: float
    agreement: float
    images: int


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
    function, _ = _traceable(model, tf.float32)
    with extra("onnx"):
        tf2onnx = importlib.import_module("tf2onnx")
        onnx = importlib.import_module("onnx")
    signature = list(function.input_signature)
    onnx_model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    # Constants that a layer keeps, as Normalization its mean, come as inputs of the graph.
    inputs = {found.name: found for found in onnx_model.graph.input}
    for value, place in function.get_concrete_function().graph.captures:
        if place.name in inputs:
            onnx_model.graph.input.remove(inputs[place.name])
            constant = onnx.numpy_helper.from_array(value.numpy(), place.name)
            onnx_model.graph.initializer.append(constant)
    for key, value in _metadata(model).items():
        onnx_model.metadata_props.add(key=key, value=value)
    with files.atomic(path) as file:
        file.write(onnx_model.SerializeToString())


def export_litert(model: ImageClassifier, path, storage: str = "float32", images=None) -> None:
    """Writes a classifier for LiteRT (TensorFlow Lite): `images` to `logits`, or `features`.

    `images` is uint8 `[N, H, W, 3]`, RGB; the outputs are float32 with every storage. N is 1
    unless the interpreter resizes its input. Normalisation is in the graph. The file is also a
    zip archive, as is usual for LiteRT: `labels.txt` in it has a class name a line, `spec.json` the
    whole spec.

    Args:
        model: the classifier; TensorFlow backend.
        path: of the file.
        storage: `"float32"`, `"float16"` (weights only) or `"int8"` (weights, one scale a channel,
            and activations).
        images: for int8, uint8 `[N, H, W, 3]` as the model will see them, some hundreds.

    Raises:
        EtfzooError: another backend, a model without an image size, int8 without images, layers
            that there are not in int8, or the file cannot be written.
    """
    _check_storage(storage, images)
    function, module = _traceable(model, tf.uint8)
    if None in model.spec.input_shape:
        raise EtfzooError("LiteRT needs an image size: load with input_shape=(224, 224, 3)")
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], module
    )
    if storage != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if storage == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if storage == "int8":
        converter.representative_dataset = lambda: ([image[None]] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = io.BytesIO()
    content.write(converter.convert())
    # Readers of the model stop at its end, readers of the archive begin there.
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("spec.json", _metadata(model)["spec"])
        if model.spec.head is not None:
            archive.writestr("labels.txt", "".join(f"{name}\n" for name in model.spec.labels))
    with files.atomic(path) as file:
        file.write(content.getvalue())


def export_openvino(model: ImageClassifier, path, storage: str = "float32", images=None) -> None:
    """Writes a classifier as OpenVINO IR: `images` to `logits`, or `features`.

    `images` is uint8 `[N, H, W, 3]`, RGB; the outputs are float32 with every storage.
    Normalisation is in the graph. The weights are in a second file, which ends in `.bin`. Class
    names and spec are in the model's `rt_info`, as JSON under `etfzoo`.

    Args:
        model: the classifier; TensorFlow backend.
        path: of the file, which ends in `.xml`.
        storage, images: as for `export_litert`. What a processor computes in is its own choice: of
            float32, too, one that has bfloat16 takes that, unless `INFERENCE_PRECISION_HINT` says
            `f32`.

    Raises:
        EtfzooError: another backend or suffix, Switchable Whitening, openvino (for int8 nncf, too)
            is not installed, int8 without images, or the files cannot be written.
    """
    path = files.destination(path)
    if path.suffix != ".xml":
        raise EtfzooError(f"OpenVINO reads models whose name ends in .xml; got {path}")
    _check_storage(storage, images)
    if model.spec.norm == "sw":
        raise EtfzooError(
            "OpenVINO cannot convert an operation of Switchable Whitening (MatrixDiag): export to "
            "ONNX, which it reads, too"
        )
    function, _ = _traceable(model, tf.uint8)
    with extra("openvino"):
        openvino = importlib.import_module("openvino")
        nncf = importlib.import_module("nncf") if storage == "int8" else None
    converted = openvino.convert_model(function.get_concrete_function())
    if nncf is not None:
        dataset = nncf.Dataset([image[None] for image in images])
        converted = nncf.quantize(converted, dataset, subset_size=len(images))
    for key, value in _metadata(model).items():
        converted.set_rt_info(value, ["etfzoo", key])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
            written = Path(folder) / path.name
            openvino.save_model(converted, written, compress_to_fp16=storage == "float16")
            os.replace(written.with_suffix(".bin"), path.with_suffix(".bin"))
            os.replace(written, path)
    except (OSError, RuntimeError) as error:
        raise EtfzooError(f"cannot write {path}: {first_line(error)}") from error


def compare(model: ImageClassifier, path, form: str, images=None) -> Comparison | None:
    """How far an exported file is from its model, which computes in float32.

    Args:
        model: what was exported.
        path: of the file.
        form: `"onnx"`, `"litert"` or `"openvino"`.
        images: uint8 `[N, H, W, 3]`; None is two of random pixels.

    Returns:
        None where what runs the file is not installed.
    """
    try:
        run = _RUNTIMES[form](str(path))
    except ImportError:
        return None
    if images is None:
        size = [side or 64 for side in model.spec.input_shape]
        images = np.random.default_rng(0).integers(0, 256, [2, *size], np.uint8)
    outputs = np.concatenate([run(image[None]) for image in images])
    single = _in_float32(model)
    expected = single.predict(images.astype("float32"), batch_size=16, verbose=0)
    return Comparison(
        float(np.abs(outputs - expected).max() / np.abs(expected).max()),
        float((outputs.argmax(-1) == expected.argmax(-1)).mean()),
        len(images),
    )


def _run_onnx(path):
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.astype("float32")})[0]


def _run_litert(path):
    with warnings.catch_warnings():
        # It is to move into a package of its own, which TensorFlow's releases have not done yet.
        warnings.filterwarnings("ignore", "(?s).*tf.lite.Interpreter is deprecated")
        run = tf.lite.Interpreter(path).get_signature_runner()
    return lambda images: next(iter(run(images=images).values()))


def _run_openvino(path):
    openvino = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images)[0]


_RUNTIMES: dict[str, Callable] = {
    "onnx": _run_onnx,
    "litert": _run_litert,
    "openvino": _run_openvino,
}


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


def _check_storage(storage, images):
    if storage not in STORAGES:
        raise unknown("storage", storage, STORAGES)
    if storage == "int8" and (images is None or not len(images)):
        raise EtfzooError("int8 needs images that show the range of each layer's outputs")


def _metadata(model) -> dict[str, str]:
    spec = dataclasses.asdict(model.spec)
    return {"spec": json.dumps(spec), "class_names": json.dumps(spec["class_names"])}


def _traceable(model, dtype):
    """The float32 network as a function of TensorFlow, and what has its variables."""
    if keras.backend.backend() != "tensorflow":
        raise EtfzooError("this format needs the TensorFlow backend: set KERAS_BACKEND=tensorflow")
    single = _in_float32(model)
    output = "features" if model.spec.head is None else "logits"

    def run(images):
        return {output: single(tf.cast(images, tf.float32), training=False)}

    module = tf.Module()
    module.weights = [v.value for v in single.variables]
    images = tf.TensorSpec([None, *model.spec.input_shape], dtype, name="images")
    return tf.function(run, input_signature=[images]), module


def _in_float32(model):
    if model.spec.dtype == "float32":
        return model
    single = ImageClassifier(dataclasses.replace(model.spec, dtype="float32"))
    weights.assign(single.variables, weights.as_arrays(model.variables))
    return single

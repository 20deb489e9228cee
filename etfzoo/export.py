"""Published models: writing one SavedModel folder, and reading its metadata and weights back.

A version folder is a plain SavedModel and three more files:

    saved_model.pb, variables/     what TensorFlow and TF Serving read
    assets.extra/etfzoo.json       the spec that rebuilds the Keras model, and where it comes from
    assets.extra/files.json        sha256 and size of all other files, see etfzoo.manifest
    README.md                      the model card

The weights are stored once. They are the variables of a `tf.Module` whose dict `weights` maps the
escaped path of a Keras variable to it: `%`, `/` and `.` become `%25`, `%2F` and `%2E`, because `/`
separates and `.` escapes in the keys of a checkpoint. The Keras model itself is only traced; saving
it as well would store every variable a second time.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import shutil
import uuid
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from etfzoo import card, files, manifest, weights
from etfzoo.classifier import ClassifierSpec, ImageClassifier, feature_model
from etfzoo.data import augment
from etfzoo.errors import EtfzooError, first_line
from etfzoo.version import __version__

FORMAT = 1
METADATA = "assets.extra/etfzoo.json"
TOP_K = 5

_KEY_PREFIX = "weights/"
_KEY_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def publish(
    model: ImageClassifier,
    directory,
    version: int | None = None,
    *,
    provenance: dict | None = None,
    metrics: dict | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a classifier as one SavedModel folder, `<directory>/<version>/`.

    The folder appears all at once or not at all. TensorFlow and TF Serving read it as it is, and
    `etfzoo.load` rebuilds the trainable Keras model from it. Its signatures:

    - `serving_default`: `images` float32 `[N, H, W, 3]`, RGB in 0..255, to `logits`,
      `probabilities` `[N, K]` and `class_ids` `[N]`.
    - `features`: `images` to the pooled `features` `[N, p]`.
    - `serving_bytes`: `image_bytes` `[N]`, encoded JPEG or PNG of any sizes, to the
      `class_ids`, `labels` and `scores` `[N, k]` of the k = min(5, K) likeliest classes, best
      first. Left out where the model's height or width is open.

    Without a head each of them returns `features`. The reloaded object can be called too:
    `tf.saved_model.load(path)(images, training=True)` returns `features` and `logits`, updates
    the moving statistics and has gradients to the trainable variables in `.weights`.

    Args:
        model: the classifier; TensorFlow backend.
        directory: the model's folder, e.g. `saved_models/rn18_etf.shapes`; made if needed.
        version: a positive integer; None is one above the highest that exists.
        provenance: what the weights come from (command, dataset, config, seed); JSON values.
        metrics: results; `top1` (a share of 1) is shown by `etfzoo.load`.
        licence: licence of the weights.
        overwrite: whether an existing `version` is replaced.

    Returns:
        Path of the version folder.

    Raises:
        EtfzooError: not an ImageClassifier, another backend, an existing version, values that are
            not JSON, or a folder that cannot be written; then nothing is left behind.
    """
    if keras.backend.backend() != "tensorflow":
        raise EtfzooError(
            "publishing needs the TensorFlow backend: set KERAS_BACKEND=tensorflow "
            f"(this is {keras.backend.backend()}) and load the checkpoint there"
        )
    if not isinstance(model, ImageClassifier):
        raise EtfzooError(
            f"only an etfzoo.ImageClassifier can be published; got a {type(model).__name__}"
        )
    if "://" in str(directory):
        raise EtfzooError(f"publish writes local folders only; got {directory}")
    directory = Path(directory).expanduser()
    if (directory / "saved_model.pb").exists():
        raise EtfzooError(f"{directory} is a version folder; publish to its parent")
    if version is None:
        version = max(version_folders(directory), default=0) + 1
    if not isinstance(version, int) or version < 1:
        raise EtfzooError(f"version must be a positive integer; got {version!r}")
    target = directory / str(version)
    if target.exists() and not overwrite:
        raise _taken(target)
    metadata = _metadata_text(model, provenance, metrics, licence)

    temporary = directory / f".tmp-{version}-{uuid.uuid4().hex[:8]}"
    made = []
    done = False
    try:
        for folder in (*reversed(directory.parents), directory):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        temporary.mkdir()
        _save(model, temporary)
        (temporary / METADATA).parent.mkdir()
        (temporary / METADATA).write_text(metadata, "utf-8")
        text = card.text(directory.absolute().name, version, read_metadata(temporary))
        (temporary / card.NAME).write_text(text, "utf-8")
        manifest.write(temporary)
        _move_into_place(temporary, target, overwrite)
        done = True
    except EtfzooError:
        raise
    except Exception as e:
        raise EtfzooError(f"could not publish to {target}: {_reason(e)}") from e
    finally:  # also after Ctrl-C, which goes on its way
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in reversed(made):
                    folder.rmdir()
    return target


def version_folders(directory) -> dict[int, Path]:
    """The folders in a model's folder that are named by an integer, by version."""
    directory = Path(directory)
    if not directory.is_dir():
        return {}
    return {
        int(p.name): p
        for p in directory.iterdir()
        if p.name.isascii() and p.name.isdigit() and str(int(p.name)) == p.name and p.is_dir()
    }


def read_metadata(folder) -> dict:
    """The metadata of a version folder, with `spec` as a ClassifierSpec.

    Args:
        folder: the version folder.

    Raises:
        EtfzooError: the file is missing, broken or of a newer format; names the file.
    """
    path = Path(folder) / METADATA
    try:
        metadata = files.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise EtfzooError(
            f"{path} is missing: not published by etfzoo, or an incomplete copy"
        ) from None
    except (OSError, ValueError) as e:
        raise EtfzooError(f"{path} cannot be read: {first_line(e)}") from e
    number = metadata.get("format") if isinstance(metadata, dict) else None
    if type(number) is not int or number < 1:
        raise EtfzooError(f"{path} is not etfzoo metadata: it has no format number")
    if metadata["format"] > FORMAT:
        raise EtfzooError(
            f"{path} has format {metadata['format']}, and this etfzoo {__version__} reads up to "
            f"{FORMAT}: upgrade etfzoo"
        )
    for name in ("provenance", "metrics"):
        if not isinstance(metadata.get(name, {}), dict):
            raise EtfzooError(f"{path} is broken: {name} is no JSON object")
    try:
        return metadata | {"spec": ClassifierSpec.from_dict(metadata["spec"])}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise EtfzooError(f"{path} has no usable spec: {first_line(e)}") from e


def read_weights(folder) -> dict[str, np.ndarray]:
    """The weights of a version folder by path of the Keras variable; runs nothing from it.

    Args:
        folder: the version folder.

    Raises:
        EtfzooError: missing, truncated or damaged files; names them.
    """
    prefix = Path(folder) / "variables" / "variables"
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        return {
            _unescape(key[len(_KEY_PREFIX) : -len(_KEY_SUFFIX)]): reader.get_tensor(key)
            for key in reader.get_variable_to_shape_map()
            if key.startswith(_KEY_PREFIX) and key.endswith(_KEY_SUFFIX)
        }
    except (tf.errors.OpError, IndexError, OSError, RuntimeError, ValueError) as e:
        raise EtfzooError(
            f"the weights in {prefix}.* are damaged or incomplete: {first_line(e)}"
        ) from e


def _on_one_device(model):
    """The model, or a copy of one with distributed variables, as TensorFlow cannot save those."""
    if not any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables):
        return model
    if tf.distribute.has_strategy():
        raise EtfzooError("call publish outside of the strategy's scope")
    copy = ImageClassifier(model.spec, name=model.name)
    weights.assign(copy.variables, weights.as_arrays(model.variables))
    return copy


def _save(model, folder):
    model = _on_one_device(model)
    module = tf.Module()
    module.weights = {_escape(v.path): v.value for v in model.variables}
    if len(module.weights) != len(model.variables):
        raise EtfzooError("two variables of the model have the same path; give layers unique names")
    module.__call__ = _forward(model)
    # The one line that TensorFlow logs here names the temporary folder.
    log = logging.getLogger("tensorflow")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        signatures = _signatures(model.spec, module.__call__)
        tf.saved_model.save(module, str(folder), signatures=signatures)
    finally:
        log.setLevel(level)


def _forward(model):
    """The network as a tf.function of images and `training`, traced once for either value."""
    taps = ("features",) if model.spec.head is None else ("features", "logits")
    network = feature_model(model, taps)
    images_spec = tf.TensorSpec([None, *model.spec.input_shape], tf.float32, name="images")

    def run(images, training):
        outputs = network(tf.cast(images, network.inputs[0].dtype), training=training)
        return {name: tf.cast(y, tf.float32) for name, y in outputs.items()}

    # Saving traces a tf.function again; what it calls is a concrete function and stays as it is.
    concrete = {
        training: tf.function(run, autograph=False).get_concrete_function(images_spec, training)
        for training in (False, True)
    }

    @tf.function(autograph=False)
    def forward(images, training=False):
        return concrete[training](images)

    for training in (False, True):
        forward.get_concrete_function(images_spec, training=training)
    return forward


def _signatures(spec, forward):
    height, width, channels = spec.input_shape
    images = tf.TensorSpec([None, height, width, channels], tf.float32, name="images")
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")

    def features(images):
        return {"features": forward(images, training=False)["features"]}

    def classify(images):
        logits = forward(images, training=False)["logits"]
        return {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
            "class_ids": tf.argmax(logits, axis=-1),
        }

    def pixels(image_bytes):
        return tf.map_fn(
            lambda b: augment.evaluation_image(b, height, width, spec.crop),
            image_bytes,
            fn_output_signature=tf.TensorSpec([height, width, channels], tf.float32),
        )

    def features_of_bytes(image_bytes):
        return features(pixels(image_bytes))

    def classify_bytes(image_bytes):
        labels = tf.constant(spec.class_names or [str(i) for i in range(spec.num_classes)])
        probabilities = classify(pixels(image_bytes))["probabilities"]
        scores, ids = tf.math.top_k(probabilities, k=min(TOP_K, spec.num_classes))
        return {"class_ids": tf.cast(ids, tf.int64), "labels": tf.gather(labels, ids)} | {
            "scores": scores
        }

    def trace(function, argument):
        return tf.function(function, input_signature=[argument])

    signatures = {
        "serving_default": trace(features if spec.head is None else classify, images),
        "features": trace(features, images),
    }
    if height is not None and width is not None:
        serve = features_of_bytes if spec.head is None else classify_bytes
        signatures["serving_bytes"] = trace(serve, encoded)
    return signatures


def _metadata_text(model, provenance, metrics, licence):
    metadata = {
        "format": FORMAT,
        "manifest": manifest.FORMAT,  # says that files.json belongs to the folder
        "etfzoo_version": __version__,
        "keras_version": keras.__version__,
        "spec": dataclasses.asdict(model.spec),
        "variables": {v.path: [list(v.shape), v.dtype] for v in model.variables},
        "provenance": provenance or {},
        "metrics": metrics or {},
        "licence": licence,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for name in ("provenance", "metrics", "licence"):
        if name != "licence" and not isinstance(metadata[name], dict):
            raise EtfzooError(f"{name} must be a dict; got a {type(metadata[name]).__name__}")
        try:
            # NaN would make the file invalid for every other JSON reader.
            json.dumps(metadata[name], default=_plain, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise EtfzooError(f"{name} cannot be written as JSON: {first_line(e)}") from e
    return json.dumps(metadata, indent=1, default=_plain) + "\n"


def _plain(value):
    """NumPy scalars and arrays, tensors and paths as JSON values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not a JSON value")


def _move_into_place(temporary, target, overwrite):
    if not (overwrite and target.exists()):
        try:
            os.rename(temporary, target)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _taken(target) from None  # another publisher was faster
            raise
        return
    old = temporary.with_name(temporary.name.replace(".tmp", ".old"))
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _taken(target):
    return EtfzooError(f"{target} already exists; choose another version or overwrite=True")


def _escape(path: str) -> str:
    return path.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")


def _unescape(key: str) -> str:
    return key.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def _reason(error) -> str:
    text = str(error)
    if "No space left" in text or "Disk quota" in text:
        reason = "Disk quota exceeded" if "Disk quota" in text else "No space left on device"
        return f"{reason}; free some space or choose another directory"
    if isinstance(error, OSError):
        return f"{error.strerror or first_line(error)}; choose another directory"
    return f"{type(error).__name__}: {first_line(error)}"

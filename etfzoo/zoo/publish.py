"""Published models: writing one SavedModel folder, and reading its weights back.

A version folder is a plain SavedModel and three more files:

    saved_model.pb, variables/     what TensorFlow and TF Serving read (etfzoo.zoo.saved_model)
    assets.extra/etfzoo.json       the spec that rebuilds the Keras model, and where it comes from
    assets.extra/tf_serving_warmup_requests
    assets.extra/files.json        sha256 and size of all other files, see etfzoo.zoo.manifest
    README.md                      the model card
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from etfzoo import internals, locks
from etfzoo.errors import EtfzooError, first_line, shown
from etfzoo.models.classifier import ImageClassifier
from etfzoo.models.table import MAX_VERSION
from etfzoo.version import __version__
from etfzoo.zoo import card, manifest, saved_model, verify
from etfzoo.zoo.metadata import FORMAT, METADATA, read_metadata, version_folders

_TEMPORARY, _REPLACED = ".publishing-", "replaced"


def check_backend() -> None:
    """Raises EtfzooError where Keras does not run on TensorFlow, which writes SavedModels."""
    if keras.backend.backend() != "tensorflow":
        raise EtfzooError(
            "publishing needs the TensorFlow backend: repeat this with KERAS_BACKEND=tensorflow, "
            "which reads workdirs of every backend"
        )


def publish(
    model: ImageClassifier,
    directory,
    version: int | None = None,
    *,
    storage: str = "float32",
    provenance: dict | None = None,
    metrics: dict | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a classifier as one SavedModel folder, `<directory>/<version>/`.

    The folder appears all at once or not at all, after what was written was read back: its weights
    are the model's bit for bit, and it serves the model's outputs. TensorFlow and TF Serving read
    it as it is, and `etfzoo.load` rebuilds the trainable Keras model from it. Its signatures:

    - `serving_default`: `images` float32 `[N, H, W, 3]`, RGB in 0..255, to `logits`,
      `probabilities` `[N, K]` and `class_ids` `[N]`.
    - `features`: `images` to the pooled `features` `[N, p]`, the maps `stem`, `stage1` to `stage4`
      and, where there is a projector, its output `projected` (ask TF Serving for those that you
      need with `output_filter`).
    - `serving_bytes`: `image_bytes` `[N]`, encoded JPEG or PNG of any sizes, to the
      `class_ids`, `labels` and `scores` `[N, k]` of the k = min(5, K) likeliest classes, best
      first. Left out where the model's height or width is open.

    Without a head each of them returns `features`. They compute in float32, with batch norm folded
    into the convolutions; those weights are derived when the SavedModel is loaded, so that serving
    holds the stored weights and a float32 copy of them in memory. The reloaded object can be
    called too: `tf.saved_model.load(path)(images, training=True)` returns `features` and `logits`
    of the stored weights in `.weights`, updates the moving statistics and has gradients to the
    trainable ones. (Train float32 storage: float16 weights lose small steps. What is trained there
    reaches the signatures only when it is saved and loaded again.)

    Args:
        model: the classifier; TensorFlow backend.
        directory: the model's folder, e.g. `saved_models/rn18_etf.shapes`; made if needed.
        version: a positive integer below 2^63, as TF Serving reads it; None is one above the
            highest that exists.
        storage: `"float32"`, or `"float16"` for half the size: weights rounded to 11 bits.
        provenance: what the weights come from (command, dataset, config, seed); JSON values.
        metrics: results; `top1` (a share of 1) is shown by `etfzoo.load`.
        licence: licence of the weights.
        overwrite: whether an existing `version` is replaced.

    Returns:
        Path of the version folder.

    Raises:
        EtfzooError: not an ImageClassifier, another backend, an existing version, values that are
            not JSON, or a folder that cannot be written; a model that its spec does not rebuild
            (quantized, with LoRA, with a changed layer), a head of one class, weights that are NaN
            or infinite, negative variances. Then nothing is left behind.

    Examples:
        >>> import etfzoo
        >>> model = etfzoo.build_classifier("rn18", 7, input_shape=(32, 32, 3))
        >>> folder = etfzoo.publish(model, "models/rn18_etf.birds", licence="Apache-2.0")
        >>> folder.as_posix()
        'models/rn18_etf.birds/1'
    """
    check_backend()
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
    if type(version) is not int or not 1 <= version <= MAX_VERSION:
        raise EtfzooError(f"version must be a positive integer below 2^63; got {shown(version)}")
    target = directory / str(version)
    if target.exists() and not overwrite:
        raise _taken(target)
    metadata = _metadata_text(model, storage, provenance, metrics, licence)
    twin = verify.rebuilt(model)

    temporary = directory / f"{_TEMPORARY}{version}-{uuid.uuid4().hex[:8]}"
    made = []
    done = False
    try:
        for folder in (*reversed(directory.parents), directory):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        tidy(directory)
        temporary.mkdir()
        with locks.lock(temporary, "a publication"):
            written = temporary / str(version)
            written.mkdir()
            saved_model.save(model, written, storage)
            (written / METADATA).write_text(metadata, "utf-8")
            text = card.text(directory.absolute().name, version, read_metadata(written))
            (written / card.NAME).write_text(text, "utf-8")
            manifest.write(written)
            # With the list of hashes in place, so that what is checked is what it lists.
            verify.check_written(twin, written, dict(Weights(written)), storage)
            _move_into_place(written, target, overwrite)
        done = True
    except EtfzooError:
        raise
    except Exception as e:
        raise EtfzooError(f"could not publish to {target}: {_reason(e)}") from e
    finally:  # also after Ctrl-C, which goes on its way
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            with contextlib.suppress(OSError):
                for folder in reversed(made):
                    folder.rmdir()
    return target


def tidy(directory) -> None:
    """Removes what killed publications left in a model's folder; those that go on are left alone.

    A version that was moved away to be replaced is put back.
    """
    for temporary in Path(directory).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(EtfzooError), locks.lock(temporary, "a publication") as held:
            if held is None:  # this process's own, or there are no locks here
                continue
            for old in temporary.glob(f"{_REPLACED}/*"):
                if not (directory / old.name).exists():
                    os.rename(old, directory / old.name)
            shutil.rmtree(temporary, ignore_errors=True)


class Weights(Mapping):
    """The weights of a version folder by path of the Keras variable; runs nothing from it.

    An array is read when it is asked for.

    Args:
        folder: the version folder.

    Attributes:
        shapes: of the arrays, tuples by path.

    Raises:
        EtfzooError: missing, truncated or damaged files; names them. Also where an array is read.
    """

    def __init__(self, folder):
        self._prefix = Path(folder) / "variables" / "variables"
        with self._naming_damage():
            self._saved = internals.SavedDict(folder, "weights")
        self._keys = {saved_model.unescape(key): key for key in self._saved}
        self.shapes = {path: self._saved.shapes[key] for path, key in self._keys.items()}

    def __getitem__(self, path):
        key = self._keys[path]
        with self._naming_damage():
            return self._saved[key]

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)

    @contextlib.contextmanager
    def _naming_damage(self):
        try:
            yield
        except (tf.errors.OpError, IndexError, OSError, RuntimeError, ValueError) as e:
            raise EtfzooError(
                f"the weights in {self._prefix}.* are damaged or incomplete: {first_line(e)}"
            ) from e


def _metadata_text(model, storage, provenance, metrics, licence):
    metadata = {
        "format": FORMAT,
        "manifest": manifest.FORMAT,  # says that files.json belongs to the folder
        "etfzoo_version": __version__,
        "keras_version": keras.__version__,
        "spec": dataclasses.asdict(model.spec),
        "storage": storage,
        "variables": {
            v.path: [list(v.shape), saved_model.stored_dtype(v.path, v.dtype, storage)]
            for v in model.variables
        },
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
    # Killed from here on, `tidy` puts the old one back.
    old = temporary.parent / _REPLACED / target.name
    old.parent.mkdir()
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise


def _taken(target):
    return EtfzooError(f"{target} already exists; choose another version or overwrite=True")


def _reason(error) -> str:
    text = str(error)
    if "No space left" in text or "Disk quota" in text:
        reason = "Disk quota exceeded" if "Disk quota" in text else "No space left on device"
        return f"{reason}; free some space or choose another directory"
    if isinstance(error, OSError):
        return f"{error.strerror or first_line(error)}; choose another directory"
    return f"{type(error).__name__}: {first_line(error)}"

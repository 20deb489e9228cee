"""A published model is the model: what is checked before a version gets its place, and at load."""

import dataclasses

import numpy as np
import tensorflow as tf

from etfzoo.errors import EtfzooError
from etfzoo.layers import frames
from etfzoo.models import weights
from etfzoo.models.classifier import ImageClassifier
from etfzoo.zoo import saved_model

# Of the largest output: what folding batch norms into convolutions may change, on any device.
_TOLERANCE = 0.01
_KERNEL = "logits/kernel"


def rebuilt(model: ImageClassifier) -> ImageClassifier:
    """A second model of the same spec and weights, which is what a published version becomes.

    Raises:
        EtfzooError: the model is not what its spec and its weights say, or these are of no use.
    """
    if model.spec.head is not None and model.spec.num_classes == 1:
        raise EtfzooError(
            "a head of one class gives each image the probability 1: train it with two classes or "
            "more, or publish its features (head=None)"
        )
    arrays = weights.as_arrays(model.variables)
    check_weights(arrays, "the weights of the model")
    twin = ImageClassifier(model.spec)
    check_kernel(twin, arrays, "the weights of the model")
    try:
        weights.assign(twin.variables, arrays, "its variables")
    except EtfzooError as error:
        raise EtfzooError(
            "the model has been changed since it was built, as quantize() and enable_lora() do, "
            f"and can't be rebuilt from its spec: {error}"
        ) from error
    images = _images(model.spec)
    if not np.array_equal(_outputs(model(images)), _outputs(twin(images)), equal_nan=True):
        raise EtfzooError(
            "the model gives other outputs than its spec with its weights: a layer, e.g. the "
            "activation of its head, has been changed since it was built"
        )
    return twin


def check_weights(arrays, what: str) -> None:
    """Refuses weights with which no network computes anything.

    Args:
        arrays: by path of the variable.
        what: whose they are, for the error.

    Raises:
        EtfzooError: NaN, infinite values or negative variances; names a variable.
    """
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise EtfzooError(f"{what} are of no use: {path} has NaN or infinite values")
        variances = array
        if path.endswith("moving_covariance"):
            variances = np.diagonal(array, axis1=-2, axis2=-1)
        elif not path.endswith("moving_variance"):
            continue
        if variances.min(initial=0) < 0:
            raise EtfzooError(f"{what} are of no use: {path} has negative variances")


def check_kernel(fresh: ImageClassifier, arrays, what: str) -> None:
    """Refuses a fixed classifier that is not the one of the spec.

    One that training has turned to the class means (`guided`) must be a simplex ETF, and another
    one that of its seed.

    Args:
        fresh: a model of the spec, whose frame is as its seed draws it.
        arrays: the weights, by path of the variable.
        what: whose they are, for the error.

    Raises:
        EtfzooError: the frame of the weights is not its seed's, or no ETF.
    """
    if fresh.spec.head != "etf" or _KERNEL not in arrays:
        return
    found, drawn = arrays[_KERNEL], np.asarray(fresh.get_layer("logits").kernel)
    # Entries are at most 1. What was once stored as float16 is rounded to it for good, and another
    # linear algebra library may draw other last bits.
    if found.shape != drawn.shape or np.abs(found - drawn).max() <= 1e-3:
        return
    if fresh.spec.guided:
        if frames.is_simplex_etf(found.T):
            return
        raise EtfzooError(f"{what} are not those of its spec: {_KERNEL} is no simplex ETF")
    if fresh.spec.frame == "softmax_code" and _as_good(found.astype(np.float64).T, drawn.T):
        return
    raise EtfzooError(
        f"{what} are not those of its spec: {_KERNEL} is not the {fresh.spec.frame} of seed "
        f"{fresh.spec.seed}"
    )


def _as_good(frame, drawn) -> bool:
    """Whether a code is one that a search on another kind of machine may have found."""
    near_one = np.abs(np.linalg.norm(frame, axis=1) - 1).max() < 1e-2
    return near_one and frames.coherence(frame)[0] < frames.coherence(drawn)[0] + 0.02


def check_written(twin: ImageClassifier, folder, arrays, storage: str) -> None:
    """Compares what was written with the model: its weights bit for bit, and what it serves.

    Args:
        twin: see `rebuilt`.
        folder: the version folder.
        arrays: the weights that were read back from it.
        storage: the type in which they are stored.

    Raises:
        EtfzooError: a weight differs, or the SavedModel serves other outputs.
    """
    expected = {
        path: array.astype(saved_model.stored_dtype(path, str(array.dtype), storage))
        for path, array in weights.as_arrays(twin.variables).items()
    }
    different = [path for path, a in expected.items() if not np.array_equal(a, arrays.get(path))]
    if different or expected.keys() != arrays.keys():
        raise EtfzooError(
            f"{folder} was not written as it should be: {len(different)} weights differ, "
            f"{', '.join(different[:3])}; please report this"
        )
    if twin.spec.dtype != "float32" or storage != "float32":  # signatures compute in float32
        twin = ImageClassifier(dataclasses.replace(twin.spec, dtype="float32"))
        weights.assign(twin.variables, arrays)
    images = _images(twin.spec)
    wanted = _outputs(twin(images))
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    served = serve(images=tf.constant(images))
    served = _outputs(served["features" if twin.spec.head is None else "logits"])
    largest = np.abs(wanted).max()
    if not np.abs(served - wanted).max() <= _TOLERANCE * largest:  # also where one is NaN
        raise EtfzooError(
            f"the SavedModel would serve other outputs than the model, by up to "
            f"{np.abs(served - wanted).max():.3g} of {largest:.3g}: it was not published"
        )


def _images(spec):
    """Two images of noise, which any change of a network changes."""
    shape = [n or 64 for n in spec.input_shape]
    return np.random.default_rng(0).uniform(0, 255, (2, *shape)).astype("float32")


def _outputs(values):
    return np.asarray(tf.cast(values, tf.float32))

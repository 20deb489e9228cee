"""The SavedModel of a classifier: stored weights, served weights, training function, signatures.

The weights are stored once, as variables of a `tf.Module` whose dict `weights` maps the escaped
path of a Keras variable to it: `%`, `/` and `.` become `%25`, `%2F` and `%2E`, because `/`
separates and `.` escapes in the keys of a checkpoint. The Keras model itself is only traced; saving
it as well would store every variable a second time.

What the signatures read is derived from them once, when the SavedModel is loaded: convolutions, and
the layers of a projector, with their batch norm folded in, and float32 copies of what is stored as
float16.
"""

import dataclasses
import logging

import numpy as np
import tensorflow as tf

from etfzoo import internals
from etfzoo.data import augment, decoding
from etfzoo.errors import EtfzooError, unknown
from etfzoo.models import folding
from etfzoo.models.classifier import ImageClassifier, feature_model
from etfzoo.models.table import STORAGES

TOP_K = 5
# Less than what public hosts of git repositories take as one file.
SHARD_BYTES = 90 * 10**6


def save(model: ImageClassifier, folder, storage: str = "float32") -> None:
    """Writes the SavedModel into an existing folder. See `etfzoo.publish`.

    Raises:
        EtfzooError: unknown storage, inside of a strategy's scope, or weights that are too large
            for float16.
    """
    if storage not in STORAGES:
        raise unknown("storage", storage, STORAGES)
    if tf.distribute.has_strategy():
        raise EtfzooError("call publish outside of the strategy's scope")
    module = tf.Module()
    stored = {v.path: _stored(v, storage) for v in model.variables}
    module.weights = {escape(path): v for path, v in stored.items()}
    if len(module.weights) != len(model.variables):
        raise EtfzooError("two variables of the model have the same path; give layers unique names")
    inference = _Inference(model.spec, stored)
    module.served = inference.tracked
    module.__call__ = _callable(model, stored, inference)
    # The one line that TensorFlow logs here names the temporary folder.
    log = tf.get_logger()
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        signatures = _signatures(model.spec, inference.on_derived)
        sharding = tf.train.experimental.MaxShardSizePolicy(max_shard_size=SHARD_BYTES)
        options = tf.saved_model.SaveOptions(experimental_sharding_callback=sharding)
        tf.saved_model.save(module, str(folder), signatures=signatures, options=options)
        internals.remove_output_shapes(folder)
    finally:
        log.setLevel(level)
    requests = folder / "assets.extra" / "tf_serving_warmup_requests"
    requests.parent.mkdir()
    with tf.io.TFRecordWriter(str(requests)) as writer:
        for name, signature in signatures.items():
            writer.write(_warm_up(name, signature))


def stored_dtype(path: str, dtype: str, storage: str) -> str:
    """The type in which a variable is stored: `storage` where it is float32, else its own.

    Covariances stay, as whitening divides by their smallest eigenvalues.
    """
    half = dtype == "float32" and not path.endswith("/moving_covariance")
    return storage if half else dtype


def escape(path: str) -> str:
    """A variable path as key of a checkpoint."""
    return path.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")


def unescape(key: str) -> str:
    """The variable path of a key of a checkpoint."""
    return key.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def _stored(variable, storage):
    array = variable.numpy()
    dtype = stored_dtype(variable.path, variable.dtype, storage)
    if dtype == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise EtfzooError(f"{variable.path} has weights too large for float16; store float32")
    return tf.Variable(tf.cast(array, dtype), trainable=variable.trainable, name=variable.name)


def _callable(model, stored, inference):
    """The network on the stored variables: a tf.function of images and `training`."""
    taps = ("features",) if model.spec.head is None else ("features", "logits")
    network = feature_model(model, taps)

    def train(images):
        values = {v.path: _read(stored[v.path], v.dtype) for v in network.variables}
        fixed = [values[v.path] for v in network.non_trainable_variables]
        outputs, updated = network.stateless_call(
            [values[v.path] for v in network.trainable_variables],
            fixed,
            tf.cast(images, network.inputs[0].dtype),
            training=True,
        )
        for v, old, new in zip(network.non_trainable_variables, fixed, updated, strict=True):
            if new is not old:
                stored[v.path].assign(tf.cast(new, stored[v.path].dtype))
        return {name: tf.cast(y, tf.float32) for name, y in outputs.items()}

    def infer(images):
        outputs = inference.on_stored(images)
        return {name: outputs[name] for name in taps}

    images_spec = _images_spec(model.spec)
    # Saving traces a tf.function again; what it calls is a concrete function and stays as it is.
    concrete = {
        training: tf.function(run, autograph=False).get_concrete_function(images_spec)
        for training, run in ((False, infer), (True, train))
    }

    @tf.function(autograph=False)
    def forward(images, training=False):
        return concrete[training](images)

    for training in (False, True):
        forward.get_concrete_function(images_spec, training=training)
    return forward


class _Inference:
    """The float32 network with batch norm folded, from images to all taps.

    Attributes:
        on_derived: computes on what was derived when the model was loaded.
        tracked: what has to be saved with the functions.
    """

    def __init__(self, spec, stored):
        # The dtype policy of the spec is for training.
        model = ImageClassifier(dataclasses.replace(spec, dtype="float32"))
        network = feature_model(model, tuple(model.taps))
        folded = folding.fold_batch_norm(network)
        self._stored = stored
        # The states of dropout's random numbers are no weights, and nothing reads them here.
        self._paths = [v.path for v in folded.weights]

        def derive():
            floats = {p: _read(v, tf.float32) for p, v in stored.items() if v.dtype.is_floating}
            weights = folding.folded_weights(network, floats)
            return [weights[path] for path in self._paths]

        def run(images, *weights):
            weights = dict(zip(self._paths, weights, strict=True))
            fixed = folded.non_trainable_variables
            outputs, _ = folded.stateless_call(
                [weights[v.path] for v in folded.trainable_variables],
                [weights.get(v.path, tf.zeros(v.shape, v.dtype)) for v in fixed],
                images,
                training=False,
            )
            return outputs

        # Concrete, so that each graph is written once however many others call it.
        shapes = {v.path: v.shape for v in folded.weights}
        weights_spec = [tf.TensorSpec(shape, tf.float32) for shape in shapes.values()]
        self._run = tf.function(run, autograph=False).get_concrete_function(
            _images_spec(spec), *weights_spec
        )
        self._derive = tf.function(derive, autograph=False).get_concrete_function()
        # Layers with a norm folded in, and what is not stored as float32.
        linear = {layer.name for layer in folding.norms_by_layer(network)}
        derived = [
            path
            for path in self._paths
            if path.rpartition("/")[0] in linear or stored[path].dtype != tf.float32
        ]
        self._derived = {p: internals.variable_without_value(shapes[p]) for p in derived}
        self.tracked = [internals.run_on_load(self._initialize), *self._derived.values()]

        def run_on_derived(images):
            variables = stored | self._derived
            return self._run(images, *(_read(variables[path]) for path in self._paths))

        self.on_derived = tf.function(run_on_derived, autograph=False).get_concrete_function(
            _images_spec(spec)
        )

    def on_stored(self, images):
        """Computes on the stored variables, to which it has gradients."""
        return self._run(images, *self._derive())

    def _initialize(self):
        for path, value in zip(self._paths, self._derive(), strict=True):
            if path in self._derived:
                self._derived[path].assign(value)


def _read(variable, dtype=tf.float32):
    """The value, read here: in a layer the operation would get a long name, for each variable."""
    return tf.cast(tf.convert_to_tensor(variable), dtype)


def _signatures(spec, forward):
    height, width, channels = spec.input_shape
    images = _images_spec(spec)
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")

    def network(images):
        return forward(_checked(images, [None, height, width, channels]))

    def features(images):
        return {name: y for name, y in network(images).items() if name != "logits"}

    def pooled(images):
        return {"features": network(images)["features"]}

    def classify(images):
        logits = network(images)["logits"]
        return {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
            "class_ids": tf.argmax(logits, axis=-1),
        }

    def pixels(image_bytes):
        return tf.map_fn(
            lambda b: augment.evaluation_image(b, height, width, spec.crop),
            decoding.check_request(_checked(image_bytes, [None])),
            fn_output_signature=tf.TensorSpec([height, width, channels], tf.float32),
        )

    def pooled_of_bytes(image_bytes):
        return pooled(pixels(image_bytes))

    def classify_bytes(image_bytes):
        labels = tf.constant(spec.labels)
        probabilities = classify(pixels(image_bytes))["probabilities"]
        scores, ids = tf.math.top_k(probabilities, k=min(TOP_K, spec.num_classes))
        return {"class_ids": tf.cast(ids, tf.int64), "labels": tf.gather(labels, ids)} | {
            "scores": scores
        }

    def trace(function, argument):
        return tf.function(function, input_signature=[argument])

    signatures = {
        "serving_default": trace(pooled if spec.head is None else classify, images),
        "features": trace(features, images),
    }
    if height is not None and width is not None:
        serve = pooled_of_bytes if spec.head is None else classify_bytes
        signatures["serving_bytes"] = trace(serve, encoded)
    return signatures


def _checked(batch, shape):
    """The batch, or INVALID_ARGUMENT if it is empty, of another shape or not finite.

    The C++ session checks no shapes: a convolution of rank 3 ends the whole server, and grey
    images are broadcast. NaN becomes zero in a ReLU, and so an answer like any other.
    """
    batch = tf.ensure_shape(batch, shape)
    if batch.dtype.is_floating:
        batch = tf.debugging.check_numerics(batch, "pixels")
    filled = tf.debugging.assert_positive(tf.size(batch), "the batch is empty")
    with tf.control_dependencies([filled]):
        return tf.identity(batch)


def _images_spec(spec):
    return tf.TensorSpec([None, *spec.input_shape], tf.float32, name="images")


def _warm_up(name, signature) -> bytes:
    """The smallest request of a signature: TF Serving runs it before it is ready."""
    (argument,) = signature.input_signature
    shape = [1, *(224 if n is None else n for n in argument.shape[1:])]
    value = 0.0  # fills the tensor
    if argument.dtype == tf.string:
        value = tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy()
    proto = tf.make_tensor_proto(value, argument.dtype, shape)
    return internals.prediction_log(name, {argument.name: proto})

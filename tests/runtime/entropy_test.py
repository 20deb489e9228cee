"""The entropy of the features: NumPy's on 1, 2 and 3 devices, on TensorFlow and JAX."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from scipy.spatial import distance
from sklearn.neighbors import NearestNeighbors

from etfzoo.runtime import backend, losses
from testing import fresh_python

BATCH, STEPS, RATE, DECAY, WEIGHT = 12, 3, 0.1, 0.05, 0.7


def units(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def terms_and_gradient(features):
    """`-log` of each distance to the nearest neighbour, and the gradient of their sum."""
    u = units(features)
    distances = distance.cdist(u, u) + np.diag([np.inf] * len(u))
    nearest = distances.argmin(1)
    gradient = np.zeros_like(u)
    for i, j in enumerate(nearest):
        push = (u[i] - u[j]) / distances[i, j] ** 2
        gradient[i] -= push
        gradient[j] += push
    along = (gradient * u).sum(1, keepdims=True)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return -np.log(distances.min(1)), (gradient - along * u) / norms


def check_terms():
    features = np.random.default_rng(0).normal(1, 1, (50, 8))
    wanted, _ = terms_and_gradient(features)
    near, _ = NearestNeighbors(n_neighbors=2).fit(units(features)).kneighbors(units(features))
    np.testing.assert_allclose(wanted, -np.log(near[:, 1]), rtol=1e-9)
    found = losses.crowding(ops.convert_to_tensor(features, "float64"))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    found = losses.crowding(ops.convert_to_tensor(features, "bfloat16"))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(found, wanted, atol=0.05)
    # A share of the batch among all of it.
    everywhere = ops.convert_to_tensor(units(features), "float32")
    found = losses.crowding(ops.convert_to_tensor(features[20:30], "float32"), everywhere, 20)
    np.testing.assert_allclose(found, wanted[20:30], rtol=1e-5)


def test_terms():
    check_terms()


def test_features_that_coincide_do_not_push_each_other():
    features = np.random.default_rng(1).normal(size=(8, 5))
    twice = np.concatenate([features, 3 * features])
    twice[15] = -twice[7]
    values = tf.constant(twice)
    with tf.GradientTape() as tape:
        tape.watch(values)
        terms = losses.crowding(values)
    found = tape.gradient(terms, values).numpy()  # of their sum
    np.testing.assert_allclose(terms[:7], [6 * np.log(10)] * 7, rtol=1e-12)
    # Of the two that have a neighbour elsewhere.
    u = units(twice)
    wanted = np.zeros_like(u)
    for i in (7, 15):
        j = np.argsort(np.linalg.norm(u - u[i], axis=1))[1]
        push = (u[i] - u[j]) / ((u[i] - u[j]) ** 2).sum()
        ends = [i, int(tf.argmax(u @ u[i] - 4 * np.eye(16)[i]))]
        wanted[ends[0]] -= push
        wanted[ends[1]] += push
    wanted -= (wanted * u).sum(1, keepdims=True) * u
    np.testing.assert_allclose(
        found, wanted / np.linalg.norm(twice, axis=1, keepdims=True), atol=1e-9
    )
    zeros = tf.zeros((4, 3))
    with tf.GradientTape() as tape:
        tape.watch(zeros)
        terms = losses.crowding(zeros)
    assert not tape.gradient(terms, zeros).numpy().any() and np.isfinite(terms).all()


def _model():
    def dense(units, name, seed):
        start = keras.initializers.GlorotUniform(seed=seed)
        return keras.layers.Dense(units, kernel_initializer=start, dtype="float64", name=name)

    inputs = keras.Input((6,), dtype="float64")
    return keras.Model(inputs, dense(4, "logits", 2)(dense(5, "features", 1)(inputs)))


def data():
    rng = np.random.default_rng(2)
    return rng.normal(size=(STEPS * BATCH, 6)), rng.integers(4, size=STEPS * BATCH).astype("int32")


def by_hand(weights):
    """Weights after all steps of SGD, and the sums of the cross-entropies."""
    (x, labels), sums = data(), []
    for step in range(STEPS):
        some = slice(step * BATCH, (step + 1) * BATCH)
        kernel, bias, head, offset = weights
        h = x[some] @ kernel + bias
        p = np.exp(h @ head + offset)
        p /= p.sum(1, keepdims=True)
        sums.append(-np.log(p[np.arange(BATCH), labels[some]]).sum())
        g = (p - np.eye(4)[labels[some]]) / BATCH
        back = g @ head.T + WEIGHT * terms_and_gradient(h)[1] / BATCH
        gradients = [x[some].T @ back + DECAY * kernel, back.sum(0),
                     h.T @ g + DECAY * head, g.sum(0)]  # fmt: skip
        weights = [w - RATE * d for w, d in zip(weights, gradients, strict=True)]
    return weights, sums


def check_steps(strategy, scaled=False):
    with strategy.scope():
        model = _model()
        optimizer = keras.optimizers.SGD(RATE, name="sgd")
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
    wanted, sums = by_hand([np.array(v.value) for v in model.trainable_variables])
    stepper = backend.Stepper(model, optimizer, strategy, DECAY, entropy_weight=WEIGHT)
    records = tf.data.Dataset.from_tensor_slices(data())
    batches = iter(
        backend.distribute(
            strategy, lambda share: records.batch(BATCH // (share.replicas if share else 1))
        )
    )
    # What is told is the cross-entropy alone.
    found = [float(np.asarray(stepper.train(batches))[0]) for _ in range(STEPS)]
    np.testing.assert_allclose(found, sums, rtol=1e-6)
    for variable, value in zip(model.trainable_variables, wanted, strict=True):
        np.testing.assert_allclose(variable.value, value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_on_one_device(scaled):
    check_steps(tf.distribute.get_strategy(), scaled)


_MIRRORED = """
import sys, entropy_test
from etfzoo.runtime.strategy import get_strategy

strategy = get_strategy("mirrored", None, int(sys.argv[1]))
assert strategy.num_replicas_in_sync == int(sys.argv[1])
entropy_test.check_steps(strategy)
"""


@pytest.mark.parametrize("devices", [2, 3])
def test_neighbours_are_those_of_the_global_batch(devices):
    fresh_python(_MIRRORED, devices)


_JAX = """
import entropy_test, step_jax_test
from etfzoo.runtime.strategy import get_strategy
from etfzoo.runtime.strategy_jax import DataParallel

devices = get_strategy("mirrored", None, 3).devices
exec(step_jax_test._FLOAT64)
entropy_test.check_terms()
for count in (1, 2, 3):
    entropy_test.check_steps(DataParallel(devices[:count]), scaled=count == 1)
"""


def test_on_jax():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    fresh_python(_JAX, KERAS_BACKEND="jax")

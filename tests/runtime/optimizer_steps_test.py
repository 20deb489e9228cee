"""Steps of each optimizer, clipped and in parts: NumPy's, on 1, 2 and 3 devices and on JAX."""

import importlib.util
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from etfzoo.models.weights import as_arrays
from etfzoo.runtime import backend, losses
from etfzoo.training import build, optimizers
from etfzoo.training.config import TrainConfig
from testing import fresh_python

BATCH, STEPS, RATE, DECAY = 12, 4, 0.05, 0.1
# What differs from plain SGD.
CASES = {
    "sgd": {"momentum": 0.5, "nesterov": True},
    "clipped": {"momentum": 0.5, "clip_norm": 0.2},
    "hardly clipped": {
        "clip_norm": 1.2, "accumulate_steps": 2, "mixed_precision": "float16",
        "steps_per_execution": 2,
    },
    "sgd by layers": {"momentum": 0.5, "layer_decay": 0.5, "clip_norm": 0.2},
    "adamw": {"optimizer": "adamw"},
    "adamw by layers": {"optimizer": "adamw", "layer_decay": 0.5},
    "adamw in parts": {"optimizer": "adamw", "decay_all": True, "accumulate_steps": 2},
    "lamb": {"optimizer": "lamb", "clip_norm": 0.3, "mixed_precision": "float16"},
    "lamb in parts": {"optimizer": "lamb", "decay_all": True, "accumulate_steps": 3},
}  # fmt: skip
ON_SEVERAL = ("sgd by layers", "hardly clipped", "adamw by layers", "adamw in parts", "lamb")


def config(**changes):
    return TrainConfig(
        "digits", batch_size=BATCH, learning_rate=RATE, schedule="constant", weight_decay=DECAY,
        deterministic=False, **changes,
    )  # fmt: skip


def network():
    """Of float64, whose bias has a norm: what Lamb compares."""

    def dense(units, name, seed):
        kernel = keras.initializers.GlorotUniform(seed=seed)
        bias = keras.initializers.RandomNormal(seed=seed)
        return keras.layers.Dense(
            units, name=name, dtype="float64", kernel_initializer=kernel, bias_initializer=bias
        )

    inputs = keras.Input((6,), dtype="float64")
    return keras.Model(inputs, dense(4, "logits", 2)(dense(5, "features", 1)(inputs)))


def data():
    rng = np.random.default_rng(2)
    return rng.normal(size=(STEPS * BATCH, 6)), rng.integers(4, size=STEPS * BATCH).astype("int32")


def gradients(weights, x, labels):
    kernel, bias, head, offset = weights
    h = x @ kernel + bias
    p = np.exp(h @ head + offset)
    p /= p.sum(1, keepdims=True)
    g = (p - np.eye(4)[labels]) / BATCH
    back = g @ head.T
    return [x.T @ back, back.sum(0), h.T @ g, g.sum(0)]


def adam(slots, g, t):
    """The direction of Adam (Kingma and Ba 2015, with the epsilon of the text before 2.1)."""
    slots["m"] = 0.9 * slots.get("m", 0) + 0.1 * g
    slots["v"] = 0.999 * slots.get("v", 0) + 0.001 * g**2
    return slots["m"] / (1 - 0.9**t), slots["v"] / (1 - 0.999**t)


def moved(config, w, g, slots, t, decays, layer):
    """A weight after a step."""
    decay, rate = DECAY * decays, RATE * layer
    if config.optimizer == "sgd":
        g = g + decay * w
        slots["m"] = config.momentum * slots.get("m", 0) + g
        return w - rate * (g + config.momentum * slots["m"] if config.nesterov else slots["m"])
    w = w - rate * decay * w  # Loshchilov and Hutter 2019, algorithm 2
    mean, square = adam(slots, g, t)
    if config.optimizer == "adamw":
        return w - rate * mean / (np.sqrt(square) + 1e-7 / np.sqrt(1 - 0.999**t))
    update = mean / (np.sqrt(square) + 1e-7)
    # You et al. 2020, algorithm 2, whose decay is a part of the update and not before it.
    return w - rate * np.linalg.norm(w) / np.linalg.norm(update) * update


def rates(model, decay):
    """Of kernel and bias of the first layer, and of the head."""
    return [decay, decay, 1.0, 1.0]


def by_hand(config, weights):
    (x, labels), slots = data(), [{} for _ in weights]
    for step in range(STEPS):
        some = slice(step * BATCH, (step + 1) * BATCH)
        found = gradients(weights, x[some], labels[some])
        if config.clip_norm:
            norm = np.sqrt(sum((g**2).sum() for g in found))
            found = [g * min(1, config.clip_norm / (norm + 1e-6)) for g in found]
        weights = [
            moved(config, w, g, s, step + 1, config.decay_all or w.ndim == 2, layer)
            for w, g, s, layer in zip(
                weights, found, slots, rates(None, config.layer_decay), strict=True
            )
        ]
    return weights


def check(strategy, case):
    there = config(**CASES[case])
    with strategy.scope():
        model = network()
    with mock.patch.object(optimizers, "layer_rates", rates):
        optimizer = optimizers.make_optimizer(there, STEPS, model, strategy)
    start = [np.array(v.value) for v in model.trainable_variables]
    stepper = build.make_stepper(there, model, optimizer, strategy, losses.cross_entropy)
    records = tf.data.Dataset.from_tensor_slices(data())
    batches = iter(
        backend.distribute(
            strategy, lambda share: records.batch(BATCH // (share.replicas if share else 1))
        )
    )
    count = there.steps_per_execution
    sums = sum(np.asarray(stepper.train(batches, count)) for _ in range(STEPS // count))
    assert sums[2] == BATCH * STEPS and 0 < sums[1] < sums[2]
    # TensorFlow casts the powers of Adam's betas by way of float32, and divides by 1 less them.
    near = 5e-6 if there.optimizer == "adamw" else 2e-7
    for variable, value in zip(model.trainable_variables, by_hand(there, start), strict=True):
        np.testing.assert_allclose(variable.value, value, rtol=0, atol=near)
    count = [value for name, value in as_arrays(optimizer.variables).items() if "iteration" in name]
    assert int(max(count)) == STEPS


def test_the_cases_clip():
    """Some of them each step, and one of them now and then."""
    model = network()
    weights = [np.array(v.value) for v in model.trainable_variables]
    norms = []
    for step in range(STEPS):
        some = slice(step * BATCH, (step + 1) * BATCH)
        found = gradients(weights, *(part[some] for part in data()))
        norms.append(np.sqrt(sum((g**2).sum() for g in found)))
    assert 0.3 < min(norms) < 1.2 < max(norms), norms


@pytest.mark.parametrize("case", CASES)
def test_steps_on_one_device(case):
    check(tf.distribute.get_strategy(), case)


_MIRRORED = """
import sys, optimizer_steps_test
from etfzoo.runtime.strategy import get_strategy

strategy = get_strategy("mirrored", None, int(sys.argv[1]))
for case in optimizer_steps_test.ON_SEVERAL:
    optimizer_steps_test.check(strategy, case)
"""


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_steps_on_several_devices(devices):
    fresh_python(_MIRRORED, devices)


_JAX = """
import optimizer_steps_test, step_jax_test
from etfzoo.runtime.strategy import get_strategy
from etfzoo.runtime.strategy_jax import DataParallel

devices = get_strategy("mirrored", None, 3).devices
exec(step_jax_test._FLOAT64)
for number, case in enumerate(optimizer_steps_test.CASES):
    optimizer_steps_test.check(DataParallel(devices[: 3 - 2 * (number % 2)]), case)
"""


def test_steps_on_jax():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    fresh_python(_JAX, KERAS_BACKEND="jax")

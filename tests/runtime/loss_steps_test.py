"""Steps of each training loss: those of NumPy on 1, 2 and 3 devices, on TensorFlow and JAX."""

import functools
import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf

from testing import fresh_python

BATCH, STEPS, RATE, MOMENTUM, DECAY = 12, 2, 0.1, 0.5, 0.05
WEIGHTS = np.array([0.25, 0.5, 1.5, 4.0])
ADJUSTMENT = np.log([0.5, 0.25, 0.125, 0.125])
BALANCED = {"class_weights": WEIGHTS}
# Loss, its options, whether labels are mixed, whether the loss is scaled as for float16.
CASES = [
    ("cross_entropy", {"label_smoothing": 0.125, "adjustment": ADJUSTMENT} | BALANCED, False, True),
    ("cross_entropy", {"adjustment": ADJUSTMENT} | BALANCED, True, False),
    ("dot_regression", {"scale": 4.0} | BALANCED, False, False),
    ("dot_regression", {"scale": 4.0}, True, False),
    ("squared_error", BALANCED, True, True),
]


def gradient(
    name, logits, shares, class_weights=None, label_smoothing=0.0, adjustment=0.0, scale=1
):
    """Of the sum of the losses, by logits `[N, K]`."""
    shares = shares * (1 if class_weights is None else class_weights)
    whole = shares.sum(1, keepdims=True)
    if name == "dot_regression":
        return shares * (logits / scale - 1) / scale
    if name == "squared_error":
        return 2 / logits.shape[1] * (whole * logits - shares)
    p = np.exp(logits + adjustment)
    p /= p.sum(1, keepdims=True)
    return whole * p - (1 - label_smoothing) * shares - label_smoothing * whole / logits.shape[1]


def data(mixed):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS * BATCH, 6))
    labels, others = rng.choice(4, (2, len(x)), p=[0.5, 0.25, 0.125, 0.125]).astype("int32")
    if not mixed:
        return x, labels
    share = rng.integers(0, 9, (len(x), 1)) / 8
    return x, (share * np.eye(4)[labels] + (1 - share) * np.eye(4)[others]).astype("float32")


def by_hand(name, options, mixed, weights):
    velocity, (x, labels) = [0.0, 0.0], data(mixed)
    shares = labels if mixed else np.eye(4)[labels]
    for step in range(STEPS):
        some = slice(step * BATCH, (step + 1) * BATCH)
        g = gradient(name, x[some] @ weights[0] + weights[1], shares[some], **options) / BATCH
        for i, gradient_of in enumerate((x[some].T @ g + DECAY * weights[0], g.sum(0))):
            velocity[i] = MOMENTUM * velocity[i] - RATE * gradient_of
            weights[i] = weights[i] + velocity[i]
    return weights


def check(strategy, name, options, mixed, scaled):
    import step_tf_test

    from etfzoo.runtime import backend, losses

    with strategy.scope():
        model = step_tf_test._model()
        optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM, name="sgd")
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
    wanted = by_hand(name, options, mixed, [np.array(v.value) for v in model.trainable_variables])
    loss = functools.partial(losses.LOSSES[name], **options)
    stepper = backend.Stepper(model, optimizer, strategy, DECAY, loss)
    records = tf.data.Dataset.from_tensor_slices(data(mixed))
    batches = iter(
        backend.distribute(
            strategy, lambda share: records.batch(BATCH // (share.replicas if share else 1))
        )
    )
    sums = [np.asarray(stepper.train(batches)) for _ in range(STEPS)]
    assert [s[2] for s in sums] == [BATCH] * STEPS
    for variable, value in zip(model.trainable_variables, wanted, strict=True):
        np.testing.assert_allclose(variable.value, value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_steps_on_one_device(case):
    check(tf.distribute.get_strategy(), *case)


_MIRRORED = """
import sys, loss_steps_test
from etfzoo.runtime.strategy import get_strategy

strategy = get_strategy("mirrored", None, int(sys.argv[1]))
assert strategy.num_replicas_in_sync == int(sys.argv[1])
for case in loss_steps_test.CASES:
    loss_steps_test.check(strategy, *case)
"""


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_steps_on_several_devices(devices):
    fresh_python(_MIRRORED, devices)


_JAX = """
import loss_steps_test, losses_test, step_jax_test
from etfzoo.runtime.strategy import get_strategy
from etfzoo.runtime.strategy_jax import DataParallel

devices = get_strategy("mirrored", None, 3).devices
losses_test.check_losses()
losses_test.check_losses("bfloat16")
exec(step_jax_test._FLOAT64)
for number, case in enumerate(loss_steps_test.CASES):
    loss_steps_test.check(DataParallel(devices[: 3 - number % 3]), *case)
"""


def test_losses_and_steps_on_jax():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    fresh_python(_JAX, KERAS_BACKEND="jax")

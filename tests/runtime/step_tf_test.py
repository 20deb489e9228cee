"""The training step against NumPy: SGD with L2 added before momentum."""

import concurrent.futures
import multiprocessing

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.runtime.step_tf import Stepper, distribute, evaluation_step, repeated
from testing import fresh_python

pytestmark = pytest.mark.small_rn18

DECAY, RATE, MOMENTUM, STEPS = 0.05, 0.1, 0.9, 100


def _model(classes=4, features=6):
    inputs = keras.Input((features,), dtype="float64")
    outputs = keras.layers.Dense(
        classes,
        kernel_initializer=keras.initializers.GlorotUniform(seed=1),
        dtype="float64",
        name="logits",
    )(inputs)
    return keras.Model(inputs, outputs)


def _batches(count=STEPS, size=8, features=6, classes=4):
    rng = np.random.RandomState(0)
    return [(rng.randn(size, features), rng.randint(classes, size=size)) for _ in range(count)]


def _gradients(kernel, bias, x, y):
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return x.T @ p, p.sum(0)


class Replicas:
    """A strategy of several replicas, of which this process takes the step of one."""

    def __init__(self, count):
        self.num_replicas_in_sync = count

    def run(self, step, args):
        return step(*args)

    def reduce(self, how, sums, axis):
        return sums


@pytest.mark.parametrize("replicas, scaled", [(1, True), (2, False), (2, True)])
def test_a_replica_moves_the_weights_by_its_share(replicas, scaled):
    """Of gradient and L2 alike, and whatever the loss is multiplied by."""
    model, (x, y) = _model(), _batches(1)[0]
    model.layers[-1].bias.assign([1.0, 2.0, 3.0, 4.0])
    optimizer = keras.optimizers.SGD(RATE, name="sgd")
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(model.trainable_variables)
    before = [np.array(v.value) for v in model.trainable_variables]
    stepper = Stepper(model, optimizer, Replicas(replicas), DECAY, decay_all=True)
    loss, *_ = stepper.train(iter(tf.data.Dataset.from_tensors((x, y)))).numpy()
    for variable, w, g in zip(
        model.trainable_variables, before, _gradients(*before, x, y), strict=True
    ):
        moved = -RATE * (g + DECAY * w) / replicas
        np.testing.assert_allclose(variable.value - w, moved, rtol=1e-5, atol=1e-9)
    logits = x @ before[0] + before[1]  # the sums are those of its examples, unscaled
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-6)


def check_norms(make_stepper, feed, evaluation_step):
    """Training takes a batch's statistics and keeps their average, which evaluation takes.

    Args:
        make_stepper: of a model and an optimizer.
        feed: `(x, y) ->` an iterator over that batch.
        evaluation_step: of a backend.
    """
    inputs = keras.Input((6,), dtype="float64")
    norm = keras.layers.BatchNormalization(momentum=0.9, epsilon=0.1, dtype="float64")
    head = keras.layers.Dense(4, dtype="float64", name="logits")
    model = keras.Model(inputs, head(norm(inputs)))
    optimizer = keras.optimizers.SGD(0.0, name="sgd")
    optimizer.build(model.trainable_variables)
    (x, y), kernel = _batches(1)[0], np.array(head.kernel)
    x = 3 * x + np.arange(6)

    def losses(mean, variance):
        logits = (x - mean) / np.sqrt(variance + 0.1) @ kernel
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]

    found = np.asarray(make_stepper(model, optimizer).train(feed(x, y)))[0]
    np.testing.assert_allclose(found, losses(x.mean(0), x.var(0)).sum(), rtol=1e-5)
    mean, variance = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0)
    np.testing.assert_allclose(norm.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-5)
    *_, found, certain = evaluation_step(model)(tf.constant(x), tf.constant(y, tf.int32))
    assert np.all((np.asarray(certain) > 1 / 3) & (np.asarray(certain) < 1))
    np.testing.assert_allclose(found, losses(mean, variance), rtol=1e-5)
    np.testing.assert_allclose(norm.moving_mean, mean, rtol=1e-5)


def test_norms_in_training_and_evaluation():
    strategy = tf.distribute.get_strategy()
    check_norms(
        lambda model, optimizer: Stepper(model, optimizer, strategy),
        lambda x, y: iter(tf.data.Dataset.from_tensors((x, y))),
        evaluation_step,
    )


@pytest.mark.parametrize(
    "nesterov, decay_all, jit_compile",
    [(False, False, False), (True, True, False), (False, True, True), (True, False, True)],
)
def test_a_hundred_steps_equal_numpy_l2_sgd(nesterov, decay_all, jit_compile):
    model = _model()
    optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM, nesterov=nesterov, name="sgd")
    optimizer.build(model.trainable_variables)
    stepper = Stepper(
        model,
        optimizer,
        tf.distribute.get_strategy(),
        weight_decay=DECAY,
        decay_all=decay_all,
        jit_compile=jit_compile,
    )
    weights = [np.array(v.value) for v in model.trainable_variables]
    velocity = [np.zeros_like(w) for w in weights]
    for x, y in _batches():
        gradients = list(_gradients(*weights, x, y))
        for i in range(2 if decay_all else 1):  # otherwise the bias is not decayed
            gradients[i] = gradients[i] + DECAY * weights[i]
        for i, g in enumerate(gradients):
            velocity[i] = MOMENTUM * velocity[i] + g
            update = g + MOMENTUM * velocity[i] if nesterov else velocity[i]
            weights[i] = weights[i] - RATE * update
        stepper.train(iter(tf.data.Dataset.from_tensors((x, y))))
    for expected, variable in zip(weights, model.trainable_variables, strict=True):
        np.testing.assert_allclose(variable.value, expected, rtol=0, atol=1e-6)


def _losses_of_three_steps(head, norm, jit_compile):
    strategy, rng = tf.distribute.get_strategy(), np.random.default_rng(0)
    images = rng.integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    batches = repeated(strategy, images, np.arange(8, dtype=np.int32))
    keras.utils.set_random_seed(0)
    model = etfzoo.build_classifier("rn18", 8, head, norm, (32, 32, 3))
    optimizer = keras.optimizers.SGD(1e-3, momentum=MOMENTUM, name="sgd")
    optimizer.build(model.trainable_variables)
    stepper = Stepper(model, optimizer, strategy, DECAY, jit_compile=jit_compile)
    return [stepper.train(batches).numpy()[0] for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("head, norm", [("etf", "bn"), ("linear", "sw")])
def test_xla_compiles_the_step_of_a_network(head, norm):
    # In a process of its own: XLA cannot max-pool once another test has made ops deterministic.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        plain, compiled = process.map(_losses_of_three_steps, 2 * [head], 2 * [norm], [False, True])
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)


def test_l2_before_momentum_is_ten_times_keras_decoupled_decay():
    # science: at momentum 0.9 a zero-gradient kernel shrinks by exp(-10 lr wd t), not exp(-lr wd t)
    model = _model()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, name="sgd")
    optimizer.build(model.trainable_variables)
    stepper = Stepper(model, optimizer, tf.distribute.get_strategy(), weight_decay=2e-3)
    model.layers[-1].kernel.assign(np.ones((6, 4)))  # equal columns and zero inputs: no gradient
    batch = tf.zeros((4, 6), tf.float64), tf.constant([0, 1, 2, 3])
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    for _ in range(100):
        stepper.train(batches, steps=5)
    shrink = np.log(np.array(model.layers[-1].kernel.value))
    np.testing.assert_allclose(shrink, -0.01 * 2e-3 * 500 * 10, rtol=0.03)


def test_step_returns_sums_of_loss_hits_and_examples():
    model = _model()
    optimizer = keras.optimizers.SGD(0.0, name="sgd")
    stepper = Stepper(model, optimizer, tf.distribute.get_strategy())
    (x, y), *_ = _batches(1)
    batches = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    loss, right, count, votes = stepper.train(batches, steps=3, stop=True).numpy() / 3
    logits = x @ np.array(model.layers[-1].kernel.value)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-6)
    assert (right, count, votes) == ((logits.argmax(1) == y).sum(), len(y), 1)


def test_a_step_on_targets_equals_numpy():
    model = _model()
    optimizer = keras.optimizers.SGD(RATE, name="sgd")
    stepper = Stepper(model, optimizer, tf.distribute.get_strategy())
    (x, y), (_, others) = _batches(2)
    share = np.random.RandomState(1).uniform(size=(len(y), 1))
    targets = (share * np.eye(4)[y] + (1 - share) * np.eye(4)[others]).astype(np.float32)
    kernel, bias = (np.array(v.value) for v in model.trainable_variables)
    logits = x @ kernel + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss, right, *_ = stepper.train(iter(tf.data.Dataset.from_tensors((x, targets)))).numpy()
    np.testing.assert_allclose(loss, -(targets * np.log(p)).sum(), rtol=1e-6)
    larger = np.where(share[:, 0] > 0.5, y, others)
    assert right == (logits.argmax(1) == larger).sum()
    gradient = x.T @ (p - targets) / len(y)
    np.testing.assert_allclose(
        model.layers[-1].kernel.value, kernel - RATE * gradient, rtol=1e-6, atol=1e-8
    )


def test_evaluation_step_top5_of_few_classes_is_always_right():
    labels, predicted, top5, loss, _ = evaluation_step(_model())(
        tf.random.stateless_normal((7, 6), (0, 1), dtype=tf.float64), tf.zeros(7, tf.int32)
    )
    assert labels.shape == loss.shape == predicted.shape == (7,) and np.all(top5)


def test_without_a_gpu_a_data_set_stays_as_it_is():
    data = tf.data.Dataset.range(3)
    assert distribute(tf.distribute.get_strategy(), lambda share: data) is data


_AHEAD = """
import keras, numpy as np, tensorflow as tf
from etfzoo.runtime import step_tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
second = tf.config.list_logical_devices("CPU")[1]
rng = np.random.RandomState(0)
images = rng.randint(256, size=(30, 8, 8, 3)).astype(np.uint8)
labels = rng.randint(4, size=30).astype(np.int32)
data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(7)

def trained(gpus):
    real = tf.config.list_logical_devices
    tf.config.list_logical_devices = lambda kind=None: gpus if kind == "GPU" else real(kind)
    strategy = tf.distribute.get_strategy()
    found = step_tf.distribute(strategy, lambda share: data)
    devices = {part.device for batch in found for part in batch}
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(4, name="logits")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.SGD(1e-4)
    optimizer.build(model.trainable_variables)
    stepper = step_tf.Stepper(model, optimizer, strategy, 0.0, jit_compile=False)
    batches = iter(found)
    sums = stepper.train(batches, 3).numpy() + stepper.train(batches, 2).numpy()
    assert sums[2] == 30
    return devices, [sums, *(np.array(v) for v in model.variables)]

here, wanted = trained([])
there, found = trained([second])
assert [name[-5:] for name in (*here, *there)] == ["CPU:0", "CPU:1"], (here, there)
for one, other in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(one, other)
"""


def test_batches_lie_on_the_device_that_takes_them():
    # A second device of the CPU stands for the GPU.
    fresh_python(_AHEAD)

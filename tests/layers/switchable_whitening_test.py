"""Tests of switchable whitening against a float64 NumPy reference.

The reference also runs on complex arrays. With a step of 1e-30 along the imaginary axis the
imaginary part of its output is the exact derivative, so gradients are checked independently too.
"""

import importlib.util
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from etfzoo.layers import SwitchableWhitening
from testing import CHECKOUT, forked_python, fresh_python

C, GROUP = 12, 4
TYPES = (1, 2, 3, 5)  # each is also the number of logits
CASES = [(dtype, sw_type) for dtype in ("float32", "float64") for sw_type in TYPES]
WEIGHTS = ("gamma", "beta", "mean_logits", "covariance_logits")
MOVING = ("moving_mean", "moving_covariance")
SHAPES = [(8, 5, 7), (3, 4, 4), (4, 2, 2), (5, 1, 1), (1, 5, 7), (1, 1, 1), (9,), (3, 6)]
PATH = f"{CHECKOUT}:{CHECKOUT}/tests"  # to import this file


def data(*shape, ratio=1.0, seed=0):
    """Correlated channels of standard deviation 1 and a mean of about `ratio`."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(C) + 0.5 * rng.normal(size=(C, C)) / np.sqrt(C)
    mixing /= np.sqrt((mixing**2).sum(0))
    return rng.normal(size=(*shape, C)) @ mixing + ratio * rng.uniform(0.9, 1.1, C)


def make(sw_type=2, seed=1, group_size=GROUP, **kwargs):
    """A built layer in a state that no initializer gives."""
    layer = SwitchableWhitening(group_size, sw_type, momentum=0.9, **kwargs)
    layer.build((None, None, None, C))
    rng = np.random.default_rng(seed)
    for name in WEIGHTS:
        getattr(layer, name).assign(rng.uniform(0.5, 1.5, getattr(layer, name).shape))
    layer.moving_mean.assign(rng.normal(size=C))
    root = rng.normal(size=layer.moving_covariance.shape)
    layer.moving_covariance.assign(root @ root.swapaxes(1, 2) + np.eye(group_size))
    return layer


def as_numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), np.float64)


def arrays(layer, names=WEIGHTS):
    return {name: as_numpy(getattr(layer, name)) for name in names}


def softmax(logits):
    powers = np.exp(logits - logits.real.max())
    return powers / powers.sum()


def newton_schulz(s, iterations):
    trace = np.trace(s, axis1=-2, axis2=-1)[..., None, None]
    p = np.eye(s.shape[-1], dtype=s.dtype)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ s / trace
    return p / np.sqrt(trace)


def inverse_root(s):
    """What the iteration converges to, and (imaginary part) the derivative of that."""
    values, v = np.linalg.eigh(s.real)
    r, vt = np.sqrt(values), v.swapaxes(-1, -2)
    i, j = r[..., :, None], r[..., None, :]
    return v / j @ vt - 1j * (v @ (vt @ s.imag @ v / (i * j * (i + j))) @ vt)


def batch_moments(x, c):
    """Mean [C] and biased covariance [C/c, c, c] over all but the channels."""
    g = x.reshape(-1, C // c, c)
    d = g - g.mean(0)
    return g.mean(0).reshape(C), np.einsum("mgi,mgj->gij", d, d) / len(g)


def reference(config, moving, x, gamma, beta, mean_logits, covariance_logits=None):
    """The layer's formulas; `moving` statistics in place of the batch's unless None."""
    n, c, steps = len(x), config["group_size"], config["iterations"]
    g = x.reshape(n, -1, C // c, c)
    eye = np.eye(c)
    bm, bw = moving or batch_moments(x, c)
    bm, bw, im = bm.reshape(1, -1, c), bw[None], g.mean(1)
    d = g - im[:, None]
    iw = np.einsum("nmgi,nmgj->ngij", d, d) / g.shape[1]
    lm = g.mean((1, 2, 3)).reshape(n, 1, 1)
    ln = ((g - lm[:, None]) ** 2).mean((1, 2, 3)).reshape(n, 1, 1, 1) * eye
    full, diagonal = [(bm, bw), (im, iw)], [(bm, bw * eye), (im, iw * eye)]
    kinds = {1: full[:1], 2: full, 3: [*full, (lm, ln)], 5: [*full, *diagonal, (lm, ln)]}
    means, covariances = zip(*kinds[config["sw_type"]], strict=True)
    p = softmax(mean_logits)
    q = p if covariance_logits is None else softmax(covariance_logits)
    # x - mu; the shares add up to 1, and this order loses no digits where the means are large
    centred = sum(share * (g - m[:, None]) for share, m in zip(p, means, strict=True))
    s = sum(share * k for share, k in zip(q, covariances, strict=True)) + config["epsilon"] * eye
    w = newton_schulz(s, steps) if steps < 10 else inverse_root(s)
    return gamma * np.einsum("ngij,nmgj->nmgi", w, centred).reshape(x.shape) + beta


def forward_backward(layer, x, w, training=True):
    """Output, and gradients of sum(w * output) by name."""
    x = tf.convert_to_tensor(x)
    names = WEIGHTS[: 3 if layer.tie_weight else 4]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
        loss = tf.reduce_sum(tf.cast(y, w.dtype) * w)
    gradients = tape.gradient(loss, [x, *(getattr(layer, name).value for name in names)])
    return y, dict(zip(("x", *names), gradients, strict=True))


def check(layer, x, training=True, function=forward_backward):
    """Output, gradients and moving statistics against the reference, in float32 or float64."""
    x = x.astype(layer.compute_dtype)
    value_bound, gradient_bound = (1e-5, 1e-4) if x.dtype == np.float32 else (1e-12, 1e-11)
    rng = np.random.default_rng(6)
    w = rng.normal(size=x.shape).astype(x.dtype)
    config, before = layer.get_config(), arrays(layer, MOVING)
    y, gradients = function(layer, x, w, training)
    assert y.dtype == x.dtype and y.shape == x.shape
    point = {"x": x.astype(np.float64)} | arrays(layer, list(gradients)[1:])
    moving = None if training else tuple(before.values())
    batch = moving or batch_moments(point["x"], config["group_size"])
    for name, new in zip(MOVING, batch, strict=True):
        wanted = 0.9 * before[name] + 0.1 * new
        np.testing.assert_allclose(getattr(layer, name), wanted, value_bound, value_bound)
    wanted = reference(config, moving, **point)
    assert np.abs(as_numpy(y) - wanted).max() < value_bound * max(1, np.abs(wanted).max())
    for name, at in point.items():
        directions = np.eye(at.size) if at.size <= 60 else rng.normal(size=(4, at.size))
        exact = []
        for direction in directions:
            moved = point | {name: at + 1e-30j * direction.reshape(at.shape)}
            exact.append((w * reference(config, moving, **moved)).sum().imag / 1e-30)
        error = np.linalg.norm(directions @ as_numpy(gradients[name]).ravel() - exact)
        assert error < gradient_bound * max(np.linalg.norm(exact), 0.01), name


@pytest.mark.parametrize(
    "ratio", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 10)), 30]
)
@pytest.mark.parametrize("dtype, sw_type", CASES)
def test_training(dtype, sw_type, ratio):
    layer = make(sw_type, dtype=dtype)
    for shape in SHAPES:
        check(layer, data(*shape, ratio=ratio))


@pytest.mark.parametrize("dtype, sw_type", CASES)
def test_inference_and_frozen_layer(dtype, sw_type):
    layer = make(sw_type, dtype=dtype)
    for shape in SHAPES:
        check(layer, data(*shape, ratio=3), training=False)
    layer.trainable = False
    x, before = data(4, 5, 5).astype(dtype), np.array(layer.moving_covariance)
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    np.testing.assert_array_equal(layer.moving_covariance, before)


@pytest.mark.parametrize("dtype, sw_type", CASES)
def test_arguments(dtype, sw_type):
    for name, value in (("iterations", 1), ("iterations", 8), ("iterations", 25), ("epsilon", 0.3)):
        check(make(sw_type, dtype=dtype, **{name: value}), data(4, 5, 5))
    for group_size in (1, C):
        layer = make(sw_type, dtype=dtype, group_size=group_size, tie_weight=True)
        assert layer.covariance_logits is layer.mean_logits and len(layer.weights) == 5
        check(layer, data(4, 5, 5))


@pytest.mark.parametrize("jit", [False, True])
def test_traced_once_for_every_size(jit):
    layer = make(5)
    layer.synchronized = True  # with one replica no difference
    spec = tf.TensorSpec([None, None, None, C])
    function = tf.function(jit_compile=jit, input_signature=[spec, spec])(
        lambda x, w: forward_backward(layer, x, w)
    )
    for shape in [(8, 5, 7), (3, 5, 7), (2, 3, 2)]:  # the second is what an epoch leaves over
        check(layer, data(*shape), function=lambda _, x, w, __: function(x, w))
    assert function.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("sw_type", TYPES)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_extremes_stay_finite(policy, sw_type):
    layer = make(sw_type, dtype=policy)
    large = 3e3 if policy == "mixed_float16" else 1e12
    zeros = np.zeros((4, 5, 7, C))
    for x in (zeros, zeros + 3.1, data(1, 1, 1), data(4, 3, 3) * large):
        x = tf.cast(x, layer.compute_dtype)
        for training in (False, True):
            y, gradients = forward_backward(layer, x, np.ones(x.shape, np.float32), training)
            for tensor in (y, *gradients.values(), layer.moving_covariance):
                assert np.isfinite(as_numpy(tensor)).all()
        if np.ptp(as_numpy(x)) == 0:  # nothing to whiten
            np.testing.assert_allclose(as_numpy(y - tf.cast(layer.beta, y.dtype)), 0, atol=4e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sw_type", TYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, sw_type, training):
    half, full = make(sw_type, dtype=f"mixed_{dtype}"), make(sw_type)
    x = tf.cast(data(6, 5, 5, ratio=10), dtype)
    w = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    y, gradients = forward_backward(half, x, w, training)
    assert y.dtype == x.dtype and half.gamma.dtype == half.moving_covariance.dtype == "float32"
    wanted, exact = forward_backward(full, tf.cast(x, "float32"), w, training)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(as_numpy(y), wanted, rtol=1.01 * rounding, atol=1e-5)
    for name, gradient in gradients.items():
        difference = np.linalg.norm(as_numpy(gradient) - exact[name])
        assert difference <= 4 * rounding * np.linalg.norm(exact[name]), name
    np.testing.assert_allclose(half.moving_covariance, full.moving_covariance, 1e-5, 1e-5)


def test_initial_state():
    layer = SwitchableWhitening(GROUP, 5, dtype="float64")
    layer.build((None, C))
    check(layer, data(3, 4, 5), training=False)
    start = {"gamma": np.ones(C), "beta": np.zeros(C)} | dict.fromkeys(WEIGHTS[2:], np.ones(5))
    start |= {"moving_mean": np.zeros(C), "moving_covariance": np.tile(np.eye(GROUP), (3, 1, 1))}
    for name, value in start.items():
        np.testing.assert_array_equal(getattr(layer, name), value)
    assert len(layer.trainable_variables) == 4 and len(layer.non_trainable_variables) == 2


@pytest.mark.parametrize("name, value", [("sw_type", 4), ("iterations", 0), ("group_size", 7)])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError) as error:
        SwitchableWhitening(**{"group_size": GROUP, name: value})(np.zeros((2, C)))
    assert name in str(error.value) and str(value) in str(error.value)


def test_bad_inputs():
    with pytest.raises(ValueError, match=str(C)):
        SwitchableWhitening(GROUP)(np.zeros(C))
    with pytest.raises(ValueError, match="mask"):
        make()(np.zeros((2, 3, C)), mask=np.ones((2, 3), bool))


def test_config_round_trip():
    names = ("group_size", "sw_type", "iterations", "epsilon", "momentum", "tie_weight")
    given = (8, 3, 7, 1e-3, 0.8, True)
    for arguments, wanted in (((), (16, 2, 5, 1e-5, 0.99, False)), (given, given)):
        layer = SwitchableWhitening(*arguments, name="x", dtype="float64")
        layer.synchronized = True
        config = layer.get_config()
        assert "synchronized" not in config and tuple(config[name] for name in names) == wanted
        copy = SwitchableWhitening.from_config(config)
        assert copy.get_config() == config and copy.synchronized is False
        assert (copy.name, copy.compute_dtype) == ("x", "float64")
        assert copy.compute_output_shape((None, 8)) == (None, 8)


def test_many_iterations_converge():
    """Where the plain iteration leaves the inverse root again, as a control shows."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    x = rng.normal(size=(64, 8, 8, 16)) * np.geomspace(0.1, 1, 16)  # condition 100
    x = (x @ rotation).astype(np.float32)
    s = np.cov(x.reshape(-1, 16).T, bias=True).astype(np.float32)
    with np.errstate(all="ignore"):
        assert not np.abs(newton_schulz(s, 60)).max() < 1e3  # also where it is NaN
    deviations = []
    for iterations in (5, 10, 25, 60):
        layer = SwitchableWhitening(sw_type=1, iterations=iterations, epsilon=1e-7)
        layer.build(x.shape)
        y, gradients = forward_backward(layer, x, np.cos(x))
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())
        covariance = np.cov(as_numpy(y).reshape(-1, 16).T, bias=True)
        deviations.append(np.abs(np.linalg.eigvalsh(covariance) - 1).max())
    assert deviations[0] > deviations[1] > max(deviations[2:]), deviations
    assert max(deviations[2:]) < 1e-4, deviations


def test_keras_file(tmp_path):
    """In safe mode; tests/models/classifier_test.py loads it in a fresh process."""
    inputs = keras.Input((None, None, C))
    layers = [make(t, seed=t, tie_weight=t == 2, iterations=t) for t in TYPES]
    model = keras.Model(inputs, [layer(inputs) for layer in layers])
    assert model.output_shape == [(None, None, None, C)] * 4
    x = data(4, 5, 7).astype(np.float32)
    for images in (x, x[:3, :4, :2]):
        np.testing.assert_array_equal(model(images), [layer(images) for layer in layers])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    wanted = [model(x), model(x, training=True), *model.get_weights()]
    found = [loaded(x), loaded(x, training=True), *loaded.get_weights()]
    assert len(wanted) == len(found) == 2 + 4 * 6 - 1
    for array, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(other, array)


def test_saved_model_trains_on(tmp_path):
    layers = [keras.layers.Conv2D(C, 3), make(5), keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    module = tf.Module()
    module.learned = [v.value for v in model.trainable_variables]
    module.moving = [v.value for v in model.non_trainable_variables]
    module.run = tf.function(model.call)
    module.run.get_concrete_function(tf.TensorSpec([None, 6, 6, 2]), training=True)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2)).astype(np.float32)

    def gradients(network):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network.run(x, training=True) ** 2)
        return loss, tape.gradient(loss, list(network.learned))

    (_, wanted), (loss, found) = gradients(module), gradients(loaded)
    for ours, theirs in zip([*wanted, *module.moving], [*found, *loaded.moving], strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)
    for gradient, old, new in zip(found, module.learned, loaded.learned, strict=True):
        new.assign_sub(0.01 * gradient)
        assert np.abs(old - new).max() > 0, old.name
    assert gradients(loaded)[0] < loss


_MIRRORED = """
import json, sys, numpy as np, tensorflow as tf
import switchable_whitening_test as t
shares = json.loads(sys.argv[1])
cpu, one = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [one] * len(shares[0]))
mirrored = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(len(shares[0]))])
x = t.data(sum(shares[0]), 3, 4)
x += np.arange(len(x)).reshape(-1, 1, 1, 1)
w = np.random.default_rng(0).normal(size=x.shape)
def run(strategy, sw_type, share, synchronized):
    with strategy.scope():
        layer = t.make(sw_type, iterations=2, dtype="float64")
    layer.synchronized = synchronized
    def split(array):
        parts = np.split(array, np.cumsum(share)[:-1])
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
    y, gradients = tf.function(strategy.run)(t.forward_backward, (layer, split(x), split(w)))
    join = lambda value: np.concatenate(strategy.experimental_local_results(value))
    found = t.arrays(layer, t.MOVING) | {"y": join(y), "x": join(gradients.pop("x"))}
    return found | {name: strategy.reduce("SUM", g, axis=None) for name, g in gradients.items()}
errors = []
for sw_type in (2, 5):
    whole = run(tf.distribute.get_strategy(), sw_type, [len(x)], False)
    for share, synchronized in [*((s, True) for s in shares), (shares[-1], False)]:
        found = run(mirrored, sw_type, share, synchronized)
        off = {n: np.linalg.norm(found[n] - v) / np.linalg.norm(v) for n, v in whole.items()}
        errors.append([synchronized, off])
print(json.dumps(errors))
"""


# A process has collectives of one number of devices only.
@pytest.mark.parametrize(
    "shares", [pytest.param([[4, 4], [5, 3]], marks=pytest.mark.slow), [[2, 2, 2], [1, 2, 3]]]
)
def test_synchronized_replicas_are_one_device(shares):
    out = forked_python(_MIRRORED, json.dumps(shares))
    found = json.loads(out.splitlines()[-1])
    assert [synchronized for synchronized, _ in found] == [True, True, False] * 2
    for synchronized, error in found:
        assert error.pop("beta") < 1e-10 and len(error) == 7
        assert max(error.values()) < 1e-10 if synchronized else min(error.values()) > 1e-3, error


_JAX = """
import jax, keras
import switchable_whitening_test as t
assert keras.backend.backend() == "jax"
def forward_backward(layer, x, w, training):
    def loss(x, learned):
        y, moved = layer.stateless_call(learned, fixed, x, training=training)
        return (y * w).sum(), (y, moved)
    learned, fixed = layer.trainable_variables, [v.value for v in layer.non_trainable_variables]
    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (gx, rest), (y, moved) = step(x, [v.value for v in learned])
    for variable, value in zip(layer.non_trainable_variables, moved):
        variable.assign(value)
    return y, {"x": gx} | {v.name: g for v, g in zip(learned, rest)}
t.check(t.make(5), t.data(4, 5, 7, ratio=3), function=forward_backward)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_backend():
    fresh_python(_JAX, KERAS_BACKEND="jax")

"""Tests of the fixed ETF classifier."""

import importlib.util
import warnings

import keras
import numpy as np
import pytest

from etfzoo.layers import ETFClassifier, frames
from etfzoo.models import backbones
from testing import fresh_python

K, P, N = 7, 12, 9
BN_EPSILON, BN_MOMENTUM = 1e-3, 0.99  # Keras's defaults
NORMS = ("none", "bn", "l2", "bn_l2")


def features(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0.7, 2, (N, P)) * rng.uniform(0.2, 3, P)


def make(feature_norm="none", scale=12.0, seed=3, **kwargs):
    """A built layer whose batch norm, if any, is in no initial state."""
    layer = ETFClassifier(K, scale=scale, feature_norm=feature_norm, seed=seed, **kwargs)
    layer.build((None, P))
    rng = np.random.default_rng(1)
    for v in layer.weights:
        if v.name != "kernel":
            v.assign(rng.uniform(0.5, 2, v.shape))
    return layer


def reference(layer, h, training):
    """Logits in float64."""
    h = np.asarray(h, np.float64)
    if layer.feature_norm.startswith("bn"):
        gamma, beta, mean, variance = (
            np.asarray(keras.ops.convert_to_numpy(getattr(layer.batch_norm, name)), np.float64)
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        if training:
            mean, variance = h.mean(0), h.var(0)
        h = gamma * (h - mean) / np.sqrt(variance + BN_EPSILON) + beta
    if layer.feature_norm.endswith("l2"):
        h = h / np.sqrt((h**2).sum(-1, keepdims=True))
    return layer.scale * h @ frames.simplex_etf(K, P, layer.seed).T


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def test_kernel_is_the_frame():
    layer = make(seed=11)
    wanted = frames.simplex_etf(K, P, seed=11).T.astype(np.float32)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.kernel), wanted)
    assert [v.path for v in layer.non_trainable_variables] == [layer.kernel.path]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("feature_norm", NORMS)
def test_logits(feature_norm, training):
    layer = make(feature_norm)
    h = features().astype(np.float32)
    wanted = reference(layer, h, training)
    logits = layer(h, training=training)
    assert dtype_of(logits) == "float32" and logits.shape == (N, K)
    np.testing.assert_allclose(logits, wanted, rtol=2e-5, atol=2e-5)


def test_training_moves_the_statistics():
    layer = make("bn")
    before = [np.array(layer.batch_norm.moving_mean), np.array(layer.batch_norm.moving_variance)]
    h = features().astype(np.float32)
    layer(h, training=False)
    np.testing.assert_array_equal(layer.batch_norm.moving_mean, before[0])
    layer(h, training=True)
    for after, old, batch in zip(
        (layer.batch_norm.moving_mean, layer.batch_norm.moving_variance),
        before,
        (h.mean(0), h.var(0)),
        strict=True,
    ):
        wanted = BN_MOMENTUM * old + (1 - BN_MOMENTUM) * batch
        np.testing.assert_allclose(after, wanted, rtol=1e-4)


@pytest.mark.parametrize("feature_norm", NORMS)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_16_bit_policies_keep_float32_logits(policy, feature_norm):
    layer = make(feature_norm, dtype=policy)
    assert dtype_of(layer.kernel) == "float32"
    # Float32 features must not be rounded on the way in.
    h = features().astype(np.float32)
    logits = layer(h, training=False)
    assert dtype_of(logits) == "float32"
    np.testing.assert_allclose(logits, reference(layer, h, False), rtol=2e-5, atol=2e-5)
    half = keras.ops.cast(h, layer.compute_dtype)
    rounded = keras.ops.convert_to_numpy(keras.ops.cast(half, "float32"))
    logits = layer(half, training=False)
    assert dtype_of(logits) == "float32"
    np.testing.assert_allclose(logits, reference(layer, rounded, False), rtol=2e-5, atol=2e-5)
    assert dtype_of(layer(keras.Input((P,), dtype=layer.compute_dtype))) == "float32"


@pytest.mark.parametrize("feature_norm", NORMS)
def test_float64(feature_norm):
    layer = make(feature_norm, dtype="float64")
    logits = layer(features(), training=False)
    assert dtype_of(logits) == dtype_of(layer.kernel) == "float64"
    np.testing.assert_allclose(logits, reference(layer, features(), False), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(layer.kernel, frames.simplex_etf(K, P, layer.seed).T)


def test_zero_features_stay_finite():
    np.testing.assert_array_equal(make("l2")(np.zeros((2, P), np.float32)), np.zeros((2, K)))


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    ],
)
def test_thawed_and_trained_with_weight_decay_the_kernel_stays(make_optimizer):
    head = ETFClassifier(K, scale=16, feature_norm="bn_l2", name="head")
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(P), head])
    model.trainable = False
    model.trainable = True
    head.trainable = True
    assert {v.name for v in head.trainable_variables} == {"gamma", "beta"}
    before = {v.path: np.array(v) for v in model.variables}
    optimizer = make_optimizer()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(16, 5)), rng.integers(0, K, 16), batch_size=8, epochs=2, verbose=0)
    same = {v.path for v in model.variables if np.array_equal(before[v.path], v)}
    assert same == {head.kernel.path}
    slots = [v.shape for v in optimizer.variables if len(v.shape) == 2]
    assert slots and set(slots) == {(5, P)}


def certainty(scale, classes):
    """Probability of the true class where features have collapsed onto their class vectors."""
    return 1 / (1 + (classes - 1) * np.exp(-scale * classes / (classes - 1)))


def scale_warnings(*args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ETFClassifier(*args, **kwargs)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("feature_norm", ["l2", "bn_l2"])
def test_scale_rule(classes, feature_norm):
    limit = (classes - 1) / classes * np.log(99 * (classes - 1))
    np.testing.assert_allclose(certainty(limit, classes), 0.99)
    assert not scale_warnings(classes, scale=1.001 * limit, feature_norm=feature_norm)
    assert not scale_warnings(classes, scale=16, feature_norm=feature_norm)
    (message,) = scale_warnings(classes, scale=0.999 * limit, feature_norm=feature_norm)
    assert f"{classes} classes" in message and f"at least {limit:.1f}" in message
    assert not scale_warnings(classes, scale=0.1)


def test_certainty_at_perfect_collapse():
    with pytest.warns(UserWarning, match="too small"):
        layer = make("l2", scale=4.0)
    collapsed = 37 * frames.simplex_etf(K, P, layer.seed).astype(np.float32)
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(layer(collapsed)))
    np.testing.assert_allclose(np.diag(probabilities), certainty(4.0, K), rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_classes": 1}, "num_classes >= 2"),
        ({"num_classes": K, "feature_norm": "batch"}, "none, bn, l2, bn_l2; got 'batch'"),
        ({"num_classes": K, "scale": 0}, "positive"),
        ({"num_classes": K, "scale": -1.0}, "positive"),
        ({"num_classes": K, "scale": float("nan")}, "positive"),
        ({"num_classes": K, "scale": float("inf")}, "positive"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ETFClassifier(**kwargs)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((None, K - 2), f"{K - 2} dimensions"),
        ((None, 4, 4), "pooled features"),
        ((None, None), "known p"),
    ],
)
def test_bad_input_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        ETFClassifier(K).build(shape)
    with pytest.raises(ValueError, match=message):
        ETFClassifier(K)(keras.Input(shape[1:]))


def test_config_round_trip():
    layer = ETFClassifier(K, scale=9.5, feature_norm="bn_l2", seed=5, name="x", dtype="float64")
    layer.build((None, P))
    config = layer.get_config()
    copy = ETFClassifier.from_config(config)
    assert copy.get_config() == config
    assert (copy.num_classes, copy.scale, copy.feature_norm, copy.seed, copy.name) == (
        *(K, 9.5, "bn_l2", 5, "x"),
    )
    copy.build((None, P))
    np.testing.assert_array_equal(copy.kernel, layer.kernel)
    assert dtype_of(copy.kernel) == "float64"
    assert copy.compute_output_shape((3, P)) == (3, K)


def test_keras_file(tmp_path):
    """In safe mode; tests/models/classifier_test.py loads it in a fresh process."""
    inputs = keras.Input((P,))
    model = keras.Model(inputs, [make(norm, seed=i)(inputs) for i, norm in enumerate(NORMS)])
    h = features().astype(np.float32)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.variables) == len(model.variables) == 12
    for found, v in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(found, v)
    np.testing.assert_array_equal(np.stack(loaded(h)), np.stack(model(h)))


@pytest.mark.parametrize("name", [n for n in frames.FRAMES if n != "simplex_etf"])
def test_other_frames(name, tmp_path):
    wanted = frames.build(name, K, P, seed=5).T.astype(np.float32)
    images = keras.Input((P,))
    model = keras.Model(images, ETFClassifier(K, seed=5, frame=name)(images))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.layers[-1].kernel), wanted)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    h = features().astype(np.float32)
    np.testing.assert_array_equal(again(h), model(h))
    assert again.layers[-1].frame == name and not again.trainable_variables


@pytest.mark.parametrize("feature_norm", NORMS)
def test_the_scale_can_be_trained(feature_norm, tmp_path):
    inputs = keras.Input((P,))
    layer = ETFClassifier(K, 12.0, feature_norm, seed=3, learn_scale=True)
    model = keras.Model(inputs, layer(inputs))
    h = features().astype(np.float32)
    fixed = ETFClassifier(K, 12.0, feature_norm, seed=3)
    start = keras.ops.convert_to_numpy(fixed(h))
    np.testing.assert_allclose(model(h), start, rtol=1e-6, atol=1e-6)
    norms = {"gamma", "beta"} if feature_norm.startswith("bn") else set()
    assert {v.name for v in model.trainable_variables} == {"log_scale"} | norms
    # Of the mean square, (e^s z)^2, the derivative by s is twice itself.
    model.compile(keras.optimizers.SGD(1e-3), "mse", run_eagerly=True)
    trained = keras.ops.convert_to_numpy(fixed(h, training=True))
    model.fit(h, np.zeros((N, K)), batch_size=N, verbose=0)
    wanted = np.log(12) - 1e-3 * 2 * np.mean(trained**2)
    np.testing.assert_allclose(layer.log_scale, wanted, rtol=1e-5)
    np.testing.assert_allclose(layer.logit_scale, np.exp(wanted), rtol=1e-5)
    logits = keras.ops.convert_to_numpy(model(h))
    assert not np.allclose(logits, start, rtol=1e-3)
    np.testing.assert_allclose(backbones.stock(model)(h), logits, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(h), logits)


def test_a_frame_for_more_classes_than_dimensions(monkeypatch, tmp_path):
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path))
    layer = ETFClassifier(50, frame="softmax_code")
    assert layer(np.ones((2, 8), "float32")).shape == (2, 50)
    with pytest.raises(ValueError, match="no simplex ETF of 50 classes exists in 8 .*softmax_code"):
        ETFClassifier(50)(np.ones((2, 8), "float32"))
    with pytest.raises(ValueError, match="frame must be one of .*; got 'grassmann'"):
        ETFClassifier(50, frame="grassmann")


_JAX = """
import sys, keras, numpy as np
from etfzoo.layers import ETFClassifier
assert keras.backend.backend() == "jax"
h = np.load(sys.argv[1])
out = {}
for norm in ("none", "bn", "l2", "bn_l2"):
    layer = ETFClassifier(7, scale=12.0, feature_norm=norm, seed=3)
    out[norm] = np.array(layer(h, training=True))
    out["kernel"] = np.array(layer.kernel)
np.savez(sys.argv[2], **out)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_backend(tmp_path):
    h = features().astype(np.float32)
    np.save(tmp_path / "h.npy", h)
    fresh_python(_JAX, tmp_path / "h.npy", tmp_path / "out.npz", KERAS_BACKEND="jax")
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(out["kernel"], frames.simplex_etf(K, P, 3).T.astype(np.float32))
    for norm in NORMS:
        layer = ETFClassifier(K, scale=12.0, feature_norm=norm, seed=3)
        np.testing.assert_allclose(out[norm], layer(h, training=True), rtol=1e-4, atol=1e-4)

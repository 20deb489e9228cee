"""Tests of the losses."""

import keras
import numpy as np
import pytest

from etfzoo.models.classifier import build_classifier
from etfzoo.runtime import losses


def reference(labels, logits, smoothing):
    """Cross-entropy in float64, from the probabilities of the definition."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    classes = logits.shape[-1]
    target = np.full(logits.shape, smoothing / classes)
    target[np.arange(len(labels)), labels] += 1 - smoothing
    return -(target * log_p).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("scale", [0.1, 5, 1e4])
def test_cross_entropy(scale, smoothing):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(20, 6))).astype(np.float32)
    labels = rng.integers(0, 6, 20).astype(np.int32)
    loss = losses.cross_entropy(labels, logits, smoothing)
    assert loss.shape == (20,) and keras.backend.standardize_dtype(loss.dtype) == "float32"
    np.testing.assert_allclose(loss, reference(labels, logits, smoothing), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_in_float64(smoothing):
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.normal(size=(20, 6)), rng.integers(0, 6, 20)
    loss = losses.cross_entropy(labels, keras.ops.convert_to_tensor(logits, "float64"), smoothing)
    assert keras.backend.standardize_dtype(loss.dtype) == "float64"
    np.testing.assert_allclose(loss, reference(labels, logits, smoothing), rtol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_targets_is_linear_in_them(smoothing):
    rng = np.random.default_rng(2)
    logits = (3 * rng.normal(size=(20, 6))).astype(np.float32)
    labels, others = rng.integers(0, 6, (2, 20))
    share = rng.uniform(size=20)
    one_hot = np.eye(6)
    targets = share[:, None] * one_hot[labels] + (1 - share)[:, None] * one_hot[others]
    loss = losses.cross_entropy(targets.astype(np.float32), logits, smoothing)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    mine, theirs = reference(labels, logits, smoothing), reference(others, logits, smoothing)
    np.testing.assert_allclose(loss, share * mine + (1 - share) * theirs, rtol=2e-5)
    whole = losses.cross_entropy(one_hot[labels].astype(np.float32), logits, smoothing)
    np.testing.assert_array_equal(whole, losses.cross_entropy(labels, logits, smoothing))
    expected = np.where(share > 0.5, labels, others)
    np.testing.assert_array_equal(losses.label_classes(targets), expected)
    assert losses.label_classes(labels) is labels


def test_cross_entropy_of_equal_logits():
    # log K whatever the smoothing.
    for smoothing in (0.0, 0.3):
        loss = losses.cross_entropy(np.array([0, 3]), np.zeros((2, 4), np.float32), smoothing)
        np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_decayed_weights_are_the_trained_kernels(head):
    model = build_classifier(
        "rn18",
        5,
        head=head,
        input_shape=(32, 32, 3),
        feature_norm="bn" if head == "etf" else "none",
    )
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 20
    wanted = {layer.kernel.path for layer in convolutions}
    if head == "linear":
        wanted.add("logits/kernel")
    assert {v.path for v in model.variables if losses.decayed(v)} == wanted
    etf_kernel = next(v for v in model.variables if v.path == "logits/kernel")
    assert losses.decayed(etf_kernel) == (head == "linear")


def test_everything_that_is_trained_is_decayed_on_request():
    model = build_classifier("rn18", 5, "etf", "sw", (32, 32, 3))
    decayed = {v.path for v in model.variables if losses.decayed(v, everything=True)}
    assert decayed == {v.path for v in model.trainable_variables}
    names = {path.rsplit("/", 1)[-1] for path in decayed}
    assert names == {"kernel", "gamma", "beta", "mean_logits", "covariance_logits"}
    kernels = {v.path for v in model.variables if losses.decayed(v)}
    assert {path.rsplit("/", 1)[-1] for path in kernels} == {"kernel"}


def test_a_frozen_kernel_is_not_decayed():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert [losses.decayed(v) for v in layer.variables] == [True, False]
    layer.trainable = False
    assert [losses.decayed(v) for v in layer.variables] == [False, False]

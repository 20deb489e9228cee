"""Tests of the losses."""

import functools
import itertools

import keras
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.utils.class_weight import compute_class_weight

from etfzoo.layers import frames
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


SCALE = 4.0
WEIGHTS = np.array([0.2, 0.5, 1.0, 1.7, 2.5, 4.0])
ADJUSTMENT = np.log([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])


def by_hand(name, label, logits, label_smoothing=0.0, adjustment=None):
    """The loss of one example of one class, in float64."""
    f, classes = np.asarray(logits, np.float64), len(logits)
    if name == "dot_regression":  # Yang et al. 2022, with features and rows of length 1
        return (f[label] / SCALE - 1) ** 2 / 2
    if name == "squared_error":  # Hui and Belkin 2021, with k = M = 1
        return (
            (f[label] - 1) ** 2 + sum(f[j] ** 2 for j in range(classes) if j != label)
        ) / classes
    f = f + (0 if adjustment is None else adjustment)
    target = np.full(classes, label_smoothing / classes)
    target[label] += 1 - label_smoothing
    return scipy.special.logsumexp(f) - target @ f


CASES = {
    "dot_regression": [{}],
    "squared_error": [{}],
    "cross_entropy": [{}, {"label_smoothing": 0.1}, {"adjustment": ADJUSTMENT},
                      {"label_smoothing": 0.3, "adjustment": ADJUSTMENT}],
}  # fmt: skip


def check_losses(dtype="float32", rtol=1e-5):
    """Each loss with all of its options, of labels and of shares; run on JAX, too."""
    rng = np.random.default_rng(5)
    logits = (3 * rng.normal(size=(20, 6))).astype("float32")
    logits = keras.ops.convert_to_tensor(logits, dtype=dtype)
    exact = keras.ops.convert_to_numpy(keras.ops.cast(logits, "float32"))
    labels, others = rng.integers(0, 6, (2, 20)).astype("int32")
    share = rng.integers(0, 9, 20) / 8
    mixed = share[:, None] * np.eye(6)[labels] + (1 - share)[:, None] * np.eye(6)[others]
    for (name, options), weighs in itertools.product(
        [(name, options) for name, several in CASES.items() for options in several], (False, True)
    ):
        loss = functools.partial(losses.LOSSES[name], **options)
        loss = functools.partial(loss, scale=SCALE) if name == "dot_regression" else loss
        loss = functools.partial(loss, class_weights=WEIGHTS) if weighs else loss
        weights = WEIGHTS if weighs else np.ones(6)
        one, other = (
            [weights[c] * by_hand(name, c, f, **options) for c, f in zip(y, exact, strict=True)]
            for y in (labels, others)
        )
        found = loss(labels, logits)
        assert keras.backend.standardize_dtype(found.dtype) == "float32"
        np.testing.assert_allclose(found, one, rtol=rtol, err_msg=name)
        # Shares of classes weigh linearly, and so do the weights of the classes.
        found = loss(mixed.astype("float32"), logits)
        wanted = share * one + (1 - share) * other
        np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_equal_their_formulas(dtype):
    check_losses(dtype)  # of 16 bits, too: what is computed from them has 32


@pytest.mark.parametrize("classes", [3, 10])
def test_squared_error_of_a_simplex_etf_is_at_least_that_of_its_sum(classes):
    rows = frames.simplex_etf(classes, 16, 0)
    best = np.linalg.lstsq(rows, np.eye(classes), rcond=None)[0].T  # features of each class
    found = losses.squared_error(np.arange(classes), (best @ rows.T).astype("float32"))
    np.testing.assert_allclose(found, 1 / classes**2, rtol=1e-5)


def test_logit_adjustment_is_the_log_of_the_share():
    counts = np.array([60, 30, 10])
    np.testing.assert_allclose(
        losses.logit_adjustment(counts, 2.0), np.log([0.6**2, 0.3**2, 0.1**2]), rtol=1e-12
    )
    # A class without examples counts as one, in what the shares are of, too.
    found = losses.logit_adjustment(np.array([60, 0, 39]), 1.0)
    np.testing.assert_allclose(np.exp(found), [0.6, 0.01, 0.39], rtol=1e-12)
    # At tau 1 a network that tells no classes apart is at its best with equal logits.
    labels = np.repeat([0, 1, 2], counts)
    tau1 = losses.logit_adjustment(counts, 1.0)

    def mean_loss(logits):
        return np.mean([by_hand("cross_entropy", c, logits, adjustment=tau1) for c in labels])

    best = scipy.optimize.minimize(mean_loss, [1.0, -2.0, 0.5]).x
    np.testing.assert_allclose(best - best.mean(), 0, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 0.9999999, 1.0])
@pytest.mark.parametrize("counts", [[500, 100, 1], [7, 0, 3], [5, 5, 5], [10**9, 2, 1]])
def test_balanced_weights(counts, beta):
    found = losses.balanced_weights(np.array(counts), beta)
    effective = [sum(beta**i for i in range(n)) if n < 1000 else None for n in counts]
    pairs = [(i, j) for i in range(3) for j in range(3) if effective[i] and effective[j]]
    for i, j in pairs:  # as 1 + beta + beta^2 + ...
        assert found[i] / found[j] == pytest.approx(effective[j] / effective[i], rel=1e-7)
    assert np.average(found, weights=counts) == pytest.approx(1, rel=1e-12)
    assert np.isfinite(found).all() and (found > 0).all()
    if beta == 0:
        np.testing.assert_allclose(found, 1, rtol=1e-12)


def test_beta_1_is_what_scikit_learn_calls_balanced():
    counts = np.array([50, 7, 3, 1])
    labels = np.repeat(np.arange(4), counts)
    wanted = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(losses.balanced_weights(counts, 1), wanted, rtol=1e-12)


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

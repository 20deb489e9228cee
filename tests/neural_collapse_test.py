"""Tests of the collapse measure."""

import numpy as np
import pytest

from etfzoo import neural_collapse


def direct(features, labels):
    """tr S_W / tr S_B from the definition: averages over examples of outer products."""
    features = np.asarray(features, np.float64)
    total = features.mean(0)
    within = between = np.zeros((features.shape[1],) * 2)
    for h, label in zip(features, labels, strict=True):
        mean = features[labels == label].mean(0)
        within = within + np.outer(h - mean, h - mean)
        between = between + np.outer(mean - total, mean - total)
    return np.trace(within) / np.trace(between)


def clouds(counts, seed=0, dim=5):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = rng.normal(size=(len(counts), dim))
    return means[labels] + 0.5 * rng.normal(size=(len(labels), dim)), labels


def test_perfect_collapse_is_zero():
    labels = np.array([0, 1, 2, 0, 1, 2])
    assert neural_collapse.scatter_ratio(np.eye(3)[labels], labels) == 0


@pytest.mark.parametrize("spread, distance", [(1.0, 1.0), (3.0, 0.5)])
def test_two_pairs_of_points(spread, distance):
    # Means at +-distance, examples at +-spread around them: the ratio is (spread / distance)^2.
    d, s = distance, spread
    features = [[d, s], [d, -s], [-d, s], [-d, -s]]
    ratio = neural_collapse.scatter_ratio(features, [0, 0, 1, 1])
    np.testing.assert_allclose(ratio, (s / d) ** 2, rtol=1e-12)


def test_gaussian_clouds():
    # Balanced clouds around the corners r e_k of a simplex: S_W = dim s^2, S_B = r^2 (K-1)/K.
    classes, dim, r, s = 4, 10, 3.0, 0.7
    labels = np.arange(40_000) % classes
    noise = np.random.default_rng(0).normal(scale=s, size=(len(labels), dim))
    ratio = neural_collapse.scatter_ratio(r * np.eye(dim)[labels] + noise, labels)
    np.testing.assert_allclose(ratio, dim * s**2 / (r**2 * (classes - 1) / classes), rtol=0.02)


@pytest.mark.parametrize("counts", [(10, 10), (1, 30), (3, 17, 60, 2), (1, 1, 2)])
def test_imbalanced_classes(counts):
    features, labels = clouds(counts)
    ratio = neural_collapse.scatter_ratio(features, labels)
    np.testing.assert_allclose(ratio, direct(features, labels), rtol=1e-12)


def test_two_imbalanced_classes_in_closed_form():
    # S_B of two classes: n1 n2 / N^2 times their squared distance.
    features = [[0.0], [2.0], [1.0], [11.0], [1.0]]
    ratio = neural_collapse.scatter_ratio(features, [0, 0, 0, 1, 0])
    np.testing.assert_allclose(ratio, (2 / 5) / (4 * 1 / 25 * 100), rtol=1e-12)


def test_invariances():
    features, labels = clouds((8, 20, 12))
    ratio = neural_collapse.scatter_ratio(features, labels)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    order = np.random.default_rng(2).permutation(len(labels))
    for changed, names in (
        (1e-3 * features, labels),
        (1e5 * features, labels),
        (features @ rotation, labels),
        (features + 7, labels),
        (features[order], labels[order]),
        (features, np.array([30, 7, 999])[labels]),
        (features, np.array(["b", "a", "c"])[labels]),
        (features.tolist(), labels.tolist()),
    ):
        changed = neural_collapse.scatter_ratio(changed, names)
        np.testing.assert_allclose(changed, ratio, rtol=1e-9)
    assert ratio != neural_collapse.scatter_ratio(2 * features + np.eye(5)[labels], labels)


def test_float32_features_far_from_the_origin():
    features, labels = clouds((30, 30, 30))
    far = (features + 1000).astype(np.float32)
    wanted = direct(far, labels)
    np.testing.assert_allclose(neural_collapse.scatter_ratio(far, labels), wanted, rtol=1e-9)
    np.testing.assert_allclose(wanted, direct(features, labels), rtol=1e-3)


def test_one_class():
    with pytest.raises(ValueError, match="at least two classes"):
        neural_collapse.scatter_ratio(np.ones((3, 2)), [4, 4, 4])


def test_equal_means():
    with pytest.raises(ValueError, match="means are equal"):
        neural_collapse.scatter_ratio([[1.0], [-1.0], [2.0], [-2.0]], [0, 0, 1, 1])


@pytest.mark.parametrize("value", [0.1, 1e-6, 1e6 / 3])
def test_constant_features(value):
    with pytest.raises(ValueError, match="means are equal"):
        neural_collapse.scatter_ratio(np.full((10, 4), value), [0] * 3 + [1] * 7)

"""The collapse measures against closed forms and against their definitions in float64."""

import json

import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.layers.frames import simplex_etf
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics, scalars

MEASURES = ("nc1", "nc1_ratio", "cdnv", "nc2_norms", "nc2_angles", "nc2_gram")
MEASURES += ("tr_c_over_p", "tr_c_over_p_l2")
UNBIASED = ("nc1_ratio_unbiased", "cdnv_unbiased", "tr_c_over_p_unbiased")
UNBIASED += ("tr_c_over_p_l2_unbiased",)


def statistics(features, labels, classes=None, batch=5000):
    features, labels = np.asarray(features), np.asarray(labels)
    done = NeuralCollapseStatistics(classes or labels.max() + 1, features.shape[1])
    for i in range(0, len(labels), batch):
        done.update(features[i : i + batch], labels[i : i + batch])
    return done


def measure(features, labels, classes=None, classifier=None, again=None, ood=None):
    return statistics(features, labels, classes).result(classifier, again, ood)


def direct(features, labels, weights=None, bias=None):
    """All measures by their definitions: loops over classes and pairs, in float64."""
    h = np.asarray(features, np.float64)
    labels = np.asarray(labels)
    classes = sorted(set(labels.tolist()))
    n, k = len(h), len(classes)
    m = {c: h[labels == c].mean(0) for c in classes}
    s_w = sum(np.outer(x - m[c], x - m[c]) for x, c in zip(h, labels, strict=True)) / n
    s_b = sum(np.outer(m[c] - h.mean(0), m[c] - h.mean(0)) for c in labels) / n
    values, vectors = np.linalg.eigh(s_b)
    rank = np.argsort(values)[::-1][: min(k - 1, h.shape[1])]
    inverse = (vectors[:, rank] / values[rank]) @ vectors[:, rank].T
    v = {c: np.square(h[labels == c] - m[c]).sum(1).mean() for c in classes}
    several = [c for c in classes if (labels == c).sum() > 1]
    means = np.stack([m[c] for c in classes])
    centred = means - means.mean(0)
    norms = np.linalg.norm(centred, axis=1)
    cosines = [centred[i] @ centred[j] / norms[i] / norms[j] for i in range(k) for j in range(i)]
    simplex = (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    gram = centred @ centred.T
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    unit_w = sum(np.square(unit[labels == c] - unit[labels == c].mean(0)).sum() for c in classes)
    result = {
        "nc1": np.trace(s_w @ inverse) / k,
        "nc1_ratio": np.trace(s_w) / np.trace(s_b),
        "cdnv": np.mean(
            [
                (v[a] + v[b]) / (2 * np.square(m[a] - m[b]).sum())
                for a in several
                for b in several
                if a < b
            ]
        ),
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": np.mean([abs(c + 1 / (k - 1)) for c in cosines]),
        "nc2_gram": np.linalg.norm(gram / np.linalg.norm(gram) - simplex),
        "tr_c_over_p": np.trace(s_w) / h.shape[1],
        "tr_c_over_p_l2": unit_w / n / h.shape[1],
    }
    result |= direct_unbiased(h, labels, unit)
    if weights is not None:
        w = weights[classes]
        product = w @ centred.T
        nearest = [min(classes, key=lambda c: np.square(x - m[c]).sum()) for x in h]
        result |= {
            "nc3": np.square(w / np.linalg.norm(w) - centred / np.linalg.norm(centred)).sum(),
            "nc3_gram": np.linalg.norm(product / np.linalg.norm(product) - simplex),
            "nc4": np.mean(np.argmax(h @ weights.T + bias, 1) != nearest),
        }
    return result


def direct_unbiased(h, labels, unit):
    """The unbiased measures by whole covariance matrices, as far as they exist."""
    count = {c: (labels == c).sum() for c in sorted(set(labels.tolist()))}
    count = {c: n for c, n in count.items() if n > 1}
    n, x = sum(count.values()), {c: h[labels == c] for c in count}
    cov = {c: np.cov(x[c], rowvar=False, ddof=1) for c in count}
    s_w = sum(count[c] / n * cov[c] for c in count)
    mean = sum(x[c].sum(0) for c in count) / n
    s_b = sum(count[c] / n * np.outer(x[c].mean(0) - mean, x[c].mean(0) - mean) for c in count)
    s_b = s_b - sum((1 - count[c] / n) / n * cov[c] for c in count)
    unit_w = sum(count[c] / n * np.cov(unit[labels == c], rowvar=False, ddof=1) for c in count)
    result = {
        "tr_c_over_p_unbiased": np.trace(s_w) / h.shape[1],
        "tr_c_over_p_l2_unbiased": np.trace(unit_w) / h.shape[1],
    }
    if np.trace(s_b) > 0:
        result["nc1_ratio_unbiased"] = np.trace(s_w) / np.trace(s_b)
    pairs = []
    for a in count:
        for b in (b for b in count if b > a):
            noise = np.trace(cov[a]) / count[a] + np.trace(cov[b]) / count[b]
            distance = np.square(x[a].mean(0) - x[b].mean(0)).sum() - noise
            pairs.append((np.trace(cov[a] + cov[b]), distance))
    if min(distance for _, distance in pairs) > 0:
        result["cdnv_unbiased"] = np.mean([v / (2 * distance) for v, distance in pairs])
    return result


def assert_equal(result, wanted, rtol, names=MEASURES):
    for name in names:
        np.testing.assert_allclose(result[name], wanted[name], rtol=rtol, err_msg=name)


def clouds(counts, seed=0, dim=5, spread=0.5):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = rng.normal(size=(len(counts), dim))
    return means[labels] + spread * rng.normal(size=(len(labels), dim)), labels


@pytest.mark.parametrize("classes, dim", [(2, 1), (2, 6), (10, 9), (10, 64), (200, 512)])
def test_perfect_collapse(classes, dim):
    frame, labels = simplex_etf(classes, dim), np.arange(3 * classes) % classes
    features = 7 * frame[labels] + np.linspace(-3, 3, dim)
    bias = -frame @ np.linspace(-3, 3, dim)
    result = measure(features, labels, classifier=(frame, bias), again=[features])
    for name in ("nc1", "nc1_ratio", "cdnv", "nc2_norms", "nc2_angles", "nc2_gram"):
        assert 0 <= result[name] < 1e-12, name
    for name in ("nc3", "nc3_gram", "tr_c_over_p", "tr_c_over_p_l2"):
        assert 0 <= result[name] < 1e-12, name
    assert result["nc4"] == 0 and result["examples"] == 3 * classes


def simplex_with_crosses(classes, dim, a, r):
    """Means a u_k of a simplex; each example lies at +-r beside its mean, along one axis.

    Each class takes dim / 8 of the axes and each axis is taken equally often: S_W = r^2/p I.
    """
    axes = dim // 8
    labels = np.repeat(np.arange(classes), 2 * axes)
    axis = np.repeat(np.arange(classes * axes) % dim, 2)
    sign = np.tile([1.0, -1.0], classes * axes)
    features = a * simplex_etf(classes, dim)[labels]
    features[np.arange(len(labels)), axis] += r * sign
    truth = {
        "nc1": (classes - 1) ** 2 * r**2 / (classes * dim * a**2),
        "nc1_ratio": r**2 / a**2,
        "cdnv": r**2 * (classes - 1) / (2 * classes * a**2),
        "tr_c_over_p": r**2 / dim,
    }
    order = np.random.default_rng(0).permutation(len(labels))
    return features[order], labels[order], truth


def test_known_truth():
    r = 2 * np.sqrt(1.9890 * 104 * 256 / 103**2)
    features, labels, truth = simplex_with_crosses(104, 256, 2.0, r)
    np.testing.assert_allclose(truth["nc1"], 1.9890)
    result = measure(features, labels)
    assert_equal(result, truth, 1e-11, truth)
    assert result["nc2_gram"] < 1e-12
    assert_equal(measure(features.astype(np.float32), labels), truth, 1e-6, truth)
    far = (features + 1000).astype(np.float32)  # whose own rounding is 3e-5
    assert_equal(measure(far, labels), truth, 1e-4, truth)


def test_strong_collapse_in_float32_keeps_its_digits():
    features, labels, truth = simplex_with_crosses(64, 64, 2.0, 1e-3)
    assert_equal(measure(features, labels), truth, 1e-8, truth)
    near = measure(features.astype(np.float32), labels)
    assert_equal(near, direct(features.astype(np.float32), labels), 1e-8)
    assert_equal(near, truth, 1e-3, truth)


def test_gaussian_clouds():
    # Around the corners r e_k of a simplex: S_W = s^2 I, S_B = r^2/K P.
    classes, dim, r, s = 4, 10, 3.0, 0.7
    labels = np.arange(40_000) % classes
    noise = np.random.default_rng(0).normal(scale=s, size=(len(labels), dim))
    result = measure(r * np.eye(dim)[labels] + noise, labels)
    np.testing.assert_allclose(result["nc1"], (classes - 1) * s**2 / r**2, rtol=0.02)
    ratio = dim * s**2 / (r**2 * (classes - 1) / classes)
    np.testing.assert_allclose(result["nc1_ratio"], ratio, rtol=0.02)
    np.testing.assert_allclose(result["cdnv"], dim * s**2 / (2 * r**2), rtol=0.02)
    assert max(result["nc2_norms"], result["nc2_angles"], result["nc2_gram"]) < 0.02


@pytest.mark.parametrize("spread, distance", [(1.0, 1.0), (3.0, 0.5)])
def test_two_pairs_of_points(spread, distance):
    # Means at +-distance, examples at +-spread around them: the ratio is (spread / distance)^2.
    d, s = distance, spread
    result = measure([[d, s], [d, -s], [-d, s], [-d, -s]], [0, 0, 1, 1])
    np.testing.assert_allclose(result["nc1_ratio"], (s / d) ** 2, rtol=1e-12)
    assert result["nc1"] < 1e-15  # all of the scatter is where the means do not differ
    np.testing.assert_allclose(result["cdnv"], s**2 / (4 * d**2), rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 5, 40])  # fewer than K - 1, K, more than K
@pytest.mark.parametrize(
    "counts", [(10, 10, 10, 10, 10), (1, 30, 3, 9, 2), (3, 17, 60, 2, 2), (20, 1, 1, 2, 5)]
)
def test_against_the_definitions(counts, dim):
    features, labels = clouds(counts, dim=dim)
    rng = np.random.default_rng(1)
    weights, bias = rng.normal(size=(5, dim)), 3 * rng.normal(size=5)
    result = measure(features, labels, classifier=(weights, bias), again=[features])
    wanted = direct(features, labels, weights, bias)
    assert_equal(result, wanted, 1e-9, wanted)
    lists = {"classes", "examples", "skipped_classes", "single_example_classes"}
    assert set(wanted) | lists == set(result)


@pytest.fixture(scope="module")
def population():
    """Gaussian classes whose spread differs, `draw(counts, seed)` of them, and `truth(counts)`."""
    rng, classes, dim = np.random.default_rng(0), 10, 200
    means = rng.normal(size=(classes, dim))
    spread = np.linspace(0.8, 3, classes)[:, None] * rng.uniform(0.5, 1.5, (classes, dim))
    variance = np.square(spread).sum(1)

    def draw(counts, seed):
        labels = np.repeat(np.arange(classes), counts)
        noise = np.random.default_rng([1, seed]).normal(size=(len(labels), dim))
        return means[labels] + spread[labels] * noise, labels

    def truth(counts):
        share = counts / np.sum(counts)
        between = share @ np.square(means - share @ means).sum(1)
        i, j = np.triu_indices(classes, 1)
        distance = np.square(means[i] - means[j]).sum(1)
        return {
            "nc1_ratio": share @ variance / between,
            "cdnv": np.mean((variance[i] + variance[j]) / (2 * distance)),
            "tr_c_over_p": share @ variance / dim,
        }

    return draw, truth


# Images a class: equal ones; and most of those that spread least, then of those that spread most.
SHARES = ([1] * 10, [1.6] * 5 + [0.4] * 5, [0.4] * 5 + [1.6] * 5)


@pytest.mark.parametrize(
    "images, shares", [*((20, shares) for shares in SHARES), (50, SHARES[0]), (500, SHARES[0])]
)
def test_unbiased_measures_do_not_depend_on_the_number_of_examples(population, shares, images):
    draw, truth = population
    counts = np.round(np.array(shares) * images).astype(int)
    results = [measure(*draw(counts, seed)) for seed in range(max(2000 // images, 4))]
    mean = {name: np.mean([r[name] for r in results]) for name in MEASURES + UNBIASED}
    off = {name: mean[name] / wanted for name, wanted in truth(counts).items()}
    for name, wanted in truth(counts).items():
        np.testing.assert_allclose(mean[f"{name}_unbiased"], wanted, rtol=0.02, err_msg=name)
    # The plain ones are off at 20 and 50, or the test would say nothing.
    for name in ("nc1_ratio", "cdnv"):
        assert off[name] < {20: 0.85, 50: 0.93}[images] if images < 500 else off[name] > 0.95


def test_unbiased_ratio_of_balanced_classes_follows_from_the_plain_one(population):
    k, n = 10, 7
    result = measure(*population[0]([n] * k, 0))
    r = result["nc1_ratio"]
    wanted = r * n / (n - 1) / (1 - r * (k - 1) / (k * (n - 1)))
    np.testing.assert_allclose(result["nc1_ratio_unbiased"], wanted, rtol=1e-9)


def test_unbiased_lengths_of_unit_features(population):
    draw, _ = population
    few = np.mean([measure(*draw([5] * 10, s))["tr_c_over_p_l2_unbiased"] for s in range(100)])
    many = measure(*draw([2000] * 10, 0))
    np.testing.assert_allclose(few, many["tr_c_over_p_l2"], rtol=0.01)


def test_means_that_only_noise_separates_have_no_unbiased_ratio(caplog):
    rng = np.random.default_rng(0)
    results = [measure(rng.normal(size=(40, 50)), np.arange(40) % 8) for _ in range(20)]
    left_out = [r for r in results if "nc1_ratio_unbiased" not in r]
    assert 2 < len(left_out) < 18  # about half: without bias the scatter is 0 on average
    assert "nc1_ratio_unbiased is left out: with so few images" in caplog.text
    assert "cdnv_unbiased is left out: with so few images" in caplog.text
    assert all(r["nc1_ratio_unbiased"] > 0 for r in results if r not in left_out)
    assert all(not any(name.startswith("cdnv_") for name in r) for r in results)


def test_a_classifier_in_agreement_only_with_its_bias():
    features, labels = clouds((20, 20, 20), spread=0.1)
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    bias = -np.square(means).sum(1) / 2  # |x - m|^2 as a linear classifier
    nc4 = [
        measure(features, labels, classifier=(means, b), again=[features[:7], features[7:]])["nc4"]
        for b in (bias, bias + [9, 0, 0])
    ]
    assert nc4[0] == 0 and nc4[1] > 0.5
    assert "nc4" not in measure(features, labels, classifier=(means, bias))


def test_invariances():
    features, labels = clouds((8, 20, 12))
    result = measure(features, labels)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    free = [name for name in MEASURES if not name.startswith("tr_c")]
    for changed in (1e-3 * features, 1e5 * features, features @ rotation, features + 7):
        assert_equal(measure(changed, labels), result, 1e-9, free)
    scaled = measure(1e5 * features, labels)
    np.testing.assert_allclose(scaled["tr_c_over_p_l2"], result["tr_c_over_p_l2"], rtol=1e-12)
    np.testing.assert_allclose(scaled["tr_c_over_p"], 1e10 * result["tr_c_over_p"], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_order_of_batches_and_merged_parts(dtype):
    features, labels = clouds(np.r_[np.arange(1, 60), 200], dim=80)
    features = (features + 10).astype(dtype)
    whole = measure(features, labels)
    order = np.random.default_rng(2).permutation(len(labels))
    assert_equal(measure(features[order], labels[order]), whole, 1e-9)
    assert_equal(statistics(features, labels, batch=7).result(), whole, 1e-9)
    order = np.argsort(labels)  # parts that share few classes, far from each other
    parts = [statistics(features[rows], labels[rows], 60) for rows in np.array_split(order, 3)]
    for first, *others in (parts, parts[::-1]):
        merged = NeuralCollapseStatistics(60, 80)
        merged.merge(NeuralCollapseStatistics(60, 80))
        for part in (first, *others):
            merged.merge(part)
        assert_equal(merged.result(), whole, 1e-9)
        np.testing.assert_allclose(merged.mean, features.mean(0, np.float64), rtol=1e-9)
    assert parts[0].count.sum() == len(np.array_split(order, 3)[0])  # left as they were


def test_classes_without_or_with_one_example(caplog):
    features, labels = clouds((10, 1, 12, 9))
    named = np.array([0, 2, 5, 6])[labels]
    caplog.clear()
    result = measure(features, named, classes=8)
    assert result["skipped_classes"] == [1, 3, 4, 7] and result["classes"] == 4
    assert result["single_example_classes"] == [2]
    assert "no examples, left out of the collapse measures: 1, 3, 4, 7\n" in caplog.text
    assert (
        "one example, so no variance of their own, left out of cdnv and unbiased measures: 2\n"
        in caplog.text
    )
    assert_equal(result, direct(features, named), 1e-9)
    assert all(np.isfinite(v) for v in scalars(result, "").values())
    json.dumps(result, allow_nan=False)
    measure(features[:4], [0, 0, 7, 7], classes=100)
    assert "measures: 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, … (98 in all)" in caplog.text
    only = measure(features[:4] + np.arange(4)[:, None], [0, 1, 2, 3])
    assert "cdnv" not in only and only["nc1"] == 0


def test_scalars():
    features, labels = clouds((10, 5, 12))
    row = scalars(measure(features, labels), "nc/test/")
    assert set(row) == {"nc/test/" + name for name in MEASURES + UNBIASED}


def test_nc5_is_the_angle_to_other_data():
    features, labels = clouds((10, 5, 12))
    other = statistics(np.random.default_rng(3).normal(size=(40, 5)), np.zeros(40, int), 3)
    mean = other.mean
    means = [features[labels == k].mean(0) for k in range(3)]
    wanted = [abs(m @ mean) / np.linalg.norm(m) / np.linalg.norm(mean) for m in means]
    result = measure(features, labels, ood=other)
    np.testing.assert_allclose(result["nc5"], np.mean(wanted), rtol=1e-12)


def test_features_that_are_zero_have_no_direction():
    features = np.array([[0.0, 0], [2, 0], [0, 3], [0, 4]])
    result = measure(features, [0, 0, 1, 1])
    np.testing.assert_allclose(result["tr_c_over_p_l2"], (1 / 4 + 1 / 4) / 4 / 2)


def test_equal_means_of_two_classes_leave_cdnv_out(caplog):
    result = measure([[1.0, 0], [-1, 0], [0, 2], [0, -2], [5, 5], [5, 6]], [0, 0, 1, 1, 2, 2])
    assert "cdnv" not in result and "two classes have the same mean" in caplog.text
    assert np.isfinite(result["nc1"]) and result["nc1"] < 1


@pytest.mark.parametrize("value", [0.1, 1e-6, 1e6 / 3])
def test_constant_features(value):
    with pytest.raises(EtfzooError, match="means are equal"):
        measure(np.full((10, 4), value), [0] * 3 + [1] * 7)


def test_what_cannot_be_computed_is_said():
    with pytest.raises(EtfzooError, match="at least two classes; 1 of 5 have any"):
        measure(np.ones((3, 2)), [4, 4, 4])
    with pytest.raises(EtfzooError, match="at least two classes; 0 of 5"):
        NeuralCollapseStatistics(5, 2).result()
    with pytest.raises(EtfzooError, match="means are equal"):
        measure([[1.0], [-1.0], [2.0], [-2.0]], [0, 0, 1, 1])
    for features, labels, message in (
        (np.ones((3, 4)), [0, 0, 0], r"features must be \[B, 2\]"),
        (np.ones((3, 2)), [0, 0], r"with labels \[B\]"),
        (np.ones((3, 2)), [0, 0, 5], "labels must be 0 to 4; got 0 to 5"),
        (np.ones((3, 2)), [0, -1, 0], "got -1 to 0"),
        (np.full((1, 2), np.nan), [0], "not finite"),
    ):
        with pytest.raises(EtfzooError, match=message):
            NeuralCollapseStatistics(5, 2).update(features, labels)
    done = statistics(*clouds((5, 5)))
    with pytest.raises(EtfzooError, match="3 classes and 5 features cannot join"):
        done.merge(NeuralCollapseStatistics(3, 5))
    with pytest.raises(EtfzooError, match="a classifier of 2 classes and 5 features"):
        done.result((np.ones((3, 5)), np.ones(3)))
    with pytest.raises(EtfzooError, match="nc4 needs the 10 examples of the statistics; got 4"):
        done.result((np.ones((2, 5)), np.ones(2)), [np.ones((4, 5))])

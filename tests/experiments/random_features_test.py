"""Random-feature regression against scikit-learn, and simulated kernels against the theory."""

import numpy as np
import pytest
from scipy import linalg
from sklearn.linear_model import Ridge, RidgeCV
from threadpoolctl import threadpool_limits

from etfzoo.errors import EtfzooError
from etfzoo.experiments import random_features as rf

# d0, d1, d2 in closed form, as functions of tau.
CLOSED = {
    "linear": lambda t: (0, 1, 0),
    "relu": lambda t: ((1 / 4 - 1 / (2 * np.pi)) * t, 1 / 4, 1 / (8 * np.pi * t)),
    "abs": lambda t: ((1 - 2 / np.pi) * t, 0, 1 / (2 * np.pi * t)),
    "cos": lambda t: (1 / 2 + np.exp(-2 * t) / 2 - np.exp(-t), 0, np.exp(-t) / 4),
    "sin": lambda t: (1 / 2 - np.exp(-2 * t) / 2 - t * np.exp(-t), np.exp(-t), 0),
    "exp": lambda t: ((2 * t + 1) ** -0.5 - 1 / (t + 1), 0, 1 / (4 * (t + 1) ** 3)),
}


def made(count=300, dim=20, classes=3, **how):
    """Made examples that differ in means, standardised."""
    inputs, labels = rf.gaussian_classes(count, dim, classes, **({"separation": 3.0} | how))
    return rf.standardize(inputs)[0], labels


def expected_kernels(inputs, a2=0.7):
    """E_W sigma(Wx) sigma(Wy) for Gaussian W, exactly: polynomial, arc-cosine, cosine."""
    gram = inputs @ inputs.T / inputs.shape[1]
    nu = np.diag(gram)
    lengths = np.sqrt(np.outer(nu, nu))
    cosine = np.clip(gram / lengths, -1, 1)
    angle = np.arccos(cosine)
    return {
        "poly": a2**2 * (2 * gram * gram + np.outer(nu, nu)) + gram,
        "relu": lengths * (np.sqrt(1 - cosine**2) + (np.pi - angle) * cosine) / (2 * np.pi),
        "cos": np.exp(-(nu[:, None] + nu) / 2) * np.cosh(gram),
    }


def simulated_kernels(inputs, activations, num_features, block=8192):
    """The same as means over that many Gaussian features, in float32."""
    x = (inputs / np.sqrt(inputs.shape[1])).astype(np.float32).T
    rng = np.random.default_rng(0)
    kernels = {name: np.zeros((len(inputs), len(inputs))) for name in activations}
    for _ in range(num_features // block):
        t = rng.standard_normal((block, len(x)), np.float32) @ x
        for name, activation in activations.items():
            features = activation(t)
            kernels[name] += features.T @ features / num_features
    return kernels


def centred(kernel):
    """P K P with P = I - 11^T/N."""
    kernel = kernel - kernel.mean(0)
    return kernel - kernel.mean(1, keepdims=True)


def deterministic_equivalent(inputs, labels, activation):
    """The matrix that P K P approaches in spectral norm, K the kernel E_W[F F^T] of Gaussian W.

    P {d1 X^T X + d2 V A V^T + d0 I} P, X the inputs / sqrt(p); V = [J / sqrt(p), phi] and
    A = [[t t^T + 2 S, t], [t^T, 1]], with J the one-hot labels, phi_i the difference of
    |x_i - mu|^2 / p to its class mean, t_a = sqrt(p) (tr C_a / p - tau), S_ab = tr(C_a C_b) / p
    (Liao & Couillet 2018). It holds for mixtures whose means and covariances C_a differ little,
    with p and N large and alike. The traces are estimated without bias from the data. At p = 512
    and N = 1024 it is off by 2 to 5 % of the kernel's norm where the classes' traces differ, but by
    14 % for cos where only their means do, as the norm is smaller there; either falls like
    1/sqrt(p).
    """
    dim = inputs.shape[1]
    _, labels, count = np.unique(labels, return_inverse=True, return_counts=True)
    one_hot = np.eye(len(count))[labels]
    x = inputs / np.sqrt(dim)
    noise = x - (one_hot.T @ x / count[:, None])[labels]
    tau = np.mean(np.square(x).sum(1))
    squares = np.square(noise).sum(1)
    traces = one_hot.T @ squares / (count - 1)
    phi = squares - (one_hot.T @ squares / count)[labels]
    t = np.sqrt(dim) * (traces - tau)
    # p E (w_i . w_j)^2 = tr(C_a C_b) / p for i != j.
    products = np.square(noise @ noise.T)
    np.fill_diagonal(products, 0)
    s = dim * (one_hot.T @ products @ one_hot) / (np.outer(count, count) - np.diag(count))
    v = np.column_stack([one_hot / np.sqrt(dim), phi])
    a = np.block([[np.outer(t, t) + 2 * s, t[:, None]], [t, np.ones(1)]])
    d0, d1, d2 = rf.kernel_coefficients(activation, tau)
    return centred(d1 * x @ x.T + d2 * v @ a @ v.T + d0 * np.eye(len(x)))


def spectral_error(kernel, equivalent):
    kernel = centred(kernel)
    with threadpool_limits(1, "blas"):
        wrong, whole = (np.abs(linalg.eigvalsh(m)).max() for m in (kernel - equivalent, kernel))
    return wrong / whole


@pytest.fixture(scope="module")
def theory():
    """p = 512, n = 1024, two classes with other means and variances, and their activations."""
    inputs, labels = made(1024, 512, 2, spread=4.0)
    chosen = {"poly": rf.polynomial(0.7), "relu": rf.ACTIVATIONS["relu"], "cos": np.cos}
    return inputs, labels, chosen


def test_simulated_kernels_are_near_their_equivalent(theory):
    inputs, labels, chosen = theory
    for name, kernel in simulated_kernels(inputs, chosen, 65_536).items():
        equivalent = deterministic_equivalent(inputs, labels, chosen[name])
        assert spectral_error(kernel, equivalent) < 0.08, name


def test_expected_kernels_are_near_their_equivalent_and_only_theirs(theory):
    inputs, labels, chosen = theory
    kernels = expected_kernels(inputs)
    for name, kernel in kernels.items():
        equivalent = deterministic_equivalent(inputs, labels, chosen[name])
        assert spectral_error(kernel, equivalent) < 0.06, name
    # With the footnote's d2 = 2 a2^2 it is far. That is d2 of sqrt(2) a2, whose d0 doubles too.
    twice = deterministic_equivalent(inputs, labels, rf.polynomial(0.7 * np.sqrt(2)))
    d0 = rf.kernel_coefficients(chosen["poly"])[0]
    assert spectral_error(kernels["poly"], twice - centred(d0 * np.eye(1024))) > 0.5
    other = deterministic_equivalent(inputs, labels, chosen["relu"])
    assert spectral_error(kernels["cos"], other) > 0.5


@pytest.mark.parametrize("a2, a1", [(0.5, 1.0), (-1.0, 0.3), (0.0, 2.0)])
def test_expected_kernel_of_the_polynomial(a2, a1):
    """E K = a2^2 (2 G*G + nu nu^T) + a1^2 G, by an exact rule for Gaussian W in 2 dimensions."""
    inputs = np.random.default_rng(0).normal(size=(5, 2))
    nodes, measure = np.polynomial.hermite_e.hermegauss(8)
    weights = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    measure = np.outer(measure, measure).ravel() / (2 * np.pi)
    # random_features divides by the square root of the number of rows of W.
    features = rf.random_features(inputs, weights, rf.polynomial(a2, a1)) * np.sqrt(len(weights))
    gram = inputs @ inputs.T / 2
    nu = np.diag(gram)
    wanted = a2**2 * (2 * gram * gram + np.outer(nu, nu)) + a1**2 * gram
    np.testing.assert_allclose(features * measure @ features.T, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("name", rf.ACTIVATIONS)
def test_kernel_coefficients_in_closed_form(name, tau):
    found = rf.kernel_coefficients(rf.ACTIVATIONS[name], tau)
    np.testing.assert_allclose(found, CLOSED[name](tau), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("a2, a1, tau", [(0.7, 1.0, 1.0), (-0.4, 2.0, 0.3)])
def test_kernel_coefficients_of_the_polynomial(a2, a1, tau):
    found = rf.kernel_coefficients(rf.polynomial(a2, a1), tau)
    np.testing.assert_allclose(found, (2 * tau**2 * a2**2, a1**2, a2**2), rtol=1e-9)


def test_error_is_even_in_a2_in_law():
    """With -W for W, a2 t^2 + t becomes -(-a2 t^2 + t): the same regression, draw by draw."""
    inputs, labels = made()
    targets = np.eye(3)[labels]
    weights = rf.projection("gaussian", 40, 20, seed=0)
    predictions = []
    for a2, w in ((0.6, weights), (-0.6, -weights)):
        features = rf.random_features(inputs, w, rf.polynomial(a2))
        predictions.append(rf.RidgeRegression(features, targets).predict(features, 0.01))
    np.testing.assert_allclose(*predictions, atol=1e-10)
    fields = [
        rf.regress((inputs, labels), (inputs, labels), [rf.polynomial(a2)], seed=s).mse_fixed[0]
        for a2 in (0.6, -0.6)
        for s in range(40)
    ]
    plus, minus = np.reshape(fields, (2, 40))
    noise = np.sqrt((plus.var(ddof=1) + minus.var(ddof=1)) / 40)
    assert abs(plus.mean() - minus.mean()) < 4 * noise


@pytest.mark.parametrize("count, width", [(60, 25), (25, 60), (30, 30)])
@pytest.mark.parametrize("gamma", [1e-3, 0.5])
def test_ridge_is_scikit_learns(count, width, gamma):
    rng = np.random.default_rng(0)
    features, targets = rng.normal(2, 1, (count, width)), rng.normal(size=(count, 4))
    other = rng.normal(size=(7, width))
    fit = rf.RidgeRegression(features, targets)
    wanted = Ridge(alpha=count * gamma).fit(features, targets)
    np.testing.assert_allclose(fit.predict(other, gamma), wanted.predict(other), atol=1e-8)
    # The penalty stays what it is with all rows.
    left_out = [
        Ridge(alpha=count * gamma).fit(features[keep], targets[keep]).predict(features[~keep])[0]
        for keep in ~np.eye(count, dtype=bool)
    ]
    error = np.mean(np.square(np.array(left_out) - targets))
    np.testing.assert_allclose(fit.leave_one_out_error(gamma), error, rtol=1e-8)


def test_pick_against_scikit_learns_cross_validation():
    inputs, labels = made(80, 30)
    targets, grid = np.eye(3)[labels], (1e-4, 1e-2, 0.1, 1.0, 10.0)
    fit = rf.RidgeRegression(inputs, targets)
    picked = fit.pick(grid)
    fine = picked * np.geomspace(0.01, 100, 201)
    wanted = RidgeCV(alphas=80 * fine).fit(inputs, targets).alpha_ / 80
    np.testing.assert_allclose(picked, wanted, rtol=0.1)
    assert grid[0] < picked < grid[-1]
    assert fit.pick((0.3,)) == 0.3
    assert 1e-4 <= fit.pick((1e-4, 1e-3)) <= 1e-3  # not beyond the grid


def test_ridge_with_repeated_and_constant_columns():
    rng = np.random.default_rng(0)
    column = rng.normal(size=(20, 1))
    features = np.concatenate([column, column, np.full((20, 1), 5.0)], axis=1)
    fit = rf.RidgeRegression(features, column)
    wanted = Ridge(alpha=20 * 0.1).fit(features, column)
    predicted = fit.predict(features, 0.1)[:, 0]
    np.testing.assert_allclose(predicted, wanted.predict(features).ravel(), atol=1e-9)


@pytest.mark.parametrize("per_feature", [False, True])
def test_standardize_by_train_statistics(per_feature):
    rng = np.random.default_rng(0)
    train = rng.normal(3, [1, 5, 0.1, 0], (200, 4))
    test = rng.normal(9, 2, (50, 4))
    a, b = rf.standardize(train, test, per_feature=per_feature)
    np.testing.assert_allclose(a.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.square(a).sum(1).mean(), 4, rtol=1e-12)
    np.testing.assert_array_equal(a, rf.standardize(train, per_feature=per_feature)[0])
    # The test rows went through the very same map.
    np.testing.assert_array_equal(
        rf.standardize(train, train[:5], per_feature=per_feature)[1], a[:5]
    )
    ratio = (test - train.mean(0))[:, :3] / b[:, :3]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-9)
    if per_feature:
        np.testing.assert_allclose(a.std(0)[:3], np.sqrt(4 / 3), rtol=1e-12)
        assert not b[:, 3].any()
    else:
        np.testing.assert_allclose(ratio[0], ratio[0, 0], rtol=1e-9)


@pytest.mark.parametrize("count, dim", [(8, 20), (20, 20), (50, 20), (21, 20), (5, 2)])
@pytest.mark.parametrize("kind", rf.PROJECTIONS)
def test_projections(kind, count, dim):
    w = rf.projection(kind, count, dim, seed=3)
    assert w.shape == (count, dim) and w.dtype == np.float64
    np.testing.assert_array_equal(w, rf.projection(kind, count, dim, seed=3))
    assert np.abs(w - rf.projection(kind, count, dim, seed=4)).max() > 0.01
    if kind == "haar":
        small = w @ w.T if count <= dim else w.T @ w
        np.testing.assert_allclose(small, max(count, dim) * np.eye(len(small)), atol=1e-9)
    if kind == "etf":
        np.testing.assert_allclose(np.square(w).sum(1), dim, rtol=1e-12)
        size = min(count, np.ceil(count / np.ceil(count / (dim + 1))).astype(int))
        block = w[:size] @ w[:size].T / dim
        np.testing.assert_allclose(
            block, np.eye(size) * size / (size - 1) - 1 / (size - 1), atol=1e-9
        )
    np.testing.assert_allclose(np.square(w).sum(1).mean() / dim, 1, atol=0.5)


def test_a_draw_is_what_scikit_learn_finds():
    (train, labels), (test, test_labels) = made(), made(seed=1, count=90)
    activations = [rf.polynomial(0.3), np.cos]
    draw = rf.regress((train, labels + 5), (test, test_labels + 5), activations, "haar", 30, 0.05)
    w = rf.projection("haar", 30, 20, seed=0)
    for number, activation in enumerate(activations):
        f, g = (activation(x @ w.T / np.sqrt(20)) / np.sqrt(30) for x in (train, test))
        targets, wanted = (np.eye(3)[y] - 1 / 3 for y in (labels, test_labels))
        for kind, gamma in (("fixed", 0.05), ("validated", draw.validated[number])):
            predicted = Ridge(alpha=len(f) * gamma).fit(f, targets).predict(g)
            mse, right = np.mean((predicted - wanted) ** 2), predicted.argmax(1) == test_labels
            np.testing.assert_allclose(getattr(draw, f"mse_{kind}")[number], mse, rtol=1e-7)
            assert getattr(draw, f"accuracy_{kind}")[number] == np.mean(right)


def test_draws_repeat_and_differ_by_seed():
    data = made()
    one, again, other = (rf.regress(data, data, [np.cos], seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert one.mse_fixed != other.mse_fixed


@pytest.fixture
def kept(tmp_path):
    """A draw of two activations, and the file that it is kept in."""
    data = (np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3)
    activations = [rf.polynomial(0.5), rf.ACTIVATIONS["relu"]]
    draw = rf.regress(data, data, activations, num_features=5)
    np.savez(tmp_path / "a.npz", **draw._asdict())
    return draw, tmp_path / "a.npz"


def test_a_kept_draw_is_the_draw(kept):
    draw, path = kept
    for found, wanted in zip(rf.read_draw(path, 2), draw, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert rf.read_draw(path.with_name("none.npz"), 2) is None


@pytest.mark.parametrize("field", rf.Draw._fields)
@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -0.1, np.zeros(3), np.zeros((2, 1)), "text", [1, 2], None]
)
def test_a_damaged_draw_is_drawn_again(kept, field, value, caplog):
    draw, path = kept
    values = draw._asdict()
    if value is None:
        del values[field]
    elif isinstance(value, float):
        values[field] = np.array([0.5, value])
    else:
        values[field] = np.array(value)
    np.savez(path, **values)
    assert rf.read_draw(path, 2) is None
    assert f"{path} is damaged: drawn again" in caplog.text


@pytest.mark.parametrize(
    "how, linear_wins", [({"separation": 3.0}, True), ({"separation": 0.0, "spread": 3.0}, False)]
)
def test_linear_features_win_where_classes_differ_in_their_means(how, linear_wins):
    inputs, labels = rf.gaussian_classes(800, 40, 3, **how)
    other, other_labels = rf.gaussian_classes(800, 40, 3, **how, seed=1)
    inputs, other = rf.standardize(inputs, other)
    polynomials = [rf.polynomial(0.0), rf.polynomial(0.8)]
    draws = [
        rf.regress((inputs, labels), (other, other_labels), polynomials, num_features=80, seed=s)
        for s in range(3)
    ]
    linear, square = np.mean([d.mse_validated for d in draws], axis=0)
    assert (linear < 0.95 * square) if linear_wins else (square < 0.95 * linear)


def test_gaussian_classes():
    x, y = rf.gaussian_classes(30_000, 10, 3, separation=2.0, spread=1.0, seed=1)
    means = np.array([x[y == a].mean(0) for a in range(3)])
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 2, atol=0.05)
    variances = [x[y == a].var(0).mean() for a in range(3)]
    step = 1 / np.sqrt(10)
    np.testing.assert_allclose(variances, [1 - step, 1, 1 + step], rtol=0.02)
    same, _ = rf.gaussian_classes(30_000, 10, 3, separation=2.0, spread=1.0, seed=2)
    moved = np.array([same[y == a].mean(0) for a in range(3)])
    np.testing.assert_allclose(moved, means, atol=0.1)  # other noise, the same classes
    # No projection of a seed may repeat the noise of a seed.
    assert abs(np.mean(rf.projection("gaussian", 9, 10, 2) * same[:9])) < 0.5


GOOD = np.arange(12.0).reshape(6, 2) ** 1.5
LABELS = [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rf.standardize(np.ones((4, 3))), "all inputs are equal"),
        (lambda: rf.standardize(GOOD, np.ones((4, 3))), r"differ in width: \[2, 3\]"),
        (lambda: rf.standardize(np.ones(4)), r"must be a matrix.*\(4,\)"),
        (lambda: rf.standardize([[1.0, np.nan]]), "NaN or infinite"),
        (lambda: rf.projection("har", 3, 3, 0), "did you mean haar"),
        (lambda: rf.projection("gaussian", 0, 3, 0), "n, p >= 1; got 0 and 3"),
        (lambda: rf.projection("etf", 1, 3, 0), "at least 2"),
        (lambda: rf.projection("etf", 5, 1, 0), "at least 2"),
        (lambda: rf.random_features(GOOD, np.ones((3, 5)), np.cos), "have 2 .*takes 5"),
        (lambda: rf.RidgeRegression(GOOD, np.ones((3, 1))), "as many targets; got 6 and 3"),
        (lambda: rf.RidgeRegression(np.ones((6, 2)), GOOD), "rows of the features are equal"),
        (lambda: rf.RidgeRegression(GOOD, GOOD).predict(GOOD, 0), "positive number; got 0"),
        (lambda: rf.RidgeRegression(GOOD, GOOD).predict(GOOD, np.nan), "positive number; got nan"),
        (lambda: rf.regress((GOOD, LABELS), (GOOD, [2] * 6), [np.cos]), "every class of the test"),
        (lambda: rf.regress((GOOD, [1] * 6), (GOOD, [1] * 6), [np.cos]), "two classes"),
        (lambda: rf.regress((GOOD, LABELS[:3]), (GOOD, LABELS), [np.cos]), r"shape \(3,\)"),
        (lambda: rf.kernel_coefficients(np.cos, 0.0), "tau must be positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(EtfzooError, match=message):
        call()

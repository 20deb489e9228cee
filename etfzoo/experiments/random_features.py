"""Ridge regression on random features, and the theory of their kernel (the paper's Figure 2).

All of it is float64 NumPy. Inputs are rows x with a mean of |x|^2 near p, as `standardize` gives
them; the features are sigma(W x / sqrt(p)) / sqrt(n) with W `[n, p]`, so that W x / sqrt(p) has
variance tau = mean |x|^2 / p, near 1.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from etfzoo import arrays
from etfzoo.errors import EtfzooError, extra, unknown
from etfzoo.layers import frames

with extra("train"):
    from scipy import linalg, optimize

log = logging.getLogger("etfzoo")

PROJECTIONS = ("gaussian", "haar", "etf")
# Regularisations among which one is looked for.
GRID = tuple(10.0**e for e in range(-8, 3))

Activation = Callable[[np.ndarray], np.ndarray]


def polynomial(a2: float, a1: float = 1.0) -> Activation:
    """The activation sigma(t) = a2 t^2 + a1 t."""
    return lambda t: (a2 * t + a1) * t


ACTIVATIONS: Mapping[str, Activation] = {
    "linear": polynomial(0.0),
    "relu": lambda t: np.maximum(t, 0.0),
    "abs": np.abs,
    "cos": np.cos,
    "sin": np.sin,
    "exp": lambda t: np.exp(-np.square(t) / 2),
}


def standardize(train, *others, per_feature: bool = False) -> list[np.ndarray]:
    """Centres and scales by the statistics of `train` alone, to a mean |x|^2 = p over `train`.

    Args:
        train: `[N, p]`.
        *others: more arrays `[M, p]` that are treated the same way.
        per_feature: divide each feature by its own deviation (a constant one becomes 0) instead
            of all by one number, which leaves the shape of the covariance alone.

    Returns:
        float64 arrays, `train` first.

    Raises:
        EtfzooError: not a finite matrix, shapes that do not fit, or all rows equal.
    """
    train, *others = (_matrix(x, "inputs") for x in (train, *others))
    if any(x.shape[1] != train.shape[1] for x in others):
        raise EtfzooError(f"inputs differ in width: {[x.shape[1] for x in (train, *others)]}")
    mean = train.mean(0)
    deviation = (train - mean).std(0)
    varies = deviation > 1e-10 * np.abs(train).max(initial=1e-300)
    if not varies.any():
        raise EtfzooError("all inputs are equal: there is nothing to regress on")
    if per_feature:
        scale = np.where(varies, deviation, np.inf)
        # A constant feature adds nothing to |x|^2, so that the others make up for it.
        scale *= np.sqrt(varies.mean())
    else:
        scale = np.sqrt(np.mean(np.square(deviation)))
    return [(x - mean) / scale for x in (train, *others)]


def projection(kind: str, num_features: int, dim: int, seed: int) -> np.ndarray:
    """A random projection W whose rows have a mean square norm of p.

    Args:
        kind: `"gaussian"` (independent standard normal entries); `"haar"` (orthonormal columns
            times sqrt(n), or rows times sqrt(p) where n <= p); or `"etf"`: a simplex ETF times
            sqrt(p). No simplex has more than p+1 vectors: more features are independent simplices
            of about equal size, each of rank one less than its size.
        num_features: n.
        dim: p.
        seed: of the draw.

    Returns:
        float64 array `[n, p]`.

    Raises:
        EtfzooError: unknown kind; n or p < 1; or an ETF of one vector, or in one dimension.
    """
    if num_features < 1 or dim < 1:
        raise EtfzooError(f"a projection needs n, p >= 1; got {num_features} and {dim}")
    if kind == "gaussian":
        return np.random.RandomState(seed).standard_normal((num_features, dim))
    if kind == "haar":
        with threadpool_limits(1, "blas"):  # the same bits on any number of cores
            if num_features <= dim:
                return np.sqrt(dim) * frames.haar_frame(dim, num_features, seed).T
            return np.sqrt(num_features) * frames.haar_frame(num_features, dim, seed)
    if kind == "etf":
        if num_features < 2 or dim < 2:
            raise EtfzooError("an ETF projection needs at least 2 features in 2 dimensions")
        count = -(-num_features // (dim + 1))
        sizes = [len(part) for part in np.array_split(np.arange(num_features), count)]
        seeds = np.random.RandomState(seed).randint(2**31, size=count)
        blocks = [frames.simplex_etf(m, dim, s) for m, s in zip(sizes, seeds, strict=True)]
        return np.sqrt(dim) * np.concatenate(blocks)
    raise unknown("projection", kind, PROJECTIONS)


def random_features(inputs, weights, activation: Activation) -> np.ndarray:
    """sigma(W x / sqrt(p)) / sqrt(n).

    Args:
        inputs: `[N, p]`.
        weights: W, `[n, p]`.
        activation: sigma, elementwise.

    Returns:
        float64 array `[N, n]`.
    """
    inputs, weights = _matrix(inputs, "inputs"), _matrix(weights, "weights")
    if inputs.shape[1] != weights.shape[1]:
        raise EtfzooError(
            f"inputs have {inputs.shape[1]} features, the projection takes {weights.shape[1]}"
        )
    return activation(inputs @ weights.T / np.sqrt(weights.shape[1])) / np.sqrt(len(weights))


class RidgeRegression:
    """Ridge regression with an intercept for any number of regularisations at one decomposition.

    Minimises |F b + c - Y|^2 / N + gamma |b|^2, which is scikit-learn's `Ridge(alpha=N gamma)`.

    Args:
        features: F, `[N, n]`.
        targets: Y, `[N, K]`.

    Raises:
        EtfzooError: not finite matrices of N >= 2 rows each, or constant features.
    """

    def __init__(self, features, targets):
        features, targets = _matrix(features, "features"), _matrix(targets, "targets")
        if len(features) != len(targets) or len(features) < 2:
            raise EtfzooError(
                "ridge regression needs two rows or more, and as many targets; got "
                f"{len(features)} and {len(targets)}"
            )
        self._feature_mean, self._target_mean = features.mean(0), targets.mean(0)
        centred, self._targets = features - self._feature_mean, targets - self._target_mean
        # The decomposition of the smaller Gram matrix gives the right singular vectors V.
        tall = len(centred) >= centred.shape[1]
        gram = centred.T @ centred if tall else centred @ centred.T
        # On one thread: OpenBLAS's is many times slower when its threads wait for busy cores.
        with threadpool_limits(1, "blas"):
            values, vectors = linalg.eigh(gram / len(centred), driver="evd", overwrite_a=True)
        kept = values > 1e-13 * max(np.square(features).sum() / len(features), 1e-300)
        if not kept.any():
            raise EtfzooError("all rows of the features are equal: nothing can be learned")
        self._values, vectors = values[kept], vectors[:, kept]
        if tall:
            self._directions, self._scores = vectors, centred @ vectors
        else:
            lengths = np.sqrt(len(centred) * self._values)
            self._directions, self._scores = centred.T @ vectors / lengths, vectors * lengths
        self._moments = self._scores.T @ self._targets / len(centred)

    def leave_one_out_error(self, regularization: float) -> float:
        """Mean squared error of each row's prediction by the fit to all other rows."""
        shrunk = 1 / (self._values + _positive(regularization))
        fitted = self._scores @ (shrunk[:, None] * self._moments)
        count = len(self._scores)
        leverage = 1 / count + np.square(self._scores) @ shrunk / count
        left = np.maximum(1 - leverage, 1e-12)[:, None]
        return float(np.mean(np.square((self._targets - fitted) / left)))

    def pick(self, grid=GRID) -> float:
        """The regularisation of the least leave-one-out error.

        Args:
            grid: rising values; between the neighbours of the best one the search goes on, because
                steps of the grid would show in a curve over activations.
        """
        best = int(np.argmin([self.leave_one_out_error(g) for g in grid]))
        around = np.log(grid[max(best - 1, 0) : best + 2])
        if len(around) == 1:
            return grid[best]
        found = optimize.minimize_scalar(
            lambda log_gamma: self.leave_one_out_error(np.exp(log_gamma)),
            bounds=(around[0], around[-1]),
            method="bounded",
            options={"xatol": 0.05},
        )
        return float(np.exp(found.x))

    def predict(self, features, regularization: float) -> np.ndarray:
        """Predictions `[M, K]` for features `[M, n]`."""
        shrunk = 1 / (self._values + _positive(regularization))
        coefficients = self._directions @ (shrunk[:, None] * self._moments)
        return (features - self._feature_mean) @ coefficients + self._target_mean


class Draw(NamedTuple):
    """What one draw of W gives on the test examples, with each activation: arrays `[A]`.

    `mse` is averaged over examples and classes; `accuracy` is the share that argmax gets right.
    """

    mse_fixed: np.ndarray
    accuracy_fixed: np.ndarray
    mse_validated: np.ndarray
    accuracy_validated: np.ndarray
    validated: np.ndarray  # the regularisation that was picked


def read_draw(path, count: int) -> Draw | None:
    """A draw that was kept with np.savez; None, with a warning, where the file is damaged.

    Args:
        path: of the file, there or not.
        count: number of activations.
    """
    if not Path(path).exists():
        return None
    try:
        draw = Draw(**arrays.read_npz(path, Draw._fields))
        for name, values in draw._asdict().items():
            most = 1 if name.startswith("accuracy") else np.inf
            if values.shape != (count,) or values.dtype.kind != "f":
                raise EtfzooError(f"its {name} are not {count} numbers")
            if not (np.isfinite(values) & (values >= 0) & (values <= most)).all():
                raise EtfzooError(f"its {name} cannot be")
    except EtfzooError as error:
        log.warning("%s is damaged: drawn again (%s)", path, error)
        return None
    return draw


def regress(
    train,
    test,
    activations,
    kind: str = "gaussian",
    num_features: int | None = None,
    regularization: float = 1e-2,
    seed: int = 0,
) -> Draw:
    """Ridge regression of one-hot labels (minus 1/K) on the features of one W.

    Args:
        train, test: pairs of inputs `[N, p]` (see `standardize`) and class numbers `[N]`.
        activations: functions that share the W.
        kind, seed: of the projection.
        num_features: n; None is p.
        regularization: the fixed gamma, see RidgeRegression; for the validated one see its `pick`.

    Raises:
        EtfzooError: bad shapes, values or names; a test class that is not in `train`.
    """
    (inputs, labels), (test_inputs, test_labels) = (_examples(*x) for x in (train, test))
    if inputs.shape[1] != test_inputs.shape[1]:
        raise EtfzooError(f"inputs differ in width: {inputs.shape[1]}, {test_inputs.shape[1]}")
    classes, labels = np.unique(labels, return_inverse=True)
    if len(classes) < 2 or not np.isin(test_labels, classes).all():
        raise EtfzooError("training needs two classes or more, and every class of the test data")
    targets = np.eye(len(classes))[labels] - 1 / len(classes)
    test_labels = np.searchsorted(classes, test_labels)
    test_targets = np.eye(len(classes))[test_labels] - 1 / len(classes)
    dim = inputs.shape[1]
    weights = projection(kind, dim if num_features is None else num_features, dim, seed)
    rows = []
    for activation in activations:
        fit = RidgeRegression(random_features(inputs, weights, activation), targets)
        features = random_features(test_inputs, weights, activation)
        picked = fit.pick()
        row = []
        for gamma in (regularization, picked):
            predicted = fit.predict(features, gamma)
            right = predicted.argmax(1) == test_labels
            row += [np.mean(np.square(predicted - test_targets)), np.mean(right)]
        rows.append([*row, picked])
    return Draw(*np.array(rows).T)


def kernel_coefficients(activation: Activation, tau: float = 1.0) -> tuple[float, float, float]:
    """The numbers by which an activation enters what the kernel E_W[F F^T] of Gaussian W is near.

    They are d0, d1, d2 of its deterministic equivalent (Liao & Couillet 2018), see
    tests/experiments/random_features_test.py.
    With z ~ N(0, 1) and s at sqrt(tau) z: d1 = (E s')^2, d2 = (E s'')^2 / 4 and
    d0 = Var s - tau d1; the derivatives by Stein's lemma, so that s needs none. For
    s = a2 t^2 + a1 t that is (2 tau^2 a2^2, a1^2, a2^2). The paper's footnote has d2 = 2 a2^2,
    which does not fit simulated kernels; either way d2 = 0 just for the linear one.

    Args:
        activation: elementwise; a kink at 0 is integrated exactly, elsewhere it costs digits.
        tau: mean |x|^2 / p.

    Raises:
        EtfzooError: tau <= 0.
    """
    if not tau > 0:
        raise EtfzooError(f"tau must be positive; got {tau}")
    # Gauss-Legendre on both sides of 0, because Gauss-Hermite converges slowly over a kink.
    nodes, measure = np.polynomial.legendre.leggauss(200)
    nodes, measure = 7 * (nodes + 1), 7 * measure
    z = np.concatenate([-nodes, nodes])
    measure = np.tile(measure * np.exp(-np.square(nodes) / 2) / np.sqrt(2 * np.pi), 2)
    s = activation(np.sqrt(tau) * z)
    mean = measure @ s
    slope = measure @ (z * s) / np.sqrt(tau)
    bend = measure @ ((np.square(z) - 1) * s) / tau
    variance = measure @ np.square(s - mean)
    return max(0.0, float(variance - tau * slope**2)), float(slope**2), float(bend**2 / 4)


def gaussian_classes(
    num_examples: int,
    dim: int,
    num_classes: int = 4,
    separation: float = 3.0,
    spread: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A made mixture of Gaussian classes in turn, N(mu_a, v_a I).

    Args:
        num_examples, dim, num_classes: N, p, K.
        separation: length of each mean, drawn in a random direction.
        spread: v_a goes in equal steps from 1 - spread / sqrt(p) to 1 + spread / sqrt(p): with
            means alike, what no linear regression can see.
        seed: of the noise; the means are those of K and p.

    Returns:
        inputs `[N, p]` and class numbers `[N]`.
    """
    # Seeds of two numbers: other streams than those of projections, which would repeat the noise.
    means = np.random.RandomState([num_classes, dim]).standard_normal((num_classes, dim))
    means *= separation / np.linalg.norm(means, axis=1, keepdims=True)
    variances = 1 + spread / np.sqrt(dim) * np.linspace(-1, 1, num_classes)
    labels = np.arange(num_examples) % num_classes
    noise = np.random.RandomState([seed, 0]).standard_normal((num_examples, dim))
    return means[labels] + np.sqrt(variances[labels])[:, None] * noise, labels


def _matrix(values, name) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise EtfzooError(f"{name} must be a matrix with one row an example; got {values.shape}")
    if not np.isfinite(values).all():
        raise EtfzooError(f"{name} hold NaN or infinite numbers")
    return values


def _examples(inputs, labels) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = _matrix(inputs, "inputs"), np.asarray(labels)
    if labels.shape != (len(inputs),):
        raise EtfzooError(f"{len(inputs)} inputs, but labels of shape {labels.shape}")
    return inputs, labels


def _positive(regularization) -> float:
    if not 0 < regularization < np.inf:
        raise EtfzooError(f"the regularisation must be a positive number; got {regularization}")
    return regularization

"""How far the features of each class have collapsed onto their mean: NC1 to NC5, CDNV, tr(C)/p.

NC1 to NC4: Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep
learning training", PNAS 2020. Gram forms of NC2 and NC3: Zhu et al., "A geometric analysis of
neural collapse with unconstrained features", NeurIPS 2021. CDNV: Galanti, György and Hutter, "On
the role of neural collapse in transfer learning", ICLR 2022. NC5: Ammar et al., "NECO: neural
collapse based out-of-distribution detection", ICLR 2024.
"""

import logging

import numpy as np

from etfzoo.errors import EtfzooError, extra

with extra("train"):
    from scipy import linalg
    from scipy.linalg import blas, lapack

log = logging.getLogger("etfzoo")

# Numbers that are held in float64 at a time, 4 MB: 256 rows at p = 2048, enough for a fast product.
_CHUNK = 2**19
_PACKED = {"transr": "N", "uplo": "U"}


class NeuralCollapseStatistics:
    """Sums over features from which all collapse measures follow; one pass, exact, mergeable.

    Second moments are taken in float64 about a constant near the data (the mean of the first rows),
    so that neither float32 features nor features far from the origin cost digits; a float64 product
    of which only one triangle is computed takes no longer than a full float32 one. The state is
    two `[K, p]` sums and one packed triangle `[p, p]`: 50 MB at K = 1000, p = 2048.

    Args:
        num_classes: K.
        dim: p, the length of a feature.

    Attributes:
        count: examples of each class, int64 `[K]`.

    Examples:
        >>> import etfzoo, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat(np.arange(3), 100)
        >>> features = 10 * np.eye(3)[labels] + rng.normal(size=(300, 3))
        >>> seen = etfzoo.neural_collapse.NeuralCollapseStatistics(num_classes=3, dim=3)
        >>> seen.update(features[:150], labels[:150])
        >>> seen.update(features[150:], labels[150:])
        >>> round(seen.result()["nc1_ratio"], 2)
        0.04
    """

    def __init__(self, num_classes: int, dim: int):
        self.num_classes, self.dim = num_classes, dim
        self.count = np.zeros(num_classes, np.int64)
        self._shift: np.ndarray | None = None
        self._sums = np.zeros((num_classes, dim))  # of x - shift, by class
        self._squares = np.zeros(num_classes)  # of |x - shift|^2, by class
        self._moment = np.zeros(dim * (dim + 1) // 2)  # of (x - shift)(x - shift)^T, packed
        self._unit_sums = np.zeros((num_classes, dim))  # of x / |x|, by class
        self._unit_squares = np.zeros(num_classes)  # of |x / |x||^2: how many x are not 0

    def update(self, features, labels) -> None:
        """Adds examples.

        Args:
            features: `[B, p]`, any float type.
            labels: class numbers `[B]`.

        Raises:
            EtfzooError: other shapes, labels outside 0..K-1, or features that are not finite.
        """
        features, labels = np.asarray(features), np.asarray(labels)
        if (
            features.ndim != 2
            or features.shape[1] != self.dim
            or labels.shape != features.shape[:1]
        ):
            raise EtfzooError(
                f"features must be [B, {self.dim}] with labels [B]; got {features.shape} and "
                f"{labels.shape}"
            )
        if labels.size and not (0 <= labels.min() and labels.max() < self.num_classes):
            raise EtfzooError(
                f"labels must be 0 to {self.num_classes - 1}; got {labels.min()} to {labels.max()}"
            )
        for rows in self._chunks(labels):
            self._add(features[rows].astype(np.float64), labels[rows])

    def _chunks(self, rows):
        step = max(_CHUNK // self.dim, 1)
        return (slice(start, start + step) for start in range(0, len(rows), step))

    def _add(self, x, labels):
        lengths = np.sqrt(np.einsum("ij,ij->i", x, x))
        if not np.isfinite(lengths).all():
            raise EtfzooError("features are not finite: the model has diverged")
        # Row by row: sorting by class first needs copies and is no faster.
        for row, label, length in zip(x, labels, lengths, strict=True):
            if length > 0:
                self._unit_sums[label] += row / length
        self._unit_squares += np.bincount(labels, lengths > 0, minlength=self.num_classes)
        if self._shift is None:
            self._shift = x.mean(0)
        x -= self._shift
        for row, label in zip(x, labels, strict=True):
            self._sums[label] += row
        self.count += np.bincount(labels, minlength=self.num_classes)
        squares = np.einsum("ij,ij->i", x, x)
        self._squares += np.bincount(labels, squares, minlength=self.num_classes)
        self._add_product(x)

    def _add_product(self, x, scale=1.0):
        self._moment = lapack.dsfrk(
            self.dim, len(x), scale, x.T, 1.0, self._moment, overwrite_c=1, **_PACKED
        )

    def merge(self, other: "NeuralCollapseStatistics") -> None:
        """Adds the examples of other statistics, which stay as they are.

        Raises:
            EtfzooError: they are of another number of classes or features.
        """
        if (other.num_classes, other.dim) != (self.num_classes, self.dim):
            raise EtfzooError(
                f"statistics of {other.num_classes} classes and {other.dim} features cannot join "
                f"those of {self.num_classes} and {self.dim}"
            )
        if not other.count.any():
            return
        if self._shift is None:
            self._shift = other._shift
        # The other sums about this shift: x - shift = (x - other shift) + move.
        move, examples = other._shift - self._shift, other.count.sum()
        self._squares += other._squares + 2 * other._sums @ move + other.count * (move @ move)
        total = other._sums.sum(0)
        self._moment += other._moment
        self._add_product(total[None], -1 / examples)
        self._add_product((total + examples * move)[None], 1 / examples)
        self._sums += other._sums
        self._sums += np.outer(other.count, move)
        self.count += other.count
        self._unit_sums += other._unit_sums
        self._unit_squares += other._unit_squares

    @property
    def mean(self) -> np.ndarray:
        """The mean of all features, `[p]`."""
        return self._shift + self._sums.sum(0) / self.count.sum()

    def result(self, classifier=None, features=None, ood=None) -> dict:
        """The measures; all but `tr_c_over_p` are free of the features' scale.

        Below, m_k are the class means, n_k the counts, N their sum; S_W = sum_i (h_i - m)(h_i -
        m)^T / N with each h_i's own class mean, S_B = sum_k n_k/N (m_k - g)(m_k - g)^T with g the
        mean of all examples, so that S_W + S_B is the total covariance. c_k are the class means
        less their own (unweighted) mean, which is g where classes are balanced: a simplex keeps its
        angles when classes are not. Classes without examples are left out of all measures, and K is
        the number of the others.

        S_B of sampled means holds their noise too, and S_W lacks it, so that one and the same
        distribution gives other figures at 50 and at 500 examples a class. With Sigma_k the
        covariance of class k, w_k = n_k/N and counts that are given,

            E S_W = sum_k w_k (1 - 1/n_k) Sigma_k,
            E S_B = sum_k w_k (mu_k - mu)(mu_k - mu)^T + sum_k (1 - w_k) Sigma_k / N,
            E |m_i - m_j|^2 = |mu_i - mu_j|^2 + tr Sigma_i / n_i + tr Sigma_j / n_j.

        The `_unbiased` measures take Sigma_k with n_k - 1 and subtract these terms: compare sets of
        different size by them. Scatters and distances are then unbiased, their ratios to first
        order. The weights w_k stay those of the set: where the shares of the classes differ too,
        only `cdnv_unbiased`, which weighs all pairs alike, is of the same thing. A class with one
        example has no Sigma_k and is left out of them. NC1 has no such form: of S_B less its noise
        the small eigenvalues, which S_B^+ lives on, are of either sign; compare it on equally many
        examples a class (`etfzoo.measure.features.equal_nc1`). nc2_*, nc3 and nc5 are of the
        sampled means, whose noise shows in small classes.

        Args:
            classifier: weights `[K, p]` and biases `[K]` of the last layer; for nc3 and nc4.
            features: the batches `[B, p]` once more, for nc4: it asks each example for its nearest
                class mean, and those are known only after all examples were seen.
            ood: statistics of other data through the same network; for nc5.

        Returns:
            `examples`, `classes` (K), `skipped_classes` (without examples),
            `single_example_classes` (without a variance of their own: left out of cdnv and of the
            unbiased measures), and

            - `nc1`: tr(S_W S_B^+) / K, the pseudo-inverse cut at the rank of S_B, at most K - 1
              (Papyan et al., NC1);
            - `nc1_ratio`: tr S_W / tr S_B;
            - `cdnv`: mean over pairs of (v_i + v_j) / (2 |m_i - m_j|^2), with v_k the variance
              tr C_k of class k (Galanti et al., definition 1); not there where two means are equal;
            - `nc1_ratio_unbiased`, `cdnv_unbiased`, `tr_c_over_p_unbiased` and
              `tr_c_over_p_l2_unbiased`: see above; the first two are not there where noise alone
              explains the distance of the means (of a pair of them);
            - `nc2_norms`: deviation of the |c_k| over their mean (Papyan et al., NC2);
            - `nc2_angles`: mean over pairs of |cos(c_i, c_j) + 1/(K-1)| (the same);
            - `nc2_gram`: | G/|G| - P/sqrt(K-1) | in Frobenius norms, with G_ij = c_i . c_j and
              P = I - 11^T/K (Zhu et al., NC2, of the means);
            - `nc3`: | W/|W| - C/|C| |^2, with C the matrix of the c_k (Papyan et al., NC3);
            - `nc3_gram`: | W C^T/|W C^T| - P/sqrt(K-1) | (Zhu et al., NC3);
            - `nc4`: share of examples whose nearest class mean is not the class that W h + b
              chooses (Papyan et al., NC4);
            - `nc5`: mean |cos(m_k, mean of the other data)| (Ammar et al.);
            - `tr_c_over_p`: tr S_W / p, as in the paper's figure 3, and `tr_c_over_p_l2`: the same
              of h / |h|.

        Raises:
            EtfzooError: fewer than two classes have examples, all class means are equal, or a
                classifier of another shape.
        """
        seen = np.flatnonzero(self.count)
        if len(seen) < 2:
            raise EtfzooError(
                f"neural collapse needs examples of at least two classes; {len(seen)} of "
                f"{self.num_classes} have any"
            )
        if classifier is not None:
            classifier = self._check_classifier(*classifier)
        count = self.count[seen]
        means = self._sums[seen] / count[:, None]  # less the shift
        # Rounding may leave a perfectly collapsed class a trace below 0.
        scatter = np.maximum(self._squares[seen] - count * np.square(means).sum(1), 0)
        share = count / count.sum()
        weighted = np.sqrt(share)[:, None] * (means - share @ means)
        within, between = scatter.sum() / count.sum(), np.square(weighted).sum()
        # Rounding leaves a trace of scatter between equal means.
        size = (self._squares.sum() / count.sum()) + self._shift @ self._shift
        if between <= 1e-24 * size:
            raise EtfzooError("all class means are equal: there is no scatter between classes")
        unit_scatter = self._unit_squares[seen] - np.square(self._unit_sums[seen]).sum(1) / count
        unit_scatter = np.maximum(unit_scatter, 0)
        centred = means - means.mean(0)
        result = {
            "examples": int(count.sum()),
            "classes": len(seen),
            "skipped_classes": np.flatnonzero(self.count == 0).tolist(),
            "single_example_classes": seen[count == 1].tolist(),
            "nc1": self._nc1(weighted, means, share),
            "nc1_ratio": within / between,
            **_cdnv(centred, scatter, count),
            **_nc2(centred),
            **(_nc3(classifier[0][seen], centred) if classifier else {}),
            "tr_c_over_p": within / self.dim,
            "tr_c_over_p_l2": unit_scatter.sum() / count.sum() / self.dim,
            **_unbiased(means, scatter, unit_scatter, count),
        }
        if classifier is not None and features is not None:
            result["nc4"] = self._disagreement(classifier, means, seen, features)
        if ood is not None:
            result["nc5"] = float(np.abs(_cosines(means + self._shift, ood.mean[None])).mean())
        _warn_of_small_classes(result)
        return {k: float(v) if isinstance(v, np.floating) else v for k, v in result.items()}

    def _check_classifier(self, weights, bias):
        weights, bias = np.asarray(weights, np.float64), np.asarray(bias, np.float64)
        if weights.shape != (self.num_classes, self.dim) or bias.shape != (self.num_classes,):
            raise EtfzooError(
                f"a classifier of {self.num_classes} classes and {self.dim} features is needed; "
                f"got weights {weights.shape} and biases {bias.shape}"
            )
        return weights, bias

    def _nc1(self, weighted, means, share):
        """tr(S_W S_B^+) / K by eigenvectors of the smaller of M M^T and S_B = M^T M."""
        classes, dim = weighted.shape
        if classes <= dim:
            values, vectors = linalg.eigh(weighted @ weighted.T)
        else:
            values, vectors = linalg.eigh(weighted.T @ weighted)
        # S_B has rank K-1 at most, which rounding hides; less where means are dependent.
        kept = values > max(classes, dim) * np.finfo(float).eps * values[-1]
        kept[: max(len(values) - (classes - 1), 0)] = False
        values, vectors = values[kept], vectors[:, kept]
        if classes <= dim:
            vectors = weighted.T @ vectors / np.sqrt(values)
        moment, _ = lapack.dtfttr(dim, self._moment, **_PACKED)
        # S_W along each eigenvector: E x x^T less that of the class means.
        along = np.einsum("ij,ij->j", vectors, blas.dsymm(1.0, moment, vectors)) / self.count.sum()
        along -= share @ np.square(means @ vectors)
        return (np.maximum(along, 0) / values).sum() / classes

    def _disagreement(self, classifier, means, seen, features):
        weights, bias = classifier
        bias = bias + weights @ self._shift
        offset = np.square(means).sum(1) / 2
        wrong = examples = 0
        for batch in features:
            for rows in self._chunks(batch):
                x = np.asarray(batch[rows], np.float64) - self._shift
                nearest = seen[np.argmax(x @ means.T - offset, axis=1)]
                wrong += np.count_nonzero(nearest != np.argmax(x @ weights.T + bias, axis=1))
                examples += len(x)
        if examples != self.count.sum():
            raise EtfzooError(
                f"nc4 needs the {self.count.sum()} examples of the statistics; got {examples}"
            )
        return wrong / examples


def scalars(result: dict, prefix: str) -> dict[str, float]:
    """The measures of a result as a row of metrics, without the lists and counts.

    Args:
        result: see `NeuralCollapseStatistics.result`.
        prefix: what the names begin with, e.g. `"nc/test/"`.

    Examples:
        >>> import etfzoo
        >>> etfzoo.neural_collapse.scalars({"nc1": 0.5, "classes": 3}, "nc/test/")
        {'nc/test/nc1': 0.5}
    """
    return {prefix + name: value for name, value in result.items() if isinstance(value, float)}


def _cdnv(centred, scatter, count):
    several = count > 1
    centred, scatter, count = centred[several], scatter[several], count[several]
    if len(count) < 2:
        log.warning("cdnv is left out: fewer than two classes have several examples")
        return {}
    distance = _pairs(_squared_distances(centred))
    if distance.min() <= 1e-24 * distance.max():
        log.warning("cdnv is left out: two classes have the same mean")
        return {}

    def mean_over_pairs(variance, distance):
        return (_pairs(variance[:, None] + variance) / (2 * distance)).mean()

    result = {"cdnv": mean_over_pairs(scatter / count, distance)}
    variance = scatter / (count - 1)
    distance = distance - _pairs((variance / count)[:, None] + variance / count)
    if distance.min() <= 0:
        log.warning(
            "cdnv_unbiased is left out: with so few images of a class, the means of two classes "
            "differ no more than by chance"
        )
        return result
    return result | {"cdnv_unbiased": mean_over_pairs(variance, distance)}


def _unbiased(means, scatter, unit_scatter, count):
    several = count > 1
    means, count = means[several], count[several]
    if len(count) < 2:
        return {}
    variance, share = scatter[several] / (count - 1), count / count.sum()
    within, dim = share @ variance, means.shape[1]
    between = share @ np.square(means - share @ means).sum(1)
    between -= (1 - share) @ variance / count.sum()
    result = {
        "tr_c_over_p_unbiased": within / dim,
        "tr_c_over_p_l2_unbiased": share @ (unit_scatter[several] / (count - 1)) / dim,
    }
    if between <= 0:
        log.warning(
            "nc1_ratio_unbiased is left out: with so few images of a class, the means of the "
            "classes differ no more than by chance"
        )
        return result
    return {"nc1_ratio_unbiased": within / between} | result


def _nc2(centred):
    norms, simplex = np.sqrt(np.square(centred).sum(1)), _simplex_gram(len(centred))
    gram = centred @ centred.T
    cosines = _pairs(_cosines(centred, centred))
    return {
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": np.abs(cosines + 1 / (len(centred) - 1)).mean(),
        "nc2_gram": linalg.norm(gram / linalg.norm(gram) - simplex),
    }


def _nc3(weights, centred):
    product = weights @ centred.T
    if not linalg.norm(product):
        log.warning("nc3 is left out: the classifier is 0 or orthogonal to all class means")
        return {}
    difference = weights / linalg.norm(weights) - centred / linalg.norm(centred)
    simplex = _simplex_gram(len(centred))
    return {
        "nc3": np.square(difference).sum(),
        "nc3_gram": linalg.norm(product / linalg.norm(product) - simplex),
    }


def _simplex_gram(classes):
    """P / |P|, with P = I - 11^T/K."""
    return (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)


def _pairs(square):
    return square[np.triu_indices(len(square), 1)]


def _squared_distances(points):
    norms = np.square(points).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0)


def _cosines(a, b):
    """Cosines of all rows of `a` with all of `b`; those of a zero vector are 0."""

    def unit(x):
        norms = linalg.norm(x, axis=1, keepdims=True)
        return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)

    return unit(a) @ unit(b).T


def _warn_of_small_classes(result):
    for key, what in (
        ("skipped_classes", "no examples, left out of the collapse measures"),
        (
            "single_example_classes",
            "one example, so no variance of their own, left out of cdnv and unbiased measures",
        ),
    ):
        if classes := result[key]:
            more = f", … ({len(classes)} in all)" if len(classes) > 10 else ""
            log.warning("classes with %s: %s%s", what, ", ".join(map(str, classes[:10])), more)

"""Constant matrices of fixed classifiers, built in float64 NumPy.

NumPy rather than Keras initialisers, because those draw other numbers on each backend. Each frame
is an array `[K, p]` whose rows, one a class, have norm 1.
"""

import numpy as np
from threadpoolctl import threadpool_limits

from etfzoo.layers import codes


def haar_frame(rows: int, columns: int, seed: int) -> np.ndarray:
    """A matrix with orthonormal columns, Haar distributed.

    A QR factorisation of a Gaussian matrix is Haar only once the signs are fixed by the diagonal
    of R (Mezzadri 2007, "How to generate random matrices from the classical compact groups").

    Args:
        rows: number of rows, at least `columns`.
        columns: number of orthonormal columns.
        seed: seed of the Gaussian draw. `RandomState`'s stream is frozen by NumPy's policy, so
            the same seed gives the same matrix in every later release.

    Returns:
        float64 array `[rows, columns]`.
    """
    gaussian = np.random.RandomState(seed).standard_normal((rows, columns))
    q, r = np.linalg.qr(gaussian)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def helmert_basis(size: int) -> np.ndarray:
    """Orthonormal basis of the complement of the all-ones vector (Helmert contrasts).

    Returns:
        float64 array `[size, size - 1]` whose columns are orthonormal and sum to zero.
    """
    j = np.arange(1, size)
    basis = np.triu(np.ones((size, size - 1)))
    basis[j, j - 1] = -j
    return basis / np.sqrt(j * (j + 1.0))


def simplex_etf(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """The simplex equiangular tight frame W = sqrt(K/(K-1)) H R.

    H is the Helmert basis and R has Haar-distributed orthonormal rows. For p >= K it has the law
    of the usual sqrt(K/(K-1)) (I - 11^T/K) Q; unlike that formula it is exact at p = K-1 too.

    Args:
        num_classes: K >= 2.
        dim: feature dimension p >= K-1.
        seed: seed of the rotation R.

    Returns:
        float64 array `[K, p]`: rows of norm 1, with cosine -1/(K-1) between any two.

    Raises:
        ValueError: K < 2, or p < K-1, where no simplex ETF exists.
    """
    _check_classes(num_classes)
    if dim < num_classes - 1:
        raise ValueError(
            f"no simplex ETF of {num_classes} classes exists in {dim} dimensions (it needs at "
            f"least {num_classes - 1}): take `frame=softmax_code`, a backbone with wider features, "
            "a wider non-linear projector, or a trainable head"
        )
    return _simplex(num_classes, haar_frame(dim, num_classes - 1, seed))


def centred_etf(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """A simplex ETF whose rows are orthogonal to the all-ones vector of feature space.

    Features after a ReLU are not negative and share the direction of the all-ones vector; the
    logits of this frame do not see it.

    Args:
        num_classes: K >= 2.
        dim: feature dimension p >= K.
        seed: seed of the rotation within the complement of the all-ones vector.

    Returns:
        float64 array `[K, p]`, as `simplex_etf`; each row sums to zero.

    Raises:
        ValueError: K < 2, or p < K.
    """
    _check_classes(num_classes)
    _check_dim("centred ETF", num_classes, dim)
    return _simplex(num_classes, helmert_basis(dim) @ haar_frame(dim - 1, num_classes - 1, seed))


def orthogonal(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """Random orthonormal rows (Hoffer et al. 2018, "Fix your classifier").

    Args:
        num_classes: K >= 2.
        dim: feature dimension p >= K.
        seed: seed of the draw.

    Returns:
        float64 array `[K, p]`: rows of norm 1, with cosine 0 between any two.

    Raises:
        ValueError: K < 2, or p < K.
    """
    _check_classes(num_classes)
    _check_dim("orthogonal frame", num_classes, dim)
    return haar_frame(dim, num_classes, seed).T


def hadamard(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows of a Hadamard matrix, cut to p entries of +-1/sqrt(p) (Hoffer et al. 2018).

    Args:
        num_classes: K >= 2.
        dim: feature dimension p >= K. Where it is no power of two, the rows of Sylvester's matrix
            of the next one are cut, and they are orthogonal no longer: see `coherence`.
        seed: which rows and columns are taken, and which columns change their sign.

    Returns:
        float64 array `[K, p]`: rows of norm 1; orthogonal where p is a power of two.

    Raises:
        ValueError: K < 2, or p < K.
    """
    _check_classes(num_classes)
    _check_dim("Hadamard frame", num_classes, dim)
    order = 1 << (dim - 1).bit_length()
    random = np.random.RandomState(seed)
    rows, columns = (random.permutation(order)[:n] for n in (num_classes, dim))
    signs = random.choice([-1.0, 1.0], dim)
    sylvester = np.ones((1, 1))
    while len(sylvester) < order:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    return sylvester[np.ix_(rows, columns)] * signs / np.sqrt(dim)


def softmax_code(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors whose largest pairwise cosine is small, for any number of classes.

    The softmax code of Jiang et al. 2023, "Generalized neural collapse for a large number of
    classes": the fixed classifier where K > p+1 and no simplex exists. For p+1 < K <= 2p the
    largest cosine is 0, by K of the vectors +-e_i, rotated (Rankin 1955). For more classes no
    closed form is known, and `etfzoo.layers.codes.search` looks for them.

    Args:
        num_classes: K >= 2; at most p+1 gives `simplex_etf`.
        dim: feature dimension p >= 2.
        seed: of the rotation, or of the vectors that the search starts from.

    Returns:
        float64 array `[K, p]`, rows of norm 1. What is searched has the same bits on one kind of
        machine; another linear algebra library may lead the search to another code, as good.

    Raises:
        ValueError: K < 2, or more than two classes in one dimension.
    """
    if num_classes <= dim + 1:
        return simplex_etf(num_classes, dim, seed)
    if dim < 2:
        raise ValueError(f"{num_classes} classes need at least 2 dimensions; got {dim}")
    if num_classes <= 2 * dim:
        axes = np.concatenate([np.eye(dim), -np.eye(dim)])[:num_classes]
        return axes @ haar_frame(dim, dim, seed).T
    return codes.search(num_classes, dim, seed)


FRAMES = {
    "simplex_etf": simplex_etf,
    "centred_etf": centred_etf,
    "orthogonal": orthogonal,
    "hadamard": hadamard,
    "softmax_code": softmax_code,
}


def build(frame: str, num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """The frame of that name, `[K, p]`, the same bits on any number of cores.

    Raises:
        ValueError: a name that is no key of `FRAMES`, or a frame that does not exist.
    """
    if frame not in FRAMES:
        raise ValueError(f"frame must be one of {', '.join(FRAMES)}; got {frame!r}")
    # OpenBLAS's QR is many times slower when its threads wait for busy cores.
    with threadpool_limits(1, "blas"):
        return FRAMES[frame](num_classes, dim, seed)


def fits(frame: str, num_classes: int, dim: int) -> bool:
    """Whether `build` gives a frame of that name which is not that of another name.

    Args:
        frame: a key of `FRAMES`.
        num_classes: K >= 2.
        dim: feature dimension p >= 2.

    Returns:
        of `"simplex_etf"` whether p >= K-1; of `"softmax_code"`, which is the simplex there,
        whether p < K-1; of the others whether p >= K.
    """
    if frame in ("simplex_etf", "softmax_code"):
        return (dim >= num_classes - 1) == (frame == "simplex_etf")
    return dim >= num_classes


def nearest_etf(means: np.ndarray, frame: np.ndarray, proximity: float = 1e-3) -> np.ndarray:
    """The simplex ETF that is nearest to class means: a given one, turned to them.

    Of all `W R` with R orthogonal it is the one with the least

        |M - W R / sqrt(K)|^2 + proximity / 2 |(W R - W) sqrt((K-1) / K)|^2

    where M are the means less their mean, at norm 1, as `W / sqrt(K)` is. The second term, that of
    Markou et al., "Guiding neural collapse: optimising towards the nearest simplex equiangular
    tight frame" (NeurIPS 2024), keeps W where the means say nothing, e.g. of a class without
    examples. What they search on a manifold has a closed form, the orthogonal Procrustes problem
    (Schoenemann 1966): with the Helmert basis H, `W = sqrt(K/(K-1)) H X^T` for some X with
    orthonormal columns, and the new X is the orthonormal factor of the polar decomposition of
    `2/sqrt(K-1) M^T H + proximity X`.

    Args:
        means: `[K, p]`. What is added to all rows, or a factor, changes nothing.
        frame: W, a simplex ETF `[K, p]`.
        proximity: weight of the second term.

    Returns:
        float64 `[K, p]`, a simplex ETF but for rounding, the same bits on any number of cores.
    """
    classes = len(frame)
    basis = helmert_basis(classes)
    here = np.sqrt((classes - 1) / classes) * frame.T.astype(np.float64) @ basis
    centred = means - means.mean(0)
    size = np.linalg.norm(centred)
    if size > 0:
        centred = centred / size
    with threadpool_limits(1, "blas"):
        target = 2 / np.sqrt(classes - 1) * centred.T @ basis + proximity * here
        left, _, right = np.linalg.svd(target, full_matrices=False)
        return _simplex(classes, left @ right)


def is_simplex_etf(frame: np.ndarray, tolerance: float = 1e-3) -> bool:
    """Whether the norms of the rows are 1 and all their cosines -1/(K-1), within a tolerance."""
    frame = frame.astype(np.float64)
    if np.abs(np.linalg.norm(frame, axis=1) - 1).max() > tolerance:
        return False
    cosine = -1 / (len(frame) - 1)
    largest, size = coherence(frame)
    return largest <= cosine + tolerance and size <= -cosine + tolerance


def coherence(frame: np.ndarray, rows: int = 1024) -> tuple[float, float]:
    """The largest cosine between two rows of a frame, and the largest absolute one.

    Softmax tells classes apart by the first; the second is the coherence of frame theory, which
    `welch_bound` is about.

    Args:
        frame: `[K, p]`, rows of norm 1.
        rows: how many are compared with all at a time; memory is `8 rows K` bytes.
    """
    largest = size = -1.0
    for start in range(0, len(frame), rows):
        cosines = frame[start : start + rows] @ frame.T
        i = np.arange(len(cosines))
        cosines[i, start + i] = -1  # of a row with itself
        largest = max(largest, cosines.max())
        cosines[i, start + i] = 0
        size = max(size, np.abs(cosines).max())
    return float(largest), float(size)


def welch_bound(num_classes: int, dim: int) -> float:
    """Least possible coherence of K vectors in p dimensions, 0 for K <= p (Welch 1974).

    No bound on the largest cosine: that is -1/(K-1) for K <= p+1, 0 for K <= 2p, and more beyond
    (Rankin 1955).
    """
    excess = max(0, num_classes - dim)
    return float(np.sqrt(excess / (dim * (num_classes - 1))))


def _simplex(num_classes, rotation):
    """sqrt(K/(K-1)) H R for R^T with orthonormal columns."""
    scale = np.sqrt(num_classes / (num_classes - 1))
    return scale * helmert_basis(num_classes) @ rotation.T


def _check_classes(num_classes):
    if num_classes < 2:
        raise ValueError(
            f"a fixed classifier needs at least 2 classes, got num_classes={num_classes}: "
            "one class leaves nothing to tell apart"
        )


def _check_dim(what, num_classes, dim):
    if dim < num_classes:
        raise ValueError(
            f"no {what} of {num_classes} classes exists in {dim} dimensions (it needs at least "
            f"{num_classes}): take `frame=softmax_code`, a backbone with wider features, or "
            "a wider non-linear projector"
        )

"""Constant matrices of fixed classifiers, built in float64 NumPy.

NumPy rather than Keras initialisers, because those draw other numbers on each backend.
"""

import numpy as np
from threadpoolctl import threadpool_limits


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
    if num_classes < 2:
        raise ValueError(
            f"a simplex ETF needs at least 2 classes, got num_classes={num_classes}: "
            "one class leaves nothing to tell apart"
        )
    if dim < num_classes - 1:
        raise ValueError(
            f"no simplex ETF of {num_classes} classes exists in {dim} dimensions (it needs at "
            f"least {num_classes - 1}): take a backbone with wider features, put a non-linear "
            "neck before the classifier, or use a trainable head"
        )
    scale = np.sqrt(num_classes / (num_classes - 1))
    # One thread: the same bits on any number of cores, and OpenBLAS's QR is many times slower
    # when its threads wait for busy cores.
    with threadpool_limits(1, "blas"):
        rotation = haar_frame(dim, num_classes - 1, seed)
        return scale * helmert_basis(num_classes) @ rotation.T

"""Tests of the constant matrices."""

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from threadpoolctl import threadpool_limits

from etfzoo.layers import frames

SEEDS = 2000


def gram_schmidt(matrix):
    """The QR factor whose R has a positive diagonal, column by column."""
    columns = []
    for column in matrix.T:
        for _ in range(2):
            for done in columns:
                column = column - (done @ column) * done
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    "classes, dim",
    [(2, 1), (2, 64), (10, 9), (100, 99), (100, 512), (1000, 999), (1000, 2048)],
)
def test_gram_matrix_is_a_simplex(classes, dim):
    frame = frames.simplex_etf(classes, dim, seed=3)
    assert frame.shape == (classes, dim) and frame.dtype == np.float64
    wanted = np.eye(classes) * (classes / (classes - 1)) - 1 / (classes - 1)
    assert np.abs(frame @ frame.T - wanted).max() < 1e-12
    cast = frame.astype(np.float32).astype(np.float64)
    assert np.abs(cast @ cast.T - wanted).max() < 1e-6
    assert np.abs(frame.sum(0)).max() < 1e-11


@pytest.mark.parametrize("classes, dim", [(10, 8), (1000, 512), (3, 1)])
def test_no_simplex_in_too_few_dimensions(classes, dim):
    with pytest.raises(ValueError, match=f"{dim} dimensions .* least {classes - 1}.*softmax_code"):
        frames.simplex_etf(classes, dim)


@pytest.mark.parametrize("classes", [1, 0])
def test_one_class_is_refused(classes):
    with pytest.raises(ValueError, match=f"num_classes={classes}.*nothing to tell apart"):
        frames.simplex_etf(classes, 8)


@pytest.mark.parametrize("dim", [1, 7])
def test_two_classes_are_opposite_unit_vectors(dim):
    u, v = frames.simplex_etf(2, dim, seed=1)
    np.testing.assert_allclose(u, -v, atol=1e-15)
    np.testing.assert_allclose(u @ u, 1, atol=1e-14)


@pytest.mark.parametrize("size", [2, 3, 10, 500])
def test_helmert_basis(size):
    basis = frames.helmert_basis(size)
    assert basis.shape == (size, size - 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(size - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size) - 1 / size, atol=1e-12)


@pytest.mark.parametrize("rows, columns", [(5, 5), (9, 4), (1, 1)])
def test_haar_frame_is_the_orthonormalised_gaussian_draw(rows, columns):
    # The factor with a positive diagonal is unique, so this pins the matrix of a seed for ever.
    gaussian = np.random.RandomState(12).standard_normal((rows, columns))
    frame = frames.haar_frame(rows, columns, seed=12)
    np.testing.assert_allclose(frame, gram_schmidt(gaussian), atol=1e-12)


def test_simplex_is_helmert_times_haar():
    rotation = gram_schmidt(np.random.RandomState(4).standard_normal((7, 4)))
    wanted = np.sqrt(5 / 4) * frames.helmert_basis(5) @ rotation.T
    np.testing.assert_allclose(frames.simplex_etf(5, 7, seed=4), wanted, atol=1e-12)


def haar_deviations(draws):
    """Moments of `[seeds, p, p]` minus Haar's, in standard errors."""
    p = draws.shape[-1]
    trace = np.trace(draws, axis1=1, axis2=2)
    samples = {
        "entry": (draws, 0),
        "entry^2": (draws**2, 1 / p),
        "entry^4": (draws**4, 3 / (p * (p + 2))),
        "two entries, squared": (
            draws[:, 0, 0] ** 2 * draws[:, 1, 1] ** 2,
            (p + 1) / ((p - 1) * p * (p + 2)),
        ),
        "column sum^2": (draws.sum(1) ** 2, 1),
        "trace": (trace, 0),
        "trace^2": (trace**2, 1),
        "determinant": (np.linalg.det(draws), 0),
    }
    return {
        name: np.abs((x.mean(0) - wanted) / (x.std(0) / np.sqrt(len(x)))).max()
        for name, (x, wanted) in samples.items()
    }


def test_moments_are_those_of_haar():
    draws = np.stack([frames.haar_frame(4, 4, seed) for seed in range(SEEDS)])
    deviations = haar_deviations(draws)
    assert max(deviations.values()) < 4.5, deviations


def test_moments_would_notice_a_missing_sign_fix_and_uniform_entries():
    normal = [np.random.RandomState(s).standard_normal((4, 4)) for s in range(SEEDS)]
    uniform = [np.random.RandomState(s).uniform(size=(4, 4)) for s in range(SEEDS)]
    unfixed = haar_deviations(np.linalg.qr(np.stack(normal))[0])
    assert unfixed["entry"] > 20 and unfixed["trace"] > 20
    assert haar_deviations(np.stack([gram_schmidt(u) for u in uniform]))["column sum^2"] > 20


def test_seeds():
    first, again, other = (frames.simplex_etf(6, 8, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    frames.haar_frame(3, 3, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


SIZES = [(2, 2), (3, 3), (10, 10), (10, 16), (100, 128), (1000, 1024)]


@pytest.mark.parametrize("classes, dim", SIZES)
def test_centred_etf_does_not_see_the_direction_of_positive_features(classes, dim):
    frame = frames.build("centred_etf", classes, dim, seed=3)
    wanted = np.eye(classes) * (classes / (classes - 1)) - 1 / (classes - 1)
    assert np.abs(frame @ frame.T - wanted).max() < 1e-12
    assert np.abs(frame @ np.ones(dim)).max() < 1e-12 * dim
    assert np.abs(frames.build("simplex_etf", classes, dim, seed=3).sum(1)).max() > 0.1


@pytest.mark.parametrize("classes, dim", SIZES)
@pytest.mark.parametrize("name", ["orthogonal", "hadamard"])
def test_orthogonal_rows(name, classes, dim):
    if name == "hadamard" and dim & (dim - 1):
        pytest.skip("no power of two")
    frame = frames.build(name, classes, dim, seed=3)
    assert np.abs(frame @ frame.T - np.eye(classes)).max() < 1e-12
    assert frames.welch_bound(classes, dim) == 0
    if name == "hadamard":
        np.testing.assert_allclose(np.abs(frame), 1 / np.sqrt(dim), rtol=1e-12)


def test_a_cut_hadamard_matrix_says_how_far_it_is_from_orthogonal():
    frame = frames.hadamard(20, 24, seed=1)
    largest, size = frames.coherence(frame)
    cosines = frame @ frame.T - np.eye(20)
    assert 0 < size == np.abs(cosines).max() and largest == cosines.max()
    np.testing.assert_allclose(np.linalg.norm(frame, axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("name", frames.FRAMES)
def test_a_frame_is_drawn_from_its_seed(name):
    first, again, other = (frames.build(name, 6, 8, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (6, 8) and np.abs(first - other).max() > 0.01


@pytest.mark.parametrize("name", ["centred_etf", "orthogonal", "hadamard"])
def test_frames_that_need_as_many_dimensions_as_classes(name):
    with pytest.raises(ValueError, match="of 9 classes exists in 8 dimensions .*softmax_code"):
        frames.build(name, 9, 8)
    with pytest.raises(ValueError, match="nothing to tell apart"):
        frames.build(name, 1, 8)
    with pytest.raises(ValueError, match="frame must be one of simplex_etf, .*; got 'etf'"):
        frames.build("etf", 9, 8)


def test_coherence_is_the_same_in_pieces():
    frame = frames.build("softmax_code", 30, 8, seed=1)
    whole = frame @ frame.T - 3 * np.eye(30)
    for rows in (1, 7, 30, 100):
        largest, size = frames.coherence(frame, rows)
        np.testing.assert_allclose(largest, whole.max(), rtol=1e-12)
        np.testing.assert_allclose(size, np.abs(whole + 3 * np.eye(30) - np.eye(30)).max())


@pytest.mark.parametrize("classes, dim", [(7, 3), (16, 6), (28, 7), (1000, 128), (21841, 2048)])
def test_welch_bound(classes, dim):
    # Of tight frames the sum of all squared cosines is K^2/p, the least of all.
    mean_square = (classes**2 / dim - classes) / (classes * (classes - 1))
    np.testing.assert_allclose(frames.welch_bound(classes, dim), np.sqrt(mean_square), rtol=1e-12)


def test_welch_bound_is_met_by_an_equiangular_frame():
    # The 28 lines of R^7: permutations of (3, 3, -1, -1, -1, -1, -1, -1), orthogonal to 1.
    lines = np.full((28, 8), -1.0)
    lines[np.repeat(np.arange(28), 2), [i for a in range(8) for b in range(a) for i in (a, b)]] = 3
    lines = (lines / np.sqrt(24)) @ frames.helmert_basis(8)
    np.testing.assert_allclose(frames.coherence(lines)[1], frames.welch_bound(28, 7), rtol=1e-12)


@pytest.mark.parametrize("classes, dim", [(5, 4), (5, 5), (4, 8), (6, 4), (8, 4)])
@pytest.mark.parametrize("name", frames.FRAMES)
def test_what_fits_is_there_and_no_other_frame(name, classes, dim):
    def built(name):
        try:
            return frames.build(name, classes, dim)
        except ValueError:
            return None

    frame = built(name)
    other = name != "simplex_etf" and np.array_equal(frame, built("simplex_etf"))
    assert frames.fits(name, classes, dim) == (frame is not None and not other)


@pytest.mark.parametrize("classes, dim", [(2, 1), (2, 5), (7, 6), (7, 40), (30, 50)])
@pytest.mark.parametrize("proximity", [0.0, 1e-3, 5.0])
def test_the_nearest_etf_is_the_frame_turned_by_procrustes(classes, dim, proximity):
    rng = np.random.default_rng(0)
    frame, means = frames.simplex_etf(classes, dim, 3), rng.gamma(1, size=(classes, dim))
    found = frames.nearest_etf(means, frame, proximity)
    assert np.abs(found @ found.T - frame @ frame.T).max() < 1e-13
    centred = means - means.mean(0)
    centred /= np.sqrt((centred**2).sum())
    # |M - W'/sqrt(K)|^2 + proximity/2 |W' - W|^2 (K-1)/K, of which the norms are constant.
    target = 2 * centred / np.sqrt(classes) + proximity * (classes - 1) / classes * frame
    rotation, _ = orthogonal_procrustes(frame, target)
    np.testing.assert_allclose(found, frame @ rotation, atol=1e-12)

    def objective(turned):
        far = np.square(turned - frame).sum() * (classes - 1) / classes
        return np.square(centred - turned / np.sqrt(classes)).sum() + proximity / 2 * far

    for size in (0.01, 1.0):
        for _ in range(20):
            away, _ = np.linalg.qr(np.eye(dim) + size * rng.normal(size=(dim, dim)))
            assert objective(found @ away) >= objective(found) - 1e-12
    np.testing.assert_allclose(
        frames.nearest_etf(3 * means + rng.normal(size=dim), frame, proximity), found, atol=1e-11
    )


def test_where_the_means_say_nothing_the_frame_stays():
    frame = frames.simplex_etf(6, 9, 1)
    for means in (np.zeros((6, 9)), np.ones((6, 9)) * np.arange(9)):
        np.testing.assert_allclose(frames.nearest_etf(means, frame), frame, atol=1e-12)
    np.testing.assert_allclose(frames.nearest_etf(frame, frame), frame, atol=1e-12)
    # Two classes are known: the directions of the others are kept as far as they can be.
    means = np.zeros((6, 9))
    means[0], means[1] = np.eye(9)[0], -np.eye(9)[0]
    found = frames.nearest_etf(means, frame)
    between = (found[0] - found[1]) / np.linalg.norm(found[0] - found[1])
    assert between[0] > 1 - 1e-5
    others = np.linalg.norm(found[2:] - frame[2:], axis=1)
    assert others.max() < 1 and frames.is_simplex_etf(found, 1e-12)


def test_the_nearest_etf_has_the_same_bits_on_any_number_of_cores():
    frame, means = frames.simplex_etf(50, 300, 1), np.random.default_rng(0).normal(size=(50, 300))
    with threadpool_limits(1):
        alone = frames.nearest_etf(means, frame)
    np.testing.assert_array_equal(frames.nearest_etf(means, frame), alone)


def test_what_is_no_simplex():
    frame = frames.simplex_etf(5, 8, 2)
    turned = frame @ frames.haar_frame(8, 8, 4)
    assert frames.is_simplex_etf(turned, 1e-12) and frames.is_simplex_etf(turned.astype("float16"))
    assert frames.is_simplex_etf(frames.simplex_etf(2, 1), 1e-12)
    for other in (1.01 * frame, frames.orthogonal(5, 8), frame[[0, 1, 2, 3, 3]], -frame * 0,
                  frame + 0.01 * np.eye(5, 8)):  # fmt: skip
        assert not frames.is_simplex_etf(other)

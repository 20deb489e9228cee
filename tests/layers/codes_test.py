"""Tests of softmax codes: more classes than dimensions."""

import os

import numpy as np
import pytest

from etfzoo.layers import codes, frames


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frames"


def largest_cosine(frame):
    return (frame @ frame.T - 3 * np.eye(len(frame))).max()


@pytest.mark.parametrize("classes, dim", [(2, 1), (3, 2), (9, 8), (5, 8)])
def test_with_room_for_a_simplex_it_is_the_simplex(classes, dim, cache):
    code, simplex = (frames.build(n, classes, dim, 3) for n in ("softmax_code", "simplex_etf"))
    np.testing.assert_array_equal(code, simplex)
    assert not cache.exists()


@pytest.mark.parametrize("classes, dim", [(4, 2), (10, 8), (16, 8), (1000, 512), (1000, 500)])
def test_up_to_twice_the_dimensions_no_cosine_is_positive(classes, dim):
    frame = frames.build("softmax_code", classes, dim, seed=3)
    assert frame.shape == (classes, dim)
    assert abs(largest_cosine(frame)) < 1e-12  # Rankin: 0 is the least for more than p+1 vectors
    np.testing.assert_allclose(np.linalg.norm(frame, axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("classes", [5, 6, 9, 12])
def test_on_a_circle_the_search_finds_the_regular_polygon(classes):
    frame = frames.build("softmax_code", classes, 2, seed=1)
    assert largest_cosine(frame) == pytest.approx(np.cos(2 * np.pi / classes), abs=2e-3)


# Best known packings of points on spheres (Sloane's tables), as angles in degrees.
@pytest.mark.parametrize(
    "classes, dim, degrees", [(12, 3, 63.4349), (24, 4, 60.0), (20, 3, 47.4310)]
)
def test_best_known_packings(classes, dim, degrees):
    found = max(
        np.degrees(np.arccos(largest_cosine(frames.build("softmax_code", classes, dim, seed))))
        for seed in range(3)
    )
    assert degrees - 1.5 < found < degrees + 1e-3


@pytest.mark.parametrize("classes, dim, limit", [(100, 10, 0.345), (500, 64, 0.115)])
def test_wide_codes(classes, dim, limit):
    """Far better than random vectors, and near or below the Welch bound (of absolute cosines)."""
    frame = frames.build("softmax_code", classes, dim, seed=3)
    random = codes.unit_rows(np.random.RandomState(3).standard_normal((classes, dim)))
    assert largest_cosine(frame) < limit < 0.7 * largest_cosine(random)
    assert limit < 1.15 * frames.welch_bound(classes, dim)
    np.testing.assert_allclose(np.linalg.norm(frame, axis=1), 1, rtol=1e-12)
    # No class is favoured: the vectors add up to little.
    assert np.linalg.norm(frame.mean(0)) < 0.05


def test_a_search_that_was_stopped_goes_on_bit_for_bit(monkeypatch, cache):
    whole = codes.search(40, 6, seed=2)
    (path,) = cache.iterdir()
    assert path.name == "softmax_code_40_6_2.npz"
    path.unlink()

    class Stopped(Exception):
        pass

    advance = codes._State.advance

    def stopping(self, steps):
        if self.step == 900:
            raise Stopped
        advance(self, steps)

    monkeypatch.setattr(codes, "_KEEP_EVERY", 0.0)
    monkeypatch.setattr(codes._State, "advance", stopping)
    with pytest.raises(Stopped):
        codes.search(40, 6, seed=2)
    assert np.load(path)["step"] == 900
    done = []
    monkeypatch.setattr(codes._State, "advance", lambda self, n: (advance(self, n), done.append(1)))
    np.testing.assert_array_equal(codes.search(40, 6, seed=2), whole)
    assert len(done) == 2000 - 900
    done.clear()
    np.testing.assert_array_equal(codes.search(40, 6, seed=2), whole)
    assert done == []  # from the cache


@pytest.mark.parametrize("kind", ["empty", "half", "nan", "long", "other", "float64"])
def test_a_damaged_state_is_made_again(kind, cache):
    whole = codes.search(30, 5, seed=1)
    (path,) = cache.iterdir()
    arrays = dict(np.load(path))
    if kind in ("empty", "half"):
        path.write_bytes(path.read_bytes()[: 0 if kind == "empty" else 900])
    else:
        best = arrays["best"].copy()
        if kind == "nan":
            best[3] = np.nan
        elif kind == "long":
            best[3] *= 2
        elif kind == "other":
            best = best[:, :4]
        else:
            best = best.astype(np.float64)
        np.savez(path, **(arrays | {"best": best}))
    np.testing.assert_array_equal(codes.search(30, 5, seed=1), whole)


def test_nothing_is_written_through_a_link(cache, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    cache.parent.mkdir()
    os.symlink(outside, cache)
    frame = codes.search(30, 5, seed=1)
    assert list(outside.iterdir()) == [] and frame.shape == (30, 5)


def test_too_many_classes_on_a_line():
    with pytest.raises(ValueError, match="3 classes need at least 2 dimensions; got 1"):
        frames.build("softmax_code", 3, 1)

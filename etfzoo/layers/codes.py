"""Unit vectors that are as far apart as can be found, where no closed form is known."""

import contextlib
import time

import numpy as np
from threadpoolctl import threadpool_limits

from etfzoo import arrays, files
from etfzoo.errors import EtfzooError
from etfzoo.progress import Progress

_ROWS = 1024  # compared with all others at a time
_MOMENTUM = 0.9
_SHARPNESS = 5.0, 4000.0  # of the softmax, from the first step to the last
_KEEP_EVERY = 60.0  # seconds
_LONG = 1e11  # multiplications, some seconds: above, all cores help and the progress is shown


def search(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors with a small largest cosine, for K > 2p.

    Each vector is pushed away from its neighbours: gradient steps with momentum on the softmax of
    the cosines of each row, which becomes sharper from step to step; of all steps the one with the
    smallest largest cosine counts. Memory is about `24 p K + 8192 K` bytes.

    What is found is kept in the folder `frames` of the cache (`ETFZOO_HOME`), and so is the state
    of a long search, once a minute: it goes on there after it was stopped.

    Args:
        num_classes: K.
        dim: feature dimension p.
        seed: of the vectors at the start.

    Returns:
        float64 array `[K, p]`, rows of norm 1.
    """
    steps = int(np.clip(3e5 / num_classes, 100, 2000))
    path = files.cache_home() / "frames" / f"softmax_code_{num_classes}_{dim}_{seed}.npz"
    state = _State.read(path, num_classes, dim) or _State.start(num_classes, dim, seed)
    work = 2.0 * num_classes**2 * dim * (steps - state.step)
    progress = Progress(f"softmax code of {num_classes} classes", steps, quiet=work < _LONG)
    kept = time.monotonic()
    with contextlib.ExitStack() as stack:
        if work < _LONG:
            stack.enter_context(threadpool_limits(1, "blas"))
        while state.step < steps:
            state.advance(steps)
            progress.update(state.step, lambda: {"largest_cosine": state.largest})
            if state.step == steps or time.monotonic() - kept > _KEEP_EVERY:
                state.write(path)
                kept = time.monotonic()
    return unit_rows(state.best.astype(np.float64))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """The rows at norm 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class _State:
    """A search after `step` steps: float32 vectors, their velocities, and the best of before."""

    def __init__(self, step, vectors, velocities, best, largest):
        self.step, self.vectors, self.velocities = int(step), vectors, velocities
        self.best, self.largest = best, float(largest)

    @classmethod
    def start(cls, num_classes, dim, seed):
        draw = np.random.RandomState(seed).standard_normal((num_classes, dim))
        vectors = unit_rows(draw).astype(np.float32)
        return cls(0, vectors, np.zeros_like(vectors), vectors, np.inf)

    @classmethod
    def read(cls, path, num_classes, dim):
        """What `write` has left; None where there is nothing of use."""
        if _linked(path):
            return None
        try:
            found = arrays.read_npz(path, ("step", "vectors", "velocities", "best", "largest"))
        except EtfzooError:
            return None
        tables = [found[name] for name in ("vectors", "velocities", "best")]
        if not all(t.shape == (num_classes, dim) and t.dtype == np.float32 for t in tables):
            return None
        if found["step"].shape or found["largest"].shape or not np.isfinite(tables).all():
            return None
        off = max(np.abs(np.linalg.norm(t, axis=1) - 1).max() for t in (tables[0], tables[2]))
        return cls(found["step"], *tables, found["largest"]) if off < 1e-3 else None

    def write(self, path):
        if _linked(path):
            return
        with contextlib.suppress(EtfzooError):  # a full disk costs the search its memory only
            files.make_directory(path.parent)
            with files.atomic(path, follow=False) as file:
                np.savez(file, **vars(self))

    def advance(self, steps):
        """One step; the cosines that it needs tell how good the vectors before it were."""
        low, high = _SHARPNESS
        sharpness = np.float32(low * (high / low) ** (self.step / steps))
        before, largest = self.vectors, -1.0
        push = np.empty_like(before)
        for start in range(0, len(before), _ROWS):
            rows = slice(start, start + _ROWS)
            cosines = before[rows] @ before.T
            i = np.arange(len(cosines))
            cosines[i, start + i] = -2  # a vector does not flee from itself
            nearest = cosines.max(1, keepdims=True)
            largest = max(largest, float(nearest.max()))
            weights = np.exp(sharpness * (cosines - nearest))
            push[rows] = weights @ before / weights.sum(1, keepdims=True)
        push = _tangent(push, before)
        # Of length 1 in the mean, however many neighbours share a push.
        push /= np.sqrt(np.mean(np.sum(push**2, axis=1))) * sharpness
        velocities = _tangent(np.float32(_MOMENTUM) * self.velocities - push, before)
        if largest < self.largest:
            self.best, self.largest = before, largest
        self.vectors, self.velocities = unit_rows(before + velocities), velocities
        self.step += 1


def _tangent(directions, vectors):
    """Directions without their part along the vectors."""
    return directions - np.sum(directions * vectors, 1, keepdims=True) * vectors


def _linked(path) -> bool:
    """Whether somebody with whom the cache is shared leads out of it."""
    return path.is_symlink() or path.parent.is_symlink()

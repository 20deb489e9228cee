"""Whether a classifier is as certain as it is right."""

from typing import NamedTuple

import numpy as np

from etfzoo.errors import EtfzooError

BINS = 15


class Reliability(NamedTuple):
    """Examples by how certain the classifier was of its choice; of each bin `[bins]`.

    Attributes:
        edges: of the bins, `[bins + 1]`; a bin is open at its left and closed at its right.
        examples: how many.
        confidence: mean confidence; NaN without examples.
        accuracy: share that is right; NaN without examples.
    """

    edges: np.ndarray
    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: `|accuracy - confidence|`, averaged over all examples."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.examples * gaps) / self.examples.sum())


def reliability(confidence, right, bins: int = BINS) -> Reliability:
    """Confidence and accuracy in bins of equal width over `[0, 1]`.

    Source: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017,
    which takes 15 bins.

    Args:
        confidence: probability of the predicted class, `[N]`.
        right: whether it is the true one, `[N]`.
        bins: number of bins.

    Raises:
        EtfzooError: no example, or values that are no probabilities.

    Examples:
        Nine of ten are right where 80 % was expected:

        >>> from etfzoo.measure import calibration
        >>> found = calibration.reliability([0.8] * 10, [True] * 9 + [False])
        >>> round(found.error, 3)
        0.1
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if len(confidence) == 0:
        raise EtfzooError("calibration needs at least one example")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise EtfzooError("confidences must be probabilities")
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.searchsorted(edges, confidence) - 1, 0, bins - 1)
    count = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = (np.bincount(places, v, bins) / count for v in (confidence, right))
        return Reliability(edges, count, *means)

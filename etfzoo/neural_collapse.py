"""How far the features of each class have collapsed onto their mean."""

import numpy as np


def scatter_ratio(features, labels) -> float:
    """tr S_W / tr S_B: variance within classes over variance between their means.

    Free of the features' scale; 0 at perfect collapse (Papyan et al. 2020, NC1, without the
    pseudo-inverse).

    Args:
        features: `[N, p]`.
        labels: class numbers `[N]`; classes that do not occur are left out.

    Raises:
        ValueError: fewer than two classes, or all class means equal.
    """
    features = np.asarray(features, np.float64)
    _, labels = np.unique(labels, return_inverse=True)
    count = np.bincount(labels)
    if len(count) < 2:
        raise ValueError("the scatter ratio needs examples of at least two classes")
    means = np.zeros((len(count), features.shape[1]))
    np.add.at(means, labels, features)
    means /= count[:, None]
    overall = features.mean(0)
    within = np.square(features - means[labels]).sum() / len(labels)
    between = (count[:, None] * np.square(means - overall)).sum() / len(labels)
    # Rounding leaves a trace of scatter between equal means.
    if between <= 1e-24 * np.square(features).sum() / len(labels):
        raise ValueError("all class means are equal: there is no scatter between classes")
    return float(within / between)

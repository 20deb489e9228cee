"""Training losses and the rule of which weights are decayed.

A loss is a function `(labels, logits) -> losses [N]`. Labels are class numbers `[N]`, or targets
`[N, K]`, each example's shares of the classes; of a target the loss is the mean of the losses of
its classes by their shares, and so is what a class weighs. Losses have the logits' dtype, float32
for logits of 16 bits.
"""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from etfzoo.layers.etf_classifier import full_precision


def cross_entropy(
    labels, logits, label_smoothing: float = 0.0, class_weights=None, adjustment=None
):
    """Softmax cross-entropy of each example.

    Args:
        labels: class numbers `[N]`, or targets `[N, K]`, each example's shares of the classes.
        logits: `[N, K]`.
        label_smoothing: share of the target that is spread evenly over all K classes (Szegedy et
            al. 2016, section 7).
        class_weights: array `[K]`, what losses of each class are multiplied by; None is 1.
        adjustment: array `[K]` that is added to the logits, see `logit_adjustment`; None is 0.

    Returns:
        losses `[N]` in the logits' dtype, float32 for logits of 16 bits.
    """
    target, logits = _weighted(labels, logits, class_weights)
    if adjustment is not None:
        logits = logits + ops.convert_to_tensor(adjustment, dtype=logits.dtype)
    if label_smoothing:
        spread = label_smoothing / logits.shape[-1]
        if class_weights is not None:  # of the class, not of those that the share is spread over
            spread = spread * ops.sum(target, axis=-1, keepdims=True)
        target = (1 - label_smoothing) * target + spread
    return -ops.sum(target * ops.log_softmax(logits, axis=-1), axis=-1)


def dot_regression(labels, logits, scale: float, class_weights=None):
    """Half of the squared distance from 1 of the cosine between feature and row of the class.

    It is the dot-regression loss of Yang et al., "Inducing neural collapse in imbalanced learning:
    do we really need a learnable classifier at the end of deep neural network?" (NeurIPS 2022),
    `(w_y h - r)^2 / (2 r)` with `r = sqrt(E_W E_H)`, for features and rows of length 1 (`r = 1`).
    Another r would be a factor r on the loss. Cosines with the rows of other classes do not count.

    Args:
        labels: class numbers `[N]`, or targets `[N, K]`, each example's shares of the classes.
        logits: `[N, K]`, cosines times `scale`.
        scale: factor on the logits of the head.
        class_weights: array `[K]`, what losses of each class are multiplied by; None is 1.

    Returns:
        losses `[N]` in the logits' dtype, float32 for logits of 16 bits.
    """
    target, logits = _weighted(labels, logits, class_weights)
    return ops.sum(target * ops.square(logits / scale - 1), axis=-1) / 2


def squared_error(labels, logits, class_weights=None):
    """Mean over the classes of the squared difference of logits and one-hot label.

    It is the loss of Hui and Belkin, "Evaluation of neural architectures trained with square loss
    vs cross-entropy in classification tasks" (ICLR 2021), `((f_y - 1)^2 + sum_j!=y f_j^2) / K`,
    without what they rescale it by for many classes (their k and M are 1).

    Args:
        labels: class numbers `[N]`, or targets `[N, K]`, each example's shares of the classes.
        logits: `[N, K]`, f.
        class_weights: array `[K]`, what losses of each class are multiplied by; None is 1.

    Returns:
        losses `[N]` in the logits' dtype, float32 for logits of 16 bits.
    """
    target, logits = _weighted(labels, logits, class_weights)
    others = ops.sum(target, axis=-1, keepdims=True) - target
    squares = target * ops.square(logits - 1) + others * ops.square(logits)
    return ops.mean(squares, axis=-1)


def crowding(features, others=None, first=0):
    """Minus the logarithm of each feature's distance to its nearest neighbour, at unit length.

    Its mean is, but for constants, minus the entropy of the features by the estimator of Kozachenko
    and Leonenko (1987). As a regulariser of the features it is that of Harun et al., "Controlling
    neural collapse enhances out-of-distribution detection and transfer learning" (ICML 2025):
    `-log |u_i - u_j|` with `u = h / |h|` and j the nearest to i in the batch. Gradients are of both
    ends of the distance.

    Args:
        features: `[N, p]`, N >= 2.
        others: the features at unit length among which the neighbours are, `[M, p]`; None is these.
        first: where the features stand among the others, so that none is its own neighbour.

    Returns:
        `[N]` in the dtype of the features, float32 for features of 16 bits. Distances count as 1e-6
        at least, and what is nearer has no gradient: the direction of it would be one of rounding.
    """
    units = unit_length(features)
    others = units if others is None else others
    size = ops.shape(units)[0]
    itself = ops.one_hot(first + ops.arange(size), ops.shape(others)[0], dtype=units.dtype)
    nearest = ops.argmax(ops.matmul(units, ops.transpose(others)) - 4 * itself, axis=-1)
    squares = ops.sum(ops.square(units - ops.take(others, nearest, axis=0)), axis=-1)
    return -ops.log(ops.maximum(squares, 1e-12)) / 2


def unit_length(features):
    """Features `[N, p]` at length 1, in full precision."""
    dtype = full_precision(keras.backend.standardize_dtype(features.dtype))
    return ops.normalize(ops.cast(features, dtype), axis=-1, order=2)


LOSSES: dict[str, Callable] = {
    "cross_entropy": cross_entropy,
    "dot_regression": dot_regression,
    "squared_error": squared_error,
}


def _weighted(labels, logits, class_weights):
    """Each example's shares of the classes times their weights, and logits, in full precision."""
    logits = ops.cast(logits, full_precision(keras.backend.standardize_dtype(logits.dtype)))
    if len(labels.shape) == 2:
        target = ops.cast(labels, logits.dtype)
    else:
        target = ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    if class_weights is not None:
        target = target * ops.convert_to_tensor(class_weights, dtype=logits.dtype)
    return target, logits


def logit_adjustment(counts, tau: float) -> np.ndarray:
    """What logit adjustment adds to the logits in training: `tau log(prior)`.

    Source: the logit-adjusted softmax cross-entropy of Menon et al., "Long-tail learning via logit
    adjustment" (ICLR 2021).

    Args:
        counts: examples of each class in the training split, `[K]`. A class without any counts as
            one example, so that its logit is pushed down as that of the rarest.
        tau: how much; 1 is consistent for the mean per-class error.

    Returns:
        float64 `[K]`.
    """
    counts = np.maximum(counts, 1)
    return tau * np.log(counts / counts.sum())


def balanced_weights(counts, beta: float) -> np.ndarray:
    """Weights of the classes by their effective numbers of examples, `(1 - beta) / (1 - beta^n)`.

    Source: Cui et al., "Class-balanced loss based on effective number of samples" (CVPR 2019).
    They scale the weights to a mean of 1 over the classes; here it is 1 over the examples, so that
    the learning rate keeps its meaning.

    Args:
        counts: examples of each class in the training split, `[K]`. A class without any counts as
            one example; no loss is weighed by it.
        beta: from 0, where all classes weigh the same, to 1, where they weigh 1/n: the limit, and
            the weights that scikit-learn's `compute_class_weight` calls balanced.

    Returns:
        float64 `[K]`, whose mean over the examples of the training split is 1.
    """
    counted = np.maximum(counts, 1.0)
    weights = 1 / (counted if beta == 1 else 1 - beta**counted)
    return weights / np.average(weights, weights=counts)


def label_classes(labels):
    """Class numbers `[N]` of labels as in `cross_entropy`: of a target the one with most of it."""
    return ops.argmax(labels, axis=-1) if len(labels.shape) == 2 else labels


def confidence(logits):
    """Probability of the most likely class, `[B]`, of logits `[B, K]`."""
    return ops.max(ops.softmax(logits, axis=-1), axis=-1)


def decayed(variable: keras.Variable, everything: bool = False) -> bool:
    """Whether L2 applies: to kernels only, or to everything that is trained.

    The rest are biases, gamma, beta and the logits of SwitchableWhitening; a fixed ETF is not
    trained.

    A rule on names rather than a setting of the optimizer, because Keras's
    `exclude_from_weight_decay` does not survive saving.
    """
    return variable.trainable and (everything or variable.path.endswith("kernel"))

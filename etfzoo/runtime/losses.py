"""Training losses and the rule of which weights are decayed."""

import keras
from keras import ops


def cross_entropy(labels, logits, label_smoothing: float = 0.0):
    """Softmax cross-entropy of each example.

    Args:
        labels: class numbers `[N]`, or targets `[N, K]`, each example's shares of the classes.
        logits: `[N, K]`.
        label_smoothing: share of the target that is spread evenly over all K classes (Szegedy et
            al. 2016, section 7).

    Returns:
        losses `[N]` in the logits' dtype.
    """
    classes = logits.shape[-1]
    if len(labels.shape) == 2:
        target = ops.cast(labels, logits.dtype)
    else:
        target = ops.one_hot(labels, classes, dtype=logits.dtype)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / classes
    return -ops.sum(target * ops.log_softmax(logits, axis=-1), axis=-1)


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
    return variable.trainable and (everything or variable.path.rsplit("/", 1)[-1] == "kernel")

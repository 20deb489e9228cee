"""Callbacks for Keras's own `fit`; the recipes have a training loop of their own."""

from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np

from etfzoo.errors import EtfzooError, first_line
from etfzoo.measure import features, neural_collapse
from etfzoo.models.classifier import ImageClassifier

_INFINITE = -1  # tf.data.INFINITE_CARDINALITY


class NeuralCollapse(keras.callbacks.Callback):
    """Measures neural collapse while an ImageClassifier is trained with `fit`.

    Adds `nc/<name>/<measure>` (see
    `etfzoo.measure.neural_collapse.NeuralCollapseStatistics.result`) to the
    logs of every n-th epoch and of the last one, so that the history and the callbacks that come
    after it see them:

        measures = NeuralCollapse({"train": train, "test": test}, every=5)
        model.fit(train, epochs=50, callbacks=[measures, keras.callbacks.TensorBoard("logs")])

    It measures the pooled features. Behind a projector the head acts on something else, so that
    nc3 and nc4 are left out there.

    Args:
        data: data sets by name. Each can be iterated over again and again and gives batches
            `(images [B, H, W, 3], labels)`, or `(images, labels, weights [B])`, as a finite
            `tf.data.Dataset` does; the images as evaluation sees them, without augmentation.
            Labels are class numbers, `[B]` or `[B, 1]`, or one-hot, `[B, K]`. Images of weight 0
            are left out, and all others count alike.
        every: epochs between measures; each takes a pass over the data, in inference mode.

    Raises:
        EtfzooError: `every` below 1; when training starts, a model that is no ImageClassifier with
            a head, or data that it cannot measure.
    """

    def __init__(self, data: Mapping[str, Iterable], every: int = 1):
        super().__init__()
        if every < 1:
            raise EtfzooError(f"every must be at least 1; got {every}")
        self.data = dict(data)
        self.every = every

    def on_train_begin(self, logs=None):
        if not isinstance(self.model, ImageClassifier) or self.model.spec.head is None:
            raise EtfzooError(
                "NeuralCollapse needs an etfzoo.ImageClassifier with a head; got "
                f"{type(self.model).__name__} {self.model.name!r}"
            )
        self._backbone = keras.Model(self.model.input, self.model.taps["features"])
        for name, batches in self.data.items():  # not after an epoch that took hours
            self._unpacked(_first(name, batches), name)

    def on_epoch_end(self, epoch, logs=None):
        last = epoch + 1 == self.params["epochs"]
        if logs is None or not (last or (epoch + 1) % self.every == 0):
            return
        classifier = None
        if self.model.spec.penultimate == "features":
            classifier = features.linear_head(self.model)
        for name, batches in self.data.items():
            found = features.in_temporary_file(self._features(batch, name) for batch in batches)
            measured = features.collapse(found, self.model.spec.num_classes, classifier)
            logs |= neural_collapse.scalars(measured, f"nc/{name}/")

    def _features(self, batch, name):
        images, labels, counts = self._unpacked(batch, name)
        return self._backbone.predict_on_batch(images)[counts], labels[counts]

    def _unpacked(self, batch, name):
        """Images, class numbers `[B]`, and which of them count `[B]`."""
        k = self.model.spec.num_classes
        try:
            images, labels, weights = keras.utils.unpack_x_y_sample_weight(batch)
        except ValueError as error:
            raise EtfzooError(f"data set {name!r}: {first_line(error)}") from error
        if labels is None:
            raise EtfzooError(f"data set {name!r} gives no labels beside the images")
        labels = np.asarray(labels)
        if labels.ndim == 2 and labels.shape[1] == k and k > 1:
            if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
                raise EtfzooError(
                    f"data set {name!r} has soft labels, whose images belong to no class: leave "
                    "out what mixes or smooths them"
                )
            labels = labels.argmax(1)
        elif labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        whole = labels.ndim == 1 and labels.dtype.kind in "biuf" and (labels % 1 == 0).all()
        if not whole or not ((0 <= labels) & (labels < k)).all():
            raise EtfzooError(
                f"labels of data set {name!r} must be class numbers from 0 to {k - 1}, [B] or "
                f"[B, 1], or one-hot, [B, {k}]; got {labels.dtype} {list(labels.shape)}"
            )
        counts = np.ones(len(labels), bool) if weights is None else np.ravel(weights) > 0
        return images, labels.astype(np.int64), counts


def _first(name, batches):
    """The first batch of data that can be read again, and has an end."""
    if isinstance(batches, Iterator):
        raise EtfzooError(
            f"data set {name!r} can be read only once; give a list of its batches, or a "
            "tf.data.Dataset"
        )
    cardinality = getattr(batches, "cardinality", None)
    if cardinality is not None and int(cardinality()) == _INFINITE:
        raise EtfzooError(f"data set {name!r} has no end; leave out repeat()")
    for batch in batches:
        return batch
    raise EtfzooError(f"data set {name!r} is empty")

"""Callbacks for Keras's own `fit`; the recipes have a training loop of their own."""

from collections.abc import Iterable, Mapping

import keras
import numpy as np

from etfzoo.errors import EtfzooError
from etfzoo.measure import features, neural_collapse
from etfzoo.models.classifier import ImageClassifier


class NeuralCollapse(keras.callbacks.Callback):
    """Measures neural collapse while an ImageClassifier is trained with `fit`.

    Adds `nc/<name>/<measure>` (see
    `etfzoo.measure.neural_collapse.NeuralCollapseStatistics.result`) to the
    logs of every n-th epoch and of the last one, so that the history and the callbacks that come
    after it see them:

        measures = NeuralCollapse({"train": train, "test": test}, every=5)
        model.fit(train, epochs=50, callbacks=[measures, keras.callbacks.TensorBoard("logs")])

    Args:
        data: data sets by name. Each can be iterated over again and again and gives batches
            `(images [B, H, W, 3], labels [B])`, as a finite `tf.data.Dataset` does; the images as
            evaluation sees them, without augmentation.
        every: epochs between measures; each takes a pass over the data, in inference mode.

    Raises:
        EtfzooError: `every` below 1; when training starts, a model that is no ImageClassifier with
            a head.
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

    def on_epoch_end(self, epoch, logs=None):
        last = epoch + 1 == self.params["epochs"]
        if logs is None or not (last or (epoch + 1) % self.every == 0):
            return
        classifier = features.linear_head(self.model)
        for name, batches in self.data.items():
            found = features.in_temporary_file(map(self._features, batches))
            measured = features.collapse(found, self.model.spec.num_classes, classifier)
            logs |= neural_collapse.scalars(measured, f"nc/{name}/")

    def _features(self, batch):
        images, labels = batch
        return self._backbone.predict_on_batch(images), np.asarray(labels)

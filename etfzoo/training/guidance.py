"""A simplex ETF that follows the features: turned to their class means as an epoch begins.

Source: Markou et al., "Guiding neural collapse: optimising towards the nearest simplex equiangular
tight frame", NeurIPS 2024. What differs from that, and why: docs/layers.md.
"""

import zlib

import numpy as np

from etfzoo.errors import TrainingDiverged
from etfzoo.layers import frames
from etfzoo.measure.features import Extractor
from etfzoo.runtime.strategy import check_agreement


class Guide:
    """Turns the frame of a classifier.

    Args:
        model: an ImageClassifier that is trained, with a simplex ETF.
        strategy: see `etfzoo.runtime.strategy.get_strategy`.
        followers: models of the same spec that take the frame over, such as an average of the
            weights: the mean of two ETFs is none.
    """

    def __init__(self, model, strategy, followers=()):
        self.head = model.get_layer("logits")
        self.followers = [follower.get_layer("logits") for follower in followers]
        self.strategy = strategy
        self._extractor = Extractor(model, strategy, model.spec.penultimate)

    def turn(self, pipeline, split: str) -> None:
        """Turns the frame to the class means of a split, see `frames.nearest_etf`.

        With several workers each computes them; all must call it.

        Raises:
            TrainingDiverged: features are not finite.
            EtfzooError: an image cannot be decoded, or the workers come to different frames.
        """
        frame = np.asarray(self.head.kernel).T
        kernel = frames.nearest_etf(self.class_means(pipeline, split), frame).T
        kernel = kernel.astype(self.head.kernel.dtype)
        check_agreement(self.strategy, {"the frame": zlib.crc32(kernel.tobytes())})
        for head in (self.head, *self.followers):
            head.kernel.assign(kernel)

    def class_means(self, pipeline, split: str) -> np.ndarray:
        """Means `[K, p]`, in float64, of what the head multiplies, of each class of a split.

        They are of the images as evaluation sees them. A class without any has the mean of the
        others.

        Raises:
            TrainingDiverged: features are not finite.
        """
        sums, counts = 0.0, np.zeros(self.head.num_classes)
        for features, labels in self._extractor.batches(pipeline, split):
            h = np.asarray(self.head.normalized(features, training=False), np.float64)
            if not np.isfinite(h).all():
                raise TrainingDiverged("features of the training split are not finite")
            one_hot = np.eye(self.head.num_classes)[labels]
            sums, counts = sums + one_hot.T @ h, counts + one_hot.sum(0)
        seen = counts > 0
        means = sums / np.maximum(counts, 1)[:, None]
        means[~seen] = means[seen].mean(0)
        return means

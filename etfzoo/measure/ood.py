"""Whether a classifier notices images of something else than it was trained on."""

import numpy as np

from etfzoo.data.pipeline import evaluation_pipeline
from etfzoo.errors import EtfzooError, extra
from etfzoo.measure import features
from etfzoo.measure.features import Features

with extra("train"):
    from sklearn.metrics import roc_auc_score, roc_curve

NCI_ALPHA = 1e-4
NECO_VARIANCE = 0.9
_BATCH = 4096


class Detector:
    """Scores of how much an image is like those of the training, from the features h of its head.

    These are the pooled features, or the output of the projector where there is one.

    Four scores, higher for what is known:

    - `msp`: the largest probability (Hendrycks and Gimpel 2017);
    - `energy`: the logarithm of the sum of exponentials of the logits (Liu et al. 2020);
    - `neco`: the share of the length of h that lies in the subspace of the first principal
      components of the training features, times the largest logit, as its authors do for ResNets
      (Ben Ammar et al. 2024). Here the components are the fewest that hold 90 % of the variance;
    - `nci`: the projection of the predicted class's weights on the direction of h - mu, where mu
      is the mean of the training features, plus 1e-4 times the L1 norm of h (Liu and Qin 2025, who
      choose that factor by validation).

    Args:
        model: an ImageClassifier with a head.
        training: of its training images, what the head acts on (the tap `spec.penultimate`); the
            labels are not used.

    Raises:
        EtfzooError: the model has no head, or the training features do not vary.
    """

    def __init__(self, model, training: Features):
        self.weights, _ = features.linear_head(model, model.spec.penultimate)
        self.head = model.get_layer("logits")
        count, total, products = 0, 0.0, 0.0
        for batch in training.batches(_BATCH):
            batch = np.asarray(batch, np.float64)
            count, total = count + len(batch), total + batch.sum(0)
            products = products + batch.T @ batch
        self.mean = total / count
        variance, components = np.linalg.eigh(products / count - np.outer(self.mean, self.mean))
        if not variance[-1] > 1e-12 * max(np.dot(self.mean, self.mean), 1e-300):
            raise EtfzooError("the training features do not vary: nothing can be told from them")
        shares = np.cumsum(variance[::-1]) / variance.sum()
        kept = 1 + int(np.searchsorted(shares, NECO_VARIANCE))
        self.components = components[:, ::-1][:, :kept]  # [p, kept]

    def scores(self, found: Features) -> dict[str, np.ndarray]:
        """The scores of images, float64 `[N]` by name.

        Args:
            found: what the head acts on of them; the labels are not used.
        """
        parts = [self._scores(batch) for batch in found.batches(_BATCH)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _scores(self, batch):
        logits = np.asarray(self.head(batch), np.float64)
        h, largest = np.asarray(batch, np.float64), logits.max(1)
        energy = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
        inside = np.linalg.norm(h @ self.components, axis=1)
        centred = h - self.mean
        chosen = self.weights[logits.argmax(1)]
        along = np.sum(centred * chosen, 1) / np.maximum(np.linalg.norm(centred, axis=1), 1e-30)
        return {
            "msp": np.exp(largest - energy),
            "energy": energy,
            "neco": largest * inside / np.maximum(np.linalg.norm(h, axis=1), 1e-30),
            "nci": along + NCI_ALPHA * np.abs(h).sum(1),
        }


def detection(known, foreign) -> dict[str, float]:
    """How well a score separates two sets of images.

    Args:
        known: scores of images of the classifier's classes, `[N]`.
        foreign: scores of others, `[M]`.

    Returns:
        `auroc`: the chance that a known image scores higher than a foreign one, ties half;
        `fpr95`: the share of foreign images that pass where 95 % of the known ones do.
    """
    labels = np.r_[np.ones(len(known)), np.zeros(len(foreign))]
    values = np.r_[known, foreign]
    passing, found, _ = roc_curve(labels, values, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(labels, values)),
        "fpr95": float(passing[np.argmax(found >= 0.95)]),
    }


def evaluate(
    model, source, foreign, batch_size: int = 128, training_split="train", feature_cache=None
) -> dict[str, dict[str, dict[str, float]]]:
    """Detection of the test images of other data sets among those of the model's own.

    Args:
        model: an ImageClassifier with a head.
        source: the data it was trained on, as it was trained on: the training split gives means and
            components, the test split the known images. See `etfzoo.data.sources.resolve`.
        foreign: data sets of other classes by name; the role `test` of them.
        batch_size: images a step.
        training_split: split or role of `source`.
        feature_cache: see `etfzoo.measure.features.Extractor.load`.

    Returns:
        see `detection`; by the names of the data sets and those of the scores of `Detector`.

    Raises:
        EtfzooError: see `Detector`; or an image cannot be decoded.
    """
    extractor = features.Extractor(model, tap=model.spec.penultimate)

    def load(data, split):
        pipeline = evaluation_pipeline(model.spec, data, batch_size)
        return extractor.load(pipeline, split, feature_cache)

    detector = Detector(model, load(source, training_split))
    known = detector.scores(load(source, "test"))
    found = {}
    for name, data in foreign.items():
        others = detector.scores(load(data, "test"))
        found[name] = {score: detection(known[score], others[score]) for score in known}
    return found

"""Pooled features of a data set: extracted on any strategy, kept on disk by what they depend on."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from etfzoo import arrays, files
from etfzoo.data.pipeline import Pipeline, evaluation_pipeline
from etfzoo.errors import EtfzooError, first_line, unknown
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics
from etfzoo.models import weights
from etfzoo.models.classifier import is_head_variable
from etfzoo.progress import Progress
from etfzoo.runtime import backend
from etfzoo.runtime.strategy import get_strategy, is_chief, num_workers

log = logging.getLogger("etfzoo")

# To be raised when the same weights and images come to give other features.
_FORMAT = 2


class Features(NamedTuple):
    """Features of a split, float32 `[N, p]` (often mapped from a file), and labels `[N]`."""

    features: np.ndarray
    labels: np.ndarray

    def batches(self, size: int = 4096) -> Iterator[np.ndarray]:
        """The features in pieces, read from disk as they are needed."""
        for start in range(0, len(self.labels), size):
            yield self.features[start : start + size]


class Extractor:
    """Pooled features of a classifier's backbone, in inference mode.

    Args:
        model: an ImageClassifier, built under `strategy.scope()`; its head is not used.
        strategy: see `etfzoo.runtime.strategy.get_strategy`; None is one device.
        tap: `"features"`, which stand before a projector, or `"projected"`, its output.

    Raises:
        EtfzooError: the model has no such tap.
    """

    def __init__(self, model, strategy=None, tap: str = "features"):
        if tap not in model.taps:
            raise unknown("tap", tap, model.taps)
        self.model = model
        self.strategy = strategy or get_strategy("one_device")
        self.tap = tap
        backbone = keras.Model(model.input, model.taps[tap])
        self._step = backend.feature_step(backbone, self.strategy)

    def batches(self, pipeline: Pipeline, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features float32 `[B, p]` and labels `[B]`; every example once, in the split's order.

        With several workers each of them gets all examples, and all must read to the end.

        Raises:
            EtfzooError: an image cannot be decoded.
        """
        steps = -(-pipeline.size(split) // pipeline.batch_size)
        title = f"features of the {split} split"
        progress = Progress(title, steps, quiet=not is_chief(self.strategy))
        with pipeline.naming_corrupt_records(split):
            batches = backend.distribute(
                self.strategy, lambda share: pipeline.evaluation(split, share)
            )
            for number, (images, labels) in enumerate(batches):
                labels, features = (np.asarray(x) for x in self._step(images, labels))
                yield features[labels >= 0], labels[labels >= 0]
                progress.update(number + 1)
        progress.finish()

    def load(self, pipeline: Pipeline, split: str, cache=None) -> Features:
        """The features of a split, from the cache where they are there.

        Args:
            pipeline: where the images come from.
            split: split or role.
            cache: directory; None reads nothing and keeps them in a temporary file. Several workers
                use none. What it holds is compared with the hash that it was written with, and is
                made again where it differs. Others may write to it: no link in it is followed.

        Raises:
            EtfzooError: an image cannot be decoded, or the cache cannot be written.
        """
        if cache is None or num_workers(self.strategy) > 1:
            return in_temporary_file(self.batches(pipeline, split))
        key = content_hash(self.model, pipeline, split, self.tap)
        cache = files.make_directory(cache)
        path, labels_path = cache / f"{key}.float32", cache / f"{key}.labels.npz"
        found = _read(path, labels_path)
        if found is None:
            with files.atomic(path, follow=False) as file:
                labels = _write(file, self.batches(pipeline, split))
            # The labels come last: where they are, the features are whole.
            digest = _digest(path, labels)
            with files.atomic(labels_path, follow=False) as file:
                np.savez(file, labels=labels, digest=digest)
            found = _read(path, labels_path)
        return found


def extract(
    model, source, split: str, batch_size: int = 128, cache=None
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features of the evaluation images of a split, at the model's own image size.

    Args:
        model: an ImageClassifier, with any head or none.
        source: see `etfzoo.data.sources.resolve`.
        split: split or role.
        batch_size: images a step.
        cache: see `Extractor.load`.

    Returns:
        features, float64 `[N, p]`, and class numbers `[N]`.

    Raises:
        EtfzooError: the model has no image size, or an image cannot be decoded.
    """
    if batch_size < 1:
        raise EtfzooError(f"the batch size must be at least 1; got {batch_size}")
    pipeline = evaluation_pipeline(model.spec, source, batch_size)
    found = Extractor(model).load(pipeline, split, cache)
    return np.asarray(found.features, np.float64), found.labels


def in_temporary_file(batches, directory=None) -> Features:
    """Features in a file without a name, which is gone when they are.

    Args:
        batches: pairs of features `[B, p]` and labels `[B]`.
        directory: where the file takes its place; None is the system's.

    Raises:
        EtfzooError: the file cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            labels = _write(file, batches)
            file.flush()
            return Features(_map(file, len(labels)), labels)
    except OSError as error:
        where = directory or tempfile.gettempdir()
        raise EtfzooError(f"cannot keep features in {where}: {error.strerror or error}") from error


def content_hash(model, pipeline: Pipeline, split: str, tap: str = "features") -> str:
    """Hash of all that the features of a split depend on: weights, preprocessing and images.

    Args:
        model, pipeline, split: see `Extractor`.
        tap: see `Extractor`; what stands behind the features counts for no other.
    """
    spec = model.spec
    settings = {"format": _FORMAT, "backbone": spec.backbone, "norm": spec.norm}
    settings |= {"mean": spec.mean, "std": spec.std, "dtype": spec.dtype}
    settings |= {"preprocessing": pipeline.preprocessing, "data": pipeline.fingerprint(split)}
    settings |= {} if tap == "features" else {"tap": tap}
    settings |= {} if spec.network is None else {"network": spec.network, "bgr": spec.bgr}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, array in sorted(weights.as_arrays(model.variables).items()):
        if tap != "features" or not is_head_variable(path):
            digest.update(f"{path} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def collapse(
    found: Features, num_classes: int, classifier=None, ood: Features | None = None
) -> dict:
    """The collapse measures of features.

    Args:
        found: features and labels.
        num_classes: K.
        classifier: weights `[K, p]` and biases `[K]`; for nc3 and nc4.
        ood: features of other data; for nc5.

    Returns:
        see `NeuralCollapseStatistics.result`.
    """
    return statistics(found, num_classes).result(
        classifier, found.batches() if classifier else None, ood and statistics(ood)
    )


def equal_nc1(found: Mapping[str, Features], num_classes: int) -> dict[str, float]:
    """NC1 of several sets on equally many examples of each class, by which they may be compared.

    NC1 grows with the number of examples, see `NeuralCollapseStatistics.result`. Of each class as
    many are drawn (always the same ones) as the set with the fewest has, so that the shares of the
    classes are equal too; a class that one set lacks is left out of all. The figures still belong
    to that number of examples: those of other sets with another number do not compare.

    Args:
        found: features and labels by the name of their set.
        num_classes: K.

    Returns:
        NC1 by name; empty where there is one set alone, or no scatter between classes in one.
    """
    if len(found) < 2:
        return {}
    kept = equal_rows([f.labels for f in found.values()], num_classes)
    try:
        return {
            name: statistics(some, num_classes, rows).result()["nc1"]
            for (name, some), rows in zip(found.items(), kept, strict=True)
        }
    except EtfzooError as error:
        log.warning("no NC1 on equally many examples: %s", error)
        return {}


def equal_rows(labels: Sequence[np.ndarray], num_classes: int) -> list[np.ndarray]:
    """For each set of labels `[N]` a mask `[N]` that leaves each class equally often in all."""
    least = np.min([np.bincount(some, minlength=num_classes) for some in labels], axis=0)
    masks = []
    for some in labels:
        order = np.random.default_rng(0).permutation(len(some))
        order = order[np.argsort(some[order], kind="stable")]  # by class, each in a drawn order
        count = np.bincount(some, minlength=num_classes)
        place = np.arange(len(some)) - np.repeat(np.cumsum(count) - count, count)
        masks.append(np.zeros(len(some), bool))
        masks[-1][order] = place < np.repeat(least, count)
    return masks


def comparable(names) -> list[str]:
    """The measures by which sets of different size may stand side by side.

    Args:
        names: of measures; one is left out where its form that is free of the size is among them.
    """
    free = {name.removesuffix("_unbiased") for name in names if name.endswith("_unbiased")}
    free |= {"nc1"} if "nc1_equal" in names else set()
    return [name for name in names if name not in free]


def statistics(
    found: Features, num_classes: int | None = None, rows: np.ndarray | None = None
) -> NeuralCollapseStatistics:
    """Collected statistics.

    Args:
        found: features and labels.
        num_classes: K; without it the labels are not looked at.
        rows: mask `[N]` of the examples that count; None is all.
    """
    collected = NeuralCollapseStatistics(num_classes or 1, found.features.shape[1])
    start = 0
    for batch in found.batches():
        piece = slice(start, start + len(batch))
        labels = found.labels[piece] if num_classes else np.zeros(len(batch), int)
        if rows is not None:
            batch, labels = batch[rows[piece]], labels[rows[piece]]
        collected.update(batch, labels)
        start = piece.stop
    return collected


def linear_head(model, tap: str = "features") -> tuple[np.ndarray, np.ndarray]:
    """Weights `[K, p]` and biases `[K]`, in float64, that choose as the head.

    A batch norm before an ETF is folded in; a normalisation to unit length is left out, since it
    scales all logits of an example alike.

    Args:
        model: an ImageClassifier.
        tap: what they are to act on, see `Extractor`. Behind a projector no weights on the
            features choose as the head, as the projector is not linear.

    Raises:
        EtfzooError: the model has no head, or it acts on another tap.
    """
    if model.spec.head is None:
        raise EtfzooError("the model has no head")
    if tap != model.spec.penultimate:
        raise EtfzooError(f"the head acts on `{model.spec.penultimate}`, not on `{tap}`")
    head = model.get_layer("logits")
    kernel = np.asarray(head.kernel, np.float64).T
    if model.spec.head == "linear":
        return kernel, np.asarray(head.bias, np.float64)
    kernel = np.asarray(head.logit_scale, np.float64) * kernel
    norm = head.batch_norm
    if norm is None:
        return kernel, np.zeros(len(kernel))
    gamma, beta, mean, variance = (
        np.asarray(v, np.float64)
        for v in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    gamma = gamma / np.sqrt(variance + norm.epsilon)
    return kernel * gamma, kernel @ (beta - gamma * mean)


def _write(file, batches) -> np.ndarray:
    labels = []
    for features, some in batches:
        file.write(np.ascontiguousarray(features, np.float32))
        labels.append(some)
    return np.concatenate(labels)


def _read(path: Path, labels_path: Path) -> Features | None:
    """The features that are there; None where they are not, or not as they were written."""
    if not (path.exists() and labels_path.exists()):
        return None
    try:
        if path.is_symlink() or labels_path.is_symlink():
            raise EtfzooError("it is a link")
        labels, digest = arrays.read_npz(labels_path, ["labels", "digest"]).values()
        if not np.array_equal(digest, _digest(path, labels)):
            raise EtfzooError("the features or labels are not those that were written")
        with files.open_regular(path) as file:
            return Features(_map(file, len(labels)), labels)
    except (EtfzooError, OSError, ValueError, ZeroDivisionError) as error:
        log.warning("%s is damaged: made again (%s)", path, first_line(error))
        return None


def _digest(path: Path, labels) -> np.ndarray:
    """Hash of features and labels, bytes `[32]`."""
    with files.open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{labels.dtype} {labels.shape}".encode() + labels.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _map(file, rows) -> np.ndarray:
    array = np.memmap(file, np.float32, "r")
    if len(array) % rows:
        raise ValueError("a piece of the features is missing")
    return array.reshape(rows, -1)

"""What a classifier gets right: top-1, top-5 and mean per-class accuracy."""

import csv
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from etfzoo import files
from etfzoo.data.pipeline import evaluation_pipeline
from etfzoo.errors import EtfzooError
from etfzoo.measure import classes
from etfzoo.progress import Progress
from etfzoo.runtime import backend
from etfzoo.runtime.strategy import check_batch_size, get_strategy, is_chief


class Predictions(NamedTuple):
    """One row an example: its label, the predicted class, whether it is in the top 5, the loss.

    `confidence` is the probability of the predicted class; None where only classes are known.
    """

    labels: np.ndarray
    predicted: np.ndarray
    in_top5: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray | None = None


def predict(step, batches, progress: Progress | None = None) -> Predictions:
    """Runs an evaluation step over all batches; examples of label -1 are left out.

    Args:
        step: see `step_tf.evaluation_step`.
        batches: an iterable of `(images, labels)`.
        progress: shown after each batch.
    """
    rows = []
    for number, (images, labels) in enumerate(batches):
        if progress is not None:
            progress.update(number)
        columns = [np.asarray(column) for column in step(images, labels)]
        rows.append([column[columns[0] >= 0] for column in columns])
    return Predictions(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def evaluate(
    model,
    source,
    split: str = "test",
    batch_size: int = 128,
    strategy=None,
    ignore_class_names: bool = False,
) -> Predictions:
    """Predictions of a classifier on a split of a data set, at the model's own image size.

    Classes are matched by name, and all numbers of classes are the data set's. Of a data set with
    some of the model's classes the model chooses among these, see `etfzoo.measure.classes`.

    Args:
        model: the classifier, built under `strategy.scope()`.
        source: see `etfzoo.data.sources.resolve`.
        split: split or role.
        batch_size: images a step, over all devices.
        strategy: see `etfzoo.runtime.strategy.get_strategy`; None is one device. Every worker gets
            all predictions.
        ignore_class_names: whether classes with other names are taken as the same ones.

    Raises:
        EtfzooError: the model has no head, or the data set has classes that the model does not;
            or an image cannot be decoded.
    """
    places = classes.places(model.spec, source, ignore_class_names)
    pipeline = evaluation_pipeline(model.spec, source, batch_size)
    strategy = strategy or get_strategy("one_device")
    check_batch_size(batch_size, strategy)
    network = classes.on_classes(model, places)
    progress = Progress(
        f"evaluating {source.name} ({split})",
        -(-source.size(split) // batch_size),
        quiet=not is_chief(strategy),
    )
    with pipeline.naming_corrupt_records(split):
        batches = backend.distribute(strategy, lambda share: pipeline.evaluation(split, share))
        predictions = predict(
            backend.evaluation_step(network, strategy=strategy), batches, progress
        )
    progress.finish()
    return predictions


def accuracy(labels, predicted, num_classes: int, metric: str = "top1") -> float:
    """`top1` or `mean_per_class` accuracy of predicted classes."""
    empty = np.zeros(len(labels))
    return summary(Predictions(labels, predicted, empty, empty), num_classes)[metric]


def per_class_accuracy(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Accuracy of each class, `[K]`; NaN for a class without examples."""
    count = np.bincount(predictions.labels, minlength=num_classes)
    right = np.bincount(
        predictions.labels[predictions.labels == predictions.predicted], minlength=num_classes
    )
    return np.divide(right, count, out=np.full(num_classes, np.nan), where=count > 0)


def by_shots(labels, predicted, counts, many: int = 100, few: int = 20) -> dict[str, dict]:
    """Accuracy of classes with many, some and few training images (Liu et al. 2019, "Large-scale
    long-tailed recognition in an open world").

    Args:
        labels, predicted: true and predicted classes `[N]`.
        counts: training images of each class `[K]`.
        many: more training images than this are many.
        few: fewer than this are few; what is between, both limits included, is medium.

    Returns:
        of `many`, `medium` and `few`: `accuracy`, the mean of the accuracies of its classes that
        occur among the labels (None where there are none), and how many these are, `classes`.

    Raises:
        EtfzooError: `few` is larger than `many`, or a label that has no count.
    """
    labels, predicted, counts = map(np.asarray, (labels, predicted, counts))
    if few > many:
        raise EtfzooError(f"few ({few}) must not be more than many ({many})")
    if len(labels) and labels.max() >= len(counts):
        raise EtfzooError(f"there are counts of {len(counts)} classes, but none of {labels.max()}")
    empty = np.zeros(len(labels))
    shares = per_class_accuracy(Predictions(labels, predicted, empty, empty), len(counts))
    groups = {"many": counts > many, "medium": (few <= counts) & (counts <= many)}
    groups["few"] = counts < few
    found = {name: shares[group & ~np.isnan(shares)] for name, group in groups.items()}
    return {
        name: {"accuracy": float(s.mean()) if len(s) else None, "classes": len(s)}
        for name, s in found.items()
    }


def summary(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """`loss`, `top1`, `top5`, `mean_per_class` (over classes that occur) and `examples`."""
    return {
        "loss": float(np.mean(predictions.loss, dtype=np.float64)),
        "top1": float(np.mean(predictions.labels == predictions.predicted)),
        "top5": float(np.mean(predictions.in_top5)),
        "mean_per_class": float(np.nanmean(per_class_accuracy(predictions, num_classes))),
        "examples": len(predictions.labels),
    }


def write_report(directory, predictions: Predictions, class_names, metrics: dict) -> None:
    """Writes `metrics.json` and `per_class.csv` (class, name, examples, accuracy)."""
    directory = Path(directory)
    files.write_text(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["class", "name", "examples", "accuracy"])
    count = np.bincount(predictions.labels, minlength=len(class_names))
    shares = per_class_accuracy(predictions, len(class_names))
    for number, (name, share) in enumerate(zip(class_names, shares, strict=True)):
        writer.writerow([number, name, count[number], "" if np.isnan(share) else f"{share:.4f}"])
    files.write_text(directory / "per_class.csv", table.getvalue())


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Counts `[K, K]`: true class by predicted class."""
    flat = predictions.labels.astype(np.int64) * num_classes + predictions.predicted
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def binomial_interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy (Wilson 1927).

    Args:
        right: share of examples that are right.
        count: number of examples.
    """
    if count == 0:
        return 0.0, 1.0
    z = 1.96  # the normal quantile
    centre = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)

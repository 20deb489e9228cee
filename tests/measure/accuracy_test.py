"""Tests of the metrics and of evaluating a classifier."""

import csv
import json
import math

import keras
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from etfzoo.data import sources
from etfzoo.data.augment import evaluation_image
from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy
from etfzoo.measure.accuracy import Predictions
from etfzoo.models.classifier import build_classifier
from etfzoo.runtime import step_tf
from testing import make_image_folder, randomize

pytestmark = pytest.mark.small_rn18

K = 7


def make_predictions(labels, predicted):
    rng = np.random.default_rng(1)
    n = len(labels)
    return Predictions(
        np.asarray(labels, np.int32),
        np.asarray(predicted, np.int32),
        rng.random(n) < 0.8,
        rng.gamma(1, 1, n).astype(np.float32),
    )


@pytest.fixture
def predictions():
    """Imbalanced random predictions; class 4 has no example but is predicted."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 5, 6], 400, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    predicted = np.where(rng.random(400) < 0.6, labels, rng.integers(0, K, 400))
    return make_predictions(labels, predicted)


def recalls(predictions):
    return sklearn_metrics.recall_score(
        *predictions[:2], labels=range(K), average=None, zero_division=np.nan
    )


def test_summary(predictions):
    summary = accuracy.summary(predictions, K)
    wanted = sklearn_metrics.accuracy_score(*predictions[:2])
    np.testing.assert_allclose(summary.pop("top1"), wanted, rtol=1e-12)
    np.testing.assert_allclose(summary.pop("top5"), predictions.in_top5.mean(), rtol=1e-12)
    wanted = np.mean([float(x) for x in predictions.loss])
    np.testing.assert_allclose(summary.pop("loss"), wanted, rtol=1e-12)
    seen = recalls(predictions)[[0, 1, 2, 3, 5, 6]]
    np.testing.assert_allclose(summary.pop("mean_per_class"), seen.mean(), rtol=1e-12)
    assert summary == {"examples": 400}
    json.dumps(accuracy.summary(predictions, K))


def test_mean_per_class_is_balanced_accuracy():
    rng = np.random.default_rng(2)
    labels = np.repeat(range(K), [1, 2, 3, 50, 9, 4, 8])
    predicted = np.where(rng.random(len(labels)) < 0.5, labels, rng.integers(0, K, len(labels)))
    wanted = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    value = accuracy.accuracy(labels, predicted, K, "mean_per_class")
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    value = accuracy.accuracy(labels, predicted, K)
    np.testing.assert_allclose(value, np.mean(labels == predicted), rtol=1e-12)
    assert abs(value - wanted) > 0.01


def test_per_class_accuracy(predictions):
    shares = accuracy.per_class_accuracy(predictions, K)
    assert np.isnan(shares[4]) and not np.isnan(np.delete(shares, 4)).any()
    np.testing.assert_allclose(shares, recalls(predictions), rtol=1e-12)


@pytest.mark.parametrize("many, few", [(100, 20), (50, 50), (7, 0)])
def test_accuracy_by_number_of_training_images(predictions, many, few):
    counts = np.array([101, 100, 50, 20, 500, 19, 0])  # class 4 has no label
    limits = {} if (many, few) == (100, 20) else {"many": many, "few": few}
    found = accuracy.by_shots(*predictions[:2], counts, **limits)
    groups = {"many": [], "medium": [], "few": []}
    for number, count in enumerate(counts):
        right = [p == number for y, p in zip(*predictions[:2], strict=True) if y == number]
        group = "many" if count > many else "few" if count < few else "medium"
        groups[group] += [np.mean(right)] if right else []
    for name, shares in groups.items():
        wanted = pytest.approx(np.mean(shares)) if shares else None
        assert found[name] == {"accuracy": wanted, "classes": len(shares)}
    assert [len(shares) for shares in groups.values()] == (
        {100: [1, 3, 2], 50: [2, 1, 3], 7: [5, 1, 0]}[many]
    )
    json.dumps(found, allow_nan=False)


def test_numbers_of_training_images_that_do_not_fit(predictions):
    with pytest.raises(EtfzooError, match=r"few \(30\) must not be more than many \(20\)"):
        accuracy.by_shots(*predictions[:2], np.ones(K), many=20, few=30)
    with pytest.raises(EtfzooError, match="counts of 6 classes, but none of 6"):
        accuracy.by_shots(*predictions[:2], np.ones(K - 1))


def test_confusion_matrix(predictions):
    counts = accuracy.confusion_matrix(predictions, K)
    wanted = sklearn_metrics.confusion_matrix(*predictions[:2], labels=range(K))
    np.testing.assert_array_equal(counts, wanted)
    assert counts[4].sum() == 0 and counts[:, 4].sum() > 0


@pytest.mark.parametrize("classes", [3, 5, 6, 20])
def test_predict_against_sklearn(classes):
    rng = np.random.default_rng(classes)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(classes)])
    features = rng.normal(size=(50, 4)).astype(np.float32)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 50 - classes)])
    labels = labels.astype(np.int32)
    batches = [(features[i : i + 16], labels[i : i + 16]) for i in range(0, 50, 16)]
    out = accuracy.predict(step_tf.evaluation_step(model), batches)

    scores = features.astype(np.float64) @ np.float64(model.layers[0].kernel)
    np.testing.assert_array_equal(out.labels, labels)
    np.testing.assert_array_equal(out.predicted, scores.argmax(1))
    wanted = 1.0
    if classes > 5:
        wanted = sklearn_metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
    np.testing.assert_allclose(accuracy.summary(out, classes)["top5"], wanted, rtol=1e-12)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    wanted = sklearn_metrics.log_loss(labels, shares, labels=range(classes))
    np.testing.assert_allclose(accuracy.summary(out, classes)["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(out.confidence, shares.max(1), rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = make_image_folder(tmp_path_factory.mktemp("images"), {"a": 12, "b": 7}, (40, 36))
    return sources.resolve(f"folder:{root}")


def test_evaluate(folder):
    shape = (32, 24, 3)
    model = randomize(build_classifier("rn18", 2, input_shape=shape, crop=0.8))
    out = accuracy.evaluate(model, folder, "train", batch_size=5)
    records = list(folder.records("train"))
    images = np.stack([evaluation_image(r["image"], 32, 24, 0.8) for r in records])
    logits = np.asarray(model(images), np.float64)
    labels = np.array([r["label"] for r in records])
    assert len(labels) == 16 and set(labels) == {0, 1}
    np.testing.assert_array_equal(out.labels, labels)
    np.testing.assert_array_equal(out.predicted, logits.argmax(1))
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), labels]
    np.testing.assert_allclose(out.loss, loss, rtol=1e-3, atol=1e-5)
    assert out.in_top5.all()


@pytest.mark.parametrize("head, classes", [("linear", 3), (None, None)])
def test_evaluate_refuses_other_classes(folder, head, classes):
    model = build_classifier("rn18", classes, head, input_shape=(32, 32, 3))
    with pytest.raises(EtfzooError, match=f"the model has {classes or 'no head'}.* 2.*: fine-tune"):
        accuracy.evaluate(model, folder)


def test_evaluate_names_a_corrupt_image(tmp_path):
    make_image_folder(tmp_path / "train", {"a": 2, "b": 2})
    make_image_folder(tmp_path / "test", {"a": 2, "b": 2})
    (tmp_path / "test" / "b" / "001.png").write_bytes(b"not an image")
    model = build_classifier("rn18", 2, input_shape=(8, 8, 3))
    with pytest.raises(EtfzooError, match=r"test.b.001\.png \(test split.*not a readable image"):
        accuracy.evaluate(model, sources.resolve(f"folder:{tmp_path}"))


def test_write_report(tmp_path, predictions):
    names = ["a", 'b "x", y', "c", "d", "é", "f", "g"]
    metrics = accuracy.summary(predictions, K)
    accuracy.write_report(tmp_path, predictions, names, metrics)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "per_class.csv"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    with open(tmp_path / "per_class.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["class", "name", "examples", "accuracy"]
    assert [row[0] for row in rows] == [str(i) for i in range(K)]
    assert [row[1] for row in rows] == names
    counts = np.bincount(predictions.labels, minlength=K)
    assert [int(row[2]) for row in rows] == counts.tolist()
    assert rows[4][3] == ""
    shares = np.delete(recalls(predictions), 4)
    written = [float(row[3]) for row in rows if row[0] != "4"]
    np.testing.assert_allclose(written, shares, atol=5.1e-5)


@pytest.mark.parametrize(
    "right, count, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(right, count, low, high):
    interval = accuracy.binomial_interval(right / count, count)
    np.testing.assert_allclose(interval, (low, high), atol=6e-5)
    mirrored = accuracy.binomial_interval(1 - right / count, count)
    np.testing.assert_allclose(mirrored, (1 - interval[1], 1 - interval[0]), atol=1e-12)
    # Its ends are the p from which `right` is just z deviations away.
    for p in interval:
        deviations = abs(right / count - p)
        np.testing.assert_allclose(deviations, 1.96 * math.sqrt(p * (1 - p) / count), atol=1e-9)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_wilson_interval_stays_in_range(right):
    low, high = accuracy.binomial_interval(right, 3)
    assert 0 <= low < high <= 1

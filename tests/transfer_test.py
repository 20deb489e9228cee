"""Fine-tuning with a search, and linear probes against scikit-learn."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import etfzoo
from etfzoo import checkpoint, evaluation, transfer
from etfzoo.config import TrainConfig
from etfzoo.data import sources
from etfzoo.features import Features


@pytest.fixture(scope="module")
def config(embedded_dir, tmp_path_factory):
    keras.utils.set_random_seed(3)
    model = etfzoo.build_classifier("rn18", 5, input_shape=(32, 32, 3), crop=1.0)
    source = tmp_path_factory.mktemp("source")
    checkpoint.CheckpointManager(source).save(1, model, None, {})
    return TrainConfig(
        dataset="digits",
        data_dir=str(embedded_dir),
        init=str(source),
        head="linear",
        image_size=32,
        crop=1.0,
        augment="none",
        flip=False,
        epochs=1,
        batch_size=50,
        learning_rate=0.01,
        weight_decay=0.0,
    )


def test_probe_is_scikit_learns_logistic_regression(config, tmp_path):
    result = transfer.linear_probe(config, tmp_path, grid=(1e-3, 1e-1))
    source = sources.resolve("digits", config.data_dir)
    model = etfzoo.load(tmp_path)
    features = etfzoo.feature_model(model)

    def data(split):
        from etfzoo.data.augment import decode

        records = list(source.records(split))
        images = np.stack([decode(r["image"]).numpy() for r in records]).astype("float32")
        labels = np.array([int(r["label"]) for r in records])
        return np.array(features(images)["features"], np.float64), labels

    (x, y), (x_test, y_test) = data("train"), data("test")
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = np.inf
    probe = LogisticRegression(C=result["C"], max_iter=5000).fit((x - mean) / deviation, y)
    expected = probe.predict((x_test - mean) / deviation)
    # float32 features and another number of iterations may move a borderline digit
    assert abs(np.mean(expected == y_test) - result["top1"]) < 0.005
    predictions = evaluation.evaluate(model, source)
    assert evaluation.summary(predictions, 10)["top1"] == pytest.approx(result["top1"])
    assert result["top1"] > 0.3  # random features of scanned digits are well above chance
    assert transfer.linear_probe(config, tmp_path) == result  # finished: not fitted again


def test_search_compares_on_the_selection_split_and_trains_the_best(config, tmp_path):
    result = transfer.finetune(config, tmp_path, learning_rates=(1e-6, 0.02), weight_decays=(0.0,))
    rows = json.loads((tmp_path / "selection.json").read_text())
    assert [row["learning_rate"] for row in rows] == [1e-6, 0.02]
    best = max(rows, key=lambda row: row["top1"])
    assert TrainConfig.load(tmp_path / "config.json").learning_rate == best["learning_rate"]
    for row in rows:
        trial = TrainConfig.load(
            tmp_path / "select" / f"lr{row['learning_rate']:g}_wd0" / "config.json"
        )
        assert (trial.train_split, trial.eval_split) == ("fit", "select")
    assert result["examples"] == 1297


def test_a_diverging_candidate_loses(config, tmp_path):
    config = dataclasses.replace(config, epochs=2)
    transfer.finetune(config, tmp_path, learning_rates=(1e30, 0.01))
    assert TrainConfig.load(tmp_path / "config.json").learning_rate == 0.01


def test_probe_of_classes_without_training_examples(tmp_path):
    rng = np.random.RandomState(0)
    centres = 5 * rng.randn(3, 4)
    labels = np.array([1, 1, 3, 3, 4, 4] * 10)
    x = centres[np.searchsorted([1, 3, 4], labels)] + 0.1 * rng.randn(60, 4)
    ((kernel, bias),) = transfer._fit(Features(x, labels), (1.0,), num_classes=6)
    assert kernel.shape == (4, 6) and np.isfinite(bias).all()
    np.testing.assert_array_equal(np.argmax(x @ kernel + bias, 1), labels)
    two = labels != 4
    ((kernel, bias),) = transfer._fit(Features(x[two], labels[two]), (1.0,), num_classes=6)
    np.testing.assert_array_equal(np.argmax(x[two] @ kernel + bias, 1), labels[two])

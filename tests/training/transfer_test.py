"""Fine-tuning with a search, and linear probes against scikit-learn."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression

import etfzoo
from etfzoo.data import sources
from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy
from etfzoo.measure.features import Features
from etfzoo.models import checkpoint
from etfzoo.training import transfer
from etfzoo.training.config import TrainConfig
from etfzoo.zoo.load import read

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def config(embedded_dir, tmp_path_factory):
    keras.utils.set_random_seed(3)
    model = etfzoo.build_classifier("rn18", 5, input_shape=(32, 32, 3), crop=1.0)
    records = sources.resolve("digits", str(embedded_dir)).records("train")
    images = np.stack([tf.io.decode_png(r["image"]).numpy() for r in records]).astype("float32")
    for _ in range(30):  # the moving statistics become those of the data
        model(images, training=True)
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
        records = list(source.records(split))
        images = np.stack([tf.io.decode_png(r["image"]).numpy() for r in records]).astype("float32")
        labels = np.array([int(r["label"]) for r in records])
        return np.array(features(images)["features"], np.float64), labels

    (x, y), (x_test, y_test) = data("train"), data("test")
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = np.inf
    probe = LogisticRegression(C=result["C"], max_iter=5000).fit((x - mean) / deviation, y)
    expected = probe.predict((x_test - mean) / deviation)
    # float32 features and another number of iterations may move a borderline digit
    assert abs(np.mean(expected == y_test) - result["top1"]) < 0.005
    predictions = accuracy.evaluate(model, source)
    assert accuracy.summary(predictions, 10)["top1"] == pytest.approx(result["top1"])
    assert result["top1"] > 0.3  # random features of scanned digits are well above chance
    assert transfer.linear_probe(config, tmp_path) == result  # finished: not fitted again
    for split, (pixels_features, names) in {"train": (x, y), "test": (x_test, y_test)}.items():
        means = np.stack([pixels_features[names == k].mean(0) for k in range(10)])
        within = np.square(pixels_features - means[names]).sum()
        between = np.square(means[names] - pixels_features.mean(0)).sum()
        assert result[f"nc/{split}/nc1_ratio"] == pytest.approx(within / between, rel=1e-4)
    # 20 images a class are fewer than 130: the test split's NC1 is of 20 as well.
    assert result["nc/test/nc1_equal"] != pytest.approx(result["nc/test/nc1"], rel=1e-3)
    assert result["nc/train/nc1_equal"] == pytest.approx(result["nc/train/nc1"], rel=1e-9)
    with pytest.raises(EtfzooError, match="holds a run that is not k-NN"):
        transfer.knn(config, tmp_path)


def test_search_compares_on_the_selection_split_and_trains_the_best(config, tmp_path, monkeypatch):
    """A candidate that diverges loses."""
    reads = []
    monkeypatch.setattr(transfer, "read", lambda handle: reads.append(handle) or read(handle))
    rates = (1e6, 1e-6, 0.05)
    result = transfer.finetune(config, tmp_path, learning_rates=rates, weight_decays=(0.0,))
    assert reads == [config.init]  # for all of them and for the last
    rows = json.loads((tmp_path / "selection.json").read_text())
    assert [row["learning_rate"] for row in rows] == list(rates)
    assert rows[0]["top1"] == -np.inf < rows[1]["top1"] != rows[2]["top1"]
    best = max(rows, key=lambda row: row["top1"])
    assert TrainConfig.load(tmp_path / "config.json").learning_rate == best["learning_rate"]
    for row in rows:
        trial = TrainConfig.load(
            tmp_path / "select" / f"lr{row['learning_rate']:g}_wd0" / "config.json"
        )
        assert (trial.train_split, trial.eval_split) == ("fit", "select")
    assert result["examples"] == 1297
    # Killed between the search and the last training, it starts from the same fresh head.
    shutil.copytree(tmp_path / "select", tmp_path / "again" / "select")
    again = transfer.finetune(
        config, tmp_path / "again", learning_rates=rates, weight_decays=(0.0,)
    )
    assert again == result


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
    # Of two classes the difference of the logits is scikit-learn's decision.
    z = (x[two] - x[two].mean(0)) / x[two].std(0)
    decision = LogisticRegression(tol=1e-6, max_iter=5000).fit(z, labels[two]).decision_function(z)
    logits = x[two] @ kernel + bias
    np.testing.assert_allclose(logits[:, 3] - logits[:, 1], decision, rtol=1e-6)


def correlated(n, classes=10, dim=60, seed=0):
    """Features of which few directions carry most of the variance, as those of networks."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(np.random.default_rng(9).normal(size=(dim, dim)))[0]
    mixing *= np.logspace(1, -2, dim)[:, None]
    centres = np.random.default_rng(8).normal(size=(classes, dim))
    labels = np.arange(n) % classes
    return (0.7 * centres[labels] + rng.normal(size=(n, dim))) @ mixing, labels


@pytest.mark.parametrize("strength", [1e-2, 10.0])
def test_probe_does_not_depend_on_rounding(strength, caplog):
    (x, y), (x_test, _) = correlated(400), correlated(4000, seed=1)
    noise = 1 + 1e-6 * np.random.default_rng(2).normal(size=x.shape)
    chosen = []
    for data in (x, x * noise):
        ((kernel, bias),) = transfer._fit(Features(data, y), (strength,), 10)
        chosen.append((x_test @ kernel + bias).argmax(1))
    assert np.mean(chosen[0] != chosen[1]) <= 0.001
    # Warm starts along the grid end where a start from zero does.
    *_, (kernel, bias) = transfer._fit(Features(x, y), (1e-4, 1e-1, strength), 10)
    assert np.mean((x_test @ kernel + bias).argmax(1) != chosen[0]) <= 0.001
    assert "before it converged" not in caplog.text


def test_a_probe_that_does_not_converge_says_so(monkeypatch, caplog):
    monkeypatch.setattr(transfer, "PROBE_ITERATIONS", 5)
    list(transfer._fit(Features(*correlated(200)), (1.0,), 10))
    assert "the probe with C=1 was stopped after 5 steps" in caplog.text


def test_neighbours_vote_by_cosine():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(25, 5))
    labels = rng.integers(0, 4, 60)
    grid = (1, 7, 200)
    found = list(transfer._neighbours(Features(train, labels), Features(test, None), grid, 6))
    for k, predicted in zip(grid, found, strict=True):
        for x, chosen in zip(test, predicted, strict=True):
            cosines = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
            votes = np.zeros(6)
            for i in np.argsort(-cosines)[:k]:
                votes[labels[i]] += np.exp(cosines[i] / 0.07)
            assert chosen == votes.argmax()
    # Lengths do not count.
    scaled = Features(train * rng.uniform(0.1, 9, (60, 1)), labels)
    again = list(transfer._neighbours(scaled, Features(7 * test, None), grid, 6))
    np.testing.assert_array_equal(again, found)


def test_knn_of_digits(config, tmp_path):
    result = transfer.knn(config, tmp_path / "run", (1, 5, 1000), tmp_path / "cache")
    assert result["examples"] == 1297 and result["k"] in (1, 5) and result["top1"] > 0.3
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert transfer.knn(config, tmp_path / "run") == result
    assert transfer.knn(config, tmp_path / "again", (1, 5, 1000), tmp_path / "cache") == result
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    with pytest.raises(EtfzooError, match="k-NN runs on one device"):
        transfer.knn(dataclasses.replace(config, strategy="mirrored"), tmp_path / "other")

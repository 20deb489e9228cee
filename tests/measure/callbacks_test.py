"""Callbacks in Keras's own fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.measure.callbacks import NeuralCollapse
from etfzoo.measure.features import linear_head
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics

pytestmark = pytest.mark.small_rn18

K = 3


def _data(seed, count=20):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % K
    images = rng.uniform(0, 255, (count, 16, 16, 3)) * (1 + labels[:, None, None, None]) / K
    return images.astype(np.float32), labels


def _model(**changes):
    model = etfzoo.build_classifier("rn18", K, "etf", input_shape=(16, 16, 3), **changes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    return model


def test_measures_in_logs_history_and_tensorboard(tmp_path):
    train, test = _data(0), _data(1)
    model = _model()
    measures = NeuralCollapse(
        {"train": tf.data.Dataset.from_tensor_slices(train).batch(8), "test": [test]}, every=2
    )
    board = keras.callbacks.TensorBoard(tmp_path)
    history = model.fit(*train, batch_size=8, epochs=3, verbose=0, callbacks=[measures, board])
    # After the second epoch, and after the last.
    lengths = {name: len(v) for name, v in history.history.items() if name.startswith("nc/")}
    # cdnv_unbiased is left out where noise explains the distance of two means
    assert {n for name, n in lengths.items() if not name.endswith("cdnv_unbiased")} == {2}
    found = etfzoo.feature_model(model)
    for name, (images, labels) in (("train", train), ("test", test)):
        h = found.predict(images, verbose=0)["features"]
        statistics = NeuralCollapseStatistics(K, h.shape[1])
        statistics.update(h, labels)
        wanted = statistics.result(linear_head(model), [h])
        for measure in ("nc1", "nc1_ratio", "cdnv", "nc2_gram", "nc3", "nc4", "tr_c_over_p"):
            np.testing.assert_allclose(
                history.history[f"nc/{name}/{measure}"][-1], wanted[measure], rtol=1e-3
            )
    (events,) = (tmp_path / "train").glob("events*")
    tags = {
        (value.tag, event.step)
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    assert {("epoch_nc/test/nc1", 1), ("epoch_nc/test/nc1", 2)} <= tags
    assert ("epoch_nc/test/nc1", 0) not in tags


def _measured(model, batches):
    """Logs of an epoch, of the callback alone."""
    measures = NeuralCollapse({"x": batches})
    measures.set_model(model)
    measures.set_params({"epochs": 1})
    measures.on_train_begin()
    logs = {}
    measures.on_epoch_end(0, logs)
    return logs


@pytest.fixture(scope="module")
def model():
    return _model()


def test_labels_of_all_forms_and_weights(model):
    images, labels = _data(1)
    wanted = _measured(model, [(images, labels)])
    hot = keras.utils.to_categorical(labels, K)
    for given in (
        [images, hot],
        (images, hot.astype(bool), np.full(20, 0.5)),
        (images, labels[:, None].astype(np.float32), np.full((20, 1), 3.0)),
    ):
        assert _measured(model, [given]) == wanted
    weights = np.ones(20)
    weights[[3, 7, 8]] = 0
    kept = weights > 0
    some = tf.data.Dataset.from_tensor_slices((images, labels, weights)).batch(20)
    assert _measured(model, some) == _measured(model, [(images[kept], labels[kept])])
    assert _measured(model, some) != wanted


def test_behind_a_projector_the_features_are_measured_without_the_head():
    model = _model(projector_layers=1, projector_width=24)
    found = _measured(model, [_data(1)])
    assert not [name for name in found if name.startswith(("nc/x/nc3", "nc/x/nc4"))]
    images, labels = _data(1)
    h = etfzoo.feature_model(model).predict(images, verbose=0)["features"]
    statistics = NeuralCollapseStatistics(K, h.shape[1])
    statistics.update(h, labels)
    np.testing.assert_allclose(found["nc/x/nc1"], statistics.result()["nc1"], rtol=1e-3)


SOFT = np.full((4, K), 1 / K)
IMAGES = np.zeros((4, 16, 16, 3), np.float32)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([IMAGES], "'x' gives no labels beside the images"),
        ([(IMAGES, SOFT)], "'x' has soft labels"),
        ([(IMAGES, np.zeros((4, K)))], "'x' has soft labels"),
        ([(IMAGES, np.zeros((4, K + 1)))], r"must be class numbers from 0 to 2.* float64 \[4, 4\]"),
        ([(IMAGES, np.array([0, 1, 2, 3]))], "must be class numbers from 0 to 2"),
        ([(IMAGES, np.array([0, 1, 2, -1]))], "must be class numbers from 0 to 2"),
        ([(IMAGES, np.array([0, 1, 2, 0.5]))], "must be class numbers from 0 to 2"),
        ([(IMAGES, np.array(list("abca")))], "must be class numbers from 0 to 2.*; got <U1"),
        ([(IMAGES, 1, 2, 3)], "data set 'x': Data is expected to be in format"),
        (iter([(IMAGES, np.zeros(4, int))]), "'x' can be read only once"),
        ([], "'x' is empty"),
        (tf.data.Dataset.from_tensors((IMAGES, [0, 1, 2, 0])).repeat(), "'x' has no end"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_data_that_cannot_be_measured_is_refused_before_the_first_epoch(model, batches, message):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        model.fit(*_data(0), verbose=0, callbacks=[NeuralCollapse({"x": batches})])
    assert model.optimizer.iterations == 0


def test_other_models_and_numbers_are_refused():
    with pytest.raises(etfzoo.EtfzooError, match="every must be at least 1; got 0"):
        NeuralCollapse({}, every=0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="mine")
    model.compile("sgd", "mse")
    with pytest.raises(etfzoo.EtfzooError, match="with a head; got Sequential 'mine'"):
        model.fit(np.ones((4, 2)), np.ones(4), verbose=0, callbacks=[NeuralCollapse({})])

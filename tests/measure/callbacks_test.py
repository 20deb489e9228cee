"""Callbacks in Keras's own fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.measure.callbacks import NeuralCollapse
from etfzoo.measure.features import linear_head
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics

K = 3


def _data(seed, count=20):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % K
    images = rng.uniform(0, 255, (count, 16, 16, 3)) * (1 + labels[:, None, None, None]) / K
    return images.astype(np.float32), labels


def _model():
    model = etfzoo.build_classifier("rn18", K, "etf", input_shape=(16, 16, 3))
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
    assert {len(v) for name, v in history.history.items() if name.startswith("nc/")} == {2}
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


def test_other_models_and_numbers_are_refused():
    with pytest.raises(etfzoo.EtfzooError, match="every must be at least 1; got 0"):
        NeuralCollapse({}, every=0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="mine")
    model.compile("sgd", "mse")
    with pytest.raises(etfzoo.EtfzooError, match="with a head; got Sequential 'mine'"):
        model.fit(np.ones((4, 2)), np.ones(4), verbose=0, callbacks=[NeuralCollapse({})])

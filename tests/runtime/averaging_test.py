"""The average of the weights over the steps, on one device and on several."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.models.weights import as_arrays
from etfzoo.runtime.averaging import WeightAverage
from etfzoo.runtime.step_tf import Stepper
from testing import CHECKOUT, forked_python

pytestmark = pytest.mark.small_rn18

COUNTS = (1, 2, 1, 1)  # steps of one call
STEPS = sum(COUNTS)


def train(strategy, decay=0.35):
    """Weights after each step with those averaged, of a small network in float64."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = etfzoo.build_classifier(
            "rn18", 4, "etf", input_shape=(32, 32, 3), feature_norm="bn", dtype="float64"
        )
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9, name="sgd")
        optimizer.build(model.trainable_variables)
    average = WeightAverage(model, decay, strategy)
    stepper = Stepper(model, optimizer, strategy, weight_decay=1e-3, average=average)
    replicas = strategy.num_replicas_in_sync
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS, 12, 32, 32, 3), np.uint8)
    labels = rng.integers(4, size=(STEPS, 12)).astype(np.int32)

    def of_replica(context):
        data = tf.data.Dataset.from_tensor_slices((images, labels))
        return data.unbatch().batch(12 // replicas, drop_remainder=True)

    batches = iter(strategy.distribute_datasets_from_function(of_replica))
    states = [(as_arrays(model.variables), as_arrays(average.model.variables))]
    for count in COUNTS:
        stepper.train(batches, count)
        states.append((as_arrays(model.variables), as_arrays(average.model.variables)))
    return states


def check(states, decay=0.35):
    """That the average follows the weights, from the initial ones on, by the definition."""
    assert all(np.array_equal(states[0][0][n], states[0][1][n]) for n in states[0][0])
    step = 0
    for before, after, count in zip(states[:-1], states[1:], COUNTS, strict=True):
        step += count
        keep = min(decay, (1 + step) / (10 + step))
        moved = 0
        for name, average in after[1].items():
            if name == "logits/kernel":  # a fixed ETF
                np.testing.assert_array_equal(average, states[0][0][name])
            elif count == 1:  # of two steps the weights between are not known
                expected = keep * before[1][name] + (1 - keep) * after[0][name]
                np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
            moved += not np.array_equal(average, after[0][name])
        assert moved > 30


@pytest.mark.slow  # tests/training/loop_test.py has a quick one
def test_the_average_follows_the_weights():
    states = train(tf.distribute.get_strategy())
    check(states)
    names = {name.rsplit("/", 1)[-1] for name in states[0][1]}
    assert {"kernel", "gamma", "beta", "moving_mean", "moving_variance"} <= names


_MIRRORED = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import averaging_test
from etfzoo.runtime import strategy
with open(sys.argv[2], "wb") as file:
    pickle.dump(averaging_test.train(strategy.get_strategy("mirrored", None, 2)), file)
"""


@pytest.mark.slow
def test_two_devices_follow_their_weights_too(tmp_path):
    forked_python(_MIRRORED, CHECKOUT / "tests/runtime", tmp_path / "states")
    check(pickle.loads((tmp_path / "states").read_bytes()))

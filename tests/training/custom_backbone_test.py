"""A backbone with dropout through the loop: stopped and resumed, averaged, published, loaded."""

import shutil

import keras
import numpy as np
import pytest
from keras import layers

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint, weights
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from testing import assert_close, last_checkpoint, random_pixels

SIDE = 16


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Path of a published network of one's own, with draws in training."""
    images = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 255)(images)
    x = layers.Conv2D(8, 3, strides=2)(x)
    x = layers.BatchNormalization(momentum=0.8)(x)
    x = keras.Sequential([layers.Conv2D(12, 3), layers.Dropout(0.5)])(layers.ReLU()(x))
    x = layers.SpatialDropout2D(0.2)(x)
    model = etfzoo.build_classifier(keras.Model(images, x), 5, input_shape=(SIDE, SIDE, 3))
    return etfzoo.publish(model, tmp_path_factory.mktemp("zoo") / "custom_etf.start")


@pytest.fixture(scope="module")
def config(pretrained, embedded_dir):
    return TrainConfig(
        dataset="digits",
        data_dir=str(embedded_dir),
        init=str(pretrained),
        backbone="custom",
        head="linear",
        image_size=SIDE,
        augment="shift",
        flip=False,
        epochs=2,
        batch_size=50,
        learning_rate=0.05,
        eval_split="select",
        checkpoint_every=1,
        keep_checkpoints=1000,
        ema=0.9,
    )


def seeds(arrays):
    return {path: array for path, array in arrays.items() if "seed_" in path}


@pytest.mark.timeout(900)  # two trainings and two publications
def test_resumed_run_is_bit_equal(config, tmp_path):
    whole = loop.train_and_evaluate(config, tmp_path / "whole")
    arrays, state = last_checkpoint(tmp_path / "whole")
    moved = seeds({k: v for k, v in arrays.items() if k.startswith("trained/")})
    steps = state["epoch"] * (state["history"][0]["step"])
    assert [v[1] for v in moved.values()] == [steps] * 2  # a draw a step, of each dropout

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    for path in checkpoint.CheckpointManager(stopped).paths():
        if checkpoint.step_of(path) > steps // 3:
            path.unlink()
    (stopped / "result.json").unlink()
    layers.Dropout(0.1), layers.Conv2D(1, 1)  # that it was not the first to be built is no matter
    assert loop.train_and_evaluate(config, stopped) == whole
    again, _ = last_checkpoint(stopped)
    assert again.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(again[path], array)

    model = checkpoint.load_model(stopped)
    assert model.spec.backbone == "custom" and model.spec.head == "linear"
    folder = etfzoo.publish(model, tmp_path / "custom_linear.digits")
    loaded = etfzoo.load(folder)
    assert loaded.spec == model.spec == etfzoo.spec(folder)
    arrays = weights.as_arrays(loaded.variables)
    for path, array in weights.as_arrays(model.variables).items():
        np.testing.assert_array_equal(arrays[path], array)
    images = random_pixels(side=SIDE)
    np.testing.assert_array_equal(loaded(images), model(images))

    import tensorflow as tf

    served = tf.saved_model.load(str(folder))
    assert_close(served.signatures["serving_default"](images=tf.constant(images))["logits"],
                 model(images))  # fmt: skip
    assert set(served.signatures["features"](images=tf.constant(images))) == {"features", "map"}
    drawn = [np.asarray(served(images, training=True)["features"]) for _ in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3  # dropout draws anew there, too


def test_settings_that_do_not_fit():
    for changes, message in (
        ({"backbone": "custom"}, "can be fine-tuned only"),
        ({"backbone": "keras:VGG16", "norm": "sw"}, "`norm=sw` is for rn18"),
        ({"backbone": "keras:VGG16", "zero_gamma": True}, "`initializer=he_fan_out` and `zero"),
        ({"backbone": "keras:VGG17"}, "did you mean keras:VGG1"),
    ):
        with pytest.raises(EtfzooError, match=message):
            TrainConfig(dataset="digits", **changes)

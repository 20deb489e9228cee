"""One short run that is real, against a training written out."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.datasets import DATASETS
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.models.checkpoint import load_model
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def trained(embedded_dir, tmp_path_factory):
    """Workdir, result and data of a run of 3 epochs of a step: rounding grows from step to step."""
    row = dataclasses.replace(
        DATASETS["digits"], train="train[:20%]", fit="train[20%:65%]", select="validation[:30%]",
        test="test[:10%]", metric="mean_per_class",
    )  # fmt: skip
    config = TrainConfig(
        "digits", data_dir=str(embedded_dir), train_split="fit", eval_split="select",
        backbone="rn18", feature_norm="bn", scale=3.0, mean=(120.0,) * 3, std=(60.0,) * 3,
        image_size=16, crop=1.0, augment="shift", flip=True, epochs=3, batch_size=80, seed=3,
        learning_rate=0.0002, warmup_epochs=1.0, momentum=0.8, nesterov=True, weight_decay=0.5,
        decay_all=True, label_smoothing=0.2, eval_every=2, keep_checkpoints=1,
    )  # fmt: skip
    workdir = Workdir(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", row)
        result = loop.train_and_evaluate(config, workdir)
        yield workdir, result, resolve("digits", config.data_dir)


def by_hand(source):
    """The same training without the code of `etfzoo.training` and `etfzoo.runtime`."""
    keras.utils.set_random_seed(3)
    model = etfzoo.build_classifier(
        "rn18", 10, "etf", "bn", (16, 16, 3), feature_norm="bn", scale=3.0, seed=3,
        mean=(120.0,) * 3, std=(60.0,) * 3, crop=1.0,
    )  # fmt: skip
    images = Pipeline(source, 16, 16, 1.0, 80, Augmentation("shift", flip=True), seed=3)
    start = [np.array(v.value) for v in model.variables]
    variables = model.trainable_variables
    velocity = [np.zeros(v.shape, np.float32) for v in variables]
    losses = []
    for epoch, rate in enumerate((0.0, 0.0002, 0.0001)):  # a warm-up, then a cosine of two steps
        ((pixels, labels),) = images.training("fit", epoch)
        target = 0.8 * np.eye(10)[labels] + 0.02
        with tf.GradientTape() as tape:
            logits = model(pixels, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, logits))
        gradients = tape.gradient(loss, [v.value for v in variables])
        for i, (v, g) in enumerate(zip(variables, gradients, strict=True)):
            step = rate * (g.numpy() + 0.5 * np.array(v.value))
            velocity[i] = 0.8 * velocity[i] - step
            v.assign_add(0.8 * velocity[i] - step)
        losses.append(float(loss))
    logits, labels = (
        np.concatenate(part)
        for part in zip(
            *((model(x, training=False), y) for x, y in images.evaluation("select")), strict=True
        )
    )
    return start, model, losses, logits, labels


def test_a_run_is_the_training_written_out(trained):
    workdir, result, source = trained
    start, model, losses, logits, labels = by_hand(source)
    rows = workdir.history()
    assert [row["epoch"] for row in rows if "top1" in row] == [2, 3] and rows[-1] == result
    np.testing.assert_allclose([row["train_loss"] for row in rows], losses, rtol=1e-5)
    there = load_model(workdir)
    for found, wanted, first in zip(there.variables, model.variables, start, strict=True):
        way = np.abs(wanted.value - first).max()
        np.testing.assert_allclose(found.value, wanted.value, rtol=0, atol=0.02 * way + 1e-7)
    np.testing.assert_array_equal(
        there.get_layer("logits").kernel, model.get_layer("logits").kernel
    )
    assert result["examples"] == len(labels) == 90
    assert result["top1"] == pytest.approx(np.mean(logits.argmax(1) == labels), abs=1.01 / 90)
    p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -(0.8 * p[np.arange(len(labels)), labels] + 0.02 * p.sum(1)).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-4)

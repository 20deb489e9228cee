"""The frame that follows the features: where it goes, what keeps it, and what it can't be."""

import dataclasses
import importlib.util
import shutil

import keras
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

import etfzoo
from etfzoo.data.datasets import Dataset
from etfzoo.data.loading import load as images_of
from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.layers import frames
from etfzoo.models import weights
from etfzoo.models.classifier import ClassifierSpec, replace_head
from etfzoo.models.spec import ETF_FIELDS
from etfzoo.training import build, guidance, loop
from etfzoo.training.config import TrainConfig
from testing import CLASS_NAMES, fresh_python, last_checkpoint, make_classifier, random_pixels

pytestmark = pytest.mark.small_rn18

KERNEL = "logits/kernel"


@pytest.fixture(scope="module")
def config(embedded_dir):
    return TrainConfig(
        dataset="digits", data_dir=str(embedded_dir), backbone="rn18", head="etf", guided=True,
        feature_norm="bn_l2", initializer="he_fan_out", zero_gamma=True, image_size=16, crop=1.0,
        augment="shift", flip=False, epochs=3, batch_size=50, learning_rate=0.05,
        mean=(127.5,) * 3, std=(64.0,) * 3, eval_split="select", checkpoint_every=1,
        keep_checkpoints=100, ema=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run that kept a checkpoint of each of its 12 steps."""
    workdir = tmp_path_factory.mktemp("guided")
    return workdir, loop.train_and_evaluate(config, workdir)


def arrays_of(workdir, step):
    with np.load(workdir / f"checkpoints/step-{step:010d}.npz") as file:
        return {name: file[name] for name in file if name != "state"}


def digits_mean(config, arrays):
    """Means of what the head multiplies, by Keras alone and NumPy, of all training images."""
    spec = dataclasses.replace(
        ClassifierSpec("rn18", 10, feature_norm="bn_l2"), class_names=tuple("0123456789"),
        input_shape=(16, 16, 3), crop=1.0, mean=config.mean, std=config.std,
    )  # fmt: skip
    model = etfzoo.ImageClassifier(spec)
    weights.assign(
        model.variables,
        {k.removeprefix("trained/"): v for k, v in arrays.items() if k.startswith("trained/")},
    )
    pairs = images_of("digits", "train", model, batch_size=50, data_dir=config.data_dir)
    pictures, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    taps = keras.Model(model.input, model.taps["features"])
    h = np.asarray(taps.predict(pictures, verbose=0), np.float64)
    norm = model.get_layer("logits").batch_norm
    h = (h - norm.moving_mean) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    h = h * np.asarray(norm.gamma) + np.asarray(norm.beta)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    return np.stack([h[labels == k].mean(0) for k in range(10)])


def test_each_epoch_begins_with_the_nearest_etf(config, finished):
    workdir, _ = finished
    kernels = [arrays_of(workdir, step)[f"trained/{KERNEL}"] for step in range(1, 13)]
    drawn = frames.simplex_etf(10, 32, config.seed).T.astype("float32")
    # As it was drawn in the first of 4 steps each; then turned once an epoch.
    for number, kernel in enumerate(kernels):
        np.testing.assert_array_equal(kernel, kernels[number // 4 * 4])
    np.testing.assert_array_equal(kernels[0], drawn)
    for step in (4, 8):
        before = kernels[step - 1].T.astype(np.float64)
        means = digits_mean(config, arrays_of(workdir, step))
        centred = means - means.mean(0)
        centred /= np.linalg.norm(centred)
        rotation, _ = orthogonal_procrustes(before, 2 * centred / np.sqrt(10) + 1e-3 * 0.9 * before)
        assert np.abs(before @ rotation - before).max() > 0.05
        np.testing.assert_allclose(kernels[step].T, before @ rotation, atol=1e-4)
        assert np.trace(kernels[step] @ centred) > 1.05 * np.trace(kernels[step - 1] @ centred)


def test_the_average_has_the_same_frame(finished):
    for step in (4, 5, 9, 12):
        arrays = arrays_of(finished[0], step)
        averaged = arrays[f"model/{KERNEL}"]
        assert frames.is_simplex_etf(averaged.T, 1e-6)
        # Moved to that of the model whenever it turns, so that their difference is 0.
        np.testing.assert_array_equal(averaged, arrays[f"trained/{KERNEL}"])


# Between two epochs, where the frame is about to turn; inside of one; at the end.
@pytest.mark.parametrize("step", [4, 6, 8, 11])
def test_resuming_ends_bit_equal(finished, config, tmp_path, step):
    workdir, _ = finished
    (tmp_path / "checkpoints").mkdir()
    name = f"checkpoints/step-{step:010d}.npz"
    shutil.copy(workdir / name, tmp_path / name)
    shutil.copy(workdir / "config.json", tmp_path)
    loop.train_and_evaluate(dataclasses.replace(config, checkpoint_every=100), tmp_path)
    (whole, state), (resumed, other) = last_checkpoint(workdir), last_checkpoint(tmp_path)
    assert state == other
    for path, array in whole.items():
        np.testing.assert_array_equal(resumed[path], array, path)


def test_it_is_published_and_loaded_as_it_is(finished, tmp_path):
    model = etfzoo.load(finished[0])
    assert model.spec.guided
    kernel = weights.as_arrays(model.variables)[KERNEL]
    folder = etfzoo.publish(model, tmp_path / "rn18_etf.digits")
    half = etfzoo.publish(model, tmp_path / "rn18_etf.half", storage="float16")
    model.save(tmp_path / "model.keras")
    images = random_pixels(side=16)
    for loaded in (etfzoo.load(folder), keras.saving.load_model(tmp_path / "model.keras")):
        assert loaded.spec == model.spec
        np.testing.assert_array_equal(weights.as_arrays(loaded.variables)[KERNEL], kernel)
        np.testing.assert_array_equal(loaded(images), model(images))
    assert np.abs(etfzoo.load(half).get_layer("logits").kernel - kernel).max() < 1e-3
    assert "fixed ETF head, turned to the class means, 10 classes" in etfzoo.info(folder)["card"]
    assert not etfzoo.load(folder, num_classes=4, head="etf").spec.guided
    assert not replace_head(model, 4, "etf").spec.guided


def test_what_is_no_etf_is_neither_published_nor_loaded(tmp_path):
    model = make_classifier("etf", guided=True)
    kernel = model.get_layer("logits").kernel
    turned = np.asarray(kernel).T @ frames.haar_frame(32, 32, 5)
    kernel.assign(turned.T)
    folder = etfzoo.publish(model, tmp_path / "m")
    np.testing.assert_array_equal(etfzoo.load(folder).get_layer("logits").kernel, kernel)
    kernel.assign(turned.T + 0.01 * np.random.default_rng(0).normal(size=kernel.shape))
    with pytest.raises(EtfzooError, match="not those of its spec: logits/kernel is no simplex ETF"):
        etfzoo.publish(model, tmp_path / "other")
    # One that stays as it is drawn must be that of its seed.
    plain = make_classifier("etf")
    plain.get_layer("logits").kernel.assign(turned.T)
    with pytest.raises(EtfzooError, match="is not the simplex_etf of seed 0"):
        etfzoo.publish(plain, tmp_path / "other")


def test_what_does_not_go_together():
    assert ETF_FIELDS["guided"] is False
    with pytest.raises(EtfzooError, match="guided belong to the etf head"):
        ClassifierSpec("rn18", 5, "linear", guided=True)
    for frame in ("centred_etf", "orthogonal", "softmax_code"):
        with pytest.raises(EtfzooError, match=f"turns a simplex ETF .* no {frame}: leave out `fra"):
            ClassifierSpec("rn18", 5, guided=True, frame=frame)


def test_a_frame_that_is_kept_with_its_head():
    source = Source("pictures", Dataset("", 7), CLASS_NAMES)
    config = TrainConfig("pictures", init="x", keep_head=True, image_size=32)
    start = make_classifier("etf", guided=True)
    turned = np.asarray(start.get_layer("logits").kernel).T @ frames.haar_frame(32, 32, 5)
    start.get_layer("logits").kernel.assign(turned.T)
    stored = weights.StoredModel.of(start)
    for guided in (False, True):  # as what else belongs to the head
        kept = build.make_model(dataclasses.replace(config, guided=guided), source, lambda: stored)
        assert kept.spec.guided
        np.testing.assert_array_equal(kept.get_layer("logits").kernel, turned.T.astype("float32"))
    with pytest.raises(EtfzooError, match="an ETF that stays as it is: leave out `guided`"):
        stored = weights.StoredModel.of(make_classifier("etf"))
        build.make_model(dataclasses.replace(config, guided=True), source, lambda: stored)


class Extracted:
    """Features in place of those of a network."""

    def __init__(self, *batches):
        self.parts = batches

    def batches(self, pipeline, split):
        yield from self.parts


def guide_of(*batches):
    guide = guidance.Guide(make_classifier("etf", guided=True, feature_norm="none"), None)
    guide._extractor = Extracted(*batches)
    return guide


def test_class_means():
    rng = np.random.default_rng(0)
    h, labels = rng.normal(size=(40, 32)).astype("float32"), rng.integers(6, size=40)
    found = guide_of((h[:25], labels[:25]), (h[25:], labels[25:])).class_means(None, "train")
    wanted = np.stack([h[labels == k].astype(np.float64).mean(0) for k in range(6)])
    np.testing.assert_allclose(found[:6], wanted, rtol=1e-12)
    np.testing.assert_allclose(found[6], wanted.mean(0), rtol=1e-12)  # of which there is none
    h[3] = np.inf
    with pytest.raises(TrainingDiverged, match="features of the training split are not finite"):
        guide_of((h, labels)).turn(None, "train")


@pytest.mark.parametrize("kind", ["trained", "etf"])
def test_a_run_behind_a_projector(config, tmp_path, kind):
    """From a pretrained model the frame turns before the first step, too."""
    start = make_classifier(None, input_shape=(16, 16, 3), num_classes=None, class_names=None)
    config = dataclasses.replace(
        config, init="x", initializer="glorot_uniform", zero_gamma=False, epochs=1, ema=0.0,
        projector_layers=1, projector_kind=kind, feature_norm="none", entropy_weight=0.05,
    )  # fmt: skip
    loop.train_and_evaluate(config, tmp_path, lambda: weights.StoredModel.of(start))
    model = etfzoo.load(tmp_path)
    assert model.spec.projector_kind == kind and model.spec.guided
    kernel = np.asarray(model.get_layer("logits").kernel)
    assert kernel.shape == (32, 10) and frames.is_simplex_etf(kernel.T, 1e-6)
    assert np.abs(kernel - frames.simplex_etf(10, 32, config.seed).T).max() > 0.05
    np.testing.assert_array_equal(arrays_of(tmp_path, 1)[f"model/{KERNEL}"], kernel)


def run_and_save(config, strategy, devices, out):
    """A run of two epochs on some devices, in a process of its own; its frame and figures."""
    config = dataclasses.replace(
        TrainConfig.load(config), strategy=strategy, num_virtual_devices=devices or None,
        batch_size=48, epochs=2, entropy_weight=0.1,
    )  # fmt: skip
    result = loop.train_and_evaluate(config, f"{out}.run")
    arrays, _ = last_checkpoint(f"{out}.run")
    np.savez(out, kernel=arrays[f"trained/{KERNEL}"], loss=result["train_loss"])


_RUN = """
import sys, guidance_test
from testing import small_rn18

with small_rn18():
    guidance_test.run_and_save(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4])
"""


@pytest.mark.slow
def test_several_replicas_and_jax_come_to_the_same_frame(config, tmp_path):
    config.save(tmp_path / "config.json")
    found = {}
    cases = [("one_device", 0, "tensorflow"), ("mirrored", 2, "tensorflow"),
             ("mirrored", 2, "jax")]  # fmt: skip
    if importlib.util.find_spec("jax") is None:
        cases.pop()
    for strategy, devices, backend in cases:
        out = tmp_path / f"{strategy}{devices}{backend}.npz"
        fresh_python(_RUN, tmp_path / "config.json", strategy, devices, out, KERAS_BACKEND=backend)
        found[out.name] = dict(np.load(out))
    one = found.pop("one_device0tensorflow.npz")
    assert np.abs(one["kernel"].T - frames.simplex_etf(10, 32, config.seed)).max() > 0.05
    for name, other in found.items():
        np.testing.assert_allclose(other["kernel"], one["kernel"], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-4, err_msg=name)

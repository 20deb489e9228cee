"""Initial weights: their law, that a block starts as its shortcut, and what they depend on."""

import dataclasses
import importlib.util
import json

import keras
import numpy as np
import pytest

import etfzoo
from etfzoo.data import sources
from etfzoo.errors import EtfzooError
from etfzoo.models import weights
from etfzoo.models.initialization import initialize
from etfzoo.training import build as assembly
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig
from testing import forked_python, fresh_python

CONFIG = TrainConfig(
    dataset="digits", backbone="rn18", head="linear", image_size=16, crop=1.0, augment="none",
    flip=False, epochs=1, batch_size=50, initializer="he_fan_out", zero_gamma=True,
)  # fmt: skip


def build(initializer="he_fan_out", zero_gamma=False, seed=0, backbone="rn18", **options):
    keras.utils.set_random_seed(7)  # what is drawn must not hang on it
    model = etfzoo.build_classifier(backbone, 40, input_shape=(32, 32, 3), **options)
    initialize(model, initializer, zero_gamma, seed)
    return model


def arrays(model):
    return weights.as_arrays(model.variables)


@pytest.mark.parametrize("backbone", ["rn18", "rn50"])
def test_kernels_are_normal_with_variance_two_over_fan_out(backbone):
    model = build(backbone=backbone, head="linear")
    kernels = {k: a for k, a in arrays(model).items() if a.ndim == 4}
    assert len(kernels) == {"rn18": 20, "rn50": 53}[backbone]
    ratios = []
    for path, kernel in kernels.items():
        fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
        z = kernel.ravel() / np.sqrt(2 / fan_out)
        # Five deviations of mean, variance and fourth moment of as many normal numbers.
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            error = np.mean(z**power) - moment
            assert abs(error) < 5 * np.sqrt(variance / z.size), (path, power)
        ratios.append(np.corrcoef(z[:3000], np.roll(z, 1)[:3000])[0, 1])
    assert abs(np.mean(ratios)) < 0.02
    head = model.get_layer("logits")
    limit = 1 / np.sqrt(head.kernel.shape[0])
    for values in (np.asarray(head.kernel), np.asarray(head.bias)):
        assert np.abs(values).max() <= limit
    assert np.asarray(head.kernel).std() == pytest.approx(limit / np.sqrt(3), rel=0.02)
    assert np.asarray(head.bias).std() > limit / 3


@pytest.mark.parametrize("backbone, norm", [("rn18", "bn"), ("rn50", "sw")])
def test_with_zero_gamma_each_block_is_its_shortcut(backbone, norm):
    model = build("glorot_uniform", True, backbone=backbone, norm=norm)
    plain = build("glorot_uniform", False, backbone=backbone, norm=norm)
    adds = [layer for layer in model.layers if isinstance(layer, keras.layers.Add)]
    assert len(adds) == {"rn18": 8, "rn50": 16}[backbone]
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    for network, zero in ((model, True), (plain, False)):
        inputs = [network.get_layer(layer.name).input for layer in adds]
        for shortcut, branch in keras.Model(network.input, inputs)(images, training=False):
            assert np.abs(np.asarray(shortcut)).max() > 0
            assert (np.abs(np.asarray(branch)).max() == 0) == zero
    before, after = arrays(plain), arrays(model)
    changed = [path for path in after if not np.array_equal(after[path], before[path])]
    assert len(changed) == len(adds) and all(k.endswith("_bn/gamma") for k in changed)


def test_the_seed_alone_decides():
    first = arrays(build(seed=3))
    keras.utils.set_random_seed(8)
    again = etfzoo.build_classifier("rn18", 40, input_shape=(32, 32, 3))
    initialize(again, "he_fan_out", False, 3)
    other = arrays(build(seed=4))
    for path, array in arrays(again).items():
        np.testing.assert_array_equal(array, first[path])
        if array.ndim == 4:
            assert abs(np.corrcoef(array.ravel(), other[path].ravel())[0, 1]) < 0.1, path
    # The fixed ETF is that of its own seed.
    fixed = etfzoo.build_classifier("rn18", 40, input_shape=(32, 32, 3))
    np.testing.assert_array_equal(fixed.get_layer("logits").kernel, first["logits/kernel"])


def test_glorot_without_zero_gamma_changes_nothing():
    keras.utils.set_random_seed(7)
    plain = arrays(etfzoo.build_classifier("rn18", 40, input_shape=(32, 32, 3)))
    for path, array in arrays(build("glorot_uniform")).items():
        np.testing.assert_array_equal(array, plain[path])


_REPLICAS = """
import sys, keras, numpy as np
from etfzoo.training import build as assembly; from etfzoo.models import weights
from etfzoo.runtime.averaging import WeightAverage
from etfzoo.training.config import TrainConfig
from etfzoo.data import sources
from etfzoo.runtime.strategy import get_strategy

path, out, data_dir = sys.argv[1:]
config = TrainConfig.load(path)
strategy = get_strategy("mirrored", num_virtual_devices=2)
source = sources.resolve("digits", data_dir)
keras.utils.set_random_seed(99)
with strategy.scope():
    model = assembly.make_model(config, source)
arrays = weights.as_arrays(model.variables)
for variable in model.trainable_variables:
    for replica in getattr(variable.value, "values", ()):
        np.testing.assert_array_equal(replica, arrays[variable.path])
        arrays["replicas"] = 1 + arrays.get("replicas", 0)
if keras.backend.backend() == "tensorflow":
    assert arrays.pop("replicas") == 2 * len(model.trainable_variables)
for path, array in weights.as_arrays(WeightAverage(model, 0.9, strategy).model.variables).items():
    np.testing.assert_array_equal(array, arrays[path])
np.savez(out, **arrays)
"""


@pytest.mark.parametrize(
    "backend, norm",
    [
        ("tensorflow", "bn"),
        pytest.param("jax", "sw", marks=pytest.mark.slow),
        pytest.param("tensorflow", "sw", marks=pytest.mark.slow),
        pytest.param("jax", "bn", marks=pytest.mark.slow),
    ],
)
def test_replicas_average_and_backends_start_alike(backend, norm, embedded_dir, tmp_path):
    """With a linear head nothing is left of Keras's draw: all variables are compared."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    config = dataclasses.replace(CONFIG, norm=norm)
    config.save(tmp_path / "config.json")
    arguments = tmp_path / "config.json", tmp_path / "out.npz", embedded_dir
    if backend == "tensorflow":
        forked_python(_REPLICAS, *arguments)
    else:
        fresh_python(_REPLICAS, *arguments, KERAS_BACKEND=backend)
    here = arrays(assembly.make_model(config, sources.resolve("digits", str(embedded_dir))))
    with np.load(tmp_path / "out.npz") as there:
        assert set(there) == set(here)
        for path, array in here.items():
            np.testing.assert_array_equal(there[path], array)


def test_settings(tmp_path):
    with pytest.raises(EtfzooError, match="unknown initializer 'he_fan_in'; did you mean he_fan"):
        dataclasses.replace(CONFIG, initializer="he_fan_in")
    for changes in ({"initializer": "he_fan_out"}, {"zero_gamma": True}):
        with pytest.raises(EtfzooError, match="for training from scratch"):
            TrainConfig("digits", init="somewhere", **changes)
    # Files of before these fields.
    values = dataclasses.asdict(TrainConfig("digits"))
    del values["initializer"], values["zero_gamma"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig("digits")
    for name in protocols.PROTOCOLS:
        for task in ("pretrain", "finetune"):
            config = TrainConfig("x", **protocols.settings(name, task, "rn50", None))
            he = (name, task) == ("sw_official", "pretrain")
            assert config.initializer == ("he_fan_out" if he else "glorot_uniform")
            assert not config.zero_gamma

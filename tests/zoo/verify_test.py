"""Tests that a published model is the model: whatever changes one of them is refused."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.models import weights
from etfzoo.zoo import manifest, publish, saved_model, verify
from testing import leftovers, make_classifier, random_pixels

pytestmark = pytest.mark.small_rn18


def quantized(model):
    model.quantize("int8")


def with_lora(model):
    model.get_layer("logits").enable_lora(2)


def with_another_activation(model):
    model.get_layer("logits").activation = keras.activations.softmax


def with_another_epsilon(model):
    model.get_layer("conv1_bn").epsilon = 0.5


def with_another_scale(model):
    model.get_layer("normalize").scale = [0.5, 0.5, 0.5]


def trained_fixed_head(model):
    kernel = model.get_layer("logits").kernel
    kernel.assign(kernel + 0.001 * np.random.default_rng(0).normal(size=kernel.shape))


def set_value(name, value):
    def change(model):
        (variable,) = (v for v in model.variables if v.path == name)
        array = np.array(variable)
        array.flat[3] = value
        variable.assign(array)

    change.__name__ = f"{name}={value}"
    return change


CHANGES = [
    (quantized, "linear", "changed since it was built, as quantize.*not in the model: .*scale"),
    (with_lora, "linear", "changed since it was built.*not in the model: .*lora"),
    (with_another_activation, "linear", "other outputs than its spec"),
    (with_another_epsilon, "etf", "other outputs than its spec"),
    (with_another_scale, None, "other outputs than its spec"),
    (trained_fixed_head, "etf", "logits/kernel is not the simplex_etf of seed 0"),
    (set_value("conv1_conv/kernel", np.nan), "etf", "conv1_conv/kernel has NaN or infinite"),
    (set_value("logits/bias", np.inf), "linear", "logits/bias has NaN or infinite"),
    (set_value("conv1_bn/moving_variance", -1e-3), None, "conv1_bn/moving_variance has negative"),
]


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize("change, head, message", CHANGES, ids=[c[0].__name__ for c in CHANGES])
def test_a_changed_model_is_not_published(change, head, message, tmp_path):
    model = make_classifier(head)
    change(model)
    with pytest.raises(etfzoo.EtfzooError, match=message) as error:
        etfzoo.publish(model, tmp_path / "m")
    assert str(error.value).isprintable() and leftovers(tmp_path) == []


def test_negative_variances_of_whitening(tmp_path):
    model = make_classifier("linear", norm="sw")
    verify.check_weights(weights.as_arrays(model.variables), "these")
    covariance = model.get_layer("conv1_bn").moving_covariance
    arrays = {"a/moving_covariance": -np.asarray(covariance)}
    with pytest.raises(etfzoo.EtfzooError, match="these are of no use: a/moving_cov.*negative"):
        verify.check_weights(arrays, "these")


def test_a_head_of_one_class(tmp_path):
    model = make_classifier("linear", num_classes=1, class_names=None)
    with pytest.raises(etfzoo.EtfzooError, match="a head of one class gives each image .*1:"):
        etfzoo.publish(model, tmp_path / "m")


@pytest.mark.parametrize(
    "options, storage",
    [
        ({"head": "etf", "dtype": "mixed_bfloat16"}, "float16"),
        ({"input_shape": (None, None, 3)}, "float32"),
    ],
)
def test_what_is_right_is_published(options, storage, tmp_path):
    """The other precisions and sizes, in which nothing is bit-equal with what is served."""
    model = make_classifier(**options)
    folder = etfzoo.publish(model, tmp_path / "m", storage=storage)
    assert etfzoo.load(folder).spec == model.spec


def test_what_was_rounded_to_float16_once_is_published_again(tmp_path):
    once = etfzoo.publish(make_classifier("etf"), tmp_path / "m", storage="float16")
    again = etfzoo.publish(etfzoo.load(once), tmp_path / "m", storage="float32")
    first, second = (weights.as_arrays(etfzoo.load(folder).variables) for folder in (once, again))
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path])


def test_a_weight_that_was_written_otherwise(tmp_path, monkeypatch):
    stored = saved_model._stored

    def off(variable, storage):
        value = stored(variable, storage)
        return tf.Variable(value + 1) if variable.path == "conv1_bn/beta" else value

    monkeypatch.setattr(saved_model, "_stored", off)
    with pytest.raises(etfzoo.EtfzooError, match="1 weights differ, conv1_bn/beta; please report"):
        etfzoo.publish(make_classifier(), tmp_path / "m")
    assert leftovers(tmp_path) == []


def test_a_graph_that_serves_other_numbers(tmp_path, monkeypatch):
    signatures = saved_model._signatures

    def off(spec, forward):
        def other(images):
            return {name: 1.05 * y for name, y in forward(images).items()}

        return signatures(spec, other)

    monkeypatch.setattr(saved_model, "_signatures", off)
    with pytest.raises(etfzoo.EtfzooError, match="would serve other outputs than the model"):
        etfzoo.publish(make_classifier(), tmp_path / "m")
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return etfzoo.publish(make_classifier(), tmp_path_factory.mktemp("models") / "m")


def damaged(version, folder, monkeypatch, **changes):
    """The version with some weights changed, as a publisher without these checks writes it."""
    model = etfzoo.load(version)
    for path, value in changes.items():
        set_value(path, value)(model)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "rebuilt", lambda model: None)
        patch.setattr(verify, "check_written", lambda *args: None)
        return etfzoo.publish(model, folder)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("conv1_conv/kernel", np.nan, "conv1_conv/kernel has NaN or infinite values"),
        ("conv1_bn/moving_variance", -1.0, "conv1_bn/moving_variance has negative variances"),
        ("logits/kernel", 0.5, "logits/kernel is not the simplex_etf of seed 0"),
    ],
)
def test_what_others_published_is_refused_at_load(
    version, path, value, message, tmp_path, monkeypatch
):
    folder = damaged(version, tmp_path / "m", monkeypatch, **{path: value})
    assert manifest.verify(folder)
    with pytest.raises(etfzoo.EtfzooError, match=message) as error:
        etfzoo.load(folder)
    assert str(folder) in str(error.value)
    if path == "logits/kernel":  # which a fresh head takes the place of
        etfzoo.load(folder, num_classes=3)
    else:
        with pytest.raises(etfzoo.EtfzooError, match=message):
            etfzoo.load(folder, head=None)


def test_the_graph_belongs_to_the_weights(version, tmp_path):
    """Another model's graph in the folder is another hash than the list's; nothing is read."""
    other = etfzoo.publish(make_classifier(seed=2, scale=3.0), tmp_path / "other")
    folder = shutil.copytree(version, tmp_path / "m/1")
    graph = (other / "saved_model.pb").read_bytes()
    assert graph != (folder / "saved_model.pb").read_bytes()
    (folder / "saved_model.pb").write_bytes(graph)
    with pytest.raises(etfzoo.EtfzooError, match=r"saved_model\.pb is damaged"):
        etfzoo.load(folder)


def test_what_is_served_is_what_is_loaded(version):
    images = random_pixels()
    serve = tf.saved_model.load(str(version)).signatures["serving_default"]
    served = np.asarray(serve(images=tf.constant(images))["logits"])
    loaded = np.asarray(etfzoo.load(version)(images))
    np.testing.assert_allclose(served, loaded, atol=1e-4 * np.abs(loaded).max())
    variables = json.loads((version / publish.METADATA).read_bytes())["variables"]
    assert variables.keys() == publish.Weights(version).keys()

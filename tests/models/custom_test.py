"""Backbones that are Keras models, against those models themselves."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers
from keras.applications import imagenet_utils

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.models import custom, folding, table, weights
from etfzoo.models.classifier import ImageClassifier
from testing import assert_close, random_pixels, randomize

SIDE = 32


def network(pooled=False, side=None):
    """A bit of all that such networks have, in a state that no initializer gives."""
    convnext = custom.internals.unnamed_layers()
    images = keras.Input((side, side, 3), name="photo")
    x = layers.Normalization(name="adapted")(images)
    x = keras.Sequential(
        [layers.Conv2D(8, 3, strides=2, padding="same"), layers.LayerNormalization()], name="stem"
    )(x)
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    y = layers.BatchNormalization(scale=False, name="after_depthwise")(y)
    y = layers.Conv2D(8, 1, name="mix_conv")(y)  # with a bias, which folds into the norm
    y = layers.BatchNormalization(name="mix_bn")(y)
    y = convnext["LayerScale"](0.5, 8)(layers.Activation("gelu")(y))
    y = convnext["StochasticDepth"](0.2)(y)
    x = x + layers.Dropout(0.3)(y)
    squeezed = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    x = layers.Multiply()([x, layers.Dense(8, activation="sigmoid")(squeezed)])
    x = layers.BatchNormalization(name="before_bn")(x)  # names that pair with the wrong layer
    x = layers.Conv2D(12, 1, use_bias=False, name="before_conv")(layers.ReLU()(x))
    if pooled:
        x = layers.Dense(5)(layers.Flatten()(x))
    model = keras.Model(images, x)
    rng = np.random.default_rng(0)
    for v in model.weights:
        if "float" in v.dtype:
            v.assign(np.abs(v + 0.2 * rng.normal(size=v.shape)) if "varia" in v.path else
                     v + 0.2 * rng.normal(size=v.shape))  # fmt: skip
    model.get_layer("adapted").adapt(random_pixels(8, seed=1))
    return model


def features_of(model, images):
    return keras.ops.convert_to_numpy(keras.Model(model.input, model.taps["features"])(images))


@pytest.mark.parametrize("pooled", [False, True])
def test_features_are_the_networks_own(pooled):
    source = network(pooled, side=SIDE if pooled else None)
    model = etfzoo.build_classifier(source, 4, input_shape=(SIDE, SIDE, 3))
    assert model.spec.backbone == "custom" and model.spec.std == (1, 1, 1)  # it norms by itself
    images = random_pixels()
    wanted = keras.ops.convert_to_numpy(source(images))
    assert_close(features_of(model, images), wanted if pooled else wanted.mean((1, 2)))
    assert set(model.taps) == {"features", "logits"} | (set() if pooled else {"map"})
    # Its own weights, and any layer as the start of another model.
    source.get_layer("mix_conv").kernel.assign(0 * source.get_layer("mix_conv").kernel)
    assert np.abs(model.get_layer("mix_conv").kernel).max() > 0
    inner = keras.Model(model.input, model.get_layer("mix_bn").output)(images)
    assert inner.shape == (4, 16, 16, 8)


@pytest.mark.parametrize("pixels", ["tf", "torch", "caffe"])
def test_pixels_are_those_of_keras_applications(pixels):
    source = keras.Sequential([keras.Input((SIDE, SIDE, 3)), layers.Conv2D(6, 3), layers.ReLU()])
    model = etfzoo.build_classifier(source, 3, pixels=pixels)
    assert model.spec.input_shape == (SIDE, SIDE, 3)  # the network's own
    images = random_pixels()
    given = imagenet_utils.preprocess_input(images.copy(), mode=pixels)
    wanted = keras.ops.convert_to_numpy(source(given)).mean((1, 2))
    assert_close(features_of(model, images), wanted, 2e-5)
    assert model.spec.bgr == (pixels == "caffe")
    assert ImageClassifier(model.spec).spec == model.spec


def test_mean_and_std_count_where_it_has_no_norm_of_its_own():
    source = keras.Sequential([keras.Input((8, 8, 3)), layers.Identity()])
    model = etfzoo.build_classifier(source, 3, mean=(1, 2, 3), std=(2, 4, 8))
    found = features_of(model, np.full([1, 8, 8, 3], 9, "float32"))
    np.testing.assert_allclose(found, [[4, 7 / 4, 6 / 8]])


def test_paths_of_weights_hang_on_nothing_that_was_built_before():
    model = etfzoo.build_classifier(network(), 4, input_shape=(SIDE, SIDE, 3))
    layers.Dropout(0.1), custom.internals.unnamed_layers()["LayerScale"](1.0, 3).build(None)
    twin = ImageClassifier(model.spec)
    paths = [v.path for v in model.variables]
    assert paths == [v.path for v in twin.variables] and len(set(paths)) == len(paths)
    assert {v.path for v in custom.read_network(model.spec.network).variables} < set(paths)
    names = [custom.describe(custom.application("keras:MobileNetV2")) for _ in range(2)]
    assert names[0] == names[1]


def test_keras_file_and_fresh_head(tmp_path):
    model = randomize(etfzoo.build_classifier(network(), 4, input_shape=(SIDE, SIDE, 3)))
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.spec == model.spec
    arrays = weights.as_arrays(loaded.weights)  # Keras's files have no state of random numbers
    for path, array in weights.as_arrays(model.weights).items():
        np.testing.assert_array_equal(arrays[path], array)
    images = random_pixels()
    np.testing.assert_array_equal(loaded(images), model(images))
    fresh = etfzoo.replace_head(model, 9, projector_layers=1)
    assert fresh.spec.projector_width == 12 and fresh.output_shape == (None, 9)
    np.testing.assert_array_equal(features_of(fresh, images), features_of(model, images))
    larger = model.at_size(48, 40)
    assert_close(larger(random_pixels(side=48)[:, :, :40]).shape, (4, 4))


def test_layers_take_the_dtype_policy_of_the_classifier():
    model = etfzoo.build_classifier(
        network(), 4, input_shape=(SIDE, SIDE, 3), dtype="mixed_bfloat16"
    )
    assert model.get_layer("mix_conv").compute_dtype == "bfloat16"
    assert model.output.dtype == model.get_layer("normalize").compute_dtype == "float32"
    single = ImageClassifier(dataclasses.replace(model.spec, dtype="float32"))
    assert {layer.compute_dtype for layer in single.layers} == {"float32"}
    assert single.spec.network == model.spec.network


def test_folding_goes_by_the_graph():
    model = randomize(etfzoo.build_classifier(network(), 4, input_shape=(SIDE, SIDE, 3)))
    for layer in model.layers:  # the layer keeps its constants
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_variance.assign(np.abs(layer.moving_variance) + 0.1)
    pairs = folding.norms_by_layer(model)
    assert {k.name: v.name for k, v in pairs.items()} == {"mix_conv": "mix_bn"}
    plain = keras.Model(model.input, model.output)
    folded = folding.fold_batch_norm(plain)
    arrays = folding.folded_weights(plain, weights.as_arrays(model.weights))
    weights.assign(folded.weights, {k: np.asarray(v) for k, v in arrays.items()})
    images = random_pixels()
    assert_close(folded(images), model(images))


def lambda_layer():
    images = keras.Input((SIDE, SIDE, 3))
    return keras.Model(images, layers.Lambda(lambda x: x + 1)(images))


class Own(layers.Layer):
    def call(self, x):
        return x


class Subclass(keras.Model):
    def call(self, x):
        return x


def of_shape(*shape):
    images = keras.Input(shape)
    return keras.Model(images, layers.Conv2D(4, 1)(images))


def vectors():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4)])


def two_inputs():
    a, b = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    return keras.Model([a, b], a + b)


def own_layer():
    return keras.Sequential([keras.Input((8, 8, 3)), Own()])


def sequence():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Reshape((64, 3))])


def taken_name():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 1, name="logits")])


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda_layer, "a Lambda layer holds code"),
        (own_layer, "Own is no layer of Keras's own"),
        (Subclass, "is a Subclass without one"),
        (two_inputs, "has 2 and 1"),
        (lambda: of_shape(8, 8, 1), r"it takes \(None, 8, 8, 1\)"),
        (vectors, "it takes"),
        (sequence, r"it gives \(None, 64, 3\)"),
        (taken_name, "has a layer logits"),
        (lambda: 5, "5 is a int without one"),
        (lambda: "keras:EfficientNetB9", "did you mean keras:EfficientNetB"),
        (lambda: "custom", "pass the model itself"),
    ],
)
def test_what_is_no_backbone(source, message):
    with pytest.raises(EtfzooError, match=message) as error:
        etfzoo.build_classifier(source(), 3)
    assert "\n" not in str(error.value)


def test_bad_combinations():
    source = of_shape(8, 8, 3)
    with pytest.raises(EtfzooError, match="unknown pixels 'cafe'; did you mean caffe"):
        etfzoo.build_classifier(source, 3, pixels="cafe")
    with pytest.raises(EtfzooError, match="rn18 takes `mean` and `std`"):
        etfzoo.build_classifier("rn18", 3, pixels="tf")
    with pytest.raises(EtfzooError, match="`norm=sw` is for rn18"):
        etfzoo.build_classifier(source, 3, norm="sw")
    fixed = network(pooled=True, side=SIDE)
    model = etfzoo.build_classifier(fixed, 3)
    with pytest.raises(EtfzooError, match="cannot take images of 48x48 pixels"):
        model.at_size(48, 48)


HOSTILE = [
    {"module": "keras.layers", "class_name": "Lambda"},
    {"module": "keras.layers", "class_name": "TFSMLayer"},
    {"module": "keras.layers", "class_name": "StringLookup"},
    {"module": "os", "class_name": "system"},
    {"module": "builtins", "class_name": "function", "config": "eval"},
    {"module": "keras.layers", "class_name": "Dense", "registered_name": "etfzoo>ETFClassifier"},
    {"module": None, "class_name": "__lambda__", "config": {"value": ""}},
    {"module": None, "class_name": "__typespec__", "config": []},
    {"module": "keras.utils", "class_name": "get_file"},
    {"module": "keras.src.saving.saving_lib", "class_name": "load_model"},
    {"module": "keras_hub.models", "class_name": "Backbone"},
    {"module": "keras.initializers", "class_name": "no_such"},
    {"module": "keras.layers", "class_name": 5},
]


@pytest.mark.parametrize("part", HOSTILE, ids=lambda part: str(part["class_name"]))
@pytest.mark.parametrize("place", ["layer", "argument"])
def test_a_strangers_config_is_refused_before_anything_is_built(part, place):
    config = json.loads(custom.describe(of_shape(8, 8, 3)))
    custom.check(config)
    if place == "layer":
        config["config"]["layers"].append(part | {"name": "x", "inbound_nodes": []})
    else:
        config["config"]["layers"][1]["config"]["kernel_initializer"] = part
    with pytest.raises(EtfzooError, match="no layer of Keras's own|holds code|damaged"):
        custom.read_network(json.dumps(config))


@pytest.mark.parametrize("text", ["", "[", "3", "{}", "[" * 10**5, '{"class_name": "Dense"}'])
def test_what_is_no_config(text):
    with pytest.raises(EtfzooError, match="a backbone's config is"):
        custom.read_network(text)


def test_a_broken_graph_and_wrong_shapes():
    config = json.loads(custom.describe(of_shape(8, 8, 3)))
    config["config"]["layers"][1]["inbound_nodes"] = []
    with pytest.raises(EtfzooError, match="a backbone cannot be built"):
        custom.read_network(json.dumps(config))
    text = custom.describe(of_shape(8, 8, 3)).replace('"filters":4', '"filters":4000000000')
    name = next(v.path for v in custom.read_network(text).weights)
    with pytest.raises(EtfzooError, match="instead of .*4000000000"):  # nothing was allocated
        custom.check_shapes(text, {name: (1, 1, 3, 4)})


def test_the_table_has_all_of_keras_applications():
    there = {n for n in dir(keras.applications) if callable(getattr(keras.applications, n))}
    assert set(table.APPLICATIONS) == there
    short = table.by_short_name()
    assert len(short) == len(table.BACKBONES) + len(table.OTHER_BACKBONES)
    assert short["efficientnetb0"] == "keras:EfficientNetB0" and short["rn18"] == "rn18"


def test_what_has_no_values_leaves_nothing_to_keras():
    """Keras would give such variables values when it builds the next layer."""
    network = custom.application("keras:MobileNetV2")
    made = custom.read_network(custom.describe(network))
    etfzoo.build_classifier(of_shape(8, 8, 3), 3)
    layers.Dense(3).build((None, 2))
    keras.Model(i := keras.Input((4,)), layers.Dense(2)(i))
    for v in (*network.weights, *made.weights):
        assert v._value is None and v._initializer is not None

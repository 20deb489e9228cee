"""Tests of the swap of batch norm for Switchable Whitening in KerasCV ResNets."""

import keras
import keras_cv
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.layers import SwitchableWhitening
from etfzoo.models import backbones, weights
from etfzoo.models.table import BACKBONES
from testing import randomize

# Pan et al. 2019, and their networks: the stem and every second block of stages 1 to 3. KerasCV
# counts stages from 0 and blocks from 1.
PLACES = {
    "rn18": (1, {0: [2], 1: [2], 2: [2]}),
    "rn34": (1, {0: [2], 1: [2, 4], 2: [2, 4, 6]}),
    "rn50": (2, {0: [2], 1: [2, 4], 2: [2, 4, 6]}),
    "rn101": (2, {0: [2], 1: [2, 4], 2: list(range(2, 23, 2))}),
}
COUNTS = {"rn18": 4, "rn34": 7, "rn50": 7, "rn101": 15}


def whitenings(model):
    return [x for x in model.layers if isinstance(x, SwitchableWhitening)]


def images(n=4, side=32):
    return np.random.default_rng(0).uniform(0, 255, (n, side, side, 3)).astype(np.float32)


def keras_cv_resnet(blocks=(1, 2, 1, 1), block_type="basic_block"):
    return keras_cv.models.ResNetBackbone(
        stackwise_filters=[64, 32, 48, 64],
        stackwise_blocks=list(blocks),
        stackwise_strides=[1, 2, 2, 2],
        block_type=block_type,
        include_rescaling=False,
        input_shape=(None, None, 3),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_places(backbone):
    plain = etfzoo.build_classifier(backbone, 5, "linear", input_shape=(32, 32, 3))
    model = etfzoo.build_classifier(backbone, 5, "linear", "sw", (32, 32, 3))
    number, stages = PLACES[backbone]
    wanted = {"conv1_bn"} | {
        f"v2_stack_{stage}_block{block}_{number}_bn" for stage in stages for block in stages[stage]
    }
    layers = whitenings(model)
    assert {layer.name for layer in layers} == wanted and len(layers) == COUNTS[backbone]
    for layer in layers:
        assert (layer.group_size, layer.sw_type, layer.iterations) == (16, 2, 5)
        assert (layer.epsilon, layer.momentum, layer.tie_weight) == (1e-5, 0.9, False)
    # Everything else is what it was: order, classes and names of layers, taps, weights but for
    # two pairs of logits a layer and the covariances.
    assert [x.name for x in model.layers] == [x.name for x in plain.layers]
    same = [type(x) for x in model.layers if x.name not in wanted]
    assert same == [type(x) for x in plain.layers if x.name not in wanted]
    assert {t: v.shape for t, v in model.taps.items()} == {
        t: v.shape for t, v in plain.taps.items()
    }
    more = sum(int(np.prod(v.shape)) for v in model.trainable_variables) - sum(
        int(np.prod(v.shape)) for v in plain.trainable_variables
    )
    assert more == 4 * len(layers)


@pytest.mark.parametrize(
    "block_type, wanted",
    [
        ("basic_block", {"conv1_bn", "v2_stack_1_block2_1_bn"}),
        ("block", {"conv1_bn", "v2_stack_1_block2_2_bn"}),
    ],
)
def test_any_keras_cv_resnet(block_type, wanted, tmp_path):
    network = randomize(keras_cv_resnet(block_type=block_type))
    network.get_layer("conv1_conv").trainable = False
    copy = backbones.whiten(network, sw_type=5, group_size=8, momentum=0.8)
    layers = whitenings(copy)
    assert {layer.name for layer in layers} == wanted
    assert {(x.sw_type, x.group_size, x.momentum) for x in layers} == {(5, 8, 0.8)}
    assert not copy.get_layer("conv1_conv").trainable
    assert [x.name for x in copy.layers] == [x.name for x in network.layers]
    mine, theirs = weights.as_arrays(copy.variables), weights.as_arrays(network.variables)
    kept = {path for path in theirs if path.split("/")[0] not in wanted}
    assert kept == {path for path in mine if path.split("/")[0] not in wanted}
    for path in kept:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)
    copy.save(tmp_path / "copy.keras")
    loaded = keras.models.load_model(tmp_path / "copy.keras")
    x = images(2, 40) / 255
    np.testing.assert_array_equal(loaded(x), copy(x))
    assert loaded(images(3, 24)).shape == (3, 1, 1, copy.output_shape[-1])


def test_the_first_layer_whitens():
    # Without an affine part, and with bw alone, the stem's output is white over the batch.
    network = keras_cv_resnet()
    copy = backbones.whiten(network, sw_type=1, iterations=25, epsilon=1e-9)
    stem = keras.Model(copy.input, copy.get_layer("conv1_bn").output)
    y = np.asarray(stem(images(16, 64), training=True), np.float64).reshape(-1, 4, 16)
    for group in range(4):
        np.testing.assert_allclose(np.cov(y[:, group].T, bias=True), np.eye(16), atol=0.05)


def test_not_a_resnet():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(inputs), name="net")
    with pytest.raises(EtfzooError, match="net is not a KerasCV ResNet"):
        backbones.whiten(model)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float64"])
def test_dtypes(dtype):
    model = etfzoo.build_classifier("rn18", 5, "linear", "sw", (32, 32, 3), dtype=dtype)
    compute = dtype.removeprefix("mixed_")
    wide = "float32" if compute == "bfloat16" else compute
    for layer in whitenings(model):
        assert layer.compute_dtype == compute
        assert {v.dtype for v in layer.variables} == {wide}
    assert np.isfinite(np.asarray(model(images(), training=True), np.float64)).all()


@pytest.mark.usefixtures("small_network")
def test_published_network_is_loaded_and_fine_tuned(tmp_path):
    """`etfzoo.load` gives the same network; the bare SavedModel takes a gradient step."""
    model = etfzoo.build_classifier("rn18", 5, "linear", "sw", (32, 32, 3))
    for _ in range(3):
        model(images(), training=True)
    path = etfzoo.publish(model, tmp_path / "rn18_sw.noise")
    loaded = etfzoo.load(tmp_path / "rn18_sw.noise")
    assert loaded.spec == model.spec and len(whitenings(loaded)) == 2
    np.testing.assert_array_equal(loaded(images()), model(images()))

    bare = tf.saved_model.load(str(path))
    np.testing.assert_allclose(bare(images())["logits"], model(images()), rtol=1e-4, atol=1e-5)
    names = sorted(n for n in bare.weights if bare.weights[n].trainable)
    variables = [bare.weights[name] for name in names]
    before = {name: bare.weights[name].numpy() for name in bare.weights}
    with tf.GradientTape() as tape:
        logits = bare(images(), training=True)["logits"]
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 2, 3], logits))
    with tf.GradientTape() as keras_tape:
        keras_logits = model(images(), training=True)
        keras_loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 2, 3], keras_logits)
        )
    np.testing.assert_allclose(loss, keras_loss, rtol=1e-4)
    wanted = keras_tape.gradient(keras_loss, [v.value for v in model.trainable_variables])
    wanted = {v.path: g for v, g in zip(model.trainable_variables, wanted, strict=True)}
    gradients = tape.gradient(loss, variables)
    for name, variable, gradient in zip(names, variables, gradients, strict=True):
        other = wanted[name.replace("%2F", "/")]
        scale = float(tf.norm(other)) + 1e-6
        assert float(tf.norm(gradient - other)) < 1e-3 * scale, name
        variable.assign_sub(0.1 * gradient)
    for name in names:
        assert np.any(bare.weights[name].numpy() != before[name]), name
    moved = "conv1_bn%2Fmoving_covariance"
    assert np.any(bare.weights[moved].numpy() != before[moved])


def test_moving_variance_is_biased_and_moves_by_a_tenth():
    """As in Keras; torch would take n/(n - 1) times it. The momentum is torch's."""
    model = etfzoo.build_classifier("rn18", 4, input_shape=(32, 32, 3))
    layer = model.get_layer("v2_stack_3_block2_2_bn")
    x = np.random.default_rng(0).normal(size=(2, 1, 2, 512)).astype("float32")  # n = 4 of each
    layer(x, training=True)
    biased = 0.9 * 1 + 0.1 * x.reshape(4, 512).var(0)
    np.testing.assert_allclose(layer.moving_variance, biased, rtol=1e-4)
    unbiased = 0.9 * 1 + 0.1 * x.reshape(4, 512).var(0, ddof=1)
    assert np.abs(np.asarray(layer.moving_variance) - unbiased).max() > 0.01


def test_settings_of_keras_that_do_not_go_are_one_line(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(keras.config, "image_data_format", lambda: "channels_first")
        with pytest.raises(EtfzooError, match="^image_data_format of Keras is channels_first"):
            etfzoo.build_classifier("rn18", 7)
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    with pytest.raises(EtfzooError, match="^TF_USE_LEGACY_KERAS asks for Keras 2"):
        etfzoo.build_classifier("rn18", 7)

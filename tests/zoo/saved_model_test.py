"""Tests of the SavedModel: what is stored, what the signatures compute, and training it again."""

import dataclasses
import gc
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import etfzoo
from etfzoo.models.table import BACKBONES
from etfzoo.zoo import publish, saved_model
from testing import CLASS_NAMES as NAMES
from testing import SIDE, assert_close, leftovers
from testing import make_classifier as make
from testing import random_pixels as pixels

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def version(model, tmp_path_factory):
    return etfzoo.publish(model, tmp_path_factory.mktemp("models") / "rn18_etf.test")


@pytest.fixture(scope="module")
def served(version):
    return tf.saved_model.load(version)


def test_weights_are_stored_once(model, version):
    size = sum(p.stat().st_size for p in (version / "variables").iterdir())
    assert size <= 1.02 * sum(v.numpy().nbytes for v in model.variables)
    shapes = tf.train.load_checkpoint(str(version / "variables/variables"))
    keys = set(shapes.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert len(keys) == len(model.variables)
    assert "weights/conv1_conv%2Fkernel/.ATTRIBUTES/VARIABLE_VALUE" in keys


def test_every_variable_is_stored_bit_for_bit(model, version):
    arrays = publish.Weights(version)
    assert arrays.keys() == {v.path for v in model.variables}
    assert "logits/kernel" in arrays and "conv1_bn/moving_variance" in arrays
    for v in model.variables:
        np.testing.assert_array_equal(arrays[v.path], v.numpy())


@pytest.mark.parametrize("path", ["a/b", "a.b", "a%2Fb", "%/.", "a/.S/b..c", "%252E"])
def test_escaped_paths_round_trip(path):
    key = saved_model.escape(path)
    assert "/" not in key and "." not in key
    assert saved_model.unescape(key) == path


def test_serving_default(model, served):
    x = pixels()
    outputs = served.signatures["serving_default"](images=x)
    logits = model(x).numpy()
    assert set(outputs) == {"logits", "probabilities", "class_ids"}
    assert_close(outputs["logits"], logits)
    assert_close(outputs["probabilities"], tf.nn.softmax(logits))
    np.testing.assert_array_equal(outputs["class_ids"], logits.argmax(-1))


def test_features(model, served):
    outputs = served.signatures["features"](images=pixels())
    maps = {"stem": (8, 64), "stage1": (8, 64), "stage2": (4, 32)}
    expected = etfzoo.feature_model(model, (*maps, "features"))(pixels())
    assert set(outputs) == set(expected)
    for name, (side, channels) in maps.items():
        assert outputs[name].shape == (4, side, side, channels)
    for name, y in expected.items():
        assert_close(outputs[name], y)


def encode(image, format):
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def photographs():
    """Encoded files of mixed sizes, kinds and channels, smooth so that codecs agree on them."""
    files = []
    for i, (mode, format, width, height) in enumerate(
        [
            ("RGB", "PNG", 32, 32),
            ("RGB", "JPEG", 75, 51),
            ("L", "PNG", 40, 90),
            ("RGBA", "PNG", 64, 48),
            ("L", "JPEG", 33, 47),
            ("RGB", "PNG", 20, 17),
        ]
    ):
        bands = len(mode)
        coarse = np.random.default_rng(i).integers(0, 256, (4, 5, bands), dtype=np.uint8)
        image = Image.fromarray(coarse.squeeze(), mode=None)
        files.append(encode(image.resize((width, height), Image.Resampling.BICUBIC), format))
    return files


def reference_image(encoded, crop):
    """Decoded, and a centred window of it resized, all by Pillow."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    side = crop * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box), np.float32)


def test_serving_bytes(model, served):
    files = photographs()
    outputs = served.signatures["serving_bytes"](image_bytes=tf.constant(files))
    assert set(outputs) == {"class_ids", "labels", "scores"}
    assert all(y.shape == (len(files), 5) for y in outputs.values())
    images = np.stack([reference_image(f, model.spec.crop) for f in files])
    probabilities = tf.nn.softmax(model(images)).numpy()
    order = np.argsort(-probabilities, axis=-1)[:, :5]
    scores = outputs["scores"].numpy()
    # Pillow rounds once more, hence the tolerance; a wrong image is far off.
    ids = outputs["class_ids"].numpy()
    expected = np.take_along_axis(probabilities, ids, axis=-1)
    assert np.abs(scores - expected).max() < 0.05
    assert np.abs(scores - np.roll(expected, 1, axis=0)).max() > 0.2
    np.testing.assert_array_equal(ids[:, 0], order[:, 0])
    assert (np.diff(scores, axis=-1) <= 0).all()
    labels = [[NAMES[i] for i in row] for row in ids]
    assert [[x.decode() for x in row] for row in outputs["labels"].numpy()] == labels


def test_serving_bytes_does_not_depend_on_the_batch(served):
    serve = served.signatures["serving_bytes"]
    files = photographs()
    together = serve(image_bytes=tf.constant(files))["scores"]
    alone = [serve(image_bytes=tf.constant([f]))["scores"][0] for f in files]
    assert_close(together, np.stack(alone))


@pytest.mark.parametrize("bad", [b"", b"not an image", photographs()[0][:60]])
def test_bad_bytes_raise(served, bad):
    with pytest.raises(tf.errors.InvalidArgumentError):
        served.signatures["serving_bytes"](image_bytes=tf.constant([photographs()[0], bad]))


def test_reloaded_model_can_be_trained(model, version):
    """Plain TensorFlow: the same gradients and moving statistics as the Keras model's."""
    twin = make()
    loaded = tf.saved_model.load(version)
    labels = tf.constant([0, 1, 2, 3])

    def gradients(call, variables):
        with tf.GradientTape() as tape:
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, call())
        return tape.gradient(loss, variables)

    trainable = {k: v for k, v in loaded.weights.items() if v.trainable}
    assert {saved_model.unescape(k) for k in trainable} == {
        v.path for v in twin.trainable_variables
    }
    assert saved_model.escape("logits/kernel") not in trainable
    actual = gradients(lambda: loaded(pixels(), training=True)["logits"], trainable)
    expected = gradients(
        lambda: twin(pixels(), training=True), {v.path: v.value for v in twin.trainable_variables}
    )
    scale = max(np.abs(g).max() for g in expected.values())
    for key, gradient in actual.items():
        difference = np.abs(gradient - expected[saved_model.unescape(key)]).max()
        assert difference <= 1e-4 * scale, key
    moved = [v for v in twin.non_trainable_variables if "moving" in v.name]
    assert moved
    for v in moved:
        assert_close(loaded.weights[saved_model.escape(v.path)], v.value)
    before = make().get_layer("conv1_bn").moving_mean
    assert np.abs(before - twin.get_layer("conv1_bn").moving_mean).max() > 0


def test_linear_head_without_names_and_with_few_classes(tmp_path):
    model = make("linear", num_classes=3, class_names=None)
    served = tf.saved_model.load(etfzoo.publish(model, tmp_path / "m"))
    assert_close(served.signatures["serving_default"](images=pixels())["logits"], model(pixels()))
    outputs = served.signatures["serving_bytes"](image_bytes=tf.constant(photographs()))
    assert outputs["scores"].shape == (6, 3)
    np.testing.assert_allclose(outputs["scores"].numpy().sum(-1), 1, rtol=1e-5)
    assert set(outputs["labels"].numpy().ravel()) == {b"0", b"1", b"2"}


def test_without_head_and_with_open_size(tmp_path):
    model = make(None, input_shape=(None, None, 3))
    served = tf.saved_model.load(etfzoo.publish(model, tmp_path / "m"))
    assert set(served.signatures) == {"serving_default", "features"}
    for side in (32, 48):
        x = pixels(2, side=side)
        assert set(served.signatures["serving_default"](images=x)) == {"features"}
        for signature in served.signatures.values():
            assert_close(signature(images=x)["features"], model(x))


def test_mixed_precision_is_for_training(tmp_path):
    """Served is float32."""
    model = make(dtype="mixed_bfloat16")
    version = etfzoo.publish(model, tmp_path / "m")
    assert {a.dtype.name for a in publish.Weights(version).values()} == {"float32"}
    served = tf.saved_model.load(version)
    outputs = served.signatures["serving_default"](images=pixels())
    assert {k: v.dtype.name for k, v in outputs.items()} == {
        "logits": "float32",
        "probabilities": "float32",
        "class_ids": "int64",
    }
    assert_close(outputs["logits"], make()(pixels()))
    assert_close(etfzoo.load(version)(pixels()), model(pixels()), 0)
    # The graph may fuse what eager execution rounds to 16 bits in between.
    trained = served(pixels(), training=True)["logits"]
    assert_close(trained, model(pixels(), training=True), 3e-2)


def test_distributed_variables(tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = make()
        assert isinstance(model.variables[0].value, tf.distribute.DistributedValues)
        with pytest.raises(etfzoo.EtfzooError, match="outside of the strategy's scope"):
            etfzoo.publish(model, tmp_path / "m")
    assert leftovers(tmp_path) == []
    version = etfzoo.publish(model, tmp_path / "m")
    served = tf.saved_model.load(version).signatures["serving_default"]
    assert_close(served(images=pixels())["logits"], model(pixels()))


def rounded(model):
    """The weights as float16 storage has them."""
    arrays = {v.path: v.numpy() for v in model.variables}
    return {
        path: a if path.endswith("moving_covariance") else a.astype("float16")
        for path, a in arrays.items()
    }


def test_a_learned_scale_is_published_and_belongs_to_its_head(tmp_path):
    model = make("etf", feature_norm="l2", learn_scale=True)
    loaded = etfzoo.load(etfzoo.publish(model, tmp_path / "m"))
    assert loaded.spec == model.spec and loaded.spec.learn_scale
    scale = loaded.get_layer("logits").log_scale
    np.testing.assert_array_equal(scale, model.get_layer("logits").log_scale)
    assert scale.path in {v.path for v in loaded.trainable_variables}
    np.testing.assert_array_equal(loaded(pixels()), model(pixels()))
    assert not etfzoo.replace_head(loaded, 4, "etf").spec.learn_scale


@pytest.mark.parametrize("head, norm", [("etf", "bn"), ("linear", "sw")])
def test_float16_storage(tmp_path, head, norm):
    model = make(head, norm=norm)
    version = etfzoo.publish(model, tmp_path / "m", storage="float16")
    half, expected = publish.Weights(version), rounded(model)
    assert half.keys() == expected.keys()
    for path, array in expected.items():
        assert half[path].dtype == array.dtype
        np.testing.assert_array_equal(half[path], array)
    size = sum(p.stat().st_size for p in (version / "variables").iterdir())
    assert size <= 0.52 * sum(v.numpy().nbytes for v in model.variables)
    variables = json.loads((version / publish.METADATA).read_text())["variables"]
    assert variables["conv1_conv/kernel"] == [[7, 7, 3, 64], "float16"]
    assert variables["conv1_bn/gamma"] == [[64], "float16"]
    if norm == "sw":
        assert variables["conv1_bn/moving_covariance"] == [[4, 16, 16], "float32"]

    loaded = etfzoo.load(version)
    for v in loaded.variables:
        assert v.dtype == "float32"
        np.testing.assert_array_equal(v.numpy(), expected[v.path].astype("float32"))
    served = tf.saved_model.load(version)
    for logits in (
        served.signatures["serving_default"](images=pixels())["logits"],
        served(pixels())["logits"],
    ):
        assert_close(logits, loaded(pixels()))
    trained = served(pixels(), training=True)["logits"]  # whitening of 4 images amplifies rounding
    assert_close(trained, loaded(pixels(), training=True), 2e-4)


def test_float16_storage_of_large_weights(tmp_path):
    model = make()
    kernel = model.get_layer("conv1_conv").kernel
    kernel.assign(1e5 * np.ones(kernel.shape))
    with pytest.raises(etfzoo.EtfzooError, match="conv1_conv/kernel .* too large for float16"):
        etfzoo.publish(model, tmp_path / "m", storage="float16")
    with pytest.raises(etfzoo.EtfzooError, match="unknown storage 'int8'"):
        etfzoo.publish(model, tmp_path / "m", storage="int8")
    assert leftovers(tmp_path) == []


def test_models_in_one_process_share_nothing(version, tmp_path):
    other = make(seed=2)
    loaded = [tf.saved_model.load(version) for _ in range(2)]
    loaded.append(tf.saved_model.load(etfzoo.publish(other, tmp_path / "m")))

    def logits(served):
        return served.signatures["serving_default"](images=pixels())["logits"]

    expected = [make()(pixels())] * 2 + [other(pixels())]
    for _ in range(2):
        for served, y in zip(loaded, expected, strict=True):
            assert_close(logits(served), y)
        loaded, expected = loaded[1:], expected[1:]  # the first one is destroyed


def test_a_model_that_is_dropped_gives_its_memory_back(tmp_path, monkeypatch):
    wide = dataclasses.replace(BACKBONES["rn18"], filters=(64, 512))
    monkeypatch.setitem(BACKBONES, "rn18", wide)
    version = etfzoo.publish(make(), tmp_path / "m")

    def load():
        tf.saved_model.load(version).signatures["serving_default"](images=pixels())
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    load()
    before = load()
    for _ in range(4):
        after = load()
    # Each holds 11 MB of stored weights and 11 MB of derived ones.
    assert after - before < 22e6


def test_inference_on_the_stored_weights_has_gradients(version):
    """As for fine-tuning with frozen statistics: nothing moves, all that is trained is reached."""
    served, twin = tf.saved_model.load(version), make()
    trainable = {k: v for k, v in served.weights.items() if v.trainable}
    before = {k: v.numpy() for k, v in served.weights.items()}
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(served(pixels(), training=False)["logits"] ** 2)
    gradients = tape.gradient(loss, trainable)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(twin(pixels(), training=False) ** 2)
    expected = tape.gradient(loss, {v.path: v.value for v in twin.trainable_variables})
    for key, gradient in gradients.items():
        assert_close(gradient, expected[saved_model.unescape(key)], 1e-3)
    for key, value in before.items():
        np.testing.assert_array_equal(served.weights[key].numpy(), value)


def test_what_is_trained_is_served_once_it_is_saved_again(version, tmp_path):
    served = tf.saved_model.load(version)
    bias = saved_model.escape("conv1_bn/beta")
    served.weights[bias].assign_add(tf.ones(64))
    stored = served(pixels())["logits"]
    assert np.abs(stored - make()(pixels())).max() > 1e-2
    tf.saved_model.save(served, str(tmp_path / "again"), signatures=served.signatures)
    again = tf.saved_model.load(str(tmp_path / "again"))
    assert_close(again.signatures["serving_default"](images=pixels())["logits"], stored)


def test_shards(tmp_path, monkeypatch):
    """However large a model is, no file is; the largest kernel here has 147 kB."""
    monkeypatch.setattr(saved_model, "SHARD_BYTES", 60_000)
    model = make()
    version = etfzoo.publish(model, tmp_path / "m")
    sizes = [p.stat().st_size for p in (version / "variables").glob("*.data-*")]
    assert len(sizes) > 4 and max(sizes) <= 60_600
    for path, array in publish.Weights(version).items():
        np.testing.assert_array_equal(array, {v.path: v for v in model.variables}[path].numpy())
    served = tf.saved_model.load(version).signatures["serving_default"]
    assert_close(served(images=pixels())["logits"], model(pixels()))


def test_warm_up_requests(version, served):
    """TF Serving sends each signature one before it is ready; they are small."""
    log = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2").PredictionLog
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    assert path.stat().st_size < 1000
    seen = set()
    for record in tf.data.TFRecordDataset(str(path)):
        request = log.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        signature = served.signatures[request.model_spec.signature_name]
        outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
        assert all(len(y) == 1 for y in outputs.values())
        seen.add(request.model_spec.signature_name)
    assert seen == set(served.signatures)

"""Tests of publishing: what is written, what it serves, and that it is written whole or not."""

import dataclasses
import io
import json
import os
import shutil
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import etfzoo
from etfzoo import export, manifest
from testing import randomize, small_disk

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
SIDE = 32


def make(head="etf", seed=1, **changes):
    """A small classifier in a state that no initializer gives: every variable is random."""
    spec = {"input_shape": (SIDE, SIDE, 3), "mean": (120.0, 110, 100), "std": (50.0, 60, 70)}
    if head == "etf":
        spec |= {"feature_norm": "bn"}
    if head is not None:
        spec |= {"class_names": NAMES}
    spec |= {"num_classes": len(NAMES) if head is not None else None} | changes
    model = etfzoo.build_classifier("rn18", head=head, **spec)
    randomize(model, seed, fixed=True)
    return model


def pixels(n=4, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (n, SIDE, SIDE, 3)).astype("float32")


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def leftovers(directory):
    return [p.name for p in directory.iterdir()] if directory.exists() else []


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def version(model, tmp_path_factory):
    return etfzoo.publish(
        model,
        tmp_path_factory.mktemp("models") / "rn18_etf.test",
        provenance={"command": "train", "seed": np.int64(3)},
        metrics={"top1": np.float32(0.5)},
        licence="Apache-2.0",
    )


@pytest.fixture(scope="module")
def served(version):
    return tf.saved_model.load(version)


def test_first_version_and_its_files(version):
    assert version.name == "1"
    assert leftovers(version.parent) == ["1"]
    files = {str(p.relative_to(version)) for p in version.rglob("*") if p.is_file()}
    assert files == {
        "saved_model.pb",
        "fingerprint.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        "assets.extra/etfzoo.json",
        "assets.extra/files.json",
        "README.md",
    }
    assert manifest.verify(version)


def test_metadata(model, version):
    metadata = json.loads((version / "assets.extra/etfzoo.json").read_text("utf-8"))
    assert metadata["format"] == 1
    assert metadata["etfzoo_version"] == etfzoo.__version__
    assert metadata["keras_version"] == keras.__version__
    assert metadata["spec"] == json.loads(json.dumps(dataclasses.asdict(model.spec)))
    assert metadata["provenance"] == {"command": "train", "seed": 3}
    assert metadata["metrics"] == {"top1": 0.5}
    assert metadata["licence"] == "Apache-2.0"
    assert metadata["created"].endswith("+00:00")
    assert metadata["variables"] == {v.path: [list(v.shape), v.dtype] for v in model.variables}
    assert export.read_metadata(version)["spec"] == model.spec


def test_weights_are_stored_once(model, version):
    size = sum(p.stat().st_size for p in (version / "variables").iterdir())
    assert size <= 1.02 * sum(v.numpy().nbytes for v in model.variables)
    shapes = tf.train.load_checkpoint(str(version / "variables/variables"))
    keys = set(shapes.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert len(keys) == len(model.variables)
    assert "weights/conv1_conv%2Fkernel/.ATTRIBUTES/VARIABLE_VALUE" in keys


def test_every_variable_is_stored_bit_for_bit(model, version):
    arrays = export.read_weights(version)
    assert arrays.keys() == {v.path for v in model.variables}
    assert "logits/kernel" in arrays and "conv1_bn/moving_variance" in arrays
    for v in model.variables:
        np.testing.assert_array_equal(arrays[v.path], v.numpy())


@pytest.mark.parametrize("path", ["a/b", "a.b", "a%2Fb", "%/.", "a/.S/b..c", "%252E"])
def test_escaped_paths_round_trip(path):
    key = export._escape(path)
    assert "/" not in key and "." not in key
    assert export._unescape(key) == path


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
    assert set(outputs) == {"features"}
    assert outputs["features"].shape == (4, 512)
    assert_close(outputs["features"], etfzoo.feature_model(model)(pixels())["features"])


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
    """Decoded, cropped to a centred window of whole pixels and resized, all by Pillow."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    side = round(crop * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    window = image.crop((left, top, left + side, top + side))
    return np.asarray(window.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)


def test_serving_bytes(model, served):
    files = photographs()
    outputs = served.signatures["serving_bytes"](image_bytes=tf.constant(files))
    assert set(outputs) == {"class_ids", "labels", "scores"}
    assert all(y.shape == (len(files), 5) for y in outputs.values())
    images = np.stack([reference_image(f, model.spec.crop) for f in files])
    probabilities = tf.nn.softmax(model(images)).numpy()
    order = np.argsort(-probabilities, axis=-1)[:, :5]
    scores = outputs["scores"].numpy()
    # Decoders and rounding differ by a few levels, hence the tolerance; a wrong image is far off.
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
    assert {export._unescape(k) for k in trainable} == {v.path for v in twin.trainable_variables}
    assert export._escape("logits/kernel") not in trainable
    actual = gradients(lambda: loaded(pixels(), training=True)["logits"], trainable)
    expected = gradients(
        lambda: twin(pixels(), training=True), {v.path: v.value for v in twin.trainable_variables}
    )
    scale = max(np.abs(g).max() for g in expected.values())
    for key, gradient in actual.items():
        difference = np.abs(gradient - expected[export._unescape(key)]).max()
        assert difference <= 1e-4 * scale, key
    moved = [v for v in twin.non_trainable_variables if "moving" in v.name]
    assert moved
    for v in moved:
        assert_close(loaded.weights[export._escape(v.path)], v.value)
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
        x = np.random.default_rng(0).uniform(0, 255, (2, side, side, 3)).astype("float32")
        for signature in served.signatures.values():
            outputs = signature(images=x)
            assert set(outputs) == {"features"}
            assert_close(outputs["features"], model(x))


def test_mixed_precision(tmp_path):
    model = make(dtype="mixed_bfloat16")
    version = etfzoo.publish(model, tmp_path / "m")
    assert {a.dtype.name for a in export.read_weights(version).values()} == {"float32"}
    served = tf.saved_model.load(version).signatures["serving_default"]
    outputs = served(images=pixels())
    assert {k: v.dtype.name for k, v in outputs.items()} == {
        "logits": "float32",
        "probabilities": "float32",
        "class_ids": "int64",
    }
    # The graph may fuse what eager execution rounds to 16 bits in between.
    assert_close(outputs["logits"], model(pixels()), 2e-2)
    assert_close(etfzoo.load(version)(pixels()), model(pixels()), 0)


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


def test_versions(model, version, tmp_path):
    directory = tmp_path / "deep" / "rn18_etf.x"
    shutil.copytree(version, directory / "4")
    (directory / "notes").mkdir()
    (directory / "017").mkdir()
    with pytest.raises(etfzoo.EtfzooError, match="/4 already exists; choose another version"):
        etfzoo.publish(model, directory, version=4)
    changed = make(seed=2)
    assert etfzoo.publish(changed, directory) == directory / "5"
    assert etfzoo.publish(changed, directory, version=4, overwrite=True) == directory / "4"
    assert sorted(leftovers(directory)) == ["017", "4", "5", "notes"]
    for written in ("4", "5"):
        np.testing.assert_array_equal(
            export.read_weights(directory / written)["conv1_conv/kernel"],
            changed.get_layer("conv1_conv").kernel.numpy(),
        )


@pytest.mark.parametrize("version", [0, -1, "2", 1.0])
def test_bad_versions(model, tmp_path, version):
    with pytest.raises(etfzoo.EtfzooError, match="positive integer"):
        etfzoo.publish(model, tmp_path / "m", version=version)
    assert leftovers(tmp_path) == []


def test_only_classifiers_are_published(tmp_path):
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(etfzoo.EtfzooError, match="only an etfzoo.ImageClassifier.*Sequential"):
        etfzoo.publish(plain, tmp_path / "m")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "given, message",
    [
        ({"metrics": {"top1": float("nan")}}, "metrics cannot be written as JSON"),
        ({"provenance": {"model": object()}}, "provenance cannot be written as JSON: a object"),
        ({"metrics": [1]}, "metrics must be a dict"),
    ],
)
def test_bad_metadata(model, tmp_path, given, message):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        etfzoo.publish(model, tmp_path / "m", **given)
    assert leftovers(tmp_path) == []


def test_bad_places(model, version, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(etfzoo.EtfzooError, match="could not publish to .*Not a directory"):
        etfzoo.publish(model, tmp_path / "file")
    with pytest.raises(etfzoo.EtfzooError, match="is a version folder"):
        etfzoo.publish(model, version)
    with pytest.raises(etfzoo.EtfzooError, match="local folders only"):
        etfzoo.publish(model, "gs://bucket/m")
    assert leftovers(tmp_path) == ["file"]


# 8 MiB end in the weights; 43,900 KiB hold the weights (43,724) and not the graph as well.
@pytest.mark.parametrize("kibibytes", [8192, 43900])
def test_full_disk_leaves_nothing(model, tmp_path, kibibytes):
    with small_disk(tmp_path / "disk", f"{kibibytes}k") as disk:
        target = disk / "models" / "rn18_etf.x"
        with pytest.raises(etfzoo.EtfzooError) as error:
            etfzoo.publish(model, target)
        assert str(error.value) == (
            f"could not publish to {target}/1: No space left on device; free some space or "
            "choose another directory"
        )
        assert leftovers(disk) == []


@pytest.mark.parametrize(
    "failure, existing", [(RuntimeError("broken\nmore"), False), (KeyboardInterrupt(), True)]
)
def test_failure_in_the_middle(model, version, tmp_path, monkeypatch, failure, existing):
    directory = tmp_path / "m"
    if existing:
        shutil.copytree(version, directory / "1")
    write = tf.saved_model.save

    def write_and_fail(*args, **kwargs):
        write(*args, **kwargs)
        assert [name for name in leftovers(directory) if name.startswith(".tmp-")]
        raise failure

    monkeypatch.setattr(tf.saved_model, "save", write_and_fail)
    expected = etfzoo.EtfzooError if isinstance(failure, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        etfzoo.publish(model, directory, version=1, overwrite=True)
    if expected is etfzoo.EtfzooError:
        assert str(error.value) == f"could not publish to {directory}/1: RuntimeError: broken"
    assert leftovers(directory) == (["1"] if existing else [])
    assert directory.exists() == existing
    if existing:
        assert export.read_weights(directory / "1")


def test_overwriting_keeps_the_old_version_where_it_fails(tmp_path, monkeypatch):
    new, old = tmp_path / ".tmp-1-x", tmp_path / "1"
    for folder in (new, old):
        folder.mkdir()
        (folder / "whose").write_text(folder.name)
    rename = os.rename

    def no_new_one(source, target):
        if source == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(export.os, "rename", no_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        export._move_into_place(new, old, overwrite=True)
    assert (old / "whose").read_text() == "1"
    monkeypatch.undo()
    export._move_into_place(new, old, overwrite=True)
    assert (old / "whose").read_text() == ".tmp-1-x"
    assert leftovers(tmp_path) == ["1"]


def test_two_publishers_of_one_version(tmp_path, monkeypatch):
    """Both are past the first check; one wins, the other one is told, nothing is mixed."""
    save, both_here, one_at_a_time = export._save, threading.Barrier(2), threading.Lock()

    def slow_save(model, folder):
        both_here.wait(60)
        with one_at_a_time:
            save(model, folder)

    monkeypatch.setattr(export, "_save", slow_save)
    models = [make(seed=1), make(seed=2)]
    results = [None, None]

    def run(i):
        try:
            results[i] = etfzoo.publish(models[i], tmp_path / "m")
        except etfzoo.EtfzooError as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i in range(2) if results[i] == tmp_path / "m" / "1"]
    assert "m/1 already exists; choose another version" in str(results[1 - winner])
    assert leftovers(tmp_path / "m") == ["1"]
    arrays = export.read_weights(tmp_path / "m" / "1")
    np.testing.assert_array_equal(
        arrays["conv1_conv/kernel"], models[winner].get_layer("conv1_conv").kernel.numpy()
    )

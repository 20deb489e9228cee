"""The projector: its arithmetic, that features are taken before it, and what keeps it."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.models import weights
from etfzoo.models.backbones import stock, whiten
from etfzoo.models.classifier import feature_model, is_head_variable, replace_head
from etfzoo.models.folding import fold_batch_norm, folded_weights
from etfzoo.models.initialization import initialize
from etfzoo.models.spec import ClassifierSpec
from etfzoo.runtime import losses
from etfzoo.zoo import load
from testing import CLASS_NAMES, assert_close, fresh_python, make_classifier, random_pixels

pytestmark = pytest.mark.small_rn18

K = len(CLASS_NAMES)
FEATURES = 32  # of the small rn18


def make(head="etf", layers=2, width=24, **changes):
    return make_classifier(head, projector_layers=layers, projector_width=width, **changes)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def version(model, tmp_path_factory):
    return etfzoo.publish(model, tmp_path_factory.mktemp("models") / "rn18_etf.test")


def by_hand(model, features, training=False):
    """The projector's output in NumPy and float64, and mean and variance of each batch norm."""
    arrays = {k: v.astype(np.float64) for k, v in weights.as_arrays(model.variables).items()}
    u = np.asarray(features, np.float64)
    u = u / np.maximum(np.sqrt((u**2).sum(1, keepdims=True)), 1e-12)
    moments = []
    for i in range(1, model.spec.projector_layers + 1):
        z = u @ arrays[f"projector{i}_dense/kernel"]
        norm = {n: arrays[f"projector{i}_bn/{n}"] for n in ("gamma", "beta")}
        mean, variance = (
            arrays[f"projector{i}_bn/moving_{n}"] for n in ("mean", "variance")
        )  # fmt: skip
        if training:
            mean, variance = z.mean(0), z.var(0)
        moments.append((mean, variance))
        u = np.maximum(norm["gamma"] * (z - mean) / np.sqrt(variance + 1e-5) + norm["beta"], 0)
    return u, moments


def test_forward_by_hand(model):
    out = feature_model(model, ["features", "projected", "logits"])(random_pixels(6))
    assert out["features"].shape == (6, FEATURES) and out["projected"].shape == (6, 24)
    projected, _ = by_hand(model, out["features"])
    assert 0.1 < (projected > 0).mean() < 0.95
    assert_close(out["projected"], projected, 1e-5)
    head = model.get_layer("logits")
    norm = head.batch_norm
    h = np.asarray(norm.gamma) * (projected - np.asarray(norm.moving_mean))
    h = h / np.sqrt(np.asarray(norm.moving_variance) + 1e-3) + np.asarray(norm.beta)
    assert_close(out["logits"], h @ np.asarray(head.kernel, np.float64), 1e-5)
    np.testing.assert_array_equal(out["logits"], model(random_pixels(6)))


def test_training_takes_the_statistics_of_the_batch():
    model = make("linear")
    images = random_pixels(8)
    taps = keras.Model(model.input, [model.taps["features"], model.taps["projected"]])
    before = weights.as_arrays(model.variables)
    features, projected = taps(images, training=True)
    # By the weights of before: the call has moved the statistics.
    wanted, moments = by_hand(model, features, training=True)
    assert_close(projected, wanted, 1e-4)
    after = weights.as_arrays(model.variables)
    for i, (mean, variance) in enumerate(moments, 1):
        for name, value in (("mean", mean), ("variance", variance)):
            path = f"projector{i}_bn/moving_{name}"
            assert_close(after[path], 0.9 * before[path] + 0.1 * value, 1e-4)


def test_what_is_trained_and_what_decays(model):
    trained = {v.path for v in model.trainable_variables if v.path.startswith("projector")}
    names = {f"projector{i}_{n}" for i in (1, 2) for n in ("dense/kernel", "bn/gamma", "bn/beta")}
    assert trained == names
    decayed = {v.path for v in model.trainable_variables if losses.decayed(v)}
    assert {n for n in names if n.endswith("kernel")} == {n for n in decayed if n in names}
    assert not [layer for layer in model.layers if getattr(layer, "bias", None) is not None]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_width_is_that_of_the_features_unless_it_is_given(layers):
    model = make("linear", layers, None)
    assert model.spec.projector_width == FEATURES and model.spec.projector_layers == layers
    assert model.taps["projected"].shape == (None, FEATURES)
    assert model.get_layer("logits").kernel.shape == (FEATURES, K)
    assert make("linear", layers, 24).get_layer("logits").kernel.shape == (24, K)


def test_what_counts_for_an_etf_is_the_width_of_the_projector():
    wide = {"num_classes": 50, "class_names": None}
    with pytest.raises(ValueError, match="in 32 dimensions .*at least 49.* non-linear projector"):
        make(layers=0, width=None, **wide)
    with pytest.raises(ValueError, match="in 48 dimensions"):
        make(width=48, **wide)
    kernel = np.asarray(make(width=49, **wide).get_layer("logits").kernel, np.float64)
    np.testing.assert_allclose(kernel.T @ kernel, (np.eye(50) - 1 / 50) * 50 / 49, atol=1e-6)
    with pytest.raises(ValueError, match="in 49 dimensions .*non-linear projector"):
        make(width=49, frame="centred_etf", **wide)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projector_layers": 4}, "projector_layers must be a whole number from 0 to 3; got 4"),
        ({"projector_layers": -1}, "from 0 to 3; got -1"),
        ({"projector_layers": True}, "from 0 to 3; got True"),
        ({"projector_layers": 1.0}, "from 0 to 3; got 1.0"),
        ({"projector_layers": "2"}, "from 0 to 3; got '2'"),
        ({"projector_layers": None}, "from 0 to 3; got None"),
        ({"projector_layers": 1, "projector_width": 0}, "projector_width must be .* got 0"),
        ({"projector_layers": 1, "projector_width": 2**15 + 1}, "from 1 to 32768; got 32769"),
        ({"projector_layers": 1, "projector_width": 64.0}, "from 1 to 32768; got 64.0"),
        ({"projector_width": 64}, "is linear, and a fixed head behind it a trainable one in disg"),
        ({"projector_layers": 1, "head": None, "num_classes": None}, "belong to a head"),
    ],
)
def test_bad_specs(changes, message):
    with pytest.raises(EtfzooError, match=message) as error:
        ClassifierSpec(**{"backbone": "rn18", "num_classes": 5} | changes)
    assert "\n" not in str(error.value)


def test_specs_from_before_there_was_one(model):
    old = dataclasses.asdict(ClassifierSpec("rn18", 5))
    del old["projector_layers"], old["projector_width"]
    spec = ClassifierSpec.from_dict(json.loads(json.dumps(old)))
    assert (spec.projector_layers, spec.projector_width) == (0, None)
    assert spec == ClassifierSpec("rn18", 5) and spec.penultimate == "features"
    copy = ClassifierSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(model.spec))))
    assert copy == model.spec and copy.penultimate == "projected"
    assert not [v.path for v in make_classifier().variables if v.path.startswith("projector")]


@pytest.mark.parametrize("head", ["linear", "etf", None])
def test_a_fresh_head_acts_on_the_features(model, head):
    fresh = replace_head(model, None if head is None else 4, head)
    assert (fresh.spec.projector_layers, fresh.spec.projector_width) == (0, None)
    assert "projected" not in fresh.taps
    if head:
        assert fresh.get_layer("logits").kernel.shape == (FEATURES, 4)
    mine, theirs = (weights.as_arrays(m.variables) for m in (fresh, model))
    kept = {path for path in theirs if not is_head_variable(path)}
    assert kept == {path for path in mine if not is_head_variable(path)} and len(kept) > 20
    for path in kept:
        np.testing.assert_array_equal(mine[path], theirs[path])
    features = feature_model(model)(random_pixels())["features"]
    np.testing.assert_array_equal(feature_model(fresh)(random_pixels())["features"], features)


def test_a_fresh_projector_where_it_is_asked_for(model):
    fresh = replace_head(model, 4, projector_layers=2, projector_width=24)
    kernel = fresh.get_layer("projector1_dense").kernel
    assert fresh.spec.projector_layers == 2
    assert not np.array_equal(kernel, model.get_layer("projector1_dense").kernel)


def test_keras_files_and_other_sizes_of_images(model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.spec == model.spec
    np.testing.assert_array_equal(loaded(random_pixels()), model(random_pixels()))
    larger = model.at_size(48, 48)
    assert {id(v) for v in larger.variables} == {id(v) for v in model.variables}
    other = etfzoo.ImageClassifier(dataclasses.replace(model.spec, input_shape=(48, 48, 3)))
    weights.assign(other.variables, weights.as_arrays(model.variables))
    out = feature_model(other, ("features", "projected", "logits"))(random_pixels(side=48))
    assert_close(out["projected"], by_hand(model, out["features"])[0], 1e-5)
    np.testing.assert_array_equal(larger(random_pixels(side=48)), out["logits"])


def test_networks_of_keras_alone(model):
    model.get_layer("projector1_bn").synchronized = True
    try:
        plain = stock(model)
    finally:
        model.get_layer("projector1_bn").synchronized = False
    assert not plain.get_layer("projector1_bn").synchronized
    assert_close(plain(random_pixels()), model(random_pixels()), 1e-5)
    three = make("linear", layers=3)
    assert len([n for n in whiten(three).layers if "Whitening" in type(n).__name__]) == 2


def test_norms_are_folded(model):
    taps = feature_model(model, ("features", "projected", "logits"))
    folded = fold_batch_norm(taps)
    arrays = {path: tf.constant(a) for path, a in weights.as_arrays(taps.variables).items()}
    weights.assign(
        folded.variables, {k: np.asarray(v) for k, v in folded_weights(taps, arrays).items()}
    )
    assert not [v.path for v in folded.variables if v.path.startswith("projector1_bn")]
    assert "projector2_dense/bias" in {v.path for v in folded.variables}
    found, wanted = folded(random_pixels()), taps(random_pixels())
    for name, y in wanted.items():
        assert_close(found[name], y, 1e-4)


def test_published_models_keep_it(model, version):
    loaded = etfzoo.load(version)
    assert loaded.spec == model.spec == etfzoo.spec(version)
    for path, array in weights.as_arrays(model.variables).items():
        np.testing.assert_array_equal(weights.as_arrays(loaded.variables)[path], array, path)
    np.testing.assert_array_equal(loaded(random_pixels()), model(random_pixels()))
    served = tf.saved_model.load(str(version))
    signatures = served.signatures
    wanted = feature_model(model, tuple(model.taps))(random_pixels())
    found = signatures["features"](images=random_pixels())
    assert found.keys() == wanted.keys() - {"logits"} and "projected" in found
    found["logits"] = signatures["serving_default"](images=random_pixels())["logits"]
    for name, y in wanted.items():
        assert_close(found[name], y, 1e-4)
    # Trained on, it has the gradients and statistics of the Keras model.
    trained = served(random_pixels(), training=True)["logits"]
    assert_close(trained, loaded(random_pixels(), training=True), 1e-4)
    path = "projector1_bn/moving_mean"
    moved = served.weights[path.replace("/", "%2F")]
    assert_close(moved, weights.as_arrays(loaded.variables)[path], 1e-5)


def test_who_tells_of_it(version):
    text = "rn18 (batch norm), projector (2 hidden layers of 24 units), fixed ETF head, 7 classes"
    info = etfzoo.info(version)
    assert f"| Network | {text}, RGB images of 32 x 32 pixels |" in info["card"]
    assert (info["spec"]["projector_layers"], info["spec"]["projector_width"]) == (2, 24)


def test_published_models_with_another_head(model, version):
    for options in ({"num_classes": 3}, {"head": "linear"}, {"head": None}):
        loaded = etfzoo.load(version, **options)
        assert loaded.spec.projector_layers == 0 and "projected" not in loaded.taps
        features = feature_model(loaded)(random_pixels())["features"]
        np.testing.assert_array_equal(features, feature_model(model)(random_pixels())["features"])
    untrained = etfzoo.load(version, load_weights=False)
    assert untrained.spec.projector_layers == 2


def test_a_spec_of_another_width_is_refused_before_it_is_built(version):
    spec = dataclasses.replace(etfzoo.spec(version), projector_width=2**15)
    with pytest.raises(EtfzooError, match=r"do not fit the model: \(24,\) units .* of 32768"):
        shapes = {"logits/kernel": (24, K), "projector1_dense/kernel": (FEATURES, 24)}
        load._check_sizes(spec, shapes, version)
    with pytest.raises(EtfzooError, match=r"do not fit the model: \(\) units"):
        load._check_sizes(spec, {"logits/kernel": (24, K)}, version)


@pytest.mark.parametrize("policy, wanted", [("mixed_bfloat16", "float32"), ("float64", "float64")])
def test_precision(policy, wanted):
    """As the head it computes in float32 where the backbone has 16 bits."""
    model = make("linear", dtype=policy)
    parts = [layer for layer in model.layers if layer.name.startswith("projector")]
    assert len(parts) == 7 and {layer.compute_dtype for layer in parts} == {wanted}
    out = feature_model(model, ["features", "projected"])(random_pixels(), training=True)
    assert out["projected"].dtype == wanted
    if policy == "float64":
        projected, _ = by_hand(model, out["features"], training=True)
        np.testing.assert_allclose(out["projected"], projected, rtol=1e-9, atol=1e-12)


def test_initial_weights_as_torch_draws_them():
    def drawn(layers):
        model = make("linear", layers, None if not layers else 24)
        initialize(model, "he_fan_out", False, 5)
        return weights.as_arrays(model.variables)

    with_one, without = drawn(2), drawn(0)
    first, second = (with_one[f"projector{i}_dense/kernel"] for i in (1, 2))
    for kernel, inputs in ((first, FEATURES), (second, 24)):
        limit = 1 / np.sqrt(inputs)
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
    # The backbone starts alike, so that runs with and without one compare.
    for path, array in without.items():
        if not is_head_variable(path):
            np.testing.assert_array_equal(array, with_one[path], path)


_ON_JAX = """
import sys, keras, numpy as np
import projector_test as t
from testing import small_rn18
assert keras.backend.backend() == "jax"
with small_rn18():
    t.one_step(sys.argv[1])
"""


def one_step(folder):
    """Outputs of a model whose weights are in a folder, before and after a step of training."""
    from etfzoo.runtime.backend import Stepper, distribute
    from etfzoo.runtime.strategy import get_strategy

    model = make()
    path = f"{folder}/weights.npz"
    with np.load(path) as file:
        weights.assign(model.variables, dict(file))
    images, labels = random_pixels(8), np.arange(8, dtype=np.int32) % K
    strategy = get_strategy("one_device")
    network = feature_model(model, ("features", "projected", "logits"))
    out = dict(network.predict_on_batch(images))
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, name="sgd")
    optimizer.build(model.trainable_variables)
    stepper = Stepper(model, optimizer, strategy, 0.01)
    data = tf.data.Dataset.from_tensors((images, labels))
    stepper.train(iter(distribute(strategy, lambda share: data)))
    out |= {f"after/{k}": v for k, v in weights.as_arrays(model.variables).items()}
    np.savez(f"{folder}/{keras.backend.backend()}.npz", **out)
    return out


@pytest.mark.slow
def test_jax_computes_the_same(tmp_path):
    pytest.importorskip("jax")
    before = weights.as_arrays(make().variables)
    np.savez(tmp_path / "weights.npz", **before)
    here = one_step(tmp_path)
    fresh_python(_ON_JAX, tmp_path, KERAS_BACKEND="jax")
    there = dict(np.load(tmp_path / "jax.npz"))
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert_close(there[name], value, 1e-3)
    moved = [p for p in before if not np.array_equal(before[p], here[f"after/{p}"])]
    assert {p for p in before if p.startswith("projector")} < set(moved)
    assert "logits/kernel" not in moved


@pytest.mark.parametrize("layers, width", [(1, FEATURES), (1, 4 * FEATURES), (3, 2 * FEATURES)])
def test_the_projector_of_frozen_etfs_by_hand(layers, width):
    """As matrices of the paper's code, also with its wide hidden layers (512, 2048, 512)."""
    model = make("linear", layers, None, projector_kind="etf")
    assert not [v for v in model.variables if v.path.startswith("projector")]
    assert model.spec.projector_width == FEATURES

    def etf(inputs, outputs):
        return np.sqrt(FEATURES / (FEATURES - 1)) * (np.eye(outputs, inputs) - 1 / FEATURES)

    taps = feature_model(model, ["features", "projected", "logits"])
    out = taps(random_pixels(6))
    u = np.asarray(out["features"], np.float64)
    assert u.min() >= 0  # of a ReLU: so units beyond the features never fire
    sizes = [FEATURES] + [width] * layers
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        u = np.maximum(u @ etf(inputs, outputs).T, 0)
    u = u @ etf(width, FEATURES).T
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    assert_close(out["projected"], u, 1e-5)
    head = model.get_layer("logits")
    assert_close(out["logits"], u @ np.asarray(head.kernel) + np.asarray(head.bias), 1e-5)
    np.testing.assert_array_equal(model(random_pixels(6), training=False), out["logits"])


def test_gradients_pass_the_frozen_etfs_as_their_matrices():
    model = make("linear", 1, None, projector_kind="etf", dtype="float64")
    etf = tf.constant(np.eye(FEATURES) - 1 / FEATURES)
    h = tf.constant(np.random.default_rng(0).gamma(1, size=(5, FEATURES)))
    toward = tf.constant(np.random.default_rng(1).normal(size=(5, FEATURES)))
    layers = [layer for layer in model.layers if layer.name.startswith("projector")]
    assert [layer.name for layer in layers] == [
        "projector1_etf", "projector1_relu", "projector_etf", "projector_l2",
    ]  # fmt: skip

    def gradient(projected):
        with tf.GradientTape() as tape:
            tape.watch(h)
            value = tf.reduce_sum(toward * projected(h))
        return tape.gradient(value, h).numpy()

    def by_layers(x):
        for layer in layers:
            x = layer(x)
        return x

    by_matrices = gradient(lambda x: tf.linalg.normalize(tf.nn.relu(x @ etf) @ etf, axis=1)[0])
    np.testing.assert_allclose(gradient(by_layers), by_matrices, rtol=1e-9, atol=1e-12)


def test_frozen_etfs_keep_the_width_and_have_unit_length():
    with pytest.raises(EtfzooError, match="keeps the width of the features, 32: leave out `proj"):
        ClassifierSpec("rn18", 5, projector_layers=1, projector_width=2048, projector_kind="etf")
    with pytest.raises(EtfzooError, match="no projector: with `projector_kind=etf` give"):
        ClassifierSpec("rn18", 5, projector_kind="etf")
    with pytest.raises(EtfzooError, match="unknown projector_kind 'frozen'"):
        ClassifierSpec("rn18", 5, projector_layers=1, projector_kind="frozen")
    # At the factor 1 no class could become certain.
    etf = {"projector_layers": 1, "projector_kind": "etf"}
    assert ClassifierSpec("rn18", 5, **etf).scale == 16
    assert ClassifierSpec("rn18", 5, scale=3.0, **etf).scale == 3
    assert ClassifierSpec("rn18", 5, feature_norm="bn", **etf).scale == 1
    assert ClassifierSpec("rn18", 5, "linear", **etf).scale == 1
    old = dataclasses.asdict(ClassifierSpec("rn18", 5, projector_layers=2))
    del old["projector_kind"], old["guided"]
    assert ClassifierSpec.from_dict(old).projector_kind == "trained"


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_a_model_with_frozen_etfs_is_kept_whole(head, tmp_path):
    model = make(head, 2, None, projector_kind="etf")
    model.save(tmp_path / "model.keras")
    version = etfzoo.publish(model, tmp_path / f"rn18_{head}.test")
    text = "frozen ETF projector (2 hidden layers of 32 units)"
    assert text in etfzoo.info(version)["card"]
    wanted = feature_model(model, ("features", "projected"))(random_pixels())
    for loaded in (keras.saving.load_model(tmp_path / "model.keras"), etfzoo.load(version)):
        assert loaded.spec == model.spec
        np.testing.assert_array_equal(loaded(random_pixels()), model(random_pixels()))
    served = tf.saved_model.load(str(version)).signatures
    found = served["features"](images=random_pixels())
    for name, y in wanted.items():
        assert_close(found[name], y, 1e-4)
    logits = served["serving_default"](images=random_pixels())["logits"]
    assert_close(logits, model(random_pixels()), 1e-4)
    fresh = etfzoo.load(version, num_classes=3)
    assert fresh.spec.projector_kind == "trained" and fresh.spec.projector_layers == 0
    larger = model.at_size(48, 48)
    assert larger.get_layer("projector_l2").output.shape == (None, FEATURES)
    assert_close(stock(model)(random_pixels()), model(random_pixels()), 1e-5)

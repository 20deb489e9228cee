"""Tests of the classifier: its parts, its spec, its files."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from etfzoo.errors import EtfzooError
from etfzoo.layers import frames
from etfzoo.models import weights
from etfzoo.models.classifier import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClassifierSpec,
    build_classifier,
    feature_model,
    replace_head,
)
from etfzoo.models.table import BACKBONES
from testing import forked_python, randomize, small_rn18

# Weights with BN's gamma and beta and without the last layer, as torchvision's networks have them
# (11,689,512 of its resnet18 less 512 * 1000 + 1000 of the last layer, and so on).
TRUNK_PARAMETERS = {
    "rn18": 11_176_512,
    "rn34": 21_284_672,
    "rn50": 23_508_032,
    "rn101": 42_500_160,
}
MEAN, STD = (10.0, 120.0, 200.0), (30.0, 64.0, 5.0)


def make(head="etf", num_classes=5, backbone="rn18", side=32, **kwargs):
    return build_classifier(backbone, num_classes, head, input_shape=(side, side, 3), **kwargs)


def pixels(n=2, side=32):
    return np.random.default_rng(0).uniform(0, 255, (n, side, side, 3)).astype(np.float32)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


@pytest.fixture(scope="module")
def rn18():
    """An ETF classifier with random weights; tests leave it alone."""
    names = tuple("abcde")
    model = make(mean=MEAN, std=STD, feature_norm="bn", scale=2.5, seed=7, class_names=names)
    return randomize(model)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameters_are_those_of_resnet(backbone):
    model = make(None, None, backbone)
    counted = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert counted == TRUNK_PARAMETERS[backbone]
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert model.count_params() - counted == sum(2 * norm.gamma.shape[0] for norm in norms)
    assert {norm.momentum for norm in norms} == {0.9}
    assert model.output_shape == (None, BACKBONES[backbone].feature_dim)


@pytest.mark.parametrize(
    "backbone, channels", [("rn18", (64, 128, 256, 512)), ("rn50", (256, 512, 1024, 2048))]
)
def test_taps(backbone, channels):
    model = build_classifier(backbone, 5, input_shape=(72, 40, 3))
    shapes = {tap: tuple(tensor.shape) for tap, tensor in model.taps.items()}
    assert shapes == {
        "stem": (None, 18, 10, 64),
        "stage1": (None, 18, 10, channels[0]),
        "stage2": (None, 9, 5, channels[1]),
        "stage3": (None, 5, 3, channels[2]),
        "stage4": (None, 3, 2, channels[3]),
        "features": (None, channels[3]),
        "logits": (None, 5),
    }


@pytest.mark.parametrize(
    "head, num_classes, width",
    [("etf", 5, 5), ("linear", 5, 5), ("linear", 1, 1), (None, None, 512)],
)
def test_heads(head, num_classes, width):
    model = make(head, num_classes)
    assert model.output_shape == (None, width)
    output = model(pixels())
    assert output.shape == (2, width) and np.isfinite(output).all()
    assert ("logits" in model.taps) == (head is not None)
    trained = {v.path for v in model.trainable_variables if v.path.startswith("logits")}
    assert trained == ({"logits/kernel", "logits/bias"} if head == "linear" else set())


def test_logits_follow_from_the_taps(rn18):
    maps = feature_model(rn18, ("stage4", "features", "logits"))(pixels(side=32))
    assert list(maps) == ["stage4", "features", "logits"]
    features = np.asarray(maps["stage4"], np.float64).mean((1, 2))
    np.testing.assert_allclose(maps["features"], features, rtol=1e-5, atol=1e-6)
    bn = rn18.get_layer("logits").batch_norm
    gamma, beta, mean, variance = (
        np.array(v, np.float64) for v in (bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance)
    )
    h = gamma * (features - mean) / np.sqrt(variance + 1e-3) + beta
    logits = 2.5 * h @ frames.simplex_etf(5, 512, seed=7).T
    np.testing.assert_allclose(maps["logits"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(maps["logits"], rn18(pixels()))


def test_images_are_normalised_inside(rn18):
    layer = rn18.get_layer("normalize")
    first = keras.Model(rn18.input, layer.output)
    wanted = (pixels().astype(np.float64) - MEAN) / STD
    np.testing.assert_allclose(first(pixels()), wanted, rtol=1e-5, atol=1e-5)
    # What comes next is the stem's convolution, and nothing normalises a second time.
    stem = keras.Model(rn18.input, rn18.get_layer("conv1_conv").output)
    kernel = rn18.get_layer("conv1_conv").kernel
    convolved = keras.ops.conv(wanted.astype(np.float32), kernel, 2, "same")
    np.testing.assert_allclose(stem(pixels()), convolved, rtol=1e-3, atol=1e-3)


def test_default_statistics_are_imagenet_s():
    # The usual 0..1 figures on the 0..255 scale.
    np.testing.assert_allclose(np.divide(IMAGENET_MEAN, 255), [0.485, 0.456, 0.406], rtol=1e-9)
    np.testing.assert_allclose(np.divide(IMAGENET_STD, 255), [0.229, 0.224, 0.225], rtol=1e-9)
    spec = ClassifierSpec("rn18", 5)
    assert spec.mean == IMAGENET_MEAN and spec.std == IMAGENET_STD


def test_batch_norm_takes_a_tenth_of_the_batch_s_mean():
    model = make(seed=1)
    stem = keras.Model(model.input, model.get_layer("conv1_conv").output)
    wanted = 0.1 * np.asarray(stem(pixels()), np.float64).mean((0, 1, 2))
    model(pixels(), training=True)
    norm = model.get_layer("conv1_bn")
    np.testing.assert_allclose(norm.moving_mean, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, compute, variable, output",
    [
        ("mixed_bfloat16", "bfloat16", "float32", "float32"),
        ("float64", "float64", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("head", ["etf", "linear"])
def test_dtypes(head, dtype, compute, variable, output):
    model = make(head, dtype=dtype)
    assert keras.config.dtype_policy().name == "float32"
    assert {dtype_of(v) for v in model.variables} == {variable}
    assert model.get_layer("conv1_conv").compute_dtype == compute
    # Pixels are normalised before they are rounded to 16 bits.
    assert dtype_of(model.input) == dtype_of(model.get_layer("normalize").output) == output
    assert dtype_of(model(pixels())) == output
    assert model.spec.dtype == dtype


def test_global_policy_is_taken_and_restored():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make()
        assert model.spec.dtype == "mixed_bfloat16"
        assert make(dtype="float32").get_layer("conv1_conv").compute_dtype == "float32"
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    # No ETF of 1000 classes exists in 512 dimensions: the head fails after the backbone is built.
    with pytest.raises(ValueError, match="at least 999"):
        make(num_classes=1000, dtype="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"


_RELOAD = """
import sys, keras, numpy as np
import etfzoo.models.classifier
for path in sys.argv[2:]:
    model = keras.models.load_model(path)  # in safe mode
    arrays = {v.path.replace("/", "."): np.array(v) for v in model.variables}
    np.savez(path + ".npz", logits=model(np.load(sys.argv[1])), **arrays)
    print(repr(model.spec), model.name, list(model.taps), sep="\\n")
"""


def test_keras_files_in_another_process(rn18, tmp_path):
    whitened = make(norm="sw")
    whitened(pixels(4), training=True)
    np.save(tmp_path / "pixels.npy", pixels())
    models = {"plain": (rn18, 105, 1e-5), "whitened": (whitened, len(whitened.variables), 1e-4)}
    paths = {name: tmp_path / f"{name}.keras" for name in models}
    for name, (model, *_) in models.items():
        model.save(paths[name])
    printed = forked_python(_RELOAD, tmp_path / "pixels.npy", *paths.values()).splitlines()
    assert printed == [
        line for m, *_ in models.values() for line in (repr(m.spec), m.name, str(list(m.taps)))
    ]
    for name, (model, count, bound) in models.items():
        out = dict(np.load(f"{paths[name]}.npz"))
        wanted = np.asarray(model(pixels()))  # single ones of them may be near zero
        np.testing.assert_allclose(out.pop("logits"), wanted, atol=bound * np.abs(wanted).max())
        mine = {path.replace("/", "."): a for path, a in weights.as_arrays(model.variables).items()}
        assert out.keys() == mine.keys() and len(mine) == count
        for path, array in mine.items():
            np.testing.assert_array_equal(out[path], array, err_msg=path)


def test_keras_tells_and_copies_models(rn18, tmp_path):
    lines = []
    rn18.summary(line_length=150, print_fn=lines.append)
    trainable = sum(int(np.prod(v.shape)) for v in rn18.trainable_variables)
    for text in ("logits (ETFClassifier)", f"Trainable params: {trainable:,}"):
        assert text in "".join(lines)
    wanted = rn18(pixels())
    clone = keras.models.clone_model(rn18)
    again = type(rn18).from_config(rn18.get_config())
    assert again.spec == rn18.spec
    rn18.save_weights(tmp_path / "x.weights.h5")
    for copy in (clone, again):
        assert not np.allclose(copy(pixels()), wanted)
        copy.load_weights(tmp_path / "x.weights.h5")
        np.testing.assert_array_equal(copy(pixels()), wanted)
        trainable = [v.path for v in copy.trainable_variables]
        assert trainable == [v.path for v in rn18.trainable_variables]


@pytest.mark.parametrize("changes", [{}, {"head": "linear", "norm": "sw"}])
def test_keras_exports_models(changes, tmp_path):
    with small_rn18():
        model = randomize(make(**changes))
        model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(loaded.serve(pixels()), model(pixels()), rtol=1e-4, atol=1e-4)


def test_plots_of_models(rn18, tmp_path):
    pytest.importorskip("pydot")
    layers = {node.get_name().strip('"') for node in keras.utils.model_to_dot(rn18).get_nodes()}
    assert {str(id(layer)) for layer in rn18.layers} <= layers
    if shutil.which("dot"):  # Graphviz draws the picture; it is no Python package
        keras.utils.plot_model(rn18, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize(
    "dtype, optimizer",
    [
        ("float32", "SGD"),
        ("mixed_bfloat16", "SGD"),
        ("mixed_float16", "LossScaleOptimizer"),
    ],
)
def test_compile_knows_the_precision(dtype, optimizer):
    with small_rn18():
        model = make(dtype=dtype)
    model.compile(keras.optimizers.SGD(0.1))
    assert (model.dtype_policy.name, type(model.optimizer).__name__) == (dtype, optimizer)
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    "head, num_classes, changes",
    [
        ("linear", 3, {}),
        ("etf", 4, {"feature_norm": "l2", "seed": 2, "class_names": tuple("wxyz")}),
        ("linear", 5, {"input_shape": (48, 64, 3)}),
        (None, None, {}),
    ],
)
def test_replace_head(rn18, head, num_classes, changes):
    before = weights.as_arrays(rn18.variables)
    spec = rn18.spec
    fresh = replace_head(rn18, num_classes, head, **changes)
    assert (fresh.spec.head, fresh.spec.num_classes) == (head, num_classes)
    assert fresh.spec.class_names == changes.get("class_names")
    assert fresh.spec.feature_norm == changes.get("feature_norm", "none")
    assert fresh.spec.scale == (16.0 if changes.get("feature_norm") else 1.0)
    assert fresh.spec.input_shape == changes.get("input_shape", (32, 32, 3))
    assert (fresh.spec.mean, fresh.spec.std, fresh.spec.crop) == (spec.mean, spec.std, spec.crop)
    after = weights.as_arrays(fresh.variables)
    trunk = {path for path in before if not path.startswith("logits/")}
    assert trunk == {path for path in after if not path.startswith("logits/")} and len(trunk) == 100
    for path in trunk:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    for v in fresh.variables:
        v.assign(v + 1)
    assert rn18.spec == spec
    for path, array in weights.as_arrays(rn18.variables).items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)


def test_seed_draws_the_etf_and_nothing_else():
    one, same, other = (weights.as_arrays(make(seed=s).variables) for s in (3, 3, 4))
    np.testing.assert_array_equal(one["logits/kernel"], same["logits/kernel"])
    assert np.abs(one["logits/kernel"] - other["logits/kernel"]).max() > 0.01
    keras.utils.set_random_seed(1)
    first = weights.as_arrays(make(seed=3).variables)
    keras.utils.set_random_seed(1)
    again = weights.as_arrays(make(seed=4).variables)
    for path in first:
        assert np.array_equal(first[path], again[path]) == (path != "logits/kernel"), path


def test_spec_through_json(rn18):
    for spec in (rn18.spec, ClassifierSpec("rn50", 10), ClassifierSpec("rn18", None, None)):
        copy = ClassifierSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec))))
        assert copy == spec and hash(copy) == hash(spec)
    values = dataclasses.asdict(rn18.spec)
    with pytest.raises(EtfzooError, match="this etfzoo version.*'neck'"):
        ClassifierSpec.from_dict(values | {"neck": "mlp"})
    with pytest.raises(EtfzooError, match="not a classifier"):
        ClassifierSpec.from_dict({"backbone": "rn18"})


def test_default_scale():
    assert ClassifierSpec("rn18", 5).scale == 1.0
    assert ClassifierSpec("rn18", 5, feature_norm="bn").scale == 1.0
    assert ClassifierSpec("rn18", 5, feature_norm="bn_l2").scale == 16.0
    assert ClassifierSpec("rn18", 5, feature_norm="l2", scale=8.0).scale == 8.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "rn_50"}, "unknown backbone 'rn_50'; did you mean .*rn50"),
        ({"backbone": "vit"}, "unknown backbone 'vit'; known: keras:NAME, rn101, rn18, rn34, rn50"),
        ({"head": "liner"}, "unknown head 'liner'; did you mean linear"),
        ({"norm": "bnn"}, "unknown norm 'bnn'; did you mean bn"),
        ({"feature_norm": "l3"}, "unknown feature_norm 'l3'; did you mean .*l2"),
        ({"class_names": ("a", "b")}, "2 class names for 5 classes"),
        ({"head": "linear", "feature_norm": "l2"}, "belong to the etf head"),
        ({"head": "linear", "scale": 2.0}, "belong to the etf head"),
        ({"head": None, "feature_norm": "bn"}, "belong to the etf head"),
        ({"num_classes": None}, "at least 1; got None"),
        ({"num_classes": 0, "head": "linear"}, "at least 1; got 0"),
        ({"input_shape": (32, 32)}, r"\(height, width, 3\)"),
        ({"input_shape": (32, 32, 1)}, r"\(height, width, 3\)"),
    ],
)
def test_bad_specs(change, message):
    arguments = {"backbone": "rn18", "num_classes": 5} | change
    with pytest.raises(EtfzooError, match=message):
        build_classifier(**arguments)


def test_one_class_has_no_etf():
    with pytest.raises(ValueError, match="num_classes >= 2"):
        make("etf", 1)


def test_unknown_tap(rn18):
    with pytest.raises(EtfzooError, match="unknown tap 'stage5'; did you mean .*stage4"):
        feature_model(rn18, ("features", "stage5"))
    with pytest.raises(EtfzooError, match="unknown tap 'logits'"):
        feature_model(make(None, None), ("logits",))


def test_any_image_size():
    model = build_classifier("rn18", 5, input_shape=(None, None, 3))
    for side in (1, 33, 64):
        assert model(pixels(side=side)).shape == (2, 5)

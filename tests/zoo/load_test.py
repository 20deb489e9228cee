"""Tests of names, folders and loading."""

import logging
import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import etfzoo
from etfzoo.models import checkpoint, classifier, weights
from etfzoo.models.table import BACKBONES, METHODS
from etfzoo.zoo import handles, index
from testing import forked_python, fresh_python, randomize

pytestmark = pytest.mark.small_rn18

SIDE = 32


def make(head="etf", num_classes=5, seed=1, **changes):
    """A small classifier in a state that no initializer gives."""
    model = etfzoo.build_classifier(
        "rn18", num_classes, head=head, input_shape=(SIDE, SIDE, 3), **changes
    )
    randomize(model, seed)
    return model


def pixels(n=3):
    return np.random.default_rng(0).uniform(0, 255, (n, SIDE, SIDE, 3)).astype("float32")


def assert_same(model, other, skip=lambda path: False):
    mine, theirs = weights.as_arrays(model.variables), weights.as_arrays(other.variables)
    kept = {path for path in mine if not skip(path)}
    assert kept == {path for path in theirs if not skip(path)}
    assert len(kept) >= 40
    for path in kept:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)


@pytest.fixture(scope="module")
def etf():
    # Neither mean, crop nor scale is the default: the spec has to travel too.
    return make(
        mean=(1.0, 2, 3),
        crop=0.9,
        feature_norm="bn",
        scale=2.5,
        seed=7,
        class_names=tuple("abcde"),
    )


@pytest.fixture(scope="module")
def linear():
    return make("linear")


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory, etf, linear):
    home = tmp_path_factory.mktemp("zoo")
    etfzoo.publish(
        etf,
        home / "rn18_etf.shapes",
        metrics={"top1": 0.625},
        provenance={"command": "python train.py"},
        licence="CC0",
    )
    etfzoo.publish(linear, home / "rn18_linear", version=3)
    return home


@pytest.fixture(autouse=True)
def home(zoo_folder, monkeypatch):
    monkeypatch.setenv("ETFZOO_HOME", str(zoo_folder))
    return zoo_folder


def link(source, target):
    """A copy without the bytes: tests replace files and never write into them."""
    return shutil.copytree(source, target, copy_function=os.link)


@pytest.mark.parametrize("name, fixture", [("rn18_etf.shapes", "etf"), ("rn18_linear", "linear")])
def test_loads_what_was_published(name, fixture, request):
    model = request.getfixturevalue(fixture)
    loaded = etfzoo.load(name)
    assert type(loaded) is etfzoo.ImageClassifier
    assert loaded.spec == model.spec
    assert_same(loaded, model)
    np.testing.assert_array_equal(loaded(pixels()), model(pixels()))
    assert [v.path for v in loaded.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]


def test_loads_in_another_process(etf, zoo_folder, tmp_path, monkeypatch):
    """The same numbers, and one line about the bare name."""
    home = tmp_path / "home"
    link(zoo_folder / "rn18_etf.shapes/1", home / "rn18_etf/2")
    np.save(tmp_path / "x.npy", pixels())
    code = (
        "import sys, numpy, etfzoo\n"
        "sys.stderr = sys.stdout\n"
        "model = etfzoo.load('rn18_etf')\n"
        "numpy.save(sys.argv[2], model(numpy.load(sys.argv[1])))\n"
    )
    monkeypatch.setenv("ETFZOO_HOME", str(home))
    printed = forked_python(code, tmp_path / "x.npy", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), etf(pixels()))
    line = f"rn18_etf is rn18_etf version 2 ({home}/rn18_etf/2): 32x32 pixels, 5 classes, "
    assert printed == f"{line}top-1 62.5 %\n"


@pytest.mark.slow
def test_loads_on_jax(etf, tmp_path):
    pytest.importorskip("jax")
    np.save(tmp_path / "x.npy", pixels())
    code = (
        "import sys, numpy, etfzoo, testing\n"
        "small = testing.small_rn18(); small.__enter__()\n"
        "model = etfzoo.load('rn18_etf.shapes')\n"
        "numpy.save(sys.argv[2], model(numpy.load(sys.argv[1])))\n"
        "try: etfzoo.publish(model, sys.argv[3])\n"
        "except etfzoo.EtfzooError as e: print(e)\n"
    )
    arguments = [str(tmp_path / name) for name in ("x.npy", "y.npy", "m")]
    printed = fresh_python(code, *arguments, KERAS_BACKEND="jax")
    assert "publishing needs the TensorFlow backend" in printed
    expected = np.asarray(etf(pixels()))
    difference = np.abs(np.load(tmp_path / "y.npy") - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()


def test_a_spec_takes_no_network(etf, zoo_folder, tmp_path, monkeypatch):
    checkpoint.CheckpointManager(tmp_path).save(3, etf, None, {})
    monkeypatch.setattr(classifier, "ImageClassifier", None)
    for handle in ("rn18_etf.shapes", zoo_folder / "rn18_etf.shapes", tmp_path):
        assert etfzoo.spec(handle) == etf.spec
    assert etfzoo.spec("rn101_etf.in1k").num_classes == 1000  # published or not
    (file,) = (tmp_path / "checkpoints").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(etfzoo.EtfzooError, match="no readable checkpoint"):
        etfzoo.spec(tmp_path)


def test_fresh_head(etf):
    loaded = etfzoo.load("rn18_etf.shapes", num_classes=37)
    assert (loaded.spec.num_classes, loaded.spec.head) == (37, "linear")
    assert loaded.spec.class_names is None
    assert loaded(pixels()).shape == (3, 37)
    assert_same(loaded, etf, skip=classifier.is_head_variable)
    assert loaded.get_layer("logits").kernel.trainable


def test_fresh_head_of_the_kind_that_is_asked_for(linear):
    loaded = etfzoo.load("rn18_linear", num_classes=6, head="etf")
    assert (loaded.spec.num_classes, loaded.spec.head) == (6, "etf")
    assert not loaded.get_layer("logits").kernel.trainable
    # The same number of classes is a fresh head as well: the classes are others.
    fresh = etfzoo.load("rn18_linear", num_classes=5, head="linear")
    assert_same(fresh, linear, skip=classifier.is_head_variable)
    assert not np.array_equal(fresh.get_layer("logits").kernel, linear.get_layer("logits").kernel)
    plain = etfzoo.load("rn18_etf.shapes", num_classes=5, head="etf").spec
    assert (plain.class_names, plain.feature_norm, plain.scale) == (None, "none", 1.0)


def test_kind_of_head_without_num_classes(linear, etf):
    assert_same(etfzoo.load("rn18_linear", head="linear"), linear)
    other = etfzoo.load("rn18_etf.shapes", head="linear")
    assert (other.spec.num_classes, other.spec.class_names) == (5, etf.spec.class_names)
    assert_same(other, etf, skip=classifier.is_head_variable)


def test_published_without_a_head(tmp_path):
    features = make(None, None)
    folder = etfzoo.publish(features, tmp_path / "rn18_etf.headless")
    loaded = etfzoo.load(folder)
    assert_same(loaded, features)
    np.testing.assert_array_equal(loaded(pixels()), features(pixels()))
    assert_same(etfzoo.load(folder, head=None), features)
    with pytest.raises(etfzoo.EtfzooError, match="has no head: head='linear' needs num_classes"):
        etfzoo.load(folder, head="linear")
    tuned = etfzoo.load(folder, num_classes=4)
    assert tuned(pixels()).shape == (3, 4)
    assert_same(tuned, features, skip=classifier.is_head_variable)


def test_features(etf):
    loaded = etfzoo.load("rn18_etf.shapes", head=None)
    expected = etfzoo.feature_model(etf)(pixels())["features"]
    np.testing.assert_array_equal(loaded(pixels()), expected)
    assert (loaded.spec.head, loaded.spec.num_classes) == (None, None)
    with pytest.raises(etfzoo.EtfzooError, match="head=None gives features"):
        etfzoo.load("rn18_etf.shapes", num_classes=3, head=None)


def test_dtype_and_input_shape(etf):
    loaded = etfzoo.load("rn18_etf.shapes", dtype="mixed_bfloat16", input_shape=(48, 64, 3))
    assert loaded.spec.dtype == "mixed_bfloat16"
    assert loaded.get_layer("conv1_conv").compute_dtype == "bfloat16"
    assert loaded.input_shape == (None, 48, 64, 3)
    assert_same(loaded, etf)
    assert keras.config.dtype_policy().name == "float32"
    with pytest.raises(etfzoo.EtfzooError, match="unknown dtype policy 'float33'"):
        etfzoo.load("rn18_etf.shapes", dtype="float33")


def test_published_dtype_counts_and_not_the_global_one(etf):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        loaded = etfzoo.load("rn18_etf.shapes")
    finally:
        keras.config.set_dtype_policy("float32")
    assert loaded.spec.dtype == "float32"
    np.testing.assert_array_equal(loaded(pixels()), etf(pixels()))


def test_untrained(etf):
    loaded = etfzoo.load("rn18_etf.shapes", load_weights=False)
    assert loaded.spec == etf.spec
    mine, theirs = weights.as_arrays(loaded.variables), weights.as_arrays(etf.variables)
    same = {path for path in mine if np.array_equal(mine[path], theirs[path])}
    assert same == {"logits/kernel"}  # which its seed gives


def test_loaded_model_trains_and_publishes_again(tmp_path):
    model = etfzoo.load("rn18_etf.shapes", num_classes=2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(pixels(4), np.array([0, 1, 0, 1]), verbose=0)
    again = etfzoo.load(etfzoo.publish(model, tmp_path / "rn18_linear.mine"))
    assert_same(again, model)


@pytest.mark.parametrize("row", ["rn50", "rn101"])
@pytest.mark.parametrize("method", ["linear", "sw", "etf"])
def test_index_has_the_models_of_the_paper(row, method):
    known = index.read()
    name = f"{row}_{method}"
    entry = known.models[f"{name}.in1k"]
    assert row in BACKBONES and method in METHODS
    head, norm = METHODS[method]
    assert f"--backbone={row} --head={head}" in entry.command
    assert ("--norm=sw" in entry.command) == (norm == "sw")
    assert not entry.versions


def test_defaults_of_the_index_point_to_what_exists():
    known = index.read()
    with_weights = {name for name, row in known.models.items() if row.versions}
    bare = {name.partition(".")[0] for name in known.models}
    assert known.defaults.keys() == bare
    for name, tag in known.defaults.items():
        assert f"{name}.{tag}" in with_weights or not any(
            other.startswith(f"{name}.") for other in with_weights
        )


def test_index_without_weights():
    with pytest.raises(etfzoo.EtfzooError) as error:
        etfzoo.load("rn101_etf.in1k")
    assert str(error.value) == (
        "ImageNet-1k weights of rn101_etf.in1k are not published; train them with `python "
        "recipes/pretrain.py --backbone=rn101 --head=etf`, or pass load_weights=False for the "
        "untrained network"
    )
    with pytest.raises(etfzoo.EtfzooError, match="rn101_etf.in1k has no published version 2"):
        etfzoo.load("rn101_etf.in1k@2")


def test_untrained_network_of_the_index():
    model = etfzoo.load("rn50_linear", load_weights=False)
    assert model.output_shape == (None, 1000)
    assert model.input_shape == (None, 224, 224, 3)
    assert (model.spec.backbone, model.spec.head, model.spec.norm) == ("rn50", "linear", "bn")
    small = etfzoo.load(
        "rn101_etf.in1k", num_classes=9, head="etf", load_weights=False, input_shape=(32, 32, 3)
    )
    assert (small.spec.backbone, small.spec.head) == ("rn101", "etf")
    assert (small.input_shape, small.output_shape) == ((None, 32, 32, 3), (None, 9))
    whitened = etfzoo.load("rn50_sw", load_weights=False)
    assert (whitened.spec.head, whitened.spec.norm) == ("linear", "sw")
    assert etfzoo.info("rn50_sw")["spec"]["norm"] == "sw"


def test_search_order(zoo_folder, tmp_path, monkeypatch):
    """ETFZOO_HOME, then saved_models/ of a checkout, then the index."""
    checkout = tmp_path / "checkout"
    (checkout / "etfzoo").mkdir(parents=True)
    monkeypatch.setattr(handles, "_PACKAGE", checkout / "etfzoo")
    both, home = checkout / "saved_models", tmp_path / "home"
    link(zoo_folder / "rn18_linear/3", both / "rn50_linear.in1k" / "1")
    monkeypatch.setenv("ETFZOO_HOME", str(home))
    with pytest.raises(etfzoo.EtfzooError, match="not published"):  # no checkout: no setup.py
        etfzoo.load("rn50_linear")
    (checkout / "setup.py").touch()
    assert etfzoo.info("rn50_linear")["path"] == str(both / "rn50_linear.in1k/1")
    link(zoo_folder / "rn18_linear/3", home / "rn50_linear.in1k" / "1")
    assert etfzoo.info("rn50_linear")["path"] == str(home / "rn50_linear.in1k/1")
    link(zoo_folder / "rn18_linear/3", both / "rn50_linear.in1k" / "2")
    assert etfzoo.info("rn50_linear")["version"] == 1
    assert etfzoo.info("rn50_linear@2")["path"] == str(both / "rn50_linear.in1k/2")
    link(zoo_folder / "rn18_linear/3", both / "rn50_linear" / "4")  # the very name comes first
    assert etfzoo.info("rn50_linear")["version"] == 4
    assert etfzoo.info("rn50_linear.in1k")["version"] == 1
    assert {"rn50_linear", "rn50_linear.in1k", "rn101_sw.in1k"} <= set(etfzoo.list_models())


def test_default_home(monkeypatch, tmp_path):
    monkeypatch.delenv("ETFZOO_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache/etfzoo/rn18_etf.here/1"
    folder.mkdir(parents=True)
    assert "rn18_etf.here" not in etfzoo.list_models()  # an incomplete version
    (folder / "saved_model.pb").touch()
    assert "rn18_etf.here" in etfzoo.list_models()


def test_versions(zoo_folder, tmp_path, monkeypatch):
    folder = tmp_path / "rn18_etf.shapes"
    for version in (1, 9, 10):
        link(zoo_folder / "rn18_etf.shapes/1", folder / str(version))
    (folder / "11").mkdir()  # incomplete
    (folder / ".tmp-12-0").mkdir()
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path))
    assert etfzoo.info("rn18_etf.shapes")["version"] == 10
    assert etfzoo.info("rn18_etf.shapes@9")["version"] == 9
    assert etfzoo.info(folder)["version"] == 10
    assert etfzoo.info(str(folder / "9"))["version"] == 9
    with pytest.raises(etfzoo.EtfzooError, match="no version 11 here; it has: 1, 9, 10"):
        etfzoo.load("rn18_etf.shapes@11")
    for bad in ("rn18_etf.shapes@", "rn18_etf.shapes@one", "rn18_etf.shapes@0", "a@1@2"):
        with pytest.raises(etfzoo.EtfzooError, match="must be a version number"):
            etfzoo.load(bad)


@pytest.mark.parametrize("call", [etfzoo.load, etfzoo.info])
@pytest.mark.parametrize(
    "handle", ["home/rn18_x.y/1", "home/rn18_x.y", "rn18_x.y", "rn18_x.y@1", "rn18_x.z"]
)
def test_a_copy_that_was_changed_is_refused_wherever_it_lies(
    zoo_folder, tmp_path, monkeypatch, handle, call
):
    """In a file that nothing else reads, by one letter: by its hash alone."""
    checkout = tmp_path / "checkout"
    (checkout / "etfzoo").mkdir(parents=True)
    (checkout / "setup.py").touch()
    monkeypatch.setattr(handles, "_PACKAGE", checkout / "etfzoo")
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "home/rn18_x.y", checkout / "saved_models/rn18_x.z"):
        changed = link(zoo_folder / "rn18_linear/3", root / "1") / "README.md"
        text = changed.read_text()
        changed.unlink()
        changed.write_text(text[:-2] + "~" + text[-1:])
    with pytest.raises(etfzoo.EtfzooError, match="README.md is damaged: its sha256 is not"):
        call(handle)


def test_paths(linear, zoo_folder, monkeypatch):
    assert_same(etfzoo.load(zoo_folder / "rn18_linear"), linear)
    assert_same(etfzoo.load(str(zoo_folder / "rn18_linear" / "3") + "/"), linear)
    monkeypatch.chdir(zoo_folder)
    monkeypatch.setenv("ETFZOO_HOME", "/nowhere")
    assert etfzoo.info("rn18_linear")["path"] == "rn18_linear/3"  # an existing folder is a path
    assert etfzoo.info("./rn18_linear")["name"] == "rn18_linear"
    assert etfzoo.info(Path("rn18_linear/3"))["version"] == 3


def test_unknown_names_and_folders(tmp_path, zoo_folder):
    for name, match in [
        ("rn18_etf.shape", "unknown model .*did you mean rn18_etf.shapes"),
        ("rn11_etf", "unknown model 'rn11_etf'; did you mean .*rn101_etf"),
        ("rn18_etf.shapes ", "unknown model 'rn18_etf.shapes '; did you mean rn18_etf.shapes"),
        (tmp_path / "none", "no such folder: .*none"),
        ("./none", "no such folder: none"),
        (tmp_path, "is no model: it holds neither"),
        (__file__, "is no model: it holds neither"),
        ("ftp://example.org/rn18_etf", "addresses that can be loaded begin with https://"),
    ]:
        with pytest.raises(etfzoo.EtfzooError, match=match) as error:
            etfzoo.load(name)
        assert "\n" not in str(error.value)


def test_a_bare_name_without_a_default(monkeypatch):
    monkeypatch.setattr(index, "read", lambda: index.Index({}, {}))
    with pytest.raises(etfzoo.EtfzooError, match="unknown model 'rn18_etf'; did you mean .*shapes"):
        etfzoo.load("rn18_etf")


def test_a_bare_name_says_what_it_is(caplog):
    caplog.set_level(logging.INFO, "etfzoo")
    etfzoo.load("rn50_linear", load_weights=False, num_classes=2)
    assert caplog.messages == [
        "rn50_linear is rn50_linear.in1k: 224x224 pixels, 1000 classes, untrained: ImageNet-1k "
        "weights are not published"
    ]
    caplog.clear()
    etfzoo.load("rn18_etf.shapes", load_weights=False)
    assert caplog.messages == []


def test_list_models(zoo_folder):
    names = etfzoo.list_models()
    assert names == sorted(set(names))
    assert {"rn18_etf.shapes", "rn18_linear", "rn101_etf.in1k"} <= set(names)
    assert etfzoo.list_models("rn18_etf.s*") == ["rn18_etf.shapes"]
    assert etfzoo.list_models("nothing*") == []


def test_info_of_a_published_model(etf, zoo_folder):
    found = etfzoo.info("rn18_etf.shapes")
    folder = zoo_folder / "rn18_etf.shapes/1"
    assert found.pop("created").startswith("20")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 7
    assert found.pop("size_bytes") == sum(p.stat().st_size for p in files)
    assert found.pop("card") == (folder / "README.md").read_text()
    spec = found.pop("spec")
    assert classifier.ClassifierSpec.from_dict(spec) == etf.spec
    assert found == {
        "name": "rn18_etf.shapes",
        "version": 1,
        "path": str(folder),
        "published": True,
        "num_classes": 5,
        "class_names": tuple("abcde"),
        "input_shape": (32, 32, 3),
        "dataset": None,
        "command": "python train.py",
        "provenance": {"command": "python train.py"},
        "metrics": {"top1": 0.625},
        "licence": "CC0",
    }


def test_info_of_the_index():
    found = etfzoo.info("rn101_etf.in1k")
    assert found["name"] == "rn101_etf.in1k"
    assert found["published"] is False
    assert found["size_bytes"] is found["path"] is None
    assert (found["num_classes"], found["input_shape"]) == (1000, (224, 224, 3))
    assert found["command"] == "python recipes/pretrain.py --backbone=rn101 --head=etf"
    assert found["spec"]["backbone"] == "rn101"


def test_a_savedmodel_of_others(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(etfzoo.EtfzooError, match="not published by etfzoo"):
        etfzoo.load(tmp_path)

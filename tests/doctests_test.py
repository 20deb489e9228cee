"""The examples of the documentation run: those of the public names, and those of the README."""

import doctest
import os
import re

import pytest

import etfzoo
from etfzoo.data import loading, sources
from testing import CHECKOUT

NAMES = [
    "build_classifier",
    "replace_head",
    "feature_model",
    "publish",
    "load",
    "spec",
    "info",
    "list_models",
    "data.load",
    "preprocess",
    "decode_predictions",
    "layers.ETFClassifier",
    "layers.SwitchableWhitening",
    "neural_collapse.NeuralCollapseStatistics",
    "neural_collapse.scalars",
]


def _run_examples(name):
    """Runs the examples in the docstring of a public name; returns how many there are."""
    thing = etfzoo
    for part in name.split("."):
        thing = getattr(thing, part)
    report = []
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    return runner.tries


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in which the example of `etfzoo.publish` has run, as those of `load` say."""
    folder, before = tmp_path_factory.mktemp("examples"), os.getcwd()
    os.chdir(folder)
    try:
        _run_examples("publish")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No model of this machine, and no network."""
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ETFZOO_OFFLINE", "1")
    monkeypatch.delenv("ETFZOO_INDEX", raising=False)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "publish"])
def test_examples_of_docstrings(name, published, monkeypatch):
    monkeypatch.chdir(published)
    assert _run_examples(name) >= 2


def test_the_example_of_publish_leaves_one_version(published):
    assert [path.name for path in (published / "models/rn18_etf.birds").iterdir()] == ["1"]


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text("utf-8"), re.S)
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 512)
    assert names["flowers"].output_shape == (None, 102)


@pytest.mark.slow
def test_the_python_of_the_page_about_keras(published, embedded_dir, monkeypatch):
    """With a small model in place of a large one, and the data where tests have them."""
    monkeypatch.chdir(published)
    resolve = sources.resolve
    monkeypatch.setattr(loading, "resolve", lambda name, data_dir: resolve(name, embedded_dir))
    page = (CHECKOUT / "docs/keras.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    assert code.count('"rn101_etf"') == 2
    names = {}
    exec(code.replace('"rn101_etf"', '"models/rn18_etf.birds"'), names)
    model, half, best = names["model"], names["half"], names["best"]
    assert [v.path for v in model.trainable_variables] == ["logits/kernel", "logits/bias"]
    assert half.optimizer.name == "loss_scale_optimizer"
    assert type(best) is etfzoo.ImageClassifier and best.spec == model.spec
    assert best.spec.class_names == tuple("0123456789")
    assert {"val_accuracy", "nc/test/nc1"} <= names["history"].history.keys()

"""The names that users import."""

import ast
import importlib
from pathlib import Path

import keras
import pytest

import etfzoo
from etfzoo import registration
from etfzoo.cli.__main__ import commands
from etfzoo.models import checkpoint
from testing import CHECKOUT, fresh_python, make_classifier

NAMES = """
import sys, etfzoo
assert not {"keras", "tensorflow", "jax"} & set(sys.modules)
for name in etfzoo.__all__:
    assert getattr(etfzoo, name) is not None, name
assert etfzoo.backbones.whiten and etfzoo.callbacks.NeuralCollapse
assert not hasattr(etfzoo, "sweep")
"""

# As modules of their own, before and after the attribute is asked for.
IMPORTS = """
import importlib, sys
{first}
import etfzoo
from etfzoo.backbones import stock
from etfzoo.callbacks import NeuralCollapse
from etfzoo.neural_collapse import NeuralCollapseStatistics
from etfzoo.protocols import PROTOCOLS
import etfzoo.layers, etfzoo.serving
for name, module in {{"neural_collapse": "measure.neural_collapse", "backbones": "models.backbones",
                     "callbacks": "measure.callbacks", "serving": "zoo.serving_client"}}.items():
    own = importlib.import_module("etfzoo." + module)
    assert importlib.import_module("etfzoo." + name) is own is getattr(etfzoo, name), name
    assert own.__name__ == own.__spec__.name == "etfzoo." + module
    assert importlib.reload(own) is own
importlib.reload(sys.modules["keras"])
found = sys.modules["keras"].saving.get_registered_object("etfzoo>ETFClassifier")
assert found is etfzoo.layers.ETFClassifier, found  # and not replaced
try:
    import etfzoo.sweep
except ModuleNotFoundError:
    print("no such module")
"""

# Runs the first argument, which waits for no import of these.
INSTANT = """
import pathlib, runpy, sys
ask, *arguments = sys.argv[1:]
exec(ask)
slow = {"tensorflow", "keras", "keras_cv", "tensorflow_datasets", "sklearn", "scipy", "matplotlib"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""
ASK = """
import etfzoo
models = etfzoo.list_models()
assert "rn18_etf.mine" in models and "rn50_etf.in1k" in models
for name in ("rn18_etf.mine", "rn50_etf.in1k", arguments[0]):
    assert etfzoo.info(name)["spec"]["backbone"] == etfzoo.spec(name).backbone
assert etfzoo.spec(arguments[1]).num_classes == 7
for ask in etfzoo.info, etfzoo.spec:
    try:
        ask("rn50_etv.in1k")
    except etfzoo.EtfzooError as error:
        assert "did you mean rn50_etf.in1k" in str(error)
    else:
        raise AssertionError("an unknown name")
"""
HELP = """
sys.argv = [*arguments, "--help"]
try:
    if sys.argv[0] == "etfzoo":
        runpy.run_module("etfzoo.cli", run_name="__main__")
    else:
        sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
"""


def test_what_models_are_is_known_without_tensorflow(small_network, tmp_path):
    model = make_classifier()
    folder = etfzoo.publish(model, tmp_path / "rn18_etf.mine")
    checkpoint.CheckpointManager(tmp_path / "run").save(3, model, None, {})
    fresh_python(INSTANT, ASK, folder, tmp_path / "run", ETFZOO_HOME=str(tmp_path))


# Asks for one saved file after the other; the first argument says what is imported before.
LOAD = """
import sys
first, *paths = sys.argv[1:]
exec(first)
assert not any(name.startswith("etfzoo.") and "registration" not in name and "version" not in name
               for name in sys.modules)
for path in paths:
    print(type(keras.saving.load_model(path).layers[-1]).__module__)
"""


@pytest.mark.parametrize("first", ["import etfzoo, keras", "import keras, etfzoo"])
def test_keras_loads_files_with_layers_of_etfzoo(first, tmp_path):
    whole, own = tmp_path / "classifier.keras", tmp_path / "own.keras"
    make_classifier().save(whole)
    keras.Sequential(
        [
            keras.Input((6,)),
            etfzoo.layers.FusedBatchNormalization(),
            etfzoo.layers.ETFClassifier(5),
        ]
    ).save(own)
    found = fresh_python(LOAD, first, own, whole).split()
    assert found == ["etfzoo.layers.etf_classifier"] * 2


def test_all_classes_that_keras_saves_are_registered():
    classes = {
        f"etfzoo>{name}": getattr(importlib.import_module(module), name)
        for name, module in registration.CLASSES.items()
    }
    table = keras.saving.get_custom_objects()
    assert {name: kind for name, kind in table.items() if name.startswith("etfzoo>")} == classes
    source = "".join(p.read_text("utf-8") for p in Path(etfzoo.__file__).parent.rglob("*.py"))
    assert source.count("@keras.saving.register_keras_serializable(") == len(classes)


@pytest.mark.parametrize("command", commands())
def test_help_of_a_recipe_comes_without_tensorflow(command):
    text = fresh_python(INSTANT, HELP, CHECKOUT / "recipes" / f"{command}.py")
    assert text.startswith(commands()[command]) and "\n  --" in text


def test_help_of_the_installed_command_comes_without_tensorflow():
    text = fresh_python(INSTANT, HELP, "etfzoo")
    assert all(f"  {name} " in text for name in commands())
    assert "  --backbone: " in fresh_python(INSTANT, HELP, "etfzoo", "pretrain")


@pytest.mark.parametrize("first", ["", NAMES], ids=["at once", "after the names"])
def test_names_are_there_after_a_plain_import_and_as_modules(first):
    assert "no such module" in fresh_python(IMPORTS.format(first=first))


def test_type_checkers_see_all_public_names():
    tree = ast.parse(Path(etfzoo.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE" in ast.dump(node))
    seen = {a.asname or a.name for node in block.body for a in node.names}
    assert seen | {"__version__"} == set(etfzoo.__all__)

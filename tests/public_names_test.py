"""The names that users import."""

import ast
from pathlib import Path

import pytest

import etfzoo
from testing import fresh_python

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
try:
    import etfzoo.sweep
except ModuleNotFoundError:
    print("no such module")
"""


@pytest.mark.parametrize("first", ["", NAMES], ids=["at once", "after the names"])
def test_names_are_there_after_a_plain_import_and_as_modules(first):
    assert "no such module" in fresh_python(IMPORTS.format(first=first))


def test_type_checkers_see_all_public_names():
    tree = ast.parse(Path(etfzoo.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE" in ast.dump(node))
    seen = {a.asname or a.name for node in block.body for a in node.names}
    assert seen | {"__version__"} == set(etfzoo.__all__)

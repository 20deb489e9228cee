"""Keras finds the classes of etfzoo in a `.keras` file, although `import etfzoo` imports no Keras.

Keras looks them up in its table of registered classes, where each is entered when the module that
defines it is imported, and imports no foreign module that a file names. So an entry here stands for
each of them, which imports the class when a file asks for it.
"""

import dataclasses
import importlib
import importlib.abc
import sys

# The module of each registered class.
CLASSES = {
    "ETFClassifier": "etfzoo.layers",
    "FusedBatchNormalization": "etfzoo.layers",
    "ImageClassifier": "etfzoo.models.classifier",
    "SwitchableWhitening": "etfzoo.layers",
    "WarmupSteps": "etfzoo.training.schedules",
}


@dataclasses.dataclass(frozen=True)
class _Late:
    """What Keras asks of a class that it has found by its name."""

    module: str
    name: str

    def from_config(self, config):
        return getattr(importlib.import_module(self.module), self.name).from_config(config)


class _WhenKerasIsImported(importlib.abc.MetaPathFinder):
    """Finds Keras as all other finders do, and enters the classes once it is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "keras":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _enter(module)

            spec.loader.exec_module = exec_module
        return spec


def _enter(keras):
    table = keras.saving.get_custom_objects()
    for name, module in CLASSES.items():
        table.setdefault(f"etfzoo>{name}", _Late(module, name))


def register() -> None:
    """Enters the classes into Keras's table: now if Keras is imported, else when it will be."""
    if "keras" in sys.modules:
        _enter(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, _WhenKerasIsImported())

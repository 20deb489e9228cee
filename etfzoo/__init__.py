"""etfzoo: image backbones pretrained with a fixed equiangular-tight-frame (ETF) classifier.

The public names below are imported on first use, so that `import etfzoo` stays instant.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

from etfzoo import registration
from etfzoo.version import __version__

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError("etfzoo needs TensorFlow: pip install 'etfzoo[cpu]' (or [gpu], [tpu])")

if TYPE_CHECKING:  # what __getattr__ gives, for editors and type checkers
    from etfzoo import data, layers
    from etfzoo.data.preprocessing import decode_predictions, preprocess
    from etfzoo.errors import EtfzooError
    from etfzoo.measure import callbacks, neural_collapse
    from etfzoo.models import backbones
    from etfzoo.models.classifier import (
        ImageClassifier,
        build_classifier,
        feature_model,
        replace_head,
    )
    from etfzoo.training import protocols
    from etfzoo.zoo import serving_client as serving
    from etfzoo.zoo.handles import info, list_models, spec
    from etfzoo.zoo.load import load
    from etfzoo.zoo.publish import publish

_NAMES = {
    "ImageClassifier": "etfzoo.models.classifier",
    "build_classifier": "etfzoo.models.classifier",
    "feature_model": "etfzoo.models.classifier",
    "replace_head": "etfzoo.models.classifier",
    "info": "etfzoo.zoo.handles",
    "list_models": "etfzoo.zoo.handles",
    "load": "etfzoo.zoo.load",
    "publish": "etfzoo.zoo.publish",
    "spec": "etfzoo.zoo.handles",
    "decode_predictions": "etfzoo.data.preprocessing",
    "preprocess": "etfzoo.data.preprocessing",
    "EtfzooError": "etfzoo.errors",
}
# Modules by the public name under which they can be imported, too.
_MODULES = {
    "backbones": "etfzoo.models.backbones",
    "callbacks": "etfzoo.measure.callbacks",
    "data": "etfzoo.data",
    "layers": "etfzoo.layers",
    "neural_collapse": "etfzoo.measure.neural_collapse",
    "protocols": "etfzoo.training.protocols",
    "serving": "etfzoo.zoo.serving_client",
}

__all__ = [
    "EtfzooError",
    "ImageClassifier",
    "__version__",
    "backbones",
    "build_classifier",
    "callbacks",
    "data",
    "decode_predictions",
    "feature_model",
    "info",
    "layers",
    "list_models",
    "load",
    "neural_collapse",
    "preprocess",
    "protocols",
    "publish",
    "replace_head",
    "serving",
    "spec",
]


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'etfzoo' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import etfzoo.callbacks` find the module of that public name in its package."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package == __name__ and _MODULES.get(name, fullname) != fullname:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def create_module(self, spec):
        module = importlib.import_module(_MODULES[spec.name.partition(".")[2]])
        # The import system is about to overwrite these with those of the alias.
        self._own = module.__spec__, module.__loader__, module.__package__
        return module

    def exec_module(self, module):
        module.__spec__, module.__loader__, module.__package__ = self._own


sys.meta_path.append(_Alias())
registration.register()

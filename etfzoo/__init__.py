"""etfzoo: image backbones pretrained with a fixed equiangular-tight-frame (ETF) classifier.

The public names below are imported on first use, so that `import etfzoo` stays instant.
"""

import importlib
import importlib.util

from etfzoo.version import __version__

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError("etfzoo needs TensorFlow: pip install 'etfzoo[cpu]' (or [gpu], [tpu])")

_PUBLIC = {
    "build_classifier": "etfzoo.classifier",
    "replace_head": "etfzoo.classifier",
    "feature_model": "etfzoo.classifier",
    "ImageClassifier": "etfzoo.classifier",
    "load": "etfzoo.zoo",
    "list_models": "etfzoo.zoo",
    "info": "etfzoo.zoo",
    "publish": "etfzoo.export",
    "preprocess": "etfzoo.inference",
    "decode_predictions": "etfzoo.inference",
    "EtfzooError": "etfzoo.errors",
}
_MODULES = ("layers", "callbacks", "data", "protocols")

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"etfzoo.{name}")
    raise AttributeError(f"module 'etfzoo' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)

"""Networks as rows of data, known without Keras."""

import dataclasses

from etfzoo.errors import unknown

HEADS = ("etf", "linear")
NORMS = ("bn", "sw")
# As ETFClassifier takes them.
FEATURE_NORMS = ("none", "bn", "l2", "bn_l2")
FRAMES = ("simplex_etf", "centred_etf", "orthogonal", "hadamard", "softmax_code")
INITIALIZERS = ("glorot_uniform", "he_fan_out")
# The most hidden layers of a projector, and units of one.
PROJECTOR_LAYERS, PROJECTOR_WIDTH = 3, 2**15
PROJECTOR_KINDS = ("trained", "etf")
# The paper's three ways to pretrain: head and norm.
METHODS = {"linear": ("linear", "bn"), "sw": ("linear", "sw"), "etf": ("etf", "bn")}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One ResNet: what `keras_cv.models.ResNetBackbone` is built from."""

    block_type: str
    blocks: tuple[int, ...]
    filters: tuple[int, ...] = (64, 128, 256, 512)

    @property
    def feature_dim(self) -> int:
        return self.filters[-1] * (4 if self.block_type == "block" else 1)


BACKBONES = {
    "rn18": Backbone("basic_block", (2, 2, 2, 2)),
    "rn34": Backbone("basic_block", (3, 4, 6, 3)),
    "rn50": Backbone("block", (3, 4, 6, 3)),
    "rn101": Backbone("block", (3, 4, 23, 3)),
}


def get_backbone(name: str) -> Backbone:
    """The row of that name.

    Raises:
        EtfzooError: unknown name, with close matches.
    """
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)
    return BACKBONES[name]


# How a published model stores its kernels.
STORAGES = ("float32", "float16")
# Numbers of published versions, as folders are named; TF Serving's are int64.
VERSION = "[1-9][0-9]{0,18}"
MAX_VERSION = 2**63 - 1

"""Networks as rows of data, known without Keras."""

import dataclasses

from etfzoo.errors import EtfzooError, unknown

HEADS = ("etf", "linear")
NORMS = ("bn", "sw")
# As ETFClassifier takes them.
FEATURE_NORMS = ("none", "bn", "l2", "bn_l2")
FRAMES = ("simplex_etf", "centred_etf", "orthogonal", "hadamard", "softmax_code")
INITIALIZERS = ("glorot_uniform", "he_fan_out")
# The most hidden layers of a projector, and units of one.
PROJECTOR_LAYERS, PROJECTOR_WIDTH = 3, 2**15
PROJECTOR_KINDS = ("trained", "etf")
# From images to features, and all of them together.
PARTS = ("stem", "stage1", "stage2", "stage3", "stage4", "backbone")
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


# Constructors of keras.applications; as a backbone `keras:EfficientNetB0`.
PREFIX = "keras:"
APPLICATIONS = (
    *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
    *(f"DenseNet{depth}" for depth in (121, 169, 201)),
    *(f"EfficientNetB{number}" for number in range(8)),
    *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    "InceptionResNetV2", "InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Large",
    "MobileNetV3Small", "NASNetLarge", "NASNetMobile", "ResNet50", "ResNet101", "ResNet152",
    "ResNet50V2", "ResNet101V2", "ResNet152V2", "VGG16", "VGG19", "Xception",
)  # fmt: skip
# What a model of the user's own is called.
CUSTOM = "custom"
OTHER_BACKBONES = (*(PREFIX + name for name in APPLICATIONS), CUSTOM)


def short_name(backbone: str) -> str:
    """What a backbone is called in names of models and workdirs: `efficientnetb0`."""
    return backbone.removeprefix(PREFIX).lower()


def by_short_name() -> dict[str, str]:
    """All backbones by their short name."""
    return {short_name(name): name for name in (*BACKBONES, *OTHER_BACKBONES)}


def check_backbone(name: str, norm: str = "bn") -> None:
    """Checks the name of a backbone of any kind, and that it has such a norm.

    Raises:
        EtfzooError: unknown name, with close matches; or Switchable Whitening, whose places are
            those of KerasCV's ResNets.
    """
    if name in OTHER_BACKBONES:
        if norm != "bn":
            raise EtfzooError(
                f"`norm={norm}` is for {', '.join(BACKBONES)}; a backbone {name} has the norms "
                "that it has: leave it out"
            )
    elif name not in BACKBONES:
        others = OTHER_BACKBONES if str(name).startswith(PREFIX) else (f"{PREFIX}NAME",)
        raise unknown("backbone", name, (*BACKBONES, *others))


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

"""What a classifier is, known without Keras."""

import dataclasses

from etfzoo.data.datasets import IMAGENET_STATISTICS
from etfzoo.errors import EtfzooError, shown, unknown
from etfzoo.models.table import (
    BACKBONES,
    FEATURE_NORMS,
    FRAMES,
    HEADS,
    NORMS,
    PROJECTOR_KINDS,
    PROJECTOR_LAYERS,
    PROJECTOR_WIDTH,
    check_backbone,
    get_backbone,
    short_name,
)

IMAGENET_MEAN, IMAGENET_STD = IMAGENET_STATISTICS
# What a backbone takes, by the names that keras.applications has for it: mean and standard
# deviation that turn 0..255 into it, and whether it is blue, green, red.
PIXELS = {
    "raw": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
    "tf": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5), False),
    "torch": (IMAGENET_MEAN, IMAGENET_STD, False),
    "caffe": ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), True),
}
# What belongs to the etf head, and what stands there of another one.
ETF_FIELDS = {
    "feature_norm": "none", "scale": None, "frame": "simplex_etf", "learn_scale": False,
    "guided": False,
}  # fmt: skip
# The projector goes with a head of either kind, see `etfzoo.models.projector`.
PROJECTOR_FIELDS = {
    "projector_layers": 0, "projector_width": None, "projector_kind": "trained",
}  # fmt: skip
# All that a fresh head does not take over from the one before it.
HEAD_FIELDS = ETF_FIELDS | PROJECTOR_FIELDS


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
    """All that rebuilds a classifier; travels with it in every file. See build_classifier."""

    backbone: str
    num_classes: int | None
    head: str | None = "etf"
    norm: str = "bn"
    input_shape: tuple[int | None, int | None, int] = (224, 224, 3)
    feature_norm: str = "none"
    scale: float | None = None
    seed: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    class_names: tuple[str, ...] | None = None
    dtype: str = "float32"
    # What people are shown where the names are codes, as WordNet ids are; publishing fills it in.
    class_descriptions: tuple[str, ...] | None = None
    frame: str = "simplex_etf"
    learn_scale: bool = False
    projector_layers: int = 0
    projector_width: int | None = None
    projector_kind: str = "trained"
    guided: bool = False
    # Of a backbone that is no row of BACKBONES: its graph, see `etfzoo.models.custom`.
    network: str | None = None
    # Whether it takes its channels as blue, green, red; `mean` and `std` are in the order of RGB.
    bgr: bool = False

    def __post_init__(self):
        for field in ("input_shape", "mean", "std", "class_names", "class_descriptions"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, tuple(value))
        if self.scale is None:
            unit = self.feature_norm == "none" and self.projector_kind == "etf"
            unit = (unit or self.feature_norm.endswith("l2")) and self.head == "etf"
            object.__setattr__(self, "scale", 16.0 if unit else 1.0)
        check_backbone(self.backbone, self.norm if self.norm in NORMS else "bn")
        check_projector(self.projector_layers, self.projector_width, self.projector_kind)
        if self.backbone in BACKBONES:
            if self.network is not None:
                raise EtfzooError(f"the network of {self.backbone} is known: it takes no other one")
            width = self.projector_width_behind(get_backbone(self.backbone).feature_dim)
            object.__setattr__(self, "projector_width", width)
        if not (self.network is None or isinstance(self.network, str)):
            raise EtfzooError("network must be text")
        if type(self.bgr) is not bool:
            raise EtfzooError("bgr must be true or false")
        if self.projector_layers and self.head is None:
            raise EtfzooError("projector_layers belong to a head: features are taken before them")
        if self.head is not None and self.head not in HEADS:
            raise unknown("head", self.head, HEADS)
        own = {name: getattr(self, name) for name in ETF_FIELDS}
        if self.head != "etf" and own != ETF_FIELDS | {"scale": 1.0}:
            raise EtfzooError(f"{', '.join(ETF_FIELDS)} belong to the etf head")
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.feature_norm not in FEATURE_NORMS:
            raise unknown("feature_norm", self.feature_norm, FEATURE_NORMS)
        if self.frame not in FRAMES:
            raise unknown("frame", self.frame, FRAMES)
        if self.guided and self.frame != "simplex_etf":
            raise EtfzooError(
                f"`guided` turns a simplex ETF to the class means, and no {self.frame}: leave out "
                "`frame`"
            )
        if (
            len(self.input_shape) != 3
            or self.input_shape[-1] != 3
            or not all(n is None or (isinstance(n, int) and n > 0) for n in self.input_shape)
        ):
            raise EtfzooError(f"input_shape must be (height, width, 3); got {self.input_shape}")
        if not 0 < self.crop <= 1:
            raise EtfzooError(f"crop must be in (0, 1]; got {self.crop}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise EtfzooError(f"mean and std need 3 numbers each; got {self.mean} and {self.std}")
        if self.head is not None and (self.num_classes is None or self.num_classes < 1):
            raise EtfzooError(f"num_classes must be at least 1; got {self.num_classes}")
        for field in ("class_names", "class_descriptions"):
            names = getattr(self, field)
            if not all(isinstance(name, str) for name in names or ()):
                raise EtfzooError(f"{field} must be strings")
            if names is not None and len(names) != self.num_classes:
                what = field.replace("_", " ")
                raise EtfzooError(f"{len(names)} {what} for {self.num_classes} classes")

    @property
    def penultimate(self) -> str:
        """The tap on which the head acts: `projected`, or without a projector `features`."""
        return "projected" if self.projector_layers else "features"

    @property
    def short_name(self) -> str:
        """What the backbone is called in names of models: of `keras:VGG16` it is `vgg16`."""
        return short_name(self.backbone)

    def projector_width_behind(self, features: int) -> int | None:
        """Units of the projector's layers behind that many features; None without a projector.

        Raises:
            EtfzooError: a projector of frozen ETFs of another width than the features.
        """
        if not self.projector_layers or self.projector_width is None:
            return features if self.projector_layers else None
        if self.projector_kind == "etf" and self.projector_width != features:
            raise EtfzooError(
                f"the etf projector keeps the width of the features, {features}: leave out "
                "`projector_width`"
            )
        return self.projector_width

    @property
    def labels(self) -> tuple[str, ...]:
        """What people are shown for each class: description, else name, else number."""
        numbers = (str(i) for i in range(self.num_classes or 0))
        return self.class_descriptions or self.class_names or tuple(numbers)

    @classmethod
    def from_dict(cls, values: dict) -> "ClassifierSpec":
        """The spec written by `dataclasses.asdict`, also after a trip through JSON.

        Raises:
            EtfzooError: unknown or missing fields (a file of another etfzoo version).
        """
        known = {f.name for f in dataclasses.fields(cls)}
        extra = sorted(values.keys() - known)
        if extra or not {"backbone", "num_classes"} <= values.keys():
            raise EtfzooError(
                f"not a classifier of this etfzoo version (unknown fields: {extra or 'none'})"
            )
        return cls(**values)


def check_projector(layers, width, kind) -> None:
    """Checks size and kind of a projector, see `etfzoo.models.projector`.

    Args:
        layers: number of hidden layers; 0 is no projector.
        width: units of each; None is as many as features.
        kind: `"trained"` or `"etf"`.

    Raises:
        EtfzooError: no whole numbers, out of their limits, an unknown kind, or a projector of no
            hidden layer.
    """
    for name, value, low, high in (
        ("projector_layers", layers, 0, PROJECTOR_LAYERS),
        ("projector_width", 1 if width is None else width, 1, PROJECTOR_WIDTH),
    ):
        if type(value) is not int or not low <= value <= high:
            raise EtfzooError(
                f"{name} must be a whole number from {low} to {high}; got {shown(value)}"
            )
    if width is not None and not layers:
        raise EtfzooError(
            "a projector without a hidden layer is linear, and a fixed head behind it a trainable "
            f"one in disguise: give `projector_layers` (1 to {PROJECTOR_LAYERS}) with "
            "`projector_width`"
        )
    if kind not in PROJECTOR_KINDS:
        raise unknown("projector_kind", kind, PROJECTOR_KINDS)
    if kind != "trained" and not layers:
        raise EtfzooError(
            f"there is no projector: with `projector_kind={kind}` give `projector_layers`, too"
        )
